"""Tables of notebook 05: the loss of every recipe, whether errors add, equal bytes, the front, and formats by layer."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.evaluation import paired
from lib.evaluation.paired import PairedDifference
from lib.quantization.rounding import DENSE_BITS
from lib.studies.joint import configurations
from lib.studies.joint.comparisons import ONE_STEP, order_label, target_label
from lib.studies.joint.configurations import Prepared
from lib.studies.joint.hardware_aware import Tried
from lib.studies.joint.measured_formats import Offer, Sensitivity
from lib.studies.joint.runs import Measured
from lib.studies.pruning.gain_tables import adjusted_table, gain, gain_columns
from lib.timing import clock

DENSE = "dense"
NO_TARGET = "0 %"
MEGABYTE = 1e6
NOTHING = (math.nan,) * 3
Key = tuple[str, str, str, str, int, int | None]  # model, method, order, target, bits, group size


def key_of(found: Measured) -> Key:
    """Return what tells a recipe from the others of a table: (model, method, order, target, bits, group size)."""
    recipe = found.recipe
    group = recipe.grid.group_size if recipe.grid.rounds else None
    return found.model, found.name, order_label(recipe), target_label(recipe.target), recipe.grid.bits, group


def by_key(found: Sequence[Measured]) -> dict[Key, list[Measured]]:
    """Gather the seeds of each recipe, in order of appearance."""
    gathered: dict[Key, list[Measured]] = {}
    for one in found:
        gathered.setdefault(key_of(one), []).append(one)
    return gathered


def stacked(found: Sequence[Measured]) -> Float[Tensor, "seed window"]:
    """Stack the losses of one recipe."""
    return torch.stack([one.loss for one in found])


def dense_loss(found: Sequence[Measured], model: str) -> Float[Tensor, "one window"]:
    """Return the losses of the dense model.

    Raises:
        KeyError: it was not measured.
    """
    for one in found:
        if (one.model, one.name) == (model, DENSE):
            return one.loss[None]
    raise KeyError(f"no dense measurement of {model}")


def loss_table(found: Sequence[Measured], *, seed: int) -> pd.DataFrame:
    """Tabulate the loss of every recipe, its increase over the dense model and its bytes.

    Args:
        found: of one or several models, each with a dense measurement named `"dense"`.
        seed: of the bootstrap.

    Returns:
        One row a recipe: `zeros` in per cent, `MB` of the whole model as stored, `loss` in nats per token, its `increase` with
        95 % interval over windows and calibrations.
    """
    rows = []
    for key, seeds in by_key(found).items():
        model, method, order, target, bits, group = key
        increase = paired.paired_difference(stacked(seeds), dense_loss(found, model), seed=seed)
        rows.append({
            "model": model, "method": method, "order": order, "sparsity": target, "bits": bits, "group": group or math.nan,
            "zeros, %": 100 * _mean([one.zeros for one in seeds]), "MB": _mean([one.bytes for one in seeds]) / MEGABYTE,
            "loss": float(stacked(seeds).mean()), "increase": increase.estimate, "low": increase.interval[0],
            "high": increase.interval[1], "seeds": len(seeds),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def interactions(found: Sequence[Measured], *, seed: int) -> pd.DataFrame:
    """Tabulate what pruning and rounding cost together beyond the sum of what each costs alone.

    Args:
        found: recipes with both steps, and with each of them alone, by the same method on the same text.
        seed: of the bootstrap.

    Returns:
        One row a recipe of both: `pruning`, `rounding` and `both`, increases over dense in nats per token; `excess`, the third
        minus the first two, with 95 % interval, p-value and Holm-adjusted p-value; `excess, %` of the sum, NaN where the sum is
        not above 0.
    """
    rows = []
    for key in by_key(found):
        if key[2] == ONE_STEP:
            continue
        dense, *steps = _steps(found, key)
        cost = [float((own - dense).mean()) for own in steps]
        excess = excess_of(found, key, seed=seed)
        rows.append({
            "model": key[0], "method": key[1], "order": key[2], "sparsity": key[3], "bits": key[4], "pruning": cost[0],
            "rounding": cost[1], "both": cost[2], "excess": excess.estimate, "low": excess.interval[0],
            "high": excess.interval[1], "p": excess.p_value, "excess, %": _share(excess.estimate, cost[0] + cost[1]),
        })  # fmt: skip
    adjusted = paired.holm({index: row["p"] for index, row in enumerate(rows)})
    return pd.DataFrame([{**row, "p (Holm)": adjusted[index]} for index, row in enumerate(rows)])


def excess_of(found: Sequence[Measured], key: Key, *, seed: int) -> PairedDifference:
    """Return by how much the cost of both steps passes the sum of their costs: above 0 when they harm each other.

    Raises:
        KeyError: one of the steps alone was not measured.
    """
    dense, pruned, rounded, both = _steps(found, key)
    return paired.paired_difference(both, pruned + rounded - dense, seed=seed)


def _steps(found: Sequence[Measured], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the losses of dense, pruned, rounded, and both."""
    groups, (model, method, _, target, bits, group) = by_key(found), key
    keys = (model, method, ONE_STEP, target, DENSE_BITS, None), (model, method, ONE_STEP, NO_TARGET, bits, group), key
    pruned, rounded, both = (stacked(groups[own]) for own in keys)
    return dense_loss(found, model), pruned, rounded, both


def _share(part: float, whole: float) -> float:
    return 100 * part / whole if whole > 0 else math.nan


def order_gains(found: Sequence[Measured], *, seed: int, base: str = "prune, quantize") -> pd.DataFrame:
    """Tabulate the gain of the other orders over one of them, for each method, sparsity and number of bits."""
    groups, rows = by_key(found), []
    for key, seeds in groups.items():
        model, method, order, target, bits, group = key
        other = groups.get((model, method, base, target, bits, group))
        if order in (ONE_STEP, base) or other is None:
            continue
        own = gain(stacked(seeds), stacked(other), name=order, model=model, sparsity=seeds[0].recipe.target.sparsity, seed=seed)
        named = {"model": model, "method": method, "order": order, "sparsity": target, "bits": bits}
        rows.append({**named, **gain_columns(own)})
    return adjusted_table(rows, first=("model", "method", "order", "sparsity", "bits"))


def label(key: Key) -> str:
    """Name a recipe in one line.

    >>> label(("dlm", "Wanda + nearest", "joint", "50 %", 4, 64)), label(("dlm", "GPTQ", "one step", "0 %", 3, 64))
    ('Wanda + nearest, joint, 50 %, 4 bits', 'GPTQ, 3 bits')
    """
    _, method, order, target, bits, _ = key
    parts = [method, "" if order == ONE_STEP else order, "" if target == NO_TARGET else target]
    return ", ".join([*filter(None, parts), *([] if bits == DENSE_BITS else [f"{bits} bits"])])


def equal_bytes(found: Sequence[Measured], *, seed: int) -> pd.DataFrame:
    """Compare each pruned recipe with the unpruned one of the same method that is nearest in size, but not larger.

    Args:
        found: recipes with and without pruning.
        seed: of the bootstrap.

    Returns:
        One row a pruned recipe with such a rival: `MB` of both as stored, and the gain of pruning over it. A positive gain says
        that zeros and more bits are worth more than fewer bits, as far as the sizes are equal.
    """
    groups, rows = by_key(found), []
    for key, seeds in groups.items():
        model, method, _, target, bits, _ = key
        size = _mean([one.bytes for one in seeds])
        rivals = {
            other: _mean([one.bytes for one in own])
            for other, own in groups.items()
            if other[:2] == (model, method) and other[3] == NO_TARGET
        }
        fitting = [other for other, other_size in rivals.items() if other_size <= size]
        if target == NO_TARGET or not fitting:
            continue
        rival = max(fitting, key=rivals.__getitem__)
        own = gain(stacked(seeds), stacked(groups[rival]), name="", model=model, sparsity=0.0, seed=seed)
        named = {"model": model, "recipe": label(key), "sparsity": target, "bits": bits, "MB": size / MEGABYTE}
        beside = {"rival": f"{rival[4]} bits", "rival, MB": rivals[rival] / MEGABYTE}
        rows.append({**named, **beside, **gain_columns(own)})
    return adjusted_table(rows, first=("model", "recipe", "sparsity", "bits", "MB", "rival", "rival, MB"))


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell for each (cost, loss) whether no other point is at least as good in both and better in one.

    >>> on_front([(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0)])
    [True, True, False, False]
    """
    return [not any(o[0] <= p[0] and o[1] <= p[1] and (o[0] < p[0] or o[1] < p[1]) for o in points) for p in points]


def front_table(table: pd.DataFrame) -> pd.DataFrame:
    """Mark which rows of a `loss_table` no other row of the same model dominates in bytes and loss, smallest first."""
    parts = []
    for _, rows in table.groupby("model", sort=False):
        marks = on_front(list(zip(rows["MB"], rows["increase"], strict=True)))
        parts.append(rows.assign(**{"on the front": marks}).sort_values("MB", kind="stable"))
    return pd.concat(parts, ignore_index=True)


def noise_table(
    losses: Mapping[str, Float[Tensor, "ratio window"]], ratios: Sequence[float], *, model: str, seed: int
) -> pd.DataFrame:
    """Tabulate the increase of the loss at each mask ratio.

    Args:
        losses: in nats per masked token, by recipe, `"dense"` among them.
        ratios: shares of the positions that are masked.
        model: its name.
        seed: of the bootstrap.
    """
    rows = []
    for name, values in losses.items():
        for index, ratio in enumerate(ratios if name != DENSE else ()):
            result = paired.paired_difference(values[index], losses[DENSE][index], seed=seed)
            bounds = dict(zip(("low", "high"), result.interval, strict=True))
            dense = float(losses[DENSE][index].mean())
            rows.append({
                "model": model, "recipe": name, "mask ratio": ratio, "dense loss": dense, "increase": result.estimate, **bounds
            })  # fmt: skip
    return pd.DataFrame(rows)


def sensitivity_table(
    prepared: Prepared, sensitivities: Sequence[Sensitivity], seconds: Mapping[Offer, float], sizes: Mapping[Offer, int]
) -> pd.DataFrame:
    """Tabulate what every unit costs and loses in every format.

    Args:
        prepared: a model's layers in all formats.
        sensitivities: increases of the loss.
        seconds: of the same units and formats.
        sizes: of the same, in bytes.

    Returns:
        Columns `model`, `layer` (the block's number), `role` (`attention` or `MLP` for a whole unit), `format`, `increase` in
        nats per token, its paired standard error `se`, `seconds` and `bytes`.
    """
    model = prepared.model
    roles = {layer.name: layer.role if layer.expert is None else f"{layer.role} {layer.expert}" for layer in model.layers}
    places = {(layer.name,): (layer.block, roles[layer.name]) for layer in model.layers} | configurations.units(model)
    return pd.DataFrame([
        {
            "model": model.name, "layer": places[row.layers][0], "role": places[row.layers][1], "format": row.format,
            "increase": row.mean, "se": row.standard_error, "seconds": seconds[row.layers, row.format],
            "bytes": sizes[row.layers, row.format],
        }
        for row in sensitivities
    ])  # fmt: skip


def allocation_table(tried: Sequence[Tried]) -> pd.DataFrame:
    """Tabulate predictions and measurements of every budget and strategy.

    Args:
        tried: of `compare_allocations`.

    Returns:
        `predicted` and `measured` increases of the loss in nats per token (the latter with its paired 95 % interval `low`,
        `high`; `predicted, unfloored` counts negative losses as they are); predicted `seconds` and `bytes` of the linear layers
        and their shares of dense; `forward` of the whole model in seconds, with quartiles, `forward, predicted` (dense plus the
        predicted difference), and the speed-up over dense in the same rounds; how many layers have which format; the reason
        where nothing fits. NaN where nothing was measured.
    """
    return pd.DataFrame([_row(each) for each in tried])


def _row(tried: Tried) -> dict[str, object]:
    """Return one row; its keys are the same for all."""
    found, dense = tried.allocation, tried.dense
    seconds, size = (found.seconds, found.bytes) if found else (math.nan, math.nan)
    middle, low, high = NOTHING if tried.forward is None else clock.quartiles(tried.forward)
    base = math.nan if tried.dense_forward is None else clock.quartiles(tried.dense_forward)[0]
    gain, slowest, fastest = NOTHING
    if tried.forward is not None and tried.dense_forward is not None:
        gain, slowest, fastest = clock.speed_up(tried.dense_forward, tried.forward)
    interval = tried.increase.interval if tried.increase else NOTHING[:2]
    counts = Counter(found.formats.values()) if found else Counter()
    return {
        "model": tried.model, "budget": tried.budget.name, "strategy": tried.strategy,
        "predicted": found.loss if found else math.nan, "predicted, unfloored": tried.as_measured,
        "measured": tried.increase.estimate if tried.increase else math.nan, "low": interval[0], "high": interval[1],
        "seconds": seconds, "share of seconds": seconds / dense.seconds if dense.seconds else math.nan,
        "bytes": size, "share of bytes": size / dense.bytes,
        "forward": middle, "forward, first quartile": low, "forward, third quartile": high,
        "forward, predicted": base + seconds - dense.seconds,
        "speed-up": gain, "speed-up, first quartile": slowest, "speed-up, third quartile": fastest,
        "formats": ", ".join(f"{count} x {name}" for name, count in counts.most_common()), "reason": tried.reason,
    }  # fmt: skip

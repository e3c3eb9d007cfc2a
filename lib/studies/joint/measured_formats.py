"""What every format of every layer costs on this machine and loses on some text: the tables that `hardware_aware` chooses from.

Losses are of one unit at a time. Seconds are those of the linear layers only: what lies between them (attention itself, norms,
embeddings, the LM head) takes as long in all formats but structured ones, which make attention faster too; that is not counted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.core.runtime import generator, progress
from lib.models import experts, prefix
from lib.models.language_model import LanguageModel, LinearLayer
from lib.quantization.rounding import stored_bytes
from lib.studies.joint import configurations
from lib.studies.joint.configurations import DENSE, Prepared
from lib.studies.joint.runs import DENSE as DENSE_GRID
from lib.studies.joint.search import Choice, Unit
from lib.studies.pruning import runs
from lib.studies.pruning.runs import Bench
from lib.timing import clock

Offer = tuple[Unit, str]
BIT_JOULES = 640e-12 / 32  # of a bit from or to external memory
INT8_JOULES, FLOAT_JOULES = 0.23e-12, 4.6e-12  # of a multiplication with its addition: of int8, of float32


@dataclass(frozen=True)
class Sensitivity:
    """What one unit in one format does to the loss.

    Attributes:
        layers: the unit.
        format: its format; all others are dense.
        increase: of the loss of each window over the dense model's, in nats per token.
    """

    layers: Unit
    format: str
    increase: Float[Tensor, "window"] = field(repr=False)

    @property
    def mean(self) -> float:
        """Mean increase over windows."""
        return float(self.increase.double().mean())

    @property
    def standard_error(self) -> float:
        """Paired standard error of the mean over windows; NaN with one window."""
        return float(self.increase.double().std()) / math.sqrt(len(self.increase))


def sensitivity(
    prepared: Prepared, windows: Int[Tensor, "window position"], *, seed: int, draws: int | None = None
) -> list[Sensitivity]:
    """Measure the loss with one unit in one format at a time, for every unit and format.

    Args:
        prepared: a model's layers in all formats.
        windows: texts that neither calibrate nor are those of the bench. An allocation is chosen for what seemed harmless on
            these windows and masks, so on them it seems better than it is: a small set even shows gains over dense.
        seed: of the masks; another one than the bench's.
        draws: masks per window; as many as the bench's by default.

    Returns:
        Increases; dense ones are 0 and not measured again.
    """
    bench = prepared.found.bench
    bench = replace(bench, windows=windows, seed=seed, draws=draws or bench.draws)
    results, blocks = [], {layer.name: layer.block for layer in prepared.model.layers}
    with prefix.recorded(prepared.model) as kept:
        dense = runs.loss(bench)
    offers: Iterable[Offer] = progress(prepared.offers(), desc=f"{prepared.model.name}, sensitivity")
    for layers, form in offers:
        with prefix.reused(prepared.model, kept, first=min(blocks[name] for name in layers)):
            own = dense if form == DENSE else loss_in(prepared, dict.fromkeys(layers, form), bench=bench)
        results.append(Sensitivity(layers, form, own - dense))
    return results


def loss_in(prepared: Prepared, formats: Mapping[str, str], *, bench: Bench | None = None) -> Float[Tensor, "window"]:
    """Return the loss of each window with the model in some formats, by layer name; other layers are dense.

    Args:
        prepared: a model's layers in all formats.
        formats: as for `configurations.configured`.
        bench: windows and masks; those that the formats were prepared with by default.
    """
    with configurations.configured(prepared, formats) as model:
        return runs.loss(bench or prepared.found.bench, model)


def latency(prepared: Prepared, *, rows: int, repeats: int, seed: int = 0) -> dict[Offer, float]:
    """Measure the seconds of every unit in every format, all in turn, so that a drift of the machine hits dense as well.

    What computes alike is measured once: layers of one shape, and packed formats, which are unpacked and then dense (unpacking
    is not counted). A timed call runs through all layers of a kind, as a forward pass does, so that weights come from where they
    are then, which is seldom the nearest cache.

    Args:
        prepared: a model's layers in all formats.
        rows: tokens at once: samples x positions of a forward pass. An expert gets its even share of them.
        repeats: timed rounds.
        seed: of the random inputs.

    Returns:
        Medians, of one layer or the sum over a unit's smaller matrices.

    Raises:
        InputError: no rows or no rounds.
    """
    require(rows >= 1, "rows must be positive", str(rows), "give the tokens of one forward pass")
    alike: dict[tuple[object, ...], dict[int, torch.nn.Module]] = {}
    of_layer, own_rows = {}, _rows(prepared.model, rows)
    for (name, form), module in prepared.modules.items():
        kernel = form if prepared.formats[form].kind == "dynamic" else DENSE
        own = prepared.modules[name, DENSE] if prepared.formats[form].kind == "packed" else module
        key: tuple[object, ...] = (own.out_features, own.in_features, _biased(own), kernel)
        key += own_rows.get(name, ())
        alike.setdefault(key, {})[id(own)] = own
        of_layer[name, form] = key
    calls = {}
    for key, modules in alike.items():
        own = key[4:]
        count = int(str(own[0])) if own else rows
        values = torch.randn(count, int(str(key[1])), generator=generator(seed, "latency", str(key)))
        inputs = values.to(prepared.model.device, prepared.model.network.dtype)
        calls[str(key)] = partial(_run, tuple(modules.values()), inputs)
    seconds = clock.interleaved(calls, repeats=repeats, device=prepared.model.device)
    medians = {key: float(seconds[str(key)].quantile(0.5)) / len(modules) for key, modules in alike.items()}
    return {(layers, form): sum(medians[of_layer[name, form]] for name in layers) for layers, form in prepared.offers()}


def _rows(model: LanguageModel, rows: int) -> dict[str, tuple[int]]:
    """Return how many tokens each expert's matrices get when all experts get equally many; others get all."""
    return {name: (max(1, round(rows * share)),) for name, share in _routed_shares(model).items()}


def _routed_shares(model: LanguageModel) -> dict[str, float]:
    """Return which share of all tokens each expert's matrices get when all experts get equally many."""
    chosen, found = experts.choices(model.network), dict[str, float]()
    for layers in model.by_block.values():
        routed = [layer.name for layer in layers if isinstance(layer.expert, int)]
        found |= dict.fromkeys(routed, len(experts.MATRICES) * chosen / max(1, len(routed)))
    return found


def _biased(module: torch.nn.Module) -> bool:
    """Say whether a layer adds a bias, which torch's int8 layer has as a method."""
    return (module.bias() if callable(module.bias) else module.bias) is not None


def _run(modules: Sequence[torch.nn.Module], inputs: Tensor) -> None:
    for module in modules:
        module(inputs)


def sizes(prepared: Prepared) -> dict[Offer, int]:
    """Return the stored bytes of every unit in every format."""
    by_name = {layer.name: layer for layer in prepared.model.layers}
    return {(unit, form): sum(weight_bytes(prepared, by_name[name], form) for name in unit) for unit, form in prepared.offers()}


def weight_bytes(prepared: Prepared, layer: LinearLayer, form: str) -> int:
    """Count the bytes of a layer as stored: packed codes and scales, or int8 and a scale, or bfloat16; biases in bfloat16."""
    kind, module = prepared.formats[form].kind, prepared.modules[layer.name, form]
    shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    bias = 0 if layer.module.bias is None else 2 * shape[0]
    if kind == "dynamic":
        return bias + shape[0] * shape[1] + configurations.SCALE_BYTES
    if kind != "packed":
        return bias + stored_bytes(shape, grid=DENSE_GRID)
    recipe = prepared.formats[form].recipe(shape[1], prepared.method, name=layer.name)
    target = {"sparsity": recipe.target.sparsity, "pattern": recipe.target.pattern}
    return bias + stored_bytes(shape, grid=recipe.grid, **target)


def energy(prepared: Prepared, formats: Mapping[str, str], *, rows: int) -> float:
    """Estimate the joules that the linear layers take for some rows: bits moved and multiplications, by fixed constants.

    A proxy and no measurement: weights are read once from memory as stored, activations written and read once in 32 bits, and
    products are those of the numbers that are multiplied: of int8 in a dynamic format, else of float32, zeros included. An expert
    takes its even share of the routed tokens, and is not read where there are fewer of them than experts.

    Args:
        prepared: a model's layers in all formats.
        formats: name of the format by layer name; layers without one are dense.
        rows: tokens.

    Source: per-operation energies of a 45 nm process (Horowitz, ISSCC 2014), as accelerator models use them.
    """
    total, shares = 0.0, _routed_shares(prepared.model)
    for layer in prepared.model.layers:
        form = formats.get(layer.name, DENSE)
        module = prepared.modules[layer.name, form]
        inside, outside = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
        own = rows * shares.get(layer.name, 1.0)
        bits = min(own, 1.0) * 8 * weight_bytes(prepared, layer, form) + 32 * own * (inside + outside)
        product = INT8_JOULES if prepared.formats[form].kind == "dynamic" else FLOAT_JOULES
        total += bits * BIT_JOULES + own * inside * outside * product
    return total


def choices(sensitivities: Sequence[Sensitivity], seconds: Mapping[Offer, float], sizes: Mapping[Offer, int]) -> list[Choice]:
    """Join the three tables for the searches, losses as measured: `compare_allocations` floors them at 0 itself.

    Raises:
        InputError: a table lacks what another has.

    >>> found = choices([Sensitivity(("a",), "int4", torch.tensor([0.5, 1.0]))], {(("a",), "int4"): 2.0}, {(("a",), "int4"): 4})
    >>> found[0].loss, found[0].seconds, found[0].bytes
    (0.75, 2.0, 4)
    """
    offers = {(row.layers, row.format) for row in sensitivities}
    same = offers == set(seconds) == set(sizes)
    got = f"{len(offers)}, {len(seconds)} and {len(sizes)} of them, not all the same"
    require(same, "losses, seconds and bytes must be of the same units and formats", got, "measure all with one Prepared")
    return [
        Choice(row.layers, row.format, row.mean, seconds[row.layers, row.format], sizes[row.layers, row.format])
        for row in sensitivities
    ]

"""Tables of notebook 02: variances over prompts and what blocking keys does to texts, with bootstrap intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.attention import sinks, stability, variance
from lib.core.runtime import generator
from lib.diffusion.regions import movable
from lib.diffusion.traces import SinkTrace
from lib.evaluation import sums
from lib.report.claims import bootstrap_mean
from lib.studies.variance import statistics as ts
from lib.studies.variance.sink_effect import NOTHING, Effect
from lib.studies.variance.statistics import Statistic, per_prompt
from lib.texts.rows import loss_per_character

NO_VALUE = float("nan")  # the paper says nothing
NOT_SAID = "not said"
# quantity -> (statistic, what the paper says of autoregressive models, and of diffusion models)
PAPER_QUANTITIES: Mapping[str, tuple[Statistic, str, str]] = MappingProxyType({
    "spatial variance, full length": (ts.spatial, "high", "lower"),
    "spatial variance, growing prefix": (ts.spatial_growing, "high", "lower"),
    "temporal variance, (share of length)^2": (ts.temporal, "near zero", "high"),
    "temporal variance, tokens^2": (ts.temporal_raw, "near zero", "high"),
    "temporal variance, described rule": (ts.temporal_described, "near zero", "high"),
})  # fmt: skip


def digest_quantities(k: int) -> dict[str, tuple[Statistic, str, str]]:
    """Return the digest's quantities for k sinks a step."""
    return {
        "position variance, k = 1, tokens^2": (ts.top_position_variance, NOT_SAID, NOT_SAID),
        f"position variance, k = {k}, tokens^2": (lambda t: ts.set_position_variance(t, k=k, part="total"), NOT_SAID, NOT_SAID),
        f"part of it between steps, k = {k}, tokens^2": (
            lambda t: ts.set_position_variance(t, k=k, part="between"), NOT_SAID, NOT_SAID,
        ),
        f"frequency variance of top-{k} sinks": (lambda t: ts.top_k_frequency_variance(t, k=k), NOT_SAID, NOT_SAID),
        "frequency variance of argmax keys": (ts.argmax_frequency_variance, NOT_SAID, NOT_SAID),
    }  # fmt: skip


def head_quantities() -> dict[str, tuple[Statistic, str, str]]:
    """Return the quantities of related work, head by head."""
    return {
        "Rulli sinks per head": (lambda t: t.rulli.mean(1), NOT_SAID, NOT_SAID),
        "lifetime, steps": (ts.lifetime, NOT_SAID, NOT_SAID),
        "lifetime, share of all steps": (lambda t: ts.lifetime(t) / t.mass.shape[1], NOT_SAID, NOT_SAID),
        "drift per step, tokens (right is positive)": (lambda t: ts.head_drift(t, signed=True), NOT_SAID, NOT_SAID),
        "absolute drift per step, tokens": (lambda t: ts.head_drift(t, signed=False), NOT_SAID, NOT_SAID),
        "Gu sink rate, first key, %": (lambda t: 100.0 * t.gu_rate[:, -1], NOT_SAID, NOT_SAID),
        "Gu sink rate, best key, %": (lambda t: 100.0 * t.gu_best[:, -1], NOT_SAID, NOT_SAID),
        "first-token score, % of attention": (lambda t: 100.0 * ts.heads_of(t).first_score[:, -1].mean(1), NOT_SAID, NOT_SAID),
        "value norm, sinks / other keys": (ts.value_norm_ratio, NOT_SAID, NOT_SAID),
    }


def interval_of(values: Float[Tensor, "prompt"], *, seed: int, stream: Sequence[str]) -> dict[str, float]:
    """Return mean, ends of the 95 % bootstrap interval and the number of prompts that have a value."""
    kept = values[values.isfinite()].double().tolist()
    if not kept:
        return {"mean": NO_VALUE, "low": NO_VALUE, "high": NO_VALUE, "n": 0}
    mean, low, high = bootstrap_mean(kept, generator=generator(seed, "bootstrap", *stream))
    # an interval from one value is unbounded; tables and files show that as missing
    return {"mean": mean, "low": low if math.isfinite(low) else NO_VALUE, "high": high if math.isfinite(high) else NO_VALUE,
            "n": len(kept)}  # fmt: skip


def quantities_table(
    traces: Sequence[SinkTrace], quantities: Mapping[str, tuple[Statistic, str, str]], *, prompts: int, seed: int
) -> pd.DataFrame:
    """Tabulate quantities of all models, the paper's statement beside ours.

    Args:
        traces: one per model.
        quantities: statistic and the paper's statements, by name.
        prompts: rows of a trace that belong to different prompts; the others are more seeds of the same ones.
        seed: of the bootstrap.

    Returns:
        One row a quantity and model.
    """
    rows = []
    for name, (statistic, of_causal, of_diffusion) in quantities.items():
        for trace in traces:
            values = per_prompt(statistic(trace), prompts=prompts)
            shown = interval_of(values, seed=seed, stream=(name, trace.name))
            said = of_causal if trace.is_causal else of_diffusion
            rows.append({"quantity": name, "model": trace.name, **shown, "paper": said})
    return pd.DataFrame(rows)


def layers_table(traces: Sequence[SinkTrace], *, prompts: int, seed: int) -> pd.DataFrame:
    """Tabulate spatial and temporal variance layer by layer.

    Returns:
        One row a model and layer, counted from 0 as in names of weights; `depth` runs from 0 (first layer) to 1 (last).
    """
    rows = []
    for trace in traces:
        mass = trace.layer_mass.transpose(1, 2)
        sets = ts.sink_sets(trace, level="layer")
        length = mass.shape[-1]
        spatial = variance.spatial_variance(mass[:, :, -1:] if trace.keys_grow else mass)
        temporal = variance.temporal_variance(variance.centroid(mass, sets & movable(trace)), length=length, groups=trace.opened)
        layers = mass.shape[1]
        for layer in range(layers):
            place = {"model": trace.name, "layer": layer, "depth": layer / max(1, layers - 1)}
            for name, values in (("spatial variance", spatial), ("temporal variance", temporal)):
                shown = interval_of(
                    per_prompt(values[:, layer], prompts=prompts), seed=seed, stream=(name, trace.name, str(layer))
                )
                rows.append({**place, "quantity": name, **shown})
    return pd.DataFrame(rows)


FACTOR_QUANTITIES: Mapping[str, Callable[[SinkTrace], Tensor]] = MappingProxyType({
    "spatial variance": ts.spatial, "temporal variance": ts.temporal, "wander rate": ts.wander,
})  # fmt: skip


def factors_table(traces: Mapping[tuple[str, str], SinkTrace], *, seed: int) -> pd.DataFrame:
    """Tabulate how the setting of a generation changes the variances of a diffusion model.

    Args:
        traces: by factor and its setting; all with the same prompts, one seed each.
        seed: of the bootstrap.

    Returns:
        One row a setting; the overlap is of aggregate sink sets a quarter of the steps apart. `n` counts the prompts that have
        every value.
    """
    rows = []
    for (factor, setting), trace in traces.items():
        row: dict[str, object] = {"model": trace.name, "factor": factor, "setting": setting, "steps": trace.mass.shape[1]}
        values = {name: statistic(trace) for name, statistic in FACTOR_QUANTITIES.items()}
        distance = ts.quarter(trace.mass.shape[1])
        values["overlap"] = stability.overlap_by_distance(ts.sink_sets(trace), [distance])[:, 0]
        counts = []
        for name, found in values.items():
            shown = interval_of(found, seed=seed, stream=(factor, setting, name))
            counts.append(shown["n"])
            row |= {name: shown["mean"], f"{name}, low": shown["low"], f"{name}, high": shown["high"]}
        rows.append({**row, "n": min(counts)})
    return pd.DataFrame(rows)


def places_table(trace: SinkTrace, *, k: int) -> pd.DataFrame:
    """Tabulate where the k largest sinks lie, beside where all positions lie, in per cent.

    Args:
        trace: of a diffusion model.
        k: sinks per step.

    Returns:
        Rows `sinks` and `all positions`: the first position, the rest of the prompt, the frontier (positions on either side of a
        border between written and masked text), other masks, other written text. Where attention goes by blocks, only the
        blocks so far are positions.
    """
    masked = trace.is_masked
    border = torch.nn.functional.pad(masked[..., 1:] != masked[..., :-1], (1, 1), value=False)
    frontier = border[..., 1:] | border[..., :-1]
    position = torch.arange(masked.shape[-1])
    first = (position == 0).expand(masked.shape)
    prompt = (position < trace.prompt_tokens).expand(masked.shape) & ~first & ~frontier
    rest = ~first & ~prompt & ~frontier
    places = {"first position": first & ~frontier, "prompt": prompt, "frontier": frontier, "other masks": rest & masked,
              "other written text": rest & ~masked}  # fmt: skip
    exists = variance.existing(trace.keys, size=masked.shape[-1])
    sets = {"sinks": variance.in_top_k(trace.mass, k=k), "all positions": exists.expand(masked.shape)}
    return pd.DataFrame([
        {"model": trace.name, "positions": label}
        | {f"{name}, %": 100.0 * float((where & chosen).sum() / chosen.sum()) for name, where in places.items()}
        for label, chosen in sets.items()
    ])  # fmt: skip


def value_norm_points(trace: SinkTrace, *, prompt: int = 0, limit: int = 4000) -> pd.DataFrame:
    """Return value norm against sink mass for the keys of all heads of one text at half of the generation.

    Args:
        trace: with heads.
        prompt: which row.
        limit: largest number of keys; more are thinned evenly, and sinks are always kept.

    Returns:
        One row a key: its mass, its value norm over the mean of its head, and whether it is a sink by Rulli's rule.
    """
    step = trace.mark_steps[1]
    n = int(trace.keys[step])
    mass = trace.head_mass[prompt, 1, ..., :n]
    norm = ts.heads_of(trace).value_norm[prompt, 1, ..., :n]
    norm = norm.repeat_interleave(mass.shape[1] // norm.shape[1], dim=1)
    frame = pd.DataFrame({
        "model": trace.name,
        "sink mass": mass.flatten().tolist(),
        "relative value norm": (norm / norm.mean(-1, keepdim=True)).flatten().tolist(),
        "is a sink": sinks.sinks_leave_one_out(mass).flatten().tolist(),
    })  # fmt: skip
    marked = frame["is a sink"].to_numpy(dtype=bool)
    every = max(1, math.ceil(int((~marked).sum()) / limit))
    kept = np.concatenate([np.flatnonzero(~marked)[::every], np.flatnonzero(marked)])
    return frame.take(kept).reset_index(drop=True)


def increase(effects: Sequence[Effect], effect: Effect) -> Float[Tensor, "text"]:
    """Return by how much the loss of each text rises against the same model with nothing blocked."""
    dense = next(other for other in effects if other.model == effect.model and other.blocked == NOTHING)
    return effect.loss - dense.loss


def pick(effects: Sequence[Effect], *, model: str, blocked: str, amount: float) -> Effect:
    """Return the effect of one condition."""
    return next(e for e in effects if (e.model, e.blocked, e.amount) == (model, blocked, amount))


def effects_table(
    effects: Sequence[Effect], *, seed: int, amount_name: str = "keys asked", weights: Mapping[str, Tensor] | None = None
) -> pd.DataFrame:
    """Tabulate the loss of every condition and its increase, paired by text.

    Args:
        effects: of one or several models, each with its `nothing` row.
        seed: of the bootstrap over texts.
        amount_name: what `Effect.amount` is.
        weights: by model, of `rows.character_weights`, of the windows: adds the loss in nats per character, by which models of
            different tokenizers compare.

    Returns:
        One row a condition. `increase` is the mean over texts with its 95 % interval; `attention removed` is what the blocked
        keys would have received.
    """
    rows = []
    for effect in effects:
        shown = interval_of(increase(effects, effect), seed=seed, stream=(effect.model, effect.blocked, str(effect.amount)))
        rows.append({
            "model": effect.model,
            "blocked": effect.blocked,
            amount_name: effect.amount,
            "keys per head": effect.keys_per_head,
            "attention removed, %": 100.0 * effect.removed_share,
            "loss": float(effect.loss.mean()),
            **({} if weights is None else {"loss per character": loss_per_character(effect.loss, weights[effect.model])}),
            "increase": shown["mean"],
            "low": shown["low"],
            "high": shown["high"],
            "n": shown["n"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def answers_table(effects: Sequence[Effect], *, seed: int) -> pd.DataFrame:
    """Tabulate exact answers (Wilson interval) beside the likelihood of the right answer.

    Args:
        effects: from `sink_effect.sum_effects`.
        seed: of the bootstrap over questions.
    """
    table = effects_table(effects, seed=seed)
    shares = []
    for effect in effects:
        low, high = sums.share_interval(sum(effect.correct), len(effect.correct))
        share = 100.0 * sum(effect.correct) / len(effect.correct)
        shares.append({"exact, %": share, "exact, low": 100.0 * low, "exact, high": 100.0 * high})
    joined = pd.concat([table.drop(columns=["loss"]), pd.DataFrame(shares)], axis=1)
    names = {"increase": "answer loss increase, nats", "low": "increase, low", "high": "increase, high"}
    return joined.rename(columns=names)

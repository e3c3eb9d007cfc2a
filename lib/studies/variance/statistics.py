"""One number per trajectory from a sink trace: variances, stability, rates. Each takes a trace and returns `[row]`.

A row is one generation; with several seeds the rows are all prompts with the first seed, then all with the second, and so on.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attention import sinks, stability, variance
from lib.core.errors import InputError
from lib.diffusion.regions import movable
from lib.diffusion.traces import HeadTrace, SinkTrace
from lib.studies.traces.tables import wander as wander_of
from lib.studies.traces.views import uniform_mass, uniform_of

DESCRIBED_EPSILON = 1.0  # the paper's margin is not disclosed; 1 = twice the mean mass, on masses averaged over heads
LEVELS = ("aggregate", "layer", "head")
Statistic = Callable[[SinkTrace], Float[Tensor, "row"]]


def heads_of(trace: SinkTrace) -> HeadTrace:
    """Return what was recorded of single heads.

    Raises:
        InputError: the trace was made without it.
    """
    if trace.heads is None:
        raise InputError(
            f"statistics of heads must come from a trace with heads, got {trace.name} without: trace(..., heads=True)"
        )
    return trace.heads


def per_prompt(values: Float[Tensor, "row"], *, prompts: int) -> Float[Tensor, "prompt"]:
    """Average the seeds of each prompt, leaving out those without a value.

    >>> per_prompt(torch.tensor([1.0, 2.0, 3.0, float("nan")]), prompts=2).tolist()
    [2.0, 2.0]
    """
    return values.view(-1, prompts).nanmean(0)


def mark_steps_by(
    rule: Callable[[Tensor], Tensor], mass: Float[Tensor, "*batch step key"], keys: Int[Tensor, "step"]
) -> Bool[Tensor, "*batch step key"]:
    """Apply a rule for sinks to the keys that exist at each step."""
    size = mass.shape[-1]
    steps = [torch.nn.functional.pad(rule(mass[..., step, :n]), (0, size - n)) for step, n in enumerate(keys.tolist())]
    return torch.stack(steps, -2)


def sink_sets(trace: SinkTrace, *, level: str = "aggregate") -> Bool[Tensor, "row *inner step key"]:
    """Return the sink set of every step by the released rule, mean + 2 standard deviations over the keys that exist.

    Args:
        trace: one model's.
        level: `"aggregate"` (mass averaged over layers and heads), `"layer"` or `"head"`.
    """
    if level == "head":
        return heads_of(trace).sets.permute(0, 2, 3, 1, 4)
    mass = trace.mass if level == "aggregate" else trace.layer_mass.transpose(1, 2)
    return mark_steps_by(sinks.sinks_mean_std, mass, trace.keys)


def centroids(trace: SinkTrace) -> Float[Tensor, "row step"]:
    """Return the mass-weighted mean position of the sinks (released rule) that can move, at every step, in tokens."""
    return variance.centroid(trace.mass, sink_sets(trace) & movable(trace))


def described_centroids(trace: SinkTrace) -> Float[Tensor, "row step"]:
    """Return the centroid by the paper's described rule, leave-one-out mean + epsilon (here 1); NaN where nothing exceeds it."""

    def rule(mass: Tensor) -> Tensor:
        """Mark the keys above the mean of the others plus the margin."""
        return sinks.sinks_leave_one_out(mass, epsilon=DESCRIBED_EPSILON)

    return variance.centroid(trace.mass, mark_steps_by(rule, trace.mass, trace.keys) & movable(trace))


def at_full_length(mass: Float[Tensor, "row step key"], *, keys_grow: bool) -> Float[Tensor, "row full_step key"]:
    """Return the steps at which all keys exist: every step of a diffusion model, the last where keys grow.

    On a finished text an autoregressive model's masses do not depend on the step, so its last step is its trajectory.
    """
    return mass[:, -1:] if keys_grow else mass


def spatial(trace: SinkTrace) -> Float[Tensor, "row"]:
    """Return the spatial variance at full length, the same number of keys for every kind of model."""
    return variance.spatial_variance(at_full_length(trace.mass, keys_grow=trace.keys_grow))


def spatial_growing(trace: SinkTrace) -> Float[Tensor, "row"]:
    """Return the spatial variance over the whole trajectory, keys averaged over the steps at which they exist."""
    return variance.spatial_variance(trace.mass, keys=trace.keys)


def variance_without_preference(positions: int, *, is_causal: bool) -> float:
    """Return the spatial variance of attention that is uniform over what the mask allows.

    >>> variance_without_preference(8, is_causal=False)
    0.0
    """
    return float(uniform_mass(positions, is_causal=is_causal).var(correction=0))


def spatial_without_preference(trace: SinkTrace) -> float:
    """Return the spatial variance at full length of attention that is uniform over what a trace's own masks allow."""
    return float(uniform_of(trace, -1).var(correction=0))


def temporal(trace: SinkTrace) -> Float[Tensor, "row"]:
    """Return the temporal variance of the centroid in squared fractions of the sequence length."""
    return variance.temporal_variance(centroids(trace), length=trace.mass.shape[-1], groups=trace.opened)


def temporal_raw(trace: SinkTrace) -> Float[Tensor, "row"]:
    """Return the temporal variance of the centroid in squared tokens, as the paper defines it."""
    return variance.temporal_variance(centroids(trace), groups=trace.opened)


def temporal_described(trace: SinkTrace) -> Float[Tensor, "row"]:
    """Return the normalised temporal variance with the paper's described rule for sinks."""
    return variance.temporal_variance(described_centroids(trace), length=trace.mass.shape[-1], groups=trace.opened)


def wander(trace: SinkTrace) -> Float[Tensor, "row"]:
    """Return the share of steps at which the dominant sink is not where it most often is; within blocks where there are any."""
    return wander_of(trace)


def top_position_variance(trace: SinkTrace) -> Float[Tensor, "row"]:
    """Return the digest's position variance for k = 1, in squared tokens."""
    return variance.position_variance(sinks.top_k_positions(trace.mass, k=1)).total.float()


def set_position_variance(trace: SinkTrace, *, k: int, part: str) -> Float[Tensor, "row"]:
    """Return the digest's position variance for k sinks: `"total"` or `"between"` steps, in squared tokens."""
    return getattr(variance.position_variance(sinks.top_k_positions(trace.mass, k=k)), part).float()


def top_k_frequency_variance(trace: SinkTrace, *, k: int) -> Float[Tensor, "row"]:
    """Return the mean frequency variance of the keys that are a top-k sink at some step."""
    return variance.sink_frequency_variance(variance.in_top_k(trace.mass, k=k))


def argmax_frequency_variance(trace: SinkTrace) -> Float[Tensor, "row"]:
    """Return the mean frequency variance of the keys that are some query's argmax at some step, averaged over layers."""
    return variance.sink_frequency_variance(heads_of(trace).favourites.transpose(1, 2)).nanmean(1)


def lifetime(trace: SinkTrace) -> Float[Tensor, "row"]:
    """Return the mean lifetime of a head's sinks (Rulli's rule) in steps, averaged over the heads that have any."""
    sets = heads_of(trace).rulli_sets.permute(0, 2, 3, 1, 4)
    return torch.stack([stability.mean_lifetime(row).nanmean() for row in sets])


def head_drift(trace: SinkTrace, *, signed: bool) -> Float[Tensor, "row"]:
    """Return the mean movement per step of a head's sinks (Rulli's rule, unweighted centroid), in tokens."""
    moved = []
    for sets in heads_of(trace).rulli_sets:  # one row at a time: the sets of a large model become 32 times larger as numbers
        path = variance.centroid(torch.ones(sets.shape[-1]).expand(sets.shape), sets).movedim(0, -1)
        moved.append(stability.drift(path)[0 if signed else 1].nanmean())
    return torch.stack(moved)


def value_norm_ratio(trace: SinkTrace) -> Float[Tensor, "row"]:
    """Return the value norm of a head's sinks (Rulli's rule) over that of its other keys, over heads with sinks, at 50 %."""
    sets = heads_of(trace).rulli_sets[:, trace.mark_steps[1]]
    norms = heads_of(trace).value_norm[:, 1]
    n = int(trace.keys[trace.mark_steps[1]])
    norms = norms.repeat_interleave(sets.shape[2] // norms.shape[2], dim=2)
    return sinks.value_norm_ratio(norms[..., :n], sets[..., :n]).flatten(1).nanmean(1)


def measures_of(attention_probs: Float[Tensor, "step query key"]) -> dict[str, float]:
    """Return every measure of attention that was made up, its largest key taken as the sink of each step.

    Args:
        attention_probs: one matrix a step, rows that sum to 1.

    Returns:
        Values by name, positions in tokens.
    """
    mass = attention_probs.sum(1)
    sets = variance.in_top_k(mass, k=1)
    path = variance.centroid(mass, sets)
    return {
        "spatial variance": float(variance.spatial_variance(mass)),
        "temporal variance": float(variance.temporal_variance(path)),
        "position variance": float(variance.position_variance(sinks.top_k_positions(mass, k=1)).total),
        "frequency variance": float(variance.sink_frequency_variance(sets)),
        "argmax form": float(variance.sink_frequency_variance(variance.is_argmax(attention_probs))),
        "lifetime": float(stability.mean_lifetime(sets)),
        "drift": float(stability.drift(path)[0]),
        "overlap, 1 step": float(stability.overlap_by_distance(sets, [1])),
        "overlap, 2 steps": float(stability.overlap_by_distance(sets, [2])),
        "Rulli sinks": float(sinks.rulli_count(mass).mean()),
        "Gu sinks": float(sinks.gu_sink_rate(mass, is_causal=False).sum(-1).mean()),
        "first token": float(sinks.first_token_score(mass, queries=mass.shape[-1]).mean()),
    }


def quarter(steps: int) -> int:
    """Return the step distance that claims and tables speak about: a quarter of the trajectory.

    >>> quarter(48)
    12
    """
    return max(1, steps // 4)


def overlap(
    trace: SinkTrace, *, level: str, distances: list[int], generator: torch.Generator, null: str = ""
) -> Float[Tensor, "row distance"]:
    """Return the mean overlap of sink sets by step distance, averaged over layers or heads.

    Args:
        trace: one model's.
        level: one of `LEVELS`.
        distances: in steps.
        generator: CPU generator, for the nulls.
        null: `"positions"` for unrelated sets of the same sizes, `"steps"` for steps in random order, empty for the real sets.
    """
    sets = sink_sets(trace, level=level)
    if null == "positions":
        sets = stability.shuffle_positions(sets, generator=generator, keys=trace.keys)
    elif null == "steps":
        sets = stability.shuffle_steps(sets, generator=generator)
    rows = [stability.overlap_by_distance(row, distances) for row in sets]  # one at a time, to spare memory
    return torch.stack([row.reshape(-1, len(distances)).nanmean(0) for row in rows])

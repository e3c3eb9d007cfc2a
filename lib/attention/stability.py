"""Do sink sets persist: overlap between steps and its null, lifetime, drift. Tensors in, tensors out.

A sink set is a boolean tensor whose last two dimensions are step and key.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import InputError


def jaccard(first: Bool[Tensor, "*batch key"], second: Bool[Tensor, "*batch key"]) -> Float[Tensor, "*batch"]:
    """Return the Jaccard overlap of two sets, |A and B| / |A or B|; NaN where both are empty.

    >>> round(float(jaccard(torch.tensor([True, True, False]), torch.tensor([False, True, True]))), 4)
    0.3333
    """
    return (first & second).sum(-1) / (first | second).sum(-1)


def overlap_by_distance(sets: Bool[Tensor, "*batch step key"], distances: Sequence[int]) -> Float[Tensor, "*batch distance"]:
    """Return the mean Jaccard overlap of the sink sets of all steps that lie a given number of steps apart.

    Args:
        sets: a sink set per step.
        distances: in steps, each from 1 to the number of steps - 1.

    Returns:
        One value a distance; NaN where every pair of sets is empty.

    Raises:
        InputError: a distance out of range.
    """
    steps = sets.shape[-2]
    if not distances or not all(1 <= distance < steps for distance in distances):
        raise InputError(f"step distances must be in [1, {steps - 1}], got {list(distances)}: choose others or more steps")
    overlaps = [jaccard(sets[..., :-distance, :], sets[..., distance:, :]).nanmean(-1) for distance in distances]
    return torch.stack(overlaps, -1)


def shuffle_steps(
    sets: Bool[Tensor, "prompt *inner step key"], *, generator: torch.Generator
) -> Bool[Tensor, "prompt *inner step key"]:
    """Put the steps of each prompt in random order: the null in which overlap does not depend on the distance.

    Args:
        sets: a sink set per step; layers and heads of a prompt are shuffled alike.
        generator: CPU generator.
    """
    order = torch.rand(sets.shape[0], sets.shape[-2], generator=generator).argsort(-1).to(sets.device)
    return _take(sets, order[..., None].expand(-1, -1, sets.shape[-1]), dim=-2)


def shuffle_positions(
    sets: Bool[Tensor, "prompt *inner step key"], *, generator: torch.Generator, keys: Int[Tensor, "step"] | None = None
) -> Bool[Tensor, "prompt *inner step key"]:
    """Put the keys of each step in random order, anew at every step: the null of unrelated sets of the same sizes.

    Args:
        sets: a sink set per step; layers and heads of a prompt are shuffled alike.
        generator: CPU generator.
        keys: keys that exist at each step; only these are shuffled.
    """
    steps, size = sets.shape[-2:]
    drawn = torch.rand(sets.shape[0], steps, size, generator=generator)
    if keys is not None:
        position = torch.arange(size)
        drawn = torch.where(position[None] < keys.cpu()[:, None], drawn, 1.0 + position)
    return _take(sets, drawn.argsort(-1).to(sets.device), dim=-1)


def _take(sets: Tensor, index: Int[Tensor, "prompt step key"], *, dim: int) -> Tensor:
    """Gather along `dim`, the same way for all inner dimensions of a prompt."""
    inner = sets.dim() - 3
    return sets.gather(dim, index[(slice(None), *[None] * inner)].expand(sets.shape))


def beyond_chance(overlap: Float[Tensor, "*batch"], chance: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Rescale an overlap so that 0 is the overlap of unrelated sets and 1 is identity; NaN where chance is 1.

    Source: the correction of Cohen's kappa, applied to the Jaccard overlap.

    >>> float(beyond_chance(torch.tensor(0.625), torch.tensor(0.25)))
    0.5
    """
    return (overlap - chance) / (1.0 - chance)


def mean_lifetime(sets: Bool[Tensor, "*batch step key"]) -> Float[Tensor, "*batch"]:
    """Return for how many steps in a row a key stays a sink, on average over all appearances.

    Args:
        sets: a sink set per step.

    Returns:
        Steps, from 1 to the number of steps; NaN where there is no sink. An appearance that the first or the last step cuts off
        counts with the steps that are seen, so the value is a lower bound.

    Source: lifetime of sinks as Rulli et al. (arXiv 2510.15731) describe them; they give no formula.

    >>> float(mean_lifetime(torch.tensor([[True], [True], [False], [True]])))
    1.5
    """
    begins = sets.clone()
    begins[..., 1:, :] &= ~sets[..., :-1, :]
    return sets.sum((-1, -2)) / begins.sum((-1, -2))


def drift(centroids: Float[Tensor, "*batch step"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return how far the centroid moves per step: signed (positive = to the right) and in absolute terms, in tokens.

    Args:
        centroids: one per step, NaN where a step has no sink; only neighbouring steps that both have one count.

    Returns:
        Mean signed and mean absolute movement; NaN where no neighbouring steps have sinks.

    Source: the movement of sinks that Rulli et al. (arXiv 2510.15731) show, per step.

    >>> signed, absolute = drift(torch.tensor([0.0, 4.0, 2.0]))
    >>> float(signed), float(absolute)
    (1.0, 3.0)
    """
    moved = centroids.diff(dim=-1)
    return moved.nanmean(-1), moved.abs().nanmean(-1)

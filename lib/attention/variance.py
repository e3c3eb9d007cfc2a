"""How much sinks vary along a trajectory: the paper's and the digest's variances. Tensors in, tensors out.

The last two dimensions are denoising step (or growing prefix) and key. `keys` says how many keys exist at each step: a causal
model's later keys hold 0 until they are written, and are left out rather than counted as zeros.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attention.sinks import top_k_positions
from lib.core.errors import InputError


def existing(keys: Int[Tensor, "step"], *, size: int) -> Bool[Tensor, "step key"]:
    """Mark the keys that exist at each step.

    Args:
        keys: number of keys at each step.
        size: number of keys in all.

    >>> existing(torch.tensor([1, 2]), size=3).tolist()
    [[True, False, False], [True, True, False]]
    """
    return torch.arange(size, device=keys.device)[None, :] < keys[:, None]


def trajectory_mean(
    mass: Float[Tensor, "*batch step key"], *, keys: Int[Tensor, "step"] | None = None
) -> Float[Tensor, "*batch key"]:
    """Average the mass of each key over the steps at which it exists.

    Args:
        mass: attention received, mean 1 over the keys of a step.
        keys: keys that exist at each step; all of them when None.

    Returns:
        Mean mass by key.

    Raises:
        InputError: a key exists at no step.

    Source: the paper's mean mass over the trajectory (section 3.1), there with a fixed number of keys.
    """
    if keys is None:
        return mass.mean(-2)
    present = existing(keys.to(mass.device), size=mass.shape[-1])
    counts = present.sum(0)
    if not bool((counts > 0).all()):
        raise InputError(
            f"every key must exist at some step, got {int((counts == 0).sum())} without: cut the masses to the last prefix"
        )
    return torch.where(present, mass, 0.0).sum(-2) / counts


def spatial_variance(
    mass: Float[Tensor, "*batch step key"], *, keys: Int[Tensor, "step"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return the (population) variance over keys of the mean mass: high when few keys always receive the attention.

    Args:
        mass: attention received, mean 1 over keys, so that models of any size compare.
        keys: keys that exist at each step; all of them when None.

    Returns:
        Variance in squared units of the mass; with a fixed number of keys from 0 (all alike) to keys - 1 (one gets everything).

    Source: paper section 3.1, sigma^2_spatial; there on masses summed over layers and heads.

    >>> float(spatial_variance(torch.tensor([[4.0, 0.0, 0.0, 0.0]])))
    3.0
    """
    return trajectory_mean(mass, keys=keys).var(-1, correction=0)


def centroid(mass: Float[Tensor, "*batch key"], marked: Bool[Tensor, "*batch key"]) -> Float[Tensor, "*batch"]:
    """Return the mass-weighted mean position of the marked keys.

    Args:
        mass: attention received.
        marked: the sink set.

    Returns:
        Position in tokens from the start; NaN where the set is empty or has no mass.

    Source: paper section 3.1, c_t.

    >>> float(centroid(torch.tensor([1.0, 9.0, 9.0, 3.0]), torch.tensor([True, False, False, True])))
    2.25
    """
    kept = torch.where(marked, mass, 0.0)
    return (kept * torch.arange(mass.shape[-1], device=mass.device)).sum(-1) / kept.sum(-1)


def temporal_variance(
    centroids: Float[Tensor, "*batch step"], *, length: int = 1, groups: Int[Tensor, "step"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return the (population) variance of the centroid over the steps that have sinks.

    Args:
        centroids: one per step, NaN where a step has no sink.
        length: divide positions by it first, the same at all steps; the final length makes texts of different length comparable.
        groups: number of each step's group; the variance is then that within groups. Where a text is written by blocks they are
            the blocks: that the next one stands further right is no movement.

    Returns:
        Variance in squared tokens, or in squared fractions of the sequence; NaN where no step has a sink.

    Source: paper section 3.1, sigma^2_temporal = Var_t(c_t), without the normalisation.

    >>> float(temporal_variance(torch.tensor([2.0, float("nan"), 4.0])))
    1.0
    >>> float(temporal_variance(torch.tensor([2.0, 4.0]), length=4))
    0.0625
    >>> float(temporal_variance(torch.tensor([2.0, 4.0, 7.0, 9.0]), groups=torch.tensor([0, 0, 1, 1])))
    1.0
    """
    scaled = centroids / length
    if groups is None:
        return ((scaled - scaled.nanmean(-1, keepdim=True)) ** 2).nanmean(-1)
    parts = [scaled[..., groups == group] for group in groups.unique()]
    return torch.cat([(part - part.nanmean(-1, keepdim=True)) ** 2 for part in parts], -1).nanmean(-1)


@dataclass(frozen=True)
class PositionVariance:
    """Variance of sink positions in squared tokens: of all of them together, and the part that is movement.

    `total` = `between` + the mean spread of the positions inside one step, which is above 0 for k > 1 even when nothing moves.
    """

    total: Float[Tensor, "*batch"]
    between: Float[Tensor, "*batch"]


def position_variance(positions: Int[Tensor, "*batch step k"]) -> PositionVariance:
    """Return the variance of the top-k sink positions over the steps.

    Args:
        positions: the k largest sinks of each step.

    Returns:
        Var of the set of all positions, and the variance over steps of their mean.

    Source: the digest's position variance, Var({sink_position_t : t in 1..T}); it does not say whether k positions are pooled.

    >>> result = position_variance(torch.tensor([[0, 4], [2, 6]]))
    >>> float(result.total), float(result.between)
    (5.0, 1.0)
    """
    values = positions.double()
    return PositionVariance(values.flatten(-2).var(-1, correction=0), values.mean(-1).var(-1, correction=0))


def in_top_k(mass: Float[Tensor, "*batch key"], *, k: int) -> Bool[Tensor, "*batch key"]:
    """Mark the k keys with the largest mass; of equal masses the earlier key."""
    marked = torch.zeros(mass.shape, dtype=torch.bool, device=mass.device)
    return marked.scatter(-1, top_k_positions(mass, k=k), True)


def is_argmax(attention_probs: Float[Tensor, "*batch query key"]) -> Bool[Tensor, "*batch key"]:
    """Mark the keys that are some query's favourite, each once however many queries share it.

    Args:
        attention_probs: one step's attention, already averaged over heads.

    Source: the digest's batched form: head-mean attention, argmax key per query, distinct positions counted once per step.

    >>> is_argmax(torch.tensor([[0.1, 0.9], [0.2, 0.8]])).tolist()
    [False, True]
    """
    favourites = attention_probs.argmax(-1)
    marked = torch.zeros((*favourites.shape[:-1], attention_probs.shape[-1]), dtype=torch.bool, device=favourites.device)
    return marked.scatter(-1, favourites, True)


def frequency_variance(present: Bool[Tensor, "*batch step key"]) -> Float[Tensor, "*batch key"]:
    """Return 1 - f(p) for each key, f being the share of steps in which it is a sink.

    Args:
        present: a sink set per step, from `in_top_k` or `is_argmax`.

    Returns:
        0 for a key that is a sink at every step, 1 for one that never is: despite its name it is no variance, and the keys that
        are never sinks have the largest value. Steps at which a key does not exist yet count as steps without it, as the
        definition says, so a late key of a growing prefix cannot come near 0.

    Source: the digest's frequency variance of position p.

    >>> frequency_variance(torch.tensor([[True, False], [True, True]])).tolist()
    [0.0, 0.5]
    """
    return 1.0 - present.float().mean(-2)


def sink_frequency_variance(present: Bool[Tensor, "*batch step key"]) -> Float[Tensor, "*batch"]:
    """Return the mean frequency variance of the keys that are a sink at least once; NaN where no key ever is.

    >>> float(sink_frequency_variance(torch.tensor([[True, False], [True, False]])))
    0.0
    """
    ever = present.any(-2)
    return torch.where(ever, frequency_variance(present), 0.0).sum(-1) / ever.sum(-1)

"""Attention with sinks planted where we want them, to check every measure on a known answer. Tensors in, tensors out."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lib.core.errors import InputError


def planted_attention(positions: Sequence[int], *, keys: int, share: float) -> Float[Tensor, "step query key"]:
    """Make attention in which every query gives `share` to one key per step and spreads the rest evenly over the others.

    Args:
        positions: the planted sink of each step, at least one step.
        keys: number of keys, and of queries, at least 2.
        share: in [0, 1].

    Returns:
        Rows that sum to 1, in float64.

    Raises:
        InputError: no step, fewer than two keys, a position outside the keys, or a share outside [0, 1].

    >>> planted_attention([1], keys=3, share=0.5)[0, 0].tolist()
    [0.25, 0.5, 0.25]
    """
    if not positions or not all(0 <= position < keys for position in positions) or not 0 <= share <= 1 or keys < 2:
        raise InputError(
            f"sinks must be planted in [0, {keys}) with a share in [0, 1], got {list(positions)} and {share}: mend them"
        )
    attention = torch.full((len(positions), keys, keys), (1.0 - share) / (keys - 1), dtype=torch.float64)
    attention[torch.arange(len(positions)), :, torch.tensor(list(positions))] = share
    return attention


def noise_attention(steps: int, *, keys: int, generator: torch.Generator) -> Float[Tensor, "step query key"]:
    """Make attention without sinks: every row uniform on the simplex, drawn anew at every step.

    Args:
        steps: denoising steps.
        keys: number of keys, and of queries.
        generator: CPU generator.

    Returns:
        Rows that sum to 1, in float64. A mass, the sum of one column, has mean 1 and variance (keys - 1) / (keys (keys + 1)).
    """
    raw = -torch.log1p(-torch.rand(steps, keys, keys, generator=generator, dtype=torch.float64))
    return raw / raw.sum(-1, keepdim=True)


def fixed(*, steps: int, position: int) -> list[int]:
    """Return the path of a sink that stays."""
    return [position] * steps


def drifting(*, steps: int, start: int, per_step: int) -> list[int]:
    """Return the path of a sink that moves by `per_step` keys a step."""
    return [start + step * per_step for step in range(steps)]


def alternating(*, steps: int, positions: Sequence[int]) -> list[int]:
    """Return the path of a sink that visits the positions in turn."""
    return [positions[step % len(positions)] for step in range(steps)]

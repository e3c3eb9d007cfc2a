"""Pruning and rounding with one Hessian: each column's error, from whichever of the two, goes to the columns that follow it.

Three orders can be compared: `joint` prunes and rounds in one sweep; `gptq` with a mask rounds what was pruned before; and
`Quantized.masked` prunes what was rounded before. Tensors in, tensors out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning.importances import (
    UNSTRUCTURED,
    check_finite,
    check_removed,
    check_sparsity,
    parse_pattern,
    removed_count,
    smallest,
)
from lib.pruning.repairs import damped, definite_solution
from lib.pruning.sparsegpt import BLOCK, DAMPING, INNER, inverse_cholesky, quick_rows
from lib.quantization.rounding import Grid, Quantized, group_scales, nearest_codes


@dataclass(frozen=True)
class Compressed:
    """A compressed matrix.

    Attributes:
        weight: what the layer computes with, in the dtype of the original.
        kept: True where a weight was not pruned; it may still have been rounded to 0.
        quantized: its codes and scales; None at 16 bits.
    """

    weight: Float[Tensor, "out in"]
    kept: Bool[Tensor, "out in"]
    quantized: Quantized | None


@dataclass(frozen=True)
class _Plan:
    """What a sweep does.

    Attributes:
        grid: the format of kept weights.
        columns: that share a scale.
        groups: (N, M) of the pattern.
        total: weights to remove; None for a mask that is given.
        factor: of the inverse Hessian.
        importance: of the input features in the search for scales.
    """

    grid: Grid
    columns: int
    groups: tuple[int, int] | None
    total: int | None
    factor: Tensor
    importance: Tensor | None


def shifted(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    cross: Float[Tensor, "in in"],
    *,
    damping: float = DAMPING,
    name: str = "a layer",
) -> Float[Tensor, "out in"]:
    """Return the matrix that comes nearest to the dense outputs when it reads what the compressed layers before it give.

    Args:
        weight: dense matrix W.
        hessian: 2 X X^T / tokens of what it reads now.
        cross: 2 X' X^T / tokens, X' what it read in the dense model.
        damping: share of the mean diagonal of the Hessian added to both; it holds the result near W.
        name: of the layer, for errors.

    Returns:
        W (cross + lambda) (hessian + lambda)^-1, the least-squares solution: the target of any pruning or rounding that follows.

    Raises:
        InputError: a Hessian that is not positive definite.

    Source: the exact form of what GPTAQ (arXiv 2504.02692) folds into the sweep.

    >>> halved = torch.tensor([[0.5]])  # what comes in has half of its size: the weight doubles
    >>> shifted(torch.tensor([[3.0]]), halved * halved, halved, damping=1e-6).round(decimals=3).tolist()
    [[6.0]]
    """
    check_finite(weight, name=name, what="the weights")
    right, left = damped(hessian, damping, name=name), cross.to(hessian.dtype).clone()
    left.diagonal().add_(right.diagonal() - hessian.diagonal())
    solved = definite_solution(right, (weight.to(hessian.dtype) @ left).T).T
    return solved.to(weight.dtype)


def joint(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    grid: Grid,
    sparsity: float,
    pattern: str = UNSTRUCTURED,
    damping: float = DAMPING,
    block: int = BLOCK,
    removed: int | None = None,
    weighted: bool = False,
    name: str = "a layer",
) -> Compressed:
    """Prune and round a matrix in one sweep over its columns.

    The error of a column is its weights minus what they end as: 0 where they go, the nearest point of the grid where they stay.
    What goes is chosen as in SparseGPT, which does not look at the rounding. Scales are set when the sweep reaches a group, from
    its weights as they then stand and without those that go (where the choice comes later, without those that would go now).

    Args:
        weight: matrix of a linear layer.
        hessian: 2 X X^T / tokens of its inputs, weighted by token or not.
        grid: the format; with 16 bits this is `sparsegpt`.
        sparsity: fraction to remove; with 0 this is `gptq`.
        pattern: `"unstructured"` or `"N:M"`, whose M must divide the group.
        damping: share of the mean diagonal added to it.
        block: columns handled at one time; unstructured masks are chosen inside a block, all rows together. Blocks end where
            groups do.
        removed: exact number of weights to remove instead of floor(sparsity x size); unstructured only.
        weighted: whether the search for scales weighs errors with the Hessian's diagonal.
        name: of the layer, for errors.

    Returns:
        The matrix. Columns of features that are always 0 go to 0, chosen or not.

    Raises:
        InputError: bad sparsity, pattern or group, weights that are not finite, or a Hessian that is not positive definite.

    Source: SparseGPT (arXiv 2301.00774), Algorithm 1 and its section on joint quantization. There one scale is for a whole row,
        and comes from its dense weights.
    """
    check_sparsity(sparsity)
    groups = parse_pattern(pattern, sparsity=sparsity, width=weight.shape[1])
    columns = grid.columns(weight.shape[1], name=name)
    if groups and columns % groups[1]:
        raise InputError(
            f"the pattern {pattern} must divide the group_size of {name}, got {columns}: use a multiple of {groups[1]}"
        )
    total = removed_count(weight.numel(), sparsity) if removed is None else removed
    check_removed(total, weight.numel(), name=name)
    work, factor, diagonal = _prepared(weight, hessian, damping=damping, name=name)
    plan = _Plan(grid, columns, groups, total, factor, diagonal if weighted else None)
    return _compress(work, torch.ones_like(work, dtype=torch.bool), plan, block=block, dtype=weight.dtype)


def gptq(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    grid: Grid,
    kept: Bool[Tensor, "out in"] | None = None,
    damping: float = DAMPING,
    block: int = BLOCK,
    weighted: bool = False,
    name: str = "a layer",
) -> Compressed:
    """Round a matrix column by column and let the columns that follow make up for it.

    Args:
        weight: matrix of a linear layer.
        hessian: 2 X X^T / tokens of its inputs, weighted by token or not.
        grid: the format.
        kept: mask of an earlier pruning, by any method. Other weights are taken as 0 and end as 0: what reaches one of them on
            the way is an error of its column, and goes on to the next ones.
        damping: share of the mean diagonal added to it.
        block: columns handled at one time; the result depends on it only by rounding errors.
        weighted: whether the search for scales weighs errors with the Hessian's diagonal.
        name: of the layer, for errors.

    Returns:
        The matrix, its mask as given. Columns of features that are always 0 go to 0.

    Raises:
        InputError: a group that does not divide the width, weights that are not finite, or a Hessian that is not positive
            definite.

    Source: GPTQ (arXiv 2210.17323), Algorithm 1, with columns in their order; masks and scales by group are as in `joint`.
    """
    columns = grid.columns(weight.shape[1], name=name)
    work, factor, diagonal = _prepared(weight, hessian, damping=damping, name=name)
    kept = torch.ones_like(work, dtype=torch.bool) if kept is None else kept.clone()
    plan = _Plan(grid, columns, None, None, factor, diagonal if weighted else None)
    return _compress(torch.where(kept, work, 0.0), kept, plan, block=block, dtype=weight.dtype)


def _prepared(weight: Tensor, hessian: Tensor, *, damping: float, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights to work on, the factor of the inverse Hessian, and the Hessian's diagonal."""
    check_finite(weight, name=name, what="the weights")
    work, hessian = weight.clone().to(hessian.dtype), hessian.clone()
    dead = hessian.diagonal() == 0  # as in SparseGPT
    hessian[dead, dead] = 1.0
    work[:, dead] = 0.0
    return work, inverse_cholesky(hessian, damping=damping, name=name), hessian.diagonal()


def _compress(work: Tensor, kept: Tensor, plan: _Plan, *, block: int, dtype: torch.dtype) -> Compressed:
    """Sweep over the blocks; `work` and `kept` are used up."""
    width, total = work.shape[1], plan.total
    scales = work.new_ones(width // plan.columns, len(work))
    for start, stop in _spans(width, block, plan):
        part = work[:, start:stop].clone()
        if total is not None and plan.groups is None:
            kept[:, start:stop] = ~_smallest(_cost(part, plan, start), _share(total, start, stop, width))
        if plan.grid.rounds and start % plan.columns == 0 and start + plan.columns > stop:
            ahead = slice(start, start + plan.columns)  # a group longer than its blocks
            stays = _expected(work[:, ahead], kept[:, ahead], plan, start)
            scales[start // plan.columns] = _scale(work[:, ahead], stays, plan, start)
        errors = _sweep_(part, kept[:, start:stop], scales, plan, start)
        work[:, start:stop] = part
        work[:, stop:] -= errors @ plan.factor[start:stop, stop:]
    if not plan.grid.rounds:
        return Compressed(work.to(dtype), kept, None)
    codes = nearest_codes(work, scales.T.repeat_interleave(plan.columns, dim=1), plan.grid)
    quantized = Quantized(codes.to(torch.int8), scales.T.contiguous().to(torch.bfloat16), plan.grid)
    return Compressed(quantized.dequantize(dtype=dtype), kept, quantized)


@np.errstate(all="ignore")  # as quiet as torch: what overflows is refused where the next layer reads it
def _sweep_(part: Tensor, kept: Tensor, scales: Tensor, plan: _Plan, start: int) -> Float[Tensor, "out column"]:
    """Prune and round a block column by column in place, moving each error to the columns that follow in it; return the errors.

    It works on the transposed block, where a column lies in one piece of memory.
    """
    work, keep = part.T.contiguous(), kept.T.contiguous()
    local = plan.factor[start : start + len(work), start : start + len(work)]
    errors, share = torch.zeros_like(work), (1.0 / local.diagonal()).tolist()
    rows, error, factor, scale_of, stays_at = (quick_rows(each) for each in (work, errors, local, scales, keep))
    library: Any = np if isinstance(rows, np.ndarray) else torch
    for first, stop in _spans(len(work), INNER, plan):
        for column in range(first, stop):
            if plan.groups and column % plan.groups[1] == 0:
                span = slice(column, column + plan.groups[1])
                keep[span] = _kept_of_groups(work[span].T, plan, start + column).T
            group, into = divmod(start + column, plan.columns)
            if plan.grid.rounds and into == 0 and column + plan.columns <= len(work):
                ahead, begin = slice(column, column + plan.columns), start + column
                stays = _kept_of_groups(work[ahead].T, plan, begin) if plan.groups else keep[ahead].T
                scales[group] = _scale(work[ahead].T, stays, plan, begin)
            end = rows[column]
            if plan.grid.rounds:
                scale = scale_of[group]
                end = (end / scale).round().clip(plan.grid.lowest, plan.grid.highest) * scale
            end = library.where(stays_at[column], end, 0.0)
            error[column] = (rows[column] - end) * share[column]
            rows[column] = end
            rows[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error[column]
        work[stop:].addmm_(local[first:stop, stop:].T, errors[first:stop], alpha=-1)
    part.copy_(work.T)
    kept.copy_(keep.T)
    return errors.T


def _spans(width: int, block: int, plan: _Plan) -> list[tuple[int, int]]:
    """Divide the columns into blocks that cut no group of the pattern, and groups of a scale only where these are longer."""
    pattern = plan.groups[1] if plan.groups else 1
    unit = min(plan.columns, width) if plan.grid.rounds else pattern
    step = max(block - block % pattern, pattern)
    step, end = (step - step % unit, width) if unit <= step else (step, unit)
    return [
        (start, min(start + step, first + end)) for first in range(0, width, end) for start in range(first, first + end, step)
    ]


def _scale(values: Tensor, stays: Tensor, plan: _Plan, start: int) -> Float[Tensor, "out"]:
    """Return the scales of one group, whose first column is `start`, from those of its weights that stay."""
    importance = None if plan.importance is None else plan.importance[start : start + values.shape[1]]
    return group_scales(torch.where(stays, values, 0.0), plan.grid, importance=importance)[:, 0].to(values.dtype)


def _expected(values: Tensor, kept: Tensor, plan: _Plan, start: int) -> Bool[Tensor, "out column"]:
    """Say what would stay of a group longer than its blocks if all were chosen now; a mask that is given is sure."""
    if plan.groups:
        return _kept_of_groups(values, plan, start)
    if plan.total is None:
        return kept
    count = _share(plan.total, start, start + values.shape[1], plan.factor.shape[1])
    return ~_smallest(_cost(values, plan, start), count)


def _cost(values: Tensor, plan: _Plan, start: int) -> Float[Tensor, "out column"]:
    """Return w^2 / [H^-1]_jj of the columns from `start` on."""
    return values**2 / plan.factor.diagonal()[start : start + values.shape[1]] ** 2


def _smallest(cost: Tensor, count: int) -> Bool[Tensor, "out column"]:
    """Mark the smallest of all rows together."""
    return smallest(cost.reshape(1, -1), count).view(cost.shape)


def _kept_of_groups(values: Tensor, plan: _Plan, start: int) -> Bool[Tensor, "out column"]:
    """Choose what stays of whole groups of the pattern, with the weights as they stand."""
    assert plan.groups is not None
    n, m = plan.groups
    return ~smallest(_cost(values, plan, start).reshape(-1, m), m - n).view(values.shape)


def _share(total: int, start: int, stop: int, width: int) -> int:
    """Return how many of `total` removed weights fall to the columns from start to stop, so that all shares add up exactly."""
    return total * stop // width - total * start // width

"""SparseGPT: remove weights and let the remaining ones of a row make up for it. Tensors in, tensors out."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning.importances import (  # fmt: skip
    UNSTRUCTURED,
    check_removed,
    check_sparsity,
    kth_smallest,
    parse_pattern,
    removed_count,
    smallest,
)

DAMPING = 0.01
BLOCK = 128
INNER = 16  # columns of a block whose errors reach the rest of it in one product


def inverse_cholesky(
    hessian: Float[Tensor, "in in"], *, damping: float = DAMPING, name: str = "a layer"
) -> Float[Tensor, "in in"]:
    """Return the upper Cholesky factor of the damped Hessian's inverse.

    Args:
        hessian: 2 X X^T / tokens, in float32 or float64, its dead features (diagonal 0) already given a diagonal of 1.
        damping: added to the diagonal, as a share of its mean.
        name: of the layer, for the error.

    Raises:
        InputError: not positive definite after damping.

    Source: SparseGPT (arXiv 2301.00774), section 3.3, as the authors' release does it.
    """
    # H = U U^T with U upper triangular, from a factor of the matrix read backwards; then H^-1 = U^-T U^-1.
    backwards = hessian.flip(0, 1)
    backwards.diagonal().add_(damping * hessian.diagonal().mean())
    backwards, failed = torch.linalg.cholesky_ex(backwards)
    if bool(failed):
        raise InputError(
            f"the Hessian of {name} must be positive definite after damping, got one that is not: raise damping above {damping}"
        )
    upper = backwards.flip(0, 1)
    del backwards  # memory is short here: a layer's Hessian is the largest thing that there is
    inverse = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    if not bool(torch.isfinite(inverse).all()):
        raise InputError(f"the inverse Hessian of {name} must be finite, got one that is not: raise damping above {damping}")
    return inverse


def sparsegpt(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    sparsity: float,
    pattern: str = UNSTRUCTURED,
    damping: float = DAMPING,
    block: int = BLOCK,
    removed: int | None = None,
    inclusive: bool = False,
    name: str = "a layer",
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Prune a matrix column block by column block and update the columns that follow.

    Args:
        weight: matrix of a linear layer.
        hessian: 2 X X^T / tokens of its inputs, weighted by token or not.
        sparsity: fraction to remove.
        pattern: `"unstructured"` or `"N:M"`.
        damping: share of the mean diagonal added to it.
        block: columns handled at one time; unstructured masks are chosen inside a block, all rows together.
        removed: exact number of weights to remove instead of floor(sparsity x size); unstructured only.
        inclusive: remove also the weight at the threshold, as the release does: one more per block.
        name: of the layer, for errors.

    Returns:
        The updated weights with exact zeros, and the mask (True = kept). Columns of features that are always 0
        go too, chosen or not.

    Raises:
        InputError: bad sparsity or pattern, or a Hessian that is not positive definite.

    Source: SparseGPT (arXiv 2301.00774), Algorithm 1.
    """
    check_sparsity(sparsity)
    groups = parse_pattern(pattern, sparsity=sparsity, width=weight.shape[1])
    work, hessian = weight.clone().to(hessian.dtype), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    work[:, dead] = 0.0
    factor = inverse_cholesky(hessian, damping=damping, name=name)
    kept = torch.ones_like(work, dtype=torch.bool)
    if groups:  # no group of M columns may be cut by the end of a block
        block = max(block - block % groups[1], groups[1])
    total = removed_count(weight.numel(), sparsity) if removed is None else removed
    check_removed(total, weight.numel(), name=name)
    for start in range(0, work.shape[1], block):
        stop = min(start + block, work.shape[1])
        local = factor[start:stop, start:stop]
        part = work[:, start:stop].clone()
        count = _share(total, start, stop, work.shape[1])
        if not groups:
            kept[:, start:stop] = ~_removed(part, local, sparsity, count=count, inclusive=inclusive)
        errors = _sweep_(part, kept[:, start:stop], local, groups)
        work[:, start:stop] = part
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return torch.where(kept, work, 0.0).to(weight.dtype), kept


@np.errstate(all="ignore")  # as quiet as torch: what overflows is refused where the next layer reads it
def _sweep_(part: Tensor, kept: Tensor, local: Tensor, groups: tuple[int, int] | None) -> Float[Tensor, "out column"]:
    """Prune a block column by column in place, moving each error to the columns that follow in it; return the errors.

    It works on the transposed block, where a column lies in one piece of memory.
    """
    work, keep = part.T.contiguous(), kept.T.contiguous()
    errors, diagonal = torch.zeros_like(work), local.diagonal()[:, None]
    share = torch.where(keep, 0.0, 1.0 / diagonal)  # of a weight in its error: 0 where it stays
    step = INNER if not groups else max(INNER - INNER % groups[1], groups[1])
    values, error, factor, part_of = (quick_rows(each) for each in (work, errors, local, share))
    for first in range(0, len(work), step):
        end = min(first + step, len(work))
        for column in range(first, end):
            if groups and column % groups[1] == 0:
                span = slice(column, column + groups[1])
                keep[span] = _kept_of_group((work[span] / diagonal[span]) ** 2, groups)
                share[span] = torch.where(keep[span], 0.0, 1.0 / diagonal[span])
            error[column] = values[column] * part_of[column]
            values[column + 1 : end] -= factor[column, column + 1 : end, None] * error[column]
        work[end:].addmm_(local[first:end, end:].T, errors[first:end], alpha=-1)
    part.copy_(torch.where(keep, work, 0.0).T)
    kept.copy_(keep.T)
    return errors.T


def quick_rows(matrix: Tensor) -> Any:
    """Return a view that is quick to take rows from: NumPy's on the CPU, where a torch operation costs microseconds to begin."""
    known = (torch.float32, torch.float64, torch.bool)
    return matrix.detach().numpy() if matrix.device.type == "cpu" and matrix.dtype in known else matrix


def _share(total: int, start: int, stop: int, width: int) -> int:
    """Return how many of `total` removed weights fall to the columns from start to stop, so that all shares add up exactly."""
    return total * stop // width - total * start // width


def _removed(part: Tensor, local: Tensor, sparsity: float, *, count: int, inclusive: bool) -> Bool[Tensor, "out column"]:
    """Choose what goes from a block: the smallest w^2 / [H^-1]_jj over all rows together."""
    cost = part**2 / local.diagonal()[None] ** 2
    if inclusive:
        return cost <= kth_smallest(cost.reshape(1, -1), int(cost.numel() * sparsity) + 1)
    return smallest(cost.reshape(1, -1), count).view(cost.shape)


def _kept_of_group(cost: Float[Tensor, "column out"], groups: tuple[int, int]) -> Bool[Tensor, "column out"]:
    """Choose what stays of a group of M columns, with the weights as they stand when the sweep reaches it."""
    n, m = groups
    return ~smallest(cost.T, m - n).T

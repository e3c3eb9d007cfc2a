"""What can be done for a mask that is there: solve anew for the weights that stay, or swap weights in and out of it.

Both lower the squared error of the layer's outputs, (w - v)^T H (w - v) added up over rows. Tensors in, tensors out.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning.importances import UNSTRUCTURED, check_finite, parse_pattern
from lib.pruning.sparsegpt import DAMPING

SWAPS = 100
LEAST_GAIN = 1e-6  # share of a row's error below which a swap is rounding
AT_ONCE = 2**20  # numbers of the systems that are solved together


def refit(
    weight: Float[Tensor, "out in"],
    kept: Bool[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    damping: float = DAMPING,
    name: str = "a layer",
) -> Float[Tensor, "out in"]:
    """Solve for the kept weights of every row that come nearest to the dense outputs, by least squares.

    Args:
        weight: dense matrix of a linear layer.
        kept: any mask; rows may keep different numbers.
        hessian: 2 X X^T / tokens of its inputs, weighted by token or not; its dtype is that of the computation.
        damping: share of the mean diagonal added to it; it holds the weights near the dense ones, not near 0.
        name: of the layer, for errors.

    Returns:
        v with v_I = w_I + (H_II)^-1 H_IZ w_Z and v_Z = 0, I kept and Z removed: the gradient H (v - w) is 0 wherever a weight is
        kept, so no other weights on this mask have a smaller error. A feature that is always 0 keeps its weights.

    Raises:
        InputError: weights that are not finite, or a Hessian that is not positive definite after damping.

    Source: the quadratic programme of OPTIMA (arXiv 2512.13886), solved row by row; also the backsolve of ALPS.

    >>> same = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # both features say the same: the one that stays takes the other's weight
    >>> refit(torch.tensor([[2.0, 3.0]]), torch.tensor([[True, False]]), same, damping=1e-6).round(decimals=3).tolist()
    [[5.0, 0.0]]
    """
    check_finite(weight, name=name, what="weights")
    work, matrix = weight.to(hessian.dtype), damped(hessian, damping, name=name)
    pull = torch.where(kept, 0.0, work) @ matrix
    result = torch.zeros_like(work)
    counts = kept.sum(1)
    order = counts.argsort()  # rows that keep alike many go together
    widest = max(1, int(counts.max()))
    for rows in order.split(max(1, AT_ONCE // widest**2)):
        columns, valid = _kept_columns(kept[rows])
        change = _solved(matrix, columns, valid, pull[rows].gather(1, columns))
        values = torch.where(valid, work[rows].gather(1, columns) + change, 0.0)
        result[rows] = torch.zeros_like(work[rows]).scatter_add_(1, columns, values)
    return result.to(weight.dtype)


def damped(hessian: Float[Tensor, "in in"], damping: float, *, name: str = "a layer") -> Float[Tensor, "in in"]:
    """Return the Hessian with a share of its mean diagonal added; features that are always 0 get a diagonal of 1 before.

    Raises:
        InputError: not positive definite even so.
    """
    matrix = hessian.clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0  # as in SparseGPT
    diagonal += damping * diagonal.mean()
    if bool(torch.linalg.cholesky_ex(matrix).info):  # what is definite as a whole is so in every part
        raise InputError(
            f"the Hessian of {name} must be positive definite after damping, got one that is not: raise damping above {damping}"
        )
    return matrix


def _kept_columns(kept: Bool[Tensor, "row in"]) -> tuple[Int[Tensor, "row most"], Bool[Tensor, "row most"]]:
    """Return the kept columns of some rows, padded by removed ones to the longest, and which are none of the padding."""
    most = max(1, int(kept.sum(1).max()))
    columns = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return columns, kept.gather(1, columns)


def _solved(matrix: Tensor, columns: Tensor, valid: Tensor, pull: Tensor) -> Float[Tensor, "row most"]:
    """Solve the systems of some rows; padding is a system of its own, with the solution 0."""
    systems = torch.stack([matrix.index_select(0, row).index_select(1, row) for row in columns])  # faster than one gather
    if not bool(valid.all()):
        both = valid[:, :, None] & valid[:, None]
        systems = torch.where(both, systems, torch.eye(columns.shape[1], dtype=matrix.dtype, device=matrix.device))
    return torch.linalg.solve_ex(systems, torch.where(valid, pull, 0.0)[..., None]).result[..., 0]


def swap(
    weight: Float[Tensor, "out in"],
    kept: Bool[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    swaps: int = SWAPS,
    pattern: str = UNSTRUCTURED,
    exhaustive: bool = False,
) -> Bool[Tensor, "out in"]:
    """Exchange kept and removed weights of a row one for one as long as the row's error falls; the weights stay as they are.

    With e the removed part of a row and c = H e, removing p and restoring q changes the error by
    2 w_p c_p + w_p^2 H_pp - 2 w_q c_q + w_q^2 H_qq - 2 w_p w_q H_pq.

    Args:
        weight: dense matrix of a linear layer.
        kept: its mask.
        hessian: 2 X X^T / tokens of its inputs; not damped.
        swaps: of every row at most.
        pattern: of the mask: with `"N:M"` both weights are of one group.
        exhaustive: look at all pairs and take the best, slowly. Otherwise, and without a pattern: the best partner of the weight
            that is cheapest to remove and the best one of that in turn, the same from the weight that is best to restore, and
            the better of these two pairs.

    Returns:
        The mask, as many kept in every row (and group) as before.

    Raises:
        InputError: a pattern that does not divide the width.

    Source: after the description of SparseSwaps (arXiv 2512.10922), whose code is not out; the search for pairs is ours.

    >>> same = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # features 0 and 1 cancel each other
    >>> swap(torch.tensor([[2.0, 2.0, 1.5]]), torch.tensor([[True, False, False]]), same).tolist()
    [[False, False, True]]
    """
    groups = parse_pattern(pattern, width=weight.shape[1])
    work, gone = weight.to(hessian.dtype), ~kept
    errors = torch.where(gone, work, 0.0)
    pulls = errors @ hessian
    least = LEAST_GAIN * (errors * pulls).sum(1)
    active = torch.arange(len(weight), device=weight.device)
    for _ in range(swaps):
        values, pull, out = work[active], pulls[active], gone[active]
        change, remove, restore = _best_pair(values, pull, out, hessian, groups, exhaustive=exhaustive)
        lower = change < -least[active]
        active, remove, restore = active[lower], remove[lower], restore[lower]
        if not len(active):
            break
        gone[active, remove], gone[active, restore] = True, False
        pulls[active] += work[active, remove, None] * hessian[remove] - work[active, restore, None] * hessian[restore]
    return ~gone


def _best_pair(
    values: Tensor, pull: Tensor, gone: Tensor, hessian: Tensor, groups: tuple[int, int] | None, *, exhaustive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return of every row the change of its error, the weight to remove and the weight to restore."""
    own = values.square() * hessian.diagonal()
    to_remove = torch.where(gone, torch.inf, own + 2 * values * pull)
    to_restore = torch.where(gone, own - 2 * values * pull, torch.inf)
    if groups is not None:
        return _of_groups(values, to_remove, to_restore, hessian, groups[1])
    if exhaustive:
        found = [_of_all(*row, hessian) for row in zip(values, to_remove, to_restore, strict=True)]
        return tuple(torch.stack(each) for each in zip(*found, strict=True))  # type: ignore[return-value]

    def partner(cost: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cheapest of a side beside one weight a row, and its cost."""
        shared = 2 * values * values.gather(1, of[:, None]) * hessian[of]
        best = (cost - shared).min(1)
        return best.indices, best.values

    first = to_remove.argmin(1)
    restore, _ = partner(to_restore, first)
    remove, cost = partner(to_remove, restore)
    change = cost + to_restore.gather(1, restore[:, None])[:, 0]
    begun = to_restore.argmin(1)
    other_remove, _ = partner(to_remove, begun)
    other_restore, cost = partner(to_restore, other_remove)
    other = cost + to_remove.gather(1, other_remove[:, None])[:, 0]
    better = other < change
    return (
        torch.where(better, other, change),
        torch.where(better, other_remove, remove),
        torch.where(better, other_restore, restore),
    )


def _of_all(values: Tensor, to_remove: Tensor, to_restore: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Look at all pairs of one row."""
    table = to_remove[:, None] + to_restore - 2 * values[:, None] * values * hessian
    best = table.argmin()
    return table.view(-1)[best], best // len(values), best % len(values)


def _of_groups(
    values: Tensor, to_remove: Tensor, to_restore: Tensor, hessian: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Look at all pairs inside groups of `size` columns."""
    inside = torch.stack([hessian[start : start + size, start : start + size] for start in range(0, len(hessian), size)])
    values, to_remove, to_restore = (each.unflatten(1, (-1, size)) for each in (values, to_remove, to_restore))
    table = to_remove[..., None] + to_restore[..., None, :] - 2 * values[..., None] * values[..., None, :] * inside
    best = table.flatten(1).min(1)
    group, place = best.indices // size**2, best.indices % size**2
    return best.values, group * size + place // size, group * size + place % size

"""What can be done for a mask that is there: solve anew for the weights that stay, or swap weights in and out of it.

Both lower the squared error of the layer's outputs, (w - v)^T H (w - v) added up over rows. Tensors in, tensors out.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning.importances import UNSTRUCTURED, check_finite, parse_pattern
from lib.pruning.sparsegpt import DAMPING

SWAPS = 100
LEAST_GAIN = 1e-6  # share of a row's error below which a swap is rounding
IN_CACHE = 2**16  # numbers of a matrix whose rows are swapped together
AT_ONCE = 2**20  # numbers of the systems that are solved together
Search = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # weights, costs, mask, Hessian


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
    return refits(weight, kept[None], hessian, damping=damping, name=name)[0]


def refits(
    weight: Float[Tensor, "out in"],
    masks: Bool[Tensor, "mask out in"],
    hessian: Float[Tensor, "in in"],
    *,
    damping: float = DAMPING,
    name: str = "a layer",
) -> Float[Tensor, "mask out in"]:
    """Refit a matrix on several masks at once, as `refit` does on one; what they all keep is solved for once.

    With A what all masks keep of a row, and B what only some keep, H_AA is factored once; every mask then has a small system
    of its own, its part of the Schur complement H_BB - H_BA (H_AA)^-1 H_AB. Masks that are nearly the same cost little more
    than one.

    Args:
        weight, hessian, damping, name: as for `refit`.
        masks: any number of them.

    Raises:
        InputError: as `refit`.
    """
    check_finite(weight, name=name, what="weights")
    # a last feature of zeros, which no mask keeps, stands wherever a row has fewer columns than others
    work, matrix = F.pad(weight.to(hessian.dtype), (0, 1)), F.pad(damped(hessian, damping, name=name), (0, 1, 0, 1))
    kept = F.pad(masks, (0, 1))
    results, pulls = torch.where(kept, work, 0.0), torch.where(kept, 0.0, work) @ matrix
    by_all, by_some = kept.all(0), kept.any(0) & ~kept.all(0)
    widest = max(1, int((by_all | by_some).sum(1).max()))
    for rows in by_all.sum(1).argsort().split(max(1, AT_ONCE // widest**2)):  # rows of alike sizes go together
        shared, others = _places(by_all[rows]), _places(by_some[rows])
        columns = torch.cat([shared, others], 1)
        of_mask = columns.expand(len(masks), -1, -1)
        change = _solved(matrix, columns, shared.shape[1], kept[:, rows].gather(2, of_mask), pulls[:, rows].gather(2, of_mask))
        results[:, rows] = results[:, rows].scatter_add(2, of_mask, change)
    return results[..., :-1].to(weight.dtype)


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


def definite_solution(
    systems: Float[Tensor, "*batch size size"], right: Float[Tensor, "*batch size column"]
) -> Float[Tensor, "*batch size column"]:
    """Solve symmetric positive definite systems.

    By Cholesky factors, never by LU: half the work, and the batched LU of MKL (torch 2.13) hangs, or prints errors and returns
    nonsense, from about 150 unknowns on once it has two threads.

    Raises:
        torch.linalg.LinAlgError: a system that is not positive definite.

    >>> definite_solution(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0], [3.0]])).round(decimals=5).tolist()
    [[1.0], [1.0]]
    """
    return torch.cholesky_solve(right, torch.linalg.cholesky(systems))


def _places(mask: Bool[Tensor, "row in"]) -> Int[Tensor, "row most"]:
    """Return the columns that some rows have, padded by the last one to the longest."""
    columns = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(mask.sum(1).max()))]
    return columns.masked_fill(~mask.gather(1, columns), mask.shape[1] - 1)


def _solved(
    matrix: Tensor, columns: Tensor, count: int, kept: Bool[Tensor, "mask row column"], pulls: Float[Tensor, "mask row column"]
) -> Float[Tensor, "mask row column"]:
    """Solve the systems of some rows, the first `count` columns of which all masks keep; what a mask removes gets 0."""
    systems = torch.stack([matrix.index_select(0, row).index_select(1, row) for row in columns])  # faster than one gather
    systems.diagonal(dim1=1, dim2=2).add_(columns == len(matrix) - 1)  # padding is a system of its own, with the solution 0
    cross, goal = systems[:, :count, count:], pulls.permute(1, 2, 0)
    found = definite_solution(systems[:, :count, :count], torch.cat([cross, goal[:, :count]], 2))
    of_others, of_goal = found.split([cross.shape[2], len(pulls)], 2)
    schur = systems[:, count:, count:] - cross.mT @ of_others
    own, rest = kept[..., count:], (goal[:, count:] - cross.mT @ of_goal).permute(2, 0, 1)
    one = torch.eye(schur.shape[1], dtype=matrix.dtype, device=matrix.device)
    small = torch.where(own[..., None] & own[..., None, :], schur, one)
    others = definite_solution(small, torch.where(own, rest, 0.0)[..., None])[..., 0]
    return torch.cat([of_goal.permute(2, 0, 1) - torch.einsum("rsu,mru->mrs", of_others, others), others], 2)


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
        exhaustive: look at all pairs and take the best, slowly. Otherwise, and without a pattern: the better of two pairs, the
            weight that is cheapest to remove with its best partner, and the weight that is best to restore with its own.

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
    work, results = weight.to(hessian.dtype), []
    search = _of_all if exhaustive else _of_two
    if groups:
        search = _inside(groups[1])
    for rows, own in zip(work.split(_at_once(work)), kept.split(_at_once(work)), strict=True):
        results.append(_swapped(rows, own, hessian, swaps, search))
    return torch.cat(results)


def _at_once(weight: Tensor) -> int:
    """Return how many rows are swapped together: as many as stay in a cache."""
    return max(1, IN_CACHE // weight.shape[1])


def _swapped(weight: Tensor, kept: Tensor, hessian: Tensor, swaps: int, search: Search) -> Tensor:
    """Swap weights of some rows."""
    result, active = kept.clone(), torch.arange(len(weight), device=weight.device)
    gone, own = ~kept, weight.square() * hessian.diagonal()
    twice = torch.where(gone, -2.0, 2.0) * weight  # removing adds an error, restoring takes one away
    pull = torch.where(gone, weight, 0.0) @ hessian
    least = LEAST_GAIN * (torch.where(gone, weight, 0.0) * pull).sum(1)
    for _ in range(swaps):
        cost = torch.addcmul(own, twice, pull)
        change, *pair = search(weight, cost, gone, hessian)
        lower = change < -least
        if not bool(lower.all()):
            result[active] = ~gone
            weight, gone, own, twice, pull, least = (each[lower] for each in (weight, gone, own, twice, pull, least))
            active, pair = active[lower], [each[lower] for each in pair]
        if not len(active):
            break
        for place, sign in zip(pair, (1, -1), strict=True):
            at = place[:, None]
            gone, twice = gone.scatter(1, at, sign > 0), twice.scatter(1, at, -twice.gather(1, at))
            pull = pull.addcmul(sign * weight.gather(1, at), hessian[place])
    result[active] = ~gone
    return result


def _of_two(weight: Tensor, cost: Tensor, gone: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pair the weight that is cheapest to remove with its best partner, and so the one that is best to restore; take the better.

    Returns:
        Of every row the change of its error, the weight to remove and the weight to restore.
    """
    to_remove, to_restore = cost.masked_fill(gone, torch.inf), cost.masked_fill(~gone, torch.inf)
    removed, restored = to_remove.min(1), to_restore.min(1)

    def partner(side: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cost of the cheapest of a side beside one weight a row, and which it is."""
        best = torch.addcmul(side, hessian[of] * (-2 * weight.gather(1, of[:, None])), weight).min(1)
        return best.values, best.indices

    first, restore = partner(to_restore, removed.indices)
    second, remove = partner(to_remove, restored.indices)
    first, second = first + removed.values, second + restored.values
    better = second < first
    return (
        torch.minimum(first, second),
        torch.where(better, remove, removed.indices),
        torch.where(better, restored.indices, restore),
    )


def _of_all(weight: Tensor, cost: Tensor, gone: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Look at all pairs of every row."""
    found = []
    for values, own, out in zip(weight, cost, gone, strict=True):
        table = own.masked_fill(out, torch.inf)[:, None] + own.masked_fill(~out, torch.inf)
        best = (table - 2 * values[:, None] * values * hessian).view(-1).min(0)
        found.append((best.values, best.indices // len(values), best.indices % len(values)))
    change, remove, restore = (torch.stack(each) for each in zip(*found, strict=True))
    return change, remove, restore


def _inside(size: int) -> Search:
    """Look at all pairs inside groups of `size` columns."""

    def search(weight: Tensor, cost: Tensor, gone: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best pair of every row."""
        inside = torch.stack([hessian[start : start + size, start : start + size] for start in range(0, len(hessian), size)])
        values, costs, out = (each.unflatten(1, (-1, size)) for each in (weight, cost, gone))
        to_remove, to_restore = costs.masked_fill(out, torch.inf), costs.masked_fill(~out, torch.inf)
        table = to_remove[..., None] + to_restore[..., None, :] - 2 * values[..., None] * values[..., None, :] * inside
        best = table.flatten(1).min(1)
        group, place = best.indices // size**2, best.indices % size**2
        return best.values, group * size + place // size, group * size + place % size

    return search

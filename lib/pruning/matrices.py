"""Prune one matrix with a method: its mask, what swaps make of it, and the weights that stay or are solved for anew."""

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib.calibration.sums import InputStatistics
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.pruning import importances, repairs
from lib.pruning.alps import alps
from lib.pruning.importances import UNSTRUCTURED
from lib.pruning.methods import Method, Target
from lib.pruning.sparsegpt import sparsegpt


def pruned(
    weight: Float[Tensor, "out in"],
    method: Method,
    target: Target,
    statistics: InputStatistics | None,
    *,
    errors_of: InputStatistics | None = None,
    random: torch.Generator | None = None,
    seed: int = 0,
    name: str = "a layer",
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Return the new weights of one matrix, exact zeros included, and its mask.

    Args:
        weight: dense matrix of a linear layer.
        method: how.
        target: how much; exact numbers by the layer's name.
        statistics: of its input, with a Hessian where the method needs one.
        errors_of: statistics with the Hessian that swaps and refit measure errors with; `statistics` when None. So masks that
            weigh tokens differently can be repaired alike.
        random: stream of random pruning.
        seed: of a random order of columns.
        name: of the layer, for exact numbers and errors.

    Raises:
        InputError: what the method or its repair refuses.
    """
    removed = None if target.removed is None else target.removed[name]
    hessian = cast(InputStatistics, statistics).hessian() if method.updates or (method.repairs and errors_of is None) else None
    if method.updates:
        found = _updated(weight, method, target, cast(Tensor, hessian), removed=removed, seed=seed, name=name)
        if not method.repairs:
            return found
        kept = found[1]
    else:
        kept = _mask(weight, method, target, statistics, removed=removed, random=random)
    if method.repairs:
        of_errors = cast(Tensor, hessian) if errors_of is None else errors_of.hessian()
        if method.swaps:
            kept = repairs.swap(weight, kept, of_errors, swaps=method.swaps, pattern=target.pattern)
        if method.repair == "refit":
            return repairs.refit(weight, kept, of_errors, damping=method.damping, name=name), kept
    return importances.prune(weight, kept), kept


def _updated(
    weight: Tensor, method: Method, target: Target, hessian: Tensor, *, removed: int | None, seed: int, name: str
) -> tuple[Tensor, Tensor]:
    """Prune by a method that changes the weights that stay."""
    if method.importance == "alps":
        given = {"sparsity": target.sparsity, "pattern": target.pattern, "removed": removed, "damping": method.damping}
        return alps(weight, hessian, **given, name=name)
    order = column_order(hessian, method, seed=seed, name=name)
    if order is not None:
        if target.pattern != UNSTRUCTURED:
            raise InputError(f"an order of columns must go with unstructured sparsity, got {target.pattern}: drop one of them")
        weight, hessian = weight[:, order], hessian[order][:, order]
    found = sparsegpt(
        weight,
        hessian,
        sparsity=target.sparsity,
        pattern=target.pattern,
        removed=removed,
        inclusive=method.inclusive and removed is None,
        damping=method.damping,
        name=name,
    )
    return found if order is None else (found[0][:, order.argsort()], found[1][:, order.argsort()])


def column_order(hessian: Float[Tensor, "in in"], method: Method, *, seed: int, name: str) -> Tensor | None:
    """Return the order in which SparseGPT takes the columns; None as they come."""
    if method.columns == "given":
        return None
    if method.columns == "largest first":
        return hessian.diagonal().argsort(descending=True, stable=True)
    return torch.randperm(len(hessian), generator=generator(seed, "column order", name)).to(hessian.device)


def _mask(
    weight: Tensor,
    method: Method,
    target: Target,
    statistics: InputStatistics | None,
    *,
    removed: int | None,
    random: torch.Generator | None,
) -> Bool[Tensor, "out in"]:
    """Return the mask of a method that ranks weights."""
    if method.inclusive and target.pattern == UNSTRUCTURED and removed is None:
        return importances.release_magnitude_mask(weight, sparsity=target.sparsity)
    scores = importance(weight, method, statistics, random=random)
    if removed is not None:
        rows = scores if method.granularity == "row" else scores.reshape(1, -1)
        return importances.keep_mask_by_count(rows, removed=removed).view(weight.shape)
    return importances.keep_mask(scores, sparsity=target.sparsity, pattern=target.pattern, granularity=method.granularity)


def importance(
    weight: Tensor, method: Method, statistics: InputStatistics | None, *, random: torch.Generator | None = None
) -> Tensor:
    """Return the importance of every weight of a matrix, for methods that do not update weights."""
    if method.importance == "random":
        return importances.random_importance(weight, generator=cast(torch.Generator, random))
    if method.importance == "magnitude":
        return importances.magnitude_importance(weight.float())
    return importances.wanda_importance(weight.float(), cast(InputStatistics, statistics).input_norm(method.aggregate))

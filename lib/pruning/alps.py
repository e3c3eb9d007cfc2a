"""ALPS: choose mask and weights of a layer together, by ADMM on the error with so many weights, then by conjugate gradients."""

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
from lib.pruning.sparsegpt import DAMPING

RHO = 0.1  # first penalty, in units of the scaled Hessian's diagonal
ITERATIONS = 300
EVERY = 3  # iterations between two looks at the support
STEPS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the support that changed, above which the penalty grows by so much
BACK = 5.0  # the penalty is divided by this as long as it has never grown
SETTLED, SETTLED_AFTER = 3e-4, 30
ROUNDING = 1e-4  # share of the largest eigenvalue by which the smallest may fall below 0 in float32
GRADIENTS = 10  # iterations of conjugate gradients


def alps(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    sparsity: float,
    pattern: str = UNSTRUCTURED,
    removed: int | None = None,
    damping: float = DAMPING,
    iterations: int = ITERATIONS,
    name: str = "a layer",
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Prune a matrix so that the squared error of its outputs is small, weights and mask found together.

    Args:
        weight: matrix of a linear layer.
        hessian: 2 X X^T / tokens of its inputs, weighted by token or not; its dtype is that of the computation.
        sparsity: fraction to remove.
        pattern: `"unstructured"`, where all weights of the matrix compete, or `"N:M"`.
        removed: exact number of weights to remove instead of floor(sparsity x size); unstructured only.
        damping: share of the mean diagonal added to the Hessian's.
        iterations: of ADMM at most.
        name: of the layer, for errors.

    Returns:
        The weights with exact zeros, and the mask (True = kept); rows may lose different numbers.

    Raises:
        InputError: bad sparsity or pattern, or weights or a Hessian that are not finite.

    Source: ALPS (NeurIPS 2024), its algorithm, penalties and stopping rules, written from the formulas.
    """
    check_sparsity(sparsity)
    groups = parse_pattern(pattern, sparsity=sparsity, width=weight.shape[1])
    check_finite(weight, name=name, what="weights")
    check_finite(hessian, name=name, what="the Hessian")
    gone = removed_count(weight.numel(), sparsity) if removed is None else removed
    check_removed(gone, weight.numel(), name=name)
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0  # as in SparseGPT
    diagonal += damping * diagonal.mean()
    scale = damped.diagonal().sqrt()
    scaled, work = damped / (scale[:, None] * scale), weight.to(hessian.dtype) * scale
    kept = _support(work, scaled, gone=gone, groups=groups, iterations=iterations, name=name)
    found = conjugate_gradients(work, torch.where(kept[1], kept[0], 0.0), kept[1], scaled, iterations=GRADIENTS)
    return torch.where(kept[1], found / scale, 0.0).to(weight.dtype), kept[1]


def _support(
    work: Tensor, hessian: Tensor, *, gone: int, groups: tuple[int, int] | None, iterations: int, name: str
) -> tuple[Tensor, Tensor]:
    """Run ADMM: return the weights that are free to be anywhere, and which of them are kept."""
    values, basis = _spectrum(hessian, name=name)
    target, kept = work @ hessian, _largest(work, gone=gone, groups=groups)
    count = work.numel() - gone
    rho, has_grown = RHO, False
    sparse, dual, free, before = torch.where(kept, work, 0.0), torch.zeros_like(work), work, kept
    for iteration in range(1, iterations + 1):
        free = ((target - dual + rho * sparse) @ basis / (values + rho)) @ basis.T
        candidate = free + dual / rho
        kept = _largest(candidate, gone=gone, groups=groups)
        sparse = torch.where(kept, candidate, 0.0)
        dual = dual + rho * (free - sparse)
        if iteration % EVERY:
            continue
        changed, before = int((kept != before).sum()), kept
        grown = growth(changed / count, has_grown=has_grown)
        if (changed == 0 and has_grown) or (iteration >= SETTLED_AFTER and changed / count < SETTLED):
            break
        if grown is None:  # the first penalty was too large for the support to move
            rho /= BACK
            kept = before = _largest(work, gone=gone, groups=groups)
            sparse, dual = torch.where(kept, work, 0.0), torch.zeros_like(work)
        else:
            rho, has_grown = rho * grown, True
    return free, _largest(free, gone=gone, groups=groups)


def _spectrum(hessian: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, none below 0, and eigenvectors."""
    if bool(torch.isfinite(hessian).all()):  # the root of a diagonal below 0 is not
        values, basis = torch.linalg.eigh(hessian)
        if bool(values.min() > -ROUNDING * values.max()):
            return values.clamp(min=0.0), basis
    raise InputError(f"the Hessian of {name} must be positive definite after damping, got one that is not: raise damping")


def growth(changed: float, *, has_grown: bool) -> float | None:
    """Return the factor of the penalty when a share of the support changed; None to start again with a smaller penalty.

    >>> growth(0.2, has_grown=False), growth(0.01, has_grown=False), growth(0.001, has_grown=True), growth(0.001, has_grown=False)
    (1.3, 1.2, 1.1, None)
    """
    if not has_grown and changed <= STEPS[1][0]:
        return None
    return next((factor for least, factor in STEPS if changed > least), 1.0)


def _largest(values: Tensor, *, gone: int, groups: tuple[int, int] | None) -> Bool[Tensor, "out in"]:
    """Mark the largest by size: of the whole matrix, or of every group."""
    sizes = values.abs()
    if groups is not None:
        return ~smallest(sizes.reshape(-1, groups[1]), groups[1] - groups[0]).view(values.shape)
    return ~smallest(sizes.reshape(1, -1), gone).view(values.shape)


def conjugate_gradients(
    weight: Float[Tensor, "out in"],
    begin: Float[Tensor, "out in"],
    kept: Bool[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    iterations: int,
) -> Float[Tensor, "out in"]:
    """Lower the squared error of all rows together on a fixed mask, from weights that are zero outside of it.

    Args:
        weight: dense matrix.
        begin: weights to begin with, on the mask.
        kept: the mask.
        hessian: positive definite.
        iterations: as many as a row keeps weights end at the least-squares solution.
    """
    found = begin.clone()
    residual = torch.where(kept, (weight - found) @ hessian, 0.0)
    direction, size = residual, residual.square().sum()
    for _ in range(iterations):
        if not bool(size > 0):
            break
        ahead = torch.where(kept, direction @ hessian, 0.0)
        step = size / (direction * ahead).sum()
        found = found + step * direction
        residual = residual - step * ahead
        size, last = residual.square().sum(), size
        direction = residual + size / last * direction
    return found

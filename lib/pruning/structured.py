"""Remove whole attention head groups and MLP channels: which ones, which rows and columns stay. Tensors in, tensors out."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning import repairs
from lib.pruning.importances import check_sparsity, removed_count
from lib.pruning.sparsegpt import DAMPING


@dataclass(frozen=True)
class HeadShape:
    """How the rows of q, k, v and the columns of o are divided.

    Attributes:
        heads: query heads.
        kv_heads: key-value heads; query head h reads key-value head h // (heads / kv_heads).
        width: features of a head.
    """

    heads: int
    kv_heads: int
    width: int

    @property
    def group_width(self) -> int:
        """Columns of o that belong to one key-value head."""
        return self.heads // self.kv_heads * self.width


def column_importance(weight: Float[Tensor, "out in"], input_norm: Float[Tensor, "in"] | None = None) -> Float[Tensor, "in"]:
    """Return the importance of each input feature: the L2 norm of its column, times the norm of the feature when given.

    Args:
        weight: the matrix that reads the structure: o for heads, down for MLP channels.
        input_norm: norm of each feature over calibration tokens, weighted by token or not, or its standard deviation; None for
            magnitude.

    Source: Wanda-sp (FLAP, arXiv 2312.11983) removes what writes least into the residual stream; with standard deviations the
        square is FLAP's own score, the variance that a feature writes.
    """
    norm = weight.float().norm(dim=0)
    return norm if input_norm is None else norm * input_norm


def restored(
    weight: Float[Tensor, "out in"], kept: Int[Tensor, "kept"], hessian: Float[Tensor, "in in"], *, damping: float = DAMPING
) -> Float[Tensor, "out kept"]:
    """Solve for the columns that stay so that their outputs come nearest to those of all columns, by least squares.

    Args:
        weight: the matrix that reads the structure: o for heads, down for MLP channels.
        kept: its columns that stay.
        hessian: 2 X X^T / tokens of its inputs, or the same about their mean where a bias makes up for that.
        damping: share of the mean diagonal added to it; it holds the columns near the dense ones.

    Returns:
        W_K + W_Z H_ZK (H_KK)^-1, K kept and Z removed: `repairs.refit` where all rows have one mask.

    Source: restoration of FASP (arXiv 2501.09412), after the paper's description.

    >>> same = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    >>> restored(torch.tensor([[2.0, 3.0]]), torch.tensor([0]), same, damping=1e-6).round(decimals=3).tolist()
    [[5.0]]
    """
    mask = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    mask[kept.to(weight.device)] = True
    damped = repairs.damped(hessian, damping, name="a structure's reader")
    work = weight.to(hessian.dtype)
    pull = work[:, ~mask] @ damped[~mask][:, mask]
    return (work[:, mask] + repairs.definite_solution(damped[mask][:, mask], pull.T).T).to(weight.dtype)


def lost_mean(
    weight: Float[Tensor, "out in"], new: Float[Tensor, "out kept"], kept: Int[Tensor, "kept"], mean: Float[Tensor, "in"]
) -> Float[Tensor, "out"]:
    """Return what the mean output loses when the kept columns become `new` and the others go: the bias that makes up for it.

    Source: bias compensation of FLAP (arXiv 2312.11983), for columns that may have changed.

    >>> lost_mean(torch.tensor([[2.0, 3.0]]), torch.tensor([[2.0]]), torch.tensor([0]), torch.tensor([1.0, 10.0])).tolist()
    [30.0]
    """
    mean = mean.to(weight.device)
    return (weight.double() @ mean.double() - new.double() @ mean.double()[kept.to(weight.device)]).to(weight.dtype)


def group_importance(columns: Float[Tensor, "in"], *, shape: HeadShape) -> Float[Tensor, "kv_head"]:
    """Add up the squared importance of the columns of each key-value group.

    >>> group_importance(torch.tensor([1.0, 2.0, 3.0, 4.0]), shape=HeadShape(heads=4, kv_heads=2, width=1)).tolist()
    [5.0, 25.0]
    """
    return columns.view(shape.kv_heads, shape.group_width).square().sum(1)


def kept_units(importance: Float[Tensor, "unit"], *, sparsity: float) -> Int[Tensor, "kept"]:
    """Return the indices of the units to keep, in rising order; floor(sparsity x units) go, of equals the earlier.

    Raises:
        InputError: sparsity out of range, or nothing would be left.

    >>> kept_units(torch.tensor([3.0, 1.0, 2.0]), sparsity=0.34).tolist()
    [0, 2]
    """
    check_sparsity(sparsity)
    removed = removed_count(len(importance), sparsity)
    if removed >= len(importance):
        raise InputError(f"structured pruning must leave a unit, got {len(importance)} of which {removed} go: lower sparsity")
    return importance.argsort(stable=True)[removed:].sort().values


def query_rows(groups: Int[Tensor, "kept"], *, shape: HeadShape) -> Int[Tensor, "row"]:
    """Return the rows of q (and columns of o) that belong to the kept key-value groups."""
    return _rows(groups, shape.group_width)


def key_rows(groups: Int[Tensor, "kept"], *, shape: HeadShape) -> Int[Tensor, "row"]:
    """Return the rows of k and v that belong to the kept key-value groups."""
    return _rows(groups, shape.width)


def _rows(groups: Int[Tensor, "kept"], width: int) -> Int[Tensor, "row"]:
    return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()

"""Remove whole attention head groups and MLP channels: which ones, which rows and columns stay. Tensors in, tensors out."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning.importances import check_sparsity, removed_count


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
        input_norm: norm of each feature over calibration tokens, weighted by token or not; None for magnitude.

    Source: Wanda-sp (FLAP, arXiv 2312.11983) removes what writes least into the residual stream.
    """
    norm = weight.float().norm(dim=0)
    return norm if input_norm is None else norm * input_norm


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

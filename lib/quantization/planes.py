"""Weights as a sum of planes of signs, each with a scale for every row and every column. Tensors in, tensors out."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from lib.core.errors import require
from lib.pruning.importances import check_finite
from lib.pruning.sparsegpt import BLOCK, DAMPING, inverse_cholesky

ROUNDS = 15
RIDGE = 1e-8  # share of the mean square added to normal equations, where two planes agree in every sign


@dataclass(frozen=True)
class Planes:
    """A block of a matrix as planes.

    Attributes:
        rows: scale of each row, by plane.
        columns: scale of each column, by plane.
        signs: -1 or 1, by plane.
    """

    rows: Float[Tensor, "plane out"]
    columns: Float[Tensor, "plane in"]
    signs: Int8[Tensor, "plane out in"]

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Add up the planes."""
        return (self.rows[:, :, None] * self.columns[:, None] * self.signs).sum(0)


def fit(weight: Float[Tensor, "out in"], *, planes: int = 2, rounds: int = ROUNDS) -> Planes:
    """Fit planes to a block: rows, columns and signs in turn, each the best for the others.

    Args:
        weight: the block.
        planes: how many, 1 bit a weight each.
        rounds: of all three.

    Returns:
        The planes; the squared error never rises from round to round.

    Source: Quant-dLLM (arXiv 2510.03274): least squares for rows and columns, all 2^planes signs of each weight tried.

    >>> fit(torch.tensor([[3.0, -1.0], [-6.0, 2.0]]), planes=1).dequantize().round(decimals=3).tolist()
    [[3.0, -1.0], [-6.0, 2.0]]
    """
    require(planes >= 1, "planes must be at least 1", str(planes), "2 make 2 bits a weight")
    rest, signs, rows = weight, [], []
    for _ in range(planes):  # greedily at first: the sign of what is left, and its mean size in each row
        signs.append(torch.where(rest >= 0, 1.0, -1.0).to(weight))
        rows.append(rest.abs().mean(1))
        rest = rest - rows[-1][:, None] * signs[-1]
    sign, row = torch.stack(signs), torch.stack(rows)
    column = torch.ones(planes, weight.shape[1], dtype=weight.dtype, device=weight.device)
    choices = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * planes).view(-1, planes).to(weight)
    for _ in range(rounds):
        row = _solved(weight, sign * column[:, None])
        column = _solved(weight.T, (sign * row[:, :, None]).transpose(1, 2))
        sizes = row[:, :, None] * column[:, None]
        errors = torch.stack([(weight - torch.einsum("k,koi->oi", choice, sizes)).square() for choice in choices])
        sign = choices[errors.argmin(0)].permute(2, 0, 1)
    row = _solved(weight, sign * column[:, None])
    return Planes(row, column, sign.to(torch.int8))


def _solved(weight: Tensor, basis: Float[Tensor, "plane out in"]) -> Float[Tensor, "plane out"]:
    """Fit every row by the planes' rows."""
    normal = torch.einsum("koi,loi->okl", basis, basis)
    trace = normal.diagonal(dim1=1, dim2=2).mean(1)
    normal = normal + (RIDGE * trace + torch.finfo(weight.dtype).tiny)[:, None, None] * torch.eye(len(basis)).to(weight)
    return torch.linalg.solve(normal, torch.einsum("koi,oi->ok", basis, weight)).T


def planed(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    planes: int = 2,
    damping: float = DAMPING,
    block: int = BLOCK,
    name: str = "a layer",
) -> tuple[Float[Tensor, "out in"], list[Planes]]:
    """Bring a matrix to planes block by block, and let the columns that follow make up for the error of each.

    Args:
        weight: matrix of a linear layer.
        hessian: 2 X X^T / tokens of its inputs, weighted by token or not.
        planes: bits of a weight.
        damping: share of the mean diagonal added to the Hessian's.
        block: columns that have planes of their own.
        name: of the layer, for errors.

    Returns:
        What the layer computes with, and the planes of each block.

    Raises:
        InputError: weights that are not finite, or a Hessian that is not positive definite.

    Source: Quant-dLLM (arXiv 2510.03274), without its mixture of one, two and three planes by salience.
    """
    check_finite(weight, name=name, what="the weights")
    work, hessian = weight.clone().to(hessian.dtype), hessian.clone()
    dead = hessian.diagonal() == 0  # as in SparseGPT
    hessian[dead, dead] = 1.0
    work[:, dead] = 0.0
    factor, found = inverse_cholesky(hessian, damping=damping, name=name), []
    for start in range(0, work.shape[1], block):
        stop = min(start + block, work.shape[1])
        found.append(fit(work[:, start:stop], planes=planes))
        errors = work[:, start:stop] - found[-1].dequantize()
        own = torch.linalg.solve_triangular(factor[start:stop, start:stop], errors, upper=True, left=False)
        work[:, stop:] -= own @ factor[start:stop, stop:]
        work[:, start:stop] -= errors
    return work.to(weight.dtype), found


def stored_bytes(shape: tuple[int, int], *, planes: int = 2, block: int = BLOCK) -> int:
    """Count the bytes of a matrix in planes: a bit a weight and plane, and scales of 16 bits.

    >>> stored_bytes((256, 256)) * 8 / 256**2
    2.375
    """
    rows, width = shape
    blocks = -(-width // block)
    return -(-planes * rows * width // 8) + 2 * planes * (rows * blocks + width)

"""Closed forms behind the fitted correction: reduced-rank ridge regression, leverage, k centres. Tensors in, tensors out."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _gram(z: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """Return the weighted Gram matrix with `ridge` times its mean eigenvalue added to the diagonal."""
    gram = (z * weights[:, None]).T @ z
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=z.dtype, device=z.device)


def low_rank_ridge(
    z: Float[Tensor, "example input"],
    targets: Float[Tensor, "example feature"],
    *,
    weights: Float[Tensor, "example"],
    ridge: float,
    rank: int,
) -> tuple[Float[Tensor, "input rank"], Float[Tensor, "rank feature"]]:
    """Return factors of the matrix B of a rank that minimises the weighted squares of targets - z B plus the ridge penalty.

    >>> wanted = torch.diag(torch.tensor([3.0, 1.0]))
    >>> inputs, outputs = low_rank_ridge(torch.eye(2), wanted, weights=torch.ones(2), ridge=1.0, rank=1)
    >>> (inputs @ outputs).abs().round(decimals=5).tolist()  # half of the larger direction: the penalty is the Gram matrix's size
    [[1.5, 0.0], [0.0, 0.0]]
    """
    moments = (z * weights[:, None]).T @ targets
    full = torch.cholesky_solve(moments, torch.linalg.cholesky(_gram(z, weights, ridge)))
    # The fitted values, the rows of the penalty among them, have the scatter full' moments: its main directions are kept.
    scatter = full.T @ moments
    directions = torch.linalg.eigh((scatter + scatter.T) / 2).eigenvectors[:, -rank:]
    return full @ directions, directions.T


def by_leverage(
    z: Float[Tensor, "example input"], *, size: int, ridge: float, generator: torch.Generator
) -> tuple[Int[Tensor, "chosen"], Float[Tensor, "chosen"]]:
    """Draw examples with probabilities in proportion to their ridge leverage, and weights that leave sums unbiased.

    Returns:
        (indices, with repetitions; weights). All indices with weights 1 where there are no more than `size`.
    """
    if len(z) <= size:
        return torch.arange(len(z), device=z.device), torch.ones(len(z), dtype=z.dtype, device=z.device)
    solved = torch.cholesky_solve(z.T, torch.linalg.cholesky(_gram(z, torch.ones_like(z[:, 0]), ridge))).T
    chance = (z * solved).sum(1)
    chance = chance / chance.sum()
    picked = torch.multinomial(chance.cpu(), size, replacement=True, generator=generator).to(z.device)
    return picked, 1 / (size * chance[picked])


def centres(z: Float[Tensor, "example input"], *, size: int, generator: torch.Generator) -> Int[Tensor, "chosen"]:
    """Choose examples greedily, each the farthest one from those chosen before; the first one is random.

    >>> points = torch.tensor([[0.0], [0.1], [5.0], [5.1], [9.0]])
    >>> sorted(centres(points, size=3, generator=torch.Generator().manual_seed(1)).tolist())[-1]
    4
    """
    chosen = [int(torch.randint(len(z), (), generator=generator))]
    distance = torch.full((len(z),), float("inf"), dtype=z.dtype, device=z.device)
    while len(chosen) < min(size, len(z)):
        distance = distance.minimum((z - z[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen, device=z.device)

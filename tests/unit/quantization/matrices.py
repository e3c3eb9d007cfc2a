"""Test matrices of weights, drawn alike everywhere."""

import torch
from torch import Tensor

CODED = (2, 3, 4, 8)
GROUPS = (32, 64, 128, None)
KINDS = ("gaussian", "heavy", "pruned")
MAPPINGS = {"absmax": "SYMMETRIC", "unclipped": "SYMMETRIC_NO_CLIPPING_ERR"}  # our scale rules and torchao's names of them


def matrix(kind: str, *, rows: int = 64, width: int = 256, seed: int = 0) -> Tensor:
    """Gaussian weights, ones with a heavy tail, or ones half of which are pruned."""
    stream = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=stream)
    if kind == "heavy":  # Student's t with 3 degrees of freedom
        weight = weight / (torch.randn(rows, width, 3, generator=stream).square().mean(-1)).sqrt()
    if kind == "pruned":
        weight[weight.abs() < weight.abs().median()] = 0.0
    return weight * 0.02


def relative_error(got: Tensor, weight: Tensor) -> float:
    """Norm of the difference by that of the weights."""
    return float((got - weight).norm() / weight.norm())

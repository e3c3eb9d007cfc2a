"""Pruning written from the equations: one weight, one row and one column at a time, in double precision.

What the layers read is captured from transformers' own forward pass, and attention from its eager path: nothing here shares
code with the walk through the blocks.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import exp, floor, sqrt
from typing import Any, cast

import torch
from torch import Tensor

from lib.models.language_model import LanguageModel


def smallest(values: Sequence[float], count: int) -> set[int]:
    """Indices of the `count` smallest values, the earlier one of equals first."""
    return set(sorted(range(len(values)), key=lambda index: (values[index], index))[:count])


def removed(size: int, sparsity: str) -> int:
    """floor(size x sparsity) of a sparsity written as text, in exact arithmetic."""
    return floor(size * Fraction(sparsity))


def keep_by_row(importance: Tensor, count: int) -> Tensor:
    """Mask that removes the `count` smallest of every row."""
    rows = [smallest(row, count) for row in importance.tolist()]
    return torch.tensor([[column not in gone for column in range(importance.shape[1])] for gone in rows])


def keep_by_group(importance: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps the n largest of every m neighbours in a row."""
    rows = []
    for values in importance.tolist():
        groups = [values[start : start + m] for start in range(0, len(values), m)]
        rows.append([index not in gone for group in groups for gone in [smallest(group, m - n)] for index in range(m)])
    return torch.tensor(rows)


def keep_by_layer(importance: Tensor, count: int) -> Tensor:
    """Mask that removes the `count` smallest of the whole matrix."""
    return keep_by_row(importance.reshape(1, -1), count).view(importance.shape)


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: str = "1/2",
    groups: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = 10**6,
    total: int | None = None,
    inclusive: bool = False,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of SparseGPT with the inverse taken anew at every column: (weights, mask).

    After each block as many weights are gone as the whole number asked for says of the columns so far, rounded down.
    """
    work, hessian = weight.double().clone(), hessian.double().clone()
    rows, width = work.shape
    for feature in range(width):
        if hessian[feature, feature] == 0:
            hessian[feature, feature] = 1.0
            work[:, feature] = 0.0
    hessian += damping * sum(float(hessian[i, i]) for i in range(width)) / width * torch.eye(width).double()
    # the inverse Hessian of the columns that are left when column j is reached
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    mask = torch.ones(rows, width, dtype=torch.bool)
    asked = removed(rows * width, sparsity) if total is None else total
    for column in range(width):
        if groups and column % groups[1] == 0:
            for row in range(rows):
                costs = [float(work[row, j] ** 2 / inverse[j][0, 0]) for j in range(column, column + groups[1])]
                for index in smallest(costs, groups[1] - groups[0]):
                    mask[row, column + index] = False
        if not groups and column % block == 0:
            last = min(column + block, width)
            cells = [(row, j) for row in range(rows) for j in range(column, last)]
            costs = [float(work[row, j] ** 2 / inverse[j][0, 0]) for row, j in cells]
            due = floor(Fraction(asked * last, width)) - int((~mask).sum())
            for index in smallest(costs, removed(len(cells), sparsity) + 1 if inclusive else due):
                mask[cells[index]] = False
        for row in range(rows):
            if not mask[row, column]:
                error = work[row, column] / inverse[column][0, 0]
                for j in range(column, width):
                    work[row, j] -= error * inverse[column][0, j - column]
                work[row, column] = 0.0
    return work, mask


def captured(model: LanguageModel, ids: Tensor) -> dict[str, Tensor]:
    """What every prunable layer reads in transformers' own pass over all samples, by parameter name, in double precision."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: found.__setitem__(name, inputs[0].double())

    handles = [layer.module.register_forward_hook(keep(layer.name)) for layer in model.layers]
    with torch.no_grad():
        cast(Any, model.network)(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def statistics(inputs: Tensor, weight: Tensor | None = None, *, products: bool = True) -> dict[str, Tensor]:
    """Sums of (ωx)², of each sample's norms, and (when asked for) of (ωx)(ωx)ᵀ, token by token."""
    features = inputs.shape[-1]
    found = {name: torch.zeros(features).double() for name in ("squares", "norms")}
    if products:
        found["products"] = torch.zeros(features, features).double()
    for sample in range(inputs.shape[0]):
        in_sample = torch.zeros(features).double()
        for position in range(inputs.shape[1]):
            omega = 1.0 if weight is None else float(weight[sample, position])
            token = omega * inputs[sample, position]
            in_sample += token**2
            if products:
                found["products"] += torch.outer(token, token)
        found["squares"] += in_sample
        found["norms"] += in_sample.sqrt()
    return found


def omegas(weight: Tensor, role: str, *, features: int, kv_heads: int) -> list[list[float]]:
    """How much one token counts, `weight[head]`, for every group of rows and every input feature of a layer."""
    values = [float(value) for value in weight]
    if role == "o":  # feature f comes out of head f // width
        return [[values[feature * len(values) // features] for feature in range(features)]]
    shared = len(values) // kv_heads
    own = [values[first : first + shared] for first in range(0, len(values), shared)] if role == "v" else [values]
    return [[sum(part) / len(part)] * features for part in own]


def statistics_by_head(inputs: Tensor, weight: Tensor, role: str, *, kv_heads: int) -> dict[str, Tensor]:
    """Sums of (ωx)² and of each sample's norms by group and feature, with ω by `[sample, head, position]`."""
    features, groups = inputs.shape[-1], kv_heads if role == "v" else 1
    found = {name: torch.zeros(groups, features).double() for name in ("squares", "norms")}
    for sample in range(len(inputs)):
        in_sample = torch.zeros(groups, features).double()
        for position in range(inputs.shape[1]):
            counts = omegas(weight[sample, :, position], role, features=features, kv_heads=kv_heads)
            in_sample += (torch.tensor(counts, dtype=torch.float64) * inputs[sample, position]) ** 2
        found["squares"] += in_sample
        found["norms"] += in_sample.sqrt()
    return found


def masses(model: LanguageModel, ids: Tensor) -> Tensor:
    """Attention that each key receives, summed over the queries of eager maps: `[layer, sample, head, position]`."""
    model.network.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = cast(Any, model.network)(input_ids=ids, output_attentions=True, use_cache=False).attentions
    finally:
        model.network.set_attn_implementation("sdpa")
    return torch.stack([layer.double().sum(2) for layer in maps])


def scores(values: Sequence[float], *, num_std: float, alpha: float | None) -> list[float]:
    """Sigmoid(α (m - mean - k std)), or a step where α is None."""
    mean = sum(values) / len(values)
    std = sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    above = [value - mean - num_std * std for value in values]
    return [float(by > 0) if alpha is None else 1 / (1 + exp(-min(max(alpha * by, -700.0), 700.0))) for by in above]


def sink_weights(model: LanguageModel, ids: Tensor, *, num_std: float, alpha: float) -> Tensor:
    """ω = 1 - score, of the mass summed over layers and heads."""
    mass = masses(model, ids).sum((0, 2))
    rows = [[1 - score for score in scores(row, num_std=num_std, alpha=alpha)] for row in mass.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def same_state(model: LanguageModel, state: Mapping[str, Tensor]) -> bool:
    """Whether every parameter is bit for bit what it was, NaN included."""
    return all(
        torch.equal(value.nan_to_num(7.0), state[name].nan_to_num(7.0)) for name, value in model.network.state_dict().items()
    )


def state_of(model: LanguageModel) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: value.clone() for name, value in model.network.state_dict().items()}

"""How much sparsity each layer gets when the total is fixed. Numbers in, numbers out."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning.importances import check_sparsity

EIS_EPSILON = 0.08  # Layer Collapse in DLMs (arXiv 2605.06366) tries 0.02, 0.08 and 0.2
OWL_LAMBDA = 0.08
OWL_OUTLIER = 5.0


def with_total(wanted: Float[Tensor, "layer"], sizes: Sequence[int], *, sparsity: float) -> Float[Tensor, "layer"]:
    """Shift sparsities by one constant so that exactly the asked share of all weights goes.

    Args:
        wanted: sparsity of each layer, up to a constant.
        sizes: weights of each layer.
        sparsity: share of all weights to remove, in [0, 1).

    Returns:
        Sparsities in [0, 1) whose mean, weighted by size, is `sparsity`.

    Raises:
        InputError: the total is out of range, or a layer would have to leave [0, 1).

    >>> with_total(torch.tensor([0.25, -0.25]), [1, 3], sparsity=0.5).tolist()
    [0.875, 0.375]
    """
    check_sparsity(sparsity)
    weight = torch.tensor(list(sizes), dtype=torch.float64)
    values = wanted.double()
    shifted = values + sparsity - (values * weight).sum() / weight.sum()
    if not bool(((shifted >= 0) & (shifted < 1)).all()):
        low, high = float(shifted.min()), float(shifted.max())
        raise InputError(f"layer sparsities must lie in [0, 1), got {low:.3g} to {high:.3g}: spread them less")
    return shifted


def early_is_sparser(layers: int, *, epsilon: float = EIS_EPSILON) -> Float[Tensor, "layer"]:
    """Return offsets that fall evenly from +epsilon at the first layer to -epsilon at the last; a negative epsilon reverses it.

    Source: EIS and DIS of Layer Collapse in DLMs (arXiv 2605.06366).

    >>> early_is_sparser(3, epsilon=0.5).tolist()
    [0.5, 0.0, -0.5]
    """
    return torch.linspace(epsilon, -epsilon, layers, dtype=torch.float64)


def from_scores(scores: Float[Tensor, "layer"], *, spread: float = OWL_LAMBDA) -> Float[Tensor, "layer"]:
    """Return offsets in [-spread, spread]: the layer with the highest score is pruned least.

    Args:
        scores: what should protect a layer: its share of outliers (OWL), or the stability of its sinks.
        spread: largest distance from the mean sparsity.

    Source: OWL (arXiv 2310.05175), its rescaling of layer scores.

    >>> from_scores(torch.tensor([0.0, 1.0, 0.5]), spread=0.2).tolist()
    [0.2, -0.2, 0.0]
    """
    values = scores.double()
    width = values.max() - values.min()
    if not bool(width > 0):
        return torch.zeros_like(values)
    return spread * (1.0 - 2.0 * (values - values.min()) / width)


def outlier_share(importance: Float[Tensor, "out in"], *, factor: float = OWL_OUTLIER) -> float:
    """Return the share of weights whose importance exceeds `factor` times the mean, the score of OWL.

    >>> outlier_share(torch.tensor([[1.0, 1.0, 1.0, 37.0]]), factor=3.0)
    0.25
    """
    return float((importance > factor * importance.mean()).double().mean())


def removed_counts(sparsities: Float[Tensor, "layer"], sizes: Sequence[int], *, total: int) -> list[int]:
    """Round sparsities to whole numbers of weights that add up to exactly `total`.

    Args:
        sparsities: of each layer, whose mean weighted by size is total / all weights but for rounding.
        sizes: weights of each layer.
        total: weights to remove in all.

    Returns:
        Removed weights by layer: rounded down, the rest given to the largest remainders.

    Raises:
        InputError: the sparsities are not those of the total.

    >>> removed_counts(torch.tensor([0.25, 0.75]), [10, 10], total=10)
    [3, 7]
    """
    exact = sparsities.double() * torch.tensor(list(sizes), dtype=torch.float64)
    floors = (exact + 1e-6).floor().long()
    missing = total - int(floors.sum())
    if not 0 <= missing <= len(sizes):
        raise InputError(f"layer sparsities must remove {total} weights in all, got {float(exact.sum()):g}: use with_total first")
    largest = (exact - floors).argsort(descending=True, stable=True)[:missing]
    floors[largest] += 1
    return floors.tolist()

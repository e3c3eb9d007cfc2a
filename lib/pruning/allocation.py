"""How much sparsity each layer gets when the total is fixed. Numbers in, numbers out."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lib.core.errors import InputError, require
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


def log_variance(importance: Float[Tensor, "out in"]) -> float:
    """Return asin(2 / pi atan(v)) of the variance v of the logarithms of the importances, a score like DSA's; zeros are left out.

    Source: asin(atan(v)), the best function that DSA (NeurIPS 2024) found, after the paper's description. Above v = tan 1 that is
        not defined, and all blocks of our models lie there: so the arctangent is brought into [0, 1) first. Whether a high score
        protects a layer could not be read, so `from_scores` is to be asked for both.

    >>> round(log_variance(torch.tensor([[1.0, -2.718281828, 0.0]])), 3)  # logarithms 0 and 1
    0.157
    """
    logs = importance.double().abs().flatten().log()
    spread = logs[logs.isfinite()].var(correction=0)
    return float((spread.atan() * (2.0 / math.pi)).asin())


def best_ramp(
    measure: Callable[[Float[Tensor, "layer"]], float], layers: int, *, steepest: float, tried: int = 9
) -> tuple[Float[Tensor, "layer"], dict[float, float]]:
    """Return the offsets of the even ramp with the lowest measured loss, and the loss of every slope.

    Args:
        measure: loss under offsets of the sparsity of each layer.
        layers: how many.
        steepest: offset of the first layer at the two ends of what is tried; negative ramps prune early layers less.
        tried: slopes, evenly spaced.

    Source: ATP's arithmetic progression with one slope, after the paper's description.

    >>> best_ramp(lambda offsets: float(offsets[0]), 2, steepest=0.1, tried=3)[0].tolist()
    [-0.1, 0.1]
    """
    slopes = torch.linspace(-steepest, steepest, tried, dtype=torch.float64).tolist()
    losses = {slope: measure(early_is_sparser(layers, epsilon=slope)) for slope in slopes}
    return early_is_sparser(layers, epsilon=min(losses, key=lambda slope: (losses[slope], abs(slope)))), losses


@dataclass(frozen=True)
class Evolved:
    """What an evolutionary search found.

    Attributes:
        levels: of each layer, which add up to 0.
        losses: of the best so far after each generation, in the last stage's measure; they never rise.
        evaluations: losses that were measured.
    """

    levels: tuple[int, ...]
    losses: tuple[float, ...]
    evaluations: int


def evolve(
    measure: Callable[[tuple[int, ...], int], float],
    layers: int,
    *,
    most: int,
    generator: torch.Generator,
    generations: int = 60,
    offspring: int = 16,
    survivors: Sequence[int] = (4, 1),
    budget: int | None = None,
    kinds: Sequence[object] | None = None,
) -> Evolved:
    """Search levels of sparsity by measured loss alone, which need not be a sum over layers.

    A child of the best so far has one to three pairs of layers moved, one a level up and the other a level down, so that the
    total holds. Children are measured in stages, each on more text than the one before, and the best of a stage go on to the
    next; in the last the parent competes.

    Args:
        measure: loss of levels at a stage, from 0; the same levels are measured once a stage.
        layers: how many; all begin at level 0.
        most: largest level, and minus the smallest.
        generator: CPU generator.
        generations: of the search.
        offspring: children of a generation.
        survivors: of each stage; one of the last.
        budget: losses to measure at most; a generation that could exceed it is not begun.
        kinds: of the layers, such as their sizes: only layers of one kind trade levels.

    Raises:
        InputError: no survivors of a stage, or nothing that could trade.

    Source: EvoPress (arXiv 2410.14649): its mutation and its selection in stages, with smaller numbers.
    """
    kinds = [0] * layers if kinds is None else kinds
    _check_search(survivors, most=most, kinds=kinds)
    known: dict[tuple[tuple[int, ...], int], float] = {}

    def loss(levels: tuple[int, ...], stage: int) -> float:
        if (levels, stage) not in known:
            known[levels, stage] = measure(levels, stage)
        return known[levels, stage]

    last, best = len(survivors) - 1, (0,) * layers
    losses = [loss(best, last)]
    for _ in range(generations):
        if budget is not None and len(known) + offspring + sum(survivors[:-1]) > budget:
            break
        children = list(dict.fromkeys(_mutated(best, most=most, kinds=kinds, generator=generator) for _ in range(offspring)))
        for stage, count in enumerate(survivors):
            rivals = [best, *children] if stage == last else children
            children = sorted(rivals, key=lambda levels: loss(levels, stage))[:count]
        best = children[0]
        losses.append(loss(best, last))
    return Evolved(best, tuple(losses), len(known))


def _check_search(survivors: Sequence[int], *, most: int, kinds: Sequence[object]) -> None:
    is_narrowing = bool(survivors) and min(survivors) >= 1 and survivors[-1] == 1
    require(is_narrowing, "the last of the survivors must be 1", str(tuple(survivors)), "give as many as there are stages")
    moves = most >= 1 and len(set(kinds)) < len(kinds)
    require(moves, "levels must be able to move", f"most {most}, kinds {list(kinds)}", "give two layers of one kind")


def _mutated(levels: tuple[int, ...], *, most: int, kinds: Sequence[object], generator: torch.Generator) -> tuple[int, ...]:
    """Move one to three pairs, fewer more often."""
    child = list(levels)
    for _ in range(int(torch.randint(1, 4, (2,), generator=generator).min())):
        pairs = [
            (up, down)
            for up, down in itertools.permutations(range(len(child)), 2)
            if kinds[up] == kinds[down] and child[up] < most and child[down] > -most
        ]
        up, down = pairs[int(torch.randint(len(pairs), (1,), generator=generator))]
        child[up], child[down] = child[up] + 1, child[down] - 1
    return tuple(child)


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

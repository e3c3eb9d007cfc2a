"""Paired statistics: compressed models compared on the same windows or documents, which are the units.

Calibration seeds are crossed with units: every seed's model is measured on every unit. An interval speaks of new units and new
seeds, as it comes from resampling both; a p-value, a standard deviation and what follows from it speak of new units at the given
seeds, as the seeds are averaged first. Where the seeds differ much the interval is therefore the more careful of the two.
"""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import binom, binomtest, norm
from torch import Tensor

from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.evaluation.sums import matched_interval

Interval = tuple[float, float]
Key = TypeVar("Key", bound=Hashable)
ALPHA = 0.05
POWER = 0.8
FLIPS = 9_999  # more than bootstrap draws: an adjusted p-value is the smallest possible one times the number of tests
EFFECT_COLUMNS = ("effect", "order", "estimate", "low", "high", "p", "p_holm", "smallest effect")
BLOCK = 2**22  # random numbers held at once; 32 MiB in float64


@dataclass(frozen=True)
class PairedDifference:
    """The mean of first minus second over n units, in the unit of the values.

    Attributes:
        estimate: mean difference over units and seeds.
        interval: 95 % percentile bootstrap interval of the estimate, over units and seeds.
        p_value: two-sided, of the sign-flip permutation test: under its null the differences are symmetric around 0.
        effect_size: Cohen's d_z, the estimate over the standard deviation of the differences; where that is 0, 0 or infinite.
        smallest_effect: the true difference that n pairs with this deviation would find (p < 0.05) four times in five.
        n: number of units.
    """

    estimate: float
    interval: Interval
    p_value: float
    effect_size: float
    smallest_effect: float
    n: int


@dataclass(frozen=True)
class McNemar:
    """Right answers of two models to the same n documents, of which some only one model answers: the discordant ones.

    Attributes:
        only_first, only_second: discordant documents by the model that is right.
        difference: accuracy of the first minus that of the second, in [-1, 1].
        interval: 95 % paired percentile bootstrap interval, too short where few are discordant; `matched_interval` where none is.
        p_value: two-sided, exact.
        smallest_effect: the smallest difference with p < 0.05 at this number of discordant documents; infinite below six.
        n: number of documents.
    """

    only_first: int
    only_second: int
    difference: float
    interval: Interval
    p_value: float
    smallest_effect: float
    n: int


def paired_difference(
    first: Float[Tensor, "*_seed _unit"], second: Float[Tensor, "*_seed _unit"], *, seed: int, draws: int = 2000
) -> PairedDifference:
    """Compare two models on the same units.

    Args:
        first: a value per unit, or per calibration seed and unit; a single seed says nothing of other seeds.
        second: the same for the other model, with the same seeds in the same order; one seed (a model that needs no
            calibration) is compared with every seed of the other side.
        seed: of the bootstrap and of the sign flips; equal seeds resample the same units in every comparison of as many units.
        draws: bootstrap draws.

    Returns:
        The difference, first minus second. The p-value is exact up to 13 units and from 9999 random flips, the observed signs
        counted in, above.

    Raises:
        InputError: shapes that do not pair, fewer than two units, a value that is not finite, or no draws.

    Source: Owen, The pigeonhole bootstrap (2007), for units and seeds that are crossed; it overstates the part of the variance
        that neither explains. Few seeds make the interval too short: where they cause three quarters of the variance of the
        mean, it covers about 85 times in 100 with 3 seeds, and 75 with 2 that cause five sixths.

    >>> result = paired_difference(torch.tensor([3.0, 5.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]), seed=0)
    >>> result.estimate, result.p_value, result.effect_size  # 2 of the 8 sign patterns are as extreme
    (2.0, 0.25, 2.0)
    """
    pair = _matrix(first, "first"), _matrix(second, "second")
    sizes = {len(values) for values in pair} - {1}
    if pair[0].shape[1] != pair[1].shape[1] or len(sizes) > 1:
        rule = "first and second must have the same units and the same seeds (or one side a single seed)"
        shapes = " and ".join(str(list(values.shape)) for values in pair)
        raise InputError(f"{rule}, got [seed, unit] shapes {shapes}: measure both on the same units with the same seeds")
    return _summaries((pair[0] - pair[1])[None], seed=seed, draws=draws)[0]


def mcnemar(
    first: Bool[Tensor, "*_document"] | Sequence[bool],
    second: Bool[Tensor, "*_document"] | Sequence[bool],
    *,
    seed: int,
    draws: int = 2000,
) -> McNemar:
    """Compare the accuracy of two models on the same documents with the exact two-sided McNemar test.

    Args:
        first: whether the first model answers each document correctly.
        second: the same for the second model, documents in the same order.
        seed: of the bootstrap.
        draws: bootstrap draws.

    Returns:
        Counts, difference, interval and p-value; without discordant documents p is 1.

    Raises:
        InputError: not one boolean a document on both sides, fewer than two documents, or no draws.

    >>> mcnemar([True] * 9 + [False], [False] * 9 + [True], seed=0).p_value
    0.021484375
    """
    pair = torch.as_tensor(first), torch.as_tensor(second)
    if pair[0].shape != pair[1].shape or any(marks.dtype != torch.bool or marks.dim() != 1 for marks in pair):
        got = " and ".join(f"{marks.dtype} {list(marks.shape)}" for marks in pair)
        raise InputError(f"first and second must be one boolean a document, got {got}: score both models on the same documents")
    rights = [_matrix(marks.double(), name) for marks, name in zip(pair, ("first", "second"), strict=True)]
    difference = (rights[0] - rights[1])[None]
    only_first, only_second = int((difference > 0).sum()), int((difference < 0).sum())
    discordant, n = only_first + only_second, difference.shape[-1]
    return McNemar(
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / n,
        interval=_intervals(difference, seed=seed, draws=draws)[0] if discordant else matched_interval(0, 0, documents=n),
        p_value=float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        smallest_effect=_smallest_split(discordant) / n,
        n=n,
    )


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Adjust p-values for how many there are, by Holm's step-down method.

    Args:
        p_values: raw p-values of one family of tests.

    Returns:
        Adjusted p-values under the same keys in the same order: with ranks i from 0, the running maximum of (m - i) p_i, at
        most 1. Rejecting those below alpha keeps the chance of any false rejection below alpha.

    Raises:
        InputError: a value that is not in [0, 1].

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    wrong = {key: p for key, p in p_values.items() if not 0 <= p <= 1}
    if wrong:
        raise InputError(f"p-values must be in [0, 1], got {wrong}: leave out what was not tested")
    order = sorted(p_values, key=lambda key: p_values[key])
    scaled = [min(1.0, (len(order) - rank) * p_values[key]) for rank, key in enumerate(order)]
    adjusted = dict(zip(order, itertools.accumulate(scaled, max), strict=True))
    return {key: float(adjusted[key]) for key in p_values}


def factorial_effects(
    values: Mapping[tuple[int, ...], Float[Tensor, "*_seed _unit"]], factors: Sequence[str], *, seed: int, draws: int = 2000
) -> pd.DataFrame:
    """Split the differences between the cells of a 2^k factorial into main effects and interactions of every order.

    With levels coded x = -1 (low) and +1 (high), the effect of a set of factors is the sum over cells of the product of their x
    times the cell, divided by 2^(k-1): twice the coefficient of a least-squares fit. A main effect is then the mean at its high
    level minus the mean at its low one, and A plus A x B is the effect of A where B is high, A minus A x B that where B is low.

    Args:
        values: for each combination of levels, 0 or 1 per factor, a value per calibration seed and unit; the same seeds and
            units in every cell. One seed needs no axis of its own.
        factors: their names, in the order of the levels.
        seed: of the bootstrap and of the sign flips.
        draws: bootstrap draws; a draw takes the same units and seeds in all cells.

    Returns:
        One row an effect, by order: `effect` ("a x b" for an interaction), `order`, `estimate` in the unit of the values, its
        95 % interval `low`, `high`, `p` of the sign-flip test, `p_holm` adjusted over all rows, and `smallest effect`.

    Raises:
        InputError: names that are not distinct, cells that are missing, foreign or of other shapes, fewer than two units, a value
            that is not finite, or no draws.

    >>> cells = {(a, b): torch.tensor([1.0, 2.0, 4.0]) + 3 * a + 4 * a * b for a in (0, 1) for b in (0, 1)}
    >>> factorial_effects(cells, ["a", "b"], seed=0)[["effect", "estimate"]].values.tolist()
    [['a', 5.0], ['b', 2.0], ['a x b', 2.0]]
    """
    cells = _cells(values, factors)
    levels = list(itertools.product((0, 1), repeat=len(factors)))
    signs = 2.0 * torch.tensor(levels, dtype=torch.float64) - 1.0
    orders = range(1, len(factors) + 1)
    subsets = [subset for order in orders for subset in itertools.combinations(range(len(factors)), order)]
    coding = torch.stack([signs[:, list(subset)].prod(1) for subset in subsets]) / 2 ** (len(factors) - 1)
    results = _summaries(torch.einsum("ec,csu->esu", coding, cells), seed=seed, draws=draws)
    names = [" x ".join(factors[index] for index in subset) for subset in subsets]
    adjusted = holm({subset: result.p_value for subset, result in zip(subsets, results, strict=True)})
    rows = [
        (name, len(subset), result.estimate, *result.interval, result.p_value, adjusted[subset], result.smallest_effect)
        for name, subset, result in zip(names, subsets, results, strict=True)
    ]
    return pd.DataFrame(rows, columns=pd.Index(EFFECT_COLUMNS))


def _matrix(values: Tensor, name: str) -> Float[Tensor, "seed unit"]:
    """Check values and give them both axes, in float64 on the CPU."""
    shape = list(values.shape)
    if len(shape) not in (1, 2) or shape[-1] < 2 or 0 in shape:
        rule = f"{name} must be [unit] or [seed, unit] with two units or more"
        raise InputError(f"{rule}, got shape {shape}: give one value per seed and unit")
    data = values.detach().cpu().double()
    if not data.isfinite().all():
        bad = int((~data.isfinite()).sum())
        raise InputError(f"{name} must be finite, got {bad} values that are not: leave such units out of every model")
    return data if data.dim() == 2 else data[None]


def _cells(values: Mapping[tuple[int, ...], Tensor], factors: Sequence[str]) -> Float[Tensor, "cell seed unit"]:
    """Check the cells of a factorial and stack them, the last factor changing fastest."""
    if not factors or len(set(factors)) < len(factors):
        raise InputError(f"factors must have distinct names, one or more, got {list(factors)}: name each once")
    wanted = list(itertools.product((0, 1), repeat=len(factors)))
    if set(values) != set(wanted):
        missing, foreign = sorted(set(wanted) - set(values)), sorted(set(values) - set(wanted), key=str)
        rule = f"a factorial of {len(factors)} factors must have all {len(wanted)} cells of levels 0 and 1"
        raise InputError(f"{rule}, got {missing} missing and {foreign} besides: run what is missing")
    data = {levels: _matrix(values[levels], f"cell {levels}") for levels in wanted}
    shapes = {tuple(cell.shape) for cell in data.values()}
    if len(shapes) > 1:
        raise InputError(f"all cells must have the same [seed, unit] shape, got {sorted(shapes)}: use the same seeds and units")
    return torch.stack(list(data.values()))


def _summaries(differences: Float[Tensor, "row seed unit"], *, seed: int, draws: int) -> list[PairedDifference]:
    """Describe each row of differences, with the same draws for all rows."""
    by_unit, n = differences.mean(1), differences.shape[-1]
    p_values = _sign_flip(by_unit, seed=seed)
    intervals = _intervals(differences, seed=seed, draws=draws)
    reach = float(norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER)) / math.sqrt(n)
    found = []
    for row, interval, p_value in zip(by_unit, intervals, p_values, strict=True):
        mean = float(row.mean())
        # Equal differences may deviate from their own mean in the last bit, which would make an absurd effect size.
        deviation = float(row.std()) if bool((row != row[0]).any()) else 0.0
        effect_size = mean / deviation if deviation else math.copysign(math.inf, mean) if mean else 0.0
        found.append(PairedDifference(mean, interval, p_value, effect_size, reach * deviation, n))
    return found


def resampled_means(values: Float[Tensor, "row seed unit"], *, seed: int, draws: int = 2000) -> Float[Tensor, "row draw"]:
    """Return each row's mean in every bootstrap draw of seeds and, independently, units; all rows are resampled alike."""
    if draws < 1:
        raise InputError(f"draws must be positive, got {draws}: use 2000")
    rows, seeds, units = values.shape
    # Two streams: more seeds leave the resampled units as they were.
    streams = generator(seed, "paired", "units"), generator(seed, "paired", "seeds")
    block = max(1, BLOCK // (rows * units))
    means = []
    for start in range(0, draws, block):
        size = min(block, draws - start)
        unit_counts = _counts(size, units, stream=streams[0])
        seed_counts = _counts(size, seeds, stream=streams[1])
        means.append(((seed_counts @ values) * unit_counts).sum(-1) / (seeds * units))
    return torch.cat(means, 1)


def _intervals(differences: Float[Tensor, "row seed unit"], *, seed: int, draws: int) -> list[Interval]:
    """Return a 95 % percentile bootstrap interval a row."""
    means = resampled_means(differences, seed=seed, draws=draws)
    ends = np.quantile(means.numpy(), [ALPHA / 2, 1 - ALPHA / 2], axis=1).T.tolist()
    # Equal values may differ from their own mean in the last bit, and an interval has to hold its estimate.
    estimates = differences.mean(1).mean(1).tolist()
    return [(min(low, mean), max(high, mean)) for (low, high), mean in zip(ends, estimates, strict=True)]


def _counts(draws: int, size: int, *, stream: torch.Generator) -> Float[Tensor, "draw unit"]:
    """Draw `size` of `size` things with replacement, and count how often each one was taken."""
    picks = torch.randint(size, (draws, size), generator=stream) + size * torch.arange(draws)[:, None]
    return torch.bincount(picks.flatten(), minlength=draws * size).view(draws, size).double()


def _sign_flip(differences: Float[Tensor, "row unit"], *, seed: int) -> list[float]:
    """Return the two-sided sign-flip p-value of each row's mean: all sign patterns if they are few, else random ones."""
    n = differences.shape[1]
    observed = differences.sum(1).abs()
    # A pattern that only swaps equal differences is a tie, whatever the rounding of its sum.
    border = observed - 1e-12 * differences.abs().sum(1)
    if n < 64 and 2**n <= FLIPS + 1:
        bits = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1
        return _as_extreme(differences, bits, border).div(2**n).tolist()
    stream, block = generator(seed, "paired", "sign flips"), max(1, BLOCK // n)
    extreme = torch.ones(len(differences), dtype=torch.float64)  # the observed signs are one of the patterns
    for start in range(0, FLIPS, block):
        bits = torch.randint(2, (min(block, FLIPS - start), n), generator=stream)
        extreme += _as_extreme(differences, bits, border)
    return extreme.div(FLIPS + 1).tolist()


def _as_extreme(differences: Tensor, bits: Tensor, border: Float[Tensor, "row"]) -> Float[Tensor, "row"]:
    sums = differences @ (2.0 * bits.double() - 1.0).T
    return (sums.abs() >= border[:, None]).sum(1).double()


def _smallest_split(discordant: int) -> float:
    """Return the smallest lead of one side over the other that the exact McNemar test finds."""
    larger = np.arange(discordant // 2 + 1, discordant + 1)
    found = larger[2 * binom.sf(larger - 1, discordant, 0.5) < ALPHA]
    return float(2 * found[0] - discordant) if len(found) else math.inf

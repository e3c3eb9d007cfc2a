"""Gains of one compressed model over another on the same windows or documents, adjusted for how many are tested."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.evaluation import paired, sums
from lib.evaluation.paired import PairedDifference
from lib.evaluation.recovered import Recovered
from lib.report import claims
from lib.report.results import NO_EFFECT
from lib.studies.pruning.runs import Outcome
from lib.studies.pruning.tables import Results, losses

ALPHA = 0.05
COMPARISON_COLUMNS = (
    "comparison", "model", "sparsity", "gain", "low", "high", "p", "p (Holm)", "effect size", "smallest effect", "windows",
    "seeds",
)  # fmt: skip
GAIN_COLUMNS = ("gain", "low", "high", "p", "smallest effect", "seeds", "p (Holm)")
MCNEMAR_COLUMNS = (
    "model", "task", "comparison", "difference, points", "low", "high", "only first", "only second", "p", "p (Holm)",
    "smallest effect, points", "documents",
)  # fmt: skip
ACCURACY_COLUMNS = (
    "model", "task", "comparison", "difference, points", "low", "high", "p", "p (Holm)", "smallest effect, points",
    "lowest", "highest", "calibrations", "documents",
)  # fmt: skip
Condition = tuple[str, float]


@dataclass(frozen=True)
class Comparison:
    """A gain: by how much the first condition's loss lies below the second's, in nats per token.

    Attributes:
        name: of the comparison, for tables.
        model: on which model.
        sparsity: of both.
        result: of the paired test, positive when the first is better.
        seeds: calibration seeds.
    """

    name: str
    model: str
    sparsity: float
    result: PairedDifference
    seeds: int


def gain(
    first: Float[Tensor, "seed window"],
    second: Float[Tensor, "_seed window"],
    *,
    name: str,
    model: str,
    sparsity: float,
    seed: int,
) -> Comparison:
    """Compare two conditions on the same windows: positive when the first has the lower loss."""
    result = paired.paired_difference(second, first, seed=seed)
    return Comparison(name, model, sparsity, result, max(len(first), len(second)))


def comparison_table(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """Tabulate gains with intervals, p-values adjusted over all rows, and the smallest effect the run could have seen."""
    listed = list(comparisons)
    adjusted = paired.holm({index: found.result.p_value for index, found in enumerate(listed)})
    return pd.DataFrame([
        {
            "comparison": found.name, "model": found.model, "sparsity": found.sparsity, "gain": found.result.estimate,
            "low": found.result.interval[0], "high": found.result.interval[1], "p": found.result.p_value,
            "p (Holm)": adjusted[index], "effect size": found.result.effect_size,
            "smallest effect": found.result.smallest_effect, "windows": found.result.n, "seeds": found.seeds,
        }
        for index, found in enumerate(listed)
    ], columns=None if listed else pd.Index(COMPARISON_COLUMNS))  # fmt: skip


def mcnemar_table(results: Results, pairs: Sequence[tuple[Condition, Condition]], *, seed: int) -> pd.DataFrame:
    """Compare accuracies on the same documents by exact McNemar tests, Holm-adjusted over all rows.

    Args:
        results: by (model, method, sparsity, task).
        pairs: ((method, sparsity), (baseline, sparsity)).
        seed: of the bootstrap.

    Returns:
        One row a (pair, model, task) that was measured on both sides; positive when the first is more accurate.
    """
    found = []
    for first, second in pairs:
        for (model, method, sparsity, task), result in results.items():
            other = results.get((model, *second, task))
            if (method, sparsity) == first and other is not None:
                name = f"{condition_name(first)} - {condition_name(second)}"
                found.append((model, task, name, paired.mcnemar(result.correct, other.correct, seed=seed)))
    adjusted = paired.holm({index: row[-1].p_value for index, row in enumerate(found)})
    rows = [
        (model, task, name, 100 * test.difference, 100 * test.interval[0], 100 * test.interval[1], test.only_first,
         test.only_second, test.p_value, adjusted[index], 100 * test.smallest_effect, test.n)
        for index, (model, task, name, test) in enumerate(found)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=pd.Index(MCNEMAR_COLUMNS))


def accuracy_table(by_calibration: Sequence[Results], pairs: Sequence[tuple[Condition, Condition]], *, seed: int) -> pd.DataFrame:
    """Compare accuracies on the same documents and with the same calibrations, Holm-adjusted over all rows.

    Args:
        by_calibration: results of each calibration, by (model, method, sparsity, task); a method that needs none may stand in
            the first alone.
        pairs: ((method, sparsity), (baseline, sparsity)).
        seed: of the bootstrap and of the sign flips.

    Returns:
        One row a (pair, model, task) that was measured on both sides: the mean difference (positive when the first is more
        accurate), its interval over documents and calibrations, the sign-flip p-value over documents, the smallest difference
        that could have been seen (infinite when no document tells the two apart), and the lowest and the highest difference of
        a single calibration.

    Raises:
        InputError: the two sides have other documents, or some of the calibrations only.
    """
    found, results = [], by_calibration[0] if by_calibration else {}
    for first, second in pairs:
        for model, method, sparsity, task in results:
            if (method, sparsity) == first and (model, *second, task) in results:
                sides = [correct_answers(by_calibration, (model, *condition, task)) for condition in (first, second)]
                name = f"{condition_name(first)} - {condition_name(second)}"
                result = paired.paired_difference(*sides, seed=seed)
                if first != second and not (sides[0] - sides[1]).any():  # a bootstrap of equal answers has no width
                    result = replace(result, interval=sums.matched_interval(0, 0, documents=result.n))
                found.append((model, task, name, result, (sides[0] - sides[1]).mean(1)))
    adjusted = paired.holm({index: row[3].p_value for index, row in enumerate(found)})
    rows = [
        (model, task, name, 100 * result.estimate, 100 * result.interval[0], 100 * result.interval[1], result.p_value,
         adjusted[index], 100 * result.smallest_effect or math.inf, 100 * float(single.min()), 100 * float(single.max()),
         len(single), result.n)
        for index, (model, task, name, result, single) in enumerate(found)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=pd.Index(ACCURACY_COLUMNS))


def condition_name(condition: Condition) -> str:
    """Name a method at a sparsity.

    >>> condition_name(("Wanda", 0.5))
    'Wanda 50 %'
    """
    return f"{condition[0]} {100 * condition[1]:g} %"


def verdict(result: PairedDifference, *, adjusted: float) -> str:
    """Judge the claim that a gain is positive: by its interval and by the Holm-adjusted p-value, both on one side.

    >>> result = PairedDifference(0.5, (0.25, 0.75), 0.01, 1.0, 0.1, 9)
    >>> verdict(result, adjusted=0.01), verdict(result, adjusted=0.06)
    ('reproduced', 'inconclusive')
    """
    if adjusted >= ALPHA:
        return "inconclusive"
    return claims.verdict(result.interval, threshold=0.0, direction="above")


def verdict_by_share(found: Recovered, *, adjusted: float, adjusted_within: float) -> str:
    """Judge the claim that a change recovers more than a share of the damage, or say that it has no effect of the claimed size.

    Args:
        found: the share with its threshold and its bound, half of what was claimed.
        adjusted: Holm-adjusted p-value of the share being the threshold.
        adjusted_within: Holm-adjusted p-value of the two one-sided tests.

    Returns:
        `reproduced` or `not reproduced` when the whole interval lies on one side of the threshold and the test agrees; else `no
        effect of that size` when the whole interval lies within the bounds and both one-sided tests agree; else `inconclusive`.
        Where the bound is not above the threshold the second says more than `not reproduced`, and goes first. Without damage
        that is sure the claim is inconclusive.

    >>> share = Recovered(0.02, (-0.01, 0.04), 0.2, 0.001, 0.046, 64)
    >>> verdict_by_share(share, adjusted=0.4, adjusted_within=0.01), verdict_by_share(share, adjusted=0.4, adjusted_within=0.06)
    ('no effect of that size', 'inconclusive')
    """
    if found.interval is None:
        return "inconclusive"
    judged, (low, high) = claims.verdict(found.interval, threshold=found.threshold, direction="above"), found.interval
    none = -found.bound < low <= high < found.bound and adjusted_within < ALPHA
    if judged != "inconclusive" and adjusted < ALPHA and not (none and found.bound <= found.threshold):
        return judged
    return NO_EFFECT if none else "inconclusive"


def verdict_of(interval: tuple[float, float], *, adjusted: float) -> str:
    """Judge the claim that a difference is positive from its interval and its Holm-adjusted p-value."""
    return "inconclusive" if adjusted >= ALPHA else claims.verdict(interval, threshold=0.0, direction="above")


def gain_columns(found: Comparison) -> dict[str, object]:
    """Return the columns of a gain: estimate, interval, p-value, smallest effect, calibration seeds."""
    result = found.result
    return {
        "gain": result.estimate, "low": result.interval[0], "high": result.interval[1], "p": result.p_value,
        "smallest effect": result.smallest_effect, "seeds": found.seeds,
    }  # fmt: skip


def adjusted_table(rows: Sequence[Mapping[str, object]], *, first: Sequence[str]) -> pd.DataFrame:
    """Make a table of rows with a gain each, with p-values adjusted over all of them.

    Args:
        rows: with `gain_columns`.
        first: columns that come before; they stand also when there are no rows.
    """
    adjusted = paired.holm({index: float(str(row["p"])) for index, row in enumerate(rows)})
    listed = [{**row, "p (Holm)": adjusted[index]} for index, row in enumerate(rows)]
    return pd.DataFrame(listed, columns=None if listed else pd.Index([*first, *GAIN_COLUMNS]))


def best_method(outcomes: Sequence[Outcome], names: Sequence[str], *, model: str, sparsity: float) -> str:
    """Return the one of some methods with the lowest mean loss at a sparsity, on the same windows that gains are measured on."""
    return min(names, key=lambda name: float(losses(outcomes, model=model, method=name, sparsity=sparsity).mean()))


def correct_answers(by_calibration: Sequence[Results], key: tuple[str, str, float, str]) -> Float[Tensor, "seed document"]:
    """Return 1 for right and 0 for wrong answers of one model, a row for each calibration that it was measured with.

    Args:
        by_calibration: results of each calibration.
        key: (model, method, sparsity, task).
    """
    return torch.stack([torch.tensor(results[key].correct).double() for results in by_calibration if key in results])

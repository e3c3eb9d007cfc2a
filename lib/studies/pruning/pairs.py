"""Pairs of compressed models: the gain of one over the other, or over each of several others, and what both took."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import pandas as pd
import torch

from lib.core.errors import require
from lib.evaluation.paired import PairedDifference
from lib.pruning.importances import UNSTRUCTURED
from lib.studies.damage.shares import SHARE_COLUMNS, between, own_columns
from lib.studies.pruning.gain_tables import Comparison, comparison_table, gain
from lib.studies.pruning.runs import DENSE, Outcome

MEGABYTE = 1e6
COST_COLUMNS = ("against", "seconds", "seconds of the other", "peak MB", "peak MB of the other")


def compared(outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]], *, seed: int) -> list[Comparison]:
    """Compare pairs of methods in every model and at every target that both were measured at.

    Args:
        outcomes: of any models and targets.
        pairs: names of the method and of what it is compared with.
        seed: of the bootstrap.
    """
    results = []
    for first, second in _measured(outcomes, pairs):
        one, losses = first[0], [torch.stack([found.loss for found in side]) for side in (first, second)]
        where = "" if one.pattern == UNSTRUCTURED else f", {one.pattern}"
        given = {"name": f"{one.method} - {second[0].method}{where}", "model": one.model, "sparsity": one.sparsity, "seed": seed}
        results.append(gain(*losses, **given))
    return results


def pairs_table(
    outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]], *, seed: int, controls: Collection[str] = ()
) -> pd.DataFrame:
    """Tabulate the gains of `compared` and what both methods took; empty where nothing was measured.

    Args:
        outcomes: of any models and targets.
        pairs: names of the method and of what it is compared with.
        seed: of the bootstrap.
        controls: which of the others are controls, which change something that must not matter; the rest are rivals.

    Returns:
        One row a pair: the gain with p-values adjusted over all rows; which share it is of what the other lost, where the dense
        model is among the outcomes; whether the other is a `"rival"` or a `"control"`; seconds (mean over calibrations) and peak
        memory (the largest) of both, see `Outcome.effort`; NaN where not measured.
    """
    table = comparison_table(compared(outcomes, pairs, seed=seed))
    costs = [
        ("control" if second[0].method in controls else "rival", _seconds(first), _seconds(second), _peak(first), _peak(second))
        for first, second in _measured(outcomes, pairs)
    ]
    if any(found.method == DENSE for found in outcomes):
        of_damage = [_share(outcomes, *sides, seed=seed) for sides in _measured(outcomes, pairs)]
        table = table.join(pd.DataFrame(of_damage, columns=pd.Index(SHARE_COLUMNS)))
    return table.join(pd.DataFrame(costs, columns=pd.Index(COST_COLUMNS)))


def weakest(results: Sequence[PairedDifference]) -> PairedDifference:
    """Return the gain over every one of several rivals: that with the lowest lower bound, and the largest p-value of all.

    Args:
        results: the gain over each rival.

    Raises:
        InputError: no rival.

    Source: intersection-union test (Berger, 1982): who claims to beat all must beat each, at no price for their number.

    >>> sure, unsure = PairedDifference(0.5, (0.4, 0.6), 0.01, 1.0, 0.1, 9), PairedDifference(0.8, (0.1, 1.5), 0.04, 1.0, 0.9, 9)
    >>> weakest([sure, unsure]).interval, weakest([sure, unsure]).p_value
    ((0.1, 1.5), 0.04)
    """
    require(bool(results), "a gain over every rival must have a rival", "none", "measure one")
    lowest = min(results, key=lambda result: result.interval[0])
    return replace(lowest, p_value=max(result.p_value for result in results))


def _measured(outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[Outcome], list[Outcome]]]:
    """Yield the calibrations of both methods of every pair, wherever both were measured."""
    cells: dict[tuple[str, float, str], dict[str, list[Outcome]]] = {}
    for found in outcomes:
        cells.setdefault((found.model, found.sparsity, found.pattern), {}).setdefault(found.method, []).append(found)
    for there in cells.values():
        yield from ((there[first], there[second]) for first, second in pairs if {first, second} <= there.keys())


def _share(outcomes: Sequence[Outcome], first: Sequence[Outcome], second: Sequence[Outcome], *, seed: int) -> dict[str, float]:
    """Return the columns of the share that the first recovers of what the second lost."""
    sides = [(found[0].method, found[0].sparsity) for found in (first, second)]
    return own_columns(between(outcomes, *sides, model=first[0].model, pattern=first[0].pattern, seed=seed))


def _seconds(found: Sequence[Outcome]) -> float:
    return sum(one.effort.seconds for one in found) / len(found)


def _peak(found: Sequence[Outcome]) -> float:
    return float(torch.tensor([one.effort.peak for one in found], dtype=torch.float64).max()) / MEGABYTE  # NaN stays NaN

"""The core's verdicts: what is better by loss and by accuracy, as far as the cells got, with what it can be told from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import beta

from lib.core.config import ROOT, Config
from lib.evaluation import paired
from lib.grid import cells
from lib.grid.cells import LOSS, Cell
from lib.grid.core import expansion, prices
from lib.grid.core.racing import corrected
from lib.grid.store import Record
from lib.report import claims
from lib.texts import articles

# Which is said to be better than which: the authors' two pairs, then what else the first of them may owe its gain to.
PAIRS = (
    ("sink-aware (Wanda)", "Wanda"),
    ("sink-aware (SparseGPT)", "SparseGPT"),
    ("sink-aware (Wanda)", "DWANDA"),
    ("sink-aware (Wanda)", expansion.RANDOM),
)
PAPER = {
    "mmlu": "MMLU", "arc_challenge": "ARC-C", "piqa": "PIQA", "winogrande": "WinoG", "gsm8k": "GSM8K", "hellaswag": "HellaSwag"
}  # fmt: skip
AVERAGE = "average"
RULE = "95 % interval of the paired difference above 0; here: of the same documents, those that were not drawn left to chance"
COLUMNS = (
    "better", "than", "measure", "unit", "n", "gain", "low", "high", "verdict", "low here", "high here", "verdict here",
    "corrected", "paper",
)  # fmt: skip
Z = 1.96
Found = Mapping[Cell, Record | None]
Results = Mapping[tuple[str, str], Mapping[str, Any]]  # by method and task


@dataclass(frozen=True)
class Gain:
    """A paired difference in accuracy on one task.

    Attributes:
        documents: asked.
        mean: the difference, in [-1, 1].
        variance: of the mean, over documents.
        left: share of the benchmark that was not asked.
        corrected: the difference with what audited documents say.
    """

    documents: int
    mean: float
    variance: float
    left: float
    corrected: float


def of_profile(config: Config) -> dict[Cell, Record | None]:
    """Read what the present code has computed of a profile's core.

    Args:
        config: any profile.

    Returns:
        The record of every cell in the order of the core; None where there is none yet.

    Raises:
        InputError: settings that cannot be used, or a damaged store.
    """
    return recorded(expansion.cells_of(config), config)


def recorded(listed: Sequence[Cell], config: Config) -> dict[Cell, Record | None]:
    """Read what the present code has computed of some cells of a profile, in their order; None where there is nothing yet.

    Raises:
        InputError: a damaged store.
    """
    if not listed:
        return {}
    store, code = cells.store_of(config), cells.code_version(ROOT)
    return {cell: store.read(cell.spec(code=code)["id"]) for cell in listed}


def table(found: Found, config: Config) -> pd.DataFrame:
    """Compare variants in pairs.

    Args:
        found: what `of_profile` returned.
        config: its profile.

    Returns:
        One row a pair and measure: the NELBO, the average over the tasks, each task. `gain` is positive where the first of a pair
        is better, `low` and `high` its 95 % interval for new windows or documents, `low here` and `high here` that of the average
        on the same documents with the same masks, `corrected` the gain with what audited documents say, `paper` the authors'.
        A verdict is `not tested` while cells are missing.
    """
    core, results = expansion.core_of(config), _results(found)
    names = prices.benchmarks(core)
    rows = []
    for pair in (pair for pair in PAIRS if set(pair) <= set(core.methods)):
        if any(LOSS in tasks for tasks in core.rounds):
            rows.append(_loss_row(pair, results, seed=config.seed))
        gains = {task: _gain(pair, task, results, audit=core.audit) for task in names}
        rows.append(_average_row(pair, gains))
        rows += [_task_row(pair, task, gain) for task, gain in gains.items()]
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


def lines(found: Found, config: Config) -> list[str]:
    """Return the verdicts as text, the tasks one by one left out, with what the races drew.

    Args:
        found: what `of_profile` returned.
        config: its profile.
    """
    made = table(found, config)
    shown = made[made["measure"].isin([LOSS, AVERAGE])].drop(columns=["unit"])
    shown = shown.assign(measure=[f"{row.measure}, {row.unit}" for row in made.loc[shown.index].itertuples()])
    body = shown.to_string(index=False, float_format=lambda value: f"{value:.3g}", na_rep="-").splitlines()
    return [f"verdicts so far ({RULE}):", *body, *races(found)]


def races(found: Found) -> list[str]:
    """Say what the races drew, and how many answers of audited documents changed with all draws.

    Args:
        found: what `of_profile` returned.
    """
    done = [record.result for record in found.values() if record is not None and record.result is not None]
    counts = [result["race"] for result in done if "race" in result]
    changed = sum(
        mark != end
        for result in done
        if "final" in result
        for mark, end in zip(result["scores"][result["metric"]], result["final"][result["metric"]], strict=True)
    )
    sums = {name: sum(count[name] for count in counts) for name in ("draws", "all_draws", "stopped", "audited")}
    if not sums["all_draws"]:
        return []
    most = float(beta.ppf(0.95, changed + 1, sums["audited"] - changed)) if changed < sums["audited"] else 1.0
    drawn = f"races made {sums['draws'] / sums['all_draws']:.0%} of the draws and ended early for {sums['stopped']} documents"
    return [
        f"{drawn}; of {sums['audited']} audited ones {changed} were marked otherwise after all draws (95 %: at most {most:.2%})"
    ]


def _results(found: Found) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {
        (cell.variant.method, cell.task): record.result
        for cell, record in found.items()
        if record is not None and record.result is not None
    }


def _row(pair: tuple[str, str], measure: str, unit: str, **known: Any) -> dict[str, Any]:
    """Fill a row; what is not known is NaN, and not tested."""
    empty = dict.fromkeys(("gain", "low", "high", "low here", "high here", "corrected", "paper"), math.nan)
    named = {"better": pair[0], "than": pair[1], "measure": measure, "unit": unit, "n": 0}
    return {**named, **empty, "verdict": "not tested", "verdict here": "", **known}


def _verdict(low: float, high: float) -> str:
    return claims.verdict((low, high), threshold=0.0, direction="above")


def _loss_row(pair: tuple[str, str], results: Results, *, seed: int) -> dict[str, Any]:
    """Compare the NELBO window by window."""
    both = [results.get((method, LOSS)) for method in pair]
    unit = "nats per token"
    if both[0] is None or both[1] is None:
        return _row(pair, LOSS, unit)
    first, second = (torch.tensor(result["nats per token"], dtype=torch.float64) for result in both if result is not None)
    gain = paired.paired_difference(second, first, seed=seed)
    low, high = gain.interval
    return _row(pair, LOSS, unit, n=gain.n, gain=gain.estimate, low=low, high=high, verdict=_verdict(low, high))


def _gain(pair: tuple[str, str], task: str, results: Results, *, audit: int) -> Gain | None:
    """Compare right answers document by document; None where a cell is missing."""
    both = [results.get((method, task)) for method in pair]
    if both[0] is None or both[1] is None:
        return None
    shown, after = (
        [_values(result, audit=audit, final=final) for result in both if result is not None] for final in (False, True)
    )
    differences = shown[0] - shown[1]
    mean, variance = spread(differences)
    left = 1 - len(differences) / int(both[0]["asked of"])
    return Gain(len(differences), mean, variance, left, float((after[0] - after[1]).mean()))


def _values(result: Mapping[str, Any], *, audit: int, final: bool) -> np.ndarray:
    """Return 1 for right and 0 for wrong, or what `racing.corrected` makes of it."""
    marks = [mark == "1" for mark in result["scores"][result["metric"]]]
    if not final or "final" not in result:
        return np.asarray(marks, dtype=float)
    return np.asarray(corrected(marks, [mark == "1" for mark in result["final"][result["metric"]]], audit=audit))


def spread(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the mean of paired differences in {-1, 0, 1} and the variance of that mean.

    Args:
        differences: one a document.

    Source: Agresti and Min, Simple improved confidence intervals for comparing matched proportions (2005): half a document is
        added to each of the four cells, so that no variance is 0 because no document tells two variants apart.

    >>> mean, variance = spread([1, -1, 0, 0, 0, 0, 0, 0])
    >>> mean, round(variance, 4)
    (0.0, 0.03)
    """
    values = np.asarray(differences, dtype=float)
    size = len(values) + 2
    return float(values.mean()), float(((values**2).sum() + 1) / size - (values.sum() / size) ** 2) / size


def _task_row(pair: tuple[str, str], task: str, gain: Gain | None) -> dict[str, Any]:
    if gain is None:
        return _row(pair, task, "points", paper=_paper(pair, PAPER.get(task)))
    half = Z * math.sqrt(gain.variance)
    low, high = max(gain.mean - half, -1.0), min(gain.mean + half, 1.0)
    known = {"n": gain.documents, "gain": 100 * gain.mean, "low": 100 * low, "high": 100 * high, "verdict": _verdict(low, high)}
    return _row(pair, task, "points", **known, corrected=100 * gain.corrected, paper=_paper(pair, PAPER.get(task)))


def _average_row(pair: tuple[str, str], gains: Mapping[str, Gain | None]) -> dict[str, Any]:
    """Average over tasks, each counted alike as in the paper; there is no verdict before all of them are there."""
    there, paper = [gain for gain in gains.values() if gain is not None], _paper(pair, "Avg")
    known: dict[str, Any] = {"n": sum(gain.documents for gain in there), "paper": paper}
    if len(there) < len(gains) or not there:
        return _row(pair, AVERAGE, f"points, {len(there)} of {len(gains)} tasks finished", **known)
    size = len(there)
    mean = sum(gain.mean for gain in there) / size
    half = Z * math.sqrt(sum(gain.variance for gain in there)) / size
    here = Z * math.sqrt(sum(gain.variance * gain.left for gain in there)) / size
    known |= {
        "gain": 100 * mean,
        "low": 100 * (mean - half),
        "high": 100 * (mean + half),
        "verdict": _verdict(mean - half, mean + half),
    }
    known |= {
        "low here": 100 * (mean - here),
        "high here": 100 * (mean + here),
        "verdict here": _verdict(mean - here, mean + here),
    }
    return _row(pair, AVERAGE, f"points, {size} tasks", **known, corrected=100 * sum(gain.corrected for gain in there) / size)


def _paper(pair: tuple[str, str], column: str | None) -> float:
    """Return the authors' difference in points, NaN where they give none."""
    rows = {row["method"]: row for row in articles.read_rows("paper_llada_50")}
    if column is None or not set(pair) <= rows.keys():
        return math.nan
    return round(float(rows[pair[0]][column]) - float(rows[pair[1]][column]), 2)

"""Tables of the experiment grid's store: what is there, what is missing, and the authors' table with ours beside."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lib.core.config import Config
from lib.core.settings.grid import CalibrationText
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.sums import share_interval
from lib.evaluation.tasks import TaskResult
from lib.grid import cells
from lib.grid.cells import DENSE, LOSS, Cell, Variant
from lib.grid.core import verdicts
from lib.grid.store import Record
from lib.pruning.importances import UNSTRUCTURED
from lib.texts import articles

# Columns of the authors' table, as the shipped `paper_llada_50` has them, and the benchmark that each one is.
PAPER_TASKS = {
    "MMLU": "mmlu",
    "ARC-C": "arc_challenge",
    "PIQA": "piqa",
    "WinoG": "winogrande",
    "GSM8K": "gsm8k",
    "HellaSwag": "hellaswag",
}
WHAT = ("model", "method", "pattern", "sparsity", "calibration")


def of_profile(config: Config) -> dict[Cell, Record | None]:
    """Read what the present code has computed of a profile's grid, or of its core where that is the scope; without one nothing.

    Args:
        config: any profile.

    Returns:
        The record of every cell in the order of the grid; None where there is none yet.

    Raises:
        InputError: settings of the grid that cannot be used, or a damaged store.
    """
    if config.grid is None:
        return {}
    if config.grid.scope == "core" and config.grid.core is not None:
        return verdicts.of_profile(config)
    return verdicts.recorded(cells.expand(config), config)


def state(found: Mapping[Cell, Record | None]) -> pd.DataFrame:
    """Count the cells of each model and task by what became of them, with the first reason of those without a number.

    Args:
        found: what `of_profile` returned.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for cell, record in found.items():
        row = rows.setdefault(
            (cell.variant.model, cell.task),
            {"model": cell.variant.model, "task": cell.task, "done": 0, "failed": 0, "not tested": 0, "missing": 0, "reason": ""},
        )
        row["missing" if record is None else record.status] += 1
        if record is not None and record.status != "done" and not row["reason"]:
            row["reason"] = record.reason
    return pd.DataFrame(rows.values())


def results(found: Mapping[Cell, Record | None]) -> pd.DataFrame:
    """Tabulate the finished cells: the score of a task with its interval, or the mean loss.

    Args:
        found: what `of_profile` returned.

    Returns:
        One row a cell: what was pruned and how, `task`, `value`, `low`, `high` (95 %), `n`.
    """
    rows = [
        {**_what(cell.variant), "seed": cell.variant.seed, "task": cell.task, **_numbers(cell.task, record.result)}
        for cell, record in found.items()
        if record is not None and record.result is not None
    ]
    return pd.DataFrame(rows, columns=pd.Index([*WHAT, "seed", "task", "value", "low", "high", "n"]))


def summary(found: Mapping[Cell, Record | None]) -> pd.DataFrame:
    """Put the results of one pruned model into one row: its loss, and its accuracies in per cent, means over calibrations.

    Args:
        found: what `of_profile` returned.

    Returns:
        Columns of what was pruned and how, then one a task; NaN where a cell is missing.
    """
    long = results(found)
    long["value"] = long["value"].where(long["task"] == LOSS, 100 * long["value"])
    long["task"] = ["loss, nats per token" if task == LOSS else f"{task}, %" for task in long["task"]]
    wide = long.pivot_table(index=list(WHAT), columns="task", values="value", sort=False)
    return wide.reset_index().rename_axis(columns=None)


def answers(found: Mapping[Cell, Record | None]) -> dict[tuple[str, str, float, str], TaskResult]:
    """Return right and wrong answers, document by document, as `gain_tables.mcnemar_table` compares them.

    Args:
        found: what `of_profile` returned.

    Returns:
        Results by (model, method, sparsity, task), of the dense models and of what was pruned without a pattern, under the grid's
        main calibration and its first seed.
    """
    main, kept = _main(found), {}
    for cell, record in found.items():
        one = cell.variant
        compared = one.pattern == UNSTRUCTURED and one.calibration in (None, main)
        key = (one.model, one.method, one.sparsity, cell.task)
        if record is not None and record.result is not None and cell.task != LOSS and compared and key not in kept:
            kept[key] = _answers(cell, record.result)
    return kept


def _answers(cell: Cell, result: Mapping[str, Any]) -> TaskResult:
    scores = {name: tuple(mark == "1" for mark in marks) for name, marks in result["scores"].items()}
    asked = {key: value for key, value in cell.settings["evaluation"].items() if key != "chat_template"}
    settings = EvaluationSettings(**asked)
    metric, chance, truncated = result["metric"], result["chance"], result["truncated"]
    return TaskResult(cell.task, metric, scores[metric], scores, chance, truncated, settings, result.get("merged", 0))


def _what(variant: Variant) -> dict[str, object]:
    """Say what was pruned and how, under the names of `WHAT`."""
    text = variant.calibration
    read = "" if text is None else f"{text.corpus}, {text.windows} x {text.positions}"
    return dict(zip(WHAT, (variant.model, variant.method, variant.pattern, variant.sparsity, read), strict=True))


def _main(found: Mapping[Cell, Record | None]) -> CalibrationText | None:
    """Return the calibration that the grid names first."""
    return next((cell.variant.calibration for cell in found if cell.variant.calibration is not None), None)


def paper_table(found: Mapping[Cell, Record | None], *, model: str) -> pd.DataFrame:
    """Put the authors' LLaDA-8B accuracies at 50 % beside ours, in points; NaN where a cell is missing.

    Args:
        found: what `of_profile` returned.
        model: whose.

    Returns:
        One row a method of the authors' table, three columns a benchmark: `X (paper)`, `X (ours)` as the mean over calibrations,
        and `X (±)`, half the 95 % interval of one calibration: the fewer documents were asked, the wider it is.
    """
    main, rows = _main(found), []
    for published in articles.read_rows("paper_llada_50"):
        row: dict[str, Any] = {"method": published["method"]}
        for column, task in PAPER_TASKS.items():
            ours = _measured(found, model, published["method"], task, main)
            row[f"{column} (paper)"] = float(published[column])
            row[f"{column} (ours)"] = _mean([100 * numbers["value"] for numbers in ours])
            row[f"{column} (±)"] = _mean([50 * (numbers["high"] - numbers["low"]) for numbers in ours])
        rows.append(row)
    return pd.DataFrame(rows)


def _measured(
    found: Mapping[Cell, Record | None], model: str, method: str, task: str, main: CalibrationText | None
) -> list[dict[str, float]]:
    """Return what `_numbers` says of one method at 50 % unstructured, one entry a seed."""
    return [
        _numbers(task, record.result)
        for cell, record in found.items()
        if record is not None
        and record.result is not None
        and (cell.variant.model, cell.variant.method, cell.task) == (model, method, task)
        and _is_compared(cell.variant, main)
    ]


def _is_compared(variant: Variant, main: CalibrationText | None) -> bool:
    """Tell whether a variant is the dense model, or one of the authors' table."""
    if variant.method == DENSE:
        return True
    return (variant.pattern, variant.sparsity) == (UNSTRUCTURED, 0.5) and variant.calibration in (None, main)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _numbers(task: str, result: Mapping[str, Any]) -> dict[str, float]:
    """Return value, interval and size of one result."""
    if task != LOSS:
        size = int(result["documents"])
        low, high = share_interval(round(result["accuracy"] * size), size)
        return {"value": result["accuracy"], "low": low, "high": high, "n": size}
    losses = [float(value) for value in result["nats per token"]]
    half = 1.96 * statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    mean = statistics.fmean(losses)
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(losses)}

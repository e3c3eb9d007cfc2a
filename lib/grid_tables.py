"""Tables of the experiment grid's store: what is there, what is missing, and the authors' table with ours beside."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lib import cells, data
from lib.cells import DENSE, LOSS, Cell, Variant
from lib.config import Config
from lib.evaluation import share_interval
from lib.pruning import UNSTRUCTURED
from lib.store import Record, Store

# Columns of the authors' table, as the shipped `paper_llada_50` has them, and the benchmark that each one is.
PAPER_TASKS = {
    "MMLU": "mmlu",
    "ARC-C": "arc_challenge",
    "PIQA": "piqa",
    "WinoG": "winogrande",
    "GSM8K": "gsm8k",
    "HellaSwag": "hellaswag",
}


def records(config: Config, store: Store, *, code: str) -> dict[Cell, Record | None]:
    """Read the record of every cell of a profile's grid; None where there is none yet.

    Args:
        config: a profile with a grid.
        store: of its cells.
        code: version of the code that computed them, `cells.code_version`.

    Raises:
        InputError: no grid, or a damaged store.
    """
    found = {}
    for cell in cells.expand(config):
        found[cell] = store.read(cell.spec(code=code)["id"])
    return found


def state(found: Mapping[Cell, Record | None]) -> pd.DataFrame:
    """Count the cells of each model and task by what became of them, with the first reason of those without a number.

    Args:
        found: what `records` returned.
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
    """Tabulate every finished cell: the score of a task with its interval, or the mean loss.

    Args:
        found: what `records` returned.

    Returns:
        One row a cell: what was pruned and how, `task`, `value`, `low`, `high` (95 %), `n`.
    """
    rows = []
    for cell, record in found.items():
        if record is None or record.result is None:
            continue
        one = cell.variant
        what = {"model": one.model, "method": one.method, "pattern": one.pattern, "sparsity": one.sparsity, "seed": one.seed}
        text = one.calibration
        what["calibration"] = "" if text is None else f"{text.corpus}, {text.windows} x {text.positions}"
        rows.append({**what, "task": cell.task, **_numbers(cell.task, record.result)})
    return pd.DataFrame(rows)


def paper_table(found: Mapping[Cell, Record | None], *, model: str) -> pd.DataFrame:
    """Put the authors' LLaDA-8B accuracies at 50 % beside ours, in points; NaN where a cell is missing.

    Args:
        found: what `records` returned.
        model: whose.

    Returns:
        One row a method of the authors' table, two columns a benchmark: `X (paper)` and `X (ours)`.
    """
    main = next((cell.variant.calibration for cell in found if cell.variant.calibration is not None), None)
    rows = []
    for published in data.read_rows("paper_llada_50"):
        row: dict[str, Any] = {"method": published["method"]}
        for column, task in PAPER_TASKS.items():
            row[f"{column} (paper)"] = float(published[column])
            row[f"{column} (ours)"] = _mean(_values(found, model, published["method"], task, main))
        rows.append(row)
    return pd.DataFrame(rows)


def _values(found: Mapping[Cell, Record | None], model: str, method: str, task: str, main: object) -> Sequence[float]:
    """Return the accuracies of one method at 50 % unstructured, one a seed, in points."""
    return [
        100 * float(record.result["accuracy"])
        for cell, record in found.items()
        if record is not None
        and record.result is not None
        and (cell.variant.model, cell.variant.method, cell.task) == (model, method, task)
        and _is_compared(cell.variant, main)
    ]


def _is_compared(variant: Variant, main: object) -> bool:
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

"""What a process of the grid does with a group of cells: compute those without a record, write each at once.

Torch is not imported here: the environment of a process is settled before its work is.
"""

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib.core.errors import InputError
from lib.core.provenance import write_text
from lib.core.wheels import UnavailableError
from lib.grid.store import Record, Store

MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Group:
    """Cells that one process computes one after another, because they share what is costly: the pruned weights.

    Attributes:
        key: its name.
        cells: each with id, settings, code, data.
        shared: what the work function gets.
        lane: groups of one lane wait for each other, because the first one keeps what the next ones read; empty for none.
    """

    key: str
    cells: tuple[dict[str, Any], ...]
    shared: dict[str, Any]
    lane: str = ""


@dataclass(frozen=True)
class Order:
    """How a group is computed.

    Attributes:
        store: where the records go.
        work: `module:function` of a function that takes `shared`, cells and `batch_size`, and gives for each cell in turn
            `(id, result)`, or `(id, exception)` where that cell failed and the others can go on. What it raises fails the cell
            in progress.
        batch_size: what a cell begins with; halved when memory runs out.
        attempts: how often a cell may end its process.
        threads: of the process.
    """

    store: Store
    work: str
    batch_size: int
    attempts: int
    threads: int


def compute(group: Group, order: Order, *, attempt: int = 0) -> None:
    """Write a record for each cell that has none, up to one that raises: what comes after it needs a fresh process.

    Args:
        group: the cells.
        order: how.
        attempt: how many processes died at this before. Each halves the batch, and the last one takes the smallest: the system
            kills what takes too much memory.
    """
    os.environ["OMP_NUM_THREADS"] = str(order.threads)
    is_last = 0 < attempt == order.attempts - 1
    size = 1 if is_last else max(1, order.batch_size >> attempt)
    while cells := order.store.missing(group.cells):
        cell, error = _stopped_at(cells, group, order, batch_size=size)
        if error is None:
            return
        if not _is_memory(error) or size == 1:
            at = f"out of memory with a batch size of {size}: " if _is_memory(error) else ""
            fail(order.store, cell, error, prefix=at)
            return
        size //= 2
        _free(error)


def _stopped_at(
    cells: Sequence[dict[str, Any]], group: Group, order: Order, *, batch_size: int
) -> tuple[dict[str, Any], Exception | None]:
    """Compute cells one after another; return the one at which something was raised, and what."""
    cell = cells[0]
    try:
        results = iter(_load(order.work)(group.shared, cells, batch_size=batch_size))
        for cell in cells:
            result = _next(results, cell)
            if isinstance(result, Exception):
                fail(order.store, cell, result)
            else:
                order.store.write(Record(cell["settings"], cell["code"], cell["data"], "done", result))
    except Exception as error:
        return cell, error
    return cell, None


def fail(store: Store, cell: Mapping[str, Any], error: Exception, *, prefix: str = "") -> None:
    """Record why a cell has no result, unless another driver has one; what nobody foresaw leaves its traceback in the log.

    Args:
        store: where the record goes.
        cell: with settings, code, data.
        error: what happened.
        prefix: words before the error's own.
    """
    if not store.missing([dict(cell)]):
        return
    status = "not tested" if isinstance(error, UnavailableError) else "failed"
    message = " ".join(str(error).split())
    if not isinstance(error, InputError) or not message:
        write_text(store.log(cell["id"]), "".join(traceback.format_exception(error)))
        message = f"{prefix}{type(error).__name__}: {message}"
    store.write(Record(cell["settings"], cell["code"], cell["data"], status, reason=message))


def _load(work: str) -> Any:
    module, _, function = work.partition(":")
    return getattr(importlib.import_module(module), function)


def _next(results: Any, cell: Mapping[str, Any]) -> Any:
    """Take the next result, which must be the one of this cell; a failure that the work function survived counts as one."""
    name, result = next(results, (None, None))
    if name != cell["id"]:
        raise ValueError(f"the work function must give a result for each cell in the order given, got {name} for {cell['id']}")
    if isinstance(result, Exception) and _is_memory(result):
        raise result
    return result


def _is_memory(error: Exception) -> bool:
    """Tell whether memory ran out, without importing torch: its own error, Python's, or what its libraries say."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and any(word in str(error) for word in MEMORY_WORDS))


def _free(error: Exception) -> None:
    """Let go of what the frames of an error hold, and of what torch keeps of a GPU's memory."""
    error.__traceback__ = None
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()

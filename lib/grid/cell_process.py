"""The process that computes the cells of one group, one after another, so that a crash costs one cell.

`python -m lib.grid.cell_process STORE KEY PIPE` reads its task as JSON from standard input. It leaves the process tree of the
worker that started it: when one worker of a pool is killed, the pool kills the others with all their descendants, and hours of
work.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.core.errors import InputError
from lib.core.provenance import write_text
from lib.core.wheels import UnavailableError
from lib.grid.store import Record, Store

# Exit codes; every other one, 0 too, is a crash. PROGRESS: a record was written for each cell, or up to one that failed.
PROGRESS, BUSY, MEMORY, STOPPED = 64, 65, 66, 67
MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def main(arguments: list[str]) -> int:
    """Compute the missing cells of one group.

    Args:
        arguments: folder of the store, key of the group, number of the descriptor that takes the exit code.

    Returns:
        Exit code: `PROGRESS`; `BUSY` when another process computes the group; `MEMORY` to be tried again with a smaller batch.
    """
    folder, key, pipe = arguments
    task = json.load(sys.stdin)
    _detach(int(pipe))
    store = Store(Path(folder), stale=task["stale"])

    def end_when_stopped() -> None:
        if store.is_stopped(task["run"]):
            os._exit(STOPPED)

    end_when_stopped()
    with store.claim(f"{key}.child", on_beat=end_when_stopped) as ours:
        return _compute(store, task) if ours else BUSY


def _detach(pipe: int) -> None:
    """Go on in a grandchild; the child between, which nobody's pool knows, tells the supervisor how the grandchild ends."""
    if os.fork():
        os._exit(0)
    os.setsid()
    child = os.fork()
    if not child:
        os.close(pipe)
        return
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.write(pipe, str(code).encode())
    finally:  # the supervisor may be dead
        os._exit(0)


def _compute(store: Store, task: Mapping[str, Any]) -> int:
    """Write a record for each missing cell, up to one that raises: what comes after it gets a fresh process."""
    cells = store.missing(task["cells"])
    cell = cells[0] if cells else {}
    try:
        results = iter(_load(task["work"])(task["shared"], cells, batch_size=task["batch_size"]) if cells else ())
        for cell in cells:
            result = _next(results, cell)
            if isinstance(result, Exception):
                _fail(store, cell, result)
            else:
                store.write(Record(cell["settings"], cell["code"], cell["data"], "done", result))
    except Exception as error:
        if _is_memory(error) and task["batch_size"] > 1:
            return MEMORY
        at = f"out of memory with a batch size of {task['batch_size']}: " if _is_memory(error) else ""
        _fail(store, cell, error, prefix=at)
    return PROGRESS


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


def _fail(store: Store, cell: Mapping[str, Any], error: Exception, *, prefix: str = "") -> None:
    """Record why a cell has no result; what nobody foresaw leaves its traceback in the log."""
    status = "not tested" if isinstance(error, UnavailableError) else "failed"
    message = " ".join(str(error).split())
    if not isinstance(error, InputError) or not message:
        write_text(store.log(cell["id"]), "".join(traceback.format_exception(error)))
        message = f"{prefix}{type(error).__name__}: {message}"
    store.write(Record(cell["settings"], cell["code"], cell["data"], status, reason=message))


def _is_memory(error: Exception) -> bool:
    """Tell whether memory ran out, without importing torch: its own error, Python's, or what its libraries say."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and any(word in str(error) for word in MEMORY_WORDS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

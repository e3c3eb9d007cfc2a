"""Work for the tests of the grid: what a cell does is written in its settings, and each execution leaves a file."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from lib.core.errors import InputError
from lib.core.wheels import UnavailableError

ERRORS: dict[str, Exception] = {
    "input": InputError("a rule, got something: a remedy"),
    "unavailable": UnavailableError("data must be there, got a gate: ask for access"),
    "bug": ZeroDivisionError("division by zero"),
}


def work(shared: dict[str, Any], cells: Sequence[dict[str, Any]], *, batch_size: int) -> Iterator[tuple[str, Any]]:
    """Note each execution in the folder `shared["notes"]`, then do what the settings say, then square a number."""
    for cell in cells:
        settings = cell["settings"]
        note = Path(shared["notes"]) / f"{settings['number']}.{uuid4().hex}"
        note.write_text(f"{batch_size} {os.getpid()} {os.environ['OMP_NUM_THREADS']}")
        time.sleep(settings.get("seconds", 0))
        act = settings.get("act", "")
        if act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "kill once" and len(list(note.parent.glob(f"{settings['number']}.*"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "crash":
            os.abort()
        if act == "leave":
            os._exit(0)
        if act == "memory" and batch_size > settings["fits"]:
            raise MemoryError(f"no room for {batch_size}")
        if act == "torch" and batch_size > settings["fits"]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: 8 bytes")
        if act == "nan":
            yield cell["id"], {"value": float("nan")}
        elif act == "devices":
            yield cell["id"], {"devices": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
        elif act == "skip":
            continue
        elif act == "survived":
            yield cell["id"], ERRORS["bug"]
        elif act in ERRORS:
            raise ERRORS[act]
        else:
            yield cell["id"], {"square": settings["number"] ** 2}

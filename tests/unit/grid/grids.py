"""Small grids for the tests of the engine, drivers in processes of their own, and what is left of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lib.core.config import ROOT
from lib.grid.group import Group
from lib.grid.store import Store, cell_id

WORK = "tests.unit.grid.cells_at_work:work"
DRIVER = """
import json, signal, sys
from pathlib import Path
from lib.grid.engine import run
from lib.grid.group import Group
from lib.grid.store import Store
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored where the tests run
task = json.loads(sys.argv[1])
groups = [Group(group["key"], tuple(group["cells"]), group["shared"]) for group in task.pop("groups")]
store = Store(Path(task.pop("store")))
print(run(groups, store=store, say=lambda line: print(line, flush=True), **task), flush=True)
"""


def cell(number: int, **settings: Any) -> dict[str, Any]:
    """A cell whose result is the square of a number."""
    settings |= {"number": number}
    return {"id": cell_id(settings, code="c", data="d"), "settings": settings, "code": "c", "data": "d"}


@dataclass
class Place:
    """A store in a folder of its own, with the notes of what was executed."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "notes").mkdir(parents=True, exist_ok=True)

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    def group(self, key: str, *cells: dict[str, Any]) -> Group:
        return Group(key, cells, {"notes": str(self.folder / "notes")})

    def grid(self, groups: int, cells: int, **settings: Any) -> list[Group]:
        """Groups of cells that all do the same."""
        rows = [[cell(10 * row + column, **settings) for column in range(cells)] for row in range(groups)]
        return [self.group(f"group-{row}", *rows[row]) for row in range(groups)]

    def executions(self) -> Counter[int]:
        """How often each number was begun."""
        return Counter(int(path.name.split(".")[0]) for path in (self.folder / "notes").iterdir())

    def notes(self, number: int) -> list[list[int]]:
        """Batch size, process and threads of each execution of a number, from the largest batch on."""
        paths = (self.folder / "notes").glob(f"{number}.*")
        return sorted(([int(word) for word in path.read_text().split()] for path in paths), reverse=True)

    def content(self) -> dict[str, bytes]:
        """All bytes of all records."""
        return {path.name: path.read_bytes() for path in self.store.folder.glob("[!.]*.json")}

    def left_over(self) -> list[str]:
        """What lies in the store beside its records."""
        return [path.name for path in self.store.folder.iterdir() if path.suffix != ".json" or path.name.startswith(".")]

    def drive(self, groups: Sequence[Group], **options: Any) -> subprocess.Popen[str]:
        """Start a driver in a process of its own."""
        plain = [{"key": group.key, "cells": group.cells, "shared": group.shared} for group in groups]
        task = {"groups": plain, "store": str(self.store.folder), "work": WORK, "jobs": 2, "batch_size": 8} | options
        command = [sys.executable, "-c", DRIVER, json.dumps(task)]
        environ = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def listed() -> list[Any]:
    """All processes that live, with what is asked of them read at once, because they may end in between."""
    found = psutil.process_iter(["cmdline", "name", "ppid", "status"])
    return [process for process in found if process.info["cmdline"] and process.info["status"] != psutil.STATUS_ZOMBIE]


def of_ray(folder: Path) -> list[Any]:
    """The processes of the Ray that keeps its files in a folder, and those that these started."""
    found = listed()
    own = [process for process in found if str(folder) in " ".join(process.info["cmdline"])]
    return [*own, *(process for process in found if process.info["ppid"] in {other.pid for other in own})]


def computing(folder: Path) -> list[Any]:
    """Those of them that compute a group."""
    return [process for process in of_ray(folder) if process.info["name"].startswith("ray::_compute")]


def wait_for(holds: Callable[[], object], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def finish(driver: subprocess.Popen[str], *, seconds: float = 90) -> str:
    """Wait for a driver that must succeed, and return what it said."""
    out, err = driver.communicate(timeout=seconds)
    assert driver.returncode == 0, f"{out}\n{err}"
    return out


def kill(*processes: psutil.Process | subprocess.Popen[str]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)

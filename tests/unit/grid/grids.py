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
from lib.grid.store import Store, cell_id
from lib.grid.sweep import Group

WORK = "tests.unit.grid.cells_at_work:work"
DRIVER = """
import json, signal, sys
from pathlib import Path
from lib.grid.store import Store
from lib.grid.sweep import Group, run
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
    """A store in a folder of its own, with the notes of what was executed and the locks of its own machine."""

    folder: Path

    def __post_init__(self) -> None:
        for name in ("notes", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

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
        return {path.name: path.read_bytes() for path in self.store.folder.glob("*.json")}

    def drive(self, groups: Sequence[Group], *, tmp: str = "", **options: Any) -> subprocess.Popen[str]:
        """Start a driver in a process of its own; `tmp` is where its machine keeps the locks of devices."""
        plain = [{"key": group.key, "cells": group.cells, "shared": group.shared} for group in groups]
        task = {"groups": plain, "store": str(self.store.folder), "work": WORK, "jobs": 2, "batch_size": 8} | options
        environ = dict(os.environ) | {"TMPDIR": tmp or str(self.folder / "tmp"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DRIVER, json.dumps(task)]
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def children(self) -> list[Any]:
        """Every process that computes for this store, with the one that waits for it."""
        return [process for process in listed() if str(self.store.folder) in process.info["cmdline"]]

    def computing(self) -> list[Any]:
        """Those that compute: the younger ones of each pair."""
        found = self.children()
        return [process for process in found if process.info["ppid"] in {other.pid for other in found}]


def listed() -> list[Any]:
    """All processes that live, with what is asked of them read at once, because they may end in between."""
    found = psutil.process_iter(["cmdline", "name", "ppid", "status"])
    return [process for process in found if process.info["cmdline"] and process.info["status"] != psutil.STATUS_ZOMBIE]


def workers(driver: subprocess.Popen[str]) -> list[Any]:
    """The workers of joblib's pool."""
    return [process for process in listed() if process.info["ppid"] == driver.pid and "--process-name" in process.info["cmdline"]]


def wait_for(holds: Callable[[], object], *, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def finish(driver: subprocess.Popen[str], *, seconds: float = 60) -> str:
    """Wait for a driver that must succeed, and return what it said."""
    out, err = driver.communicate(timeout=seconds)
    assert driver.returncode == 0, f"{out}\n{err}"
    return out


def kill(*processes: psutil.Process | subprocess.Popen[str]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def clean_up(place: Place) -> None:
    """Nothing may be left of a test: what has not ended by itself is ended, and counts as a failure."""
    deadline = time.monotonic() + 10
    while place.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    left = place.children()
    kill(*left)
    assert not left


def undisturbed_run(folder: Path, *, seconds: float, **shape: int) -> dict[str, bytes]:
    """The records of a run that nobody touched: `groups` groups of `cells` cells, each of which takes some seconds."""
    calm, count = Place(folder), shape["groups"] * shape["cells"]
    out = finish(calm.drive(calm.grid(**shape, seconds=seconds)))
    assert f"Summary(cells={count}, computed={count}, failed=(), not_tested=())" in out
    content = calm.content()
    assert len(content) == count
    clean_up(calm)
    return content

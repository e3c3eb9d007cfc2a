"""A worker of `lib.grid.sweep`: take a free group, start a process for it, watch it, start it again after a crash."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.core import environment, hub
from lib.grid.cell_process import BUSY, MEMORY, PROGRESS, STOPPED
from lib.grid.store import Record, Store

PAUSE_SECONDS = 0.5
LOST = 255  # how it ended is not known


@dataclass(frozen=True)
class Group:
    """Cells that one process computes one after another, because they share what is costly: the pruned weights."""

    key: str
    cells: tuple[dict[str, Any], ...]  # each with id, settings, code, data
    shared: dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """What one process may use of this machine, and the descriptors that lock it."""

    name: str
    locks: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What a worker needs to know."""

    groups: tuple[Group, ...]
    store: Store
    work: str
    attempts: int
    batch_size: int
    run: str
    slots: tuple[str, ...] = ()  # "cpu-0", "cuda-0,1": locked by one process at a time; none: the GPUs that the worker sees
    threads: int = 1  # for each process
    driver: int = 0  # process number; none under Ray, which ends the workers of a driver that died

    def left(self) -> list[Group]:
        """Pick the groups with a cell that has no record.

        Returns:
            Groups in their order.
        """
        finished = set(self.store.ids())
        return [group for group in self.groups if any(cell["id"] not in finished for cell in group.cells)]

    def is_wanted(self) -> bool:
        """Tell, in a worker, whether its driver still lives and was not interrupted.

        Returns:
            False when the worker should begin nothing more.
        """
        return not (self.is_orphaned() or self.store.is_stopped(self.run))

    def is_orphaned(self) -> bool:
        """Tell, in a worker, whether its driver has died.

        Returns:
            False also in the driver itself.
        """
        return self.driver not in (0, os.getpid(), os.getppid())


def serve(plan: Plan, number: int) -> None:
    """Work on one group after another until every cell has a record, or the driver is gone.

    Args:
        plan: the grid.
        number: of this worker, from 0; it begins with the group of this number.
    """
    # Ray sets the variable for each of its workers. What survived an earlier worker may still use these devices.
    slots = plan.slots or (f"cuda-{os.environ['CUDA_VISIBLE_DEVICES']}",)
    while plan.is_wanted() and (left := plan.left()):
        if not _take_one(plan, [*left[number:], *left[:number]], slots):
            time.sleep(PAUSE_SECONDS)
    if plan.is_orphaned():
        os._exit(1)  # joblib's worker would wait for more


def _take_one(plan: Plan, groups: Sequence[Group], slots: Sequence[str]) -> bool:
    """Finish the first group that is free, on a device that is free."""
    with _slot(slots) as slot:
        if slot is None:
            return False
        for group in groups:
            # The process of a worker that was killed goes on, and it alone holds the second claim.
            if plan.store.is_held(group.key) or plan.store.is_held(f"{group.key}.child"):
                continue
            with plan.store.claim(group.key) as ours:
                if ours:
                    _finish(plan, group, slot=slot)
                    return True
    return False


def _finish(plan: Plan, group: Group, *, slot: Slot) -> None:
    """Start processes for a group until each of its cells has a record."""
    crashes, batch_size = Counter[str](), plan.batch_size
    while plan.is_wanted() and plan.store.missing(group.cells):
        code = _child(plan, group, batch_size=batch_size, slot=slot)
        missing = plan.store.missing(group.cells)
        if code in (BUSY, STOPPED) or not missing:
            return
        if code == PROGRESS:
            batch_size = plan.batch_size
        elif code == MEMORY:
            batch_size = max(1, batch_size // 2)
        else:
            cell = missing[0]  # cells are computed in their order
            crashes[cell["id"]] += 1
            count = crashes[cell["id"]]
            if count == plan.attempts:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                reason = f"its process {how} ({count} time{'s' * (count > 1)}), at last with a batch size of {batch_size}"
                plan.store.write(Record(cell["settings"], cell["code"], cell["data"], "failed", reason=reason))
                batch_size = plan.batch_size
            elif code == -9:  # what the system does when memory runs out; the last attempt is the smallest
                batch_size = max(1, batch_size // 2) if count < plan.attempts - 1 else 1


def _child(plan: Plan, group: Group, *, batch_size: int, slot: Slot) -> int:
    """Run one process and return its exit code, negative for a signal."""
    task = {"work": plan.work, "shared": group.shared, "cells": group.cells, "batch_size": batch_size}
    task |= {"run": plan.run, "stale": plan.store.stale}
    log = plan.store.log(group.key)
    log.parent.mkdir(parents=True, exist_ok=True)
    read, write = os.pipe()
    with os.fdopen(read) as pipe:
        with log.open("a", encoding="utf-8") as output:
            subprocess.run(
                [sys.executable, "-m", "lib.grid.run.cell_process", str(plan.store.folder), group.key, str(write)],
                input=json.dumps(task).encode(),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=environment.ROOT,
                env=_variables(plan, slot.name),
                pass_fds=(write, *slot.locks),  # a device stays locked for as long as its process lives
                check=False,
            )
        os.close(write)
        answer = pipe.read()
    if log.exists() and not log.stat().st_size:
        log.unlink(missing_ok=True)
    return int(answer) if answer else LOST


def _variables(plan: Plan, slot: str) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": str(plan.threads), "PYTHONFAULTHANDLER": "1"}
    if slot.startswith("cuda-"):
        own["CUDA_VISIBLE_DEVICES"] = slot.removeprefix("cuda-")
    if hub.problem():  # every file and data set, cached ones too, would be asked for in vain for half a minute
        own["HF_HUB_OFFLINE"] = "1"
    return dict(os.environ) | environment.settings() | own


@contextmanager
def _slot(names: Sequence[str]) -> Iterator[Slot | None]:
    """Lock the first of this machine's slots that is free; the system opens a lock when its last holder has ended."""
    for name in names:
        kind, _, devices = name.partition("-")
        handles = [_lock_file(f"{kind}-{device}") for device in devices.split(",") if device]
        try:
            for handle in handles:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            for handle in handles:
                os.close(handle)
            continue
        try:
            yield Slot(name, tuple(handles))
        finally:
            for handle in handles:
                os.close(handle)
        return
    yield None


def _lock_file(name: str) -> int:
    folder = Path(tempfile.gettempdir()) / f"sinks-slots-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return os.open(folder / name.replace("/", "_"), os.O_RDWR | os.O_CREAT, 0o600)

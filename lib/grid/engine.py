"""Compute the cells of a grid on Ray, on one machine or on many: a group of cells is a task, and a fresh process each time.

What is killed (a process, a machine, or this driver) costs the cells in progress; the next run goes on from the records.
"""

import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from lib.core import environment
from lib.core.errors import InputError, require
from lib.grid import cluster
from lib.grid.group import Group, Order, compute, fail
from lib.grid.store import Store, cell_id

PROGRESS_SECONDS = 1.0
LINE_SECONDS = 15.0  # between two lines of progress: a line for each of thousands of cells would fill the screen
Say = Callable[[str], None]


@dataclass(frozen=True)
class Summary:
    """What the store holds for the cells of a run."""

    cells: int
    computed: int  # since the run began, by this driver or another one
    failed: tuple[str, ...]
    not_tested: tuple[str, ...]


class DiedError(RuntimeError):
    """The processes of a cell died."""


def run(
    groups: Sequence[Group],
    *,
    store: Store,
    work: str,
    batch_size: int,
    say: Say,
    jobs: int | None = None,
    address: str | None = None,
    gpus_per_group: float = 0,
    attempts: int = 3,
    keep_failed: bool = True,
) -> Summary:
    """Compute every cell that has no record.

    Args:
        groups: the grid.
        store: where the records go; a folder that all machines share, like the repository.
        work: as in `group.Order`.
        batch_size: what a cell begins with; halved when memory runs out.
        say: takes each line of progress.
        jobs: groups at one time; None for as many as get their GPUs, or one on CPUs.
        address: of a running Ray cluster, `auto` for the one that this machine belongs to; None starts one here.
        gpus_per_group: GPUs of one process, which sees no others; a part of one shares it.
        attempts: how often a cell may end its process.
        keep_failed: leave the records of cells that failed or were not tested; else these are computed again.

    Returns:
        Counts and ids.

    Raises:
        InputError: the grid or the cluster cannot be used, or a file of the store is no record of its cell.
    """
    _check(groups, work=work, jobs=1 if jobs is None else jobs, attempts=attempts, batch_size=batch_size)
    store = replace(store, folder=store.folder.resolve())  # other processes have other working folders
    store.folder.mkdir(parents=True, exist_ok=True)
    if not keep_failed:
        _drop_failed(groups, store)
    before = summary(groups, store)
    progress = _Progress(groups, store, say)
    progress.show(final=False)
    left = [group for group in groups if store.missing(group.cells)]
    if left:
        with cluster.connected(address, jobs=jobs, gpus_per_group=gpus_per_group) as room:
            order = Order(store, work, batch_size, attempts, room.threads)
            _drive(left, order, room, gpus_per_group, progress)
    store.tidy()
    progress.show(final=True)
    after = summary(groups, store)
    return replace(after, computed=after.computed - before.computed)


def summary(groups: Sequence[Group], store: Store) -> Summary:
    """Read every record of a grid, so that a damaged one is known before hours of work.

    Args:
        groups: the grid.
        store: its records.

    Returns:
        With all records counted as computed.

    Raises:
        InputError: a file of the store is no record of its cell.
    """
    cells = [cell["id"] for group in groups for cell in group.cells]
    status = {cell: record.status for cell in cells if (record := store.read(cell))}
    failed, not_tested = (tuple(sorted(c for c in status if status[c] == kind)) for kind in ("failed", "not tested"))
    return Summary(len(cells), len(status), failed, not_tested)


def _check(groups: Sequence[Group], *, work: str, jobs: int, attempts: int, batch_size: int) -> None:
    """Check what needs no look at the records."""
    for name, value in (("jobs", jobs), ("attempts", attempts), ("batch_size", batch_size)):
        require(value >= 1, f"{name} must be at least 1", str(value), "give a whole number from 1")
    module, _, function = work.partition(":")
    known = function.isidentifier() and importlib.util.find_spec(module) is not None
    require(known, "work must be module:function", repr(work), "name a module that can be imported")
    cells = [cell for group in groups for cell in group.cells]
    for what, names in (("group", [group.key for group in groups]), ("cell", [cell["id"] for cell in cells])):
        twice = [name for name, count in Counter(names).items() if count > 1]
        require(not twice, f"a {what} must be in the grid once", f"{twice[:1]} twice", "leave one out")
    for cell in cells:
        name = cell_id(cell["settings"], code=cell["code"], data=cell["data"])
        require(cell["id"] == name, "the id of a cell must be that of its settings", str(cell["id"]), f"use cell_id: {name}")


def _drop_failed(groups: Sequence[Group], store: Store) -> None:
    found = summary(groups, store)
    for cell in (*found.failed, *found.not_tested):
        store.drop(cell)


def _drive(groups: Sequence[Group], order: Order, room: cluster.Room, gpus: float, progress: "_Progress") -> None:
    """Keep as many groups at work as there is room for, until each cell has a record."""
    waiting, running = list(groups), {}
    task = _task(room.ray, order, gpus)
    try:
        while waiting or running:
            while len(running) < room.groups and (group := _next(waiting, [group for group, _ in running.values()])) is not None:
                waiting.remove(group)
                running[task.remote(group, order, str(environment.ROOT))] = group, len(order.store.missing(group.cells))
            ready, _ = room.ray.wait(list(running), timeout=PROGRESS_SECONDS)
            for reference in ready:
                group, before = running.pop(reference)
                _settle(room.ray, reference, group, order, before=before)
                if order.store.missing(group.cells):
                    waiting.insert(0, group)  # behind a cell that failed the others need a fresh process
            progress.show(final=False)
    finally:  # after an interrupt: what is finished stays
        for reference in running:
            room.ray.cancel(reference, force=True)


def _next(waiting: Sequence[Group], running: Sequence[Group]) -> Group | None:
    """Return the first group that waits for none of those at work."""
    taken = {group.lane for group in running} - {""}
    return next((group for group in waiting if group.lane not in taken), None)


def _settle(ray: Any, reference: Any, group: Group, order: Order, *, before: int) -> None:
    """Record the cell at which a group's processes died too often; `before` counts the cells that were to be computed."""
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # a full disk, say: whatever a cell raises is recorded by the task itself
        cause = " ".join(str(error.cause).split())
        raise InputError(
            f"a process of the grid must be able to write its records, got {cause}: mend that and run again"
        ) from error
    except (ray.exceptions.RuntimeEnvSetupError, ray.exceptions.RaySystemError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"Ray must be able to start processes, got {said}: mend that and run again") from error
    except ray.exceptions.RayError as error:
        missing = order.store.missing(group.cells)
        for cell in missing[:1] if len(missing) == before else []:  # else others died, and this one has its own attempts
            died = f"its process died {order.attempts} time{'s' * (order.attempts > 1)}, at last while it was computed"
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            fail(order.store, cell, DiedError(f"{died}: {said}"))


def _task(ray: Any, order: Order, gpus: float) -> Any:
    """Make the remote function: spread over the machines, a process that ends with it, tried again when that is killed."""
    options = {"num_cpus": 1, "num_gpus": gpus, "max_calls": 1, "max_retries": order.attempts - 1}
    return ray.remote(**options, scheduling_strategy="SPREAD")(_compute)


def _compute(group: Group, order: Order, root: str) -> None:
    """Run in a process of Ray."""
    import os

    from ray._private.worker import global_worker  # Ray counts its attempts, but says the number here alone

    os.chdir(root)
    compute(group, order, attempt=cast(Any, global_worker).core_worker.get_current_task_attempt_number())


@dataclass
class _Progress:
    """Says a line when cells were finished, by whomever, and some time has passed."""

    groups: Sequence[Group]
    store: Store
    say: Say
    began: float = field(default_factory=time.monotonic)
    first: int = -1
    last: int = -1
    due: float = 0.0

    def show(self, *, final: bool) -> None:
        """Say how far the grid is."""
        cells = [cell for group in self.groups for cell in group.cells]
        count, seconds = len(cells) - len(self.store.missing(cells)), time.monotonic() - self.began
        self.first = count if self.first < 0 else self.first
        if count != self.last and (final or seconds >= self.due):
            self.last, self.due = count, seconds + LINE_SECONDS
            self.say(_line(summary(self.groups, self.store), new=count - self.first, seconds=seconds))


def _line(found: Summary, *, new: int, seconds: float) -> str:
    """Word one line of progress.

    >>> _line(Summary(10, 4, ("a",), ()), new=2, seconds=60.0)
    'cells: 4 of 10 finished, 1 failed; about 3 min left'
    """
    troubles = [f"{len(cells)} {what}" for cells, what in ((found.failed, "failed"), (found.not_tested, "not tested")) if cells]
    line = ", ".join([f"cells: {found.computed} of {found.cells} finished", *troubles])
    left = (found.cells - found.computed) * seconds / max(1, new)
    shown = f"{left / 3600:.1f} h" if left >= 3600 else f"{left / 60:.0f} min" if left >= 60 else f"{left:.0f} s"
    return f"{line}; about {shown} left" if left and new else line

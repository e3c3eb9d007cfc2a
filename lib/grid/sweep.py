"""Run the cells of a grid with joblib's workers, on this machine or on a Ray cluster, which share the work through the store.

A group of cells is computed by one process (`lib.grid.cell_process`) that a worker watches (`lib.grid.supervisor`). A process, a
worker, a driver or a machine that is killed costs the cell in progress; whoever comes next takes the group over.
"""

import importlib.util
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import joblib

from lib.core import environment
from lib.core.errors import InputError, require
from lib.grid import cluster
from lib.grid.leases import BEAT_SECONDS
from lib.grid.store import Store, cell_id
from lib.grid.supervisor import PAUSE_SECONDS, Group, Plan, serve

__all__ = ["Group", "Summary", "run"]

PROGRESS_SECONDS = 1.0
LINE_SECONDS = 15.0  # between two lines of progress: a line for each of thousands of cells would fill the screen
IDLE_SECONDS = 10  # after which joblib's workers end
SETBACKS = 10  # pools that may break one after another without a finished cell
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of CUDA, ROCm, and either on Windows' Linux
Say = Callable[[str], None]


@dataclass(frozen=True)
class Summary:
    """What the store holds for the cells of a run."""

    cells: int
    computed: int  # since the run began, by this driver or another one
    failed: tuple[str, ...]
    not_tested: tuple[str, ...]


def run(
    groups: Sequence[Group],
    *,
    store: Store,
    work: str,
    jobs: int,
    engine: Literal["loky", "ray"] = "loky",
    ray_address: str | None = None,
    gpus_per_cell: float = 0,
    attempts: int = 3,
    batch_size: int,
    say: Say,
    keep_failed: bool = True,
) -> Summary:
    """Compute every cell that has no record.

    Args:
        groups: the grid.
        store: where the records go; under Ray a folder that all machines share, like the repository.
        work: `module:function` of a function that takes `shared`, the missing cells and `batch_size`, and gives for each cell in
            turn `(id, result)`, or `(id, exception)` where that cell failed and the others can go on. What it raises fails the
            cell in progress; for the cells after it the function is called again, in a fresh process.
        jobs: processes at a time; with GPUs at most as many as get theirs.
        engine: `loky` on this machine, `ray` on a cluster.
        ray_address: of a running cluster, `auto` for the one that this machine belongs to; None starts one here.
        gpus_per_cell: GPUs of one process, which sees no others; with loky a whole number, and 1 for 0 where there are any.
        attempts: how often a cell may kill its process.
        batch_size: what a cell begins with; halved when memory runs out.
        say: takes each line of progress.
        keep_failed: leave the records of cells that failed or were not tested; else these are computed again.

    Returns:
        Counts and ids.

    Raises:
        InputError: the grid or the engine cannot be used, or a file of the store is no record of its cell.
        RuntimeError: workers died again and again without a finished cell.
    """
    _check(groups, store, work=work, jobs=jobs, attempts=attempts, batch_size=batch_size)
    store = replace(store, folder=store.folder.resolve())  # other processes have other working folders
    store.folder.mkdir(parents=True, exist_ok=True)
    if not keep_failed:
        _drop_failed(groups, store)
    before = _summary(groups, store)
    plan = Plan(tuple(groups), store, work, attempts, batch_size, run=uuid4().hex)
    try:
        with _progress(groups, store, say=say), _engine(plan, engine, ray_address, jobs, gpus_per_cell) as (plan, workers, how):
            _drive(plan, workers, how, say=say)
    except KeyboardInterrupt:
        _stop(plan)
        raise
    store.tidy()
    after = _summary(groups, store)
    return replace(after, computed=after.computed - before.computed)


def _check(groups: Sequence[Group], store: Store, *, work: str, jobs: int, attempts: int, batch_size: int) -> None:
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
    for group in groups:
        store.is_held(group.key)  # refuses a key that is no file name
    for cell in cells:
        name = cell_id(cell["settings"], code=cell["code"], data=cell["data"])
        require(cell["id"] == name, "the id of a cell must be that of its settings", str(cell["id"]), f"use cell_id: {name}")


def _drop_failed(groups: Sequence[Group], store: Store) -> None:
    summary = _summary(groups, store)
    for cell in (*summary.failed, *summary.not_tested):
        store.drop(cell)


def _summary(groups: Sequence[Group], store: Store) -> Summary:
    """Read every record of the grid, so that a damaged one is known before hours of work."""
    store.ids()
    cells = [cell["id"] for group in groups for cell in group.cells]
    status = {cell: record.status for cell in cells if (record := store.read(cell))}
    failed, not_tested = (tuple(sorted(c for c in status if status[c] == kind)) for kind in ("failed", "not tested"))
    return Summary(len(cells), len(status), failed, not_tested)


@contextmanager
def _engine(plan: Plan, engine: str, address: str | None, jobs: int, gpus: float) -> Iterator[tuple[Plan, int, dict[str, Any]]]:
    """Settle how many workers there are, what each gets, and how joblib starts them."""
    if not plan.left():
        yield plan, 0, {}
    elif engine == "ray":
        with cluster.pool(address, jobs=jobs, gpus_per_worker=gpus) as (workers, threads, options):
            # Ray gives each worker its GPUs; a share of one cannot be locked.
            yield replace(plan, threads=threads, slots=() if gpus >= 1 else ("",)), workers, options
    else:
        rule, remedy = "GPUs of a process must be a whole number without Ray", "use Ray, which shares GPUs among processes"
        require(float(gpus).is_integer(), rule, f"{gpus:g}", remedy)
        slots = _slots(jobs, max(1, int(gpus)))
        threads = max(1, environment.physical_cores() // len(slots))
        plan = replace(plan, slots=slots, threads=threads, driver=os.getpid())
        yield plan, len(slots), {"backend": "loky", "idle_worker_timeout": IDLE_SECONDS}


def _slots(jobs: int, gpus: int) -> tuple[str, ...]:
    """Name what one process at a time may have of this machine: its GPUs, so many together, or else one of `jobs` shares."""
    visible: list[str] = []
    if any(Path(file).exists() for file in GPU_FILES):
        import torch  # takes seconds, so only where there may be something to find

        numbers = [str(number) for number in range(torch.cuda.device_count())]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(numbers)).split(",")[: len(numbers)]
    bundles = [",".join(visible[first : first + gpus]) for first in range(0, len(visible), gpus)]
    whole = tuple(f"cuda-{bundle}" for bundle in bundles if bundle.count(",") == gpus - 1)
    require(bool(whole) or not visible, "a process must have its GPUs", f"{len(visible)} GPUs, {gpus} wanted", "ask for fewer")
    return whole[:jobs] or tuple(f"cpu-{number}" for number in range(jobs))


def _drive(plan: Plan, workers: int, options: Mapping[str, Any], *, say: Say) -> None:
    """Let a pool of workers finish the grid; a pool that breaks, because one of its workers was killed, is made anew."""
    setbacks, count = 0, len(plan.store.ids())
    while plan.left():
        try:
            with joblib.parallel_config(**options):
                tasks = (joblib.delayed(serve)(plan, number) for number in range(workers))
                joblib.Parallel(n_jobs=workers, pre_dispatch="all")(tasks)
        except InputError:
            raise
        except Exception as error:  # of a kind of its own in each engine
            before, count = count, len(plan.store.ids())
            setbacks = setbacks + 1 if count == before else 0
            if setbacks == SETBACKS:
                raise RuntimeError(f"{SETBACKS} pools of workers broke and no cell was finished, the last by: {error}") from error
            say(f"a worker died ({type(error).__name__}): new ones go on")
            time.sleep(PAUSE_SECONDS)


def _stop(plan: Plan) -> None:
    """End the processes of this run, and give those of this machine the time to go."""
    plan.store.stop(plan.run)
    last = time.monotonic() + 3 * BEAT_SECONDS
    while time.monotonic() < last and any(plan.store.is_held(f"{group.key}.child") for group in plan.groups):
        time.sleep(PAUSE_SECONDS)


@contextmanager
def _progress(groups: Sequence[Group], store: Store, *, say: Say) -> Iterator[None]:
    """Say a line whenever cells were finished, by whomever."""
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(groups, store, say, ended), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(groups: Sequence[Group], store: Store, say: Say, ended: threading.Event) -> None:
    cells = [cell for group in groups for cell in group.cells]
    began, first, last, due = time.monotonic(), len(cells) - len(store.missing(cells)), -1, 0.0
    while True:
        final = ended.wait(0 if last < 0 else PROGRESS_SECONDS)
        with suppress(InputError):  # a damaged store is the driver's to report
            count = len(cells) - len(store.missing(cells))
            seconds = time.monotonic() - began
            if count != last and (final or seconds >= due):
                last, due = count, seconds + LINE_SECONDS
                say(_line(_summary(groups, store), new=count - first, seconds=seconds))
        if final:
            return


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

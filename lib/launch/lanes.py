"""Several notebooks side by side: small tensors keep one core busy, so two notebooks of one thread beat one of two."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil

from lib.launch import execution
from lib.launch.execution import Job, Outcome, Running

ALONE = ("06",)  # measures times, so nothing may run beside it, and it has all threads
LOOK_SECONDS = 0.2  # from one look at memory to the next, at least
RESTS = 20  # times as long as a look takes: pages of large processes take long to count


@dataclass
class Peak:
    """The most memory that a run and all its processes held at one time, in bytes; shared pages count once.

    Attributes:
        bytes: of all together.
        of: of each notebook with its kernel, by number.
    """

    bytes: int = 0
    of: dict[str, int] = field(default_factory=dict)
    _process: psutil.Process = field(default_factory=psutil.Process, repr=False)

    def look(self, running: Sequence[Running] = ()) -> None:
        """Measure now."""
        now = {each.job.number: _held_by_all(each.process.pid) for each in running}
        self.of |= {number: max(found, self.of.get(number, 0)) for number, found in now.items()}
        self.bytes = max(self.bytes, _held(self._process) + sum(now.values()))


def lanes_for(jobs: int, *, threads: int, has_gpu: bool) -> int:
    """Return how many notebooks run at one time unless the user says: two where each has a core, one on a GPU.

    >>> lanes_for(6, threads=2, has_gpu=False), lanes_for(1, threads=2, has_gpu=False), lanes_for(6, threads=8, has_gpu=True)
    (2, 1, 1)
    """
    return 1 if has_gpu else max(1, min(2, threads, jobs))


def side_by_side(jobs: Sequence[Job], *, lanes: int, threads: int, peak: Peak) -> Iterator[tuple[Job, Outcome]]:
    """Run notebooks, as many at one time as there are lanes, and yield each when it is finished.

    Args:
        jobs: in the order in which they are begun; those that measure times come last, one by one.
        lanes: notebooks at one time, which share the threads.
        threads: of all lanes together.
        peak: takes the memory.

    Raises:
        NotebookError: the first that failed; OSError where its record cannot be written. No other is begun then, but those that
            run are waited for: they stay.
    """
    waiting = sorted(jobs, key=lambda job: job.number in ALONE)
    running: list[Running] = []
    failed: list[Exception] = []
    try:
        while running or (waiting and not failed):
            while waiting and not failed and _may_begin(waiting[0], running, lanes):
                job = waiting.pop(0)
                own = threads if job.number in ALONE else max(1, threads // lanes)
                running.append(execution.begin(job, threads=own, line=_free_line(running)))
            done = _first_done(running, peak)
            running.remove(done)
            try:
                yield done.job, execution.finish(done, peak=peak.of.get(done.job.number))
            except Exception as error:  # also of a full disk: the others may have written what they need
                failed.append(error)
    finally:
        for left in running:
            execution.stop(left)
    if failed:
        raise failed[0]


def threads_given() -> int:
    """Return the number of threads that the launcher, or the user, put into OMP_NUM_THREADS (of `4,1` the first)."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdigit() and int(text) > 0 else 1


def _may_begin(job: Job, running: Sequence[Running], lanes: int) -> bool:
    if job.number in ALONE or any(each.job.number in ALONE for each in running):
        return not running
    return len(running) < lanes


def _free_line(running: Sequence[Running]) -> int:
    """Return the first line of the terminal that no running notebook's bar takes."""
    return next(line for line in range(len(running) + 1) if line not in {each.line for each in running})


def _first_done(running: Sequence[Running], peak: Peak) -> Running:
    """Wait until one of several notebooks has ended."""
    while True:
        for each in running:
            if each.process.poll() is not None:
                return each
        started = time.perf_counter()
        peak.look(running)
        time.sleep(max(LOOK_SECONDS, RESTS * (time.perf_counter() - started)))


def _held_by_all(pid: int) -> int:
    """Return the memory of a process and of all that it started, 0 when it has just ended."""
    try:
        process = psutil.Process(pid)
        found = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    return sum(map(_held, found))


def _held(process: psutil.Process) -> int:
    """Return the memory of one process, 0 when it has just ended."""
    try:
        found = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(found, "pss", 0) or found.uss)

"""Notebooks side by side: as many at one time as there are lanes, those that measure times alone, and failures cost no other."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from lib.core.environment import ROOT
from lib.core.errors import InputError
from lib.launch import batch, execution, lanes
from lib.launch.execution import Job, NotebookError, Outcome, Running
from lib.launch.lanes import Peak

SLEEP = "import sys, time; time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"


class Fake:
    """Stands for notebooks: processes that sleep, and end with a code."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        *,
        seconds: float = 0.3,
        failing: Sequence[str] = (),
        error: type[Exception] = NotebookError,
    ) -> None:
        self.seconds, self.failing, self.error = seconds, failing, error
        self.events: list[tuple[str, str, int]] = []  # what happened, to which notebook, threads or how many others ran
        self.running: list[Running] = []
        self.peaks: dict[str, int | None] = {}
        patch.setattr(execution, "begin", self.begin)
        patch.setattr(execution, "finish", self.finish)

    def begin(self, job: Job, *, threads: int, line: int) -> Running:
        assert line not in {each.line for each in self.running}, "two bars on one line"
        words = [sys.executable, "-c", SLEEP, str(self.seconds), str(int(job.number in self.failing))]
        self.events.append(("begun", job.number, threads))
        said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.running.append(Running(job, subprocess.Popen(words, stdout=said), said, time.monotonic(), line))
        return self.running[-1]

    def finish(self, running: Running, *, peak: int | None) -> Outcome:
        self.peaks[running.job.number] = peak
        running.process.wait()
        running.said.close()
        self.running.remove(running)
        self.events.append(("ended", running.job.number, len(self.running)))
        if running.process.returncode:
            raise self.error(f"{running.job.number} failed")
        return Outcome((), 1.0)


def jobs(*numbers: str) -> list[Job]:
    return [Job(number, Path(f"{number}_x.ipynb"), "quick", 0, {}, "print", Path()) for number in numbers]


def finished(numbers: Sequence[str], **options: Any) -> list[str]:
    given = {"lanes": 2, "threads": 4, "peak": Peak()} | options
    return [job.number for job, _ in lanes.side_by_side(jobs(*numbers), **given)]


def test_two_run_at_one_time_and_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch)
    assert sorted(finished(["01", "02", "03"])) == ["01", "02", "03"]
    assert [event[0] for event in fake.events[:3]] == ["begun", "begun", "ended"]
    assert {threads for what, _, threads in fake.events if what == "begun"} == {2}


@pytest.mark.parametrize("order", [["06", "01", "02"], ["01", "06", "02"]])
def test_what_measures_times_runs_last_alone_with_all_threads(order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch)
    assert finished(order)[-1] == "06"
    assert fake.events[-2:] == [("begun", "06", 4), ("ended", "06", 0)]
    assert [number for _, number, _ in fake.events].index("06") == 4, "only when the others had ended"


def test_one_lane_is_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, seconds=0.05)
    assert finished(["01", "02"], lanes=1) == ["01", "02"]
    assert [event[:2] for event in fake.events] == [("begun", "01"), ("ended", "01"), ("begun", "02"), ("ended", "02")]


@pytest.mark.parametrize("error", [NotebookError, InputError, OSError])
def test_a_failure_begins_no_other_and_waits_for_those_that_run(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    fake, seen = Fake(monkeypatch, failing=["01"], error=error), []
    with pytest.raises(error, match="01 failed"):
        for job, _ in lanes.side_by_side(jobs("01", "02", "03"), lanes=2, threads=2, peak=Peak()):
            seen.append(job.number)
    assert seen == ["02"] and not fake.running
    assert ("begun", "03", 1) not in fake.events


def test_a_notebook_that_says_more_than_a_pipe_holds_is_not_waited_for_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    kernel, begun = "k" * 200_000, time.monotonic()  # which the error tells
    cells = {"cells": [], "metadata": {"kernelspec": {"name": kernel, "display_name": "", "language": "python"}}}
    (tmp_path / "01_x.ipynb").write_text(json.dumps({**cells, "nbformat": 4, "nbformat_minor": 5}))

    def look(self: Peak, running: object) -> None:
        assert time.monotonic() < begun + 60, "the process waits for a reader"

    monkeypatch.setattr(Peak, "look", look)
    job = Job("01", tmp_path / "01_x.ipynb", "quick", 0, {}, "print", tmp_path)
    with pytest.raises(NotebookError, match=kernel):
        list(lanes.side_by_side([job], lanes=1, threads=1, peak=Peak()))


def test_an_interrupt_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, seconds=60)
    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", lambda self, timeout=None: None if timeout else wait(self))  # no grace period

    def interrupt(self: Peak, running: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Peak, "look", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finished(["01", "02"])
    assert [each.process.poll() is not None for each in fake.running] == [True, True]


def test_the_peak_counts_all_processes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, peak = Fake(monkeypatch, seconds=2), Peak()
    sizes = "data = bytearray(80 * 2**20); data[::4096] = b'x' * len(data[::4096]); " + SLEEP
    monkeypatch.setattr(sys.modules[__name__], "SLEEP", sizes)
    own = psutil.Process(os.getpid()).memory_full_info().rss
    list(lanes.side_by_side(jobs("01", "02"), lanes=2, threads=2, peak=peak))
    assert not fake.running
    assert 160 * 2**20 < peak.bytes < own + 2**20 * 400
    assert fake.peaks == peak.of and all(80 * 2**20 < peak.of[number] < 200 * 2**20 for number in ("01", "02"))


@pytest.mark.parametrize(
    ("count", "threads", "has_gpu", "expected"),
    [(6, 2, False, 2), (6, 1, False, 1), (6, 16, False, 2), (1, 16, False, 1), (6, 16, True, 1), (0, 2, False, 1)],
)
def test_lanes_follow_the_machine(count: int, threads: int, has_gpu: bool, expected: int) -> None:
    assert lanes.lanes_for(count, threads=threads, has_gpu=has_gpu) == expected


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("4,1", 4), ("0", 1), ("many", 1), ("", 1)])
def test_threads_are_those_of_the_environment(text: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert lanes.threads_given() == threads


@pytest.mark.parametrize(
    ("numbers", "at_once", "threads", "said"),
    [
        (["01"], 4, {"01": 8}, "8 threads"),
        (["01", "06"], None, {"01": 8, "06": 8}, "8 threads"),
        (["01", "02", "06"], 6, {"01": 4, "02": 4, "06": 8}, "2 notebooks at one time, 8 threads together"),
    ],
)
def test_lanes_that_stay_empty_hold_no_threads(
    numbers: list[str], at_once: int | None, threads: dict[str, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    fake, lines = Fake(monkeypatch, seconds=0.01), []
    monkeypatch.setattr(batch, "_build_report", lambda _: "page")
    monkeypatch.setattr(batch, "_has_gpu", lambda _: False)
    chosen = [replace(job, output=tmp_path) for job in jobs(*numbers)]
    monkeypatch.setattr(batch, "_wrote", lambda _: "")
    batch.run(chosen, say=lines.append, at_once=at_once)
    assert {number: given for what, number, given in fake.events if what == "begun"} == threads
    assert f"; {said}, Python" in lines[0]

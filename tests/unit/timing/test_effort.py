"""What work takes: its seconds, and the memory beyond what was there before, also where free pages were kept."""

import math
import sys
import time

import pytest
import torch

from lib.timing import effort
from lib.timing.effort import Effort, watched

CPU = torch.device("cpu")
MEGABYTE = 2**20


def work(megabytes: int) -> int:
    """Fill that many megabytes, wait a little, and let them go."""
    held = torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)
    time.sleep(0.02)
    return len(held) * int(held[-1])


def test_seconds_are_those_of_the_work_and_its_result_comes_back() -> None:
    result, took = watched(lambda: work(1), device=CPU)
    assert result == MEGABYTE and 0.02 <= took.seconds < 5.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells the highest size of a process")
def test_memory_is_the_peak_of_this_work_alone() -> None:
    """What was there before does not count, nor does what an earlier and larger work took."""
    there = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    large = watched(lambda: work(200), device=CPU)[1].peak
    small = watched(lambda: work(40), device=CPU)[1].peak
    assert int(there[0]) == 1
    assert 190 * MEGABYTE < large < 260 * MEGABYTE and 35 * MEGABYTE < small < 90 * MEGABYTE


def test_where_nothing_counts_memory_it_is_not_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(effort, "PROCESS", effort.Path(str(tmp_path)) / "none")
    took = watched(lambda: 1, device=CPU)[1]
    assert math.isnan(took.peak) and took.seconds >= 0.0


def test_one_after_the_other_adds_seconds_and_keeps_the_larger_peak() -> None:
    assert Effort(1.0, 2.0).then(Effort(3.0, 5.0)) == Effort(4.0, 5.0) == Effort(1.0, 5.0).then(Effort(3.0, 2.0))
    for both in (Effort(1.0, 2.0).then(Effort(1.0)), Effort(1.0).then(Effort(1.0, 2.0))):
        assert both.seconds == 2.0 and math.isnan(both.peak)

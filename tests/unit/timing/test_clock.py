"""Timing with a clock that the calls themselves move: what is counted, in which order, and how a speed-up is formed."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.core.errors import InputError
from lib.timing import clock as timing

positive = st.floats(1e-3, 1e3)


class Clock:
    """A clock that stands still except in calls, and a log of what was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 100.0, list[str]()
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: list[float]) -> Callable[[], None]:
        """A call that takes the given times, one after another."""
        left = iter(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += next(left)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_calls_take_turns_and_warm_up_does_not_count(clock: Clock) -> None:
    calls = {"a": clock.call("a", [64.0, 32.0, 1.0, 2.0, 4.0]), "b": clock.call("b", [64.0, 32.0, 8.0, 0.5, 0.25])}
    found = timing.interleaved(calls, repeats=3)
    assert clock.log == ["a", "b"] * 5  # two rounds to warm up, then three
    assert {name: values.tolist() for name, values in found.items()} == {"a": [1.0, 2.0, 4.0], "b": [8.0, 0.5, 0.25]}
    assert list(found) == ["a", "b"] and found["a"].dtype == torch.float64


@pytest.mark.parametrize("warm_up", [0, 1, 3])
def test_as_many_rounds_warm_up_as_asked(clock: Clock, warm_up: int) -> None:
    found = timing.interleaved({"a": clock.call("a", [50.0] * warm_up + [3.0, 5.0])}, repeats=2, warm_up=warm_up)
    assert found["a"].tolist() == [3.0, 5.0] and len(clock.log) == warm_up + 2


def test_a_cuda_device_finishes_its_work_before_and_after_each_call(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the queue when a call begins belongs to the call before; what a call leaves in the queue belongs to it."""

    def wait(device: torch.device) -> None:
        clock.log.append("wait")
        clock.now += 7.0 if clock.log[-2:-1] == ["a"] else 1000.0

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    found = timing.interleaved({"a": clock.call("a", [1.0, 2.0])}, repeats=2, warm_up=0, device=torch.device("cuda"))
    assert clock.log == ["wait", "a", "wait"] * 2
    assert found["a"].tolist() == [8.0, 9.0]


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_nothing_is_waited_for_on_a_cpu(clock: Clock, device: torch.device | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: pytest.fail("no CUDA here"))
    timing.interleaved({"a": clock.call("a", [1.0])}, repeats=1, warm_up=0, device=device)


def test_no_gradients_are_kept_while_timing() -> None:
    seen = []
    timing.interleaved({"a": lambda: seen.append(torch.is_inference_mode_enabled())}, repeats=1)
    assert seen == [True] * 3


@pytest.mark.parametrize(("names", "repeats"), [([], 3), (["a"], 0), (["a"], -1)])
def test_nothing_to_time_is_refused_before_anything_runs(names: list[str], repeats: int) -> None:
    calls = {name: lambda: pytest.fail("must not run") for name in names}
    with pytest.raises(InputError, match=f"timing must have calls and repeats >= 1, got {len(names)} and {repeats}: give some"):
        timing.interleaved(calls, repeats=repeats)


def test_a_speed_up_is_that_of_rounds_not_of_medians() -> None:
    """The machine became ten times slower in rounds 3 to 5, and hit both: each round says 2, the medians say 10 or 0.2."""
    other = torch.tensor([1.0, 1.0, 10.0, 10.0, 10.0])
    assert timing.speed_up(2 * other, other) == (2.0, 2.0, 2.0)
    baseline, unequal = torch.tensor([1.0, 2.0, 30.0]), torch.tensor([2.0, 1.0, 10.0])
    assert timing.speed_up(baseline, unequal)[0] == pytest.approx(2.0)  # ratios 0.5, 2, 3; of medians 1, of means 2.54
    assert timing.speed_up(baseline, unequal)[1:] == pytest.approx((1.25, 2.5))


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=9), st.lists(positive, min_size=9, max_size=9))
def test_a_drift_of_the_machine_changes_no_speed_up(pairs: list[tuple[float, float]], drift: list[float]) -> None:
    baseline, other = torch.tensor(pairs, dtype=torch.float64).T
    factor = torch.tensor(drift[: len(pairs)], dtype=torch.float64)
    middle, low, high = timing.speed_up(baseline, other)
    assert low <= middle <= high
    assert timing.speed_up(baseline * factor, other * factor) == pytest.approx((middle, low, high), rel=1e-9)

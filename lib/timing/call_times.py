"""Times of short calls: as many in a round as a clock can tell, peak memory, what a kernel refuses, and the machine's name."""

import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from scipy.stats import binom
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lib.core.errors import InputError, require
from lib.core.hub import first_line
from lib.timing.clock import interleaved

LEAST_ROUND = 1e-3  # seconds of one timed call: a clock's own cost, under a microsecond, then does not show
LEAST_REPEATS = 3  # below this there are no quartiles


@dataclass(frozen=True)
class Timing:
    """One call as it was timed.

    Attributes:
        seconds: of one call, by round.
        inner: calls in each timed round; a GPU runs them one behind the other without waiting for the host.
        peak_memory: bytes that torch allocates at most during a call, above what was there before; a CPU library's own workspace
            is not counted.
    """

    seconds: Float[Tensor, "repeat"]
    inner: int
    peak_memory: float

    @property
    def median(self) -> float:
        """Median seconds; of an even number the mean of the middle two."""
        return float(self.seconds.quantile(0.5))


def inner_calls(seconds: float, *, least: float = LEAST_ROUND) -> int:
    """Return how often a call must be repeated to take a time.

    >>> inner_calls(0.3e-3), inner_calls(1e-3), inner_calls(2.0)
    (4, 1, 1)
    """
    return max(1, math.ceil(least / max(seconds, 1e-9) - 1e-6))


def time_calls(
    calls: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device, least: float = LEAST_ROUND
) -> dict[str, Timing]:
    """Time calls in turn, each as often in a round as it takes to fill the least time.

    Args:
        calls: what to time, by name.
        repeats: timed rounds.
        device: where they run.
        least: seconds that a round of each call lasts at least.

    Returns:
        Times by name.

    Raises:
        InputError: fewer rounds than quartiles need, or nothing to time.
    """
    require(repeats >= LEAST_REPEATS, f"repeats must be at least {LEAST_REPEATS}", str(repeats), "give more")
    once = interleaved(calls, repeats=2, warm_up=1, device=device)
    inner = {name: inner_calls(float(seconds.min()), least=least) for name, seconds in once.items()}
    memory = {name: _peak_memory(call, device) for name, call in calls.items()}
    rounds = {name: _repeated(call, inner[name]) for name, call in calls.items()}
    found = interleaved(rounds, repeats=repeats, warm_up=1, device=device)
    return {name: Timing(seconds / inner[name], inner[name], memory[name]) for name, seconds in found.items()}


def median_interval(values: Float[Tensor, "repeat"], *, together: int = 1) -> tuple[float, float]:
    """Return an interval that covers the true median at least 95 times in 100: two order statistics; infinite below six values.

    Args:
        values: of the rounds.
        together: how many such intervals are to cover their medians all at once as often (Bonferroni).

    Source: the ranks are those of the sign test.

    >>> median_interval(torch.arange(1.0, 21.0)), median_interval(torch.arange(1.0, 21.0), together=4)
    ((6.0, 15.0), (5.0, 16.0))
    """
    count = len(values)
    rank = int(binom.ppf(0.025 / together, count, 0.5))
    ordered = values.sort().values.tolist()
    return (ordered[rank - 1], ordered[count - rank]) if rank else (-math.inf, math.inf)


def willing(calls: Mapping[str, Callable[[], object]], baseline: str) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Try every call once: return those that run, and the reasons of the others; the baseline has to run.

    >>> willing({"one": lambda: 1, "none": lambda: [][0]}, "one")[1]
    {'none': 'refused by its kernel: list index out of range'}
    """
    able, refused = {}, {}
    with torch.inference_mode():
        calls[baseline]()
        for name, call in calls.items():
            found = None if name == baseline else attempt(call)
            if isinstance(found, str):
                refused[name] = found
            else:
                able[name] = call
    return able, refused


def attempt(call: Callable[[], object]) -> object:
    """Return what a call gives, or the reason why it fails.

    Kernels of other libraries refuse shapes, devices and versions with errors of every kind, and one of them must not end the
    measurement of the rest.
    """
    try:
        return call()
    except InputError:
        raise
    except Exception as error:
        return f"refused by its kernel: {first_line(error)[:200]}"


def machine(device: torch.device) -> dict[str, str | int]:
    """Return what a table of times must say about where they were taken."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


@torch.inference_mode()
def _peak_memory(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        return _peak_on_host(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)


def _peak_on_host(call: Callable[[], object]) -> float:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at the first profile; else each one writes two lines to the console
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as record:
        call()
    found = cast(Any, record.profiler).kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
    return float(max(accumulate((size for _, size in changes), initial=0)))


def _cpu_model() -> str:
    """Return what the CPU calls itself, which Linux says in a file of its own."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()

"""What a piece of work takes: seconds, and the memory that it needs at most beyond what was there before."""

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Effort:
    """What some work took.

    Attributes:
        seconds: by the wall clock; NaN when not measured.
        peak: bytes at most beyond those that were there before; NaN when not measured or where nothing counts them.
    """

    seconds: float = math.nan
    peak: float = math.nan

    def then(self, other: "Effort") -> "Effort":
        """Return the effort of both, one after the other.

        >>> Effort(1.0, 5.0).then(Effort(2.0, 3.0))
        Effort(seconds=3.0, peak=5.0)
        """
        peaks = (self.peak, other.peak)
        return Effort(self.seconds + other.seconds, math.nan if any(map(math.isnan, peaks)) else max(peaks))


def watched(call: Callable[[], Result], *, device: torch.device) -> tuple[Result, Effort]:
    """Do some work and tell what it took.

    Args:
        call: the work.
        device: where it computes; memory is counted there: a GPU's by torch, the host's as resident pages of the process, which
            Linux alone tells.

    Returns:
        What the call returned, and its effort.
    """
    before = _start(device)
    began = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return result, Effort(seconds, max(_peak(device) - before, 0.0))  # NaN stays NaN


def _start(device: torch.device) -> float:
    """Begin to watch for a peak, and return the bytes that are there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return math.nan
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages that are free but kept would hide what the work needs
        (PROCESS / "clear_refs").write_text("5")  # forgets the highest size so far
    except (OSError, AttributeError):
        return math.nan
    return _resident("VmRSS")


def _peak(device: torch.device) -> float:
    """Return the highest number of bytes since the start."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _resident("VmHWM") if device.type == "cpu" else math.nan


def _resident(field: str) -> float:
    """Return a size of the process in bytes."""
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), math.nan)

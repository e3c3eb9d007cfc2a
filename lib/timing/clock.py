"""Measured time: warm-up, interleaved repetitions, medians, and speed-ups with intervals."""

import time
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lib.core.errors import InputError


@torch.inference_mode()
def interleaved(
    calls: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 2, device: torch.device | None = None
) -> dict[str, Float[Tensor, "repeat"]]:
    """Time several calls in turn, so that a drift of the machine hits all of them alike.

    Args:
        calls: what to time, by name.
        repeats: timed rounds; each round calls everything once.
        warm_up: rounds before them that do not count.
        device: a CUDA device is synchronised around each call.

    Returns:
        Seconds of each call by name.

    Raises:
        InputError: nothing to time, or fewer than one round.
    """
    if not calls or repeats < 1:
        raise InputError(f"timing must have calls and repeats >= 1, got {len(calls)} and {repeats}: give some")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(warm_up + repeats):
        for name, call in calls.items():
            _synchronise(device)
            start = time.perf_counter()
            call()
            _synchronise(device)
            if round_number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()}


def speed_up(baseline: Float[Tensor, "repeat"], other: Float[Tensor, "repeat"]) -> tuple[float, float, float]:
    """Return how much faster a call is than the baseline of the same rounds: median of the ratios, first and third quartile.

    >>> speed_up(torch.tensor([2.0, 4.0, 3.0]), torch.tensor([1.0, 1.0, 1.0]))
    (3.0, 2.5, 3.5)
    """
    return quartiles(baseline.double() / other.double())


def quartiles(values: Float[Tensor, "repeat"]) -> tuple[float, float, float]:
    """Return the median, then the first and the third quartile.

    >>> quartiles(torch.tensor([1.0, 2.0, 3.0, 5.0, 4.0]))
    (3.0, 2.0, 4.0)
    """
    low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return middle, low, high


def _synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)

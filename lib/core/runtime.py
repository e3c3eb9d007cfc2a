"""Device and dtype with the reason for the choice, thread count, and random streams."""

import hashlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm

from lib.core import processor
from lib.core.config import Config
from lib.core.errors import InputError


@dataclass(frozen=True)
class Device:
    """Where a run computes, in which dtype, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def choose_device(config: Config) -> Device:
    """Settle device and dtype from the settings and the hardware.

    Raises:
        InputError: CUDA is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise InputError("device cuda must have a GPU that torch sees, got none: use device: cpu or auto")
    on_gpu = config.device == "cuda" or (config.device == "auto" and has_gpu)
    if config.dtype == "auto":
        dtype = torch.bfloat16 if on_gpu else torch.float32
        reason = "bfloat16 halves the memory on a GPU" if on_gpu else "float32 tells losses apart in the sixth digit"
    else:
        dtype, reason = getattr(torch, config.dtype), f"dtype: {config.dtype} in the settings"
    return Device(torch.device("cuda" if on_gpu else "cpu"), dtype, reason)


def describe_device(choice: Device) -> str:
    """Return one phrase for result files: the kind of device, the dtype, and who multiplies on a CPU if it is not MKL.

    Models of CPUs and numbers of threads are left out.
    """
    dtype = str(choice.dtype).removeprefix("torch.")
    if choice.device.type == "cuda":
        return f"{torch.cuda.get_device_name(choice.device)}, {dtype}"
    return f"CPU, {dtype}" if torch.get_float32_matmul_precision() == "highest" else f"CPU, {dtype} by oneDNN"


def use_processor() -> processor.Products:
    """Use the threads that OMP_NUM_THREADS asks for, and the fastest float32 products; return the latter."""
    set_threads()
    return processor.use_products()


def set_threads() -> int:
    """Use as many threads as OMP_NUM_THREADS asks for (the launcher sets it to the physical cores); return the number."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        torch.set_num_threads(int(wanted))
    return torch.get_num_threads()


def is_watched() -> bool:
    """Tell whether a notebook runs under somebody's eyes: JupyterLab and editors name their session, nbclient does not."""
    return "ipykernel" in sys.modules and any(name in os.environ for name in ("JPY_SESSION_NAME", "VSCODE_PID"))


def progress(work: Iterable[Any] | None = None, **options: Any) -> Any:
    """Show a bar over long work that goes away at the end: on a terminal, and in a notebook that somebody watches.

    Elsewhere there is none, so that no dead bar stays in a committed output or a log.

    Args:
        work: what is gone through; None for a bar that is moved by hand.
        options: as of tqdm.
    """
    if is_watched():
        return auto_tqdm(work, leave=False, **options)
    return tqdm(work, leave=False, disable=None, **options)


def generator(seed: int, *stream: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Make the random generator of one named stream.

    Streams with different names never share draws, so adding a draw to one (sampling, say) leaves all others as they were.

    Args:
        seed: the run's seed.
        stream: what the draws are for, such as `"masking", window_index`.
        device: device that the generator draws on; CPU draws are the same on every machine.

    Returns:
        A generator seeded from a hash of `seed` and `stream`.

    >>> int(torch.randint(1000, (), generator=generator(0, "masking"))) == int(
    ...     torch.randint(1000, (), generator=generator(0, "masking")))
    True
    """
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))

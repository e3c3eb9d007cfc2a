"""What the processor multiplies fast: which float32 kernels torch uses, and whether bfloat16 is faster than they are."""

import functools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

TOLERANCE = 1e-6  # of a float32 product, relative; rounded to bfloat16 first it is off by 3e-3
FASTER = 0.8  # bfloat16 must take at most this share of float32's time


@dataclass(frozen=True)
class Products:
    """Which kernels multiply float32 matrices on this processor, and why."""

    kernels: str
    reason: str


def vendor() -> str:
    """Return who made the processor, such as `GenuineIntel` or `AuthenticAMD`; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def relative_error() -> float:
    """Return the relative error of a float32 product as torch now computes it, against float64."""
    stream = torch.Generator().manual_seed(0)
    left, right = torch.randn(192, 256, generator=stream), torch.randn(256, 320, generator=stream)
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).norm() / exact.norm())


def use_products() -> Products:
    """Let float32 matrices be multiplied by the fastest kernels that keep float32's precision.

    MKL takes its AVX2 path on processors that are not Intel's, where oneDNN's AVX-512 kernels are more than twice as fast. The
    precision "medium" selects oneDNN, and allows it to round to bfloat16 where the processor has units for that (AMX): therefore
    they are left out, and a product is compared with float64. It lets a GPU round to TF32 as well, and torch has no way to ask
    for the one without the other that its own functions can read back.
    """
    torch.set_float32_matmul_precision("highest")
    if torch.cuda.is_available():
        return Products("MKL", "MKL: what selects oneDNN lets a GPU round float32 to TF32")
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX512"):
        return Products("MKL", f"MKL: the processor offers {capability.lower()}, oneDNN is faster with AVX-512 only")
    if vendor() == "GenuineIntel":
        return Products("MKL", "MKL: it uses AVX-512 on Intel's processors")
    if torch.cpu._is_amx_tile_supported():
        return Products("MKL", "MKL: oneDNN may round float32 to bfloat16 where the processor has AMX")
    torch.set_float32_matmul_precision("medium")
    found = relative_error()
    if found <= TOLERANCE:
        return Products("oneDNN", f"oneDNN: MKL leaves AVX-512 unused here (relative error of a product {found:.0e})")
    torch.set_float32_matmul_precision("highest")
    return Products("MKL", f"MKL: a product of oneDNN had a relative error of {found:.0e}, above {TOLERANCE:.0e}")


@functools.cache
def is_bfloat16_faster() -> bool:
    """Tell whether bfloat16 products are faster than float32 ones on this processor, from a measurement of some milliseconds.

    A flag does not say it: among processors with avx512_bf16, bfloat16 was four times as fast as float32 on one, a third slower
    on another.
    """
    stream = torch.Generator().manual_seed(0)
    left, right = torch.randn(1024, 512, generator=stream), torch.randn(512, 1024, generator=stream)
    halves = left.bfloat16(), right.bfloat16()
    single, half = _seconds(lambda: left @ right), _seconds(lambda: halves[0] @ halves[1])
    return half < FASTER * single


def _seconds(call: Callable[[], object], repeats: int = 9) -> float:
    """Return the least seconds of a call, after one that warms up."""
    call()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)

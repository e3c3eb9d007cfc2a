"""The roofline of a linear layer: the time that a device cannot beat, from its measured peaks, and how near a measurement comes.

A layer has to do its operations and to move its bytes; both can overlap, so the slower of the two is a floor for its time.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from lib.core.errors import require
from lib.core.runtime import generator
from lib.timing.clock import interleaved

Bound = Literal["compute", "memory"]


@dataclass(frozen=True)
class Peaks:
    """What a device was seen to do at best.

    Attributes:
        operations: floating-point operations a second of a large matrix product (a multiplication and an addition are two).
        bandwidth: bytes a second of a large copy, each byte counted once as read and once as written.
    """

    operations: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """Operations a byte at which the two take equally long; below it memory binds."""
        return self.operations / self.bandwidth


@dataclass(frozen=True)
class LinearCase:
    """A product of activations [rows, in_features] and a weight [out_features, in_features] in some format.

    Attributes:
        rows: tokens at once, batch times sequence.
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        weight_bytes: size of the weight in its format, scales and indices included (see `weight_bytes`).
        activation_bytes: size of one input or output number.
        kept: share of the multiplications that the format needs on the hardware at hand, 0.5 for 2:4 on units that skip zeros.
    """

    rows: int
    in_features: int
    out_features: int
    weight_bytes: float
    activation_bytes: float
    kept: float = 1.0

    @property
    def operations(self) -> float:
        """Floating-point operations, two for each multiplication that is needed."""
        return 2.0 * self.rows * self.in_features * self.out_features * self.kept

    @property
    def bytes(self) -> float:
        """Bytes that must be moved: the weight, the inputs and the outputs once each."""
        return self.weight_bytes + self.activation_bytes * self.rows * (self.in_features + self.out_features)


@dataclass(frozen=True)
class Floor:
    """The least seconds of a case, and which of the two sides they come from."""

    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def binds(self) -> Bound:
        """Which side is the larger; compute where both are equal."""
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"


def weight_bytes(
    in_features: int,
    out_features: int,
    *,
    weight_bits: float,
    kept: float = 1.0,
    index_bits: float = 0.0,
    group_size: int | None = None,
    scale_bits: float = 16.0,
) -> float:
    """Return the size of a weight in its format.

    Args:
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        weight_bits: bits of each stored number.
        kept: share of the numbers that are stored, 0.5 for 2:4.
        index_bits: bits for the place of each stored number, 2 for 2:4 as GPUs store it.
        group_size: inputs of one output that share a scale; a last group may be shorter. None stores no scales.
        scale_bits: bits of each scale.

    Returns:
        Bytes of numbers, places and scales; not rounded.

    Raises:
        InputError: a share, width or size out of range.

    >>> weight_bytes(64, 8, weight_bits=16), weight_bytes(64, 8, weight_bits=4, group_size=32)
    (1024.0, 288.0)
    >>> weight_bytes(64, 8, weight_bits=16, kept=0.5, index_bits=2)  # 9/16 of dense
    576.0
    """
    got = f"{in_features}, {out_features}, {weight_bits} and {kept}"
    sound = min(in_features, out_features) >= 1 and weight_bits > 0 and 0 < kept <= 1
    require(sound, "features must be positive, weight_bits > 0 and kept in (0, 1]", got, "give those of the format")
    require(group_size is None or group_size >= 1, "group_size must be positive", str(group_size), "use None for no scales")
    numbers = in_features * out_features * kept * (weight_bits + index_bits)
    scales = out_features * math.ceil(in_features / group_size) * scale_bits if group_size else 0.0
    return (numbers + scales) / 8


def floor_of(case: LinearCase, peaks: Peaks) -> Floor:
    """Return the time that a case needs at least.

    Caches are left out: a layer that fits into one, used again at once, can be faster than this floor.

    Args:
        case: the layer.
        peaks: of the device, in the dtype of the products.

    Returns:
        Seconds of the operations at the peak and of the bytes at the bandwidth; the floor is the larger.

    Raises:
        InputError: sizes or peaks that are not positive, or a kept share outside (0, 1].

    Source: Williams, Waterman and Patterson, Roofline (2009).

    >>> floor = floor_of(LinearCase(1, 100, 100, 20_000, 2), Peaks(operations=1e6, bandwidth=1e5))
    >>> floor.compute_seconds, floor.memory_seconds, floor.binds  # 20 000 operations, 20 400 bytes
    (0.02, 0.204, 'memory')
    """
    sizes = (case.rows, case.in_features, case.out_features, case.weight_bytes, case.activation_bytes)
    sound = min(sizes) > 0 and 0 < case.kept <= 1
    require(sound, "sizes of a case must be positive and kept in (0, 1]", str(case), "give those of the layer")
    measured = 0 < peaks.operations < math.inf and 0 < peaks.bandwidth < math.inf
    require(measured, "peaks must be positive and finite", str(peaks), "measure them on the device")
    return Floor(case.operations / peaks.operations, case.bytes / peaks.bandwidth)


def achieved_share(seconds: float, floor: Floor) -> float:
    """Return the share of the roofline that a measured time achieves: floor over measured, 1 at best, more only through caches.

    Raises:
        InputError: a time that is not positive.

    >>> achieved_share(0.5, Floor(compute_seconds=0.1, memory_seconds=0.25))
    0.5
    """
    require(0 < seconds < math.inf, "measured seconds must be positive", str(seconds), "time the layer again")
    return floor.seconds / seconds


def measure_peaks(
    device: torch.device,
    *,
    dtype: torch.dtype,
    size: int | None = None,
    copy_bytes: int | None = None,
    repeats: int = 10,
    seed: int = 0,
) -> Peaks:
    """Measure the peaks of a device: the fastest of several products of square matrices, and of several copies.

    The fastest and not the median, because a peak is what nothing else on the machine slowed down.

    Args:
        device: where to measure.
        dtype: floating-point type of the product.
        size: rows and columns of the matrices; None takes 8192 on a GPU and 2048 elsewhere, large enough to keep either busy.
        copy_bytes: size of what is copied; None takes 1 GiB on a GPU and 256 MiB elsewhere, more than caches hold.
        repeats: timed rounds, after two that do not count.
        seed: of the matrices' random numbers; products of zeros cost a GPU less power, so it would run them faster.

    Returns:
        Operations and bytes a second.

    Raises:
        InputError: sizes or repeats that are not positive, or a dtype without fractions.
    """
    on_gpu = device.type == "cuda"
    size = (8192 if on_gpu else 2048) if size is None else size
    copy_bytes = (2**30 if on_gpu else 2**28) if copy_bytes is None else copy_bytes
    require(min(size, copy_bytes) >= 1, "size and copy_bytes must be positive", f"{size} and {copy_bytes}", "enlarge them")
    require(dtype.is_floating_point, "dtype must be a floating-point type", str(dtype), "use that of the activations")
    draw = generator(seed, "roofline")
    first, second = (torch.randn(size, size, generator=draw).to(device, dtype) for _ in range(2))
    product, source = torch.empty_like(first), torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # written once already, so that no round pays for getting the memory
    calls = {"product": lambda: torch.mm(first, second, out=product), "copy": lambda: target.copy_(source)}
    fastest = {name: float(seconds.min()) for name, seconds in interleaved(calls, repeats=repeats, device=device).items()}
    return Peaks(operations=2.0 * size**3 / fastest["product"], bandwidth=2.0 * copy_bytes / fastest["copy"])

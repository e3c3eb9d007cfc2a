"""The roofline by hand, with numbers in which the two sides cannot be confused; no test looks at a clock's value."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.core.errors import InputError
from lib.timing import roofline
from lib.timing.roofline import Floor, LinearCase, Peaks

PEAKS = Peaks(operations=1000.0, bandwidth=10.0)
CPU = torch.device("cpu")
positive = st.floats(1e-3, 1e3)


# --- cases and floors ----------------------------------------------------------------------------------------------------


def test_operations_and_bytes_by_hand() -> None:
    """5 rows of 7 inputs and 3 outputs: 105 products; 35 + 15 numbers of 4 bytes beside the weight."""
    case = LinearCase(rows=5, in_features=7, out_features=3, weight_bytes=42, activation_bytes=4)
    assert case.operations == 210 and case.bytes == 242
    halved = LinearCase(rows=5, in_features=7, out_features=3, weight_bytes=42, activation_bytes=4, kept=0.5)
    assert halved.operations == 105 and halved.bytes == 242


@pytest.mark.parametrize(
    ("rows", "compute", "memory", "binds"),
    [
        (1, 0.8, 100.0, "memory"),  # 800 operations; 920 + 2 * 40 = 1000 bytes
        (200, 160.0, 1692.0, "memory"),
        (10_000, 8000.0, 80_092.0, "memory"),
    ],
)
def test_the_memory_side_binds_below_the_ridge(rows: int, compute: float, memory: float, binds: str) -> None:
    """At 100 operations a byte the ridge of these peaks is out of reach of a layer of 20 by 20."""
    floor = roofline.floor_of(LinearCase(rows, 20, 20, 920, 2), PEAKS)
    assert (floor.compute_seconds, floor.memory_seconds) == pytest.approx((compute, memory))
    assert floor.binds == binds and floor.seconds == pytest.approx(memory)


def test_the_compute_side_binds_where_rows_share_the_weight() -> None:
    """300 by 300 in int4: 45 000 bytes. A row adds 180 000 operations and 1200 bytes, 180 s and 120 s."""
    few = roofline.floor_of(LinearCase(10, 300, 300, 45_000, 2), PEAKS)
    many = roofline.floor_of(LinearCase(100, 300, 300, 45_000, 2), PEAKS)
    assert (few.compute_seconds, few.memory_seconds, few.binds) == (1800.0, 5700.0, "memory")
    assert (many.compute_seconds, many.memory_seconds, many.binds) == (18_000.0, 16_500.0, "compute")
    assert (few.seconds, many.seconds) == (5700.0, 18_000.0)
    sparse = roofline.floor_of(LinearCase(100, 300, 300, 45_000, 2, kept=0.5), PEAKS)
    assert (sparse.seconds, sparse.binds) == (16_500.0, "memory")  # half the operations do not halve the time


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 500), positive, positive, positive)
def test_the_ridge_decides_which_side_binds(
    rows: int, inputs: int, outputs: int, weight: float, operations: float, bandwidth: float
) -> None:
    case, peaks = LinearCase(rows, inputs, outputs, weight, 2), Peaks(operations, bandwidth)
    floor = roofline.floor_of(case, peaks)
    assert floor.seconds == max(floor.compute_seconds, floor.memory_seconds)
    intensity = case.operations / case.bytes
    if not math.isclose(intensity, peaks.ridge):
        assert floor.binds == ("compute" if intensity > peaks.ridge else "memory")
    faster = roofline.floor_of(case, Peaks(2 * operations, 2 * bandwidth))
    assert faster.seconds == pytest.approx(floor.seconds / 2)


def test_equal_sides_count_as_compute() -> None:
    assert Floor(2.0, 2.0).binds == "compute" and Floor(2.0, 2.0).seconds == 2.0
    assert PEAKS.ridge == 100.0


def test_the_achieved_share_is_of_the_larger_side() -> None:
    floor = Floor(compute_seconds=2.0, memory_seconds=3.0)
    assert roofline.achieved_share(12.0, floor) == 0.25
    assert roofline.achieved_share(1.5, floor) == 2.0  # a cache: not cut to 1, so that it is seen
    assert roofline.achieved_share(12.0, Floor(4.0, 3.0)) == pytest.approx(1 / 3)


# --- bytes of a weight ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weight_bits": 32}, 384.0),  # 96 numbers
        ({"weight_bits": 3}, 36.0),
        ({"weight_bits": 16, "kept": 0.5, "index_bits": 2}, 108.0),  # 48 of 18 bits
        ({"weight_bits": 16, "kept": 0.5, "index_bits": 3}, 114.0),
        ({"weight_bits": 8, "group_size": 16}, 108.0),  # 96 bytes, and 2 for the scale of each of 6 outputs
        ({"weight_bits": 4, "group_size": 8}, 72.0),  # 48 bytes and 12 scales
        ({"weight_bits": 4, "group_size": 10}, 72.0),  # groups of 10 and 6: as many scales
        ({"weight_bits": 4, "group_size": 6, "scale_bits": 32}, 120.0),  # 6, 6 and 4: 18 scales of 4 bytes
        ({"weight_bits": 4, "kept": 0.5, "index_bits": 2, "group_size": 8}, 60.0),  # 36 bytes, and no fewer scales
    ],
)
def test_bytes_of_formats_by_hand(options: dict[str, Any], expected: float) -> None:
    assert roofline.weight_bytes(16, 6, **options) == pytest.approx(expected)


# --- peaks ---------------------------------------------------------------------------------------------------------------


def test_peaks_are_those_of_the_fastest_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 8 by 8 is 2 x 512 operations; a copy of 96 bytes reads 96 and writes 96."""
    seen: dict[str, Any] = {}

    def timed(calls: Mapping[str, Callable[[], object]], **options: Any) -> dict[str, Tensor]:
        seen.update(options, results={name: call() for name, call in calls.items()})
        return {"product": torch.tensor([4.0, 2.0, 8.0]), "copy": torch.tensor([0.5, 6.0, 7.0])}

    monkeypatch.setattr(roofline, "interleaved", timed)
    peaks = roofline.measure_peaks(CPU, dtype=torch.float32, size=8, copy_bytes=96, repeats=3)
    assert peaks == Peaks(operations=1024 / 2.0, bandwidth=192 / 0.5)
    assert (seen["repeats"], seen["device"]) == (3, CPU)
    product, copied = seen["results"]["product"], seen["results"]["copy"]
    assert product.shape == (8, 8) and product.dtype == torch.float32 and len(product.unique()) == 64
    assert copied.nbytes == 96 and bool(copied.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaks_can_be_measured_here(dtype: torch.dtype) -> None:
    peaks = roofline.measure_peaks(CPU, dtype=dtype, size=16, copy_bytes=4096, repeats=2)
    assert 0 < peaks.operations < math.inf and 0 < peaks.bandwidth < math.inf
    assert roofline.floor_of(LinearCase(1, 4, 4, 32, 2), peaks).seconds > 0


# --- what cannot be used -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: roofline.floor_of(LinearCase(0, 4, 4, 32, 2), PEAKS), "sizes of a case must be positive"),
        (lambda: roofline.floor_of(LinearCase(1, 4, 4, 0, 2), PEAKS), "sizes of a case must be positive"),
        (lambda: roofline.floor_of(LinearCase(1, 4, 4, 32, 2, kept=50), PEAKS), r"kept in \(0, 1\], got .*kept=50"),
        (lambda: roofline.floor_of(LinearCase(1, 4, 4, 32, 2), Peaks(math.inf, 1.0)), "peaks must be positive and finite, got"),
        (lambda: roofline.floor_of(LinearCase(1, 4, 4, 32, 2), Peaks(1.0, 0.0)), "peaks must be positive and finite, got"),
        (lambda: roofline.achieved_share(0.0, Floor(1.0, 1.0)), "measured seconds must be positive, got 0.0: time"),
        (lambda: roofline.achieved_share(math.nan, Floor(1.0, 1.0)), "measured seconds must be positive, got nan"),
        (lambda: roofline.weight_bytes(0, 4, weight_bits=4), "features must be positive, .* got 0, 4, 4 and 1.0"),
        (lambda: roofline.weight_bytes(4, 4, weight_bits=0), "weight_bits > 0"),
        (lambda: roofline.weight_bytes(4, 4, weight_bits=4, kept=50), r"kept in \(0, 1\], got 4, 4, 4 and 50"),
        (lambda: roofline.weight_bytes(4, 4, weight_bits=4, group_size=0), "group_size must be positive, got 0: use None"),
        (lambda: roofline.measure_peaks(CPU, dtype=torch.float32, size=0), "must be positive, got 0 and"),
        (lambda: roofline.measure_peaks(CPU, dtype=torch.float32, size=4, copy_bytes=0), "must be positive, got 4 and 0"),
        (lambda: roofline.measure_peaks(CPU, dtype=torch.int8, size=4, copy_bytes=8), "floating-point type, got torch.int8"),
        (lambda: roofline.measure_peaks(CPU, dtype=torch.float32, size=4, copy_bytes=8, repeats=0), "repeats >= 1"),
    ],
)
def test_what_cannot_be_used_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()

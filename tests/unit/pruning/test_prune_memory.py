"""Peak memory of SparseGPT in processes of their own: with states on disk and by role no states, one Hessian, at any depth."""

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import streaming as benchmark
from benchmarks.streaming import Row, Shape

pytestmark = pytest.mark.skipif(not benchmark.STATUS.exists(), reason="peaks of memory are read from Linux's /proc")

WIDE = {"hidden": 512, "mlp": 1536, "heads": 4, "vocab": 64}
NARROW = {"hidden": 256, "mlp": 768, "heads": 4, "vocab": 64}
FEW, MANY = (4, 64), (64, 384)  # windows and positions
LEAN: dict[str, Any] = {"states": "disk", "by_role": True}
# (shape, blocks, windows and positions, options)
CASES: dict[str, tuple[dict[str, int], int, tuple[int, int], dict[str, Any]]] = {
    "the first of a process, which loads libraries": (NARROW, 1, FEW, {}),
    "wide, usual": (WIDE, 1, FEW, {}),
    "wide, lean": (WIDE, 1, FEW, LEAN),
    "narrow, usual, 2": (NARROW, 2, MANY, {}),
    "narrow, lean, 2": (NARROW, 2, MANY, LEAN),
    "narrow, lean, 4": (NARROW, 4, MANY, LEAN),
}


def hessian_bytes(features: int) -> int:
    return 4 * features**2


def state_bytes(shape: dict[str, int], texts: tuple[int, int]) -> int:
    return 2 * shape["hidden"] * texts[0] * texts[1]


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    calls: list[partial[Row]] = []
    for shape, blocks, texts, options in CASES.values():
        folder = tmp_path_factory.mktemp("random") / "dense"
        benchmark.write_random(folder, Shape(blocks=blocks, **shape), positions=texts[1])
        windows = torch.randint(1, 62, texts, generator=torch.Generator().manual_seed(0))
        calls.append(partial(benchmark.measure, folder, path="streamed", method="SparseGPT", windows=windows, **options))
    rows = benchmark.in_fresh_process(*calls)
    return {name: row.host_bytes for name, row in zip(CASES, rows, strict=True)}


def test_the_other_hessians_and_the_last_ones_original_are_gone(peaks: dict[str, int]) -> None:
    """Those of q, o and gate have the hidden size; that of down is copied before it is inverted."""
    others, own = 3 * hessian_bytes(WIDE["hidden"]), hessian_bytes(WIDE["mlp"])
    assert peaks["wide, usual"] - peaks["wide, lean"] > 0.7 * (others + own)


def test_states_are_not_in_memory(peaks: dict[str, int]) -> None:
    """In memory there are those that a block reads; each batch of them gives way to what the block makes of it."""
    saved = peaks["narrow, usual, 2"] - peaks["narrow, lean, 2"]
    assert 0.8 * state_bytes(NARROW, MANY) < saved < 1.5 * state_bytes(NARROW, MANY)


def test_the_peak_does_not_grow_with_the_depth(peaks: dict[str, int]) -> None:
    assert abs(peaks["narrow, lean, 4"] - peaks["narrow, lean, 2"]) < 0.5 * state_bytes(NARROW, MANY)

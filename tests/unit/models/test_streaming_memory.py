"""Peak memory of pruning a streamed checkpoint, measured in processes of their own: one block, however many there are."""

from functools import partial

import pytest
import torch

from benchmarks import streaming as benchmark
from benchmarks.streaming import Row, Shape

pytestmark = pytest.mark.skipif(not benchmark.STATUS.exists(), reason="peaks of memory are read from Linux's /proc")

LLADA = {"hidden": 4096, "mlp": 12288, "heads": 32, "vocab": 64}
QUARTER = {"hidden": 1024, "mlp": 3072, "heads": 8, "vocab": 64}
# (path, shape, blocks)
CASES = {
    "wide streamed, 2": ("streamed", LLADA, 2),
    "narrow streamed, 1": ("streamed", QUARTER, 1),
    "narrow streamed, 4": ("streamed", QUARTER, 4),
    "narrow in memory, 1": ("in memory", QUARTER, 1),
    "narrow in memory, 4": ("in memory", QUARTER, 4),
}


def block_bytes(shape: dict[str, int]) -> int:
    return 2 * shape["hidden"] * (4 * shape["hidden"] + 3 * shape["mlp"])


def largest_bytes(shape: dict[str, int]) -> int:
    return 2 * shape["hidden"] * shape["mlp"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    calls = []
    for path, shape, blocks in CASES.values():
        folder = tmp_path_factory.mktemp("random") / "dense"
        benchmark.write_random(folder, Shape(blocks=blocks, **shape), positions=8)
        options = {"path": path, "method": "magnitude per row", "windows": torch.zeros(1, 8, dtype=torch.long)}
        calls.append(partial(benchmark.measure, folder, **options))
    return dict(zip(CASES, benchmark.in_fresh_process(*calls), strict=True))


def test_blocks_of_llada_8b_are_pruned_in_the_memory_of_one(rows: dict[str, Row]) -> None:
    """Beside the block there is what pruning its largest matrix takes: masks, float32 values and counts, 11 times its bytes."""
    block, working, peak = block_bytes(LLADA), 11 * largest_bytes(LLADA), rows["wide streamed, 2"].host_bytes
    assert block + 5 * largest_bytes(LLADA) < peak < 1.06 * (block + working) < 2 * block + 0.9 * working


def test_memory_grows_with_depth_only_when_the_model_is_in_memory(rows: dict[str, Row]) -> None:
    block = block_bytes(QUARTER)
    shallow, deep = rows["narrow streamed, 1"].host_bytes, rows["narrow streamed, 4"].host_bytes
    assert abs(deep - shallow) < 0.3 * block
    assert rows["narrow in memory, 4"].host_bytes - rows["narrow in memory, 1"].host_bytes > 2.5 * block
    assert rows["narrow in memory, 4"].host_bytes - deep > 2.5 * block


def test_every_block_is_read_once_to_check_once_to_prune_and_once_to_save(rows: dict[str, Row]) -> None:
    head = 2 * LLADA["hidden"] * LLADA["vocab"]
    assert rows["wide streamed, 2"].read_bytes == 3 * 2 * block_bytes(LLADA) + head
    assert rows["narrow streamed, 1"].read_bytes == block_bytes(QUARTER) + head // 4  # its block stays

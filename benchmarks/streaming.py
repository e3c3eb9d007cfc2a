"""Time and peak memory of pruning a checkpoint block by block: `python -m benchmarks.streaming`.

Writes a checkpoint of LLaDA's layout with random bfloat16 weights, prunes it by every method and writes the result, once with
weights that are read when they are used (`streaming.load`, `streaming.save`) and once in memory (`models.load`,
`export.save_plain`). Each run has a process of its own. Host memory is the process's peak above what it held before it loaded the
model (Linux only), device memory the peak of torch's allocator on a GPU. All blocks hold the same numbers, which changes neither.

`--states` says where hidden states wait between blocks (by default on the device), `--by-role` that the Hessians of SparseGPT
exist one after another instead of together.

`--llada-8b --device cuda` is LLaDA-8B's shape: 16 GB on disk, and twice as much again for the changed weights and the result.
"""

import argparse
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.calibration.hidden_states import States
from lib.checkpoints import renaming
from lib.core.provenance import write_json
from lib.core.runtime import generator
from lib.models import export, loading, streaming
from lib.models.weight_store import StreamedLinear
from lib.pruning import pruner
from lib.pruning.methods import METHODS, Target

GIB = 2**30
PATHS = ("streamed", "in memory")
DEFAULT_METHODS = ("magnitude per row", "Wanda", "SparseGPT", "sink-aware (Wanda)", "sink-aware (SparseGPT)")
STATUS = Path("/proc/self/status")
# Peaks are then those of what lives: a tensor of 128 KiB or more is given back when it is freed, and takes no other one's place.
ALLOCATOR = "glibc.malloc.mmap_threshold=131072:glibc.malloc.hugetlb=1"


@dataclass(frozen=True)
class Shape:
    """Shape of a network in LLaDA's layout."""

    blocks: int
    hidden: int
    mlp: int
    heads: int
    vocab: int


LLADA_8B = Shape(blocks=32, hidden=4096, mlp=12288, heads=32, vocab=126464)


@dataclass(frozen=True)
class Row:
    """One run: seconds to load, prune and save, peak bytes on the host and on the device, bytes read from weight files."""

    path: str
    method: str
    load_seconds: float
    prune_seconds: float
    save_seconds: float
    host_bytes: int
    device_bytes: int
    read_bytes: int


def write_random(folder: Path, shape: Shape, *, positions: int) -> Path:
    """Write a checkpoint of LLaDA's layout, a shard a block, whose blocks all hold the same random bfloat16 weights.

    Args:
        folder: where; made when missing.
        shape: of the network.
        positions: the most tokens that it reads.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream, hidden, mlp = generator(0, "random checkpoint"), shape.hidden, shape.mlp
    sizes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (hidden, hidden))
    sizes |= {"ff_proj": (mlp, hidden), "up_proj": (mlp, hidden), "ff_out": (hidden, mlp)}
    block = {name: _random(size, stream) for name, size in sizes.items()}
    block |= {name: torch.ones(hidden, dtype=torch.bfloat16) for name in renaming.LLADA_BLOCK.keys() - block.keys()}
    index: dict[str, str] = {}
    top = {"wte": _random((shape.vocab, hidden), stream), "ff_out": _random((shape.vocab, hidden), stream)}
    top["ln_f"] = torch.ones(hidden, dtype=torch.bfloat16)
    _write(folder, "top.safetensors", {f"model.transformer.{name}.weight": tensor for name, tensor in top.items()}, index)
    for number in range(shape.blocks):
        named = {f"model.transformer.blocks.{number}.{name}.weight": tensor for name, tensor in block.items()}
        _write(folder, f"block-{number}.safetensors", named, index)
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    config = {"model_type": "llada", "d_model": hidden, "n_layers": shape.blocks, "n_heads": shape.heads, "mlp_hidden_size": mlp}
    sizes_of_text = {"vocab_size": shape.vocab, "max_sequence_length": positions, "mask_token_id": shape.vocab - 1}
    write_json(folder / "config.json", config | sizes_of_text)
    return folder


def _random(size: tuple[int, int], stream: torch.Generator) -> Tensor:
    """Draw a matrix whose rows repeat, which takes less time."""
    rows = torch.randn(min(64, size[0]), size[1], generator=stream) * size[1] ** -0.5
    return rows.bfloat16().repeat(-(-size[0] // len(rows)), 1)[: size[0]].contiguous()


def _write(folder: Path, file: str, tensors: Mapping[str, Tensor], index: dict[str, str]) -> None:
    save_file(dict(tensors), folder / file, metadata={"format": "pt"})
    index.update(dict.fromkeys(tensors, file))


def measure(
    folder: Path,
    *,
    path: str,
    method: str,
    windows: Tensor,
    batch_size: int = 4,
    device: str = "cpu",
    budget: int | None = None,
    states: States = "device",
    by_role: bool = False,
) -> Row:
    """Load, prune to one half and save, and measure it.

    Args:
        folder: the checkpoint; what is written goes beside it and is deleted.
        path: `"streamed"` or `"in memory"`.
        method: a name of `methods.METHODS`.
        windows: clean calibration windows.
        batch_size: samples at one time.
        device: `cpu` or `cuda`.
        budget: see `streaming.load`; of a shard too.
        states: see `pruner.prune_`.
        by_role: see `pruner.prune_`.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        before, started = _start_memory(device), time.perf_counter()
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        if path == "streamed":
            model = streaming.load(folder, budget=budget, scratch=scratch, **options)
        else:
            model = loading.load(folder, **options)
        loaded = time.perf_counter()
        lies: dict[str, Any] = {"states": states, "by_role": by_role, "scratch": scratch}
        pruner.prune_(model, METHODS[method], Target(0.5), windows=windows, batch_size=batch_size, **lies)
        if device == "cuda":
            torch.cuda.synchronize()
        pruned = time.perf_counter()
        linear = model.layers[0].module
        if isinstance(linear, StreamedLinear):
            streaming.save(model, Path(scratch) / "pruned", max_shard_bytes=linear.store.budget)
        else:
            export.save_plain(model, Path(scratch) / "pruned")
        return Row(
            path,
            method,
            loaded - started,
            pruned - loaded,
            time.perf_counter() - pruned,
            memory("VmHWM") - before,
            torch.cuda.max_memory_allocated() if device == "cuda" else 0,
            linear.store.bytes_read if isinstance(linear, StreamedLinear) else 0,
        )


def memory(field: str) -> int:
    """Return the resident memory of this process in bytes, now (`"VmRSS"`) or at its peak (`"VmHWM"`); 0 where Linux is not."""
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return 1024 * int(found[1]) if found else 0


def _start_memory(device: str) -> int:
    """Let the peaks start anew; return the memory of the process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")
    return memory("VmRSS")


def in_fresh_process(*calls: Callable[[], Row]) -> list[Row]:
    """Run `measure` one or several times in a new process whose allocator returns freed memory at once."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return [pool.submit(call).result() for call in calls]
    finally:
        os.environ.clear()
        os.environ.update(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("blocks", 8), ("hidden", 512), ("mlp", 1536), ("heads", 8), ("vocab", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of the network (default {default})")
    parser.add_argument("--llada-8b", action="store_true", help="LLaDA-8B's shape instead")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=DEFAULT_METHODS)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS)
    parser.add_argument("--budget", type=int, help="bytes of matrices in memory at one time (default: one block)")
    places = "where hidden states wait between blocks (default: on the device)"
    parser.add_argument("--states", choices=get_args(States), default="device", help=places)
    turns = "SparseGPT's Hessians one after another (default: those of a block together)"
    parser.add_argument("--by-role", action="store_true", help=turns)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: that of the system)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, write the checkpoint, measure, print."""
    given = _parser().parse_args(arguments)
    shape = LLADA_8B if given.llada_8b else Shape(given.blocks, given.hidden, given.mlp, given.heads, given.vocab)
    windows = torch.randint(1, shape.vocab - 1, (given.windows, given.positions), generator=generator(0, "random windows"))
    columns = ("load s", "prune s", "save s", "host GiB", "device GiB", "read GiB")
    print(f"{'path':11}{'method':24}" + "".join(f"{name:>11}" for name in columns))
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        folder = write_random(Path(scratch) / "dense", shape, positions=given.positions)
        taken = ("batch_size", "device", "budget", "states", "by_role")
        options = {name: getattr(given, name) for name in taken} | {"windows": windows}
        for path in given.paths:
            for method in given.methods:
                (row,) = in_fresh_process(partial(measure, folder, path=path, method=method, **options))
                sizes = (row.host_bytes / GIB, row.device_bytes / GIB, row.read_bytes / GIB)
                numbers = (row.load_seconds, row.prune_seconds, row.save_seconds, *sizes)
                print(f"{row.path:11}{row.method:24}" + "".join(f"{number:11.2f}" for number in numbers), flush=True)


if __name__ == "__main__":
    main()

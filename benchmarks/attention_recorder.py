"""Time and peak memory of the mass recorder: `python -m benchmarks.attention_recorder`.

Runs a network of the reference model's shape with random weights, without its LM head, in four ways: plain (as loaders leave it),
with SDPA alone, with the mass recorder, and with `output_attentions=True` (eager, which keeps every attention matrix). Repeats
are interleaved and the median is printed, so that other work on the machine disturbs all alike. Memory is the highest sum of live
tensors above the start of the pass, from torch's profiler on a CPU and from the allocator's counter on a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from lib.attention import masses
from lib.core import runtime
from lib.core.config import ModelSource
from lib.models.language_model import LanguageModel, linear_layers, network_body
from lib.models.layers import attention

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One way to run the network at one length: median seconds and peak bytes, and both relative to the plain pass."""

    positions: int
    way: str
    seconds: float
    peak_bytes: int
    time_ratio: float
    memory_ratio: float


def build(*, layers: int, width: int, heads: int, mlp: int, positions: int, causal: bool, device: str) -> LanguageModel:
    """Make a network of the reference model's shape with random weights."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        use_cache=False,
    )
    config._attn_implementation = attention.NAME
    config.is_causal = causal
    torch.manual_seed(0)
    network = LlamaForCausalLM(config).eval().requires_grad_(False)
    cast(Any, network).to(device)
    return LanguageModel(
        name="random",
        source=ModelSource("random"),
        network=network,
        tokenizer=None,
        mask_token_id=None if causal else 0,
        logit_shift=int(causal),
        is_causal=causal,
        layers=linear_layers(network),
        fingerprint="",
    )


def ways(model: LanguageModel, ids: Tensor, *, query_chunk: int) -> dict[str, Callable[[], None]]:
    """Return the forward passes by name."""

    def plain() -> None:
        network_body(model)(input_ids=ids, use_cache=False)

    def sdpa() -> None:
        with attention.without_products(model.network):
            plain()

    def recorder() -> None:
        masses.sink_mass(model, ids, query_chunk=query_chunk)

    def output_attentions() -> None:
        model.network.set_attn_implementation("eager")
        try:
            network_body(model)(input_ids=ids, use_cache=False, output_attentions=True)
        finally:
            model.network.set_attn_implementation(attention.NAME)

    return {"plain": plain, "SDPA": sdpa, "recorder": recorder, "output_attentions": output_attentions}


def seconds(function: Callable[[], object], *, device: str) -> float:
    """Time one call."""
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(function: Callable[[], object], *, device: str) -> int:
    """Return the highest sum of live tensors during one call, above what was live before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        function()
    assert measured.profiler is not None
    results = cast(Any, measured.profiler.kineto_results)
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


@torch.inference_mode()
def measure(model: LanguageModel, *, lengths: Sequence[int], repeats: int, query_chunk: int, device: str) -> list[Row]:
    """Measure all ways at every length.

    Args:
        model: network to run.
        lengths: positions, one sequence of each length.
        repeats: timed calls of each way, interleaved; one more comes first and is not counted.
        query_chunk: queries the recorder handles at one time.
        device: `cpu` or `cuda`.

    Returns:
        One row per length and way.
    """
    rows = []
    for positions in lengths:
        ids = torch.randint(1, model.network.config.vocab_size, (1, positions), device=device)
        functions = ways(model, ids, query_chunk=query_chunk)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for repeat in range(repeats + 1):
            for name, function in functions.items():
                taken = seconds(function, device=device)
                if repeat:
                    times[name].append(taken)
        medians = {name: statistics.median(values) for name, values in times.items()}
        peaks = {name: peak_bytes(function, device=device) for name, function in functions.items()}
        rows += [
            Row(positions, n, medians[n], peaks[n], medians[n] / medians["plain"], peaks[n] / peaks["plain"]) for n in functions
        ]
    return rows


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out as text."""
    lines = [f"{'positions':>9}  {'way':<17} {'ms':>9} {'x plain':>8} {'peak MiB':>9} {'x plain':>8}"]
    lines += [
        f"{row.positions:>9}  {row.way:<17} {1e3 * row.seconds:>9.1f} {row.time_ratio:>8.2f} "
        f"{row.peak_bytes / MIB:>9.1f} {row.memory_ratio:>8.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="positions (default 128 512 2048)")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each way (default 9)")
    parser.add_argument("--query-chunk", type=int, default=masses.QUERY_CHUNK, help="queries the recorder handles at one time")
    parser.add_argument("--causal", action="store_true", help="measure an autoregressive network")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name, default in (("layers", 8), ("width", 256), ("heads", 8), ("mlp", 768)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of the network (default {default})")
    args = parser.parse_args(arguments)
    print(runtime.use_processor().reason)
    model = build(
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        mlp=args.mlp,
        positions=max(args.lengths),
        causal=args.causal,
        device=args.device,
    )
    rows = measure(model, lengths=args.lengths, repeats=args.repeats, query_chunk=args.query_chunk, device=args.device)
    print(table(rows))


if __name__ == "__main__":
    main()

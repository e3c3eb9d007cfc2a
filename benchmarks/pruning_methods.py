"""Time and memory of pruning and generation beside plain references: `python -m benchmarks.pruning_methods`.

Prunes a network with random weights by every calibrated method and generates with the plain sampler and with block caches;
the plain references of `benchmarks.references` do the same. Repeats are interleaved and the median is printed. `floor` is the
operations that a method needs at least, over the speed of the fastest matrix product measured here; `share` is how much of
that speed is reached. Memory is the highest sum of live tensors above the start, from torch's profiler on a CPU and from the
allocator's counter on a GPU.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import references
from benchmarks.attention_recorder import MIB, build, peak_bytes, seconds
from lib.calibration.sets import Inputs
from lib.core import runtime
from lib.decoding.decoder import decode
from lib.decoding.systems import fast_plan
from lib.diffusion import sampler
from lib.models.language_model import LanguageModel
from lib.pruning import pruner
from lib.pruning.methods import METHODS, RELEASE, Method, Target

REFERENCE = "reference: "
HALF = Target(0.5)


@dataclass(frozen=True)
class Call:
    """What is timed: the reference that it is compared with (its own name for a reference), and the operations it needs."""

    run: Callable[[], object]
    reference: str
    operations: float


@dataclass(frozen=True)
class Row:
    """One call: median seconds, how much faster than its reference, least seconds, share of the speed, peak bytes."""

    name: str
    seconds: float
    faster: float
    floor: float
    share: float
    peak_bytes: int


def pass_operations(model: LanguageModel, *, tokens: int, positions: int) -> float:
    """Count the operations of a forward pass without its head: two a weight and token, and attention."""
    config = model.network.config
    attention = 4.0 * positions * config.hidden_size * config.num_hidden_layers
    return tokens * (2.0 * sum(layer.module.weight.numel() for layer in model.layers) + attention)


def sparsegpt_operations(model: LanguageModel, *, tokens: int) -> float:
    """Count the operations of SparseGPT beside its passes: outer products, factor and inverse, updates of what follows."""
    shapes = [(layer.module.weight.shape, layer.role) for layer in model.layers]
    hessians = sum(width**2 * tokens + width**3 for (_, width), role in shapes if role in ("q", "o", "gate", "down"))
    return float(hessians + sum(rows * width**2 for (rows, width), _ in shapes))


def pruning_calls(model: LanguageModel, windows: Tensor, *, levels: int, batch_size: int) -> dict[str, Call]:
    """Return the pruning methods and their references by name."""
    noised, tokens = Inputs("noised", levels=levels), windows.numel()
    once = pass_operations(model, tokens=tokens, positions=windows.shape[1])
    twice, sweep = 2.0 * once, sparsegpt_operations(model, tokens=tokens)
    chosen = {
        "sink-aware (Wanda)": (replace(RELEASE["sink_wanda"], inputs=noised), levels * once),
        "Wanda": (METHODS["Wanda"], twice),
        "SparseGPT": (METHODS["SparseGPT"], twice + sweep),
        "sink-aware (SparseGPT)": (_averaged(levels), twice + sweep + levels * once),
    }
    plain: dict[str, Callable[[], object]] = {
        "sink-aware (Wanda)": partial(references.sink_wanda_, model, windows, noised),
        "Wanda": partial(references.wanda_, model, windows),
        "SparseGPT": partial(references.sparsegpt_, model, windows),
        "sink-aware (SparseGPT)": partial(references.sparsegpt_, model, windows, noised),
    }
    found = {}
    for name, (method, operations) in chosen.items():
        found[REFERENCE + name] = Call(plain[name], REFERENCE + name, operations)
        run = partial(pruner.prune_, model, method, HALF, windows=windows, batch_size=batch_size)
        found[name] = Call(run, REFERENCE + name, operations)
    return found


def _averaged(levels: int) -> Method:
    method = METHODS["sink-aware (SparseGPT)"]
    assert method.weighting is not None
    return replace(method, weighting=replace(method.weighting, levels=levels))


def generation_calls(model: LanguageModel, *, prompt: int, new_tokens: int, block: int) -> dict[str, Call]:
    """Return the plain sampler and the block caches, one token a step, beside the reference."""
    ids = torch.randint(1, model.network.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
    ids = ids.to(model.device)
    sizes = {"new_tokens": new_tokens, "block_length": block}
    total, config = prompt + new_tokens, model.network.config
    each = pass_operations(model, tokens=total, positions=total)
    head = 2.0 * config.hidden_size * config.vocab_size
    steps = new_tokens * (each + head * block / 2)
    part = pass_operations(model, tokens=block, positions=total)
    dual = new_tokens // block * (each + (block - 1) * part)
    prefix = new_tokens // block * each + part * (block - 1) * sum(range(1, new_tokens // block + 1))
    name = REFERENCE + "generation"
    decoder = {"prefix cache": (fast_plan("prefix", steps_per_block=block), prefix)}
    decoder["dual cache"] = (fast_plan("dual", steps_per_block=block), dual)
    found = {name: Call(partial(references.generate, model, ids, new_tokens=new_tokens, steps=new_tokens), name, steps)}
    plain = partial(sampler.sample, model, ids, steps=new_tokens, **sizes)
    found["generation"] = Call(plain, name, steps)
    for label, (plan, operations) in decoder.items():
        found[f"generation, {label}"] = Call(partial(decode, model, ids, plan=plan, **sizes), name, operations)
    return found


def peak_speed(device: str) -> float:
    """Return the operations a second of the fastest of three float32 products."""
    best = 0.0
    for rows, inner, columns in ((1024, 1024, 1024), (2048, 512, 2048), (4096, 512, 512)):
        left, right = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
        taken = min(seconds(lambda a=left, b=right: a @ b, device=device) for _ in range(7))
        best = max(best, 2.0 * rows * inner * columns / taken)
    return best


def measure(model: LanguageModel, found: Mapping[str, Call], *, repeats: int, device: str) -> list[Row]:
    """Measure every call on the same dense model, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in found}
    peaks: dict[str, int] = {}
    for number in range(repeats + 1):
        for name, call in found.items():
            with pruner.restored(model):
                if number:
                    taken[name].append(seconds(call.run, device=device))
                else:  # the first round warms up and measures memory
                    peaks[name] = peak_bytes(call.run, device=device)
    median, speed = {name: statistics.median(values) for name, values in taken.items()}, peak_speed(device)
    rows = []
    for name, call in found.items():
        floor = call.operations / speed
        rows.append(Row(name, median[name], median[call.reference] / median[name], floor, floor / median[name], peaks[name]))
    return rows


def same_zeros(model: LanguageModel, found: Mapping[str, Call], name: str) -> float:
    """Return the share of weights that the reference and the library treat alike."""
    masks = []
    for each in (REFERENCE + name, name):
        with pruner.restored(model):
            found[each].run()
            masks.append(torch.cat([(layer.module.weight != 0).flatten() for layer in model.layers]))
    return float((masks[0] == masks[1]).float().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    defaults = {"layers": 8, "width": 512, "heads": 8, "mlp": 1408, "positions": 512, "windows": 4, "levels": 5}
    defaults |= {"batch-size": 4, "prompt": 64, "new-tokens": 64, "block": 32, "repeats": 3}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)
    products = runtime.use_processor()
    shape = {"layers": options.layers, "width": options.width, "heads": options.heads, "mlp": options.mlp}
    longest = max(options.positions, options.prompt + options.new_tokens)
    model = build(**shape, positions=longest, causal=False, device=options.device)
    stream = torch.Generator().manual_seed(0)
    windows = torch.randint(1, model.network.config.vocab_size, (options.windows, options.positions), generator=stream)
    found = pruning_calls(model, windows, levels=options.levels, batch_size=options.batch_size)
    with torch.inference_mode():
        every = found | generation_calls(model, prompt=options.prompt, new_tokens=options.new_tokens, block=options.block)
    print(f"{torch.get_num_threads()} threads, {products.reason}")
    print(f"{'call':36}{'seconds':>9}{'faster':>8}{'floor':>9}{'share':>7}{'peak MiB':>10}")
    for row in measure(model, every, repeats=options.repeats, device=options.device):
        print(f"{row.name:36}{row.seconds:9.3f}{row.faster:8.2f}{row.floor:9.3f}{row.share:7.2f}{row.peak_bytes / MIB:10.1f}")
    for name in ("sink-aware (Wanda)", "Wanda", "SparseGPT", "sink-aware (SparseGPT)"):
        print(f"{name}: {same_zeros(model, found, name):.4%} of the weights as in the reference")


if __name__ == "__main__":
    main()

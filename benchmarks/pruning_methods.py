"""Time and peak memory of calibration and pruning: `python -m benchmarks.pruning_methods`.

Prunes a network of the reference model's shape with random weights by every calibrated method, and once by a plain reference of
the sink-aware one, written straight from its equations: for each window and noise level one pass that keeps the attention
matrices and gives the token weights, and a second one that gives the weighted norms. Repeats are interleaved and the median is
printed. Tokens are those of the calibration set (windows x noise levels for methods on noised text). Memory is the highest sum of
live tensors above the start, from torch's profiler on a CPU and from the allocator's counter on a GPU.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.attention_recorder import MIB, build, peak_bytes, seconds
from lib.attention import sinks
from lib.calibration import sets
from lib.calibration.sets import Inputs
from lib.models.language_model import LanguageModel
from lib.pruning import importances, pruner
from lib.pruning.methods import METHODS, RELEASE, Method, Target

REFERENCE = "reference, two passes"
SINK_AWARE = "sink-aware (Wanda)"
HALF = Target(0.5)


@dataclass(frozen=True)
class Row:
    """One method: median seconds, calibration tokens per second, peak bytes, and how much faster than the reference it is."""

    method: str
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    faster: float


@torch.no_grad()
def two_passes_(model: LanguageModel, windows: Tensor, inputs: Inputs) -> None:
    """Prune by |W| x the sum over samples of the norms of omega x: two passes a sample, every attention matrix kept."""
    ids = sets.read(model, windows, inputs, seed=0).flatten(0, 1)
    norms = {layer.name: torch.zeros(layer.module.in_features, device=model.device) for layer in model.layers}
    for sample in ids.to(model.device).split(1):
        model.network.set_attn_implementation("eager")
        attentions = model.network(input_ids=sample, use_cache=False, output_attentions=True).attentions
        model.network.set_attn_implementation("sdpa")
        mass = torch.stack(attentions).sum((0, 2, 3))
        omega = sinks.token_weight(sinks.soft_score(mass, sinks.mean_std_threshold(mass)))
        handles = []
        for layer in model.layers:
            hook = partial(_add_norm_, norms[layer.name], omega)
            handles.append(layer.module.register_forward_pre_hook(hook))
        model.network(input_ids=sample, use_cache=False)
        for handle in handles:
            handle.remove()
    for layer in model.layers:
        importance = layer.module.weight.abs() * norms[layer.name]
        layer.module.weight.copy_(
            importances.prune(layer.module.weight, importances.keep_mask(importance, sparsity=HALF.sparsity))
        )


def _add_norm_(norms: Tensor, omega: Tensor, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    norms += (inputs[0][0] * omega[0, :, None]).norm(dim=0)


def calls(model: LanguageModel, windows: Tensor, *, levels: int, batch_size: int) -> dict[str, tuple[Callable[[], None], int]]:
    """Return what prunes, and how many tokens it reads, by method."""
    noised = Inputs("noised", levels=levels)
    chosen: dict[str, Method] = {name: METHODS[name] for name in ("Wanda", "SparseGPT", "sink-aware (SparseGPT)")}
    chosen[SINK_AWARE] = replace(RELEASE["sink_wanda"], inputs=noised)
    found: dict[str, tuple[Callable[[], None], int]] = {
        REFERENCE: (partial(two_passes_, model, windows, noised), windows.numel() * levels)
    }
    for name, method in chosen.items():
        reads = windows.numel() * (levels if method.inputs.kind == "noised" else 1)
        found[name] = (partial(pruner.prune_, model, method, HALF, windows=windows, batch_size=batch_size), reads)
    return found


def measure(model: LanguageModel, windows: Tensor, *, levels: int, repeats: int, batch_size: int, device: str) -> list[Row]:
    """Measure every method on the same dense model."""
    found = calls(model, windows, levels=levels, batch_size=batch_size)
    taken: dict[str, list[float]] = {name: [] for name in found}
    peaks: dict[str, int] = {}
    for round_number in range(repeats + 1):
        for name, (call, _) in found.items():
            with pruner.restored(model):
                if round_number:
                    taken[name].append(seconds(call, device=device))
                else:  # the first round warms up and measures memory
                    peaks[name] = peak_bytes(call, device=device)
    median = {name: statistics.median(values) for name, values in taken.items()}
    return [
        Row(name, median[name], tokens / median[name], peaks[name], median[REFERENCE] / median[name])
        for name, (_, tokens) in found.items()
    ]


def same_zeros(model: LanguageModel, windows: Tensor, *, levels: int, batch_size: int) -> bool:
    """Tell whether the reference and the library remove the same weights."""
    masks = []
    for name in (REFERENCE, SINK_AWARE):
        with pruner.restored(model):
            calls(model, windows, levels=levels, batch_size=batch_size)[name][0]()
            masks.append([layer.module.weight != 0 for layer in model.layers])
    return all(torch.equal(first, second) for first, second in zip(*masks, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--mlp", type=int, default=768)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--levels", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    shape = {"layers": options.layers, "width": options.width, "heads": options.heads, "mlp": options.mlp}
    model = build(**shape, positions=options.positions, causal=False, device=options.device)
    stream = torch.Generator().manual_seed(0)
    windows = torch.randint(1, model.network.config.vocab_size, (options.windows, options.positions), generator=stream)
    sizes = {"levels": options.levels, "batch_size": options.batch_size}
    print(f"{'method':24}{'seconds':>9}{'tokens/s':>10}{'peak MiB':>10}{'faster':>8}")
    for row in measure(model, windows, **sizes, repeats=options.repeats, device=options.device):
        peak = row.peak_bytes / MIB
        print(f"{row.method:24}{row.seconds:9.3f}{row.tokens_per_second:10.0f}{peak:10.1f}{row.faster:8.2f}")
    print(f"reference and library remove the same weights: {same_zeros(model, windows, **sizes)}")


if __name__ == "__main__":
    main()

"""The speed that the paper's plan assumes, measured: `python -m benchmarks.plan_speed`.

A random network of LLaDA-8B's shape makes the passes of the core (`./run_all.sh paper --plan`) on the device at hand: batches of
every benchmark's texts, calibration, the loss, and passes over one block with kept keys and values. What `prices` predicts at the
assumed TFLOP/s stands beside the median of what was measured, and at the end the hours of the core with each. The head is left
out, as in the plan. A smaller network (`--layers`, `--hidden`, ...) and shorter texts (`--longest`) show that the command runs.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.core import config
from lib.core.config import ModelSource
from lib.core.runtime import generator
from lib.core.settings.grid import Core, Grid
from lib.decoding import caches
from lib.grid import costs
from lib.grid.cells import LOSS
from lib.grid.core import expansion, prices
from lib.grid.core.prices import Price
from lib.grid.costs import QUESTIONS, Shape
from lib.grid.plan import GPU_TERAFLOPS
from lib.models.language_model import LanguageModel, linear_layers, network_body

CALIBRATED = 4  # windows of a pass


@dataclass(frozen=True)
class Pass:
    """One kind of pass: rows of `tokens`, of which `computed` go through the network; all of them, or those of a block."""

    name: str
    rows: int
    tokens: int
    computed: int

    def price(self) -> Price:
        """Price it as the plan does."""
        return Price(self.rows, self.rows * self.computed, 1)


def passes(core: Core, grid: Grid, *, longest: int) -> list[Pass]:
    """Return the passes of a core, no text longer than `longest` tokens."""
    text = next(iter(grid.calibrations.values()))
    found = [
        Pass("calibration", CALIBRATED, text.positions, text.positions),
        Pass(LOSS, grid.loss_draws, grid.loss_positions, grid.loss_positions),
    ]
    for task in prices.benchmarks(core):
        size, new, block = QUESTIONS[task], core.gen_length, core.block_length
        if task == "gsm8k":
            whole = size.tokens + new
            found += [
                Pass(f"{task}, {what}", prices.EQUALLY_LONG, whole, part) for what, part in (("all", whole), ("block", block))
            ]
        else:
            found.append(Pass(task, grid.batch_size, size.tokens, size.tokens))
    return [dataclasses.replace(one, tokens=min(one.tokens, longest), computed=min(one.computed, longest)) for one in found]


def build(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """Make a random bidirectional network of a shape; its vocabulary is small, as nothing reads the head."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=64,
        max_position_embeddings=8192,
        use_cache=False,
    )
    config.is_causal = False
    with torch.device(device):
        network = LlamaForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
    given = {"tokenizer": None, "mask_token_id": 0, "logit_shift": 0, "is_causal": False, "fingerprint": ""}
    return LanguageModel("random", ModelSource("random"), network, layers=linear_layers(network), **given)


def measured(model: LanguageModel, one: Pass, *, repeats: int) -> float:
    """Return the median seconds of a pass, after one that is not counted."""
    device = model.device
    ids = torch.randint(1, 64, (one.rows, one.tokens), generator=generator(0, "random texts")).to(device)
    run: Callable[[], object] = lambda: network_body(model)(input_ids=ids, use_cache=False)  # noqa: E731
    if one.computed < one.tokens:
        store, rows = caches.new_store(model), torch.arange(one.tokens - one.computed, one.tokens, device=device)
        caches.run_whole(model, ids, store=store)
        run = lambda: caches.run_rows(model, ids, rows.expand(one.rows, -1), store=store)  # noqa: E731
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def hours(ratios: dict[str, float], shape: Shape, *, teraflops: float) -> tuple[float, float]:
    """Return the hours of the core as predicted, and with what every pass measured over predicted.

    Args:
        ratios: by task; generation has that of its passes over a block.
        shape: of the network.
        teraflops: assumed.
    """
    loaded = config.load("paper")
    core, grid = expansion.core_of(loaded), loaded.grid
    assert grid is not None
    found = [0.0, 0.0]
    for turn in expansion.turns(loaded):
        whole = prices.seconds(turn, core, grid, shape, teraflops=teraflops)
        tasks = {cell.task: prices.measuring(cell, core, grid).seconds(shape, teraflops=teraflops) for cell in turn.cells}
        found[0] += whole
        found[1] += whole - sum(tasks.values()) + sum(seconds * ratios[task] for task, seconds in tasks.items())
    return found[0] / 3600, found[1] / 3600


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--teraflops", type=float, default=GPU_TERAFLOPS, help="assumed (default: the plan's)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each kind (default 5)")
    parser.add_argument("--longest", type=int, default=8192, help="tokens of a text at most")
    wanted = costs.SHAPES["GSAI-ML/LLaDA-8B-Base"]
    for name in ("hidden", "layers", "heads", "mlp"):
        parser.add_argument(f"--{name}", type=int, default=getattr(wanted, name), help="of the network (default LLaDA-8B's)")
    given = parser.parse_args(arguments)
    loaded = config.load("paper")
    core, grid = expansion.core_of(loaded), loaded.grid
    assert grid is not None
    shape = Shape(given.hidden, given.layers, given.heads, given.heads, given.mlp, wanted.vocab)
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    model, ratios = build(shape, device=torch.device(given.device), dtype=dtype), {}
    print(f"{'pass':22}{'rows':>5}{'tokens':>8}{'computed':>9}{'predicted ms':>14}{'measured ms':>13}{'TFLOP/s':>9}{'ratio':>8}")
    for one in passes(core, grid, longest=given.longest):
        expected, took = one.price().seconds(shape, teraflops=given.teraflops), measured(model, one, repeats=given.repeats)
        ratios[one.name.removesuffix(", block")] = took / expected
        speed = 2.0 * one.rows * one.computed * shape.linear_weights / took / 1e12
        numbers = f"{1e3 * expected:14.3f}{1e3 * took:13.3f}{speed:9.3g}{took / expected:8.2f}"
        print(f"{one.name:22}{one.rows:5}{one.tokens:8}{one.computed:9}{numbers}", flush=True)
    predicted, real = hours(ratios, shape, teraflops=given.teraflops)
    print(f"the core with a network of this shape: {predicted:.3g} hours predicted, {real:.3g} as measured")


if __name__ == "__main__":
    main()

"""What a cell of the grid costs, before anything runs: rows through the network, operations, memory and disk."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaModel

from lib.checkpoints import layouts, lookup
from lib.core import hub
from lib.core.config import ModelSource
from lib.grid.cells import LOSS, STRUCTURED_PATTERN, Cell, Variant


@dataclass(frozen=True)
class Shape:
    """What a forward pass costs of a network."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int

    @property
    def block_weights(self) -> int:
        """Weights of one decoder block's linear layers."""
        head = self.hidden // self.heads
        return 2 * self.hidden * (self.heads + self.kv_heads) * head + 3 * self.hidden * self.mlp

    @property
    def weights(self) -> int:
        """All weights: blocks, embedding and an untied head."""
        return self.layers * self.block_weights + 2 * self.hidden * self.vocab


# paper.md section 4; used when a configuration can be neither found nor fetched.
SHAPES: Mapping[str, Shape] = MappingProxyType({
    "GSAI-ML/LLaDA-8B-Base": Shape(4096, 32, 32, 32, 12288, 126464),
    "GSAI-ML/LLaDA-1.5": Shape(4096, 32, 32, 32, 12288, 126464),
    "Gen-Verse/MMaDA-8B-Base": Shape(4096, 32, 32, 32, 12288, 134656),
    "Dream-org/Dream-v0-Base-7B": Shape(3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen2.5-7B": Shape(3584, 28, 28, 4, 18944, 152064),
    "meta-llama/Llama-3.1-8B": Shape(4096, 32, 32, 8, 14336, 128256),
})  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """How large a benchmark is: documents, texts to score for each, and tokens of one, prompt and examples included, roughly.

    A limit counts for each of its parts, as MMLU's subjects are.
    """

    documents: int
    texts: int
    tokens: int
    parts: int = 1


# Documents are the split that lm_eval asks; tokens are round assumptions for an English tokenizer, and say so in the plan.
QUESTIONS: Mapping[str, Questions] = MappingProxyType({
    "mmlu": Questions(14042, 1, 700, parts=57),  # four letters in the same place: one row
    "arc_challenge": Questions(1172, 4, 45),
    "arc_easy": Questions(2376, 4, 40),
    "piqa": Questions(1838, 2, 45),
    "winogrande": Questions(1267, 2, 160),
    "gsm8k": Questions(1319, 1, 900),
    "gsm8k_cot": Questions(1319, 1, 900),
    "hellaswag": Questions(10042, 4, 110),
    "gpqa_main_n_shot": Questions(448, 4, 1400),
    "race": Questions(1045, 4, 500),
})  # fmt: skip
LOCAL = Questions(240, 4, 60)


@dataclass(frozen=True)
class Cost:
    """Rows that pass through the network and all their tokens."""

    rows: float
    tokens: float

    def forwards(self, batch_size: int) -> int:
        """Return the forward passes, each of a batch of rows.

        >>> Cost(rows=65, tokens=650).forwards(32)
        3
        """
        return math.ceil(self.rows / batch_size)

    def seconds(self, shape: Shape, *, teraflops: float) -> float:
        """Return the time at a speed: two operations a weight and token, the head and the attention scores left out."""
        return 2.0 * self.tokens * shape.layers * shape.block_weights / (teraflops * 1e12)


def shape_of(source: ModelSource) -> Shape | None:
    """Return the shape of a checkpoint from its configuration, fetched when it is on the hub, else from `SHAPES`; or None.

    Raises:
        InputError: a local checkpoint of another layout.
    """
    if lookup.is_local(source):
        folder = lookup.local_path(source)
        return _read_shape(layouts.configuration(lookup.read_json(folder / "config.json"), folder)[1])
    from huggingface_hub import hf_hub_download

    where: dict[str, Any] = {"revision": source.revision, "local_files_only": bool(hub.problem())}
    try:
        path = Path(hf_hub_download(source.source, "config.json", **where))
    except hub.NETWORK_ERRORS:  # no network, no access, no such revision
        return SHAPES.get(source.source)
    return _read_shape(layouts.configuration(lookup.read_json(path), path.parent)[1])


def _read_shape(config: Any) -> Shape:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return Shape(config.hidden_size, config.num_hidden_layers, heads, kv_heads, config.intermediate_size, config.vocab_size)


def measuring(cell: Cell) -> Cost:
    """Return what it takes to measure one cell on weights that are there.

    A likelihood passes every text once a mask, twice with guidance; generation passes the whole text once a step.
    """
    settings = cell.settings
    if cell.task == LOSS:
        loss = settings["loss"]
        rows = loss["windows"] * (1 if cell.variant.is_causal else loss["draws"])
        return Cost(rows, rows * loss["positions"])
    evaluation, asked = settings["evaluation"], QUESTIONS.get(cell.task, LOCAL)
    documents = min(asked.documents, asked.parts * (settings["limit"] or asked.documents))
    if cell.task in ("gsm8k", "gsm8k_cot") and cell.variant.is_causal:  # with its cache, every token passes once
        return Cost(documents * evaluation["gen_length"], documents * (asked.tokens + evaluation["gen_length"]))
    if cell.task in ("gsm8k", "gsm8k_cot"):
        rows = documents * evaluation["steps"]
        return Cost(rows, rows * (asked.tokens + evaluation["gen_length"]))
    each = 1 if cell.variant.is_causal or cell.task == "mmlu" else evaluation["draws"] * (1 + (evaluation["cfg_scale"] > 0))
    rows = documents * asked.texts * each
    return Cost(rows, rows * asked.tokens)


def pruning(variant: Variant) -> Cost:
    """Return what calibration takes: every window once a noise level, and again behind the pruned block if sequential."""
    text, method = variant.calibration, variant.options
    if text is None or method is None:
        return Cost(0, 0)
    levels = 1 if method.inputs.kind == "clean" else method.inputs.levels
    passes = levels * (2 if method.sequential else 1)
    if method.weighting is not None and (method.sequential or variant.pattern == STRUCTURED_PATTERN):
        passes += method.weighting.levels if method.weighting.averaged else levels  # the sinks are measured before
    rows = text.windows * passes
    return Cost(rows, rows * text.positions)


def memory_bytes(
    variant: Variant, shape: Shape, *, batch_size: int, weights: str, states: str, itemsize: int, gpus: float = 1
) -> int:
    """Return an estimate of the peak on one device: weights, states between blocks, Hessians, and the activations of a batch.

    Args:
        variant: what is pruned and measured.
        shape: of its model.
        batch_size: rows of a forward pass.
        weights: as `grid.weights`; a streamed model has a few matrices in memory, unless it is cut smaller.
        states: as `grid.states`; elsewhere than on the device there are none on it, and one Hessian at a time.
        itemsize: bytes of a number.
        gpus: that share spread weights.
    """
    resident = float(shape.weights)
    if weights == "streamed" and variant.pattern != STRUCTURED_PATTERN:
        resident = 3 * shape.block_weights + 2 * shape.hidden * shape.vocab
    if weights == "spread":
        resident /= max(1, gpus)
    total = itemsize * math.ceil(resident)
    text, method = variant.calibration, variant.options
    tokens = 4096 * batch_size // 8
    if text is not None and method is not None:
        on_device = states == "device"
        total += states_bytes(variant, shape, itemsize=itemsize) if on_device else 0
        if method.needs_hessian:  # and a working copy of the largest
            total += 4 * ((3 * shape.hidden**2 if on_device else 0) + 2 * shape.mlp**2)
        tokens = max(tokens, 4 * text.positions)
    return total + itemsize * tokens * (4 * shape.hidden + 3 * shape.mlp)


def states_bytes(variant: Variant, shape: Shape, *, itemsize: int) -> int:
    """Return what the hidden states of all calibration windows take between two blocks; 0 where none are kept."""
    text, method = variant.calibration, variant.options
    if text is None or method is None or not (method.sequential or variant.pattern == STRUCTURED_PATTERN):
        return 0
    samples = text.windows * (1 if method.inputs.kind == "clean" else method.inputs.levels)
    return itemsize * samples * text.positions * shape.hidden


def kept_bytes(variant: Variant, shape: Shape, *, itemsize: int) -> int:
    """Return what the files of pruned weights take: zeros are stored, what was cut out is not."""
    left = 1 - variant.sparsity if variant.pattern == STRUCTURED_PATTERN else 1
    return itemsize * round(shape.layers * shape.block_weights * left + 2 * shape.hidden * shape.vocab)


def measured_teraflops(shape: Shape, *, device: torch.device, dtype: torch.dtype, tokens: int = 2048, repeats: int = 3) -> float:
    """Measure how fast one random block of a shape runs on the machine at hand, in 10^12 operations a second.

    Args:
        shape: of the model.
        device, dtype: of the run.
        tokens: of the one text that passes.
        repeats: passes; the fastest counts.
    """
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=8,
        max_position_embeddings=tokens,
        use_cache=False,
    )
    with torch.device(device):
        network = LlamaModel(config).eval()
    cast(torch.nn.Module, network).to(dtype=dtype)
    ids, best = torch.zeros(1, tokens, dtype=torch.long, device=device), float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        with torch.inference_mode():
            network(input_ids=ids)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * tokens * shape.block_weights / best / 1e12

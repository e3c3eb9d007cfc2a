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

from lib.checkpoints import contents, layouts, lookup
from lib.core import hub
from lib.core.config import ModelSource
from lib.grid.cells import LOSS, STRUCTURED_PATTERN, Cell, Variant


@dataclass(frozen=True)
class Experts:
    """The mixtures of a network.

    Attributes:
        count: experts of a block.
        chosen: of them, by each token.
        width: channels of one.
        shared: channels of the expert that every token passes, 0 where there is none.
        dense_blocks: blocks without experts.
    """

    count: int
    chosen: int
    width: int
    shared: int = 0
    dense_blocks: int = 0


@dataclass(frozen=True)
class Shape:
    """What a forward pass costs of a network; `mlp` is that of dense blocks."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    head_dim: int = 0  # hidden / heads where it is 0
    experts: Experts | None = None

    @property
    def block_weights(self) -> int:
        """Weights of the linear layers of one decoder block, of one with experts where there are any."""
        own = self.experts
        return self._block(self.mlp if own is None else own.count * own.width + own.shared)

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers of all blocks."""
        dense = 0 if self.experts is None else self.experts.dense_blocks
        return (self.layers - dense) * self.block_weights + dense * self._block(self.mlp)

    @property
    def expert_weights(self) -> int:
        """Of them, those of experts that a router chooses."""
        own = self.experts
        return 0 if own is None else (self.layers - own.dense_blocks) * 3 * self.hidden * own.count * own.width

    @property
    def active_weights(self) -> int:
        """Of them, those that one token meets."""
        own = self.experts
        return (
            self.linear_weights
            if own is None
            else round(self.linear_weights - self.expert_weights * (1 - own.chosen / own.count))
        )

    @property
    def active_mlp(self) -> int:
        """Channels that a token meets in the widest block."""
        own = self.experts
        return self.mlp if own is None else max(own.chosen * own.width + own.shared, self.mlp * (own.dense_blocks > 0))

    @property
    def widest_reader(self) -> int:
        """Input features of the widest `down`."""
        own = self.experts
        return self.mlp if own is None else max(own.width, own.shared, self.mlp * (own.dense_blocks > 0))

    @property
    def weights(self) -> int:
        """All weights: blocks, routers, embedding and an untied head."""
        own = self.experts
        routers = 0 if own is None else (self.layers - own.dense_blocks) * own.count * self.hidden
        return self.linear_weights + routers + 2 * self.hidden * self.vocab

    def _block(self, channels: int) -> int:
        head = self.head_dim or self.hidden // self.heads
        return 2 * self.hidden * (self.heads + self.kv_heads) * head + 3 * self.hidden * channels


# paper.md section 4; used when a configuration can be neither found nor fetched.
SHAPES: Mapping[str, Shape] = MappingProxyType({
    "GSAI-ML/LLaDA-8B-Base": Shape(4096, 32, 32, 32, 12288, 126464),
    "GSAI-ML/LLaDA-1.5": Shape(4096, 32, 32, 32, 12288, 126464),
    "Gen-Verse/MMaDA-8B-Base": Shape(4096, 32, 32, 32, 12288, 134656),
    "Dream-org/Dream-v0-Base-7B": Shape(3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen2.5-7B": Shape(3584, 28, 28, 4, 18944, 152064),
    "meta-llama/Llama-3.1-8B": Shape(4096, 32, 32, 8, 14336, 128256),
    "Qwen/Qwen3-0.6B": Shape(1024, 28, 16, 8, 3072, 151936, head_dim=128),
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": Shape(1024, 28, 16, 8, 3072, 151936, head_dim=128),
})  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """How large a benchmark is: documents, texts to score for each, tokens of one with its prompt, and of its answer, roughly.

    A limit counts for each of its parts, as MMLU's subjects are.
    """

    documents: int
    texts: int
    tokens: int
    answer: int
    parts: int = 1


# Documents are the split that lm_eval asks; tokens are round assumptions for an English tokenizer, and say so in the plan.
QUESTIONS: Mapping[str, Questions] = MappingProxyType({
    "mmlu": Questions(14042, 1, 700, 1, parts=57),  # four letters in the same place: one row
    "arc_challenge": Questions(1172, 4, 45, 6),
    "arc_easy": Questions(2376, 4, 40, 5),
    "piqa": Questions(1838, 2, 45, 24),
    "winogrande": Questions(1267, 2, 160, 8),
    "gsm8k": Questions(1319, 1, 900, 256),
    "gsm8k_cot": Questions(1319, 1, 900, 256),
    "hellaswag": Questions(10042, 4, 110, 30),
    "gpqa_main_n_shot": Questions(448, 4, 1400, 3),
    "race": Questions(1045, 4, 500, 9),
})  # fmt: skip
LOCAL = Questions(240, 4, 60, 8)


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
        """Return the time at a speed: two operations a weight that a token meets, the head and the attention scores left out."""
        return 2.0 * self.tokens * shape.active_weights / (teraflops * 1e12)


def shape_of(source: ModelSource) -> Shape | None:
    """Return the shape of a checkpoint from its configuration, fetched when it is on the hub, else from `SHAPES`; or None.

    Raises:
        InputError: a local checkpoint of another layout.
    """
    if lookup.is_local(source):
        return _shape_in(contents.folder_of(lookup.local_path(source)))
    from huggingface_hub import hf_hub_download

    where: dict[str, Any] = {"revision": source.revision, "local_files_only": bool(hub.problem())}
    try:
        path = Path(hf_hub_download(source.source, "config.json", **where))
    except hub.NETWORK_ERRORS:  # no network, no access, no such revision
        return SHAPES.get(source.source)
    return _shape_in(path.parent, name=source.source)


def _shape_in(folder: Path, *, name: str = "") -> Shape:
    family = lookup.family_of(folder, name=name)
    return _read_shape(layouts.configuration(lookup.read_json(folder / "config.json"), family, folder)[1])


def _read_shape(config: Any) -> Shape:
    heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // heads
    own = {"head_dim": 0 if head == hidden // heads else head, "experts": _read_experts(config)}
    return Shape(hidden, config.num_hidden_layers, heads, kv_heads, config.intermediate_size, config.vocab_size, **own)


def _read_experts(config: Any) -> Experts | None:
    """Return the mixtures that a configuration describes, in the words of either family; None for a dense network."""
    count = getattr(config, "n_routed_experts", None) or getattr(config, "num_experts", None)
    if not count:
        return None
    width, blocks = config.moe_intermediate_size, range(config.num_hidden_layers)
    step, only = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or ()
    first = getattr(config, "first_k_dense_replace", 0)
    dense = sum(block < first or block in only or (block + 1) % step != 0 for block in blocks)
    return Experts(count, config.num_experts_per_tok, width, (getattr(config, "n_shared_experts", 0) or 0) * width, dense)


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
        kept = 2 if shape.experts is not None and method.needs_hessian else 1  # also what a mixture reads
        total += kept * states_bytes(variant, shape, itemsize=itemsize) if on_device else 0
        if method.needs_hessian:  # and a working copy of the largest; experts have theirs one at a time
            largest = max(shape.widest_reader, 0 if shape.experts is None else shape.hidden)
            total += 4 * ((3 * shape.hidden**2 if on_device else 0) + 2 * largest**2)
        tokens = max(tokens, 4 * text.positions)
    return total + itemsize * tokens * (4 * shape.hidden + 3 * shape.active_mlp)


def states_bytes(variant: Variant, shape: Shape, *, itemsize: int) -> int:
    """Return what the hidden states of all calibration windows take between two blocks; 0 where none are kept."""
    text, method = variant.calibration, variant.options
    if text is None or method is None or not (method.sequential or variant.pattern == STRUCTURED_PATTERN):
        return 0
    samples = text.windows * (1 if method.inputs.kind == "clean" else method.inputs.levels)
    return itemsize * samples * text.positions * shape.hidden


def kept_bytes(variant: Variant, shape: Shape, *, itemsize: int) -> int:
    """Return what the files of pruned weights take: zeros are stored, what was cut out is not."""
    cut = shape.linear_weights if shape.experts is None else shape.expert_weights
    gone = variant.sparsity * cut if variant.pattern == STRUCTURED_PATTERN else 0
    return itemsize * round(shape.weights - gone)


def measured_teraflops(shape: Shape, *, device: torch.device, dtype: torch.dtype, tokens: int = 2048, repeats: int = 3) -> float:
    """Measure how fast one random block of a shape runs on the machine at hand, in 10^12 operations a second.

    A mixture is measured as a dense block of as many channels as a token meets, which is faster: its experts get few tokens each.

    Args:
        shape: of the model.
        device, dtype: of the run.
        tokens: of the one text that passes.
        repeats: passes; the fastest counts.
    """
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.active_mlp,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim or shape.hidden // shape.heads,
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
    return (
        2.0 * tokens * sum(parameter.numel() for parameter in network.layers.parameters() if parameter.dim() == 2) / best / 1e12
    )

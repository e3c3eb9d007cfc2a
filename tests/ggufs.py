"""GGUF files as llama.cpp writes them, from tiny networks."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.models.export import QuantizedWeight
from lib.models.language_model import LanguageModel
from lib.quantization.rounding import Grid, round_to_nearest
from tests import tiny

TOKENS = [*"abcdefghijklmnopqrstuvwxyz", "ab", *(f"<{index}>" for index in range(27, tiny.VOCAB))]
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "llada": gguf.MODEL_ARCH.LLADA,
    "dream": gguf.MODEL_ARCH.DREAM,
}
PERMUTED = ("llama", "llada")


def rows_in_turn(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k: row i of the first half of a head, then row i of its second half."""
    half = weight.shape[0] // heads // 2
    order = [head * 2 * half + side * half + row for head in range(heads) for row in range(half) for side in range(2)]
    return weight[order]


def stored(network: PreTrainedModel, architecture: str) -> dict[str, Tensor]:
    """The tensors of a network by their names in the file."""
    config: Any = network.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    found = {}
    for name, value in network.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        turned = rows_in_turn(value, heads) if heads and architecture in PERMUTED else value
        found[str(names.get_name(name, (".weight", ".bias")))] = turned
    return found


def write(
    file: Path,
    network: PreTrainedModel,
    *,
    architecture: str,
    kind: str = "F32",
    mask: int | None = tiny.MASK,
    tokens: list[str] | None = None,
    fields: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    extra: dict[str, Tensor] | None = None,
    parts: int = 0,
    shift: bool | None = None,
) -> Path:
    """Write a GGUF, divided into `parts` of about equal numbers of tensors where that is not 0.

    Args:
        file: its name, `STEM.gguf` also for one that is divided.
        network: a tiny Llama or Qwen2.
        architecture: its name in llama.cpp.
        kind: of the matrices; norms and biases are in float32.
        mask: token id of the field, left out for None and for causal networks.
        tokens: the vocabulary.
        fields: further fields of the architecture, whole numbers and text.
        without: tensors to leave out.
        extra: further tensors.
        parts: see above.
        shift: of the logits; that of the architecture when None.
    """
    tensors = {name: value for name, value in stored(network, architecture).items() if name not in without} | (extra or {})
    if not parts:
        _write_one(file, network, architecture, tensors, kind, mask, tokens or TOKENS, fields or {}, shift, None)
        return file
    names = list(tensors)
    for number in range(parts):
        own = {name: tensors[name] for name in names[number::parts]}
        part = file.with_name(f"{file.stem}-{number + 1:05d}-of-{parts:05d}.gguf")
        split = (number, parts, len(names))
        _write_one(part, network, architecture, own, kind, mask, tokens or TOKENS, fields or {}, shift, split)
    return file.with_name(f"{file.stem}-00001-of-{parts:05d}.gguf")


def _write_one(
    file: Path,
    network: PreTrainedModel,
    architecture: str,
    tensors: dict[str, Tensor],
    kind: str,
    mask: int | None,
    tokens: list[str],
    fields: dict[str, Any],
    shift: bool | None,
    split: tuple[int, int, int] | None,
) -> None:
    writer = gguf.GGUFWriter(str(file), architecture)
    if split is None or split[0] == 0:
        _write_fields(writer, network.config, architecture, mask, tokens, fields, shift)
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[2])
    for name, value in tensors.items():
        quantized = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(value.float().numpy()), quantized)
        writer.add_tensor(name, data, raw_dtype=quantized)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def _write_fields(
    writer: Any, config: Any, architecture: str, mask: int | None, tokens: list[str], fields: dict[str, Any], shift: bool | None
) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if architecture in ("llada", "dream"):
        writer.add_causal_attention(False)
        writer.add_diffusion_shift_logits(architecture == "dream" if shift is None else shift)
        if mask is not None:
            writer.add_mask_token_id(mask)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(29)
    writer.add_eos_token_id(28)
    for key, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{architecture}.{key}", value)


def read_back(network: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Round the matrices of a network in place as a kind of the format does; the order of rows does not matter to it."""
    quantized = gguf.GGMLQuantizationType[kind]
    for value in network.state_dict().values():
        if value.ndim == 2:
            rounded = gguf.quants.quantize(value.numpy(), quantized)
            value.copy_(torch.from_numpy(gguf.quants.dequantize(rounded, quantized)))
    return network


def rounded_(model: LanguageModel, *, bits: int, group: int, sparsity: float = 0.0) -> dict[str, QuantizedWeight]:
    """Put codes times scales into the network, a share of them pruned."""
    made = {}
    for layer in model.layers:
        weight = layer.module.weight.detach()
        kept = weight.abs() >= weight.abs().float().quantile(sparsity) if sparsity else torch.ones_like(weight).bool()
        found = round_to_nearest(weight.float() * kept, Grid(bits, group))
        made[layer.name] = QuantizedWeight(found.codes, found.scales, bits, group)
        layer.module.weight.copy_(made[layer.name].dequantize(dtype=weight.dtype))
    return made

"""Write models as GGUF files for llama.cpp, the one engine outside Python that loads them: codes bit for bit, and the tokenizer.

Diffusion models become architecture `llada` (`dream` for a Qwen2), which llama.cpp runs with full attention; autoregressive ones
`llama` (`qwen2`). Unstructured zeros save no bytes there, and 2- and 3-bit codes take 4.5 bits a weight as those of 4 bits do.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lib.core.config import typed_path
from lib.core.errors import InputError, require
from lib.core.provenance import replacing
from lib.models.export import Kept, QuantizedWeight, check_kept, check_quantized, state
from lib.models.gguf.tokenizer import write_tokenizer
from lib.models.language_model import LanguageModel

BLOCK = 32  # neighbours in a row that share a scale, in both formats of codes
FLOATS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
# by type of configuration: (diffusion, autoregressive)
ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLADA, gguf.MODEL_ARCH.LLAMA),
    "qwen2": (gguf.MODEL_ARCH.DREAM, gguf.MODEL_ARCH.QWEN2),
}


@dataclass(frozen=True)
class GgufFile:
    """A written file.

    Attributes:
        path: of the file.
        exact: quantized layers whose codes and scales stand in it bit for bit.
        requantized: quantized layers that GGUF cannot hold and whose weights gguf's quantizer rounded once more.
        as_floats: quantized layers whose rows are no multiple of 32, which stay floats.
    """

    path: Path
    exact: tuple[str, ...]
    requantized: tuple[str, ...]
    as_floats: tuple[str, ...]


def save_gguf(
    model: LanguageModel,
    file: Path | str,
    *,
    quantized: Mapping[str, QuantizedWeight] | None = None,
    kept: Kept | None = None,
    pre_tokenizer: str | None = None,
) -> GgufFile:
    """Write a model as one GGUF file: dense, pruned, uniformly smaller, or with codes of 2 to 8 bits.

    Weights without codes are written in the dtype of the network (norms in float32), so nothing is rounded. Codes of up to 4 bits
    become Q4_0 and others Q8_0: exact where 32 divides their group and float16 holds their scales, which it does with bfloat16
    ones from 2^-17 to 65504; else gguf's own quantizer of that format rounds the weights again, and the result says which.
    A 16-bit network computes with codes times scales rounded to its dtype; the file does not round them.

    Args:
        model: a Llama or Qwen2, diffusion or autoregressive.
        file: a new file, by convention `NAME.gguf`; a relative one starts where the command was typed.
        quantized: by the name of the weight, as in `save_packed`.
        kept: for a structurally pruned model, written into the file's metadata under `kept`.
        pre_tokenizer: llama.cpp's name of the tokenizer's way to split a text; None finds it.

    Returns:
        The file, and what became of each quantized layer.

    Raises:
        InputError: as in `save_packed`, the file exists, or the network, its positions or its tokenizer are none that llama.cpp's
            architecture has.

    Source: llama.cpp's `conversion/llada.py` and `llama.py`, written after `gguf` 0.19. q and k of a Llama are permuted, because
        llama.cpp rotates neighbouring features where transformers rotates the two halves of a head.
    """
    file, quantized = typed_path(file), quantized or {}
    require(not file.exists(), "an export must go to a new file", f"{file}, which exists", "name another one or delete it")
    architecture = _architecture(model)
    check_quantized(model, quantized)
    check_kept(model, kept)
    with replacing(file) as partial:
        writer = gguf.GGUFWriter(str(partial), gguf.MODEL_ARCH_NAMES[architecture])
        _write_config(writer, model, kept)
        write_tokenizer(writer, model.tokenizer, rows=model.network.config.vocab_size, pre=pre_tokenizer)
        kinds = _write_tensors(writer, model, architecture, quantized)
        most = max(set(kinds.values()), key=lambda kind: sum(1 for found in kinds.values() if found == kind))
        writer.add_file_type(FILE_TYPES[most])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    codes = {name for name in quantized if kinds[name] in (Kind.Q4_0, Kind.Q8_0)}
    exact = {name for name in codes if is_exact(quantized[name])}
    parts = (exact, codes - exact, quantized.keys() - codes)
    return GgufFile(file, *(tuple(name for name in quantized if name in part) for part in parts))


def is_exact(quantized: QuantizedWeight) -> bool:
    """Tell whether GGUF holds codes and scales as they are: whole blocks of 32 share a scale, and float16 holds it."""
    scales = quantized.scales
    return quantized.group_size % BLOCK == 0 and torch.equal(scales.half().to(scales.dtype), scales)


def blocks_of(quantized: QuantizedWeight) -> np.ndarray:
    """Lay codes and scales out as Q4_0 (up to 4 bits) or Q8_0 does, a block of 32 behind the other.

    A block is its scale in float16, then one byte a code; in Q4_0 a byte holds code + 8 of column j in its lower half and that
    of column j + 16 in its upper half.

    Args:
        quantized: for which `is_exact` holds.

    Returns:
        Bytes, [out_feature, byte].
    """
    rows = len(quantized.codes)
    codes = quantized.codes.cpu().view(rows, -1, BLOCK)
    scales = quantized.scales.cpu().half().repeat_interleave(quantized.group_size // BLOCK, dim=1)
    if quantized.bits > 4:
        packed = codes.view(torch.uint8)
    else:
        low, high = (codes + 8).view(torch.uint8).chunk(2, dim=2)
        packed = low | (high << 4)
    return torch.cat([scales[..., None].contiguous().view(torch.uint8), packed], dim=2).view(rows, -1).numpy()


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Order the rows of q or k as llama.cpp rotates them: feature i beside feature i + half of its head.

    >>> interleaved(torch.arange(8)[:, None], 2)[:, 0].tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def tokenizer_mismatch(tokenizer: PreTrainedTokenizerBase, file: Path | str, texts: Iterable[str]) -> float:
    """Return the share of texts that a GGUF's tokenizer writes with other ids, as transformers reads it.

    llama.cpp reads the same entries, but knows more names of pre-tokenizers than transformers does.

    Args:
        tokenizer: of the model.
        file: written by `save_gguf`.
        texts: to compare; what tokenizers put around them is left out.

    Raises:
        InputError: no texts.
    """
    file, listed = Path(file), list(texts)
    require(bool(listed), "a mismatch must be counted over texts", "none", "give some")
    read = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    own, other = (reader(listed, add_special_tokens=False)["input_ids"] for reader in (tokenizer, read))
    return sum(a != b for a, b in zip(own, other, strict=True)) / len(listed)


def _architecture(model: LanguageModel) -> gguf.MODEL_ARCH:
    """Return llama.cpp's architecture, refusing what it would compute otherwise."""
    config: Any = model.network.config
    known = ", ".join(ARCHITECTURES)
    require(config.model_type in ARCHITECTURES, f"a GGUF export must be of {known}", config.model_type, "use save_plain")
    wanted = "causal" if model.is_causal else "full"
    require(
        model.attention == wanted, "llama.cpp must look at all positions or at earlier ones", model.attention, "use save_plain"
    )
    rule = "llama.cpp must write by filling masks in"
    require(model.is_causal or model.noise.is_masked, rule, f"{model.noise} noise in {model.name}", "use save_plain")
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    require(kind == "default", "positions of a GGUF export must be rotated without scaling", kind, "use save_plain")
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    require(not sliding, "every layer of a GGUF export must see all positions", "sliding windows", "use save_plain")
    require(config.hidden_act == "silu", "the activation of a GGUF export must be silu", config.hidden_act, "use save_plain")
    dtype = str(model.network.dtype).removeprefix("torch.")
    require(model.network.dtype in FLOATS, "a GGUF export must be of float32, float16 or bfloat16", dtype, "load it so")
    return ARCHITECTURES[config.model_type][int(model.is_causal)]


def _write_config(writer: gguf.GGUFWriter, model: LanguageModel, kept: Kept | None) -> None:
    """Write what llama.cpp must know about the network."""
    config: Any = model.network.config
    head = model.layers[0].module.out_features // config.num_attention_heads
    writer.add_name(model.name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    if head * config.num_attention_heads != config.hidden_size:  # heads were removed
        writer.add_key_length(head)
        writer.add_value_length(head)
    if not model.is_causal:
        writer.add_causal_attention(False)
        writer.add_diffusion_shift_logits(bool(model.logit_shift))
        if model.mask_token_id is not None:
            writer.add_mask_token_id(model.mask_token_id)
    if kept is not None:
        parts = {"groups": kept.groups, "channels": kept.channels}
        writer.add_string("kept", json.dumps({name: [block.tolist() for block in part] for name, part in parts.items()}))


def _write_tensors(
    writer: gguf.GGUFWriter, model: LanguageModel, architecture: gguf.MODEL_ARCH, quantized: Mapping[str, QuantizedWeight]
) -> dict[str, Kind]:
    """Write all weights, and return the format of each matrix by its name here."""
    config: Any = model.network.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if config.model_type == "llama" else {}
    kinds: dict[str, Kind] = {}
    for name, tensor in state(model).items():
        target = names.get_name(name, (".weight", ".bias"))
        if target is None or (name.endswith(".bias") and config.model_type == "llama"):
            raise InputError(f"every tensor must have a place in GGUF's {writer.arch}, got {name}: use save_plain")
        count = next((count for role, count in heads.items() if f".{role}." in name), None)
        data, kind = _stored(tensor, quantized.get(name), count)
        writer.add_tensor(target, data, raw_dtype=kind)
        if tensor.ndim == 2:
            kinds[name] = kind
    if quantized:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return kinds


def _stored(tensor: Tensor, quantized: QuantizedWeight | None, heads: int | None) -> tuple[np.ndarray, Kind]:
    """Return a tensor as it stands in the file, its rows interleaved where there are heads to rotate."""
    value = tensor if heads is None else interleaved(tensor, heads)
    if quantized is not None and tensor.shape[1] % BLOCK == 0:
        kind = Kind.Q8_0 if quantized.bits > 4 else Kind.Q4_0
        if not is_exact(quantized):
            return gguf.quants.quantize(value.float().cpu().numpy(), kind), kind
        codes, scales = quantized.codes, quantized.scales
        if heads is not None:
            codes, scales = interleaved(codes, heads), interleaved(scales, heads)
        return blocks_of(QuantizedWeight(codes.contiguous(), scales, quantized.bits, quantized.group_size)), kind
    kind = FLOATS[tensor.dtype] if tensor.ndim > 1 else Kind.F32  # llama.cpp adds and multiplies vectors in float32
    return gguf.quants.quantize(value.float().cpu().contiguous().numpy(), kind), kind

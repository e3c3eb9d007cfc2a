"""Convert a GGUF file to a plain checkpoint folder, named by its content: dequantized, renamed, rows of q and k put back."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lib.checkpoints import files, integrity
from lib.checkpoints.gguf import headers
from lib.core.errors import InputError, require
from lib.core.provenance import write_json

SHARD_BYTES = 2**31
TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
PERMUTED = ("llama", "llada")  # llama.cpp turns pairs of rotated rows that stand half a head apart into neighbours, for these
BIDIRECTIONAL = ("llada", "dream")
MASKS = ("<|mdm_mask|>", "<|mask|>", "<|MASK|>", "|<MASK>|", "<[MASK]>", "[MASK]")


def folder_of(file: Path) -> Path:
    """Return a folder with the weights of a GGUF as float32 safetensors, converting once for each content.

    It lies beside the file, or in the project's `.cache/` where that folder cannot be written. The hash of the content is in its
    name, so a file that was replaced is never answered from the conversion of the one before.

    Args:
        file: the GGUF, or the first of its parts.

    Returns:
        The folder.

    Raises:
        InputError: the file is cut or of another kind of network, or no folder can be written.
    """
    found = headers.read(file)
    content = hashlib.sha256("".join(integrity.remembered_hash(part) for part in found.parts).encode()).hexdigest()
    name = f"{file.stem}-float32-{content[:12]}"
    places = (file.parent, files.cache_folder() / "gguf")
    for place in places:
        if (place / name).is_dir() and _is_whole(place / name):
            return place / name
    refused: OSError | None = None
    for place in places:
        try:
            return _converted(found, place / name)
        except OSError as error:
            refused = error
    reason = getattr(refused, "strerror", None) or str(refused)
    rule = f"the float32 weights of {file.name} must be written to {places[0]} or {places[1]}"
    raise InputError(f"{rule}, got {reason}: free or open one of them") from refused


def _is_whole(folder: Path) -> bool:
    try:
        for path in files.weight_files(folder):
            files.check_safetensors(path)
        files.read_json(folder / "config.json")
    except InputError:
        return False
    return True


def _converted(found: headers.Header, target: Path) -> Path:
    """Write the folder beside its place, then put it there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    config = configuration(found)
    _names(found, config)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as temporary:
        partial = Path(temporary) / "whole"
        partial.mkdir()
        tokenizer = _tokenizer(found)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _write_weights(found, config, partial)
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        if target.is_dir() and not _is_whole(target):
            target.rename(Path(temporary) / "damaged")
        if not target.exists():  # another process may have been faster
            partial.rename(target)
    return target


def check(found: headers.Header) -> None:
    """Refuse a GGUF that cannot be converted, by its fields and the names of its tensors.

    Args:
        found: from `headers.read`.

    Raises:
        InputError: fields that a plain Llama or Qwen2 does not have, no mask token, missing or surplus tensors.
    """
    _names(found, configuration(found))


def configuration(found: headers.Header) -> dict[str, Any]:
    """Translate the fields of a GGUF to the configuration of a Llama or Qwen2.

    Raises:
        InputError: a field is missing, or asks for what these networks do not have.
    """
    _check_options(found)
    heads = found.own("attention.head_count")
    is_llama = found.architecture in PERMUTED
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if is_llama else "Qwen2ForCausalLM"],
        "model_type": "llama" if is_llama else "qwen2",
        "hidden_size": found.own("embedding_length"),
        "intermediate_size": found.own("feed_forward_length"),
        "num_hidden_layers": found.own("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": found.own("attention.head_count_kv", heads),
        "max_position_embeddings": found.own("context_length"),
        "rms_norm_eps": found.own("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": found.own("rope.freq_base", 10000.0)},
        "vocab_size": found.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in found.tensors else None,
        "tie_word_embeddings": "output.weight" not in found.tensors,
        "dtype": "float32",
    }
    lost = sorted(key for key, value in config.items() if value is None)
    require(not lost, f"{found.parts[0]} must say {', '.join(lost) or 'all'}", "no such field", "convert the model again")
    lists = sorted(key for key, value in config.items() if key.startswith("num_") and not isinstance(value, int))
    require(not lists, "all blocks must have one shape", f"one of its own for each in {found.parts[0]}", "use another model")
    if found.own("attention.key_length") is not None and is_llama:
        config["head_dim"] = found.own("attention.key_length")
    if is_llama and "blk.0.attn_q.bias" in found.tensors:
        config["attention_bias"] = True
    if not is_llama:  # its class has these biases always; a network without them is another, under the same name
        rule = f"a GGUF of {found.architecture} must have biases of q, k and v as a Qwen2 has"
        require("blk.0.attn_q.bias" in found.tensors, rule, f"none in {found.parts[0]}", "use its safetensors")
    for key in ("bos", "eos", "padding"):
        config[f"{key.removesuffix('ding')}_token_id"] = found.values.get(f"tokenizer.ggml.{key}_token_id")
    return config | _direction(found)


def _direction(found: headers.Header) -> dict[str, Any]:
    """Return what makes a network one of diffusion: attention both ways, the mask, and the shift of the logits."""
    is_causal = bool(found.own("attention.causal", found.architecture not in BIDIRECTIONAL))
    if is_causal:
        return {"is_causal": True}
    shift = found.values.get("diffusion.shift_logits", found.architecture == "dream")
    return {"is_causal": False, "mask_token_id": _mask(found), "logit_shift": int(bool(shift)), "use_cache": False}


def _mask(found: headers.Header) -> int:
    """Return the mask token: the field's, or a token of one of the known names."""
    stated = found.values.get("tokenizer.ggml.mask_token_id")
    if stated is not None:
        return int(stated)
    tokens = headers.read(found.parts[0], lists=(TOKENS,)).values.get(TOKENS, ())
    known = [index for index, token in enumerate(tokens if isinstance(tokens, list | tuple) else ()) if token in MASKS]
    rule = f"a GGUF of {found.architecture} must name its mask token"
    remedy = "add tokenizer.ggml.mask_token_id with gguf_new_metadata.py"
    require(len(known) == 1, rule, f"{len(known) or 'none'} in {found.parts[0]}", remedy)
    return known[0]


def _check_options(found: headers.Header) -> None:
    """Refuse what a plain Llama or Qwen2 does not do."""
    where, remedy = found.parts[0], "use the safetensors of the model, where its family is supported"
    scaling = str(found.own("rope.scaling.type", "none"))
    require(scaling == "none", "rotary positions must be plain", f"rope.scaling.type {scaling} in {where}", remedy)
    for key in () if found.own("rope.scaling.type") else ("rope.scaling.factor", "rope.scale_linear"):
        factor = found.own(key, 1)  # llama.cpp takes one without a type for linear scaling, and 0 for none
        require(factor in (0, 1), "rotary positions must be plain", f"{key} {factor:g} in {where}", remedy)
    require(not found.own("expert_count", 0), "a GGUF must have no experts", f"{found.own('expert_count')} in {where}", remedy)
    window = found.own("attention.sliding_window", 0)
    require(not window, "every layer must see all positions", f"a sliding window of {window} in {where}", remedy)
    heads = found.own("attention.head_count")
    if isinstance(heads, int) and isinstance(found.own("embedding_length"), int):
        head = found.own("attention.key_length", found.own("embedding_length") // heads)
        turned = found.own("rope.dimension_count", head)
        require(turned == head, f"all {head} values of a head must be rotated", f"{turned} in {where}", remedy)


def network_name(name: str, architecture: str) -> str:
    """Return the network's name of a tensor of a GGUF.

    Args:
        name: in the file.
        architecture: for the error.

    Raises:
        InputError: a tensor that the network does not have.

    >>> network_name("blk.3.attn_output.weight", "llada")
    'model.layers.3.self_attn.o_proj.weight'
    """
    inside = NAME.fullmatch(name)
    if inside and inside[2] in BLOCK:
        return f"model.layers.{inside[1]}.{BLOCK[inside[2]]}.{inside[3]}"
    if name.endswith(".weight") and name.removesuffix(".weight") in TOP:
        return f"{TOP[name.removesuffix('.weight')]}.weight"
    raise InputError(f"a GGUF of {architecture} must hold the tensors of its network only, got {name}: use its safetensors")


def _write_weights(found: headers.Header, config: dict[str, Any], folder: Path) -> None:
    """Write the tensors, some gigabytes to a file, so that a large model is never whole in memory."""
    names = _names(found, config)
    if "rope_freqs.weight" in found.tensors:
        rule, got = "rotary frequencies must be plain", f"other factors in {found.parts[0]}"
        require(bool((_dequantized(found, "rope_freqs.weight") == 1).all()), rule, got, "use the safetensors of the model")
    where: dict[str, str] = {}
    for number, batch in enumerate(_batches(found, list(names)), start=1):
        weights = {names[name]: _tensor(found, name, config) for name in batch}
        file = f"model-{number:05d}.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(weights, file)
    if len(set(where.values())) == 1:
        (folder / "model-00001.safetensors").rename(folder / files.SINGLE)
    else:
        write_json(folder / files.INDEX, {"metadata": {}, "weight_map": where})


def _names(found: headers.Header, config: dict[str, Any]) -> dict[str, str]:
    """Return the network's name of each tensor; they must be its own, or missing ones would be drawn at random somewhere."""
    names = {name: network_name(name, found.architecture) for name in found.tensors if name != "rope_freqs.weight"}
    kinds = [f"{path}.weight" for path in BLOCK.values()]
    if config["model_type"] == "qwen2" or config.get("attention_bias"):
        kinds += [f"self_attn.{each}_proj.bias" for each in ("qkvo" if config["model_type"] == "llama" else "qkv")]
    wanted = {f"model.layers.{block}.{kind}" for block in range(config["num_hidden_layers"]) for kind in kinds}
    wanted |= {f"{top}.weight" for top in TOP.values() if top != "lm_head" or not config["tie_word_embeddings"]}
    for name in sorted(wanted ^ set(names.values())):
        problem = f"no {name}" if name in wanted else f"{name} besides"
        raise InputError(f"{found.parts[0]} must hold the tensors of its network, got {problem}: fetch or convert it again")
    return names


def _batches(found: headers.Header, names: list[str]) -> Iterator[list[str]]:
    batch, room = [], SHARD_BYTES
    for name in names:
        size = 4 * int(np.prod(found.tensors[name].shape))
        if batch and size > room:
            yield batch
            batch, room = [], SHARD_BYTES
        batch.append(name)
        room -= size
    yield batch


def _tensor(found: headers.Header, name: str, config: dict[str, Any]) -> Tensor:
    """Return one tensor as the network has it."""
    value = _dequantized(found, name)
    inside = NAME.fullmatch(name)
    if found.architecture not in PERMUTED or inside is None or inside[2] not in ("attn_q", "attn_k"):
        return value
    heads = config["num_attention_heads" if inside[2] == "attn_q" else "num_key_value_heads"]
    return unpermuted(value, heads)


def unpermuted(value: Float[Tensor, "row *column"], heads: int) -> Float[Tensor, "row *column"]:
    """Put back the rows of q or k: llama.cpp writes the halves of each head in turn, first row of each, second row of each.

    Args:
        value: matrix or bias as llama.cpp has it.
        heads: of queries, or of keys.

    >>> unpermuted(torch.tensor([0.0, 2, 1, 3]), 1).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    return value.view(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape).contiguous()


def _dequantized(found: headers.Header, name: str) -> Tensor:
    """Read one tensor in float32, with the formulas of the package that defines the format."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    place = found.tensors[name]
    kind = GGMLQuantizationType(place.kind)
    raw = np.fromfile(place.part, dtype=np.uint8, count=place.size, offset=place.start)
    elements, size = GGML_QUANT_SIZES[kind]
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.F64):
        dtype = {"F32": np.float32, "F16": np.float16, "F64": np.float64}[kind.name]
        values = raw.view(dtype).astype(np.float32)
    else:
        values = dequantize(raw.reshape(-1, place.shape[-1] // elements * size), kind)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(place.shape)


def _tokenizer(found: headers.Header) -> PreTrainedTokenizerBase | None:
    """Build the tokenizer from the file alone: what lies beside it may name code."""
    if TOKENS not in found.values:
        return None
    with tempfile.TemporaryDirectory() as alone, open(os.devnull, "w") as hole, redirect_stderr(hole):
        file = found.parts[0]
        (Path(alone) / "one.gguf").symlink_to(file.absolute())
        try:
            made = cast(Any, PreTrainedTokenizerFast).from_pretrained(alone, gguf_file="one.gguf")
        except Exception as error:  # the reader raises many kinds for vocabularies that it does not know
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise InputError(
                f"{file} must hold a tokenizer that transformers reads, got {reason}: use its safetensors"
            ) from error
    made.name_or_path = str(file)
    mask = found.values.get("tokenizer.ggml.mask_token_id")
    if mask is not None and made.mask_token is None:
        made.add_special_tokens({"mask_token": made.convert_ids_to_tokens(int(mask))})
    return made

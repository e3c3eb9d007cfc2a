"""Translate the LLaDA, Dream and GGUF layouts to plain Llama and Qwen2: configuration fields, tensor names and tokenizers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lib.checkpoints import lookup, tokenizers
from lib.core.errors import InputError

Family = LlamaForCausalLM | Qwen2ForCausalLM
# LLaDA's names inside a block -> Llama's. The block's ff_out and the head share a name and differ by prefix.
LLADA_BLOCK = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
LLADA_TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}


def configuration(raw: dict[str, Any], folder: Path) -> tuple[type[Family], PretrainedConfig]:
    """Return the network class and the configuration that a config.json asks for.

    Raises:
        InputError: another `model_type`, an option that the class cannot express, or an incomplete or damaged configuration.
    """
    model_type = raw.get("model_type")
    if model_type not in lookup.MODEL_TYPES:  # a GGUF file tells its architecture only after conversion
        raise InputError(
            f"model_type must be one of {', '.join(lookup.MODEL_TYPES)}, got {model_type!r} in {folder}: use another"
        )
    try:
        if model_type in lookup.LLADA_TYPES:
            return LlamaForCausalLM, llada_config(raw)
        if model_type == "Dream":
            return Qwen2ForCausalLM, dream_config(raw)
        family, kind = (LlamaForCausalLM, LlamaConfig) if model_type == "llama" else (Qwen2ForCausalLM, Qwen2Config)
        return family, kind.from_dict(raw)
    except InputError:
        raise
    except Exception as error:  # a missing key, or whatever transformers raises for a value it cannot use
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise InputError(
            f"{folder / 'config.json'} must hold a complete configuration, got {reason}: "
            "mend it, or take that of the original repository"
        ) from error


def llada_config(raw: dict[str, Any]) -> LlamaConfig:
    """Translate LLaDA's configuration to Llama's.

    Raises:
        InputError: an option is set that the released LLaDA models do not use and Llama cannot express.
    """
    plain = {
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "include_bias": (False,),
        "include_qkv_bias": (False, None),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
        "layer_norm_type": ("rms",),
        "rope": (True,),
        "activation_type": ("silu", "swiglu"),
        "block_type": ("llama",),
    }
    for key, allowed in plain.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise InputError(f"a LLaDA layout must have {key}: {allowed[0]}, got {raw[key]!r}: this variant is not supported")
    config = LlamaConfig(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
        max_position_embeddings=raw["max_sequence_length"],
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        tie_word_embeddings=raw.get("weight_tying", False),
        rope_parameters={"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)},
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
        use_cache=False,
    )
    return cast(LlamaConfig, _bidirectional(config, raw))


def dream_config(raw: dict[str, Any]) -> Qwen2Config:
    """Translate Dream's configuration to Qwen2's, of which it is a copy with a mask token."""
    own = {"architectures", "auto_map", "model_type", "mask_token_id", "rope_theta", "rope_scaling", "torch_dtype", "dtype"}
    known = {key: value for key, value in raw.items() if key not in own and not key.startswith("_")}
    rope = {"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)}
    return cast(Qwen2Config, _bidirectional(Qwen2Config(**{**known, "rope_parameters": rope, "use_cache": False}), raw))


def _bidirectional(config: PretrainedConfig, raw: dict[str, Any]) -> PretrainedConfig:
    config.is_causal = False
    config.mask_token_id = raw.get("mask_token_id")
    return config


def llada_name(name: str, folder: Path) -> str:
    """Return Llama's name for a tensor of the LLaDA layout.

    Args:
        name: LLaDA's.
        folder: of the checkpoint, for the error.

    Raises:
        InputError: a name outside the layout.

    >>> llada_name("model.transformer.blocks.3.attn_out.weight", Path("LLaDA"))
    'model.layers.3.self_attn.o_proj.weight'
    """
    parts = name.removeprefix("model.transformer.").removesuffix(".weight").split(".")
    if parts[0] == "blocks" and len(parts) == 3 and parts[2] in LLADA_BLOCK:
        return f"model.layers.{parts[1]}.{LLADA_BLOCK[parts[2]]}.weight"
    if len(parts) == 1 and parts[0] in LLADA_TOP:
        return f"{LLADA_TOP[parts[0]]}.weight"
    raise InputError(f"a LLaDA layout must hold only known tensors, got {name!r} in {folder}: not a LLaDA text trunk")


def tokenizer_and_shift(raw: Mapping[str, Any], folder: Path) -> tuple[PreTrainedTokenizerBase | None, int]:
    """Return the tokenizer of a layout, and how far the logits of a bidirectional network are shifted.

    Args:
        raw: the checkpoint's config.json.
        folder: that its tokenizer lies in.
    """
    shift = 1 if raw["model_type"] == "Dream" else int(raw.get("logit_shift", 0))
    return tokenizers.load(folder), 0 if raw["model_type"] in lookup.LLADA_TYPES else shift

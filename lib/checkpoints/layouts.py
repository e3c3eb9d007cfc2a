"""Translate every family's configuration to that of a class of transformers."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lib.checkpoints.families import Family
from lib.core.errors import InputError, require

# Settings of every configuration that say nothing about the computation, or that are set here.
OWN = {"transformers_version", "architectures", "dtype", "rope_parameters", "use_cache", "output_hidden_states", "return_dict"}
# What any version of transformers means by a rotation: nothing but these settings goes from one to the other.
ROPE_SETTINGS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def configuration(raw: Mapping[str, Any], family: Family, folder: Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return the network class and the configuration that a config.json of a family asks for.

    Args:
        raw: the checkpoint's config.json.
        family: as `lookup.family_of` recognises it.
        folder: of the checkpoint, for the error.

    Raises:
        InputError: an incomplete configuration, or one with values that the class cannot use.
    """
    head = "ForMaskedLM" if family.layout == "encoder" else "ForCausalLM"
    network = cast(type[PreTrainedModel], getattr(transformers, family.network + head))
    _check_rotations(raw, folder / "config.json")
    try:
        config = TRANSLATIONS[family.layout](dict(raw), cast(Any, network).config_class)
        if family.network == "Ministral3":  # its queries are scaled by both at every pass
            _ = [float(config.rope_parameters[name]) for name in ("llama_4_scaling_beta", "original_max_position_embeddings")]
    except Exception as error:  # a missing key, or whatever transformers raises for a value it cannot use
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise InputError(
            f"{folder / 'config.json'} must hold a complete configuration of {family.name}, got {reason}: compare it with the "
            "original"
        ) from error
    if family.attention != "causal":
        config.is_causal = False
    return network, config


def _check_rotations(raw: Mapping[str, Any], file: Path) -> None:
    """Refuse a configuration that says two different things of its rotations; which one counts differs between versions."""
    said = [part for part in (raw.get("rope_parameters"), raw.get("rope_scaling")) if isinstance(part, Mapping)]
    kinds = [part.get("rope_type") or part.get("type") for part in said]
    for name, values in {
        "rope_theta": [raw.get("rope_theta"), *(part.get("rope_theta") for part in said)],
        "the type of rotations": kinds if all(kinds) else [],
        "the factor of rotations": [part.get("factor") for part in said],
    }.items():
        different = dict.fromkeys(str(value) for value in values if value is not None and not isinstance(value, Mapping))
        rule, got = f"{name} must be one in all of {file}", " and ".join(different)
        require(len({_number(value) for value in different}) < 2, rule, got, "keep what the checkpoint was trained with")


def _number(text: str) -> float | str:
    """Read 500000 and 500000.0 alike."""
    try:
        return float(text)
    except ValueError:
        return text


def _plain(raw: dict[str, Any], config_class: Any) -> PretrainedConfig:
    """Read a configuration that transformers wrote."""
    return config_class.from_dict(raw)


def _encoder(raw: dict[str, Any], config_class: Any) -> PretrainedConfig:
    """Read an encoder's configuration, and say of its heads and its MLP what a decoder's says."""
    config = config_class.from_dict(raw)
    config.num_key_value_heads, config.intermediate_size = config.num_attention_heads, config.hidden_dim
    return config


def _translated(raw: Mapping[str, Any], config_class: Any, **changes: Any) -> PretrainedConfig:
    """Take over every setting that the class knows by the same name, and rotations that mean the same everywhere."""
    known = {each.name for each in dataclasses.fields(config_class)} - OWN | {"head_dim"}
    same = {key: raw[key] for key in known & raw.keys() if key != "head_dim" or raw[key] is not None}
    return config_class(**{**same, "rope_parameters": _rope(raw), **changes, "use_cache": False})


def _copy(raw: dict[str, Any], config_class: Any) -> PretrainedConfig:
    """Translate the configuration of a copy of the class that names everything as the class does."""
    return _translated(raw, config_class)


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotations of a configuration, whose base may stand beside their scaling or in it."""
    scaling = {**(raw.get("rope_parameters") or raw.get("rope_scaling") or {})}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    base = scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0
    scaling.pop("type", None)
    if kind == "default" or kind in ROPE_SETTINGS:
        scaling = {key: scaling[key] for key in ROPE_SETTINGS.get(kind, ()) if key in scaling}
    return {**scaling, "rope_type": kind, "rope_theta": base}


def _llada(raw: dict[str, Any], config_class: Any) -> PretrainedConfig:
    """Translate LLaDA's configuration to Llama's."""
    return config_class(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
        max_position_embeddings=raw["max_sequence_length"],
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        tie_word_embeddings=raw.get("weight_tying", False),
        rope_parameters=_rope(raw),
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
        use_cache=False,
    )


def _dream(raw: dict[str, Any], config_class: Any) -> PretrainedConfig:
    """Translate Dream's configuration to Qwen2's, and its rotations as transformers 4.46 reads them, for which it was written.

    There YaRN takes the longest position for the length of pretraining, and LongRoPE uses its long factors always.
    """
    rope = _rope(raw)
    kept = {
        "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow"),
        "longrope": ("factor", "attention_factor", "long_factor"),
    }
    if rope["rope_type"] in kept:
        same = {key: rope[key] for key in ("rope_type", "rope_theta", *kept[rope["rope_type"]]) if key in rope}
        rope = {**same, "factor": rope["factor"], "original_max_position_embeddings": raw["max_position_embeddings"]}
    if rope["rope_type"] == "longrope":
        rope["short_factor"] = rope["long_factor"]
    return _translated(raw, config_class, rope_parameters=rope)


def _nemotron(raw: dict[str, Any], config_class: Any) -> PretrainedConfig:
    """Translate to Ministral3's, whose rotations are the same."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return _translated(raw, config_class, rope_parameters={**rope, "rope_theta": _rope(raw)["rope_theta"]})


def _qwen3_moe(raw: dict[str, Any], config_class: Any) -> PretrainedConfig:
    """Translate a copy of Qwen3's mixture of experts, whose weights of experts are made to add up to one."""
    return _translated(raw, config_class, norm_topk_prob=raw.get("norm_topk_prob", True))


def _llada_moe(raw: dict[str, Any], config_class: Any) -> PretrainedConfig:
    """Translate LLaDA-MoE's, in which every layer has experts, whose weights are left as the softmax gives them."""
    experts = {"moe_intermediate_size": raw["expert_intermediate_size"], "num_experts": raw["num_experts"]}
    dense = raw.get("dense_intermediate_size") or raw["expert_intermediate_size"]
    every = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False}
    return _translated(raw, config_class, intermediate_size=dense, **experts, **every)


def _llada2(raw: dict[str, Any], config_class: Any) -> PretrainedConfig:
    """Translate LLaDA 2's, whose keys and queries are normed and whose weights of experts add up to one, whatever it says."""
    share = raw.get("partial_rotary_factor") or raw["rotary_dim"] / raw["head_dim"]
    return _translated(
        raw,
        config_class,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        rope_parameters={**_rope(raw), "partial_rotary_factor": share},
        n_routed_experts=raw["num_experts"],
        n_shared_experts=raw["num_shared_experts"],
        use_qk_norm=True,
        norm_topk_prob=True,
        attention_bias=False,
        num_mtp_layers=0,
    )


TRANSLATIONS: dict[str, Callable[[dict[str, Any], Any], PretrainedConfig]] = {
    "plain": _plain,
    "encoder": _encoder,
    "copy": _copy,
    "llada": _llada,
    "llava": _copy,
    "dream": _dream,
    "nemotron": _nemotron,
    "qwen3-moe": _qwen3_moe,
    "llada-moe": _llada_moe,
    "llada2": _llada2,
}

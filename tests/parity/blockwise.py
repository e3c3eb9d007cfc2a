"""The recorded checkpoints of other families in plain classes of transformers, with what a registry would know of each."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lib.core.config import ModelSource
from lib.models.language_model import LanguageModel, linear_layers

PARITY = Path(__file__).resolve().parent
QWEN3 = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
QWEN3 += "head_dim max_position_embeddings rms_norm_eps tie_word_embeddings attention_bias".split()
DENSE = [name for name in QWEN3 if name not in ("head_dim", "attention_bias")]
MOE = "moe_intermediate_size num_experts_per_tok n_group topk_group routed_scaling_factor first_k_dense_replace".split()
# class, fields taken as they are, attention, shift, origin of the grid, mask token
FAMILIES: dict[str, tuple[str, Sequence[str], Any, int, Any, int]] = {
    "sdar": ("Qwen3", QWEN3, "block-causal", 0, "start", 127),
    "fast_dllm_v2": ("Qwen2", DENSE, "block-causal", 1, "start", 127),
    "stable_diffcoder": ("Llama", QWEN3, "block-causal", 0, "start", 5),
    "llada2_moe": ("Glm4Moe", [name for name in QWEN3 if name != "attention_bias"] + MOE, "block-causal", 0, "start", 127),
    "nemotron_labs_diffusion": ("Ministral3", [*QWEN3, "rope_parameters"], "context-causal", 0, "prompt", 100),
    "llada_moe": ("Qwen3Moe", [*DENSE, "attention_bias", "num_experts", "num_experts_per_tok"], "full", 0, "prompt", 127),
    "illada": ("Llama", [*DENSE, "attention_bias", "mlp_bias"], "full", 0, "prompt", 5),
    "llada_v": ("Llama", [*DENSE, "attention_bias"], "full", 0, "prompt", 127),
}
OWN: dict[str, dict[str, Any]] = {
    "llada2_moe": {"n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, "use_qk_norm": True,
                   "attention_bias": False, "num_mtp_layers": 0, "partial_rotary_factor": 0.5},
    "llada_moe": {"norm_topk_prob": False, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [],
                  "head_dim": 8},
}  # fmt: skip
BLOCKWISE = ("sdar", "fast_dllm_v2", "stable_diffcoder", "llada2_moe", "nemotron_labs_diffusion")
RENAMED = {
    "word_embeddings": "embed_tokens", "attention.dense": "self_attn.o_proj", "attention.query_layernorm": "self_attn.q_norm",
    "attention.key_layernorm": "self_attn.k_norm", "gate.expert_bias": "gate.e_score_correction_bias",
    "encoder.": "model.", "diffusion_head": "lm_head",
}  # fmt: skip
DROPPED = ("model.vision_tower.", "model.mm_projector.", "model.image_newline")


@cache
def recorded(name: str) -> SimpleNamespace:
    """Load a checkpoint, its recorded outputs and the settings of each run."""
    folder = PARITY / name
    with safe_open(folder / "expected.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    return SimpleNamespace(model=load(name), expected=load_file(folder / "expected.safetensors"), settings=settings)


def load(name: str) -> LanguageModel:
    """Put a recorded checkpoint into its plain class."""
    kind, fields, attention, shift, origin, mask = FAMILIES[name]
    raw = json.loads((PARITY / name / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": raw.get("rope_theta"), **OWN.get(name, {})}
    rope = {key: rope[key] for key in ("rope_type", "rope_theta", "partial_rotary_factor") if key in rope}
    given = {field: raw[field] for field in fields if field in raw}
    given = {"rope_parameters": rope, "use_cache": False, **given, **OWN.get(name, {})}
    config = getattr(transformers, f"{kind}Config")(**given)
    config.is_causal, config.mask_token_id = False, mask
    weights = renamed(load_file(PARITY / name / "model.safetensors"), raw)
    network = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, attn_implementation="sdpa"
    )
    network.eval().requires_grad_(False)
    block = None if attention == "full" else recorded_block(name)
    layers = () if kind.endswith("Moe") else linear_layers(network)
    return LanguageModel(name, ModelSource(name), network, None, mask, shift, False, layers, name, attention, block, origin)


def recorded_block(name: str) -> int:
    """Return the block length of the recorded masks."""
    with safe_open(PARITY / name / "expected.safetensors", "pt") as file:
        return json.loads(file.metadata()["settings"])["block_size"]


def renamed(tensors: dict[str, Tensor], raw: dict[str, Any]) -> dict[str, Tensor]:
    """Give tensors the names of the plain class, and split what is fused."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if name.startswith(DROPPED):
            continue
        if "attention.query_key_value" in name:
            heads = raw["num_attention_heads"], raw["num_key_value_heads"], raw["num_key_value_heads"]
            parts = tensor.split([count * raw["head_dim"] for count in heads])
            found |= {name.replace("attention.query_key_value", f"self_attn.{role}_proj"): part.contiguous()
                      for role, part in zip("qkv", parts, strict=True)}  # fmt: skip
        else:
            found[name] = tensor
    return found

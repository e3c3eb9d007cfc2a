"""Tiny random checkpoints in the layouts of the released models: same keys, names and tokenizer files, shards, small sizes."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from lib.core.runtime import generator
from recipes import rehearsal_tokenizers as tokenizers
from recipes.rehearsal_tokenizers import DREAM_SPECIAL, LLADA_SPECIAL, LLAMA_SPECIAL, QWEN_SPECIAL, token_id

WIDTH, MLP, BLOCKS, HEADS, KV_HEADS = 32, 64, 2, 4, 2
EMBEDDING_ROWS = 1088  # more than tokens, as in every release
IMAGE_CODES = 128
SHARD_SIZE = "70KB"  # one embedding
SPREAD = 2.5  # of a matrix over 1 / sqrt(inputs): large enough that attention and predictions are far from uniform


@dataclass(frozen=True)
class Checkpoint:
    """What one stand-in consists of, as it is written.

    Attributes:
        config: content of config.json.
        shapes: of all tensors by the names of the release.
        files: further files by name, such as the tokenizer's.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, str]


def header_template(gap: str) -> str:
    """Return a chat template of LLaDA's kind: BOS once, a header before each message, and the assistant's at the end.

    Args:
        gap: what stands after a header: two line ends for LLaDA, one for MMaDA.
    """
    turn = "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>GAP' + message['content'] | trim + '<|eot_id|>' }}"
    start = "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    answer = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>GAP' }}{% endif %}"
    return (start + turn + "{% endfor %}" + answer).replace("GAP", gap.replace("\n", "\\n"))


def checkpoints() -> dict[str, Checkpoint]:
    """Return the stand-ins by name of their folder: four diffusion models and two autoregressive references."""
    base, instruct, images = _llada_config(), {"torch_dtype": "bfloat16"}, EMBEDDING_ROWS + IMAGE_CODES
    mmada = {
        "architectures": ["MMadaModelLM"],
        "codebook_size": IMAGE_CODES,
        "embedding_size": images,
        "gradient_checkpointing": True,
        "llm_vocab_size": EMBEDDING_ROWS,
        "model_type": "mmada",
        "new_vocab_size": images,
        "num_new_special_tokens": 0,
        "num_vq_tokens": 16,
        "tie_word_embeddings": False,
        "vocab_size": images,
        "w_clip_vit": False,
    }
    return {
        "llada": _llada(base, template=None),
        "llada-1.5": _llada({**base, **instruct}, template=header_template("\n\n")),
        "mmada": _llada({**base, **instruct, **mmada}, template=header_template("\n")),
        "dream": _plain(_dream_config(), biases=True, files={**tokenizers.dream_files(), **_dream_generation()}),
        "llama": _plain(_llama_config(), biases=False, files=tokenizers.llama_files()),
        "qwen2": _plain(_qwen_config(), biases=True, files=tokenizers.qwen_files()),
    }


def write(folder: Path, name: str, *, seed: int) -> None:
    """Write one stand-in into a new folder.

    Args:
        folder: where its files go; made here.
        name: as in `checkpoints`.
        seed: of its weights, which also depend on the name.
    """
    made = checkpoints()[name]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(made.config, indent=2) + "\n", encoding="utf-8")
    for file, text in made.files.items():
        (folder / file).write_text(text, encoding="utf-8")
    weights = {key: _draw(key, shape, seed=seed, name=name) for key, shape in made.shapes.items()}
    save_torch_state_dict(weights, folder, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})


def _draw(key: str, shape: tuple[int, ...], *, seed: int, name: str) -> Tensor:
    """Draw one tensor in bfloat16: norms near 1, biases, and matrices whose outputs vary by `SPREAD` for inputs of size 1."""
    noise = torch.randn(shape, generator=generator(seed, "rehearsal", name, key))
    if len(shape) == 2:
        return (noise * (1.0 if _is_embedding(key) else SPREAD / math.sqrt(shape[1]))).to(torch.bfloat16)
    return (0.3 * noise if key.endswith(".bias") else 1 + 0.1 * noise).to(torch.bfloat16)


def _is_embedding(key: str) -> bool:
    return key in ("model.transformer.wte.weight", "model.embed_tokens.weight")


def _llada(config: Mapping[str, Any], *, template: str | None) -> Checkpoint:
    """Return a checkpoint of LLaDA's layout, whose head is called ff_out like a matrix of each block."""
    width, mlp, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.transformer.wte.weight": (rows, width)}
    for block in range(config["n_layers"]):
        square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (width, width))
        wide = {"ff_proj": (mlp, width), "up_proj": (mlp, width), "ff_out": (width, mlp)}
        parts = {**square, **wide, "attn_norm": (width,), "ff_norm": (width,)}
        shapes |= {f"model.transformer.blocks.{block}.{part}.weight": shape for part, shape in parts.items()}
    shapes |= {"model.transformer.ln_f.weight": (width,), "model.transformer.ff_out.weight": (rows, width)}
    return Checkpoint(config, shapes, tokenizers.llada_files(chat_template=template))


def _plain(config: Mapping[str, Any], *, biases: bool, files: Mapping[str, str]) -> Checkpoint:
    """Return a checkpoint of Llama's layout, or with biases on q, k and v of Qwen2's, which Dream shares."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    rows: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    attention = {"q_proj": (width, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, width)}
    gated = {"gate_proj": (mlp, width), "up_proj": (mlp, width), "down_proj": (width, mlp)}
    for block in range(config["num_hidden_layers"]):
        start = f"model.layers.{block}."
        rows |= {f"{start}self_attn.{part}.weight": shape for part, shape in attention.items()}
        if biases:
            rows |= {f"{start}self_attn.{part}.bias": attention[part][:1] for part in ("q_proj", "k_proj", "v_proj")}
        rows |= {f"{start}mlp.{part}.weight": shape for part, shape in gated.items()}
        rows |= {f"{start}{part}.weight": (width,) for part in ("input_layernorm", "post_attention_layernorm")}
    rows |= {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}
    return Checkpoint(config, rows, files)


def _llada_config() -> dict[str, Any]:
    """Return config.json of GSAI-ML/LLaDA-8B-Base with small sizes."""
    end, mask = token_id(LLADA_SPECIAL, "<|endoftext|>"), token_id(LLADA_SPECIAL, "<|mdm_mask|>")
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": WIDTH,
        "embedding_dropout": 0.0,
        "embedding_size": EMBEDDING_ROWS,
        "eos_token_id": end,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": mask,
        "max_sequence_length": 4096,
        "mlp_hidden_size": MLP,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "n_layers": BLOCKS,
        "pad_token_id": end,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": EMBEDDING_ROWS,
        "weight_tying": False,
    }


def _common_config() -> dict[str, Any]:
    """Return what Dream, Llama and Qwen2 have in common."""
    return {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": MLP,
        "max_position_embeddings": 131072,
        "num_attention_heads": HEADS,
        "num_hidden_layers": BLOCKS,
        "num_key_value_heads": KV_HEADS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": EMBEDDING_ROWS,
    }


def _qwen_config() -> dict[str, Any]:
    """Return config.json of Qwen/Qwen2.5-7B with small sizes."""
    end = token_id(QWEN_SPECIAL, "<|endoftext|>")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        **_common_config(),
        "bos_token_id": end,
        "eos_token_id": end,
        "max_window_layers": BLOCKS,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
    }


def _dream_config() -> dict[str, Any]:
    """Return config.json of Dream-org/Dream-v0-Base-7B with small sizes."""
    end = token_id(DREAM_SPECIAL, "<|endoftext|>")
    own = {
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "mask_token_id": token_id(DREAM_SPECIAL, "<|mask|>"),
        "model_type": "Dream",
        "pad_token_id": end,
        "rope_scaling": None,
        "sliding_window": None,
        "transformers_version": "4.46.2",
    }
    return {**_qwen_config(), **own}


def _dream_generation() -> dict[str, str]:
    """Return generation_config.json of Dream, which names no mask."""
    end = token_id(DREAM_SPECIAL, "<|endoftext|>")
    ids = {"bos_token_id": end, "eos_token_id": end, "mask_token_id": None, "pad_token_id": end}
    rest = {"alg": "origin", "alg_temp": None, "eps": 0.001, "output_history": False, "steps": 512, "temperature": 0.0}
    known = {"_from_model_config": True, **ids, **rest, "top_k": None, "top_p": None, "transformers_version": "4.46.2"}
    return {"generation_config.json": json.dumps(known, indent=2) + "\n"}


def _llama_config() -> dict[str, Any]:
    """Return config.json of meta-llama/Llama-3.1-8B with small sizes."""
    scaling = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        **_common_config(),
        "attention_bias": False,
        "bos_token_id": token_id(LLAMA_SPECIAL, "<|begin_of_text|>"),
        "eos_token_id": token_id(LLAMA_SPECIAL, "<|end_of_text|>"),
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": scaling,
        "rope_theta": 500000.0,
        "transformers_version": "4.43.0.dev0",
        "use_cache": True,
    }

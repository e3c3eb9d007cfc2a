"""Tiny random checkpoints for tests, and slow formulas to compare with."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lib.models import experts, loading
from lib.models.language_model import LanguageModel, linear_layers

PARITY = Path(__file__).resolve().parent / "parity"
LLADA = PARITY / "llada_tiny"
DREAM = PARITY / "dream_tiny"
MASK = 30
VOCAB = 31


def network(
    *, family: str = "llama", causal: bool = True, seed: int = 0, kv_heads: int = 2, tie: bool = False, **changes: Any
) -> PreTrainedModel:
    """Build a network with 4 query heads whose weights are large enough that attention is far from uniform."""
    config_class, network_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": tie,
        "use_cache": False,
        **changes,
    }
    config = config_class(**shape)
    config.is_causal = causal
    if not causal:
        config.mask_token_id = MASK
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return network_class(config).eval()


def folder(path: Path, *, shard_size: str = "1GB", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save `network(**options)` as a checkpoint folder."""
    cast(Any, network(**options)).to(dtype).save_pretrained(path, max_shard_size=shard_size)
    return path


def model(path: Path, **options: Any) -> LanguageModel:
    """Save a tiny network and load it as the library does."""
    return loading.load(folder(path, **options))


def copied(source: Path, path: Path) -> Path:
    """Copy a checkpoint that a test may change, without what was recorded of it."""
    return Path(shutil.copytree(source, path, ignore=shutil.ignore_patterns("expected*", "rope_cases*")))


MIXTURES = ("qwen3_moe", "glm4_moe")  # LLaDA-MoE and LLaDA 2 as transformers knows them


def stacked(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a bidirectional mixture of experts as transformers makes it, its experts in stacks; one block in three is dense."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3, "tie_word_embeddings": False, "use_cache": False,
    }  # fmt: skip
    if family == "qwen3_moe":
        own: dict[str, Any] = {"num_experts": 8, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [1]}
        config: Any = Qwen3MoeConfig(**{**shape, **own, **changes})
        network_class: Any = Qwen3MoeForCausalLM
    else:
        own = {
            "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
            "norm_topk_prob": True, "routed_scaling_factor": 2.5, "use_qk_norm": True, "attention_bias": False,
            "num_mtp_layers": 0,
        }  # fmt: skip
        config, network_class = Glm4MoeConfig(**{**shape, **own, **changes}), Glm4MoeForCausalLM
    config.is_causal, config.mask_token_id = False, MASK
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = network_class(config).eval().requires_grad_(False)
        for name, buffer in network.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    network.set_attn_implementation("sdpa")
    return network


def of_network(network: PreTrainedModel, **changes: Any) -> LanguageModel:
    """Make a diffusion model of a network that lies nowhere; its experts become linear layers."""
    layers = linear_layers(experts.as_linears_(network))
    values: dict[str, Any] = {"tokenizer": None, "mask_token_id": MASK, "logit_shift": 0, "is_causal": False, "fingerprint": ""}
    source = loading.ModelSource("tiny")
    return LanguageModel(name="tiny", source=source, network=network, layers=layers, **{**values, **changes})


def mixture(family: str, **changes: Any) -> LanguageModel:
    """Make a model of `stacked(family, **changes)`."""
    return of_network(stacked(family, **changes))


def edit_config(path: Path, **changes: Any) -> Path:
    """Change settings in the folder's config.json; None removes one."""
    file = path / "config.json"
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return path


def edit_weights(path: Path, changes: Mapping[str, Tensor | None]) -> Path:
    """Add, replace or (None) remove tensors of the folder's model.safetensors."""
    file = path / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)
    return path


def stub(logits_of: Any, *, vocab: int, mask_token_id: int | None, is_causal: bool = False) -> LanguageModel:
    """Make a LanguageModel whose logits are `logits_of(input_ids)`; it counts forward passes and rows through the head.

    The LM head is the identity, so the hidden states are the logits.
    """
    calls = SimpleNamespace(forwards=0, head_rows=0, inputs=[])

    def body(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        calls.forwards += 1
        calls.inputs.append(input_ids.clone())
        return SimpleNamespace(last_hidden_state=logits_of(input_ids))

    def head(hidden: Tensor) -> Tensor:
        calls.head_rows += hidden.shape[:-1].numel()
        return hidden

    fake = SimpleNamespace(
        config=SimpleNamespace(vocab_size=vocab),
        get_decoder=lambda: body,
        get_output_embeddings=lambda: head,
        parameters=lambda: iter([torch.zeros(1)]),
        calls=calls,
        vocab=vocab,
    )
    made = object.__new__(LanguageModel)
    values: dict[str, Any] = {
        "name": "stub",
        "source": loading.ModelSource("stub"),
        "network": fake,
        "tokenizer": None,
        "mask_token_id": mask_token_id,
        "logit_shift": int(is_causal),
        "is_causal": is_causal,
        "layers": (),
        "fingerprint": "",
    }
    for key, value in values.items():
        object.__setattr__(made, key, value)
    return made


def ids(*shape: int, seed: int = 0, vocab: int = MASK) -> Tensor:
    """Draw token ids below the mask id."""
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def words() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token a word (w0 to w9, else unknown) that puts BOS = 1 before a text; EOS = 2."""
    vocab = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, **{f"w{index}": 3 + index for index in range(10)}}
    core = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]")


def tokenizer() -> PreTrainedTokenizerFast:
    """The words of `words`, and one more for every other id of a tiny network."""
    made = words()
    made.add_tokens([f"x{index}" for index in range(MASK - len(made))])
    made.add_special_tokens({"mask_token": "[MASK]"})
    assert made.mask_token_id == MASK
    return made


NOISES: dict[str, dict[str, object]] = {"uniform": {"kind": "uniform"}, "mixed": {"kind": "mixed", "uniform": 0.1}}


def of_noise(path: Path, kind: str, **options: Any) -> LanguageModel:
    """Save a tiny diffusion model whose config.json states a noise (`"masked"` states none), and load it."""
    made = folder(path, causal=False, **options)
    return loading.load(edit_config(made, noise=NOISES.get(kind)))

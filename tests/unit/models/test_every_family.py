"""What people do with a model, on a tiny folder of every release: masses, bound, pruning, text, fast text, export and reload."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lib.attention import masses
from lib.decoding import decoder
from lib.diffusion import likelihood, sampler
from lib.models import export, loading
from lib.models.language_model import LanguageModel, logits_at
from lib.pruning import methods, pruner
from tests import tiny
from tests.unit.models.test_families import CASES

every_release = pytest.mark.parametrize("name", CASES)
LENGTH, NEW = 16, 8


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], LanguageModel]:
    """Load a release; blocks are made short, so that a tiny text has several."""

    def made(name: str) -> LanguageModel:
        model = loading.load(CASES[name].write(tmp_path / name))
        return dataclasses.replace(model, block_length=4) if model.goes_by_blocks else model

    return made


def windows(count: int = 2) -> torch.Tensor:
    return tiny.ids(count, LENGTH) % 4 + 7  # no mask and no end token of any release


@every_release
def test_masses_and_bound(name: str, load: Callable[[str], LanguageModel]) -> None:
    model = load(name)
    mass = masses.sink_mass(model, windows())
    torch.testing.assert_close(mass.mean(-1), torch.ones(mass.shape[:-1]), rtol=0, atol=1e-5)
    first = likelihood.nelbo(model, windows(), draws=4, seed=0)
    again = likelihood.nelbo(model, windows(), draws=4, seed=0, batch_size=3)
    assert first.mean > 0
    torch.testing.assert_close(first.per_window, again.per_window, rtol=1e-5, atol=1e-6)


@every_release
@pytest.mark.parametrize("method", ["Wanda", "sink-aware (Wanda)", "SparseGPT"])
def test_pruned_exported_and_read_again(name: str, method: str, load: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    model = load(name)
    pruner.prune_(model, methods.METHODS[method], methods.Target(0.5), windows=windows(4), seed=0)
    for layer in model.layers:
        share = float((layer.module.weight == 0).float().mean())
        assert abs(share - 0.5) <= 0.5 / layer.module.in_features + 1e-6, f"{layer.name}: {share}"
    again = loading.load(export.save_plain(model, tmp_path / "pruned"))
    where = torch.ones((2, LENGTH), dtype=torch.bool)
    same = dataclasses.replace(again, block_length=model.block_length)
    assert torch.equal(logits_at(same, windows(), where), logits_at(model, windows(), where))
    assert (again.family, again.attention, again.logit_shift) == (model.family, model.attention, model.logit_shift)


@every_release
def test_text_and_fast_text(name: str, load: Callable[[str], LanguageModel]) -> None:
    """All tokens are written, the prompt stays, and decoding without a cache, all in steps, is sampling."""
    model = load(name)
    prompt = windows()[:, :8]
    text = sampler.sample(model, prompt, new_tokens=NEW, steps=NEW, block_length=None if model.goes_by_blocks else 4)
    assert torch.equal(text[:, :8], prompt) and text.shape == (2, 8 + NEW)
    plan = decoder.DecodingPlan(steps_per_block=4)
    same = decoder.decode(model, prompt, new_tokens=NEW, block_length=4, plan=plan)
    if model.family != "fast-dllm-v2":  # whose decoder begins every block with a token read off the one before, and in sub-blocks
        assert torch.equal(same.ids, text)
    fast = decoder.decode(model, prompt, new_tokens=NEW, block_length=4, plan=decoder.DecodingPlan(cache="prefix", threshold=0.9))
    assert fast.ids.shape == text.shape and torch.equal(fast.ids[:, :8], prompt)

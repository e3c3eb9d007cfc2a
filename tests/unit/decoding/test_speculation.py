"""Self-speculation: the same text in fewer passes."""

from typing import Any

import pytest
import torch

from lib.core.errors import InputError
from lib.decoding.speculation import speculate
from lib.diffusion import sampler
from lib.models import loading
from lib.models.language_model import LanguageModel
from tests import tiny

PROMPT, NEW = 5, 12


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """In float64: in float32 a pass over several rows may break a tie otherwise than one over one."""
    shift: dict[str, Any] = {"qwen2": {"logit_shift": 1}}.get(request.param, {})
    folder = tiny.folder(tmp_path_factory.mktemp(request.param), causal=False, family=request.param, **shift)
    return loading.load(folder, dtype=torch.float64)


@pytest.mark.parametrize("block", [3, 12])
@pytest.mark.parametrize("drafts", [1, 2, 4, 20])
def test_the_text_is_the_plain_samplers(model: LanguageModel, block: int, drafts: int) -> None:
    saved = 0
    for seed in range(8):
        prompt = tiny.ids(1, PROMPT, seed=seed)
        got = speculate(model, prompt, new_tokens=NEW, block_length=block, drafts=drafts)
        assert torch.equal(got.ids, sampler.sample(model, prompt, new_tokens=NEW, steps=NEW, block_length=block))
        assert got.forwards <= NEW and got.computed_tokens >= got.forwards * (PROMPT + NEW)
        saved += NEW - got.forwards
    assert (saved > 0) == (drafts > 1)


def test_a_network_that_does_not_look_needs_one_pass_a_round() -> None:
    """Its predictions never change, so every draft is right: 1 + 2 rounds of 4 for 8 tokens in blocks of 4."""

    def ramp(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros((*ids.shape, 4))
        logits[..., 1] = 1.0 + 0.1 * torch.arange(ids.shape[1])
        return logits

    stub = tiny.stub(ramp, vocab=4, mask_token_id=3)
    got = speculate(stub, torch.zeros((1, 2), dtype=torch.long), new_tokens=8, block_length=4, drafts=4)
    assert got.ids[0].tolist() == [0, 0, *[1] * 8] and got.forwards == 3
    assert got.computed_tokens == 10 * (1 + 4 + 4)


def test_drafts_are_at_least_one(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="drafts must be at least 1, got 0"):
        speculate(model, tiny.ids(1, PROMPT), new_tokens=4, block_length=4, drafts=0)

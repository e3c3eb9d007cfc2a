"""Numbers of a masked model as they were before models had other noise: all streams draw what they drew."""

from pathlib import Path

import pytest
import torch

from lib.calibration import sets
from lib.core.runtime import generator
from lib.diffusion import likelihood, sampler
from lib.evaluation.pseudo_perplexity import pseudo_perplexity
from lib.models import loading
from lib.models.language_model import LanguageModel
from tests import tiny

# Of commit 380a0a7 on the recorded tiny LLaDA.
NELBO = [5.050848960876465, 5.383082866668701]
LOG_LIKELIHOOD = [-27.634843826293945, -27.71632957458496, -21.14046287536621]
PSEUDO = [4.295164383782281, 5.09301957156923]
MASKED, PLACES = [[3, 11, 16], [5, 11, 16]], 500221
SAMPLE = [[33, 103, 123, 123, 123, 123, 123, 123, 123, 123], [58, 62, 114, 114, 120, 5, 17, 17]]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return loading.load(Path(tiny.LLADA))


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, 120, (2, 16), generator=generator(0, "windows"))


def test_bounds(model: LanguageModel, windows: torch.Tensor) -> None:
    assert likelihood.nelbo(model, windows, draws=4, seed=3).per_window.tolist() == pytest.approx(NELBO, rel=1e-6)
    options = {"draws": 3, "generator": generator(1)}
    scored = likelihood.masked_log_likelihood(model, windows[0], torch.arange(16) >= 10, **options)
    assert scored.tolist() == pytest.approx(LOG_LIKELIHOOD, rel=1e-6)
    assert pseudo_perplexity(model, windows, answer_tokens=6, draws=3, seed=2).per_window.tolist() == pytest.approx(PSEUDO)


def test_noised_calibration_and_sampling(model: LanguageModel, windows: torch.Tensor) -> None:
    noised = sets.noised_windows(model, windows, sets.Inputs("noised", levels=3), seed=5)
    assert (noised == model.mask_token_id).sum(-1).tolist() == MASKED
    assert int((noised * torch.arange(noised.numel()).view_as(noised)).sum()) == PLACES
    text = sampler.sample(model, windows[:, :6], new_tokens=8, steps=4, block_length=4)
    assert [row[-len(wanted) :] for row, wanted in zip(text.tolist(), SAMPLE, strict=True)] == SAMPLE

"""Texts longer than the network has positions: refused by number wherever a network runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lib.attention import masses
from lib.core.errors import InputError
from lib.decoding import decoder, systems
from lib.diffusion import likelihood, ragged, sampler
from lib.models import language_model
from lib.models.language_model import LanguageModel
from tests import tiny

MOST = 64
Use = Callable[[LanguageModel, int], object]


def everywhere(length: int) -> torch.Tensor:
    return torch.ones((1, length), dtype=torch.bool)


DIFFUSION: dict[str, Use] = {
    "logits": lambda model, n: language_model.logits_at(model, tiny.ids(1, n), everywhere(n)),
    "body": lambda model, n: language_model.network_body(model)(input_ids=tiny.ids(1, n), use_cache=False),
    "sample": lambda model, n: sampler.sample(model, tiny.ids(1, n - 8), new_tokens=8, steps=2),
    "ragged": lambda model, n: ragged.denoise(model, [[1, 2], [1] * (n - 8)], new_tokens=8, steps=2),
    "decode": lambda model, n: decoder.decode(
        model, tiny.ids(1, n - 8), new_tokens=8, block_length=4, plan=systems.fast_plan(suffix_blocks=0, steps_per_block=1)
    ),
    "cached": lambda model, n: decoder.decode(
        model, tiny.ids(1, n - 8), new_tokens=8, block_length=4, plan=systems.fast_plan(cache="dual", steps_per_block=1)
    ),
    "nelbo": lambda model, n: likelihood.nelbo(model, tiny.ids(1, n), draws=2, seed=0),
    "log-likelihood": lambda model, n: list(likelihood.masked_losses(model, tiny.ids(1, n), everywhere(n), batch_size=1)),
    "sinks": lambda model, n: masses.sink_mass(model, tiny.ids(1, n)),
}
CAUSAL: dict[str, Use] = {
    "logits": DIFFUSION["logits"],
    "sinks": DIFFUSION["sinks"],
    "loss": lambda model, n: likelihood.next_token_nll(model, tiny.ids(1, n)),
    "continue": lambda model, n: sampler.continue_text(model, tiny.ids(1, n - 8), new_tokens=9),
    "ragged": lambda model, n: ragged.continue_texts(model, [[1, 2], [1] * (n - 8)], new_tokens=9),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, LanguageModel]:
    folder = tmp_path_factory.mktemp("models")
    return {causal: tiny.model(folder / str(causal), causal=causal) for causal in (False, True)}


@pytest.mark.parametrize(
    ("causal", "use"), [*((False, use) for use in DIFFUSION), *((True, use) for use in CAUSAL)], ids=lambda value: str(value)
)
def test_all_positions_are_used_and_no_more(causal: bool, use: str, models: dict[bool, LanguageModel]) -> None:
    run, model = (CAUSAL if causal else DIFFUSION)[use], models[causal]
    run(model, MOST)
    with pytest.raises(InputError, match=f"must have at most {MOST} positions, got {MOST + 1}: shorten it"):
        run(model, MOST + 1)


def test_stated_positions_count_not_the_tokens(models: dict[bool, LanguageModel]) -> None:
    """Two copies of a text side by side, as a block's bound needs, have the positions of one."""
    body, ids = language_model.network_body(models[False]), tiny.ids(1, 2 * MOST)
    body(input_ids=ids, position_ids=torch.arange(MOST).repeat(2)[None], use_cache=False)
    with pytest.raises(InputError, match=f"at most {MOST} positions, got {2 * MOST}"):
        body(input_ids=ids[:, :1], position_ids=torch.tensor([[2 * MOST - 1]]), use_cache=False)


def test_stretched_rotations_reach_further(tmp_path: Path) -> None:
    model = tiny.model(tmp_path / "model", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    language_model.check_length(model, 128)
    with pytest.raises(InputError, match="at most 128 positions, got 129"):
        language_model.check_length(model, 129)

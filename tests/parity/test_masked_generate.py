"""The plain sampler against recorded generations of more masked models: LLaDA-MoE and iLLaDA.

Not compared, because their rules are not ours: Dream's samplers by entropy and margin, LLaDA-V's, which never writes four of the
tokens, and batches padded on the left whose positions count the padding.
"""

import pytest

from lib.diffusion import sampler
from tests.parity.blockwise import recorded

RUNS = [(name, run) for name in ("llada_moe", "illada") for run in ("block8", "block8_quota2", "block24", "cfg")]


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_generation_equals_the_recorded_tokens(name: str, run: str) -> None:
    case = recorded(name)
    settings, prompt = case.settings[f"generate.{run}"], case.expected["generate.prompt"]
    options = {"new_tokens": 24, "steps": settings["steps"], "block_length": settings["block_length"]}
    got = sampler.sample(case.model, prompt, cfg_scale=settings.get("cfg_scale", 0.0), **options)
    expected = case.expected[f"generate.{run}"]
    assert got[0, -expected.shape[1] :].tolist() == expected[0].tolist()

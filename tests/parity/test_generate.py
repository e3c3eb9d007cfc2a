"""The sampler against the recorded generations, token for token."""

from types import SimpleNamespace

import pytest
import torch

from lib.diffusion import sampler
from lib.diffusion.commits import DenoisingStep

RECORDED = {
    "block32": {"block_length": 32},
    "block8": {"block_length": 8},
    "cfg": {"block_length": 32, "cfg_scale": 0.5},
}


@pytest.mark.parametrize("name", RECORDED)
def test_generation_equals_the_recorded_tokens(llada: SimpleNamespace, name: str) -> None:
    prompt = llada.expected["generate.prompt"]
    got = sampler.sample(llada.model, prompt, new_tokens=32, steps=16, **RECORDED[name])
    assert got.tolist() == llada.expected[f"generate.{name}"].tolist()


def test_the_three_recorded_generations_differ(llada: SimpleNamespace) -> None:
    """So a sampler that ignored blocks or guidance would fail above."""
    outputs = {tuple(llada.expected[f"generate.{name}"][0].tolist()) for name in RECORDED}
    assert len(outputs) == len(RECORDED)


def test_batched_generation_equals_single_rows(llada: SimpleNamespace) -> None:
    prompt = llada.expected["generate.prompt"]
    other = (prompt * 3 + 1) % 127
    both = sampler.sample(llada.model, torch.cat([other, prompt]), new_tokens=32, steps=16, block_length=8)
    alone = sampler.sample(llada.model, other, new_tokens=32, steps=16, block_length=8)
    assert both[1].tolist() == llada.expected["generate.block8"][0].tolist()
    assert both[0].tolist() == alone[0].tolist()


def test_trace_of_the_recorded_generation(llada: SimpleNamespace) -> None:
    """The trace of block8 replays to the recorded output: committed tokens stay, block by block."""
    prompt, seen = llada.expected["generate.prompt"], list[DenoisingStep]()
    final = sampler.sample(llada.model, prompt, new_tokens=32, steps=16, block_length=8, on_step=seen.append)
    start = prompt.shape[1]
    for step, after in zip(seen, [*(s.input_ids for s in seen[1:]), final], strict=True):
        assert torch.equal(after != step.input_ids, step.is_committed & (after != step.input_ids))
        assert torch.equal((after == 127), step.is_masked & ~step.is_committed)
        block = step.step // 4
        committed = step.is_committed[0].nonzero()[:, 0] - start
        assert ((committed >= 8 * block) & (committed < 8 * (block + 1))).all()

"""Writing with models of uniform and mixed noise: the steps, what they record, and the distribution that is drawn."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.checkpoints.facts import NoiseKind
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import ancestral, commits, noise, ragged, sampler, traces
from lib.diffusion.commits import DenoisingStep
from lib.models.language_model import LanguageModel
from tests import tiny
from tests.unit.diffusion import test_noise as known

KINDS = {"uniform": NoiseKind("uniform", 1.0, 3), "mixed": NoiseKind("mixed", 0.1)}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    return tiny.of_noise(tmp_path, request.param)


def oracle(kind: str, steps: int) -> LanguageModel:
    """A model of two places that knows the recorded joint distribution, and the level from how often it was asked."""
    process = known.NOISES["uniform" if kind == "uniform" else "xdlm_k0.1"]
    times: Iterator[int] = iter(range(steps, 0, -1))

    def logits_of(ids: Tensor) -> Tensor:
        probs = known.denoise(process, "leave_one_out", next(times) / steps)[ids[:, 0], ids[:, 1]]
        return torch.cat([probs.log(), torch.full((*probs.shape[:2], 4 - probs.shape[2]), 5.0)], -1)  # the mask is no clean token

    made = tiny.stub(logits_of, vocab=4, mask_token_id=3 if kind == "mixed" else None)
    object.__setattr__(made, "noise", KINDS[kind])
    return made


@every_kind
@pytest.mark.parametrize("steps", [1, 4])
def test_ancestral_steps_of_a_model_draw_what_is_recorded(kind: str, steps: int) -> None:
    """Total variation to the truth falls with the steps as the recorded exact sampler's does."""
    draws, empty = 20_000, torch.zeros((20_000, 0), dtype=torch.long)
    options: dict[str, Any] = {"new_tokens": 2, "steps": steps, "temperature": 1.0, "remasking": "random"}
    got = sampler.sample(oracle(kind, steps), empty, generator=generator(7), **options)
    counts = torch.zeros(3, 3, dtype=torch.float64).index_put_((got[:, 0], got[:, 1]), torch.ones(1).double(), accumulate=True)
    name = "uniform" if kind == "uniform" else "xdlm_k0.1"
    expected = known.joint_after(known.NOISES[name], "leave_one_out", steps)
    assert float((counts / draws - expected).abs().max()) < 5 * (0.25 / draws) ** 0.5
    distance = float((counts / draws - known.JOINT).abs().sum() / 2)
    assert distance == pytest.approx(float((expected - known.JOINT).abs().sum() / 2), abs=0.015)


def test_the_surest_first_is_lladas_sampler_under_masked_noise(tmp_path: Path) -> None:
    masked = tiny.of_noise(tmp_path, "masked")
    head: Any = masked.network.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCAB), requires_grad=False)
    head.bias[tiny.MASK] = -1e4
    for steps, block in ((8, None), (4, None), (4, 4)):
        options: dict[str, Any] = {"new_tokens": 8, "steps": steps, "block_length": block}
        wanted = sampler.sample(masked, tiny.ids(2, 6), **options)
        assert torch.equal(ancestral.generate(masked, tiny.ids(2, 6), **options), wanted)


@pytest.mark.parametrize("options", [{}, {"block_length": 4}, {"temperature": 1.0}, {"remasking": "random", "temperature": 0.7}])
def test_text_is_written_in_steps_that_say_what_they_change(model: LanguageModel, options: dict[str, Any]) -> None:
    seen: list[DenoisingStep] = []
    prompt = tiny.ids(2, 6)
    given = {"new_tokens": 8, "steps": 4, "generator": generator(0), "on_step": seen.append, **options}
    text = sampler.sample(model, prompt, **given)
    assert torch.equal(text[:, :6], prompt) and text.shape == (2, 14)
    assert tiny.MASK not in text.tolist()[0] + text.tolist()[1]
    assert [step.step for step in seen] == [0, 1, 2, 3]
    assert [step.mask_ratio for step in seen] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    after = [*(step.input_ids for step in seen[1:]), text]
    for step, then in zip(seen, after, strict=True):
        assert torch.equal(step.is_committed, step.input_ids != then) and not step.is_committed[:, :6].any()
    if "block_length" in options:  # the second half is noise until the first one is written
        assert torch.equal(seen[0].input_ids[:, 10:], seen[1].input_ids[:, 10:])
        assert torch.equal(seen[2].input_ids[:, 6:10], text[:, 6:10])
    if options.get("remasking") is None:
        noisy = [int(step.is_masked.sum(1)[0]) for step in seen]
        assert noisy == [8, 6, 4, 2]


def test_a_row_gets_what_it_gets_alone(model: LanguageModel) -> None:
    prompts = [tiny.ids(6, seed=1).tolist(), tiny.ids(4, seed=2).tolist(), tiny.ids(6, seed=3).tolist()]
    together = ragged.denoise(model, prompts, new_tokens=8, steps=4)
    for row, prompt in zip(together, prompts, strict=True):
        alone = sampler.sample(model, torch.tensor([prompt]), new_tokens=8, steps=4)
        assert torch.equal(row, alone[0, len(prompt) :])
    again = ragged.denoise(model, prompts[::-1], new_tokens=8, steps=4)
    assert torch.equal(again.flip(0), together)


def test_noise_of_two_prompts_differs(model: LanguageModel) -> None:
    seen: list[Tensor] = []
    sampler.sample(model, tiny.ids(2, 6), new_tokens=8, steps=1, on_step=lambda step: seen.append(step.input_ids))
    if model.noise.kind == "uniform":
        assert not torch.equal(seen[0][0, 6:], seen[0][1, 6:])
    assert (seen[0][:, 6:] == tiny.MASK).float().mean() == pytest.approx(0.0 if model.noise.kind == "uniform" else 0.9, abs=0.35)


def test_a_trace_records_what_still_changes(model: LanguageModel) -> None:
    for options in ({}, {"temperature": 1.0, "remasking": "random"}):
        found = traces.trace(model, tiny.ids(3, 6), positions=14, steps=4, heads=True, generator=generator(0), **options)
        changed = torch.zeros_like(found.is_masked)
        states = [*found.ids.unbind(1), found.texts]
        for step in range(4):
            for place in range(14):
                for row in range(3):
                    later = [state[row, place] for state in states[step:]]
                    changed[row, step, place] = any(a != b for a, b in itertools.pairwise(later))
        assert torch.equal(found.is_masked, changed)
        assert torch.equal(found.is_changed[:, -1], found.ids[:, -1] != found.texts)
        assert not found.is_masked[..., :6].any() and found.is_masked[:, 0].any()
        assert found.is_masked.sum(-1).diff(dim=1).le(0).all()
        assert (found.frontier >= 6).all() and not found.is_causal


def test_under_masked_noise_what_still_changes_is_masked(tmp_path: Path) -> None:
    found = traces.trace(tiny.of_noise(tmp_path, "masked"), tiny.ids(2, 6), positions=14, steps=4)
    if tiny.MASK not in found.texts.flatten().tolist():
        assert torch.equal(commits.still_changing(found.ids, found.texts), found.is_masked)


def test_what_a_sampler_cannot_do_is_refused(model: LanguageModel) -> None:
    prompt = tiny.ids(1, 6)
    with pytest.raises(InputError, match=r"guidance must go with masked noise \(it masks the prompt\), got 1 with "):
        sampler.sample(model, prompt, new_tokens=8, steps=4, cfg_scale=1.0)
    with pytest.raises(InputError, match="block_length must divide new_tokens, got 3 and 8"):
        sampler.sample(model, prompt, new_tokens=8, steps=4, block_length=3)
    with pytest.raises(InputError, match="steps must be a multiple of the number of blocks, got 3 for 2"):
        sampler.sample(model, prompt, new_tokens=8, steps=3, block_length=4)
    for options in ({"temperature": 1.0}, {"remasking": "random"}):
        with pytest.raises(InputError, match="must be given a generator, got None"):
            sampler.sample(model, prompt, new_tokens=8, steps=4, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="noise must use a diffusion model, got stub: read clean text with it"):
        noise.process_of(tiny.stub(lambda ids: ids, vocab=4, mask_token_id=None, is_causal=True))
    blocks = dataclasses.replace(model, attention="block-causal", block_length=4)
    with pytest.raises(InputError, match="attention by blocks must go with masked noise"):
        noise.process_of(blocks)


@every_kind
def test_filled_tokens_are_drawn_from_the_mixing_at_their_places_alone(kind: str) -> None:
    process = noise.uniform_noise(4, mask_token_id=3) if kind == "uniform" else noise.mixed_noise(4, mask_token_id=3)
    ids, where = torch.full((2, 20_000), 1), torch.zeros((2, 20_000), dtype=torch.bool)
    where[1] = True
    got = process.fill(ids, where, generator=generator(0))
    assert torch.equal(got[0], ids[0])
    assert (got[1].bincount(minlength=4) / 20_000).tolist() == pytest.approx(process.mixing.tolist(), abs=0.015)
    assert torch.equal(process.fill(ids, torch.zeros_like(where), generator=generator(0)), ids)


@pytest.mark.parametrize("greedy", ["never", "last", "always", "confident"])
def test_every_greedy_variant_writes_clean_tokens_that_the_stream_decides(model: LanguageModel, greedy: Any) -> None:
    options: dict[str, Any] = {"new_tokens": 8, "steps": 4, "temperature": 1.0, "greedy": greedy}
    first, again, other = (ancestral.generate(model, tiny.ids(3, 6), generator=generator(seed), **options) for seed in (0, 0, 1))
    assert torch.equal(first, again) and (greedy == "always" or not torch.equal(first, other))
    assert tiny.MASK not in first.flatten().tolist()

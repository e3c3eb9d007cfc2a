"""The samplers: schedules, traces, randomness."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import commits, sampler
from lib.diffusion.commits import DenoisingStep
from lib.models.language_model import LanguageModel
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("dlm"), causal=False)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("ar"), causal=True)


def ramp(input_ids: Tensor) -> Tensor:
    """Sure of token 1 everywhere, and the surer the further right."""
    logits = torch.zeros((*input_ids.shape, 4))
    logits[..., 1] = 1.0 + 0.1 * torch.arange(input_ids.shape[1])
    return logits


@pytest.mark.parametrize(("masked", "steps"), [(7, 3), (8, 8), (5, 1), (0, 4), (3, 5), (32, 16)])
def test_the_schedule_sums_to_the_masks_and_never_rises(masked: int, steps: int) -> None:
    counts = commits.commit_schedule(torch.tensor([masked, masked + 1]), steps=steps)
    assert counts.sum(1).tolist() == [masked, masked + 1]
    assert (counts.diff(dim=1) <= 0).all()
    assert int(counts.max() - counts.min()) <= 1 + (masked + 1) // steps - masked // steps


def test_one_forward_pass_per_step_and_the_head_on_the_masks_of_the_block_only() -> None:
    stub = tiny.stub(ramp, vocab=4, mask_token_id=3)
    sampler.sample(stub, torch.zeros((2, 3), dtype=torch.long), new_tokens=8, steps=4, block_length=4)
    assert stub.network.calls.forwards == 4  # pyright: ignore
    assert stub.network.calls.head_rows == 2 * (4 + 2 + 4 + 2)  # pyright: ignore


def test_the_most_confident_tokens_come_first() -> None:
    """Confidence rises to the right, so each step commits the two rightmost masks, not the two leftmost."""
    seen: list[DenoisingStep] = []
    stub = tiny.stub(ramp, vocab=4, mask_token_id=3)
    final = sampler.sample(stub, torch.zeros((1, 2), dtype=torch.long), new_tokens=6, steps=3, on_step=seen.append)
    assert [step.is_committed[0].nonzero()[:, 0].tolist() for step in seen] == [[6, 7], [4, 5], [2, 3]]
    assert final.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("block", [None, 12, 4, 3])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_the_trace_tells_what_happens(model: LanguageModel, block: int | None, remasking: commits.Remasking) -> None:
    seen: list[DenoisingStep] = []
    prompt = tiny.ids(2, 5)
    final = sampler.sample(
        model,
        prompt,
        new_tokens=12,
        steps=12,
        block_length=block,
        remasking=remasking,
        generator=generator(0),
        on_step=seen.append,
    )
    assert [step.step for step in seen] == list(range(12))
    assert seen[0].mask_ratio == 1.0
    ratios = [step.mask_ratio for step in seen]
    assert ratios == pytest.approx([1 - step / 12 for step in range(12)])
    assert torch.equal(final[:, :5], prompt)
    assert not (final == tiny.MASK).any()
    for step, after in zip(seen, [*(s.input_ids for s in seen[1:]), final], strict=True):
        assert torch.equal(after != step.input_ids, step.is_committed)
        assert torch.equal(step.input_ids == tiny.MASK, step.is_masked)
        columns = step.is_committed.any(0).nonzero()[:, 0] - 5
        first = step.step // (12 // (12 // (block or 12))) * (block or 12)
        assert ((columns >= first) & (columns < first + (block or 12))).all()


def test_the_callback_gets_copies(model: LanguageModel) -> None:
    def spoil(step: DenoisingStep) -> None:
        step.input_ids.fill_(0)
        step.is_committed.fill_(False)

    options: dict[str, Any] = {"new_tokens": 6, "steps": 3}
    assert torch.equal(
        sampler.sample(model, tiny.ids(1, 4), **options, on_step=spoil), sampler.sample(model, tiny.ids(1, 4), **options)
    )


def test_random_remasking_depends_on_the_generator_alone(model: LanguageModel) -> None:
    def run(seed: int) -> list[list[int]]:
        order: list[list[int]] = []
        sampler.sample(
            model,
            tiny.ids(1, 4),
            new_tokens=10,
            steps=10,
            remasking="random",
            generator=generator(seed),
            on_step=lambda step: order.append(step.is_committed[0].nonzero()[:, 0].tolist()),
        )
        return order

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert run(0) == first
    assert run(1) != first


def test_sampling_leaves_the_global_stream_alone(model: LanguageModel) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sampler.sample(model, tiny.ids(1, 4), new_tokens=4, steps=2, temperature=1.0, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_max_draws_from_the_tempered_softmax(temperature: float) -> None:
    """Chi-square with 2 degrees of freedom, 0.1 % point 13.8; the tempered distributions lie hundreds apart."""
    logits, draws = torch.tensor([0.0, 1.0, -0.7]), 20_000
    chosen = commits.choose_tokens(logits.expand(draws, 3), temperature=temperature, generator=generator(3))
    seen = torch.bincount(chosen, minlength=3).double()
    expected = (logits.double() / temperature).softmax(0) * draws
    assert ((seen - expected) ** 2 / expected).sum() < 13.8


def test_temperature_zero_is_the_best_token() -> None:
    assert commits.choose_tokens(torch.tensor([[1.0, 3.0, 2.0]]), temperature=0.0, generator=None).tolist() == [1]


def test_guidance_moves_away_from_the_prediction_without_the_prompt() -> None:
    """Conditional logits (1, 2, 0), unguided (0, 4, 0): with scale 2 they become (3, -2, 0), so token 0 wins instead of 1."""

    def logits_of(input_ids: Tensor) -> Tensor:
        has_prompt = (input_ids[:, 0] != 3)[:, None, None]
        values = torch.where(has_prompt, torch.tensor([1.0, 2.0, 0.0, -9.0]), torch.tensor([0.0, 4.0, 0.0, -9.0]))
        return values.expand(*input_ids.shape, 4)

    prompt = torch.zeros((1, 2), dtype=torch.long)
    plain = tiny.stub(logits_of, vocab=4, mask_token_id=3)
    guided = tiny.stub(logits_of, vocab=4, mask_token_id=3)
    assert sampler.sample(plain, prompt, new_tokens=2, steps=1).tolist() == [[0, 0, 1, 1]]
    seen: list[DenoisingStep] = []
    assert sampler.sample(guided, prompt, new_tokens=2, steps=1, cfg_scale=2.0, on_step=seen.append).tolist() == [[0, 0, 0, 0]]
    both = guided.network.calls.inputs[0]  # pyright: ignore
    assert both.tolist() == [[0, 0, 3, 3], [3, 3, 3, 3]]
    assert seen[0].input_ids.tolist() == [[0, 0, 3, 3]]


def test_continue_text_equals_greedy_generation_of_transformers(causal: LanguageModel) -> None:
    prompt = tiny.ids(3, 5)
    got = sampler.continue_text(causal, prompt, new_tokens=9)
    with torch.inference_mode():
        expected = cast(Any, causal.network).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0
        )
    # min_new_tokens suppresses the end token, which the greedy text of this network does not reach
    assert got.tolist() == expected.tolist()


def test_continue_text_draws_from_the_tempered_softmax(causal: LanguageModel) -> None:
    """First new token of 4000 equal prompts against the network's own probabilities at temperature 3."""
    prompt = tiny.ids(1, 4).expand(4000, -1)
    first = sampler.continue_text(causal, prompt, new_tokens=1, temperature=3.0, generator=generator(2))[:, -1]
    with torch.inference_mode():
        expected = (causal.network(input_ids=prompt[:1]).logits[0, -1].double() / 3.0).softmax(0) * 4000
    seen = torch.bincount(first, minlength=tiny.VOCAB).double()
    common = expected > 5
    statistic = ((seen - expected) ** 2 / expected)[common].sum()
    assert common.sum() > 5
    assert statistic < 2.5 * common.sum() + 10  # far beyond the 0.1 % point for any number of cells here
    repeat = sampler.continue_text(causal, prompt, new_tokens=1, temperature=3.0, generator=generator(2))[:, -1]
    assert torch.equal(first, repeat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 10, "steps": 4, "block_length": 4}, "block_length must divide new_tokens, got 4 and 10"),
        ({"new_tokens": 0, "steps": 1}, "block_length must divide new_tokens"),
        ({"new_tokens": 8, "steps": 3, "block_length": 4}, "multiple of the number of blocks, got 3 for 2"),
        ({"new_tokens": 8, "steps": 0}, "multiple of the number of blocks, got 0"),
        ({"new_tokens": 8, "steps": 4, "temperature": 0.5}, "must be given a generator"),
        ({"new_tokens": 8, "steps": 4, "remasking": "random"}, "must be given a generator"),
    ],
)
def test_bad_input_is_refused_before_any_forward_pass(options: dict, message: str) -> None:
    stub = tiny.stub(ramp, vocab=4, mask_token_id=3)
    with pytest.raises(InputError, match=message):
        sampler.sample(stub, torch.zeros((1, 2), dtype=torch.long), **options)
    assert stub.network.calls.forwards == 0  # pyright: ignore


def test_each_sampler_refuses_the_other_kind_of_model(model: LanguageModel, causal: LanguageModel) -> None:
    with pytest.raises(InputError, match="use continue_text"):
        sampler.sample(causal, tiny.ids(1, 4), new_tokens=2, steps=1)
    with pytest.raises(InputError, match="use sample"):
        sampler.continue_text(model, tiny.ids(1, 4), new_tokens=2)
    with pytest.raises(InputError, match="must be given a generator"):
        sampler.continue_text(causal, tiny.ids(1, 4), new_tokens=2, temperature=1.0)

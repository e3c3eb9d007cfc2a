"""The analytical step: examples against a slow run of the sampler, closed forms against definitions, and the step in decoding."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.core import runtime
from lib.core.errors import InputError
from lib.decoding import decoder, late_steps
from lib.decoding.late_steps import LateExamples, LateStep
from lib.decoding.systems import fast_plan
from lib.diffusion import sampler
from lib.models import language_model
from lib.models.language_model import LanguageModel
from tests import tiny

PROMPT, NEW, BLOCK = 5, 12, 6
SIZES: dict[str, Any] = {"new_tokens": NEW, "block_length": BLOCK}
WEIGHTS = st.lists(st.floats(0.1, 5.0), min_size=12, max_size=12)


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    options: dict[str, Any] = {"llada": {"family": "llama"}, "dream": {"family": "qwen2", "logit_shift": 1}}[request.param]
    return tiny.model(tmp_path_factory.mktemp(request.param), causal=False, **options)


@torch.inference_mode()
def state(model: LanguageModel, ids: Tensor, position: int) -> Tensor:
    """What predicts one position of one text."""
    states = language_model.network_body(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return states[max(position - model.logit_shift, 0)]


def slow_examples(model: LanguageModel, prompt: Tensor, *, most: int) -> list[tuple[Any, ...]]:
    """(state, left, right, final state, token) of one prompt, in order of step and position."""
    ids = torch.tensor([*prompt.tolist(), *[tiny.MASK] * NEW])
    found: list[Any] = []
    for first in range(PROMPT, PROMPT + NEW, BLOCK):
        waiting: list[Any] = []
        for step in range(BLOCK):
            masked = [i for i in range(first, first + BLOCK) if ids[i] == tiny.MASK]
            states = {i: state(model, ids, i) for i in masked}
            with torch.inference_mode():
                logits = {i: model.network.get_output_embeddings()(states[i]) for i in masked}  # pyright: ignore
            surest = max(masked, key=lambda i: float(logits[i].double().softmax(-1).max()))
            guessed = ids.clone()
            for i in masked:
                guessed[i] = logits[i].argmax()
            ids = ids.clone()
            ids[surest] = guessed[surest]
            for example in waiting:
                if example["position"] == surest:
                    example |= {"final": states[surest], "token": int(ids[surest])}
            still = [i for i in masked if ids[i] == tiny.MASK]  # the surest one too, where its best token is the mask
            if len(still) <= most and step < BLOCK - 1:
                for i in still:
                    right = int(guessed[min(i + 1, len(ids) - 1)])
                    waiting.append({"position": i, "state": states[i], "left": int(guessed[i - 1]), "right": right})
        found += [example for example in waiting if ids[example["position"]] != tiny.MASK]
    return [(e["state"], e["left"], e["right"], e["final"], e["token"]) for e in found]


def rows_of(examples: LateExamples, prompt: int) -> list[tuple[Any, ...]]:
    parts = (examples.states, examples.left, examples.right, examples.final, examples.tokens)
    return [tuple(part[i] for part in parts) for i in (examples.prompt == prompt).nonzero()[:, 0].tolist()]


def test_examples_are_those_of_a_slow_run(model: LanguageModel) -> None:
    prompts = tiny.ids(3, PROMPT, seed=5)
    examples = late_steps.collect(model, prompts, share=0.5, **SIZES)
    assert len(examples.tokens) == {0: 3 * 2 * (3 + 2 + 1), 1: 30}[model.logit_shift]  # one network predicts masks at times
    for row, prompt in enumerate(prompts):
        expected = slow_examples(model, prompt, most=3)
        for got, wanted in zip(rows_of(examples, row), expected, strict=True):
            assert torch.allclose(got[0], wanted[0], atol=1e-4) and torch.allclose(got[3], wanted[3], atol=1e-4)
            assert [int(part) for part in (got[1], got[2], got[4])] == [wanted[1], wanted[2], wanted[4]]
    moved = (examples.final - examples.states).abs().max(1).values
    assert float(moved.min()) > 1e-3  # so the oracle tells the late state from the final one


def test_final_states_are_read_as_the_tokens_and_the_first_state_of_a_block_is_the_switch(model: LanguageModel) -> None:
    prompts = tiny.ids(2, PROMPT, seed=6)
    examples = late_steps.collect(model, prompts, share=0.5, first_only=True, **SIZES)
    assert len(examples.tokens) == 2 * 2 * 3
    assert torch.equal(late_steps.read_out(model, examples.final).argmax(-1), examples.tokens)
    text = sampler.sample(model, prompts, steps=NEW, **SIZES)
    assert all(int(token) in text[row, PROMPT:] for row, token in zip(examples.prompt, examples.tokens, strict=True))
    windows = late_steps.windows_at(text, torch.ones_like(text, dtype=torch.bool)).view(len(text), -1, 2 * late_steps.RADIUS + 1)
    assert torch.equal(examples.finished[:, late_steps.RADIUS], examples.tokens)
    assert all((windows[row] == own).all(1).any() for row, own in zip(examples.prompt, examples.finished, strict=True))
    written = examples.window != tiny.MASK
    assert torch.equal(examples.finished[written], examples.window[written]) and not bool(written.all())


def penalised(z: Tensor, y: Tensor, b: Tensor, weights: Tensor, penalty: float) -> float:
    return float((weights[:, None] * (y - z @ b).square()).sum() + penalty * b.square().sum())


@settings(deadline=None, max_examples=25)
@given(WEIGHTS, st.floats(0.05, 2.0), st.integers(1, 3), st.integers(0, 1000))
def test_no_map_of_the_rank_does_better(numbers: list[float], ridge: float, rank: int, seed: int) -> None:
    """Alternating least squares from the solution and from random starts finds nothing lower."""
    stream = torch.Generator().manual_seed(seed)
    z, y = (torch.randn(shape, generator=stream, dtype=torch.float64) for shape in ((12, 5), (12, 4)))
    z = z * torch.tensor([9.0, 3.0, 1.0, 1.0, 0.3])  # unequal, so that cutting the map itself is not the same
    weights = torch.tensor(numbers, dtype=torch.float64)
    inputs, outputs = late_steps.low_rank_ridge(z, y, weights=weights, ridge=ridge, rank=rank)
    assert inputs.shape == (5, rank) and outputs.shape == (rank, 4)
    gram = (z * weights[:, None]).T @ z
    penalty = ridge * float(gram.trace()) / 5
    least = penalised(z, y, inputs @ outputs, weights, penalty)
    full = torch.linalg.solve(gram + penalty * torch.eye(5, dtype=z.dtype), (z * weights[:, None]).T @ y)
    for _ in range(20):
        # For given directions the best map is the full one projected on them.
        basis = torch.linalg.qr(outputs.T + 0.3 * torch.randn((4, rank), generator=stream, dtype=z.dtype)).Q
        assert penalised(z, y, full @ basis @ basis.T, weights, penalty) >= least - 1e-9 * max(1.0, least)
        nudge = 1e-3 * torch.randn(inputs.shape, generator=stream, dtype=z.dtype)
        assert penalised(z, y, (inputs + nudge) @ outputs, weights, penalty) > least


def test_leverage_is_the_diagonal_of_the_hat_matrix_and_the_weights_leave_sums_unbiased() -> None:
    stream = torch.Generator().manual_seed(0)
    z = torch.randn((40, 3), generator=stream, dtype=torch.float64) * torch.tensor([5.0, 1.0, 0.2])
    gram = z.T @ z
    penalty = 0.1 * float(gram.trace()) / 3 * torch.eye(3, dtype=z.dtype)
    leverage = torch.stack([row @ torch.linalg.inv(gram + penalty) @ row for row in z])
    picked, weights = late_steps.by_leverage(z, size=39, ridge=0.1, generator=stream)
    assert torch.allclose(weights, leverage.sum() / (39 * leverage[picked]))
    draws = [late_steps.by_leverage(z, size=30, ridge=0.1, generator=torch.Generator().manual_seed(seed)) for seed in range(400)]
    mean = torch.stack([(z[picked] * weights[:, None]).T @ z[picked] for picked, weights in draws]).mean(0)
    assert torch.allclose(mean.diagonal(), gram.diagonal(), rtol=0.05)
    everything, ones = late_steps.by_leverage(z, size=40, ridge=0.1, generator=stream)
    assert everything.tolist() == list(range(40)) and ones.tolist() == [1.0] * 40


@settings(deadline=None)
@given(st.integers(1, 15), st.integers(0, 1000))
def test_each_centre_is_the_farthest_from_those_before(size: int, seed: int) -> None:
    z = torch.randn((12, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = late_steps.centres(z, size=size, generator=torch.Generator().manual_seed(seed)).tolist()
    assert len(chosen) == min(size, 12) == len(set(chosen))
    for count in range(1, len(chosen)):
        nearest = [min(float((z[i] - z[j]).norm()) for j in chosen[:count]) for i in range(12)]
        assert nearest[chosen[count]] == pytest.approx(max(nearest))


def planted(model: LanguageModel, *, count: int, seed: int) -> LateExamples:
    """Examples whose correction is linear in the embedding of the left token, and nothing else."""
    stream = torch.Generator().manual_seed(seed)
    left, right = tiny.ids(count, seed=seed), tiny.ids(count, seed=seed + 50)
    states = torch.randn((count, 32), generator=stream)
    way = torch.randn((32, 32), generator=torch.Generator().manual_seed(99))
    with torch.inference_mode():
        final = states + model.network.get_input_embeddings()(left) @ way  # pyright: ignore
        tokens = late_steps.read_out(model, final).argmax(-1)
    return LateExamples(states, left, right, final, tokens, torch.arange(count) % 4)


@pytest.mark.parametrize(("options", "least"), [({"rank": 32}, 0.95), ({"rank": 1}, 0.0)])
def test_a_linear_law_is_learnt_from_a_part_of_the_examples(model: LanguageModel, options: dict[str, Any], least: float) -> None:
    train, held = planted(model, count=600, seed=1), planted(model, count=200, seed=2)
    step = late_steps.fit(model, train, coreset=400, ridge=1e-6, **options)
    control, learnt = (float(late_steps.agreement(model, held, one).mean()) for one in (None, step))
    assert learnt >= least and (learnt > control + 0.3) == (least > 0)


def test_the_map_is_that_of_the_weighted_coreset(model: LanguageModel) -> None:
    train = planted(model, count=60, seed=6)
    step = late_steps.fit(model, train, coreset=40, rank=3, ridge=0.5, seed=4)
    with torch.inference_mode():
        embed: Any = model.network.get_input_embeddings()
        features = torch.cat([train.states, embed(train.left), embed(train.right)], dim=1).double()
    z = (features - features.mean(0)) / features.std(0, correction=0)
    targets = (train.final - train.states).double()
    picked, weights = late_steps.by_leverage(z, size=40, ridge=0.5, generator=runtime.generator(4, "late step", "ridge"))
    options: dict[str, Any] = {"ridge": 0.5, "rank": 3}
    inputs, outputs = late_steps.low_rank_ridge(z[picked], (targets - targets.mean(0))[picked], weights=weights, **options)
    assert torch.allclose((step.inputs @ step.outputs).double(), inputs @ outputs, atol=1e-4)
    equal = late_steps.low_rank_ridge(z[picked], (targets - targets.mean(0))[picked], weights=torch.ones_like(weights), **options)
    assert float((equal[0] @ equal[1] - inputs @ outputs).abs().max()) > 1e-2


def test_nearest_averages_the_corrections_of_neighbours(model: LanguageModel) -> None:
    train = planted(model, count=30, seed=3)
    own = late_steps.fit(model, train, method="nearest", neighbours=1)
    assert late_steps.agreement(model, train, own).tolist() == [1.0] * 4  # each one is its own neighbour
    everyone = late_steps.fit(model, train, method="nearest", neighbours=30)
    mean = (train.final - train.states).mean(0)
    predicted = everyone.predict(model, train.states, left=train.left, right=train.right)
    assert torch.equal(predicted, late_steps.read_out(model, train.states + mean).argmax(-1))
    assert late_steps.fit(model, train, method="nearest", coreset=7, neighbours=9).neighbours == 7


def test_agreement_is_a_mean_per_prompt(model: LanguageModel) -> None:
    examples = planted(model, count=5, seed=4)
    best = late_steps.read_out(model, examples.states).argmax(-1)
    tokens = torch.where(torch.tensor([True, True, False, True, False]), best, (best + 1) % tiny.VOCAB)
    marked = dataclasses.replace(examples, tokens=tokens, prompt=torch.tensor([7, 7, 7, 9, 9]))
    assert late_steps.agreement(model, marked, None).tolist() == pytest.approx([2 / 3, 0.5])


def test_fits_repeat_and_depend_on_the_seed(model: LanguageModel) -> None:
    train = planted(model, count=80, seed=5)
    for method in ("ridge", "nearest"):
        fits = [late_steps.fit(model, train, method=method, coreset=20, seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(fits[0].inputs, fits[1].inputs) and not torch.equal(fits[0].inputs, fits[2].inputs)


# In decoding


def shouting(model: LanguageModel, token: int) -> LateStep:
    """A step that predicts one token wherever it is asked."""
    head: Any = model.network.get_output_embeddings()
    inputs, outputs = torch.zeros((96, 1)), torch.zeros((1, 32))
    offset = 1e4 * torch.linalg.pinv(head.weight.detach() - head.weight.detach().mean(0))[:, token].float()
    return LateStep("ridge", torch.zeros(96), torch.ones(96), inputs, outputs, offset, 1)


@pytest.mark.parametrize("cache", [{}, {"cache": "prefix"}, {"cache": "dual"}, {"cache": "adaptive", "refresh_ratio": 0.5}])
def test_the_control_saves_the_last_passes_of_a_block_and_a_step_writes_the_same_positions(
    model: LanguageModel, cache: dict[str, Any]
) -> None:
    prompts = tiny.ids(2, PROMPT, seed=7)
    plan = fast_plan(threshold=1.0, late_share=0.34, **cache)
    control = decoder.decode(model, prompts, plan=plan, **SIZES)
    assert control.forwards == 2 * (BLOCK - 2)
    told = dataclasses.replace(plan, late_step=shouting(model, 4))
    other = decoder.decode(model, prompts, plan=told, new_tokens=BLOCK, block_length=BLOCK).ids
    alike = decoder.decode(model, prompts, plan=plan, new_tokens=BLOCK, block_length=BLOCK).ids
    assert not (control.ids == tiny.MASK).any()
    assert ((other != alike).sum(1) <= 2).all() and (other[:, PROMPT:] == 4).sum(1).min() >= 2


def test_what_decoding_asks_is_what_was_collected(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """States and neighbours of the first block at the switch, in the order of positions, row by row."""
    prompts = tiny.ids(3, PROMPT, seed=8)
    examples = late_steps.collect(model, prompts, new_tokens=BLOCK, block_length=BLOCK, share=0.5, first_only=True)
    seen: list[Any] = []

    def predict(self: LateStep, _: LanguageModel, states: Tensor, *, left: Tensor, right: Tensor) -> Tensor:
        seen.append((states, left, right))
        return torch.zeros_like(left)

    monkeypatch.setattr(LateStep, "predict", predict)
    plan = fast_plan(threshold=1.0, late_share=0.5, late_step=shouting(model, 4))
    decoder.decode(model, prompts, plan=plan, new_tokens=BLOCK, block_length=BLOCK)
    ((states, left, right),) = seen
    assert torch.allclose(states, examples.states, atol=1e-5)
    assert torch.equal(left, examples.left) and torch.equal(right, examples.right)


@pytest.mark.parametrize("fitted", [False, True])
def test_rows_do_not_see_each_other(model: LanguageModel, fitted: bool) -> None:
    """Rows reach their late state at other steps."""
    prompts = tiny.ids(5, PROMPT, seed=9)
    step = late_steps.fit(model, late_steps.collect(model, prompts, share=0.5, **SIZES), rank=4) if fitted else None
    plan = fast_plan(threshold=0.2, late_share=0.5, late_step=step)
    together = decoder.decode(model, prompts, plan=plan, **SIZES).ids
    alone = [decoder.decode(model, row[None], plan=plan, **SIZES).ids for row in prompts]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0, 2.0])
def test_a_share_must_leave_something_to_do(model: LanguageModel, share: float) -> None:
    with pytest.raises(InputError, match=f"must leave 1 to 5 of 6 positions masked, got {share}"):
        late_steps.collect(model, tiny.ids(1, PROMPT), share=share, **SIZES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "must be at least 1 and ridge above 0, got 2000, 0, 4 and 0.1"),
        ({"ridge": 0.0}, "ridge above 0, got 2000, 32, 4 and 0.0"),
    ],
)
def test_bad_fits_are_refused(model: LanguageModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        late_steps.fit(model, planted(model, count=5, seed=0), **options)


def test_a_step_needs_its_share(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="late_step must go with late_share"):
        fast_plan(threshold=0.5, late_step=shouting(model, 1))

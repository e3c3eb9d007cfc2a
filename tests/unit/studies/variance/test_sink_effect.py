"""What blocking does to the loss: paired with the dense model, and equal to a block put together by hand."""

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lib.attention import blocking
from lib.attention import masses as attention
from lib.attention.blocking import KeyBlocker
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import likelihood
from lib.evaluation import sums
from lib.models.language_model import LanguageModel
from lib.studies.variance import sink_effect, tables
from lib.studies.variance.sink_effect import NOTHING, Effect
from tests import tiny
from tests.unit import slow_variance as slow

WINDOWS = tiny.ids(3, 20)
DRAWS, SEED = 3, 7


def tokenizer() -> PreTrainedTokenizerFast:
    """The words of `tiny.words`, and one more for every other id of a tiny network."""
    made = tiny.words()
    made.add_tokens([f"x{index}" for index in range(tiny.MASK - len(made))])
    return made


@pytest.fixture(scope="module", params=[True, False], ids=["causal", "diffusion"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    made = tiny.model(tmp_path_factory.mktemp("model"), causal=request.param, seed=0 if request.param else 1)
    return dataclasses.replace(made, tokenizer=tokenizer())


def dense_loss(model: LanguageModel, windows: Tensor, *, seed: int = SEED) -> Tensor:
    if model.is_causal:
        return likelihood.next_token_nll(model, windows).per_window
    return likelihood.nelbo(model, windows, draws=DRAWS, seed=seed).per_window


# --- windows -------------------------------------------------------------------------------------------------------------


def test_the_loss_of_the_dense_model_is_its_likelihood(model: LanguageModel) -> None:
    assert torch.equal(sink_effect.text_loss(model, WINDOWS, draws=DRAWS, seed=SEED), dense_loss(model, WINDOWS))
    effects = sink_effect.window_effects(model, WINDOWS, counts=(1, 4), draws=DRAWS, seed=SEED)
    assert torch.equal(effects[0].loss, dense_loss(model, WINDOWS))
    dense = effects[0]
    assert (dense.model, dense.blocked, dense.amount, dense.correct) == (model.name, NOTHING, 0, ())
    assert (dense.keys_per_head, dense.removed_share) == (0.0, 0.0)


def test_every_condition_is_the_loss_under_its_own_block(model: LanguageModel) -> None:
    effects = sink_effect.window_effects(model, WINDOWS, counts=(1, 4), draws=DRAWS, seed=SEED)
    kinds = ["sinks", "random keys", "large non-sinks"]
    assert [(effect.blocked, effect.amount) for effect in effects] == [
        (NOTHING, 0),
        *((kind, k) for k in (1, 4) for kind in kinds),
    ]
    for effect in effects[1:]:
        k = int(effect.amount)
        blocker = KeyBlocker(blocking.rules(k)[effect.blocked], generator(SEED, "blocked", effect.blocked, k))
        with attention.blocking(model, blocker):
            expected = dense_loss(model, WINDOWS)
        assert torch.equal(effect.loss, expected)
        assert (effect.loss - effects[0].loss).abs().min() > 1e-3  # the block does something to every window
        assert effect.keys_per_head == blocker.keys_per_head
        assert effect.removed_share == blocker.removed_share
        assert effect.keys_per_head <= k and (effect.blocked == "large non-sinks" or effect.keys_per_head == k)
    by_name = {(effect.blocked, effect.amount): effect for effect in effects}
    for kind in kinds:
        assert by_name[kind, 1].removed_share < by_name[kind, 4].removed_share < 1
    # one of 20 keys holds 5 % of the attention on average, the largest one much more
    assert by_name["sinks", 1].removed_share > 2 * by_name["random keys", 1].removed_share
    assert tables.pick(effects, model=model.name, blocked="random keys", amount=4) is by_name["random keys", 4]


def test_a_rule_that_blocks_nothing_raises_nothing(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """All conditions see the same masks: other ones would change the loss of a diffusion model a thousand times more."""

    def none(mass: Tensor, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(mass, dtype=torch.bool)

    monkeypatch.setattr(blocking, "rules", lambda k: {"none": none})
    effects = sink_effect.window_effects(model, WINDOWS, counts=(1,), draws=DRAWS, seed=SEED)
    increase = tables.increase(effects, effects[1])
    assert increase.abs().max() < 1e-5  # the same numbers up to the kernel that a mask calls for
    assert (effects[1].keys_per_head, effects[1].removed_share) == (0.0, 0.0)
    assert tables.increase(effects, effects[0]).tolist() == [0.0] * 3
    if not model.is_causal:
        other = sink_effect.window_effects(model, WINDOWS, counts=(1,), draws=DRAWS, seed=SEED + 1)
        assert (other[0].loss - effects[0].loss).abs().min() > 1e-2


# --- the digest's rule ---------------------------------------------------------------------------------------------------


def slow_frequency_variance(masses: list[Tensor], *, top_k: int) -> Tensor:
    """From one tensor `[layer, head, key]` a step, the later keys missing."""
    size = masses[-1].shape[-1]
    values = torch.zeros(*masses[0].shape[:2], size, dtype=torch.float64)
    for layer in range(values.shape[0]):
        for head in range(values.shape[1]):
            sets = [slow.top_k(step[layer, head].tolist(), top_k) for step in masses]
            for key in range(size):
                values[layer, head, key] = 1 - sum(key in found for found in sets) / len(sets)
    return values


def test_frequency_variance_counts_steps_one_by_one(model: LanguageModel) -> None:
    window, top_k, steps = WINDOWS[1], 3, 5
    got = sink_effect.window_frequency_variance(model, window, top_k=top_k, steps=steps, stream=generator(3, "masks"))
    if model.is_causal:
        masses = [attention.sink_mass(model, window[None, :length])[:, 0] for length in (4, 8, 12, 16, 20)]
    else:
        masks = likelihood.exact_count_masks(torch.ones(20, dtype=torch.bool), steps, generator=generator(3, "masks"))
        assert sorted(mask // 4 for mask in (masks.sum(1) - 1).tolist()) == [0, 1, 2, 3, 4]
        masses = [attention.sink_mass(model, window.masked_fill(mask, tiny.MASK)[None])[:, 0] for mask in masks]
    torch.testing.assert_close(got.double(), slow_frequency_variance(masses, top_k=top_k), atol=1e-6, rtol=0)
    torch.testing.assert_close((1 - got).sum(-1), torch.full((2, 4), float(top_k)))  # top_k sinks at every step


def test_prefixes_are_never_shorter_than_the_sinks_that_are_counted(model: LanguageModel) -> None:
    got = sink_effect.window_frequency_variance(model, WINDOWS[0], top_k=15, steps=8, stream=generator(0))
    torch.testing.assert_close((1 - got).sum(-1), torch.full((2, 4), 15.0))


OPTIONS: dict[str, Any] = {"top_k": 3, "steps": 6, "draws": DRAWS, "seed": SEED}


def test_the_digests_rule_blocks_each_window_by_its_own_frequencies(model: LanguageModel) -> None:
    thresholds = (0.3, 0.7)
    effects = sink_effect.digest_effects(model, WINDOWS, thresholds=thresholds, **OPTIONS)
    labels = [(reading, threshold) for reading in ("literal", "only former sinks") for threshold in thresholds]
    assert [(effect.blocked, effect.amount) for effect in effects] == [(NOTHING, 0.0), *labels]
    variances = [
        sink_effect.window_frequency_variance(model, window, top_k=3, steps=6, stream=generator(SEED, "frequency", index))
        for index, window in enumerate(WINDOWS)
    ]
    for effect in effects:
        losses, counts = [], []
        for index, values in enumerate(variances):
            keys = values > effect.amount
            if effect.blocked == NOTHING:
                keys = torch.zeros_like(keys)
            if effect.blocked == "only former sinks":
                keys &= values != 1.0
            with attention.blocking(model, lambda layer, mass, keys=keys: keys[layer].expand(mass.shape)):
                losses.append(dense_loss(model, WINDOWS[index][None], seed=SEED + index))
            counts.append(keys.double().sum() / 8)
        torch.testing.assert_close(effect.loss, torch.cat(losses), atol=1e-5, rtol=0)
        assert effect.keys_per_head == pytest.approx(float(torch.stack(counts).mean()), rel=1e-6)
    dense, *blocked = effects
    assert (dense.keys_per_head, dense.removed_share) == (0.0, 0.0)
    assert all((effect.loss - dense.loss).abs().min() > 1e-3 for effect in blocked)
    # read literally, the rule takes the never-sinks as well, most of the 20 keys, and at any threshold
    never = float(torch.stack([(values == 1.0).double().sum(-1).mean() for values in variances]).mean())
    assert never > 5
    for literal, former in zip(blocked[:2], blocked[2:], strict=True):
        assert literal.keys_per_head - former.keys_per_head == pytest.approx(never, rel=1e-5)
        assert 0 < former.removed_share < literal.removed_share < 1


def test_the_removed_share_of_fixed_keys_is_that_of_the_masses(model: LanguageModel) -> None:
    """The lowest threshold blocks all keys but those that are sinks at every step; checked on the first layer's masses."""
    seen: list[tuple[int, Tensor]] = []
    effect = sink_effect.digest_effects(model, WINDOWS[:1], thresholds=(0.0,), **OPTIONS)[1]
    values = sink_effect.window_frequency_variance(model, WINDOWS[0], top_k=3, steps=6, stream=generator(SEED, "frequency", 0))

    def block(layer: int, mass: Tensor) -> Tensor:
        seen.append((layer, mass))
        return (values[layer] > 0).expand(mass.shape)

    with attention.blocking(model, block):
        dense_loss(model, WINDOWS[:1])
    shares = [float(mass[:, values[layer] > 0].sum()) / (len(mass) * 4 * 20) for layer, mass in seen]
    assert len(shares) == 2
    assert effect.removed_share == pytest.approx(sum(shares) / 2, abs=1e-5)


@pytest.mark.parametrize("threshold", [1.0, -0.1, float("nan")])
def test_thresholds_that_say_nothing_are_refused(model: LanguageModel, threshold: float) -> None:
    with pytest.raises(InputError, match=r"thresholds must be in \[0, 1\), got \[0.5, "):
        sink_effect.digest_effects(model, WINDOWS, thresholds=(0.5, threshold), **OPTIONS)


# --- sums ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(model: LanguageModel) -> list[dict[str, str]]:
    """Questions of two lengths; the dense model's own answer is the right one of the first and of the third."""
    rows = [{"question": question, "answer": "w1 w9"} for question in ("w1 w2 w3", "w4", "w5 w6 w7", "w8")]
    answers = sums.answer_sums(model, rows)
    return [row | {"answer": answers[index]} if index in (0, 2) else row for index, row in enumerate(rows)]


def test_sums_are_answered_and_scored_under_every_condition(model: LanguageModel, answered: list[dict[str, str]]) -> None:
    effects = sink_effect.sum_effects(model, answered, counts=(1, 2), draws=DRAWS, seed=SEED)
    kinds = ["sinks", "random keys", "large non-sinks"]
    assert [(effect.blocked, effect.amount) for effect in effects] == [
        (NOTHING, 0),
        *((kind, k) for k in (1, 2) for kind in kinds),
    ]
    dense = effects[0]
    assert dense.correct == (True, False, True, False)
    assert torch.equal(dense.loss, sums.answer_loss(model, answered, draws=DRAWS, seed=SEED))
    assert (dense.keys_per_head, dense.removed_share) == (0.0, 0.0)
    assert any(effect.correct != dense.correct for effect in effects[1:])
    for effect in effects[1:]:
        k = int(effect.amount)
        rule = blocking.rules(k)[effect.blocked]
        with attention.blocking(model, KeyBlocker(rule, generator(SEED, "blocked scores", effect.blocked, k))):
            assert torch.equal(effect.loss, sums.answer_loss(model, answered, draws=DRAWS, seed=SEED))
        assert (effect.loss - dense.loss).abs().max() > 1e-3
        # one group at a time, each with a first step of its own
        blocker = KeyBlocker(rule, generator(SEED, "blocked answers", effect.blocked, k), step_before=True)
        answers: list[str] = [""] * 4
        for group in ((1, 3), (0, 2)):
            blocker.reset()
            with attention.blocking(model, blocker):
                found = sums.answer_sums(model, [answered[index] for index in group], use_cache=False)
            for index, answer in zip(group, found, strict=True):
                answers[index] = answer
        assert effect.correct == tuple(answer == row["answer"] for answer, row in zip(answers, answered, strict=True))
        assert effect.keys_per_head == pytest.approx(blocker.keys_per_head)
        assert effect.removed_share == pytest.approx(blocker.removed_share)


# --- tables --------------------------------------------------------------------------------------------------------------


def made(model: str, blocked: str, amount: float, loss: list[float], correct: tuple[bool, ...] = ()) -> Effect:
    return Effect(model, blocked, amount, torch.tensor(loss, dtype=torch.float64), correct, 2.0 * amount, 0.1 * amount)


EFFECTS = [
    made("dlm", NOTHING, 0, [1.0, 2.0, 4.0, 1.5], (True, True, True, False)),
    made("dlm", "sinks", 1, [2.0, 2.5, 5.0, 1.0], (True, False, False, False)),
    made("ar", NOTHING, 0, [3.0, 3.0, 3.0, 3.0], (False,) * 4),
    made("ar", "sinks", 1, [3.0, 4.0, 3.0, 7.0], (True,) * 4),
]


def test_the_effects_table_pairs_texts_within_a_model() -> None:
    table: Any = tables.effects_table(EFFECTS, seed=0, amount_name="threshold")
    assert table["increase"].tolist() == [0.0, 0.5, 0.0, 1.25]  # (1 + 0.5 + 1 - 0.5) / 4 and (0 + 1 + 0 + 4) / 4
    assert table["loss"].tolist() == [2.125, 2.625, 3.0, 4.25]
    assert table["threshold"].tolist() == [0, 1, 0, 1] and table["n"].tolist() == [4] * 4
    assert table["keys per head"].tolist() == [0.0, 2.0, 0.0, 2.0]
    assert table["attention removed, %"].tolist() == pytest.approx([0.0, 10.0, 0.0, 10.0])
    weights = {"dlm": torch.tensor([0.1, 0.2, 0.3, 0.0]), "ar": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    beside: Any = tables.effects_table(EFFECTS, seed=0, amount_name="threshold", weights=weights)
    assert beside.pop("loss per character").tolist() == pytest.approx([1.7, 2.2, 3.0, 3.0])
    assert beside.equals(table)
    ends = table[["low", "increase", "high"]].to_numpy()
    assert (ends[:, 0] <= ends[:, 1]).all() and (ends[:, 1] <= ends[:, 2]).all()
    assert ends[1, 0] >= -0.5 and ends[1, 2] <= 1.0 and ends[1, 0] < ends[1, 2]


def test_the_answers_table_has_shares_with_wilson_intervals() -> None:
    table: Any = tables.answers_table(EFFECTS, seed=0)
    assert table["exact, %"].tolist() == [75.0, 25.0, 0.0, 100.0]
    for _, row in table.iterrows():
        low, high = sums.share_interval(round(cast(float, row["exact, %"]) / 25), 4)
        assert (row["exact, low"], row["exact, high"]) == pytest.approx((100 * low, 100 * high))
    assert table["answer loss increase, nats"].tolist() == [0.0, 0.5, 0.0, 1.25]
    assert "loss" not in table.columns
    assert (table["increase, low"] <= table["increase, high"]).all()

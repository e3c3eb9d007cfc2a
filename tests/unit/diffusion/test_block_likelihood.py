"""Bounds of models whose attention goes by blocks: known answers, and each block alone behind its clean prefix."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.core.errors import InputError
from lib.diffusion import likelihood
from lib.diffusion.block_reader import block_logits
from lib.evaluation.pseudo_perplexity import pseudo_perplexity
from lib.evaluation.scoring import EvaluationSettings, Passage, score
from lib.models import language_model, visibility
from lib.models.language_model import LanguageModel
from tests import tiny

LENGTH, BLOCK, VOCAB, MASK = 4, 2, 2, 2
KINDS = {"block-causal": ("block-causal", "start", 0), "shifted": ("block-causal", "start", 1),
         "from the prompt": ("block-causal", "prompt", 0), "causal context": ("context-causal", "prompt", 0)}  # fmt: skip


def joint() -> Tensor:
    """Return a distribution over texts of four tokens in which every token matters for every other."""
    weights = torch.rand((VOCAB,) * LENGTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    return weights / weights.sum()


def oracle(shift: int = 0) -> LanguageModel:
    """Make a network that predicts exactly, from the tokens that its mask lets a query see and from nothing else."""
    p = joint()

    def body(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None, **_: Any) -> SimpleNamespace:
        positions = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        states = torch.zeros((*input_ids.shape, VOCAB + 1), dtype=torch.float64)
        allowed = attention_mask.expand(len(input_ids), -1, -1, -1)
        for row, ids in enumerate(input_ids.tolist()):
            for query, place in enumerate(positions[0].tolist()):
                target = place + shift
                seen = [slice(None)] * LENGTH
                for key, at in enumerate(positions[0].tolist()):
                    if allowed[row, 0, query, key] and ids[key] != MASK:
                        seen[at] = slice(ids[key], ids[key] + 1)
                if target < LENGTH:
                    seen[target] = slice(None)
                    rest = [axis for axis in range(LENGTH) if axis != target]
                    states[row, query, :VOCAB] = p[tuple(seen)].sum(rest).log()
                states[row, query, MASK] = -1e9
        return SimpleNamespace(last_hidden_state=states)

    made = tiny.stub(lambda ids: ids, vocab=VOCAB, mask_token_id=MASK)
    cast_network: Any = made.network
    cast_network.get_decoder = lambda: body
    values = {"attention": "block-causal", "block_length": BLOCK, "block_origin": "start", "logit_shift": shift}
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def every_mask(maskable: Tensor, draws: int, **_: Any) -> Tensor:
    """Stand in for random masks of one block of two: each number of masks equally often, each choice of places too."""
    assert draws == 4 and int(maskable.sum()) == 2
    masks = torch.zeros((4, len(maskable)), dtype=torch.bool)
    masks[:, maskable] = torch.tensor([[True, False], [False, True], [True, True], [True, True]])
    return masks


TEXTS = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)
TAIL = torch.arange(LENGTH) >= BLOCK  # the second block, given the first


def tail_bounds(model: LanguageModel) -> Tensor:
    """Return the bound of the second block given the first, text by text."""
    found = [likelihood.masked_log_likelihood(model, text, TAIL, draws=4, generator=torch.Generator()).mean() for text in TEXTS]
    return torch.stack(found).double()


def test_exact_predictions_reach_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enumerated over all texts and masks: the bound of each text is then its negative log-likelihood."""
    model, p = oracle(), joint()
    exact = -p[tuple(TEXTS.T)].log()
    monkeypatch.setattr(likelihood, "exact_count_masks", every_mask)
    found = likelihood.nelbo(model, TEXTS, draws=4, seed=0).per_window.double() * LENGTH
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)
    assert float((p.flatten() * found).sum()) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    given = p.sum((2, 3))[TEXTS[:, 0], TEXTS[:, 1]].log()
    torch.testing.assert_close(tail_bounds(model), -exact - given, atol=1e-5, rtol=1e-5)


def test_one_copy_is_the_wrong_estimator() -> None:
    """Its earlier blocks are masked too, so that even exact predictions stay above the entropy."""
    model, p = oracle(), joint()
    masks = every_mask(~TAIL, 4) | every_mask(TAIL, 4)[[1, 2, 3, 0]]
    wrong = torch.zeros(len(TEXTS), dtype=torch.float64)
    for index, text in enumerate(TEXTS):
        logits = language_model.logits_at(model, text.masked_fill(masks, MASK), masks)
        losses = torch.zeros(masks.shape)
        losses[masks] = F.cross_entropy(logits, text.expand(4, -1)[masks], reduction="none")
        for part in (~TAIL, TAIL):
            wrong[index] += (losses[:, part].sum(1) * BLOCK / masks[:, part].sum(1)).mean()
    assert float((p.flatten() * wrong).sum()) > float(-(p * p.log()).sum()) + 0.01


def test_a_shifted_model_predicts_the_first_token_of_a_block_from_the_finished_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last place of the finished block does not see the open one: by hand, with p(x2 | x0 x1) at every mask of x2."""
    p = joint()
    first, third = p.sum((2, 3)), p.sum(3)
    a, b, c, d = TEXTS.T
    x2 = -(third[a, b, c] / first[a, b]).log()
    x3_seen = -(p[a, b, c, d] / third[a, b, c]).log()
    x3_hidden = -(p.sum(2)[a, b, d] / first[a, b]).log()
    monkeypatch.setattr(likelihood, "exact_count_masks", every_mask)
    expected = (2 * x2 + 2 * x3_seen + 2 * (x2 + x3_hidden)) / 4
    torch.testing.assert_close(tail_bounds(oracle(shift=1)), -expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("blocks") / "model", causal=False)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, plain: LanguageModel) -> LanguageModel:
    attention, origin, shift = KINDS[request.param]
    return replace(plain, attention=attention, block_origin=origin, logit_shift=shift, block_length=4)


def alone(model: LanguageModel, ids: Tensor, mask: Tensor, *, start: int, stop: int, prompt: int) -> Tensor:
    """Return the losses of one block behind the clean text, by the plain network: nothing of later blocks is there."""
    read = ids.masked_fill(mask, tiny.MASK)[:stop].clone()
    read[:start] = ids[:start]
    allowed = torch.ones((stop, stop), dtype=torch.bool).tril()
    if model.attention == "context-causal":
        allowed[start:, start:] = True
    else:
        border = 0 if model.block_origin == "start" else prompt
        number = (torch.arange(stop) - border).div(4, rounding_mode="floor").clamp(min=-1)
        allowed = number[:, None] >= number[None, :]
    with torch.inference_mode():
        logits = model.network(input_ids=read[None], attention_mask=allowed[None, None]).logits[0]
    if model.logit_shift:
        logits = torch.cat([logits[:1], logits[:-1]])
    losses = torch.zeros(len(ids))
    where = mask.clone()
    where[:start], where[stop:] = False, False
    losses[where] = F.cross_entropy(logits[where[:stop]], ids[where], reduction="none")
    return losses


def borders(model: LanguageModel, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the blocks that hold positions from `start` on."""
    first = start if model.block_origin == "prompt" else start - start % 4
    return [(begin, min(begin + 4, stop)) for begin in range(first, stop, 4)]


@pytest.mark.parametrize("start", [0, 6])
def test_all_blocks_in_one_pass_are_each_block_alone(model: LanguageModel, start: int) -> None:
    """(c) of the known answers, and (d): blocks are counted from position 0 or from the prompt's end."""
    ids = tiny.ids(2, 15, seed=4)
    masks = torch.rand((2, 15), generator=torch.Generator().manual_seed(2)) < 0.6
    masks[:, :start] = False
    got = torch.cat(list(likelihood.masked_losses(model, ids, masks, batch_size=1, origin=start)))
    slow = torch.zeros(2, 15)
    for row in range(2):
        for begin, end in borders(model, start, 15):
            slow[row] += alone(model, ids[row], masks[row], start=begin, stop=end, prompt=start)
    torch.testing.assert_close(got, slow, atol=2e-5, rtol=1e-5)
    assert (got[masks] > 0).all()
    single = replace(model, attention="full")
    wrong = torch.cat(list(likelihood.masked_losses(single, ids, masks, batch_size=2)))
    assert (wrong - slow).abs().max() > 0.1


def test_the_bound_of_an_answer_adds_its_blocks_up(model: LanguageModel) -> None:
    ids, start = tiny.ids(15, seed=5), 6
    maskable = torch.arange(15) >= start
    split = likelihood.parts(model, maskable)
    sizes = [int(part.sum()) for part in split]
    assert sizes == ([2, 4, 3] if model.block_origin == "start" else [4, 4, 1])
    stream = torch.Generator().manual_seed(9)
    masks = torch.stack([likelihood.exact_count_masks(part, 6, generator=stream) for part in split], 1)
    expected = torch.zeros(6)
    for draw in range(6):
        for part, mask, (begin, end) in zip(split, masks[draw], borders(model, start, 15), strict=True):
            expected[draw] -= (
                alone(model, ids, mask, start=begin, stop=end, prompt=start).sum() * int(part.sum()) / int(mask.sum())
            )
    stream = torch.Generator().manual_seed(9)
    got = likelihood.masked_log_likelihood(model, ids, maskable, draws=6, generator=stream, batch_size=4)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_the_harness_scores_the_same_bound(model: LanguageModel) -> None:
    ids, start = tiny.ids(14, seed=6), 9
    passage = Passage(tuple(ids.tolist()), start, ("a",))
    got = score(model, [passage], settings=EvaluationSettings(draws=400, seed=1, batch_size=64))[0][0]
    stream = torch.Generator().manual_seed(2)
    draws = likelihood.masked_log_likelihood(model, ids, torch.arange(14) >= start, draws=4000, generator=stream, batch_size=256)
    assert got == pytest.approx(float(draws.mean()), abs=5 * float(draws.std()) * (1 / 400 + 1 / 4000) ** 0.5)


def test_a_continuation_of_one_token_is_exact(model: LanguageModel) -> None:
    ids = tiny.ids(9, seed=7)
    got = score(model, [Passage(tuple(ids.tolist()), 8, ("a",))], settings=EvaluationSettings(draws=3))[0][0]
    mask = torch.arange(9) == 8
    assert got == pytest.approx(-float(alone(model, ids, mask, start=8, stop=9, prompt=8).sum()), abs=1e-4)


def test_the_pseudo_perplexity_of_an_answer_is_its_bound_given_the_context(model: LanguageModel) -> None:
    ids, answer = tiny.ids(14, seed=8), 5
    stream = torch.Generator().manual_seed(4)
    draws = likelihood.masked_log_likelihood(model, ids, torch.arange(14) >= 9, draws=3000, generator=stream, batch_size=250)
    got = pseudo_perplexity(model, ids[None], answer_tokens=answer, draws=3000, seed=5, batch_size=250)
    assert float(got.per_window) == pytest.approx(-float(draws.mean()) / answer, abs=6 * float(draws.std()) / 3000**0.5 / answer)


def test_the_batch_changes_nothing(model: LanguageModel) -> None:
    windows = tiny.ids(3, 12, seed=1)
    one = likelihood.nelbo(model, windows, draws=3, seed=2, batch_size=1)
    many = likelihood.nelbo(model, windows, draws=3, seed=2, batch_size=8)
    torch.testing.assert_close(one.per_window, many.per_window, atol=1e-5, rtol=1e-5)


def test_an_open_block_is_the_only_one_with_masks(plain: LanguageModel) -> None:
    model = replace(plain, attention="context-causal", block_length=4)
    ids = tiny.ids(1, 12)
    ids[0, [5, 9]] = tiny.MASK
    with pytest.raises(InputError, match="masks in one block at a time, got several"):
        language_model.logits_at(model, ids, ids == tiny.MASK)
    ids[0, 5] = 3
    logits = language_model.logits_at(model, ids, ids == tiny.MASK)
    mask = visibility.open_block(torch.arange(12)[None] >= 8)
    expected = model.network(input_ids=ids, attention_mask=mask).logits[ids == tiny.MASK]
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


def test_block_logits_of_a_clean_prefix_are_those_of_the_two_copies(plain: LanguageModel) -> None:
    """(a) of the known answers: changing a block leaves earlier predictions exactly as they are."""
    model = replace(plain, attention="block-causal", block_length=4, block_origin="start")
    ids = tiny.ids(1, 16, seed=3)
    where = torch.ones_like(ids, dtype=torch.bool)
    noisy = ids.masked_fill(torch.arange(16) % 2 == 0, tiny.MASK)
    before = block_logits(model, ids, noisy, where)
    changed, changed_noisy = ids.clone(), noisy.clone()
    changed[0, 8:12] = (changed[0, 8:12] + 7) % tiny.MASK
    after = block_logits(model, changed, noisy, where)
    assert torch.equal(before[:12], after[:12]) and not torch.allclose(before[12:], after[12:])
    changed_noisy[0, 8] = 5
    after = block_logits(model, ids, changed_noisy, where)
    assert torch.equal(before[:8], after[:8]) and torch.equal(before[12:], after[12:])
    assert not torch.allclose(before[8:12], after[8:12])

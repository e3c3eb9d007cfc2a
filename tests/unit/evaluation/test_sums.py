"""Answers to questions, and the likelihood of the right one: against slow loops over single tokens and single masks."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib.attention import masses
from lib.core.config import ROOT
from lib.core.runtime import generator
from lib.diffusion import likelihood, sampler
from lib.evaluation import sums
from lib.models import loading
from lib.models.language_model import LanguageModel
from lib.texts import articles
from tests import tiny

QUESTIONS = ["w1 w2 w3", "w4", "w5 w6 w7", "w8 w9", "w0", "w2 w2 w9"]  # three lengths, mixed
ROWS = [{"question": question, "answer": ""} for question in QUESTIONS]


def logits(model: LanguageModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def encode(question: str) -> list[int]:
    """BOS = 1 and a word's id, 3 + its number."""
    return [1, *(3 + int(word[1:]) for word in question.split())]


def slow_answer(model: LanguageModel, question: str) -> list[int]:
    """Six new tokens of one question alone: the best next one, or the surest of the masks that are left."""
    ids = encode(question)
    if model.is_causal:
        for _ in range(6):
            ids.append(int(logits(model, ids)[-1].argmax()))
        return ids[-6:]
    ids += [tiny.MASK] * 6
    for _ in range(6):
        probs = logits(model, ids).softmax(-1)
        masks = [place for place, token in enumerate(ids) if token == tiny.MASK]
        place = max(masks, key=lambda place, probs=probs: float(probs[place].max()))
        ids[place] = int(probs[place].argmax())
    return ids[-6:]


@pytest.mark.parametrize("kind", ["causal", "dlm"])
def test_answers_are_those_of_single_questions_in_their_order(kind: str, request: pytest.FixtureRequest) -> None:
    model: LanguageModel = request.getfixturevalue(kind)
    expected = [slow_answer(model, question) for question in QUESTIONS]
    # first the usual end of the document, then a token that occurs: all that follows it is cut, and nothing else
    for end in (2, expected[0][3]):
        words = tiny.tokenizer()
        words.eos_token = words.convert_ids_to_tokens(end)
        got = sums.answer_sums(dataclasses.replace(model, tokenizer=words), ROWS)
        kept = [ids[: ids.index(end)] if end in ids else ids for ids in expected]
        assert got == [cast(Any, words.decode(ids)).strip() for ids in kept]
        assert len(set(got)) > 4
    assert len(kept[0]) < 6


def test_answers_do_not_depend_on_the_cache(causal: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    forward = causal.network.forward

    def counting(*args: Any, **options: Any) -> Any:
        widths.append(options["input_ids"].shape[1])
        return forward(*args, **options)

    monkeypatch.setattr(causal.network, "forward", counting)
    with_cache = sums.answer_sums(causal, ROWS[:1])
    assert widths == [4, 1, 1, 1, 1, 1]
    widths.clear()
    assert sums.answer_sums(causal, ROWS[:1], use_cache=False) == with_cache
    assert widths == [4, 5, 6, 7, 8, 9]
    monkeypatch.undo()
    assert sums.answer_sums(causal, ROWS, use_cache=False) == sums.answer_sums(causal, ROWS)


def test_shipped_answers_do_not_depend_on_the_cache() -> None:
    model = loading.load(ROOT / "models" / "reference" / "ar")
    kind = sums.QUESTIONS["tiny_add"]
    rows = articles.read_rows(kind.file)[:3]
    answers = sums.answer_sums(model, rows, kind=kind, use_cache=False)
    assert answers == sums.answer_sums(model, rows, kind=kind) == [row["answer"] for row in rows]
    both = (rows, [row | {"answer": "0099"} for row in rows])
    right, wrong = (sums.answer_loss(model, asked, draws=1, seed=0, kind=kind) for asked in both)
    assert (right < 0.7).all()  # the greedy answer has more than half of the probability at every token
    assert (wrong > 1).all()


@pytest.mark.parametrize(("kind", "name"), [("causal", "continue_text"), ("dlm", "sample")])
def test_the_callback_comes_before_each_group_of_equal_length(
    kind: str, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    generate: Callable = getattr(sampler, name)

    def watched(model: LanguageModel, batch: Tensor, **options: Any) -> Tensor:
        events.append(tuple(batch.shape))
        return generate(model, batch, **options)

    monkeypatch.setattr(sampler, name, watched)
    sums.answer_sums(request.getfixturevalue(kind), ROWS, on_batch=lambda: events.append("batch"))
    assert events == ["batch", (2, 2), "batch", (1, 3), "batch", (3, 4)]


def test_only_exact_answers_are_correct() -> None:
    rows = [{"question": "", "answer": answer} for answer in ("-37", "57", "3", "")]
    assert sums.is_correct(["-37", "5", "03", ""], rows) == [True, False, False, True]
    with pytest.raises(ValueError, match="longer than"):
        sums.is_correct(["-37"], rows)


ANSWERED = [
    {"question": "w1 w2", "answer": "w3 w4"},
    {"question": "w5", "answer": "w6"},
    {"question": "w7 w0 w1", "answer": "w2 w9"},
]


def whole(row: dict[str, str]) -> tuple[list[int], int]:
    """Question, answer and the end of the document (2), and where the answer begins."""
    question = encode(row["question"])
    return [*question, *encode(row["answer"])[1:], 2], len(question)


def test_causal_loss_is_the_chain_rule_one_token_at_a_time(causal: LanguageModel) -> None:
    got = sums.answer_loss(causal, ANSWERED, draws=3, seed=0)
    expected = []
    for row in ANSWERED:
        ids, start = whole(row)
        steps = [float(logits(causal, ids[:place])[-1].log_softmax(-1)[ids[place]]) for place in range(start, len(ids))]
        expected.append(-sum(steps))
    assert got.tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(got, sums.answer_loss(causal, ANSWERED, draws=1, seed=5))  # exact: no masks


def test_diffusion_loss_approaches_the_enumeration_of_all_masks(dlm: LanguageModel) -> None:
    """Mean over k = 1..n of the mean over all sets of k answer tokens of n / k times their summed cross-entropy."""
    draws = 900
    got = sums.answer_loss(dlm, ANSWERED, draws=draws, seed=0)
    for index, row in enumerate(ANSWERED):
        ids, start = whole(row)
        answer = range(start, len(ids))
        bound, unweighted, spread = 0.0, 0.0, 0.0
        for k in range(1, len(answer) + 1):
            losses = []
            for hidden in itertools.combinations(answer, k):
                probs = logits(dlm, [tiny.MASK if place in hidden else token for place, token in enumerate(ids)]).log_softmax(-1)
                losses.append(-sum(float(probs[place, ids[place]]) for place in hidden))
            values = torch.tensor(losses, dtype=torch.float64)
            bound += float(values.mean()) / k  # (1 / n) (n / k)
            unweighted += float(values.mean()) / len(answer)
            spread += float(values.var(correction=0)) / k**2 * len(answer)
        error = (spread / draws) ** 0.5  # counts are stratified, so only the choice of the set is random
        assert abs(float(got[index]) - bound) < 4 * error + 1e-4
        assert abs(unweighted - bound) > 8 * error  # what leaving out n / k would give


def test_the_masks_depend_on_seed_and_index_alone(dlm: LanguageModel, causal: LanguageModel) -> None:
    got = sums.answer_loss(dlm, ANSWERED, draws=3, seed=4)
    for index, row in enumerate(ANSWERED):
        ids, start = whole(row)
        scored = torch.arange(len(ids)) >= start
        stream = generator(4, "answers", index)
        estimate = likelihood.masked_log_likelihood(dlm, torch.tensor(ids), scored, draws=3, generator=stream)
        torch.testing.assert_close(got[index], -estimate.mean())
    others = [{"question": "w9", "answer": "w8 w8 w8"}, *ANSWERED[1:]]
    assert torch.equal(sums.answer_loss(dlm, others, draws=3, seed=4)[1:], got[1:])
    assert not torch.equal(sums.answer_loss(dlm, ANSWERED, draws=3, seed=5), got)


def test_all_conditions_see_the_same_masks(dlm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    read = likelihood.logits_at

    def watched(model: LanguageModel, ids: Tensor, where: Tensor) -> Tensor:
        seen.append(ids.clone())
        return read(model, ids, where)

    monkeypatch.setattr(likelihood, "logits_at", watched)
    dense = sums.answer_loss(dlm, ANSWERED, draws=4, seed=1)
    with masses.blocking(dlm, lambda layer, mass: mass > 1):
        blocked = sums.answer_loss(dlm, ANSWERED, draws=4, seed=1)
    assert len(seen) == 6
    assert all(torch.equal(one, other) for one, other in zip(seen[:3], seen[3:], strict=True))
    for row, ids in zip(ANSWERED, seen, strict=False):
        assert not (ids[:, : whole(row)[1]] == tiny.MASK).any()  # the question stays
    assert (dense - blocked).abs().min() > 1e-3


@pytest.mark.parametrize(("correct", "total"), [(0, 40), (1, 40), (33, 40), (40, 40), (10, 200)])
def test_the_share_interval_is_wilsons(correct: int, total: int) -> None:
    z, share = 1.959963984540054, correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    assert sums.share_interval(correct, total) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_the_interval_of_a_paired_difference_covers_and_has_a_width_without_discordant_documents() -> None:
    """How often it covers is summed over all counts that 20 documents can have, at several true shares."""
    for only_first, only_second in ((0.05, 0.05), (0.2, 0.05), (0.3, 0.3)):
        covered = 0.0
        for first, second in itertools.product(range(21), repeat=2):
            if first + second > 20:
                continue
            chance = math.comb(20, first) * math.comb(20 - first, second) * only_first**first * only_second**second
            low, high = sums.matched_interval(first, second, documents=20)
            assert -1 <= low <= (first - second) / 20 <= high <= 1
            covered += (
                (low <= only_first - only_second <= high) * chance * (1 - only_first - only_second) ** (20 - first - second)
            )
        assert covered > 0.93
    low, high = sums.matched_interval(0, 0, documents=16)
    assert low == -high and low < -0.05, "16 documents prove no loss of 5 points"

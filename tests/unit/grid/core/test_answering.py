"""How the core answers, on tiny checkpoints in the official layout: scores, common masks, samples, kept keys and values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from lib.core.config import ModelSource
from lib.decoding.decoder import decode
from lib.decoding.plan import DecodingPlan
from lib.decoding.recompute import Blockwise
from lib.evaluation import standins
from lib.evaluation.harness import HarnessModel
from lib.evaluation.scoring import EvaluationSettings, Row, log_likelihoods
from lib.grid.core import answering, racing
from lib.grid.core.answering import RacedHarness
from lib.grid.core.racing import Race
from lib.models import loading
from lib.models.language_model import LanguageModel
from recipes import rehearsal

NEVER, ALWAYS = Race(2, 1e9, 10**9), Race(2, 1e9, 1)
QUESTIONS = (
    ("One and one", (" make two", " make up three", " is no sum of these")),
    ("Rain", (" falls from the sky", " reads books")),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rehearsal.write(tmp_path_factory.mktemp("answering") / "rehearsal")


@pytest.fixture(scope="module")
def models(files: Path) -> list[LanguageModel]:
    """Two models with one tokenizer, as a dense model and a pruned one have."""
    found = [loading.load(ModelSource(str(files / "models" / "llada"))) for _ in range(2)]
    with torch.no_grad():
        for layer in found[1].layers:
            layer.module.weight *= 1.5
    return found


def requests() -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (context, choice), idx, metadata=("t", document, 1))
        for document, (context, choices) in enumerate(QUESTIONS)
        for idx, choice in enumerate(choices)
    ]


def raced(model: LanguageModel, rule: Race | None, **settings: Any) -> RacedHarness:
    given = EvaluationSettings(**{"draws": 12, "batch_size": 4, **settings})
    return RacedHarness(model, settings=given, rule=rule, cache="none")


def test_scores_are_means_over_masks_of_what_is_masked(models: list[LanguageModel]) -> None:
    adapter = raced(models[0], NEVER, cfg_scale=0.5)
    scores = [value for value, _ in adapter.loglikelihood(requests())]
    for request, score in zip(requests(), scores, strict=True):
        passage, values = adapter._read(request), []
        for look, count in enumerate(NEVER.batches(12)):
            for mask in answering._masks(passage, look, count, seed=0):
                row = Row(0, torch.tensor(passage.ids), mask, passage.start, 1.0)
                value = float(log_likelihoods(models[0], [row], cfg_scale=0.5)[0][0])
                values.append(value * (len(passage.ids) - passage.start) / int(mask.sum()))
        assert len(values) == 12 and score == pytest.approx(sum(values) / 12, abs=1e-4)
    assert adapter.found is not None and adapter.found.draws == adapter.found.all_draws == 5 * 12
    assert adapter.rows < 60  # masks that come twice pass once


def test_neither_the_batch_nor_the_other_documents_change_a_score(models: list[LanguageModel]) -> None:
    rule = Race(2, 1.0, 3)
    one, many = (raced(models[0], rule, batch_size=size).loglikelihood(requests()) for size in (1, 64))
    assert [value for value, _ in one] == pytest.approx([value for value, _ in many], abs=1e-4)
    alone = raced(models[0], rule).loglikelihood(requests()[3:])
    assert [value for value, _ in one[3:]] == pytest.approx([value for value, _ in alone], abs=1e-4)


def test_without_a_rule_the_scores_are_the_harness_own(models: list[LanguageModel]) -> None:
    settings = EvaluationSettings(draws=3, batch_size=4)
    plain = HarnessModel(models[0], settings=settings).loglikelihood(requests())
    adapter = raced(models[0], None, draws=3)
    assert adapter.loglikelihood(requests()) == plain and adapter.found is None


def watch(monkeypatch: pytest.MonkeyPatch) -> set[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Note what is masked in which text."""
    seen: set[tuple[tuple[int, ...], tuple[bool, ...]]] = set()
    real: Callable[..., Any] = log_likelihoods

    def noted(model: LanguageModel, rows: list[Row], **given: Any) -> Any:
        seen.update((tuple(row.ids.tolist()), tuple(row.where.tolist())) for row in rows)
        return real(model, rows, **given)

    monkeypatch.setattr(answering, "log_likelihoods", noted)
    return seen


def test_a_document_a_draw_and_a_choice_have_the_same_mask_in_every_variant(
    models: list[LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for model in models:
        with monkeypatch.context() as patch:
            seen = watch(patch)
            scores = raced(model, NEVER).loglikelihood(requests())
            found.append((seen, scores))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]
    with monkeypatch.context() as patch:
        seen = watch(patch)
        raced(models[1], Race(2, 0.2, 10**9)).loglikelihood(requests())
    assert seen < found[0][0], "a race makes some of these draws and no others"
    with monkeypatch.context() as patch:
        seen = watch(patch)
        raced(models[0], NEVER, seed=1).loglikelihood(requests())
    assert seen != found[0][0]


def test_the_same_documents_are_audited_in_every_variant(models: list[LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    lots, real = [], racing.race

    def noted(*given: Any, audited: list[bool], **options: Any) -> Any:
        lots.append(audited)
        return real(*given, audited=audited, **options)

    monkeypatch.setattr(racing, "race", noted)
    for model in models:
        raced(model, Race(2, 3.0, 2)).loglikelihood(requests())
    assert lots[0] == lots[1] and len(lots[0]) == 2


def test_after_all_draws_lm_eval_marks_audited_documents_again(models: list[LanguageModel], files: Path) -> None:
    task = standins.load("piqa", files / "rows", family="llada")
    given: dict[str, Any] = {"settings": EvaluationSettings(draws=16, batch_size=16), "cache": "none", "documents": 6}
    every = answering.answer(models[0], task, rule=Race(2, 0.3, 1), **given)
    none = answering.answer(models[0], task, rule=Race(2, 0.3, 10**9), **given)
    whole = answering.answer(models[0], task, rule=ALWAYS, **given)
    assert every.shown.scores == none.shown.scores == none.final.scores  # audits change nothing of what the race shows
    assert every.final.scores == whole.shown.scores == whole.final.scores
    assert every.race is not None and none.race is not None and every.race.audited == every.race.stopped == none.race.stopped > 0
    assert none.race.draws < every.race.draws == every.race.all_draws and none.rows < every.rows
    assert every.shown.truncated == none.shown.truncated


def test_a_sample_of_documents_is_the_same_for_all(files: Path) -> None:
    task = standins.load("piqa", files / "rows", family="llada")
    chosen = answering.sample(task, 5, seed=0)
    assert chosen is not None and list(chosen) == ["piqa"]
    numbers = chosen["piqa"]
    assert len(set(numbers)) == 5 and numbers == sorted(numbers) != list(range(5))
    assert answering.sample(task, 5, seed=0) == chosen != answering.sample(task, 5, seed=1)
    assert answering.sample(task, None, seed=0) is None
    subjects = answering.sample(standins.load("mmlu", files / "rows", family="llada"), 2, seed=0)
    assert subjects is not None and {len(numbers) for numbers in subjects.values()} == {2}


def test_the_sampled_documents_are_those_that_are_asked(models: list[LanguageModel], files: Path) -> None:
    task = standins.load("piqa", files / "rows", family="llada")
    given: dict[str, Any] = {"settings": EvaluationSettings(draws=2, batch_size=16), "cache": "none", "rule": NEVER}
    whole = answering.answer(models[0], task, documents=None, **given)
    part = answering.answer(models[0], task, documents=7, **given)
    chosen = answering.sample(task, 7, seed=0)
    assert chosen is not None
    assert part.shown.correct == tuple(whole.shown.correct[number] for number in chosen["piqa"])
    assert part.asked == whole.asked == len(whole.shown.correct)


@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_generation_keeps_what_its_cache_says(models: list[LanguageModel], cache: Any) -> None:
    settings = EvaluationSettings(gen_length=8, steps=8, block_length=4)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    adapter = RacedHarness(models[0], settings=settings, rule=None, cache=cache)
    plan = DecodingPlan(recompute=Blockwise(kind=cache))
    expected = decode(models[0], torch.tensor(prompts), new_tokens=8, block_length=4, plan=plan).ids[:, 4:]
    assert torch.equal(adapter._generate(prompts, 8), expected)
    plain = RacedHarness(models[0], settings=settings, rule=None, cache="none")._generate(prompts, 8)
    assert torch.equal(plain, HarnessModel(models[0], settings=settings)._generate(prompts, 8))

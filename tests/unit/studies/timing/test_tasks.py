"""Answers by decoder: lm_eval asks and scores, documents are paired, intervals cover."""

import dataclasses
from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib.core.config import ROOT
from lib.core.errors import InputError
from lib.decoding import decoder
from lib.decoding.commit import Threshold
from lib.decoding.decoder import Decoded, DecodingPlan
from lib.decoding.systems import fast_plan
from lib.evaluation import tasks
from lib.evaluation.scoring import EvaluationSettings
from lib.models import loading
from lib.models.language_model import LanguageModel
from lib.studies.timing import runs as decoding_runs
from lib.studies.timing import tasks as decoding_tasks
from lib.studies.timing.runs import PLAIN, Plan
from tests import tiny

SETTINGS = EvaluationSettings(gen_length=6, steps=6, block_length=6, batch_size=4)
DUAL = fast_plan(cache="dual", threshold=0.2)
PLANS: dict[str, Plan] = {"fast": DUAL, "slow": PLAIN}


@pytest.fixture(scope="module")
def dlm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("dlm"), causal=False)


@pytest.fixture(scope="module")
def reference() -> LanguageModel:
    return loading.load(ROOT / "models" / "reference" / "dlm")


def test_answers_of_an_exact_plan_are_the_plain_samplers(reference: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they come from the plan's decoder: lm_eval sees the same texts both ways."""
    task = tasks.load_tasks(["tiny_topic_generated"])["tiny_topic_generated"]
    made: list[Tensor] = []

    def decode(*args: Any, **options: Any) -> Decoded:
        result = decoder.decode(*args, **options)
        assert (options["new_tokens"], options["block_length"]) == (6, 6)
        made.append(result.ids)
        return result

    monkeypatch.setattr(decoding_runs, "decode", decode)
    plain = decoding_tasks.answers(reference, task, PLAIN, settings=SETTINGS, limit=6)
    assert not made
    same = decoding_tasks.answers(reference, task, fast_plan(steps_per_block=6), settings=SETTINGS, limit=6)
    assert same == plain and sum(len(ids) for ids in made) == 6


def test_accuracies_pair_documents_with_the_plain_sampler(dlm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {0.1: [True] * 12 + [False] * 8, 0.2: [False] * 20}
    plain = [False] * 10 + [True] * 2 + [False] * 7 + [True]

    def answers(_: LanguageModel, __: Any, plan: Plan, **options: Any) -> tuple[bool, ...]:
        assert options == {"settings": SETTINGS, "limit": 20}
        return tuple(marks[cast(Threshold, plan.commit).threshold] if isinstance(plan, DecodingPlan) else plain)

    monkeypatch.setattr(decoding_tasks, "answers", answers)
    plans: dict[str, Plan] = {"a": fast_plan(threshold=0.1), "slow": PLAIN, "b": fast_plan(threshold=0.2)}
    task: Any = tasks.LoadedTask("t", {}, "exact_match", 0.0)
    table = decoding_tasks.accuracies(dlm, task, plans, settings=SETTINGS, limit=20).set_index("decoder")
    assert table["accuracy"].to_dict() == {"a": 0.6, "slow": 0.15, "b": 0.0}
    assert table["difference"].to_dict() == pytest.approx({"a": 0.45, "slow": 0.0, "b": -0.15})
    assert table.loc["a", ["only this", "only plain"]].tolist() == [10, 1]
    assert table["p"].to_dict() == pytest.approx({"a": 2 * 12 / 2**11, "slow": 1.0, "b": 2 / 2**3})
    for name in ("accuracy", "difference"):
        lows, middles, highs = (table[f"{name}{end}"].tolist() for end in (" low", "", " high"))
        assert all(low <= middle <= high for low, middle, high in zip(lows, middles, highs, strict=True))
    assert table["difference low"].tolist()[0] > 0 and set(table["documents"]) == {20}
    assert table.loc["slow", ["difference", "difference low", "difference high"]].tolist() == [0.0] * 3, "it is itself"
    assert set(table["task"]) == {"t"} and set(table["usable"]) == {True}


@pytest.mark.parametrize("right", [0, 1, 7, 20])
def test_equal_answers_of_two_decoders_have_a_width_and_those_of_one_have_none(right: int) -> None:
    """Twenty documents cannot tell that two decoders never differ; that a row is itself needs no document."""
    marks = [index < right for index in range(20)]
    two, one = decoding_tasks.compared(marks, list(marks)), decoding_tasks.compared(marks, None)
    assert {two["difference"], one["difference"], one["difference low"], one["difference high"]} == {0.0}
    assert two["difference low"] == -two["difference high"] < -0.05 and two["p"] == one["p"] == 1.0
    assert all(two[key] == one[key] for key in two if not key.startswith("difference ")) and two.keys() == one.keys()


@pytest.mark.parametrize(("right", "chance", "usable"), [(10, 0.2, True), (10, 0.35, False), (0, 0.0, False), (20, 1.0, False)])
def test_there_is_something_to_lose_where_the_plain_sampler_is_above_guessing(
    dlm: LanguageModel, monkeypatch: pytest.MonkeyPatch, right: int, chance: float, usable: bool
) -> None:
    """By its interval: 10 of 20 reaches down to 0.30. The fast decoder's own answers do not count."""
    marks = {True: (True,) * right + (False,) * (20 - right), False: (False,) * 20}
    monkeypatch.setattr(decoding_tasks, "answers", lambda _, __, plan, **___: marks[plan == PLAIN])
    task: Any = tasks.LoadedTask("t", {}, "exact_match", chance)
    table = decoding_tasks.accuracies(dlm, task, PLANS, settings=SETTINGS)
    assert set(table["usable"]) == {usable} and set(table["chance"]) == {chance}


def test_lm_eval_scores_what_the_decoder_writes(reference: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that always writes "People" is right where that is the topic, and nowhere else."""
    task = tasks.load_tasks(["tiny_topic_generated"])["tiny_topic_generated"]
    tokens: list[int] = reference.tokenizer(" People\n", add_special_tokens=False)["input_ids"]  # pyright: ignore
    tokens = [*tokens, *[9] * 6][:6]

    def decode(_: LanguageModel, prompts: Tensor, **__: Any) -> Decoded:
        return Decoded(torch.cat([prompts, torch.tensor([tokens] * len(prompts))], dim=1), 1, 1)

    monkeypatch.setattr(decoding_runs, "decode", decode)
    got = decoding_tasks.answers(reference, task, DUAL, settings=SETTINGS)
    (part,) = task.parts.values()
    topics = [document["topic"] for document in part.dataset["test"]]
    assert list(got) == [topic == "People" for topic in topics] and 0 < sum(got) < len(got)


def test_the_written_topic_is_read_off_the_end_of_a_text(reference: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before the topic does not count, nor what follows the end token; a text without a topic is wrong."""
    task = decoding_tasks.load("tiny_topic_written")
    (part,) = task.parts.values()
    documents = list(part.dataset["test"])
    shown = [str(part.doc_to_text(document)) for document in documents]
    assert len(documents) == 220 and all(text.startswith("Title: ") and text.endswith("\nDescription:") for text in shown)
    assert not any("Topic:" in text for text in shown) and {document["title"] for document in documents} >= {"Houston"}

    def writes(text: str) -> list[bool]:
        tokens: list[int] = reference.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore
        assert len(tokens) <= 32

        def decode(_: LanguageModel, prompts: Tensor, **options: Any) -> Decoded:
            assert (options["new_tokens"], options["block_length"]) == (32, 16)
            return Decoded(torch.cat([prompts, torch.tensor([[*tokens, *[9] * 32][:32]] * len(prompts))], dim=1), 1, 1)

        monkeypatch.setattr(decoding_runs, "decode", decode)
        settings = EvaluationSettings(gen_length=64, steps=64, block_length=16)
        return list(decoding_tasks.answers(reference, task, DUAL, settings=settings))

    people = [document["topic"] == "People" for document in documents]
    assert writes(" Geography of a place\nTopic: People<|eos|>\nTopic: Arts") == people and 0 < sum(people) < 220
    assert writes(" A writer\nTopic: People\nText: Topic: Arts") == people
    assert not any(writes(" People") + writes(" A writer\nTopic: People of Rome<|eos|>"))
    assert task.chance == max(Counter(document["topic"] for document in documents).values()) / 220


def test_guidance_is_refused(dlm: LanguageModel) -> None:
    task: Any = tasks.LoadedTask("t", {}, "exact_match", 0.0)
    settings = dataclasses.replace(SETTINGS, cfg_scale=0.5)
    with pytest.raises(InputError, match=r"without guidance, got 0\.5"):
        decoding_tasks.accuracies(dlm, task, PLANS, settings=settings)


def test_a_task_without_generation_is_refused(dlm: LanguageModel) -> None:
    task = tasks.load_tasks(["tiny_topic"])["tiny_topic"]
    with pytest.raises(InputError, match=r"one of generation, got tiny_topic \(multiple_choice\)"):
        decoding_tasks.accuracies(dlm, task, PLANS, settings=SETTINGS)
    with pytest.raises(InputError, match=r"one of generation, got tiny_topic \(multiple_choice\)"):
        decoding_tasks.load("tiny_topic")

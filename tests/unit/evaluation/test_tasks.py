"""Tasks through lm_eval: its own YAML on look-alike rows, the local tasks, and results per document, all offline."""

import dataclasses
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import pytest
import yaml
from lm_eval.api import task as lm_eval_task
from lm_eval.api.instance import Instance
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoTokenizer

from lib.core.config import ROOT
from lib.core.errors import InputError
from lib.core.wheels import UnavailableError
from lib.evaluation import standins, sums, tasks
from lib.evaluation.harness import HarnessModel
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.standins import YAMLS
from lib.evaluation.tasks import OFFICIAL, LoadedTask, evaluate, load_tasks, local_task, published_settings
from lib.models import language_model, loading
from lib.models.language_model import LanguageModel
from lib.texts import articles as data
from recipes import make_tasks, rehearsal_rows
from recipes.family import tasks as family
from tests import tiny

QUICK = EvaluationSettings(draws=2, gen_length=4, steps=2, block_length=4)


def official(name: str, *, few_shot: int | None = None) -> LoadedTask:
    """A benchmark on three look-alike rows, as `load_tasks` would return it."""
    # Seven rows to draw examples from; the three asked about are others.
    rows = {"train": range(3, 10), "dev": range(3, 10), "validation": range(3), "test": range(3)}
    if name == "gpqa_main_n_shot":
        rows = {"train": range(8)}
    if name == "race":
        rows = {"test": range(3)}
    made = {split: [rehearsal_rows.row(name, number) for number in numbers] for split, numbers in rows.items()}
    task = standins.merged(name, made, family="dream" if name == "gsm8k_cot" else "llada")
    for part in task.parts.values():
        part.set_config("num_fewshot", part.config.num_fewshot if few_shot is None else few_shot)
    return task


@pytest.fixture(scope="module")
def dlm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny untrained network that reads real text."""
    sizes = {"vocab_size": 4096, "max_position_embeddings": 1024}
    made = tiny.model(tmp_path_factory.mktemp("dlm"), causal=False, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "reference" / "dlm")
    return dataclasses.replace(made, tokenizer=tokenizer, mask_token_id=tokenizer.mask_token_id)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Collects what the adapter is asked; every answer is wrong or alike."""
    seen: list[tuple[Any, ...]] = []

    def loglikelihood(self: HarnessModel, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        seen.extend(request.args for request in requests)
        return [(0.0, False)] * len(requests)

    def generate_until(self: HarnessModel, requests: Sequence[Instance]) -> list[str]:
        seen.extend(request.args for request in requests)
        return ["nothing"] * len(requests)

    monkeypatch.setattr(HarnessModel, "loglikelihood", loglikelihood)
    monkeypatch.setattr(HarnessModel, "generate_until", generate_until)
    return seen


# The official templates


@pytest.mark.parametrize("name", list(YAMLS))
def test_every_official_template_runs_with_the_published_number_of_examples(dlm: LanguageModel, name: str) -> None:
    task = official(name)
    result = evaluate(dlm, {name: task}, settings=dataclasses.replace(QUICK, cfg_scale=0.5))[name]
    assert len(result.correct) == (8 if name == "gpqa_main_n_shot" else 3)
    assert result.correct == result.scores[OFFICIAL["dream" if name == "gsm8k_cot" else "llada"][name].metric]
    expected = {"acc"} if name in ("mmlu", "winogrande", "race") else {"acc", "acc_norm"}
    if name.startswith("gsm8k"):
        expected = {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert set(result.scores) == expected
    assert result.truncated == 0


PROMPTS = {
    "arc_challenge": ("Question: Which colour is number 0?\nAnswer:", " red 0"),
    "piqa": ("Question: Open box 0\nAnswer:", " Pull the lid."),
    "winogrande": ("The cup did not fit into box 0 because the cup", " was too big."),
    "hellaswag": ("Cooking: Cook 0 cuts an onion. The cook. then", " cries."),
    "mmlu": (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Where is part 0?\nA. up\nB. down\nC. left\nD. right\nAnswer:",
        " A",
    ),
    "race": ("Article: Day 0 came.\n\nQuestion: How is the day?\nAnswer: It is warm.\nHow is day 0?", " It is cold."),
}


@pytest.mark.parametrize("name", list(PROMPTS))
def test_prompts_are_the_benchmarks_own(dlm: LanguageModel, asked: list[Any], name: str) -> None:
    evaluate(dlm, {name: official(name, few_shot=0)}, settings=QUICK)
    assert asked[0] == PROMPTS[name]


def test_gsm8k_is_generated_up_to_the_next_question(dlm: LanguageModel, asked: list[Any]) -> None:
    evaluate(dlm, {"gsm8k": official("gsm8k")}, settings=QUICK)
    prompt, options = asked[0]
    assert prompt.endswith("\n\nQuestion: What is 0 + 1?\nAnswer:")
    assert prompt.count("Question:") == 6
    assert options["until"][0] == "Question:"


def test_every_model_is_shown_the_same_examples(dlm: LanguageModel, asked: list[Any]) -> None:
    task = {"winogrande": official("winogrande")}
    evaluate(dlm, task, settings=QUICK)
    first = list(asked)
    asked.clear()
    evaluate(dlm, task, settings=QUICK)
    assert asked == first
    examples = {context.rsplit("\n\n", 1)[0] for context, _ in first}
    assert len(examples) == 3  # other examples for each question


def test_options_are_shuffled_once(dlm: LanguageModel, asked: list[Any]) -> None:
    """GPQA's file shuffles with a generator that goes on whenever lm_eval reads the documents, examples included."""
    twice = [official("gpqa_main_n_shot", few_shot=2) for _ in range(2)]
    seen = []
    for task in twice:
        part = next(iter(task.parts.values()))
        documents: list[dict[str, Any]] = [dict(doc) for doc in part.eval_docs]
        assert documents == [dict(doc) for doc in part.eval_docs]
        evaluate(dlm, {task.name: task}, settings=QUICK)
        for context, _ in asked:
            numbers = [int(number) for number in re.findall(r"in case (\d)", context)]
            assert len(set(numbers)) == 3  # no question is its own example
            answers = [next(doc["answer"] for doc in documents if doc["Question"].endswith(f"{number}?")) for number in numbers]
            pairs = zip(numbers, answers, strict=True)
            assert all(f"\n{answer} right {number}\n" in context for number, answer in pairs)
        seen.append(list(asked))
        asked.clear()
    assert seen[0] == seen[1]
    assert len({context.rindex("right") - context.rindex("(A)") for context, _ in seen[0]}) > 1


def test_examples_come_from_processed_documents(dlm: LanguageModel, asked: list[Any]) -> None:
    evaluate(dlm, {"hellaswag": official("hellaswag", few_shot=1)}, settings=QUICK)
    assert all("[title]" not in context and context.startswith("Cooking: Cook ") for context, _ in asked)


# Results


def test_results_are_per_document_in_order(dlm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choice 0 always wins in `acc`, and the last one where the length is divided out."""

    def first_choice(self: HarnessModel, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        return [(-1.0 - request.idx, False) for request in requests]

    monkeypatch.setattr(HarnessModel, "loglikelihood", first_choice)
    labels = [0, 1, 1, 0, 2, 0]
    rows = [{"q": f"question {n}", "c": ["a" * 4, "b" * 20, "c" * 99], "l": label} for n, label in enumerate(labels)]
    config = {**yaml.safe_load((tasks.FOLDER / "tiny_description.yaml").read_text()), "doc_to_text": "{{q}}"}
    config |= {"doc_to_choice": "c", "doc_to_target": "l"}
    task = LoadedTask("own", {"own": local_task(config, {"test": rows})}, "acc_norm", 0.25)
    task.parts["own"].set_config("task", "own")
    result = evaluate(dlm, {"own": task}, settings=QUICK)["own"]
    assert result.scores["acc"] == (True, False, False, True, False, True)
    # Per character: -1 / 4, -2 / 20, -3 / 99.
    assert result.correct == result.scores["acc_norm"] == (False, False, False, False, True, False)
    assert result.accuracy == pytest.approx(1 / 6)
    assert result.interval == sums.share_interval(1, 6)
    assert (result.task, result.metric, result.chance, result.settings) == ("own", "acc_norm", 0.25, QUICK)


def test_parts_of_a_group_are_put_together(dlm: LanguageModel) -> None:
    first, second = official("mmlu"), official("arc_easy")
    both = LoadedTask("both", {**first.parts, **second.parts}, "acc", 0.25)
    each = [evaluate(dlm, {task.name: task}, settings=QUICK)[task.name].correct for task in (first, second)]
    assert evaluate(dlm, {"both": both}, settings=QUICK)["both"].correct == each[0] + each[1]


def test_a_limit_takes_the_first_documents(dlm: LanguageModel) -> None:
    loaded = load_tasks(["tiny_topic"])
    few, more = (evaluate(dlm, loaded, settings=QUICK, limit=limit)["tiny_topic"].correct for limit in (3, 5))
    assert (len(few), len(more)) == (3, 5)
    assert more[:3] == few
    with pytest.raises(InputError, match="limit must be a number of documents from 1, got 0"):
        evaluate(dlm, loaded, settings=QUICK, limit=0)


def test_settings_may_differ_by_task(dlm: LanguageModel) -> None:
    names = ["tiny_topic", "tiny_sums"]
    settings = {"tiny_topic": QUICK, "tiny_sums": dataclasses.replace(QUICK, seed=3)}
    results = evaluate(dlm, names, settings=settings, limit=1)
    assert [results[name].settings.seed for name in names] == [0, 3]


def test_a_score_that_the_task_does_not_have_is_named(dlm: LanguageModel) -> None:
    task = dataclasses.replace(load_tasks(["tiny_sums"])["tiny_sums"], metric="acc")
    with pytest.raises(InputError, match="one of exact_match, got acc"):
        evaluate(dlm, {"tiny_sums": task}, settings=QUICK, limit=1)


def test_nothing_reaches_stderr_and_all_is_put_back(dlm: LanguageModel, capfd: pytest.CaptureFixture[str]) -> None:
    bar, level = lm_eval_task.tqdm, logging.getLogger("lm_eval").level
    evaluate(dlm, ["tiny_topic", "tiny_word_problems"], settings=QUICK, limit=2)
    evaluate(dlm, {"hellaswag": official("hellaswag")}, settings=QUICK)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert lm_eval_task.tqdm is bar
    assert logging.getLogger("lm_eval").level == level
    assert not datasets.utils.are_progress_bars_disabled()


# Names and settings


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"a task must be one of tiny_add, .*race.*, got tiny_chess"):
        load_tasks(["tiny_sums", "tiny_chess"])


@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork"), FileNotFoundError("gated"), ValueError("no config")])
def test_data_out_of_reach_is_an_absence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Index:
        def load(self, names: list[str]) -> None:
            raise error

    monkeypatch.setattr(tasks, "_index", Index)
    with pytest.raises(UnavailableError, match=f"the data of piqa must be fetchable, got: {str(error).splitlines()[0]}: connect"):
        load_tasks(["piqa"])


def test_official_tasks_get_their_examples_and_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Index:
        def load(self, names: list[str]) -> dict[str, Any]:
            assert names == ["mmlu"]
            return {"tasks": official("mmlu", few_shot=0).parts}

    monkeypatch.setattr(tasks, "_index", Index)
    loaded = load_tasks(["mmlu"])["mmlu"]
    assert loaded.parts["mmlu_anatomy"].config.num_fewshot == 5
    assert (loaded.metric, loaded.chance) == ("acc", 0.25)


def test_local_tasks_never_need_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_index", lambda: pytest.fail("indexed"))
    assert set(load_tasks(tasks.local_names())) == set(tasks.local_names())


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_all_nine_benchmarks_are_there_and_installed(family: Any) -> None:
    assert len(OFFICIAL[family]) == 9
    for name in OFFICIAL[family]:
        config = load_yaml(standins.yaml_path(name, "anatomy"), resolve_func=False)
        assert config["task"] == ("mmlu_anatomy" if name == "mmlu" else name)


def test_published_settings() -> None:
    base = EvaluationSettings(draws=7, seed=3, batch_size=5)
    arc_settings = published_settings("arc_challenge", base)
    assert arc_settings == dataclasses.replace(base, draws=128, cfg_scale=0.5, max_length=4096)
    assert published_settings("mmlu", base).draws == 1
    assert published_settings("mmlu", base, family="dream").draws == 128
    assert published_settings("arc_challenge", base, family="dream").cfg_scale == 0
    gsm8k = published_settings("gsm8k", base)
    assert (gsm8k.gen_length, gsm8k.steps, gsm8k.block_length, gsm8k.seed) == (1024, 1024, 1024, 3)
    assert published_settings("gsm8k_cot", base, family="dream").gen_length == 256
    assert published_settings("tiny_sums", base) == base


# The local tasks


def config_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((tasks.FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def rows_of(name: str) -> list[dict[str, Any]]:
    return data.read_rows(name, folder=tasks.FOLDER)


def test_the_chance_levels_are_those_of_the_rows() -> None:
    def commonest(values: list[Any]) -> float:
        return max(Counter(values).values()) / len(values)

    asked: dict[str, list[str]] = {}  # values by what is asked for
    for row in rows_of("tiny_facts"):
        asked.setdefault(row["question"].split()[1], []).append(row["answer"])
    found = {
        "tiny_description": commonest([row["label"] for row in rows_of("tiny_description")]),
        "tiny_topic": commonest([row["topic"] for row in rows_of("tiny_topic")]),
        "tiny_topic_generated": commonest([row["topic"] for row in rows_of("tiny_topic")]),
        "tiny_sums": commonest([row["answer"] for row in data.read_rows("sums_test")]),
        "tiny_word_problems": commonest([row["answer"] for row in rows_of("tiny_word_problems")]),
        **{name: commonest([row["answer"] for row in rows_of(name)]) for name in ("tiny_add", "tiny_sort", "tiny_sudoku")},
        "tiny_recall": 1 / rows_of("tiny_recall")[0]["question"].count("."),
        "tiny_facts": sum(commonest(values) * len(values) for values in asked.values()) / len(rows_of("tiny_facts")),
    }
    assert found == {name: pytest.approx(config_of(name)["metadata"]["chance"]) for name in tasks.local_names()}


def test_descriptions_have_four_choices_and_one_of_them_is_right() -> None:
    articles = {row["title"]: row for row in data.read_rows("articles_evaluation")}
    rows = rows_of("tiny_description")
    assert len(rows) == 240
    assert Counter(row["label"] for row in rows) == dict.fromkeys(range(4), 60)
    for row in rows:
        assert len({choice.lower() for choice in row["choices"]}) == 4
        right = articles[row["title"]]["description"]
        assert [index for index, choice in enumerate(row["choices"]) if choice == right] == [row["label"]]


def test_the_familys_questions_are_those_of_its_recipe_and_held_out() -> None:
    for name in make_tasks.FAMILY_TASKS:
        rows = rows_of(name)
        assert len(rows) == len({row["question"] for row in rows}) == 4000
        count = 100 if name == "tiny_sudoku" else 4000  # puzzles with one solution take half a minute
        documents = family.test_documents(name, count)
        for row, document in zip(rows, documents, strict=False):
            sides = {side: "".join(text for text, is_answer in document if is_answer is side) for side in (False, True)}
            assert row == {"question": sides[False], "answer": sides[True].strip()}
        trained = {family.key_of(name, family.training_document(name, number, seed=0)) for number in range(300)}
        assert not trained & {family.key_of(name, document) for document in documents}


def test_topics_are_all_topics_of_the_data() -> None:
    articles = {row["title"]: row for row in data.read_rows("articles_evaluation")}
    assert config_of("tiny_topic")["doc_to_choice"] == sorted({row["topic"] for row in articles.values()} - {"Uncategorized"})
    rows = rows_of("tiny_topic")
    assert len(rows) == len({row["title"] for row in rows}) == 240
    assert all(articles[row["title"]]["topic"] == row["topic"] for row in rows)


def test_prompts_are_in_the_format_of_the_training(dlm: LanguageModel, asked: list[Any]) -> None:
    evaluate(dlm, ["tiny_description", "tiny_topic"], settings=QUICK, limit=1)
    articles = {row["title"]: row for row in data.read_rows("articles_evaluation")}
    described, sorted_into = rows_of("tiny_description")[0], rows_of("tiny_topic")[0]
    short = {**articles[described["title"]], "extract": described["text"]}
    context, right = asked[described["label"]]
    assert data.format_article(short, description_last=True).startswith(context + right + "\n")
    topics = config_of("tiny_topic")["doc_to_choice"]
    context, right = asked[4 + topics.index(sorted_into["topic"])]
    assert data.format_article(articles[sorted_into["title"]], description_last=False).startswith(context + right + "\nText: ")
    assert config_of("tiny_topic_generated")["doc_to_text"] == config_of("tiny_topic")["doc_to_text"]


def test_problems_are_short(dlm: LanguageModel, asked: list[Any]) -> None:
    evaluate(dlm, ["tiny_word_problems"], settings=QUICK)
    assert len(asked) == len({context for context, _ in asked}) == 150
    lengths = [len(tokenizer_ids(dlm, context)) for context, _ in asked]
    assert max(lengths) <= 100
    assert all(context.endswith("?\nAnswer:") for context, _ in asked)


def tokenizer_ids(model: LanguageModel, text: str) -> list[int]:
    return language_model.tokenizer_of(model)(text)["input_ids"]  # pyright: ignore


@pytest.mark.parametrize("kind", ["dlm", "ar"])
def test_sums_are_answered_as_notebook_02_does(kind: str) -> None:
    model = loading.load(ROOT / "models" / "reference" / kind)
    asked = sums.QUESTIONS["tiny_add"]
    settings = EvaluationSettings(gen_length=asked.new_tokens, steps=asked.new_tokens, block_length=asked.new_tokens)
    got = evaluate(model, ["tiny_add"], settings=settings, limit=24)["tiny_add"].correct
    rows = data.read_rows(asked.file)[:24]
    expected = sums.is_correct(sums.answer_sums(model, rows, kind=asked), rows)
    assert list(got) == expected
    assert any(expected)


def test_local_data_files_are_small_json_lines() -> None:
    for path in tasks.FOLDER.glob("*.jsonl"):
        assert path.stat().st_size < 600_000
        assert all(isinstance(json.loads(line), dict) for line in path.read_text(encoding="utf-8").splitlines())

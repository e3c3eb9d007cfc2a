"""Generation in full batches for lm_eval: the answers of the plain adapter, whatever goes together, and chats."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from lib.core.errors import InputError
from lib.diffusion import ragged
from lib.evaluation import harness, standins, tasks
from lib.evaluation.harness import BatchedHarness, HarnessModel
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.tasks import LoadedTask, TaskResult
from lib.models import loading
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.texts.encoding import encode
from recipes import rehearsal_models, rehearsal_rows
from recipes.rehearsal_models import header_template
from tests import tiny

CONTEXTS = ["w1 w2 w3", "w4", "w5 w6 w7", "w8 w9", "w0 w1 w2 w3 w4 w5 w6", "w2"]
SHORT = EvaluationSettings(gen_length=6, steps=3, block_length=2, batch_size=4)
TASK = EvaluationSettings(gen_length=8, steps=4, block_length=4, batch_size=5)
CHAT = ("llada-1.5", "mmada", "llama")
TURN_ENDS = {"llada-1.5": ["<|eot_id|>"], "mmada": ["<|eot_id|>"], "llama": ["<|end_of_text|>"]}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    """Stand-ins of the releases by name; Llama gets a template, since its tokenizer puts BOS before a text itself."""
    folder = tmp_path_factory.mktemp("released")
    loaded: dict[str, LanguageModel] = {}

    def get(name: str) -> LanguageModel:
        if name not in loaded:
            rehearsal_models.write(folder / name, name, seed=0)
            loaded[name] = loading.load(folder / name)
            if name == "llama":
                ended = header_template("\n\n").replace("<|eot_id|>", "<|end_of_text|>")
                tokenizer_of(loaded[name]).chat_template = ended
        return loaded[name]

    return get


def gsm8k() -> LoadedTask:
    """The benchmark on look-alike rows whose questions have very different lengths."""
    made = rehearsal_rows.rows("gsm8k")
    for row in made["test"]:
        number = int(row["question"].split()[2])
        row["question"] += " Count slowly." * (number * 7 % 5)
    return standins.merged("gsm8k", made, family="llada")


def evaluate(model: LanguageModel, task: LoadedTask, *, adapter: Any = BatchedHarness, **options: Any) -> TaskResult:
    """Ask a task in full batches."""
    return tasks.evaluate(model, {task.name: task}, settings=options.pop("settings", TASK), adapter=adapter, **options)[task.name]


def requests(arguments: Sequence[tuple[str, Any]]) -> list[Instance]:
    return [Instance(request_type="generate_until", doc={}, arguments=args, idx=0) for args in arguments]


def generations(
    model: LanguageModel, contexts: Sequence[tuple[str, Any]], options: EvaluationSettings, *, plain: bool = False
) -> list[str]:
    adapter = (HarnessModel if plain else BatchedHarness)(model, settings=options)
    return adapter.generate_until(requests(contexts))


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """Collects the lengths of the prompts of each batch, and how many tokens it gets."""
    seen: list[tuple[list[int], int]] = []
    for name in ("denoise", "continue_texts"):
        keep = getattr(ragged, name)

        def watch(model: LanguageModel, prompts: Any, keep: Any = keep, **options: Any) -> Tensor:
            seen.append(([len(prompt) for prompt in prompts], options["new_tokens"]))
            return keep(model, prompts, **options)

        monkeypatch.setattr(ragged, name, watch)
    return seen


# Answers are those of the plain adapter


@pytest.mark.parametrize("kind", ["dlm", "causal"])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_answers_are_the_plain_adapters(request: pytest.FixtureRequest, kind: str, cfg: float, size: int) -> None:
    model = request.getfixturevalue(kind)
    options = dataclasses.replace(SHORT, batch_size=size, cfg_scale=0.0 if model.is_causal else cfg)
    # The second half asks for fewer tokens, so two groups mix lengths.
    asked = [(context, {"until": ["w9"], "max_gen_toks": 6 - index // 3}) for index, context in enumerate(CONTEXTS)]
    expected = generations(model, asked, dataclasses.replace(options, batch_size=1), plain=True)
    assert generations(model, asked, options) == expected
    assert generations(model, asked[::-1], options)[::-1] == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("kind", ["dlm", "causal"])
def test_unequal_prompts_share_batches_longest_first(
    request: pytest.FixtureRequest, kind: str, shapes: list[tuple[list[int], int]]
) -> None:
    asked = [*((context, {}) for context in CONTEXTS), ("w3 w4", {"max_gen_toks": 2})]
    generations(request.getfixturevalue(kind), asked, SHORT)
    assert shapes == [([8, 4, 4, 3], 6), ([2, 2], 6), ([3], 2)]


@pytest.mark.parametrize("kind", ["dlm", "causal"])
def test_prompts_of_one_length_are_generated_exactly_as_before(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very tensors: equal to the last bit of every logit, since the same calls are made."""
    model = request.getfixturevalue(kind)
    asked = [(f"w{index} w{index + 1}", {}) for index in range(4)]
    expected = generations(model, asked, SHORT, plain=True)
    calls: list[list[list[int]]] = []
    name = "continue_text" if model.is_causal else "sample"
    keep = getattr(harness.sampler, name)
    monkeypatch.setattr(harness.sampler, name, lambda m, prompt, **o: calls.append(prompt.tolist()) or keep(m, prompt, **o))
    assert generations(model, asked, SHORT, plain=True) == expected
    assert generations(model, asked, SHORT) == expected
    assert calls[0] == calls[1]
    assert len(calls) == 2


@pytest.mark.parametrize(("until", "expected"), [([], "w1 w2 w3 w4"), (["w3"], "w1 w2"), ("w2", "w1"), (["w4", "w2 w3"], "w1")])
def test_texts_end_at_stop_strings(dlm: LanguageModel, monkeypatch: pytest.MonkeyPatch, until: Any, expected: str) -> None:
    row = torch.tensor([tiny.tokenizer()("w1 w2 w3 w4 [EOS] w5", add_special_tokens=False)["input_ids"]])
    monkeypatch.setattr(ragged, "denoise", lambda model, prompts, **_: row.expand(len(prompts), -1))
    options = {"until": until}
    got = generations(dlm, [("w1", options), ("w1 w2", options)], SHORT)
    assert [text.strip() for text in got] == [expected] * 2


@pytest.mark.parametrize("kind", ["dlm", "causal"])
def test_limits_are_obeyed(request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for 5 tokens in blocks of 2 denoises 6 and gets 5; long prompts lose their beginning, and that is counted."""
    model = request.getfixturevalue(kind)
    seen: list[list[int]] = []
    keep = HarnessModel._text
    monkeypatch.setattr(HarnessModel, "_text", lambda self, ids, until: seen.append(ids) or keep(self, ids, until))
    long = " ".join(f"w{number % 10}" for number in range(90))
    asked = [("w1", {"max_gen_toks": 5}), (long, {"max_gen_toks": 5}), ("w1 w2", {"max_gen_toks": 600})]
    adapter = BatchedHarness(model, settings=SHORT)
    got = adapter.generate_until(requests(asked))
    assert sorted(len(ids) for ids in seen) == [5, 5, 6]
    assert adapter.truncated == 1
    assert got == generations(model, asked, SHORT, plain=True)
    with pytest.raises(InputError, match="greedy, got do_sample"):
        adapter.generate_until(requests([("w1", {"do_sample": True})]))


def test_likelihoods_are_the_plain_adapters(dlm: LanguageModel) -> None:
    pairs = [Instance("loglikelihood", {}, ("w1 w2", " w3"), 0), Instance("loglikelihood", {}, ("w1", " w3 w4"), 0)]
    found = [kind(dlm, settings=SHORT).loglikelihood(pairs) for kind in (BatchedHarness, HarnessModel)]
    assert found[0] == found[1]


# Chats


class Watched(BatchedHarness):
    """Keeps what lm_eval asks to be written, and the prompts that reach the model."""

    def __init__(self, model: LanguageModel, *, settings: EvaluationSettings) -> None:
        super().__init__(model, settings=settings)
        self.messages: list[list[dict[str, str]]] = []
        self.prompts: list[list[int]] = []

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self.messages.append(chat_history)
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def _generation(self, context: str, options: dict[str, Any]) -> tuple[Sequence[int], int, list[str]]:
        found = super()._generation(context, options)
        self.prompts.append(list(found[0]))
        return found


@pytest.mark.parametrize("name", CHAT)
def test_the_model_reads_what_the_template_makes_of_the_messages(released: Callable[[str], LanguageModel], name: str) -> None:
    model = released(name)
    tokenizer = tokenizer_of(model)
    adapter = Watched(model, settings=TASK)
    evaluate(model, gsm8k(), adapter=lambda *_, **__: adapter, chat_template=True, limit=4)
    assert len(adapter.prompts) == len(adapter.messages) == 4
    for messages, prompt in zip(adapter.messages, adapter.prompts, strict=True):
        assert [message["role"] for message in messages] == [*["user", "assistant"] * 5, "user"]
        assert messages[-1]["content"].startswith("Question: What is") and messages[-1]["content"].endswith("\nAnswer:")
        given: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt == given["input_ids"]
        assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id  # pyright: ignore


def test_bos_would_come_twice(released: Callable[[str], LanguageModel]) -> None:
    """Llama's tokenizer puts one before any text: only what the template wrote is taken as it stands."""
    model = released("llama")
    tokenizer, adapter = tokenizer_of(model), BatchedHarness(model, settings=TASK)
    text = adapter.apply_chat_template([{"role": "user", "content": "7 + 1?"}])
    assert encode(tokenizer, text)[:2] == [tokenizer.bos_token_id] * 2
    prompt, new, until = adapter._generation(text, {"until": ["x"]})
    assert list(prompt) == encode(tokenizer, text)[1:]
    assert (new, until) == (8, ["x", "<|end_of_text|>"])
    assert list(adapter._generation("7 + 1?", {})[0]) == encode(tokenizer, "7 + 1?")


@pytest.mark.parametrize("name", CHAT)
def test_an_answer_ends_with_the_assistants_turn(
    released: Callable[[str], LanguageModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = released(name)
    tokenizer, adapter = tokenizer_of(model), BatchedHarness(model, settings=TASK)
    assert adapter.turn_end() == TURN_ENDS[name]
    said = encode(tokenizer, f"8{TURN_ENDS[name][0]}user 9", special=False)
    row = torch.tensor([said + said[-1:] * 8])[:, :8]
    generate = "continue_texts" if model.is_causal else "denoise"
    monkeypatch.setattr(ragged, generate, lambda model, prompts, **_: row.expand(len(prompts), -1))
    text = adapter.apply_chat_template([{"role": "user", "content": "7 + 1?"}])
    assert adapter.generate_until(requests([(text, {"until": []})])) == ["8"]


def test_a_template_need_not_end_turns_with_a_special_token(released: Callable[[str], LanguageModel]) -> None:
    model = released("mmada")
    plain = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    tokenizer = tokenizer_of(model)
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = plain
        assert BatchedHarness(model, settings=TASK).turn_end() == []
    finally:
        tokenizer.chat_template = before


def test_an_answer_that_is_begun_is_gone_on_with(released: Callable[[str], LanguageModel]) -> None:
    adapter = BatchedHarness(released("llada-1.5"), settings=TASK)
    turns = [{"role": "user", "content": "7 + 1?"}, {"role": "assistant", "content": "It is"}]
    assert adapter.apply_chat_template(turns, add_generation_prompt=False).endswith("\n\nIt is")
    assert adapter.apply_chat_template(turns[:1]).endswith("assistant<|end_header_id|>\n\n")


def test_a_chat_that_is_too_long_loses_its_beginning(released: Callable[[str], LanguageModel]) -> None:
    model = released("llada-1.5")
    adapter = BatchedHarness(model, settings=dataclasses.replace(TASK, max_length=20))
    text = adapter.apply_chat_template([{"role": "user", "content": "7 + 1? " * 9}])
    prompt, _, _ = adapter._generation(text, {})
    assert list(prompt) == encode(tokenizer_of(model), text, special=False)[-12:]
    assert adapter.truncated == 1


def test_the_tokenizer_has_a_name(released: Callable[[str], LanguageModel]) -> None:
    name = BatchedHarness(released("mmada"), settings=TASK).tokenizer_name
    assert name.endswith("mmada")
    assert "/" not in name


@pytest.mark.parametrize("name", ["llada", "dream", "qwen2"])
def test_a_chat_needs_a_template(released: Callable[[str], LanguageModel], name: str) -> None:
    with pytest.raises(InputError, match=f"whose tokenizer has a chat template, got none with {name}: use its instruction"):
        evaluate(released(name), gsm8k(), chat_template=True, limit=1)


# Whole tasks


@pytest.mark.parametrize("name", ["llada", "dream", "qwen2", "llama"])
@pytest.mark.parametrize("limit", [None, 7])
def test_a_task_gets_the_answers_of_the_plain_evaluation(
    released: Callable[[str], LanguageModel], name: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = released(name), gsm8k()
    settings = dataclasses.replace(TASK, cfg_scale=0.0 if model.is_causal else 0.5)
    texts: list[list[str]] = []
    kinds: list[type[HarnessModel]] = []
    keep = HarnessModel.generate_until

    def watch(self: HarnessModel, asked: list[Instance]) -> list[str]:
        kinds.append(type(self))
        texts.append(keep(self, asked))
        return texts[-1]

    monkeypatch.setattr(HarnessModel, "generate_until", watch)
    expected = tasks.evaluate(model, {"gsm8k": task}, settings=settings, limit=limit)["gsm8k"]
    assert evaluate(model, task, settings=settings, limit=limit) == expected
    assert kinds == [HarnessModel, BatchedHarness]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > len(texts[0]) // 2 > 2


def test_right_answers_count(released: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other document is answered rightly, so that an answer out of place would show."""
    model = released("llada-1.5")
    asked: list[str] = []

    def answer(self: BatchedHarness, given: list[Instance]) -> list[str]:
        contexts = [str(request.args[0]) for request in given]
        asked.extend(contexts)
        numbers = [int(context.rsplit("What is ", 1)[1].split()[0]) for context in contexts]
        return [f"#### {number + 1 + number % 2}" for number in numbers]

    monkeypatch.setattr(BatchedHarness, "generate_until", answer)
    for chat in (False, True):
        result = evaluate(model, gsm8k(), chat_template=chat, limit=6)
        assert result.correct == (True, False) * 3
        assert (result.task, result.metric, result.settings) == ("gsm8k", "exact_match,strict-match", TASK)
    assert [text.startswith("<|startoftext|>") for text in asked] == [False] * 6 + [True] * 6
    assert asked[0].count("Question:") == asked[6].count("Question:") == 6


def test_likelihood_tasks_have_no_chat(released: Callable[[str], LanguageModel]) -> None:
    model = released("llada-1.5")
    task = standins.merged("piqa", rehearsal_rows.rows("piqa"), family="llada")
    settings = dataclasses.replace(TASK, draws=2)
    with pytest.raises(InputError, match="a task that is generated, got piqa, which is multiple_choice: leave chat_template out"):
        evaluate(model, task, settings=settings, chat_template=True)
    assert (
        evaluate(model, task, settings=settings, limit=3)
        == tasks.evaluate(model, {"piqa": task}, settings=settings, limit=3)["piqa"]
    )
    with pytest.raises(InputError, match="limit must be a number of documents from 1, got 0"):
        evaluate(model, task, settings=settings, limit=0)
    with pytest.raises(InputError, match="the score of piqa must be one of acc, acc_norm, got f1: change its metric"):
        evaluate(model, dataclasses.replace(task, metric="f1"), settings=settings, limit=2)

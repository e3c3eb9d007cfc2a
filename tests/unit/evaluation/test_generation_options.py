"""Options of a generation: what is honoured, what means nothing to a greedy one, and what is refused."""

from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml

from lib.core.errors import InputError
from lib.evaluation import generation_options, tasks
from lib.evaluation.generation_options import GenerationOptions, read
from lib.evaluation.harness import BatchedHarness, HarnessModel
from lib.evaluation.scoring import EvaluationSettings
from lib.models.language_model import LanguageModel
from tests.unit.evaluation.test_harness import generations, requests

SETTINGS = EvaluationSettings(gen_length=6, steps=3, block_length=2)


@pytest.mark.parametrize("name", generation_options.LENGTHS)
def test_every_name_of_the_length_is_honoured(dlm: LanguageModel, causal: LanguageModel, name: str) -> None:
    assert read({name: 5}) == GenerationOptions(5, ()) and read({name: 5.0}).new_tokens == 5
    for model, adapter in ((dlm, HarnessModel), (causal, HarnessModel), (dlm, BatchedHarness), (causal, BatchedHarness)):
        texts = [
            adapter(model, settings=SETTINGS).generate_until(requests("generate_until", [("w1 w2", {option: 2})]))
            for option in (name, "max_gen_toks")
        ]
        assert texts[0] == texts[1]
        assert texts[0] != generations(model, [("w1 w2", {})], SETTINGS)


@pytest.mark.parametrize(
    ("options", "until"),
    [
        ({}, ()),
        ({"until": "a"}, ("a",)),
        ({"until": ["a", "", "b"]}, ("a", "b")),
        ({"until": None}, ()),
        ({"until": ("a",)}, ("a",)),
    ],
)
def test_stop_strings_are_one_or_many(options: dict[str, Any], until: tuple[str, ...]) -> None:
    assert read(options) == GenerationOptions(None, until)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"temperature": 0},
        {"temperature": 0.0, "do_sample": True},
        {"do_sample": False, "temperature": 0.7},  # as lm_eval reads it
        {"do_sample": None, "temperature": None},
        {"temperature": 0.0, "top_p": 0.95, "top_k": 20, "seed": 1},
        {"num_beams": 1, "repetition_penalty": 1.0, "min_new_tokens": 0, "n": 1},
        {"max_gen_toks": 4, "max_tokens": 4},
    ],
)
def test_greedy_options_are_taken(options: dict[str, Any]) -> None:
    read(options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.7}, "generation must be greedy, got temperature 0.7: set do_sample: false"),
        ({"temperature": 1}, "must be greedy, got temperature 1"),
        ({"do_sample": True}, "must be greedy, got do_sample True"),
        ({"do_sample": True, "temperature": 0.2, "top_k": 1}, "must be greedy, got do_sample True, temperature 0.2"),
        ({"do_sample": "False"}, "do_sample must be true or false, got 'False'"),
        ({"temperature": "0"}, "temperature must be a number from 0, got '0'"),
        ({"temperature": -1}, "temperature must be a number from 0, got -1"),
        ({"max_gen_toks": 5, "max_new_tokens": 6}, "must have one length, got max_gen_toks 5, max_new_tokens 6: keep one"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a number of tokens from 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a number of tokens from 1, got 2.5"),
        ({"max_tokens": "8"}, "max_tokens must be a number of tokens from 1, got '8'"),
        ({"max_gen_toks": True}, "max_gen_toks must be a number of tokens from 1, got True"),
        ({"max_length": 128}, "one that is honoured here, got max_length: 128: .*for the length use max_new_tokens"),
        ({"num_beams": 10}, "num_beams must be 1, got 10: take it out"),
        ({"repetition_penalty": 1.2}, "repetition_penalty must be 1, got 1.2"),
        ({"min_new_tokens": 3}, "min_new_tokens must be 0, got 3"),
        ({"stop": ["a"]}, "one that is honoured here, got stop: .'a'.: take it out"),
        ({"anything": 1}, "one that is honoured here, got anything: 1"),
        ({"until": [1]}, "until must be a text or a list of texts, got .1."),
        ({"until": 5}, "until must be a text or a list of texts, got 5"),
    ],
)
def test_what_would_change_an_answer_is_refused_in_one_line(dlm: LanguageModel, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        generations(dlm, [("w1", options)], SETTINGS)
    assert "\n" not in str(caught.value)


class Loader(yaml.SafeLoader):
    """YAML without lm_eval's own functions."""


Loader.add_multi_constructor("!", lambda *_: None)  # pyright: ignore


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-cot"])
def test_the_papers_generated_tasks_are_answered(name: str) -> None:
    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / f"{name}.yaml"
    assert read(yaml.load(path.read_text(), Loader)["generation_kwargs"]).until


def test_the_local_generated_tasks_are_answered() -> None:
    for name in ("tiny_sums", "tiny_word_problems", "tiny_topic_generated"):
        part = tasks.load_tasks([name])[name].parts[name]
        assert read(part.config.generation_kwargs or {}) == GenerationOptions(6, ("\n",))

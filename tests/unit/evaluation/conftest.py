"""The two tiny models of the evaluation tests, each with a tokenizer of words."""

import dataclasses

import pytest

from lib.models.language_model import LanguageModel
from tests import tiny


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return dataclasses.replace(tiny.model(tmp_path_factory.mktemp("ar"), causal=True), tokenizer=tiny.tokenizer())


@pytest.fixture(scope="module")
def dlm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return dataclasses.replace(tiny.model(tmp_path_factory.mktemp("dlm"), causal=False, seed=1), tokenizer=tiny.tokenizer())

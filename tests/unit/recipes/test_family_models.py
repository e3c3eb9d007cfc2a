"""The members of the family that are trained so far differ in noise and attention alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from lib.core.config import ROOT
from lib.models import loading
from recipes.family.objectives import MEMBERS

FAMILY = [folder for name in MEMBERS if (folder := ROOT / "models" / "family" / name).is_dir()]
OWN = {"is_causal", "mask_token_id", "attention_kind", "block_length", "block_origin", "noise"}
each_member = pytest.mark.parametrize("folder", FAMILY, ids=lambda folder: folder.name)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_members_are_there_and_small() -> None:
    assert {folder.name for folder in FAMILY} >= {"ar", "dlm"}
    assert all((folder / "model.safetensors").stat().st_size <= 40e6 for folder in FAMILY)


@each_member
def test_members_differ_in_noise_and_attention_alone(folder: Path) -> None:
    first = FAMILY[0]
    own, other = read(folder, "config.json"), read(first, "config.json")
    assert {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)} <= OWN
    assert (folder / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert read(folder, "recipe.json") | {"seconds": 0} == read(first, "recipe.json") | {"seconds": 0}


@each_member
def test_a_folder_tells_what_it_is(folder: Path) -> None:
    model = loading.load(folder)
    assert model.is_causal == (folder.name == "ar") == (model.mask_token_id is None)
    assert 8e6 < model.num_parameters < 17e6


@each_member
def test_training_went_to_its_end_and_is_on_record(folder: Path) -> None:
    log, recipe = read(folder, "training_log.json"), read(folder, "recipe.json")
    assert log[-1]["step"] == recipe["steps"] and log[-1]["tokens"] == recipe["trained_tokens"]
    losses = [line["held_out"]["encyclopaedia"] for line in log]
    assert losses[-1] <= min(losses) + 0.05 and losses[-1] < losses[0] - 3
    assert all({"clean_first_token", "clean_top_share", "clean_value_norm_ratio"} <= line["sinks"].keys() for line in log)

"""The shipped family: members that differ in noise and attention alone, with cards that say what was measured on them."""

import json
from pathlib import Path
from typing import Any

import pytest

from lib.checkpoints import lookup
from lib.core.config import ROOT
from recipes.family.objectives import MEMBERS

FAMILY = [folder for name in MEMBERS if (folder := ROOT / "models" / "family" / name).is_dir()]
OWN = {"is_causal", "mask_token_id", "attention_kind", "block_length", "block_origin", "noise"}
each_member = pytest.mark.parametrize("folder", FAMILY, ids=lambda folder: folder.name)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_four_members_are_there() -> None:
    assert {folder.name for folder in FAMILY} >= {"ar", "bd", "dlm", "udlm"}


@each_member
def test_members_differ_in_noise_and_attention_alone(folder: Path) -> None:
    first = FAMILY[0]
    own, other = read(folder, "config.json"), read(first, "config.json")
    assert {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)} <= OWN
    assert (folder / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert read(folder, "recipe.json") | {"seconds": 0} == read(first, "recipe.json") | {"seconds": 0}


@each_member
def test_training_went_to_its_end_and_is_on_record(folder: Path) -> None:
    log, recipe = read(folder, "training_log.json"), read(folder, "recipe.json")
    assert log[-1]["step"] == recipe["steps"] and log[-1]["tokens"] == recipe["trained_tokens"]
    losses = [line["held_out"]["encyclopaedia"] for line in log]
    assert losses[-1] <= min(losses) + 0.05 and losses[-1] < losses[0] - 3
    assert all({"clean_first_token", "clean_top_share", "clean_value_norm_ratio"} <= line["sinks"].keys() for line in log)


@each_member
def test_the_evaluation_is_of_these_weights_and_the_card_is_of_the_evaluation(folder: Path) -> None:
    measured = read(folder, "evaluation.json")
    assert measured["fingerprint"] == lookup.fingerprint(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"**{measured['held_out_nats']:.3f} ± {measured['held_out_standard_error']:.3f}**" in card
    for task, row in measured["tasks"].items():
        assert f"| `{task}` | {row['correct']} of {row['documents']} | **{row['correct'] / row['documents']:.1%}**" in card
    assert f"| {read(folder, 'recipe.json')['trained_tokens']:,} (" in card
    assert (folder / "model.safetensors").stat().st_size <= 40e6
    config = read(folder, "config.json")
    assert config["num_key_value_heads"] < config["num_attention_heads"] and config["num_hidden_layers"] >= 8

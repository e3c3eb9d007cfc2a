"""The shipped family: its members differ in noise and attention alone, and their cards say what was measured on these weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from lib.checkpoints import lookup
from lib.core.config import ROOT
from lib.evaluation import sums
from lib.models import loading
from recipes.family.objectives import MEMBERS

FAMILY = [folder for name in MEMBERS if (folder := ROOT / "models" / "reference" / name).is_dir()]
OWN = {"is_causal", "mask_token_id", "attention_kind", "block_length", "block_origin", "noise"}
KINDS = {"ar": "autoregressive", "bd": "masked diffusion in blocks", "dlm": "masked diffusion", "udlm": "uniform diffusion"}
each_member = pytest.mark.parametrize("folder", FAMILY, ids=lambda folder: folder.name)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_members_are_there_and_small() -> None:
    assert {folder.name for folder in FAMILY} == {"ar", "bd", "dlm", "udlm"}
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
    assert model.kind == KINDS[folder.name]
    assert (model.mask_token_id is None) == (folder.name in ("ar", "udlm"))
    assert 8e6 < model.num_parameters < 17e6


@each_member
def test_training_went_to_its_end_and_is_on_record(folder: Path) -> None:
    log, recipe = read(folder, "training_log.json"), read(folder, "recipe.json")
    assert log[-1]["step"] == recipe["steps"] and log[-1]["tokens"] == recipe["trained_tokens"]
    losses = [line["held_out"]["encyclopaedia"] for line in log]
    assert losses[-1] <= min(losses) + 0.05 and losses[-1] < losses[0] - 3
    assert all({"clean_first_token", "clean_top_share", "clean_value_norm_ratio"} <= line["sinks"].keys() for line in log)


@each_member
def test_the_evaluation_is_of_these_weights_and_the_card_is_of_the_evaluation(folder: Path) -> None:
    measured, card = read(folder, "evaluation.json"), (folder / "README.md").read_text(encoding="utf-8")
    assert measured["fingerprint"] == lookup.fingerprint(folder)
    assert f"**{measured['held_out_nats']:.3f} ± {measured['held_out_standard_error']:.3f}**" in card
    for name, row in measured["tasks"].items():
        assert f"| `{name}` | {row['correct']} of {row['documents']} |" in card
        assert row["interval"] == pytest.approx(sums.share_interval(row["correct"], row["documents"]), abs=1e-4)
    assert f"seed | {read(folder, 'recipe.json')['seed']} |" in card


def test_wilson_interval_against_published_values() -> None:
    # Newcombe (1998), method 3: 81 of 263 and 15 of 148; then the bound at no success, z^2 / (n + z^2)
    assert sums.share_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert sums.share_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert sums.share_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)

"""The shipped models: twins that differ in the objective alone, with cards that say what was measured on these weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from lib.checkpoints import lookup
from lib.core.config import ROOT
from lib.evaluation import sums
from lib.models import loading

PAIR = [ROOT / "models" / "reference" / name for name in ("dlm", "ar")]
each_model = pytest.mark.parametrize("folder", PAIR, ids=lambda folder: folder.name)


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_twins_differ_in_direction_and_mask_token_alone():
    dlm, ar = (read(folder, "config.json") for folder in PAIR)
    assert {key for key in dlm.keys() | ar.keys() if dlm.get(key) != ar.get(key)} == {"is_causal", "mask_token_id"}
    assert (PAIR[0] / "tokenizer.json").read_bytes() == (PAIR[1] / "tokenizer.json").read_bytes()
    recipes = [read(folder, "recipe.json") for folder in PAIR]
    assert recipes[0] | {"seconds": 0} == recipes[1] | {"seconds": 0}


@each_model
def test_the_evaluation_is_of_these_weights_and_the_card_is_of_the_evaluation(folder):
    measured = read(folder, "evaluation.json")
    assert measured["fingerprint"] == lookup.fingerprint(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"**{measured['held_out_nats_per_token']:.3f} ± {measured['held_out_standard_error']:.3f}**" in card
    assert f"**{measured['sums_correct']} of {measured['sums_total']}**" in card
    assert f"seed | {read(folder, 'recipe.json')['seed']} |" in card
    assert (folder / "model.safetensors").stat().st_size <= 32 * 2**20
    assert 8e6 <= measured["parameters"] <= 16e6


def test_sums_are_answered_in_their_own_order_and_cut_at_the_end_of_the_document():
    # Prompts of three lengths, so that grouping by length must not mix up the rows.
    rows = [
        {"question": question, "answer": answer}
        for question, answer in (("56 + 91 =", "147"), ("5 - 2 =", "3"), ("23 - 60 =", "-37"))
    ]
    assert sums.answer_sums(loading.load(PAIR[1]), rows) == ["147", "3", "-37"]
    assert len(sums.answer_sums(loading.load(PAIR[0]), rows)) == 3


def test_wilson_interval_against_published_values():
    # Newcombe (1998), method 3: 81 of 263 and 15 of 148; then the bound at no success, z^2 / (n + z^2)
    assert sums.share_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert sums.share_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert sums.share_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)

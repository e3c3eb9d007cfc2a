"""Variance components of measured gains, and why every calibration gets masks of its own."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.calibration.sets import Inputs
from lib.evaluation import paired
from lib.pruning import methods
from lib.pruning.methods import Target
from lib.studies.damage import spending
from lib.studies.pruning import runs
from lib.studies.pruning.bench import Bench
from tests import tiny


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_losses_are_those_of_every_calibration_under_every_set_of_masks(tmp_path: Path) -> None:
    """Sets are shared by all calibrations, whatever the bench says, and the dense model is alike in all of them."""
    bench = Bench(tiny.model(tmp_path, causal=False), tiny.ids(8, 12), tiny.ids(3, 12, seed=1), 3, 2, 5, own_masks=True)
    recipe = replace(methods.RELEASE["sink_wanda"], inputs=Inputs("noised", levels=2))
    chosen = {"Wanda": methods.RELEASE["wanda"], "recipe": recipe}
    measured = spending.losses_by_masks(bench, chosen, Target(0.5), seeds=[2, 8], sets=2)
    found = measured.losses
    assert measured.calibrating > 0 and measured.reading > 0
    assert {name: tuple(values.shape) for name, values in found.items()} == dict.fromkeys(("dense", "Wanda", "recipe"), (2, 3, 2))
    for name, method in chosen.items():
        for row, seed in enumerate((2, 8)):
            for at in range(2):
                shared = replace(bench, own_masks=False, seed=5 + at)
                wanted = runs.compare(shared, {"x": method}, [Target(0.5)], seeds=[seed])[0].loss
                assert torch.allclose(found[name][row, :, at].to(wanted), wanted, rtol=1e-6)
    assert torch.equal(found["dense"][0], found["dense"][1]) and not torch.equal(found["dense"][0, :, 0], found["dense"][0, :, 1])


def test_planted_components_come_back_and_promise_the_right_errors() -> None:
    a, b, n = 40, 60, 30
    values = (
        0.3
        + 1.0 * noise(a, 1, 1, seed=1)
        + 2.0 * noise(1, b, 1, seed=2)
        + 3.0 * noise(1, b, n, seed=3)
        + 0.5 * noise(a, b, n, seed=4)
    )
    row = spending.table({"x": values}, calibrations=4, windows=9).iloc[0]
    whole = 1.0 + 4.0 + 9.0 + 0.25
    found = [row["calibrations, %"], row["windows, %"], row["calibrations x windows, %"], row["masks, %"], row["rest, %"]]
    assert found == pytest.approx([100 / whole, 400 / whole, 0.0, 900 / whole, 25 / whole], rel=0.4, abs=0.5)
    assert row["mean"] == pytest.approx(float(values.mean()))
    shared, own = math.sqrt(1 / 4 + 4 / 9 + 9 / 9 + 0.25 / 36), math.sqrt(1 / 4 + 4 / 9 + 9 / 36 + 0.25 / 36)
    assert row["standard error, same masks"] == pytest.approx(shared, rel=0.2)
    assert row["standard error, own masks"] == pytest.approx(own, rel=0.2)
    assert row["times narrower"] == pytest.approx(row["standard error, same masks"] / row["standard error, own masks"])
    more = spending.table({"x": values}, calibrations=4, windows=9, sets=5).iloc[0]
    assert more["standard error, same masks"] == pytest.approx(math.sqrt(1 / 4 + 4 / 9 + 9 / 45 + 0.25 / 180), rel=0.2)
    assert more["standard error, own masks"] == pytest.approx(math.sqrt(1 / 4 + 4 / 9 + 9 / 180 + 0.25 / 180), rel=0.2)


def test_the_best_spending_costs_what_the_plan_costs_and_errs_less() -> None:
    """Where calibrations make the variance and cost little, the best has more of them; where they cost much, fewer."""
    values = 1.0 * noise(40, 1, 1, seed=1) + 1.0 * noise(1, 60, 1, seed=2) + 2.0 * noise(1, 60, 20, seed=3)
    planned = {"calibrations": 4, "windows": 30, "sets": 3, "draws": 2}
    cheap, dear = (spending.table({"x": values}, **planned, per_calibration=cost).iloc[0] for cost in (1.0, 200.0))
    for row, cost in ((cheap, 1.0), (dear, 200.0)):
        spent = row["best calibrations"] * (cost + row["best windows"] * row["best masks"])
        assert spent <= 4 * (cost + 30 * 3 * 2) and row["best windows"] <= 30
        assert row["standard error, best"] <= row["standard error, own masks"]
    assert cheap["best calibrations"] > dear["best calibrations"] > 4 and cheap["best masks"] == 2


def test_no_variance_at_all_has_no_shares() -> None:
    row = spending.table({"x": torch.ones(2, 3, 2)}, calibrations=2, windows=3).iloc[0]
    assert math.isnan(row["masks, %"]) and row["standard error, own masks"] == 0 and math.isnan(row["times narrower"])


def test_masks_of_their_own_narrow_the_interval_where_masks_make_the_variance() -> None:
    """Four calibrations of one gain, whose masks differ or not: only then are masks averaged over."""
    widths = {}
    for own in (False, True):
        masks = noise(4 if own else 1, 48, seed=9).expand(4, -1)
        gain = 0.1 + masks + 0.05 * noise(4, 48, seed=10)
        low, high = paired.paired_difference(gain, 0 * gain, seed=0).interval
        widths[own] = high - low
    assert widths[False] / widths[True] > 1.5

"""The share of the damage that a change recovers, and when it counts as none."""

import math

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.evaluation import paired, recovered
from lib.evaluation.recovered import Recovered
from lib.studies.pruning import gain_tables

UNITS = 40


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture
def losses() -> tuple[Tensor, Tensor]:
    """Dense losses by window, and those of a baseline by calibration and window: damage differs much between windows."""
    dense = 4.0 + drawn(1, UNITS, seed=1).abs()
    return dense, dense + 0.2 + drawn(3, UNITS, seed=2).abs()


def test_a_constant_share_is_certain_however_much_damage_varies(losses: tuple[Tensor, Tensor]) -> None:
    dense, base = losses
    found = recovered.share_recovered(base - 0.3 * (base - dense), base, dense, bound=0.1, seed=0)
    assert found.estimate == pytest.approx(0.3)
    assert found.interval == pytest.approx((0.3, 0.3))  # resampling gain and damage apart would make it wide
    assert found.p_value < 1e-3 and found.p_within > 0.99 and found.n == UNITS


def test_the_share_is_a_ratio_of_means_and_not_a_mean_of_ratios(losses: tuple[Tensor, Tensor]) -> None:
    dense, base = losses
    first = base - 0.05 * torch.arange(UNITS) / UNITS
    found = recovered.share_recovered(first, base, dense, bound=0.1, seed=0)
    ratio = float((base - first).mean() / (base - dense).mean())
    assert found.estimate == pytest.approx(ratio)
    assert abs(float(((base - first) / (base - dense)).mean()) - ratio) > 0.005
    gains, damages = paired.resampled_means(torch.stack([base - first, base - dense]), seed=0)
    low, high = torch.quantile(gains / damages, torch.tensor([0.025, 0.975]).double()).tolist()
    assert found.interval == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("share", "within"), [(0.0, True), (0.05, True), (-0.05, True), (0.1, False), (-0.1, False), (0.2, False)]
)
def test_no_effect_means_inside_of_the_bound_on_both_sides(losses: tuple[Tensor, Tensor], share: float, within: bool) -> None:
    dense, base = losses
    first = base - share * (base - dense) + 0.01 * drawn(3, UNITS, seed=3)
    found = recovered.share_recovered(first, base, dense, bound=0.1, seed=0)
    assert (found.p_within < 0.05) == within


def test_noise_as_large_as_the_bound_shows_neither(losses: tuple[Tensor, Tensor]) -> None:
    dense, base = losses
    found = recovered.share_recovered(base + 3.0 * drawn(3, UNITS, seed=4), base, dense, bound=0.05, seed=0)
    assert found.p_within > 0.05 and found.p_value > 0.05
    assert found.interval is not None and (found.interval[0] < -0.05 or found.interval[1] > 0.05)


def test_one_calibration_of_the_baseline_pairs_with_many(losses: tuple[Tensor, Tensor]) -> None:
    dense, base = losses
    found = recovered.share_recovered(base, base[:1], dense, bound=0.1, seed=0)
    assert found.estimate == pytest.approx(float((base[:1] - base).mean() / (base[:1] - dense).mean()))
    assert found.interval is not None and found.estimate is not None
    assert found.interval[0] < found.estimate < found.interval[1]


def test_resamples_without_damage_bound_nothing(losses: tuple[Tensor, Tensor]) -> None:
    dense, _ = losses
    noise = drawn(1, UNITS, seed=5)
    base = dense + 0.4 + noise - noise.mean()  # 2.5 standard errors
    found = recovered.share_recovered(base - 0.01, base, dense, bound=0.1, seed=0)
    assert found.estimate == pytest.approx(0.025) and found.interval == (-math.inf, math.inf)


def test_nonsense_is_refused(losses: tuple[Tensor, Tensor]) -> None:
    dense, base = losses
    for bound in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(InputError, match="bound of no effect must be in"):
            recovered.share_recovered(base, base, dense, bound=bound, seed=0)
    for threshold in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match="threshold of a share must be in"):
            recovered.share_recovered(base, base, dense, bound=0.1, threshold=threshold, seed=0)
    with pytest.raises(InputError, match="first and second must have the same units"):
        recovered.share_recovered(base, base, dense[:, 1:], bound=0.1, seed=0)


def test_there_is_no_share_of_a_damage_that_may_be_none(losses: tuple[Tensor, Tensor]) -> None:
    """A damage whose interval holds 0, none at all, and a model that pruning made better: no number, and no verdict."""
    dense, base = losses
    noise = drawn(1, UNITS, seed=5)
    for baseline in (dense + 0.05 + noise - noise.mean(), dense, dense - (base - dense)):
        found = recovered.share_recovered(baseline - 0.5, baseline, dense, bound=0.1, seed=0)
        assert found.estimate is None and found.interval is None
        assert gain_tables.verdict_by_share(found, adjusted=found.p_value, adjusted_within=found.p_within) == "inconclusive"


def test_the_p_value_is_of_the_threshold_and_not_of_a_gain(losses: tuple[Tensor, Tensor]) -> None:
    dense, base = losses
    first = base - 0.3 * (base - dense) + 0.01 * drawn(3, UNITS, seed=6)
    shares = {at: recovered.share_recovered(first, base, dense, bound=0.1, threshold=at, seed=0) for at in (0.0, 0.1, 0.3, 0.5)}
    assert shares[0.0].p_value == shares[0.1].p_value == shares[0.5].p_value == 1e-4  # of 9999 flips and the observed one
    assert shares[0.3].p_value > 0.05
    expected = {0.0: "reproduced", 0.1: "reproduced", 0.3: "inconclusive", 0.5: "not reproduced"}
    for at, found in shares.items():
        assert gain_tables.verdict_by_share(found, adjusted=found.p_value, adjusted_within=found.p_within) == expected[at]


def test_intervals_and_tests_hold_what_they_promise() -> None:
    """60 simulated experiments with a true share at the bound: windows differ in damage, gains in windows and calibrations."""
    share, times, hits = 0.2, 60, {"covered": 0, "within": 0, "beyond": 0, "no effect": 0}
    for seed in range(times):
        damage = 0.05 * (1.0 + 0.5 * drawn(1, 48, seed=seed)) + 0.01 * drawn(4, 48, seed=1000 + seed)
        noise = 0.012 * drawn(1, 48, seed=2000 + seed) + 0.01 * drawn(4, 48, seed=3000 + seed)
        dense = 4.0 + drawn(1, 48, seed=4000 + seed).abs()
        found = recovered.share_recovered(
            dense + (1.0 - share) * damage - noise, dense + damage, dense, bound=share, threshold=share, seed=seed
        )
        assert found.interval is not None
        hits["covered"] += found.interval[0] <= share <= found.interval[1]
        hits["within"] += found.p_within < 0.05
        hits["beyond"] += found.p_value < 0.05
        judged = gain_tables.verdict_by_share(found, adjusted=found.p_value, adjusted_within=found.p_within)
        hits["no effect"] += judged == "no effect of that size"
    margin = 3 * (0.05 * 0.95 * times) ** 0.5  # three standard errors of a count with probability 0.05
    assert abs(hits["covered"] - 0.95 * times) < margin
    assert abs(hits["within"] - 0.05 * times) < margin and abs(hits["beyond"] - 0.05 * times) < margin
    assert hits["no effect"] <= hits["within"]


def test_the_papers_shares_by_hand() -> None:
    """(sink-aware - baseline) / (dense - baseline), from the tables of the release's README."""
    found = {(pattern, method, sparsity, task): share for pattern, method, sparsity, task, share in recovered.paper_shares()}
    wanda, sparsegpt = ("unstructured", "sink-aware (Wanda)", 0.5), ("unstructured", "sink-aware (SparseGPT)", 0.5)
    assert found[*wanda, "Avg"] == pytest.approx((53.18 - 52.70) / (57.93 - 52.70)) == pytest.approx(0.0918, abs=5e-5)
    assert found[*sparsegpt, "Avg"] == pytest.approx(0.02 / 5.59) == pytest.approx(0.0036, abs=5e-5)
    assert found[*wanda, "GSM8K"] == pytest.approx(-1.13 / 12.28)  # harms
    assert found[*sparsegpt, "WinoG"] == pytest.approx(1.18 / 4.66)
    assert found["structured", "Sink-Aware", 0.3, "PIQA"] == pytest.approx((69.55 - 68.34) / (74.10 - 68.34))
    assert found["structured", "Sink-Aware", 0.5, "ARC-C"] == pytest.approx((23.62 - 20.39) / (43.00 - 20.39))
    assert {key[3] for key in found if key[0] == "structured"} == {"PIQA", "WinoG", "ARC-C", "Avg"}  # no dense ARC-E is printed
    assert len(found) == 3 * 7 + 2 * 4
    assert found["unstructured", "Wanda", 0.5, "Avg"] == pytest.approx(0.36 / 5.59)  # of what SparseGPT loses
    for ratio, share in ((0.3, 2.71 / 13.96), (0.5, 6.14 / 51.31)):  # points of all three tasks together, not a mean of ratios
        ratios = [found["structured", "Sink-Aware", ratio, task] for task in ("PIQA", "WinoG", "ARC-C")]
        assert recovered.paper_share("Sink-Aware", pattern="structured", sparsity=ratio) == pytest.approx(share)
        assert abs(sum(ratios) / 3 - share) > 0.003
    assert math.isnan(recovered.paper_share("Wanda", sparsity=0.3)) and math.isnan(recovered.paper_share("DWANDA"))


@pytest.mark.parametrize(
    ("interval", "adjusted", "within", "threshold", "expected"),
    [
        ((0.01, 0.2), 0.01, 1.0, 0.0, "reproduced"),
        ((0.01, 0.2), 0.06, 1.0, 0.0, "inconclusive"),
        ((0.01, 0.04), 0.01, 0.01, 0.0, "reproduced"),  # a small gain is a gain, also within the bounds
        ((0.01, 0.04), 0.06, 0.01, 0.0, "no effect of that size"),
        ((-0.04, 0.04), 0.9, 0.01, 0.0, "no effect of that size"),
        ((-0.04, 0.05), 0.9, 0.01, 0.0, "inconclusive"),  # the whole interval, ends too
        ((-0.05, 0.04), 0.9, 0.01, 0.0, "inconclusive"),
        ((-0.2, -0.01), 0.01, 1.0, 0.0, "not reproduced"),
        ((-0.2, -0.01), 0.06, 1.0, 0.0, "inconclusive"),
        ((0.06, 0.2), 0.01, 1.0, 0.05, "reproduced"),
        ((0.01, 0.2), 0.01, 1.0, 0.05, "inconclusive"),
        ((-0.01, 0.04), 0.9, 0.2, 0.05, "inconclusive"),  # the threshold is tested, too
        ((-0.01, 0.04), 0.01, 0.2, 0.05, "not reproduced"),
        ((-0.01, 0.04), 0.01, 0.01, 0.05, "no effect of that size"),  # says more than that it is below
        ((-0.2, 0.04), 0.01, 1.0, 0.05, "not reproduced"),
        ((-0.04, -0.01), 0.01, 0.01, 0.0, "not reproduced"),  # a small harm is a harm
        (None, 0.001, 0.001, 0.0, "inconclusive"),  # no damage that is sure
        ((-math.inf, math.inf), 0.001, 0.001, 0.0, "inconclusive"),
    ],
)
def test_verdicts_by_share(
    interval: tuple[float, float] | None, adjusted: float, within: float, threshold: float, expected: str
) -> None:
    found = Recovered(0.0 if interval else None, interval, adjusted, within, 0.05, UNITS, threshold)
    assert gain_tables.verdict_by_share(found, adjusted=adjusted, adjusted_within=within) == expected

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
    assert found.interval[0] < -0.05 or found.interval[1] > 0.05


def test_one_calibration_of_the_baseline_pairs_with_many(losses: tuple[Tensor, Tensor]) -> None:
    dense, base = losses
    found = recovered.share_recovered(base, base[:1], dense, bound=0.1, seed=0)
    assert found.estimate == pytest.approx(float((base[:1] - base).mean() / (base[:1] - dense).mean()))
    assert found.interval[0] < found.estimate < found.interval[1]


def test_resamples_without_damage_bound_nothing(losses: tuple[Tensor, Tensor]) -> None:
    dense, _ = losses
    noise = drawn(1, UNITS, seed=5)
    base = dense + 0.01 + noise - noise.mean()
    assert recovered.share_recovered(base - 0.01, base, dense, bound=0.1, seed=0).interval == (-math.inf, math.inf)


def test_nonsense_is_refused(losses: tuple[Tensor, Tensor]) -> None:
    dense, base = losses
    for bound in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(InputError, match="bound of no effect must be in"):
            recovered.share_recovered(base, base, dense, bound=bound, seed=0)
    with pytest.raises(InputError, match="needs damage on average"):
        recovered.share_recovered(base, dense, base, bound=0.1, seed=0)


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
        ((-0.01, 0.04), 0.9, 0.2, 0.05, "not reproduced"),  # of a size that the whole interval excludes
    ],
)
def test_verdicts_by_share(
    interval: tuple[float, float], adjusted: float, within: float, threshold: float, expected: str
) -> None:
    found = Recovered(sum(interval) / 2, interval, adjusted, within, 0.05, UNITS)
    judged = gain_tables.verdict_by_share(found, adjusted=adjusted, adjusted_within=within, threshold=threshold)
    assert judged == expected

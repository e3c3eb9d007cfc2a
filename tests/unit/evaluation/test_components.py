"""Variance components of simulated differences, and the best way to spend forward passes."""

import itertools

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.evaluation import components
from lib.evaluation.components import Components

KNOWN = Components(calibration=0.5, window=2.0, both=1.0, masks=3.0, rest=4.0)


def simulated(found: Components, a: int, b: int, n: int, *, generator: torch.Generator) -> Tensor:
    """Differences of a calibrations, b windows and n draws each, whose components are known."""
    shapes = {"calibration": (a, 1, 1), "window": (1, b, 1), "both": (a, b, 1), "masks": (1, b, n), "rest": (a, b, n)}
    parts = [
        getattr(found, name) ** 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    ]
    return 7.0 + torch.stack([part.expand(a, b, n) for part in parts]).sum(0)


def test_components_are_unbiased() -> None:
    stream = torch.Generator().manual_seed(0)
    found = [components.components(simulated(KNOWN, 3, 6, 4, generator=stream)) for _ in range(1000)]
    for name in ("calibration", "window", "both", "masks", "rest"):
        values = torch.tensor([getattr(one, name) for one in found]).double()
        assert abs(values.mean() - getattr(KNOWN, name)) < 4 * values.std() / 1000**0.5, name


@pytest.mark.parametrize("name", ["calibration", "window", "both", "masks", "rest"])
def test_each_part_is_found_where_it_is_alone(name: str) -> None:
    alone = Components(**{**dict.fromkeys(("calibration", "window", "both", "masks", "rest"), 0.0), name: 1.0})
    found = components.components(simulated(alone, 40, 40, 40, generator=torch.Generator().manual_seed(1)))
    for other in ("calibration", "window", "both", "masks", "rest"):
        # A variance of 39 degrees of freedom has a relative error of sqrt(2 / 39).
        assert getattr(found, other) == pytest.approx(float(other == name), abs=0.7 if other == name else 0.02), other


def test_the_variance_of_the_mean_is_that_of_simulated_means() -> None:
    stream = torch.Generator().manual_seed(2)
    means = torch.stack([simulated(KNOWN, 2, 5, 3, generator=stream).mean() for _ in range(1500)])
    expected = KNOWN.variance(calibrations=2, windows=5, draws=3)
    assert float(means.var()) == pytest.approx(expected, rel=4 * (2 / 1500) ** 0.5)
    masks = 3.0**0.5 * torch.randn(1500, 2, 5, 3, generator=stream).double().mean((1, 2, 3))  # others for each calibration
    without = Components(0.5, 2.0, 1.0, 0.0, 4.0)
    apart = torch.stack([simulated(without, 2, 5, 3, generator=stream).mean() for _ in masks]) + masks
    expected = KNOWN.variance(calibrations=2, windows=5, draws=3, own_masks=True)
    assert float(apart.var()) == pytest.approx(expected, rel=4 * (2 / 1500) ** 0.5)
    assert Components(-1.0, 2.0, -1.0, -1.0, -1.0).variance(calibrations=1, windows=4, draws=1) == 0.5


@pytest.mark.parametrize("per_calibration", [0.0, 5.0, 11.5])
@pytest.mark.parametrize(("per_draw", "own_masks"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize(
    "found",
    [
        KNOWN,
        Components(0.0, 1.0, 0.0, 9.0, 0.0),
        Components(2.0, 0.1, 0.1, 0.1, 5.0),
        Components(1.0, 1.0, 1.0, 0.0, -0.5),
        Components(1.0, -1.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_best_spending_is_that_of_brute_force(
    found: Components, per_draw: int, own_masks: bool, per_calibration: float
) -> None:
    budget, most_windows = 60.0, 9
    allowed = [
        (found.variance(calibrations=a, windows=b, draws=n, own_masks=own_masks), a * (per_calibration + per_draw * b * n))
        for a, b, n in itertools.product(range(2, 61), range(1, most_windows + 1), range(1, 61))
        if a * (per_calibration + per_draw * b * n) <= budget
    ]
    options = {"budget": budget, "most_windows": most_windows, "per_calibration": per_calibration}
    best = components.best_spending(found, **options, per_draw=per_draw, own_masks=own_masks)
    assert best.standard_error**2 == pytest.approx(min(allowed)[0])
    assert best.passes == best.calibrations * (per_calibration + per_draw * best.windows * best.draws) <= budget
    assert best.windows <= most_windows and best.calibrations >= 2


def test_draws_are_bought_only_where_masks_matter() -> None:
    options = {"budget": 100.0, "most_windows": 10}
    without = components.best_spending(Components(0.0, 1.0, 0.0, 0.0, 0.0), **options)
    assert (without.calibrations, without.windows, without.draws, without.passes) == (2, 10, 1, 20.0)
    assert components.best_spending(Components(0.0, 1.0, 0.0, 1.0, 0.0), **options).draws == 5


def test_nonsense_is_refused() -> None:
    for shape in ((1, 3, 3), (3, 1, 3), (3, 3, 1)):
        with pytest.raises(InputError, match="two calibrations, windows and draws"):
            components.components(torch.zeros(shape))
    with pytest.raises(InputError, match="must be finite"):
        components.components(torch.full((2, 2, 2), torch.nan))
    with pytest.raises(InputError, match="a budget must reach"):
        components.best_spending(KNOWN, budget=11.0, most_windows=3, per_calibration=5.0)

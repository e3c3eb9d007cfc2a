"""What must hold for every comparison: symmetry, shifts, coverage, and the order of adjusted p-values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.evaluation.paired import factorial_effects, holm, mcnemar, paired_difference

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")

SEEDS = st.integers(0, 2**31 - 1)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Values `[seed, unit]` in 64ths, so that sums do not round; one side may have a single seed."""
    seeds, units = draw(st.integers(1, 4)), draw(st.integers(2, 20))
    rows = draw(st.sampled_from([(seeds, seeds), (1, seeds), (seeds, 1)]))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    first, second = (torch.randint(-200, 200, (count, units), generator=generator).double() / 64 for count in rows)
    return first, second


@given(pairs(), SEEDS)
def test_swapping_turns_the_sign_and_the_interval(case: tuple[Tensor, Tensor], seed: int) -> None:
    first, second = case
    there, back = (paired_difference(*pair, seed=seed, draws=200) for pair in ((first, second), (second, first)))
    assert back.estimate == -there.estimate and back.effect_size == -there.effect_size
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]), abs=1e-12)
    assert (back.p_value, back.smallest_effect, back.n) == (there.p_value, there.smallest_effect, there.n)


@given(pairs(), SEEDS, st.integers(-500, 500))
def test_a_constant_shifts_and_changes_no_spread(case: tuple[Tensor, Tensor], seed: int, steps: int) -> None:
    first, second = case
    constant = steps / 64
    before = paired_difference(first, second, seed=seed, draws=200)
    after = paired_difference(first + constant, second, seed=seed, draws=200)
    assert after.estimate == pytest.approx(before.estimate + constant, abs=1e-9)
    assert after.interval == pytest.approx([end + constant for end in before.interval], abs=1e-9)
    assert after.smallest_effect == pytest.approx(before.smallest_effect, abs=1e-9)
    both = paired_difference(first + constant, second + constant, seed=seed, draws=200)
    assert both == before


@given(pairs(), SEEDS, st.sampled_from([0.25, 8.0]))
def test_the_unit_of_the_values_does_not_matter(case: tuple[Tensor, Tensor], seed: int, scale: float) -> None:
    before, after = (paired_difference(factor * case[0], factor * case[1], seed=seed, draws=200) for factor in (1.0, scale))
    assert after.p_value == before.p_value and after.effect_size == pytest.approx(before.effect_size)
    assert after.interval == pytest.approx([scale * end for end in before.interval])
    assert after.smallest_effect == pytest.approx(scale * before.smallest_effect)


@given(pairs(), SEEDS)
def test_results_stay_within_their_bounds(case: tuple[Tensor, Tensor], seed: int) -> None:
    difference = case[0] - case[1]
    result = paired_difference(*case, seed=seed, draws=200)
    low, high = result.interval
    assert difference.min() - 1e-9 <= low <= result.estimate <= high <= difference.max() + 1e-9
    assert 0 < result.p_value <= 1 and result.smallest_effect >= 0 and result.n == difference.shape[1]
    if result.n <= 13:  # the observed signs and their mirror are always among the patterns
        assert result.p_value >= 2 / 2**result.n


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40), SEEDS)
def test_mcnemar_is_symmetric_and_blind_to_the_order(marks: list[tuple[bool, bool]], seed: int) -> None:
    first, second = ([mark[side] for mark in marks] for side in (0, 1))
    there, back = mcnemar(first, second, seed=seed, draws=100), mcnemar(second, first, seed=seed, draws=100)
    assert (back.only_first, back.only_second, back.difference) == (there.only_second, there.only_first, -there.difference)
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]), abs=1e-12)
    moved = mcnemar(first[::-1], second[::-1], seed=seed, draws=100)
    assert moved.p_value == back.p_value == there.p_value and moved.smallest_effect == there.smallest_effect
    assert (there.p_value < 0.05) == (abs(there.difference) >= there.smallest_effect - 1e-12)


@given(P_VALUES)
def test_holm_never_lowers_and_keeps_the_order(raw: list[float]) -> None:
    adjusted = list(holm(dict(enumerate(raw))).values())
    assert all(p <= found <= min(1.0, len(raw) * p + 1e-15) for p, found in zip(raw, adjusted, strict=True))
    ranked = [found for _, found in sorted(zip(raw, adjusted, strict=True))]
    assert ranked == sorted(ranked)
    assert min(adjusted) == min(1.0, len(raw) * min(raw))


@given(P_VALUES, st.floats(0, 1))
def test_one_more_test_never_helps_the_others(raw: list[float], extra: float) -> None:
    alone, joined = holm(dict(enumerate(raw))), holm(dict(enumerate([*raw, extra])))
    assert all(joined[key] >= alone[key] for key in alone)


@settings(max_examples=20)
@given(st.integers(1, 3), SEEDS)
def test_renaming_levels_turns_the_effects_of_that_factor(factors: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = np.ndindex(*(2,) * factors)
    cells = {key: torch.randint(-200, 200, (2, 6), generator=generator).double() / 64 for key in levels}
    names = ["a", "b", "c"][:factors]
    before = factorial_effects(cells, names, seed=0, draws=100)
    after = factorial_effects({(1 - key[0], *key[1:]): cell for key, cell in cells.items()}, names, seed=0, draws=100)
    turned = before["effect"].str.split(" x ").map(lambda parts: -1 if "a" in parts else 1)
    np.testing.assert_allclose(after["estimate"], turned * before["estimate"], atol=1e-12)
    np.testing.assert_allclose(after["low"], (turned * before[["low", "high"]].T).T.min(axis=1), atol=1e-12)
    assert after["p"].equals(before["p"])


# --- coverage ------------------------------------------------------------------------------------------------------------


def coverage(seeds: int, *, seed_spread: float, tables: int = 250) -> float:
    """How often the interval holds a true difference of 0.3, over tables of 40 units."""
    generator = torch.Generator().manual_seed(11)
    held = 0
    for index in range(tables):
        parts = [torch.randn(shape, generator=generator) for shape in ((seeds, 1), (1, 40), (seeds, 40))]
        table = 0.3 + seed_spread * parts[0] + parts[1] + 0.3 * parts[2]
        low, high = paired_difference(table, torch.zeros(40), seed=index, draws=300).interval
        held += low <= 0.3 <= high
    return held / tables


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    """The standard error of a share of 0.95 in 250 tables is 0.014; percentile intervals of 40 units cover a bit less."""
    assert 0.90 <= coverage(1, seed_spread=0.0) <= 0.985


def test_the_interval_covers_new_seeds_too() -> None:
    """Half of the variance is that of ten seeds: units alone would cover about 83 times in 100."""
    assert 0.90 <= coverage(10, seed_spread=0.5) <= 0.985

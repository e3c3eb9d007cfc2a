"""Paired differences, McNemar, Holm and factorial effects: against enumeration, scipy, least squares and planted models."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lib.core.errors import InputError
from lib.evaluation import paired
from lib.evaluation.paired import factorial_effects, holm, mcnemar, paired_difference

LEVELS: list[tuple[int, ...]] = list(itertools.product((0, 1), repeat=3))
FACTORS = ["noised", "weights", "depth"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_sign_flip(differences: list[float]) -> float:
    """Share of all sign patterns whose mean is at least as far from 0; equal sums count, however they round."""
    observed = abs(math.fsum(differences))
    patterns = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(math.fsum(sign * value for sign, value in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(total >= observed - 1e-9 for total in sums) / len(sums)


def slow_holm(p_values: list[float]) -> list[float]:
    """Closed testing: a hypothesis falls when every intersection that holds it falls by Bonferroni."""
    indices = range(len(p_values))
    families = [family for size in range(1, len(p_values) + 1) for family in itertools.combinations(indices, size)]
    bonferroni = {family: min(1.0, len(family) * min(p_values[index] for index in family)) for family in families}
    return [max(value for family, value in bonferroni.items() if index in family) for index in indices]


def additive(seeds: int, units: int, *, seed: int = 1) -> Tensor:
    """Values whose spread is a part by seed plus a part by unit, so that the bootstrap variance is known."""
    return 0.7 + 0.8 * normal(seeds, 1, seed=seed) + normal(1, units, seed=seed + 1)


def cells_of(effect: Mapping[tuple[int, ...], float], *, seeds: int = 2, units: int = 6) -> dict[tuple[int, ...], Tensor]:
    """Cells of a 2^3 factorial: the same units and seeds, plus what the planted effects add (half up, half down)."""
    base = 5.0 + normal(seeds, units, seed=3)
    added = {
        levels: sum(size / 2 * math.prod(2 * levels[index] - 1 for index in subset) for subset, size in effect.items())
        for levels in LEVELS
    }
    return {levels: base + added[levels] for levels in LEVELS}


# --- paired differences --------------------------------------------------------------------------------------------------


def test_a_difference_by_hand() -> None:
    first, second = torch.tensor([2.0, 4.0, 9.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 2.0])
    result = paired_difference(first, second, seed=0)  # differences 1, 2, 6, -1
    assert result.estimate == 2.0 and result.n == 4
    deviation = math.sqrt((1 + 0 + 16 + 9) / 3)  # over n - 1
    assert result.effect_size == pytest.approx(2.0 / deviation)
    assert result.smallest_effect == pytest.approx(2.8015852 * deviation / 2)
    # |sum| >= 8: (1, 2, 6, -1), its mirror, (-1, 2, 6, 1), its mirror, and all of one sign
    assert result.p_value == 6 / 16
    assert -1.0 <= result.interval[0] < 2.0 < result.interval[1] <= 6.0


@pytest.mark.parametrize("units", [2, 5, 8, 13])
def test_few_units_give_the_exact_p_value(units: int) -> None:
    differences = normal(units, seed=units) + 0.4
    result = paired_difference(differences, torch.zeros(units), seed=0)
    known = stats.permutation_test((differences.numpy(),), np.mean, permutation_type="samples", n_resamples=2**units)
    assert result.p_value == pytest.approx(known.pvalue, abs=1e-12)
    if units < 13:
        assert result.p_value == slow_sign_flip(differences.tolist())
    assert paired_difference(differences, torch.zeros(units), seed=9).p_value == result.p_value


def test_ties_count_as_extreme_though_their_sums_round() -> None:
    differences = torch.tensor([0.1, 0.2, 0.3, 0.7, 0.6, -0.1], dtype=torch.float64)
    result = paired_difference(differences, torch.zeros(6), seed=0)
    assert result.p_value == slow_sign_flip(differences.tolist())


@pytest.mark.parametrize("shift", [0.0, 0.2, 0.35])
def test_many_units_give_the_p_value_of_the_t_test(shift: float) -> None:
    differences = normal(150, seed=4) + shift
    result = paired_difference(differences, torch.zeros(150), seed=0)
    _, known = stats.ttest_1samp(differences.numpy(), 0.0)
    assert result.p_value == pytest.approx(known, abs=0.02)


def test_a_monte_carlo_p_value_counts_the_observed_signs() -> None:
    result = paired_difference(normal(200) + 9.0, torch.zeros(200), seed=0)
    assert result.p_value == 1 / (paired.FLIPS + 1)


def test_the_interval_is_that_of_the_mean_of_independent_units() -> None:
    differences = normal(400, seed=5)
    result = paired_difference(differences, torch.zeros(400), seed=0)
    half = 1.959964 * float(differences.std()) / 20
    assert result.interval == pytest.approx((result.estimate - half, result.estimate + half), abs=0.12 * half)


def test_pairing_removes_what_the_units_share() -> None:
    base = 100.0 * normal(60, seed=6)
    result = paired_difference(base + 1.0 + 0.1 * normal(60, seed=7), base, seed=0)
    assert result.interval[0] > 0.9 and result.interval[1] < 1.1 and result.p_value < 0.001


@pytest.mark.parametrize("seeds", [1, 4, 12])
def test_the_interval_holds_both_the_spread_of_seeds_and_that_of_units(seeds: int) -> None:
    """In an additive table the bootstrap variance is var(seeds) / S + var(units) / n, with divisors S and n."""
    table = additive(seeds, 50)
    result = paired_difference(table, torch.zeros(50), seed=0, draws=8000)
    by_seed, by_unit = table.mean(1), table.mean(0)
    variance = by_seed.var(correction=0) / seeds + by_unit.var(correction=0) / 50
    width = result.interval[1] - result.interval[0]
    # With four seeds their mean is far from normal, which moves the percentiles by a few per cent.
    assert width == pytest.approx(2 * 1.959964 * math.sqrt(float(variance)), rel=0.08)
    assert result.estimate == pytest.approx(float(table.mean()))


def test_units_and_seeds_are_drawn_separately() -> None:
    """Cells drawn one by one would narrow the interval of seeds that differ by sqrt(50)."""
    table = (0.8 * normal(6, 1)).expand(6, 50)
    result = paired_difference(table, torch.zeros(50), seed=0)
    deviation = float(table[:, 0].std(correction=0)) / math.sqrt(6)
    assert (result.interval[1] - result.interval[0]) / (2 * 1.96 * deviation) == pytest.approx(1.0, rel=0.1)


def test_draws_of_seeds_do_not_follow_those_of_units() -> None:
    """On a diagonal table equal draws would give the mean square of the counts, about twice the estimate."""
    low, high = paired_difference(25.0 * torch.eye(25), torch.zeros(25), seed=0).interval
    assert low < 0.7 and high < 2.2


def test_p_value_and_deviation_are_of_the_units_with_seeds_averaged() -> None:
    table = additive(3, 12)
    result = paired_difference(table, torch.zeros(12), seed=0)
    averaged = paired_difference(table.mean(0), torch.zeros(12), seed=0)
    for name in ("estimate", "p_value", "effect_size", "smallest_effect", "n"):
        assert getattr(result, name) == pytest.approx(getattr(averaged, name))
    assert result.interval[1] - result.interval[0] > averaged.interval[1] - averaged.interval[0]


def test_equal_seeds_change_nothing_and_one_seed_meets_all() -> None:
    first, second = normal(1, 30, seed=8), normal(30, seed=9)
    single = paired_difference(first, second, seed=2)
    assert paired_difference(first[0], second, seed=2) == single
    repeated = paired_difference(first.expand(4, 30), second, seed=2)
    assert repeated.interval == pytest.approx(single.interval) and repeated.p_value == single.p_value
    several = normal(4, 30, seed=10)
    assert paired_difference(several, second, seed=2) == paired_difference(several, second.expand(4, 30), seed=2)


def test_seeds_are_paired_in_order() -> None:
    second = 10.0 * normal(4, 1) + normal(4, 30, seed=1)
    narrow = paired_difference(second + 1.0, second, seed=0)
    wide = paired_difference(second.flip(0) + 1.0, second, seed=0)
    assert narrow.interval == pytest.approx((1.0, 1.0)) and wide.interval[0] < 0 < wide.interval[1]


def test_the_smallest_effect_is_found_four_times_in_five() -> None:
    """By the t test, on samples of 80 pairs with exactly that deviation."""
    samples = np.random.default_rng(0).standard_normal((4000, 80))
    result = paired_difference(torch.from_numpy(samples[0]), torch.zeros(80), seed=0)
    relative = result.smallest_effect / float(samples[0].std(ddof=1))
    _, p_values = stats.ttest_1samp(samples + relative, 0.0, axis=1)
    assert np.mean(np.asarray(p_values) < 0.05) == pytest.approx(0.8, abs=0.025)


def test_differences_without_spread() -> None:
    same = paired_difference(torch.ones(5), torch.ones(5), seed=0)
    assert same == paired.PairedDifference(0.0, (0.0, 0.0), 1.0, 0.0, 0.0, 5)
    shifted = paired_difference(torch.full((5,), 0.1), torch.full((5,), 0.4), seed=0)
    assert shifted.effect_size == -math.inf and shifted.smallest_effect == 0.0 and shifted.p_value == 2 / 32
    for value in (0.1, 0.3, 0.7, 1.1):  # whose means round, each in its own way
        equal = paired_difference(torch.full((3, 7), value, dtype=torch.float64), torch.zeros(7), seed=0)
        assert equal.interval[0] <= equal.estimate <= equal.interval[1] and math.isinf(equal.effect_size)


def test_low_precision_is_widened_before_the_subtraction() -> None:
    first = torch.tensor([4096.0, 4096.0, 4100.0])
    second = torch.tensor([4095.0, 4094.5, 4099.0])
    assert paired_difference(first, second, seed=0).estimate == pytest.approx(3.5 / 3)
    assert paired_difference(first.bfloat16(), (second - 4090).bfloat16(), seed=0).estimate > 4000


def test_results_depend_on_the_seed_alone() -> None:
    first, second = normal(3, 40), normal(3, 40, seed=1)
    torch.manual_seed(1)
    result = paired_difference(first, second, seed=7)
    torch.manual_seed(2)
    assert paired_difference(first, second, seed=7) == result
    other = paired_difference(first, second, seed=8)
    assert other.interval != result.interval and other.p_value != result.p_value and other.estimate == result.estimate


def test_blocks_of_draws_only_save_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = normal(2, 40) + 0.2
    whole = paired_difference(differences, torch.zeros(40), seed=0, draws=1000)
    monkeypatch.setattr(paired, "BLOCK", 40 * 64 + 7)
    parts = paired_difference(differences, torch.zeros(40), seed=0, draws=1000)
    assert parts.p_value == whole.p_value and parts.interval == pytest.approx(whole.interval)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (torch.ones(3), torch.ones(4), "same units"),
        (torch.ones(2, 4), torch.ones(3, 4), "same seeds"),
        (torch.ones(1), torch.ones(1), "two units"),
        (torch.ones(3, 1), torch.ones(3, 1), "two units"),
        (torch.ones(2, 2, 2), torch.ones(2, 2, 2), r"\[seed, unit\]"),
        (torch.ones(0, 3), torch.ones(3), r"\[0, 3\]"),
        (torch.tensor([1.0, math.nan]), torch.ones(2), "first must be finite, got 1"),
        (torch.ones(2), torch.tensor([math.inf, math.nan]), "second must be finite, got 2"),
    ],
)
def test_what_does_not_pair_is_refused(first: Tensor, second: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        paired_difference(first, second, seed=0)


def test_no_draws_are_refused() -> None:
    with pytest.raises(InputError, match="draws must be positive, got 0"):
        paired_difference(torch.ones(3), torch.zeros(3), seed=0, draws=0)


# --- McNemar -------------------------------------------------------------------------------------------------------------


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


@pytest.mark.parametrize(("b", "c"), [(1, 7), (9, 1), (3, 3), (0, 6), (12, 5), (0, 1)])
def test_mcnemar_against_the_binomial_sum(b: int, c: int) -> None:
    result = mcnemar(*answers(20, b, c, 7), seed=0)
    tail = sum(math.comb(b + c, k) for k in range(max(b, c), b + c + 1)) / 2 ** (b + c)
    assert (result.only_first, result.only_second, result.n) == (b, c, 27 + b + c)
    assert result.p_value == pytest.approx(min(1.0, 2 * tail))
    assert result.difference == pytest.approx((b - c) / (27 + b + c))
    assert result.interval[0] <= result.difference <= result.interval[1]


def test_the_interval_of_the_accuracies_is_paired() -> None:
    """Its variance is that of the discordant documents: (b + c - (b - c)^2 / n) / n^2."""
    result = mcnemar(*answers(500, 40, 20, 440), seed=0, draws=8000)
    half = 1.959964 * math.sqrt(60 - 400 / 1000) / 1000
    assert result.interval == pytest.approx((0.02 - half, 0.02 + half), abs=0.0012)


@pytest.mark.parametrize("discordant", [*range(1, 40), 101])
def test_the_smallest_difference_that_mcnemar_finds(discordant: int) -> None:
    result = mcnemar(*answers(5, discordant, 0, 5), seed=0, draws=1)
    leads = [2 * k - discordant for k in range(discordant + 1) if 2 * k > discordant]
    found = [lead for lead in leads if stats.binomtest((discordant + lead) // 2, discordant).pvalue < 0.05]
    assert result.smallest_effect == (found[0] / (discordant + 10) if found else math.inf)
    assert (result.smallest_effect == math.inf) == (discordant < 6)


@pytest.mark.parametrize(("right", "wrong"), [(3, 2), (0, 5), (5, 0), (120, 80)])
def test_equal_answers_of_two_models_have_an_interval_with_a_width(right: int, wrong: int) -> None:
    """None of n documents told them apart, so the next one may: a bootstrap would say [0, 0]."""
    n = right + wrong
    half = 1.959964 / (n + 2)
    found = mcnemar(*answers(right, 0, 0, wrong), seed=0)
    assert found == paired.McNemar(0, 0, 0.0, found.interval, 1.0, math.inf, n)
    assert found.interval == pytest.approx((-half, half))


def test_answers_may_be_tensors() -> None:
    first, second = answers(4, 3, 1, 2)
    assert mcnemar(torch.tensor(first), torch.tensor(second), seed=0) == mcnemar(first, second, seed=0)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([True, False], [True], "same documents"),
        ([True], [True], "two units"),
        ([], [], "one boolean a document"),
        (torch.ones(2, 3).bool(), torch.ones(2, 3).bool(), "one boolean a document"),
    ],
)
def test_answers_that_do_not_pair_are_refused(first: Tensor | list[bool], second: Tensor | list[bool], words: str) -> None:
    with pytest.raises(InputError, match=words):
        mcnemar(first, second, seed=0)


# --- Holm ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.6, 0.5], [1.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
        ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0]),
    ],
)
def test_holm_on_worked_values(raw: list[float], adjusted: list[float]) -> None:
    result = holm(dict(enumerate(raw)))
    assert list(result) == list(range(len(raw)))
    assert list(result.values()) == pytest.approx(adjusted)
    if raw:
        assert slow_holm(raw) == pytest.approx(adjusted)


@pytest.mark.parametrize("wrong", [math.nan, -0.01, 1.5])
def test_holm_refuses_what_is_no_p_value(wrong: float) -> None:
    with pytest.raises(InputError, match=r"in \[0, 1\], got \{'b'"):
        holm({"a": 0.1, "b": wrong})


# --- factorial -----------------------------------------------------------------------------------------------------------


def test_a_planted_additive_model_has_exact_main_effects_and_no_interaction() -> None:
    table = factorial_effects(cells_of({(0,): 3.0, (1,): -1.5, (2,): 0.25}), FACTORS, seed=0).set_index("effect")
    assert list(table.index[:4]) == ["noised", "weights", "depth", "noised x weights"]
    assert table.index[-1] == "noised x weights x depth" and list(table["order"]) == [1, 1, 1, 2, 2, 2, 3]
    assert table["estimate"].tolist() == pytest.approx([3.0, -1.5, 0.25, 0, 0, 0, 0], abs=1e-12)
    assert table["low"].tolist() == pytest.approx(table["high"].tolist(), abs=1e-12)  # the units and seeds cancel


def test_a_planted_interaction_is_recovered() -> None:
    planted = {(0,): 1.0, (0, 2): 2.0, (0, 1, 2): -0.5}
    cells = {levels: cell + 0.01 * normal(2, 6, seed=sum(levels)) for levels, cell in cells_of(planted).items()}
    table = factorial_effects(cells, FACTORS, seed=0).set_index("effect")
    assert table.loc["noised x depth", "estimate"] == pytest.approx(2.0, abs=0.05)
    assert table.loc["noised x weights x depth", "estimate"] == pytest.approx(-0.5, abs=0.05)
    assert table.loc["weights", "estimate"] == pytest.approx(0.0, abs=0.05)
    # what the convention promises: the effect of noised where depth is high is the sum, where it is low the difference
    for level, expected in ((1, 3.0), (0, -1.0)):
        picked = {high: [cells[key].mean() for key in LEVELS if key[0] == high and key[2] == level] for high in (0, 1)}
        simple = float(torch.stack(picked[1]).mean() - torch.stack(picked[0]).mean())
        assert simple == pytest.approx(expected, abs=0.1)
        sign = 2 * level - 1
        combined = table.loc["noised", "estimate"] + sign * table.loc["noised x depth", "estimate"]
        assert combined == pytest.approx(simple)


def test_effects_are_twice_the_coefficients_of_least_squares() -> None:
    cells = {levels: normal(3, 5, seed=index) for index, levels in enumerate(LEVELS)}
    rows, values = [], []
    for levels, cell in cells.items():
        a, b, c = (2 * level - 1 for level in levels)
        rows += [[1, a, b, c, a * b, a * c, b * c, a * b * c]] * cell.numel()
        values += cell.flatten().tolist()
    fitted = np.linalg.lstsq(np.array(rows, dtype=float), np.array(values), rcond=None)[0]
    table = factorial_effects(cells, FACTORS, seed=0)
    assert table["estimate"].tolist() == pytest.approx((2 * fitted[1:]).tolist())


def test_a_main_effect_is_the_paired_difference_of_the_level_means() -> None:
    cells = {levels: normal(3, 8, seed=index) + levels[1] for index, levels in enumerate(LEVELS)}
    means = [torch.stack([cells[key] for key in LEVELS if key[1] == level]).mean(0) for level in (0, 1)]
    expected = paired_difference(means[1], means[0], seed=5)
    row = factorial_effects(cells, FACTORS, seed=5).set_index("effect").loc["weights"]
    assert (row["low"], row["high"]) == pytest.approx(expected.interval)
    assert row["p"] == expected.p_value and row["smallest effect"] == pytest.approx(expected.smallest_effect)
    one = factorial_effects({(0,): means[0], (1,): means[1]}, ["weights"], seed=5)
    assert one[["estimate", "p"]].to_numpy().tolist() == [[pytest.approx(expected.estimate), expected.p_value]]


def test_p_values_are_adjusted_over_all_rows() -> None:
    cells = {levels: normal(2, 9, seed=index) + 1.5 * levels[0] for index, levels in enumerate(LEVELS)}
    table = factorial_effects(cells, FACTORS, seed=0)
    raw, adjusted = table["p"].tolist(), table["p_holm"].tolist()
    assert len(raw) == 7 and adjusted == pytest.approx(slow_holm(raw))
    assert min(raw) == raw[0] and adjusted[0] == pytest.approx(7 * raw[0])
    again = factorial_effects(dict(reversed(cells.items())), FACTORS, seed=0)
    assert again.equals(table)


@pytest.mark.parametrize(
    ("cells", "factors", "words"),
    [
        ({(0,): torch.ones(3)}, ["a"], r"all 2 cells .* got \[\(1,\)\] missing"),
        ({(0,): torch.ones(3), (1,): torch.ones(3), (2,): torch.ones(3)}, ["a"], r"\[\(2,\)\] besides"),
        ({(0,): torch.ones(3), (1,): torch.ones(3)}, ["a", "b"], "all 4 cells"),
        ({(0,): torch.ones(3), (1,): torch.ones(4)}, ["a"], "same .* shape"),
        ({(0,): torch.ones(2, 3), (1,): torch.ones(3)}, ["a"], "same .* shape"),
        ({(0,): torch.ones(2, 1), (1,): torch.ones(2, 1)}, ["a"], "two units"),
        ({(0,): torch.ones(2), (1,): torch.tensor([1.0, math.nan])}, ["a"], r"cell \(1,\) must be finite"),
        ({levels: torch.ones(3) for levels in itertools.product((0, 1), repeat=2)}, ["a", "a"], "distinct names"),
        ({(): torch.ones(3)}, [], "distinct names"),
    ],
)
def test_an_incomplete_factorial_is_refused(cells: dict[tuple[int, ...], Tensor], factors: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        factorial_effects(cells, factors, seed=0)

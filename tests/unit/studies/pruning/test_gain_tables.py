"""Gains and verdicts: signs, families of Holm's correction, and every table against the slow formula of its cells."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor

from lib.core.errors import InputError
from lib.evaluation.paired import PairedDifference, mcnemar, paired_difference
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.sums import matched_interval
from lib.evaluation.tasks import TaskResult
from lib.studies.pruning import gain_tables
from lib.studies.pruning.runs import Outcome

WINDOWS = 12
BASE = torch.linspace(2.0, 6.0, WINDOWS, dtype=torch.float64)  # windows differ by more than any gain


def losses(shift: float, *, seeds: int = 2, spread: float = 0.05, draw: int = 0) -> Tensor:
    """Losses of each seed and window: the windows' own, a shift, and something of each model's own."""
    own = torch.randn(seeds, WINDOWS, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
    return BASE + shift + spread * own


def outcomes(
    method: str, values: Tensor, *, sparsity: float = 0.5, model: str = "m", pattern: str = "unstructured"
) -> list[Outcome]:
    return [Outcome(model, method, sparsity, pattern, seed, sparsity, row) for seed, row in enumerate(values)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down: the smallest times their number, the next times one less, never falling, at most 1."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mean_gain(worse: Tensor, better: Tensor) -> float:
    """Mean over windows of the difference of the means over seeds."""
    return (
        sum(float(sum(worse[:, w]) / len(worse) - sum(better[:, w]) / len(better)) for w in range(worse.shape[1]))
        / worse.shape[1]
    )


def same_row(row: Mapping[str, object], result: PairedDifference) -> bool:
    """Whether the columns of a gain are those of a paired comparison."""
    wanted = {"gain": result.estimate, "low": result.interval[0], "high": result.interval[1], "p": result.p_value}
    return all(row[name] == value for name, value in {**wanted, "smallest effect": result.smallest_effect}.items())


# --- gains and verdicts --------------------------------------------------------------------------------------------------


def test_a_gain_is_positive_when_the_first_has_the_lower_loss() -> None:
    first, second = losses(-0.3, draw=1), losses(0.0, draw=2)
    found = gain_tables.gain(first, second, name="a over b", model="m", sparsity=0.5, seed=3)
    assert found.result.estimate == pytest.approx(mean_gain(second, first)) and 0.2 < found.result.estimate < 0.4
    assert 0 < found.result.interval[0] < found.result.estimate < found.result.interval[1]
    assert found.result == paired_difference(second, first, seed=3)
    back = gain_tables.gain(second, first, name="b over a", model="m", sparsity=0.5, seed=3)
    assert back.result.estimate == pytest.approx(-found.result.estimate) and back.result.interval[1] < 0
    assert (found.name, found.model, found.sparsity, found.seeds) == ("a over b", "m", 0.5, 2)


@pytest.mark.parametrize(("one", "other"), [(1, 3), (3, 1)])
def test_a_single_seed_is_compared_with_every_seed(one: int, other: int) -> None:
    first, second = losses(-0.3, seeds=one, draw=1), losses(0.0, seeds=other, draw=2)
    found = gain_tables.gain(first, second, name="x", model="m", sparsity=0.5, seed=0)
    assert found.seeds == 3 and found.result.estimate == pytest.approx(mean_gain(second, first))


def test_the_table_of_comparisons_is_adjusted_over_all_of_its_rows() -> None:
    shifts = [-0.03, -0.02, 0.0, 0.025, -0.4]
    found = [
        gain_tables.gain(losses(shift, draw=1 + i), losses(0.0, draw=9), name=f"{i}", model="m", sparsity=0.1 * i, seed=0)
        for i, shift in enumerate(shifts)
    ]
    table = gain_tables.comparison_table(one for one in found)
    assert table["comparison"].tolist() == list("01234") and table["sparsity"].tolist() == [0.1 * i for i in range(5)]
    assert all(same_row(row, one.result) for row, one in zip(table.to_dict("records"), found, strict=True))
    assert table["p (Holm)"].tolist() == pytest.approx(holm(table["p"].tolist()))
    assert len(set(table["p"].tolist())) > 2 and max(table["p"].tolist()) > 0.01
    assert table["p (Holm)"].tolist() != table["p"].tolist()
    assert table["effect size"].tolist() == [one.result.effect_size for one in found]
    assert set(table["windows"]) == {WINDOWS} and set(table["seeds"]) == {2} and set(table["model"]) == {"m"}


@pytest.mark.parametrize(
    ("interval", "adjusted", "wanted"),
    [
        ((0.1, 0.3), 0.01, "reproduced"),
        ((0.1, 0.3), 0.0499, "reproduced"),
        ((0.1, 0.3), 0.05, "inconclusive"),  # the interval alone is not enough
        ((0.1, 0.3), 1.0, "inconclusive"),
        ((-0.1, 0.3), 0.01, "inconclusive"),  # nor is the p-value
        ((0.0, 0.3), 0.01, "inconclusive"),
        ((-0.3, 0.0), 0.01, "inconclusive"),
        ((-0.3, -0.1), 0.01, "not reproduced"),
        ((-0.3, -0.1), 0.06, "inconclusive"),
    ],
)
def test_a_verdict_needs_the_interval_and_the_adjusted_p_value(
    interval: tuple[float, float], adjusted: float, wanted: str
) -> None:
    result = PairedDifference(sum(interval) / 2, interval, 0.001, 1.0, 0.1, 9)
    assert gain_tables.verdict(result, adjusted=adjusted) == gain_tables.verdict_of(interval, adjusted=adjusted) == wanted


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_turning_a_gain_round_turns_the_verdict_round(middle: float, width: float, adjusted: float) -> None:
    opposite = {"reproduced": "not reproduced", "not reproduced": "reproduced", "inconclusive": "inconclusive"}
    low, high = middle - width / 2, middle + width / 2
    judged = gain_tables.verdict_of((low, high), adjusted=adjusted)
    assert gain_tables.verdict_of((-high, -low), adjusted=adjusted) == opposite[judged]


# --- tables of gains -----------------------------------------------------------------------------------------------------


def test_the_best_method_has_the_lowest_mean_over_seeds_and_windows() -> None:
    """A lower loss on most windows, in another pattern, model or sparsity does not count, nor a method that is not asked for."""
    steady, lucky = losses(0.0, spread=0.0), losses(-0.1, spread=0.0)
    lucky[1, -3:] += 2.0  # better on 21 of 24 and in the median, worse on average
    measured = outcomes("lucky", lucky) + outcomes("steady", steady) + outcomes("bad", losses(0.5))
    measured += outcomes("bad", losses(-1.0), pattern="structured") + outcomes("lucky", losses(-1.0), sparsity=0.3)
    measured += outcomes("bad", losses(-1.0), model="n") + outcomes("steady", losses(0.0), model="n")
    measured += outcomes("ours", losses(-2.0))
    names = ("lucky", "steady", "bad")
    assert gain_tables.best_method(measured, names, model="m", sparsity=0.5) == "steady"
    assert gain_tables.best_method(measured, names[1:], model="n", sparsity=0.5) == "bad"


def test_nothing_measured_makes_empty_tables_with_their_columns() -> None:
    assert gain_tables.comparison_table([]).empty
    for table, some in (
        (gain_tables.mcnemar_table({}, [(("a", 0.5), ("b", 0.5))], seed=0), {"comparison", "p (Holm)", "documents"}),
        (gain_tables.accuracy_table([], [(("a", 0.5), ("b", 0.5))], seed=0), {"comparison", "p (Holm)", "calibrations"}),
    ):
        assert table.empty and some <= set(table.columns)


# --- accuracies ----------------------------------------------------------------------------------------------------------


def answers(pattern: str) -> TaskResult:
    """1 = right."""
    correct = tuple(mark == "1" for mark in pattern)
    return TaskResult("t", "acc", correct, {"acc": correct}, 0.25, 0, EvaluationSettings())


def test_accuracies_are_compared_document_by_document() -> None:
    """Equal accuracies of 'new' and 'old' on the first task come from different documents; on the second one is better."""
    results = {
        ("m", "new", 0.5, "t1"): answers("1111000011110000"), ("m", "old", 0.5, "t1"): answers("0000111111110000"),
        ("m", "new", 0.5, "t2"): answers("1111111111110000"), ("m", "old", 0.5, "t2"): answers("0000000010001111"),
        ("m", "new", 0.3, "t1"): answers("1" * 16), ("n", "old", 0.3, "t1"): answers("0" * 16),  # nothing to pair with
        ("m", "third", 0.5, "t1"): answers("1111111111111111"), ("m", "old", 0.3, "t2"): answers("1111111111110011"),
    }  # fmt: skip
    new, old, mild = ("new", 0.5), ("old", 0.5), ("old", 0.3)
    table = gain_tables.mcnemar_table(results, [(new, old), (("third", 0.5), old), (new, mild), (("new", 0.3), mild)], seed=3)
    names = ["new 50 % - old 50 %"] * 2 + ["third 50 % - old 50 %", "new 50 % - old 30 %"]
    assert list(zip(table["task"], table["comparison"], strict=True)) == list(zip(["t1", "t2", "t1", "t2"], names, strict=True))
    assert set(table["model"]) == {"m"} and table["documents"].tolist() == [16] * 4
    assert table["only first"].tolist() == [4, 11, 8, 0] and table["only second"].tolist() == [4, 4, 0, 2]
    assert table["difference, points"].tolist() == pytest.approx([0.0, 100 * 7 / 16, 50.0, -12.5])
    assert table["p"].tolist() == pytest.approx([binomtest(a, a + b).pvalue for a, b in ((4, 4), (11, 4), (8, 0), (0, 2))])
    assert table["p (Holm)"].tolist() == pytest.approx(holm(table["p"].tolist()))
    assert table["p (Holm)"].tolist()[2] == pytest.approx(4 * table["p"].tolist()[2])
    for row, task in zip(table.to_dict("records"), ("t1", "t2"), strict=False):
        test = mcnemar(results["m", "new", 0.5, task].correct, results["m", "old", 0.5, task].correct, seed=3)
        assert (row["low"], row["high"]) == tuple(100 * end for end in test.interval)
        assert row["smallest effect, points"] == 100 * test.smallest_effect and math.isfinite(test.smallest_effect)


def test_answers_to_other_documents_are_refused() -> None:
    results = {("m", "new", 0.5, "t"): answers("1100"), ("m", "old", 0.5, "t"): answers("110")}
    with pytest.raises(InputError, match="score both models on the same documents"):
        gain_tables.mcnemar_table(results, [(("new", 0.5), ("old", 0.5))], seed=0)


def test_accuracies_over_calibrations_pair_documents_and_calibrations() -> None:
    """'new' wins on average by losing with one calibration; magnitude has one calibration; 'absent' was never measured."""
    patterns = {"new": ("11110000", "11111110", "10000000"), "old": ("11000000", "11000000", "11000000")}
    by_calibration = [
        {("m", method, 0.5, "t"): answers(of_seed[seed]) for method, of_seed in patterns.items()} for seed in range(3)
    ]
    by_calibration[0][("m", "magnitude", 0.3, "t")] = answers("11111111")
    new, old, magnitude = ("new", 0.5), ("old", 0.5), ("magnitude", 0.3)
    pairs = [(new, old), (magnitude, new), (old, old), (new, ("absent", 0.5)), (("absent", 0.5), old)]
    table = gain_tables.accuracy_table(by_calibration, pairs, seed=4)
    assert table["comparison"].tolist() == ["new 50 % - old 50 %", "magnitude 30 % - new 50 %", "old 50 % - old 50 %"]
    assert table["difference, points"].tolist() == pytest.approx([25.0, 50.0, 0.0])
    assert table["lowest"].tolist() == pytest.approx([-12.5, 12.5, 0.0])
    assert table["highest"].tolist() == pytest.approx([62.5, 87.5, 0.0])
    assert table["calibrations"].tolist() == [3, 3, 3] and table["documents"].tolist() == [8, 8, 8]
    sides = [torch.tensor([[mark == "1" for mark in row] for row in patterns[name]]).double() for name in ("new", "old")]
    expected, row = paired_difference(sides[0], sides[1], seed=4), table.to_dict("records")[0]
    assert (row["low"], row["high"], row["p"]) == (100 * expected.interval[0], 100 * expected.interval[1], expected.p_value)
    assert row["low"] < -12.5 + 25 and row["smallest effect, points"] == 100 * expected.smallest_effect
    assert table["smallest effect, points"].tolist()[2] == math.inf, "no document tells the two apart"
    assert table["p (Holm)"].tolist() == pytest.approx(holm(table["p"].tolist()))


def test_equal_answers_of_two_methods_have_a_width_and_a_method_beside_itself_has_none() -> None:
    """Whatever the calibrations: 8 documents never told the two apart, which the next one may."""
    by_calibration = [{("m", name, 0.5, "t"): answers(row) for name in ("a", "b")} for row in ("11110000", "11000000")]
    table = gain_tables.accuracy_table(by_calibration, [(("a", 0.5), ("b", 0.5)), (("a", 0.5), ("a", 0.5))], seed=0)
    assert table["difference, points"].tolist() == [0.0, 0.0] and table["p"].tolist() == [1.0, 1.0]
    ends = [100 * end for end in matched_interval(0, 0, documents=8)]
    assert table[["low", "high"]].to_numpy().tolist() == [ends, [0.0, 0.0]] and ends[1] > 15


def test_accuracies_with_some_of_the_calibrations_are_refused() -> None:
    by_calibration = [{("m", name, 0.5, "t"): answers("1100") for name in names} for names in (("a", "b"), ("a", "b"), ("a",))]
    with pytest.raises(InputError, match="the same units and the same seeds"):
        gain_tables.accuracy_table(by_calibration, [(("a", 0.5), ("b", 0.5))], seed=0)


def test_tables_are_frames() -> None:
    found = replace(gain_tables.gain(losses(-0.1), losses(0.0), name="x", model="m", sparsity=0.5, seed=0), name="renamed")
    table = gain_tables.comparison_table([found])
    assert isinstance(table, pd.DataFrame) and table["comparison"].tolist() == ["renamed"]

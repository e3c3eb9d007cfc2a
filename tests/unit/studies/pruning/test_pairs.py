"""Pairs of methods: which are compared, what the weakest of several gains is, and what both took."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.evaluation import paired
from lib.evaluation.paired import PairedDifference
from lib.studies.pruning import pairs
from lib.studies.pruning.runs import Outcome
from lib.timing.effort import Effort

WINDOWS = 12
BASE = torch.linspace(2.0, 6.0, WINDOWS, dtype=torch.float64)


def outcomes(
    method: str,
    shift: float,
    *,
    draw: int = 0,
    model: str = "m",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    effort: Sequence[Effort] = (Effort(), Effort()),
) -> list[Outcome]:
    own = 0.05 * torch.randn(2, WINDOWS, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
    return [
        Outcome(model, method, sparsity, pattern, seed, sparsity, row, effort=took)
        for seed, (row, took) in enumerate(zip(BASE + shift + own, effort, strict=True))
    ]


def stacked(found: Sequence[Outcome]) -> Tensor:
    return torch.stack([each.loss for each in found])


def test_pairs_are_compared_wherever_both_were_measured() -> None:
    """Not across models, sparsities or patterns; p-values are adjusted over all rows."""
    a, b = outcomes("a", 0.0), outcomes("b", 0.5, draw=1)
    first, second = outcomes("a", 0.2, draw=2, pattern="2:4"), outcomes("b", 0.1, draw=3, pattern="2:4")
    listed = [*a, *b, *first, *second, *outcomes("a", 0.0, model="n"), *outcomes("b", 0.0, sparsity=0.7)]
    table = pairs.pairs_table(listed, [("a", "b"), ("a", "c")], seed=0)
    assert table["comparison"].tolist() == ["a - b", "a - b, 2:4"]
    wanted = [float((stacked(other) - stacked(own)).mean()) for own, other in ((a, b), (first, second))]
    assert table["gain"].tolist() == pytest.approx(wanted)
    adjusted = paired.holm(dict(enumerate(table["p"].tolist())))
    assert table["p (Holm)"].tolist() == pytest.approx(list(adjusted.values()))


def test_rivals_and_controls_stand_beside_what_both_took() -> None:
    """Seconds are means over calibrations, memory is the largest of them; the order of the pair is kept."""
    listed = [
        *outcomes("a", 0.0, effort=[Effort(1.0, 5e6), Effort(3.0, 7e6)]), *outcomes("b", 0.5, effort=[Effort(8.0, 2e6)] * 2),
        *outcomes("c", 0.6),
    ]  # fmt: skip
    table = pairs.pairs_table(listed, [("a", "b"), ("b", "a"), ("a", "c")], seed=0, controls=["a", "c"])
    assert table["against"].tolist() == ["rival", "control", "control"]
    assert table["seconds"].tolist() == [2.0, 8.0, 2.0] and table["peak MB"].tolist() == [7.0, 2.0, 7.0]
    assert table["seconds of the other"].tolist()[:2] == [8.0, 2.0] and table["peak MB of the other"].tolist()[:2] == [2.0, 7.0]
    assert table["seconds of the other"].isna().tolist() == table["peak MB of the other"].isna().tolist() == [False, False, True]


def test_shares_of_what_the_other_lost_stand_where_the_dense_model_was_measured() -> None:
    """With the dense rows in another order than the calibrations'; of the second of the pair, and at its own target."""
    dense = [replace(one, method="dense", sparsity=0.0) for one in outcomes("x", -0.5, draw=5)][::-1]
    a, b = outcomes("a", 0.1, draw=1), outcomes("b", 0.5, draw=2)
    cut = outcomes("a", 0.2, draw=3, pattern="structured"), outcomes("b", 0.9, draw=4, pattern="structured")
    table = pairs.pairs_table([*dense, *a, *b, *cut[0], *cut[1]], [("a", "b")], seed=0)
    for row, (own, other) in zip(table.to_dict("records"), ((a, b), cut), strict=True):
        damage = float((stacked(other) - stacked(dense[::-1])).mean())
        assert row["share of the damage, %"] == pytest.approx(100 * row["gain"] / damage)
        assert row["gain"] == pytest.approx(float((stacked(other) - stacked(own)).mean()))
    assert "share of the damage, %" not in pairs.pairs_table([*a, *b], [("a", "b")], seed=0).columns


def test_an_unknown_memory_is_not_a_small_one() -> None:
    listed = [*outcomes("a", 0.0, effort=[Effort(1.0, 5e6), Effort(1.0)]), *outcomes("b", 0.5)]
    assert math.isnan(pairs.pairs_table(listed, [("a", "b")], seed=0)["peak MB"].item())


def test_without_outcomes_the_columns_stand() -> None:
    table = pairs.pairs_table([], [("a", "b")], seed=0)
    assert not len(table) and list(table.columns)[:2] == ["comparison", "model"]
    assert list(table.columns)[-5:] == list(pairs.COST_COLUMNS)


def test_a_gain_over_all_is_the_one_of_the_lowest_bound_with_the_largest_p_value() -> None:
    """Neither the smallest estimate nor its own p-value: the three are of three different rivals here."""
    smallest = PairedDifference(0.3, (0.25, 0.35), 0.01, 1.0, 0.1, 9)
    lowest = PairedDifference(0.5, (0.05, 0.95), 0.02, 1.0, 0.1, 9)
    largest_p = PairedDifference(0.4, (0.1, 0.7), 0.04, 1.0, 0.1, 9)
    assert pairs.weakest([smallest, lowest, largest_p]) == replace(lowest, p_value=0.04)
    with pytest.raises(InputError, match="a gain over every rival must have a rival, got none"):
        pairs.weakest([])

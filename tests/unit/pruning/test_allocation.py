"""How much each layer gets: offsets by hand, totals that hold exactly, and what cannot be asked."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning import allocation


def test_early_is_sparser_falls_evenly_and_backwards_rises() -> None:
    assert allocation.early_is_sparser(5, epsilon=0.2).tolist() == pytest.approx([0.2, 0.1, 0.0, -0.1, -0.2])
    assert allocation.early_is_sparser(5, epsilon=-0.2).tolist() == pytest.approx([-0.2, -0.1, 0.0, 0.1, 0.2])
    assert allocation.early_is_sparser(2).tolist() == pytest.approx([0.08, -0.08])
    assert allocation.early_is_sparser(3).dtype == torch.float64


def test_the_highest_score_is_pruned_least_and_only_the_order_of_sizes_matters() -> None:
    scores = torch.tensor([0.1, 0.5, 0.2])
    got = allocation.from_scores(scores, spread=0.1)
    assert got.tolist() == pytest.approx([0.1, -0.1, 0.05])
    assert allocation.from_scores(7 * scores - 3, spread=0.1).tolist() == pytest.approx(got.tolist(), abs=1e-6)
    assert allocation.from_scores(scores).abs().max() == pytest.approx(0.08)


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan")])
def test_scores_that_do_not_differ_give_no_offsets(value: float) -> None:
    assert allocation.from_scores(torch.full((4,), value)).tolist() == [0.0] * 4


def test_owl_as_its_paper_computes_it() -> None:
    """Scaled to [0, 2 λ], shifted so that the mean of what is kept is 1 - sparsity; layers of equal size."""
    scores, sparsity, lam = torch.tensor([3.0, 9.0, 4.0, 1.0]).double(), 0.6, 0.08
    ratio = (scores - scores.min()) / (scores.max() - scores.min()) * lam * 2
    kept = ratio - ratio.mean() + (1 - sparsity)
    got = allocation.with_total(allocation.from_scores(scores, spread=lam), [64] * 4, sparsity=sparsity)
    torch.testing.assert_close(got, 1 - kept, atol=1e-12, rtol=0)


def test_the_total_is_weighted_by_size() -> None:
    """The plain mean of the result is not the asked sparsity."""
    got = allocation.with_total(torch.tensor([0.1, -0.1]), [100, 300], sparsity=0.5)
    assert got.tolist() == pytest.approx([0.65, 0.45], abs=1e-7)
    assert float((got * torch.tensor([100.0, 300.0])).sum()) == pytest.approx(200)
    assert float(got.mean()) != pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("wanted", "sparsity"), [([0.6, -0.6], 0.5), ([0.3, -0.3], 0.8), ([0.2, -0.2], 0.1)])
def test_layers_that_would_leave_the_range_are_refused(wanted: list[float], sparsity: float) -> None:
    with pytest.raises(InputError, match=r"layer sparsities must lie in \[0, 1\), got .* to .*: spread them less"):
        allocation.with_total(torch.tensor(wanted), [10, 10], sparsity=sparsity)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 50])
def test_a_total_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\)"):
        allocation.with_total(torch.zeros(2), [10, 10], sparsity=sparsity)


def test_outliers_are_those_above_a_multiple_of_the_mean() -> None:
    importance = torch.tensor([[1.0, 1.0, 1.0, 5.0], [0.0, 0.0, 0.0, 8.0]])  # mean 2
    shares = [allocation.outlier_share(importance, factor=factor) for factor in (2.0, 2.5, 3.0, 4.0, 0.4)]
    assert shares == [0.25, 0.125, 0.125, 0.0, 0.625]  # above, not at: 5 > 5 is false, 8 > 8 too
    assert allocation.outlier_share(importance * 100, factor=2.0) == 0.25
    assert allocation.outlier_share(importance) == 0.0  # five times the mean


def test_whole_numbers_go_to_the_largest_remainders() -> None:
    """2.5, 2.25 and 2.75 of ten each: the two that are missing go to the third and the first."""
    sparsities = torch.tensor([0.25, 0.225, 0.275]).double()
    assert allocation.removed_counts(sparsities, [10, 10, 10], total=7) == [2, 2, 3]
    assert allocation.removed_counts(sparsities, [10, 10, 10], total=8) == [3, 2, 3]


def test_products_that_round_below_a_whole_number_count_as_it() -> None:
    sparsities = torch.tensor([0.29, 0.58, 0.3]).double()  # 28.999999999999996, 57.99999999999999 and 30 of a hundred
    assert allocation.removed_counts(sparsities, [100] * 3, total=117) == [29, 58, 30]


@pytest.mark.parametrize("total", [3, 7])
def test_another_total_is_refused(total: int) -> None:
    with pytest.raises(InputError, match=rf"layer sparsities must remove {total} weights in all, got 5: use with_total first"):
        allocation.removed_counts(torch.tensor([0.25, 0.25]), [10, 10], total=total)


# --- comparators ---------------------------------------------------------------------------------------------------------


def test_dsa_is_the_arcsine_of_the_scaled_arctangent_of_the_variance_of_logarithms() -> None:
    values = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)).double() + 0.5
    logs = [math.log(abs(value)) for value in values.flatten().tolist()]
    mean = sum(logs) / len(logs)
    expected = math.asin(2 / math.pi * math.atan(sum((value - mean) ** 2 for value in logs) / len(logs)))
    assert allocation.log_variance(values) == pytest.approx(expected)
    values[0, 0] = -values[0, 0]
    assert allocation.log_variance(values) == pytest.approx(expected)
    wide = [allocation.log_variance(torch.tensor([[1.0, math.exp(size)]])) for size in (3.0, 4.0)]
    assert expected < wide[0] < wide[1] < math.pi / 2  # where asin(atan(v)) is not defined, blocks are still told apart


def test_the_best_ramp_is_found_by_its_loss_and_the_flat_one_wins_ties() -> None:
    asked: list[list[float]] = []

    def loss(offsets: Tensor) -> float:
        asked.append(offsets.tolist())
        return abs(float(offsets[0]) + 0.06)

    best, losses = allocation.best_ramp(loss, 3, steepest=0.08, tried=9)
    assert best.tolist() == pytest.approx([-0.06, 0.0, 0.06]) and len(losses) == len(asked) == 9
    assert allocation.best_ramp(lambda _: 1.0, 3, steepest=0.08)[0].tolist() == [0.0, 0.0, 0.0]


def tangled(levels: tuple[int, ...]) -> float:
    """A loss in which layers interact, so that no layer's best level can be found alone."""
    a, b, c, d = levels
    return (a + 2 * b - 1) ** 2 + (b * c + 1) ** 2 + 0.3 * (d - a) ** 2 + 0.1 * c


def test_evolution_finds_the_best_of_all_and_never_loses_it() -> None:
    every = [levels for levels in itertools.product(range(-2, 3), repeat=4) if sum(levels) == 0]
    best = min(every, key=tangled)
    for seed in range(4):
        stream = torch.Generator().manual_seed(seed)
        got = allocation.evolve(lambda levels, _: tangled(levels), 4, most=2, generator=stream, generations=40)
        assert got.levels == best and got.losses[-1] == tangled(best)
        assert all(after <= before for before, after in itertools.pairwise(got.losses))
        assert sum(got.levels) == 0 and got.evaluations <= 2 * len(every)


def test_evolution_measures_on_more_text_what_was_good_on_little() -> None:
    asked: list[tuple[tuple[int, ...], int]] = []

    def loss(levels: tuple[int, ...], stage: int) -> float:
        asked.append((levels, stage))
        return tangled(levels) if stage else -tangled(levels)

    given = {"most": 2, "generations": 1, "offspring": 12, "survivors": (3, 1)}
    got = allocation.evolve(loss, 4, generator=torch.Generator().manual_seed(1), **given)
    first, last = ([levels for levels, stage in asked if stage == number] for number in (0, 1))
    assert len(set(asked)) == len(asked) == got.evaluations
    assert set(last) == {(0, 0, 0, 0), *sorted(first, key=lambda levels: -tangled(levels))[:3]}
    assert got.levels == min(last, key=tangled)


def test_evolution_keeps_to_its_budget_its_seed_and_its_kinds() -> None:
    def run(seed: int, **options: Any) -> allocation.Evolved:
        stream = torch.Generator().manual_seed(seed)
        return allocation.evolve(lambda levels, _: tangled(levels), 4, most=2, generator=stream, **options)

    assert run(0) == run(0)
    assert run(0, budget=50).evaluations <= 50 and run(0, budget=1).losses == (tangled((0,) * 4),)
    found = [run(seed, kinds=["large", "small", "large", "small"], generations=5).levels for seed in range(5)]
    assert all(a + c == 0 and b + d == 0 for a, b, c, d in found) and any(any(levels) for levels in found)
    with pytest.raises(InputError, match="the last of the survivors must be 1"):
        run(0, survivors=(4, 2))
    with pytest.raises(InputError, match="levels must be able to move"):
        run(0, kinds=[1, 2, 3, 4])

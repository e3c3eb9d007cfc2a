"""Shares of the damage beside gains: sides, families, verdicts, and every table against the slow formula of its cells."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.evaluation import recovered
from lib.evaluation.paired import PairedDifference, paired_difference
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.tasks import TaskResult
from lib.report import claims
from lib.studies.damage import shares
from lib.studies.damage.shares import PAPER, SHARE, Gain
from lib.studies.pruning import gain_tables
from lib.studies.pruning.gain_tables import Comparison
from lib.studies.pruning.runs import Outcome

WINDOWS = 12
BASE = torch.linspace(2.0, 6.0, WINDOWS, dtype=torch.float64)  # windows differ by more than any gain
DENSE = BASE - 0.5


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


def test_every_method_is_compared_with_the_base_of_its_own_model() -> None:
    """At the asked sparsity alone; the other model has other losses and its own base."""
    values = {
        ("m", "base"): losses(0.0, draw=1), ("m", "a"): losses(-0.02, draw=2), ("m", "b"): losses(0.3, draw=3),
        ("n", "a"): losses(1.9, draw=4), ("n", "base"): losses(2.0, draw=5),
    }  # fmt: skip
    measured = [one for (model, method), loss in values.items() for one in outcomes(method, loss, model=model)]
    measured += outcomes("a", losses(5.0), sparsity=0.7) + outcomes("a", losses(7.0), pattern="structured")
    measured += outcomes("dense", DENSE[None], sparsity=0.0) + outcomes("dense", DENSE[None] + 1.0, sparsity=0.0, model="n")
    table = shares.gains_over(measured, base="base", sparsity=0.5, seed=4)
    assert list(zip(table["model"], table["weighting"], strict=True)) == [("m", "a"), ("m", "b"), ("n", "a")]
    for row in table.to_dict("records"):
        pair = values[row["model"], "base"], values[row["model"], row["weighting"]]
        assert same_row(row, paired_difference(*pair, seed=4)) and row["gain"] == pytest.approx(mean_gain(*pair))
        assert row["seeds"] == 2 and PAPER not in row
        damage = mean_gain(pair[0], (DENSE + (row["model"] == "n"))[None])
        assert row[SHARE] == pytest.approx(100 * row["gain"] / damage)
    assert table["gain"].tolist() == pytest.approx([0.02, -0.3, 0.1], abs=0.05)
    assert table["p (Holm)"].tolist() == pytest.approx(holm(table["p"].tolist()))


def test_a_method_that_was_not_measured_at_this_sparsity_is_named() -> None:
    measured = outcomes("base", losses(0.0)) + outcomes("a", losses(0.1), sparsity=0.7)
    with pytest.raises(KeyError, match=r"no outcome of \('m', 'a', 0.5, 'unstructured'\)"):
        shares.gains_over(measured, base="base", sparsity=0.5, seed=0)


def test_gains_by_sparsity_are_those_that_both_were_measured_at() -> None:
    """In rising order; not structured ones, and not those of the other model. The share is of what the baseline loses."""
    values = {
        (method, s): losses(s * shift, draw=i)
        for i, (method, shift) in enumerate([("new", 0.3), ("old", 0.5)])
        for s in (0.7, 0.3)
    }
    measured = [one for (method, s), loss in values.items() for one in outcomes(method, loss, sparsity=s)]
    measured += outcomes("dense", BASE[None], sparsity=0.0) + outcomes("dense", BASE[None] - 9.0, sparsity=0.0, model="n")
    measured += outcomes("new", losses(0.0), sparsity=0.9) + outcomes("old", losses(0.0), sparsity=0.1)
    measured += [one for method in ("new", "old") for one in outcomes(method, losses(1.0), sparsity=0.5, pattern="2:4")]
    measured += [one for method in ("new", "old") for one in outcomes(method, losses(1.0), sparsity=0.6, model="n")]
    table = shares.gain_by_sparsity(measured, [("new", "old"), ("old", "new"), ("new", "absent")], model="m", seed=1)
    keys = [("new - old", 0.3), ("new - old", 0.7), ("old - new", 0.3), ("old - new", 0.7)]
    assert list(zip(table["pair"], table["sparsity"], strict=True)) == keys and set(table["model"]) == {"m"}
    for row in table.to_dict("records"):
        method, baseline = row["pair"].split(" - ")
        pair = values[baseline, row["sparsity"]], values[method, row["sparsity"]]
        assert same_row(row, paired_difference(*pair, seed=1)) and row["gain"] == pytest.approx(mean_gain(*pair))
        share = 100 * row["gain"] / mean_gain(pair[0], BASE[None])
        assert row[SHARE] == pytest.approx(share) and row["share, low"] < share < row["share, high"] and math.isnan(row[PAPER])
    assert table["gain"].tolist() == pytest.approx([0.06, 0.14, -0.06, -0.14], abs=0.03)
    assert table[SHARE].tolist()[1] == pytest.approx(40.0, abs=8)


def test_extensions_stand_beside_their_own_base_and_the_best_baseline() -> None:
    bases, best = {"B": losses(0.0, draw=1), "A": losses(1.0, draw=6)}, losses(-0.5, draw=2)
    values = {"early": losses(-0.2, draw=3), "late": losses(0.01, draw=4), "by head": losses(-0.6, draw=5)}
    groups = {
        "B": ([*outcomes("early", values["early"]), *outcomes("late", values["late"])], bases["B"]),
        "A": (outcomes("by head", values["by head"]), bases["A"]),
    }
    table = shares.extension_table(groups, best=("SparseGPT", best), dense=DENSE[None], seed=2)
    keys = [("B", "early"), ("B", "late"), ("A", "by head")]
    assert list(zip(table["extension"], table["variant"], strict=True)) == keys
    assert set(table["best baseline"]) == {"SparseGPT"} and set(table["model"]) == {"m"}
    for row in table.to_dict("records"):
        own, base = values[row["variant"]], bases[row["extension"]]
        over_best = paired_difference(best, own, seed=2)
        assert same_row(row, paired_difference(base, own, seed=2)) and row["gain"] == pytest.approx(mean_gain(base, own))
        assert (row["gain over best"], row["best, low"], row["best, high"]) == (over_best.estimate, *over_best.interval)
        assert row["gain over best"] == pytest.approx(mean_gain(best, own))
        assert row[SHARE] == pytest.approx(100 * row["gain"] / mean_gain(base, DENSE[None]))
    assert table["gain"].tolist() == pytest.approx([0.2, -0.01, 1.6], abs=0.05)
    assert table["gain over best"].tolist() == pytest.approx([-0.3, -0.51, 0.1], abs=0.05)
    assert table["p (Holm)"].tolist() == pytest.approx(holm(table["p"].tolist()))
    assert table["p (Holm)"].tolist() != table["p"].tolist()


def test_an_extension_with_other_seeds_than_its_base_is_refused() -> None:
    with pytest.raises(InputError, match="the same units and the same seeds"):
        group = (outcomes("x", losses(0.0, seeds=3)), losses(0.0))
        shares.extension_table({"A": group}, best=("b", losses(0.0, seeds=3)), dense=DENSE[None], seed=0)


@pytest.mark.parametrize("change", [-0.01, 0.0])
def test_there_is_no_share_of_a_loss_that_did_not_rise(change: float) -> None:
    measured = (
        outcomes("dense", BASE[None], sparsity=0.0) + outcomes("old", BASE[None] + change) + outcomes("new", BASE[None] - 0.5)
    )
    table = shares.gain_by_sparsity(measured, [("new", "old")], model="m", seed=1)
    assert table["gain"].item() == pytest.approx(0.5 + change)
    assert math.isnan(table[SHARE].item())


def test_nothing_measured_makes_empty_tables_with_their_columns() -> None:
    assert shares.gain_by_sparsity([], [("a", "b")], model="m", seed=0).empty
    for table, some in (
        (shares.gains_over([], base="b", sparsity=0.5, seed=0), {"model", "weighting", "gain", "p (Holm)"}),
        (
            shares.extension_table({}, best=("b", losses(0.0)), dense=DENSE[None], seed=0),
            {"model", "extension", "variant", "gain"},
        ),
        (shares.table([]), {"comparison", "gain", SHARE, PAPER}),
    ):
        assert table.empty and some <= set(table.columns)


# --- sides, masks of their own -------------------------------------------------------------------------------------------


def with_masks(effect: float, *, seeds: int = 4, noise: float = 2.0) -> list[Outcome]:
    """A baseline that loses 0.4, a change that recovers a share of it, and the dense model, each seed under masks of its own.

    Masks shift all losses of a seed and window alike, by far more than anything else does.
    """
    masks = noise * torch.randn(seeds, WINDOWS, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    rows = {"dense": DENSE + masks, "old": DENSE + 0.4 + masks, "new": DENSE + 0.4 * (1 - effect) + masks}
    return [
        Outcome("m", method, 0.0 if method == "dense" else 0.5, "unstructured", 100 + seed, 0.5, row)
        for method, values in rows.items()
        for seed, row in enumerate(values)
    ]


def test_the_dense_model_is_paired_under_the_masks_of_each_calibration() -> None:
    """In any order of its rows; paired with the mean of all masks, or with those of another seed, the share would be a guess."""
    measured = with_masks(0.25)
    dense = [one for one in measured if one.method == "dense"]
    shuffled = [*dense[::-1], *(one for one in measured if one.method != "dense")]
    for listed in (measured, shuffled):
        found = shares.between(listed, ("new", 0.5), ("old", 0.5), model="m", seed=0)
        assert found.share is not None and found.share.estimate == pytest.approx(0.25)
        assert found.share.interval == pytest.approx((0.25, 0.25)) and found.comparison.seeds == 4
        assert found.comparison.result.estimate == pytest.approx(0.1) and found.comparison.name == "new - old"
    wrong = torch.stack([one.loss for one in reversed(dense)])
    pair = [torch.stack([one.loss for one in measured if one.method == method]) for method in ("new", "old")]
    given = {"name": "x", "model": "m", "sparsity": 0.5, "seed": 0}
    other = shares.recovers(pair[0], pair[1], wrong, **given).share
    assert other is None or other.interval is None or other.interval[1] - other.interval[0] > 0.01


def test_a_calibration_without_its_dense_model_is_refused() -> None:
    measured = [one for one in with_masks(0.25) if not (one.method == "dense" and one.seed == 102)]
    with pytest.raises(KeyError, match="102"):
        shares.between(measured, ("new", 0.5), ("old", 0.5), model="m", seed=0)


def test_the_share_is_of_what_the_second_loses_and_not_the_first() -> None:
    found = shares.between(with_masks(0.25), ("old", 0.5), ("new", 0.5), model="m", seed=0, paper=0.1)
    assert found.share is not None and found.share.estimate == pytest.approx(-0.1 / 0.3)
    row = shares.columns(found)
    assert row[SHARE] == pytest.approx(-100 / 3) and row[PAPER] == pytest.approx(10.0) and row["share, low"] <= row[SHARE]


# --- families ------------------------------------------------------------------------------------------------------------


def gain_with(
    share: tuple[float, float, float] | None, *, p: float, within: float = 1.0, paper: float = math.nan, at: float = 0.0
) -> Gain:
    """A gain with given numbers: share with its interval, both p-values, the paper's share and the threshold."""
    result = PairedDifference(0.1, (0.05, 0.15), p, 1.0, 0.1, 9)
    if share is None:
        return Gain(Comparison("x", "m", 0.5, result, 2))
    bound = paper / 2 if math.isfinite(paper) else 0.5
    found = recovered.Recovered(share[0], share[1:], p, within, bound, 9, at)
    return Gain(Comparison("x", "m", 0.5, result, 2), found, paper)


def test_a_family_is_adjusted_over_all_of_it_and_its_bounds_over_those_that_have_them() -> None:
    gains = [
        gain_with((0.2, 0.1, 0.3), p=0.02, within=1.0, paper=0.1),
        gain_with((0.01, -0.02, 0.03), p=0.3, within=0.02, paper=0.1),
        gain_with(None, p=0.012),
        gain_with((0.01, -0.02, 0.03), p=0.5, within=0.0001),  # the paper gives no share: no bound
    ]
    judged = shares.judge(gains)
    assert [one.adjusted for one in judged] == pytest.approx(holm([0.02, 0.3, 0.012, 0.5]))
    assert [one.adjusted_within for one in judged[:2]] == pytest.approx(holm([1.0, 0.02]))  # of two, not of four
    assert all(math.isnan(one.adjusted_within) for one in judged[2:])
    assert [one.verdict for one in judged] == ["inconclusive", "no effect of that size", "reproduced", "inconclusive"]
    assert [one.verdict for one in shares.judge(gains[:2])] == ["reproduced", "no effect of that size"]
    more = shares.judge(gains, besides=[0.001, 0.9])
    assert [one.adjusted for one in more] == pytest.approx(holm([0.02, 0.3, 0.012, 0.5, 0.001, 0.9])[:4])
    assert more[2].verdict == "inconclusive" and [one.adjusted_within for one in more[:2]] == pytest.approx([1.0, 0.04])


def test_a_claim_is_in_per_cent_of_the_damage_where_the_paper_gives_a_share() -> None:
    found = gain_with((0.2, 0.1, 0.3), p=0.02, within=0.7, paper=0.0918)
    numbers = shares.claim_numbers(found, shares.judge([found])[0])
    assert numbers["estimate"] == pytest.approx(20.0) and numbers["interval"] == pytest.approx((10.0, 30.0))
    assert numbers["unit"] == "% of the damage" and numbers["verdict"] == "reproduced" and numbers["n"] == 9
    note = "0.100 [0.0500, 0.150] nats per token; paper 9.18 %; calibrations: 2; Holm-adjusted p 0.02, of no effect 0.7"
    assert numbers["note"] == note
    plain = gain_with(None, p=0.2)
    numbers = shares.claim_numbers(plain, shares.judge([plain])[0])
    assert (numbers["estimate"], numbers["interval"], numbers["unit"]) == (0.1, (0.05, 0.15), "nats per token")
    assert numbers["verdict"] == "inconclusive" and str(numbers["note"]).endswith("smallest effect seen 0.1")


def test_a_claim_without_sure_damage_has_no_number_and_no_verdict() -> None:
    dense, base = BASE[None], BASE[None] + torch.tensor([0.1, -0.1]).repeat(WINDOWS // 2)
    found = shares.recovers(base - 0.5, base, dense, name="x", model="m", sparsity=0.5, seed=0, paper=0.1)
    numbers = shares.claim_numbers(found, shares.judge([found])[0])
    assert numbers["estimate"] is None and numbers["interval"] is None and numbers["verdict"] == "inconclusive"
    claim = {"key": "x", "statement": "x", "rule": "x", "source": "x", **numbers}
    claims.check_claim(claims.Claim(**claim))


def test_the_threshold_of_a_claim_is_a_share_of_the_papers_share() -> None:
    first, base = losses(0.38, draw=1, spread=0.001), losses(0.4, draw=2, spread=0.001)
    given = {"name": "x", "model": "m", "sparsity": 0.5, "seed": 0, "paper": 0.1}
    found = {at: shares.recovers(first, base, BASE[None], **given, at=at).share for at in (0.0, 0.5, 2.0)}
    assert [one.threshold for one in found.values() if one] == [0.0, 0.05, 0.2] and {
        one.bound for one in found.values() if one
    } == {0.05}
    any_size, half = found[0.0], found[0.5]
    assert any_size and half and any_size.p_value < 0.01 and half.p_value > 0.05  # it is 0.05 itself


# --- accuracies ----------------------------------------------------------------------------------------------------------


def answers(marks: str) -> TaskResult:
    right = tuple(mark == "1" for mark in marks)
    return TaskResult("t", "acc", right, {"acc": right}, 0.25, 0, EvaluationSettings(draws=1, seed=0))


def test_shares_of_lost_accuracy_stand_beside_the_papers_of_the_same_pair_and_task() -> None:
    """100 documents: dense 80, baseline 60, the change 65 right, all among the dense model's: a quarter of what was lost."""
    dense, base, change = ("1" * n + "0" * (100 - n) for n in (80, 60, 65))
    ours, pair = ("sink-aware (Wanda)", 0.5), (("sink-aware (Wanda)", 0.5), ("Wanda", 0.5))
    results = {("m", "dense", 0.0, "t"): answers(dense), ("m", *pair[1], "t"): answers(base), ("m", *ours, "t"): answers(change)}
    compared = gain_tables.mcnemar_table(results, [pair], seed=0)
    given: dict[str, Any] = {"seed": 0}
    for names, paper in (({}, 100 * 0.48 / 5.23), ({"t": "GSM8K"}, -100 * 1.13 / 12.28)):
        row = shares.with_accuracy_shares(compared, [pair], [results], results, **given, paper_tasks=names).iloc[0]
        assert row[SHARE] == pytest.approx(25.0) and 0 < row["share, low"] < 25 < row["share, high"]
        assert row[PAPER] == pytest.approx(paper) and row["difference, points"] == pytest.approx(5.0)
    without = {key: found for key, found in results.items() if key[1] != "dense"}
    assert math.isnan(shares.with_accuracy_shares(compared, [pair], [results], without, **given)[SHARE].item())
    turned = (("Wanda", 0.5), ours)
    row = shares.with_accuracy_shares(
        gain_tables.mcnemar_table(results, [turned], seed=0), [turned], [results], results, **given
    ).iloc[0]
    assert row[SHARE] == pytest.approx(-100 * 5 / 15) and math.isnan(row[PAPER])  # the paper's Wanda is over SparseGPT


def test_shares_of_accuracies_over_calibrations() -> None:
    """The second calibration gains nothing; the dense model has none."""
    dense, base = "1" * 80 + "0" * 20, "1" * 60 + "0" * 40
    pair, changes = (("a", 0.5), ("b", 0.5)), ("1" * 70 + "0" * 30, base)
    found = [{("m", "a", 0.5, "t"): answers(change), ("m", "b", 0.5, "t"): answers(base)} for change in changes]
    compared = gain_tables.accuracy_table(found, [pair], seed=0)
    row = shares.with_accuracy_shares(compared, [pair], found, {("m", "dense", 0.0, "t"): answers(dense)}, seed=0).iloc[0]
    assert row[SHARE] == pytest.approx(25.0) and row["share, low"] == pytest.approx(0.0, abs=1e-9) and row["calibrations"] == 2

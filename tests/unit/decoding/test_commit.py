"""Commit rules against slow loops over plain lists, written from the formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.decoding import commit as rules
from lib.decoding.commit import Commit
from lib.decoding.view import View, guess

MASK, BLOCK = 9, range(3, 13)
Slow = Callable[[dict[int, Tensor]], set[int]]  # distribution of every open place of one row -> what is committed


def view_of(ids: Tensor, logits: Tensor, *, commit: Commit | None = None, before: View | None = None, quota: int = 3) -> View:
    """Return the view after a pass that gave `logits` [batch, place, vocab]."""
    view = View(ids, torch.arange(ids.shape[1]), BLOCK, 3, MASK, torch.full((len(ids), 8), quota))
    if before is not None:
        view.memory, view.previous, view.step = before.memory, before.guess, before.step + 1
    where = view.is_open
    asked = logits[where] if commit is None else commit.adjusted(view, logits[where], where)
    view.guess = guess(ids, where, asked)
    return view


def example(seed: int, *, rows: int = 3, sharp: float = 2.5) -> tuple[Tensor, Tensor]:
    """Texts of 16 places, some of the block's written, masks behind it, and logits of 8 tokens."""
    stream = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 8, (rows, 16), generator=stream)
    ids[:, 3:] = torch.where(torch.rand((rows, 13), generator=stream) < 0.7, MASK, ids[:, 3:])
    ids[:, 4] = MASK
    logits = sharp * torch.randn((rows, 16, 8), generator=stream) * torch.rand((rows, 16, 1), generator=stream) * 2
    return ids, logits


def confidence(row: dict[int, Tensor]) -> dict[int, float]:
    return {place: float(p.max()) for place, p in row.items()}


def above(c: dict[int, float], threshold: float) -> set[int]:
    return {place for place, value in c.items() if value > threshold} | {max(c, key=lambda place: c[place])}


def slow_factor(factor: float) -> Slow:
    def run(row: dict[int, Tensor]) -> set[int]:
        c = confidence(row)
        ranked = sorted(c, key=lambda place: -c[place])
        fits = [n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - c[ranked[n - 1]]) < factor]
        return set(ranked[: max(fits, default=1)])

    return run


def slow_adaptive(threshold: float, fall: float) -> Slow:
    return lambda row: above(confidence(row), threshold * (1 - fall * (1 - len(row) / len(BLOCK))))


def slow_entropy(bound: float) -> Slow:
    def run(row: dict[int, Tensor]) -> set[int]:
        c = confidence(row)
        ranked = sorted(c, key=lambda place: -c[place])
        h = [-sum(p * math.log(p) for p in row[place].tolist()) for place in ranked]
        fits = [n for n in range(1, len(ranked) + 1) if sum(h[:n]) - max(h[:n]) <= bound]
        return set(ranked[: max(fits)])

    return run


def slow_hierarchy(threshold: float, low: float) -> Slow:
    def run(row: dict[int, Tensor]) -> set[int]:
        c, runs = confidence(row), []
        for place in sorted(c):
            if runs and runs[-1][-1] == place - 1:
                runs[-1].append(place)
            else:
                runs.append([place])
        leads = [max(run, key=lambda place: c[place]) for run in runs]
        return above(c, threshold) | {place for place in leads if c[place] > low}

    return run


def slow_leap(threshold: float, low: float, radius: int) -> Slow:
    def run(row: dict[int, Tensor]) -> set[int]:
        c = confidence(row)
        anchors = [place for place in c if c[place] > threshold]
        near = {place for place in c if c[place] > low and any(abs(place - a) <= radius for a in anchors)}
        return above(c, threshold) | near

    return run


CASES: dict[str, tuple[Commit, Slow]] = {
    "threshold": (rules.Threshold(0.6), lambda row: above(confidence(row), 0.6)),
    "factor": (rules.Factor(1.2), slow_factor(1.2)),
    "adaptive threshold": (rules.AdaptiveThreshold(0.8, 0.5), slow_adaptive(0.8, 0.5)),
    "entropy bound": (rules.EntropyBound(0.9), slow_entropy(0.9)),
    "hierarchy": (rules.Hierarchy(0.95, 0.4), slow_hierarchy(0.95, 0.4)),
    "neighbours of anchors": (rules.LocalLeap(0.8, 0.4, 1), slow_leap(0.8, 0.4, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_its_formula(name: str) -> None:
    rule, slow = CASES[name]
    sizes: set[int] = set()
    for seed in range(12):
        ids, logits = example(seed)
        view = view_of(ids, logits)
        got = rule(view)
        for index, row in enumerate(logits):
            places = [place for place in BLOCK if ids[index, place] == MASK]
            wanted = slow({place: row[place].double().softmax(-1) for place in places})
            assert set(got[index].nonzero()[:, 0].tolist()) == wanted
            sizes.add(len(wanted))
    assert len(sizes) > 2  # one token, some, many: the rule is put to work


def test_stillness_is_counted_pass_by_pass() -> None:
    """A confident place waits until its distribution has moved less than the bound twice; then the best alone is not enough."""
    rule = rules.Klass(threshold=0.5, divergence=0.05, steps_alike=2)
    ids = torch.full((1, 16), MASK)
    ids[:, :3] = 1
    still = torch.zeros((1, 16, 8))
    still[0, 5, 2], still[0, 7, 3] = 6.0, 4.0  # 5 stands still all the time; 7 is as sure, but has just changed its token
    moved = still.clone()
    moved[0, 7] = 0.0
    moved[0, 7, 1] = 4.0
    first = view_of(ids, moved)
    assert rule(first).nonzero().tolist() == [[0, 5]]  # nothing has stood still: the best one
    second = view_of(ids, moved, before=first)
    assert rule(second).nonzero().tolist() == [[0, 5]]
    third = view_of(ids, still, before=second)
    assert rule(third).nonzero().tolist() == [[0, 5]]
    fourth = view_of(ids, still, before=third)
    assert rule(fourth).nonzero().tolist() == [[0, 5]]
    fifth = view_of(ids, still, before=fourth)
    assert rule(fifth).nonzero().tolist() == [[0, 5], [0, 7]]


def test_divergence_is_from_now_to_before() -> None:
    """KL(now || before) is below the bound and KL(before || now) is not."""
    now, before = torch.tensor([0.99, 0.01]), torch.tensor([0.9, 0.1])
    forward = float((now * (now / before).log()).sum())
    backward = float((before * (before / now).log()).sum())
    assert forward < 0.1 < backward
    ids = torch.full((1, 16), MASK)
    ids[:, :3] = 1
    one, two = (torch.zeros((1, 16, 2)) for _ in range(2))
    one[0, 6], two[0, 6] = before.log(), now.log()
    one[0, 8], two[0, 8] = torch.tensor([0.0, 0.0]), torch.tensor([30.0, 0.0])  # the surest, and far from still
    rule = rules.Klass(threshold=0.9, divergence=0.1, steps_alike=1)
    first = view_of(ids, one)
    rule(first)
    assert rule(view_of(ids, two, before=first)).nonzero().tolist() == [[0, 6]]


def test_credit_is_a_recurrence() -> None:
    rule = rules.Credit(0.9, strength=0.7, decay=0.8, power=0.2)
    view, credit = None, torch.zeros((16, 8), dtype=torch.float64)
    ids, _ = example(0, rows=1)
    for seed in range(3):
        _, logits = example(seed, rows=1)
        view = view_of(ids, logits, commit=rule, before=view)
        assert view.guess is not None
        for row, place in zip(view.guess.logits, view.guess.where[0].nonzero()[:, 0].tolist(), strict=True):
            probability = logits[0, place].double().softmax(-1)
            credit[place] *= 0.8
            credit[place, int(probability.argmax())] += float(probability.max()) ** 0.2
            assert torch.allclose(row.double(), logits[0, place].double() + 0.7 * (1 + credit[place]).log(), atol=1e-6)


def test_the_prior_is_a_share_of_known_text() -> None:
    """Certain far from all text loses to less certain beside it; two tokens are asked for."""
    ids, logits = example(3, rows=1)
    rule = rules.CertaintyPrior(width=1.5)
    view = view_of(ids, logits, quota=2)
    scores = {}
    for place in [place for place in BLOCK if ids[0, place] == MASK]:
        near = [math.exp(-0.5 * ((place - other) / 1.5) ** 2) for other in range(16)]
        known = sum(weight for other, weight in enumerate(near) if ids[0, other] != MASK)
        scores[place] = float(logits[0, place].double().softmax(-1).max()) * known / sum(near)
    wanted = sorted(sorted(scores, key=lambda place: -scores[place])[:2])
    assert rule(view)[0].nonzero()[:, 0].tolist() == wanted
    assert rules.Quota()(view)[0].nonzero()[:, 0].tolist() != wanted


IDENTITIES: list[Any] = [
    (rules.Threshold(1.0), 1),
    (rules.Factor(0.0), 1),
    (rules.AdaptiveThreshold(1.0, 0.0), 1),
    (rules.EntropyBound(0.0), 1),
    (rules.Klass(threshold=1.0), 1),
    (rules.Hierarchy(1.0, 1.0), 1),
    (rules.Credit(1.0), 1),
    (rules.LocalLeap(1.0, 0.0), 1),
    (rules.Threshold(0.0), None),
    (rules.Factor(100.0), None),
    (rules.EntropyBound(1000.0), None),
]


@pytest.mark.parametrize(("rule", "count"), IDENTITIES, ids=str)
def test_the_strictest_setting_is_one_token_and_the_loosest_all(rule: Commit, count: int | None) -> None:
    for seed in range(4):
        ids, logits = example(seed)
        view = view_of(ids, logits, commit=rule)
        got = rule(view)
        wanted = view.is_open.sum(1) if count is None else torch.full((3,), count)
        assert torch.equal(got.sum(1), wanted) and not (got & ~view.is_open).any()
        if count:
            assert torch.equal(got, rules.best(view.confidence))


@pytest.mark.parametrize("rule", [case[0] for case in CASES.values()], ids=str)
def test_a_row_without_open_places_commits_nothing(rule: Commit) -> None:
    ids, logits = example(5)
    ids[1] = 1
    assert rule(view_of(ids, logits)).sum(1)[1] == 0


@pytest.mark.parametrize("make", [rules.Threshold, rules.AdaptiveThreshold, rules.Klass, rules.Hierarchy, rules.LocalLeap])
def test_a_threshold_is_a_probability(make: Any) -> None:
    with pytest.raises(InputError, match="threshold must be a probability, got 90"):
        make(threshold=90)


@pytest.mark.parametrize(
    "rule", [rules.Quota(), rules.CertaintyPrior(), rules.Klass(), rules.Credit(), *(case[0] for case in CASES.values())], ids=str
)
def test_no_rule_leaves_the_block_however_far_the_end_is(rule: Commit) -> None:
    """A Gaussian of distance is exactly 0 from 40 standard deviations on."""
    ids, logits = torch.full((2, 900), MASK), torch.randn((2, 900, 8), generator=torch.Generator().manual_seed(0))
    ids[:, :3] = 1
    got = rule(view_of(ids, logits, commit=rule))
    assert bool(got.any(1).all()) and not bool(got[:, BLOCK.stop :].any())


@pytest.mark.parametrize("rule", [rules.Quota(4), rules.CertaintyPrior(per_block=4)], ids=str)
def test_a_schedule_that_has_ended_asks_for_one_token_at_least(rule: Commit) -> None:
    ids, logits = example(0)
    view = view_of(ids, logits)
    view.quota = torch.tensor([[1, 1, 0], [1, 0, 0], [2, 2, 2]])
    counts = []
    for view.step in (0, 2, 3, 9):
        counts.append(rule(view).sum(1).tolist())
    assert counts == [[1, 1, 2], [0, 0, 2], [1, 1, 2], [1, 1, 2]]

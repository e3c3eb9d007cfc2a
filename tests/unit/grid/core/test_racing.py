"""The race by hand, and on simulated scores whose truth is known: wrong answers, bias of a paired difference, draws saved."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import norm

from lib.core.errors import InputError
from lib.grid.core import racing
from lib.grid.core.racing import Choice, Race, Raced

DRAWS = 128


def scripted(values: Sequence[Sequence[Sequence[float]]], log: list[tuple[int, list[Choice]]] | None = None) -> racing.Draw:
    """Draws that are read off: document, choice, draw."""
    had: dict[Choice, int] = {}

    def draw(due: Sequence[Choice], look: int, count: int) -> list[Sequence[float]]:
        if log is not None:
            log.append((look, list(due)))
        found = []
        for document, choice in due:
            start = had.get((document, choice), 0)
            had[document, choice] = start + count
            found.append(values[document][choice][start : start + count])
        return found

    return draw


def test_a_choice_that_lies_clearly_behind_draws_no_more() -> None:
    behind, leader, close = [-9.0, -10.0, 50.0, 50.0], [-1.0, -2.0, -3.0, -3.0], [-1.5, -3.5, -1.0, -1.0]
    log: list[tuple[int, list[Choice]]] = []
    rule = Race(2, 3.0, 16)
    found = racing.race([[False] * 3], scripted([[behind, leader, close]], log), rule=rule, draws=4, audited=[False])
    # Means -9.5, -1.5, -2.5 with standard errors 0.5, 0.5, 1: 8 is more than 3 sqrt(0.5), 1 is less than 3 sqrt(1.25).
    assert log == [(0, [(0, 0), (0, 1), (0, 2)]), (1, [(0, 1), (0, 2)])]
    assert found.shown == found.final == [[-9.5, -2.25, -1.75]]
    assert (found.draws, found.all_draws, found.stopped, found.audited) == (10, 12, 0, 0)


def test_who_is_out_stays_out_however_the_leader_falls() -> None:
    out, leader, close = [-9.0, -10.0, -9.0, -9.0], [-1.0, -2.0, -99.0, -99.0], [-1.5, -3.5, -99.0, -99.0]
    found = racing.race([[False] * 3], scripted([[out, leader, close]]), rule=Race(2, 3.0, 16), draws=4, audited=[False])
    scores = found.shown[0]
    assert scores.index(max(scores)) == 1 and scores[0] < scores[1] == -50.25


def test_an_audited_document_makes_all_draws_and_shows_what_it_would_have_without() -> None:
    first, second = [-1.0, -1.5, -9.0, -9.0], [-8.0, -8.5, -1.0, -1.0]
    values, rule = [[first, second]], Race(2, 3.0, 16)
    plain, audited = (racing.race([[False] * 2], scripted(values), rule=rule, draws=4, audited=[it]) for it in (False, True))
    assert plain.shown == audited.shown == [[-1.25, -8.25]] == plain.final
    assert audited.final == [[-5.125, -4.625]]  # all draws say otherwise
    assert (plain.draws, plain.stopped, plain.audited) == (4, 1, 0)
    assert (audited.draws, audited.stopped, audited.audited) == (8, 1, 1)


def test_exact_scores_take_one_draw_and_a_tie_is_never_clear() -> None:
    log: list[tuple[int, list[Choice]]] = []
    values = [[[-1.0], [-2.0]], [[-3.0] * 4, [-3.0] * 4]]
    exact = [[True, True], [False, False]]

    def draw(due: Sequence[Choice], look: int, count: int) -> list[Sequence[float]]:
        log.append((look, list(due)))
        return [values[document][choice][:1] if exact[document][choice] else [-3.0] * count for document, choice in due]

    found = racing.race(exact, draw, rule=Race(2, 3.0, 16), draws=4, audited=[False, False])
    assert log[1] == (1, [(1, 0), (1, 1)]) and found.shown[0] == [-1.0, -2.0]
    assert (found.draws, found.all_draws, found.stopped) == (2 + 8, 2 + 8, 0)


@pytest.mark.parametrize(("change", "rule"), [((1, 3.0, 2), "2 draws"), ((2, 0.0, 2), "margin"), ((2, 3.0, 0), "audit")])
def test_settings_are_checked(change: tuple[int, float, int], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        Race(*change)


def test_who_is_audited_is_known_from_the_document_and_the_seed() -> None:
    rule = Race(16, 3.0, 8)
    chosen = [racing.is_audited(0, rule, "likelihood", f"document {number}") for number in range(4000)]
    assert sum(chosen) == pytest.approx(500, abs=4 * math.sqrt(500 * 7 / 8))
    assert chosen[:50] == [racing.is_audited(0, rule, "likelihood", f"document {number}") for number in range(50)]
    assert chosen != [racing.is_audited(1, rule, "likelihood", f"document {number}") for number in range(4000)]
    assert all(racing.is_audited(0, Race(16, 3.0, 1), number) for number in range(9))


# Simulated scores


class Benchmark:
    """Draws of two variants that share masks: skewed like sums of log-probabilities, of documents from clear to undecided."""

    def __init__(self, documents: int, *, seed: int, choices: int = 4) -> None:
        random = np.random.default_rng(seed)
        self.right = random.integers(choices, size=documents)
        truth = random.normal(0.0, 4.0, (documents, choices))
        truth[np.arange(documents), self.right] += 3.0
        other = truth + random.normal(0.0, 1.5, truth.shape)
        other[np.arange(documents), self.right] += 0.3  # the second variant is better
        noise = 8.0 * (1.0 - random.exponential(1.0, (documents, choices, DRAWS)))
        own = [4.0 * (1.0 - random.exponential(1.0, noise.shape)) for _ in range(2)]
        self.truths = [truth, other]
        self.values = [mean[..., None] + noise + extra for mean, extra in zip(self.truths, own, strict=True)]

    def race(self, variant: int, rule: Race, audited: Sequence[bool]) -> Raced:
        shape = self.values[variant].shape
        draw = scripted(self.values[variant].tolist())
        return racing.race([[False] * shape[1]] * shape[0], draw, rule=rule, draws=DRAWS, audited=audited)

    def marks(self, scores: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
        return np.asarray(scores).argmax(1) == self.right


def wrong_bound(rule: Race, *, choices: int) -> float:
    """What the module says of answers that differ from those of all draws."""
    return len(rule.batches(DRAWS)[:-1]) * (choices - 1) * float(norm.sf(rule.margin))


def test_wrong_answers_and_bias_stay_within_the_stated_bound() -> None:
    rule, size = Race(16, 3.0, 16), 3000
    made = Benchmark(size, seed=1)
    audited = [number % rule.audit == 0 for number in range(size)]
    raced = [made.race(variant, rule, audited) for variant in range(2)]
    whole = [made.values[variant].mean(-1) for variant in range(2)]
    bound = wrong_bound(rule, choices=4)
    assert bound == pytest.approx(3 * 3 * 0.00135, rel=0.01)
    for variant in range(2):
        answers = np.asarray(raced[variant].shown).argmax(1)
        changed = float((answers != whole[variant].argmax(1)).mean())
        assert changed <= bound
        truth = made.truths[variant].argmax(1)
        spoiled = float(((answers != truth) & (whole[variant].argmax(1) == truth)).mean())
        assert spoiled <= bound
        assert raced[variant].draws < 0.7 * raced[variant].all_draws  # it saves, although most of these documents are close
        assert np.allclose(np.asarray(raced[variant].final)[::16], whole[variant][::16])
    shown = made.marks(raced[1].shown).mean() - made.marks(raced[0].shown).mean()
    full = made.marks(whole[1]).mean() - made.marks(whole[0]).mean()
    assert full > 0.005 and abs(shown - full) <= 0.002  # stated: at most the sum of both shares, here 0.2 points


def test_a_margin_that_is_too_small_is_seen_by_the_same_measure() -> None:
    rule = Race(2, 0.5, 16)
    made = Benchmark(500, seed=2)
    raced = made.race(0, rule, [False] * 500)
    assert float((np.asarray(raced.shown).argmax(1) != made.values[0].mean(-1).argmax(1)).mean()) > 0.05


def test_corrected_values_are_those_of_all_draws_on_average_over_who_is_audited() -> None:
    """Exactly, whatever the margin: every document is audited in one of the draws of the lot."""
    rule, size = Race(2, 0.5, 4), 400  # wrong often
    made = Benchmark(size, seed=3)
    means = []
    for lot in range(rule.audit):
        audited = [number % rule.audit == lot for number in range(size)]
        difference = 0.0
        for variant, sign in ((1, 1.0), (0, -1.0)):
            raced = made.race(variant, rule, audited)
            marks = (made.marks(scores).tolist() for scores in (raced.shown, raced.final))
            difference += sign * float(np.mean(racing.corrected(*marks, audit=rule.audit)))
        means.append(difference)
    full = made.marks(made.values[1].mean(-1)).mean() - made.marks(made.values[0].mean(-1)).mean()
    raced = [made.race(variant, rule, [False] * size) for variant in range(2)]
    assert np.mean(means) == pytest.approx(full, abs=1e-12)
    assert made.marks(raced[1].shown).mean() - made.marks(raced[0].shown).mean() != pytest.approx(full, abs=1e-3)


def test_equal_scores_have_equal_answers() -> None:
    made, rule = Benchmark(200, seed=4), Race(4, 2.0, 16)
    assert made.race(0, rule, [False] * 200) == made.race(0, rule, [False] * 200)

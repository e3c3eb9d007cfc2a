"""Racing likelihoods: choices that lie clearly behind draw no more masks, and a sample of documents says what that changes.

A document is looked at after `first` draws a choice, and after twice as many, until all draws are made. At each look a choice
is out when its mean lies more than `margin` standard errors below the leader's; a document with one choice left has stopped, and
the leader is its answer. Every variant is raced by itself, by one rule and with the same masks, so that a cell does not depend on
which other variants there are. What is guaranteed:

1. Two variants whose scores are alike in distribution stop alike: between them the difference has no bias at all.
2. An answer differs from that of all draws at most as often as the better of two choices lies `margin` standard errors behind
   at a look: for normal means at most looks x (choices - 1) x P(Z < -margin). A paired difference of accuracies is off by at
   most the sum of both variants' shares, and by less where answers change in both directions.
3. That assumes much of means of few draws; so one document in `audit`, the same ones for every variant, makes all its draws
   whatever the race says. How many of their answers change is counted, and the mean of `corrected` values is that of all draws
   on average over which documents are audited, under no assumption. It is a check, not the estimate: it varies more.

Source: Hoeffding races (Maron and Moore, 1994), with normal bounds instead of Hoeffding's; the correction is the difference
    estimator of survey sampling (Sarndal, Swensson and Wretman, 1992, section 6.3).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lib.core.errors import require
from lib.core.runtime import generator

Choice = tuple[int, int]  # document, choice
Draw = Callable[[Sequence[Choice], int, int], Sequence[Sequence[float]]]  # choices, look, draws of it: the values of each choice


@dataclass(frozen=True)
class Race:
    """When draws end.

    Attributes:
        first: draws of every choice before the first look.
        margin: standard errors of the difference from the leader beyond which a choice is out.
        audit: one document in so many makes all draws; 1 is every document.
    """

    first: int
    margin: float
    audit: int

    def __post_init__(self) -> None:
        require(self.first >= 2, "a race must begin with 2 draws or more", str(self.first), "one draw has no standard error")
        require(self.margin > 0, "margin must be positive", f"{self.margin:g}", "use 3")
        require(self.audit >= 1, "audit must be 1 or more", str(self.audit), "use 16 for one document in 16")

    def batches(self, draws: int) -> list[int]:
        """Return the draws before each look: every look has twice as many as the one before.

        >>> Race(16, 3.0, 16).batches(128), Race(16, 3.0, 16).batches(40), Race(16, 3.0, 16).batches(10)
        ([16, 16, 32, 64], [16, 16, 8], [10])
        """
        made, found = 0, []
        while made < draws:
            found.append(min(max(self.first, made), draws - made))
            made += found[-1]
        return found


@dataclass(frozen=True)
class Raced:
    """What a race found.

    Attributes:
        shown: score of every choice of every document when it dropped out, or at the end.
        final: the same after all draws for documents that were audited; `shown` for the others.
        draws: that were made.
        all_draws: that would have been made without a race.
        stopped: documents whose race ended early.
        audited: of them, those that made all draws.
    """

    shown: list[list[float]]
    final: list[list[float]]
    draws: int
    all_draws: int
    stopped: int
    audited: int


@dataclass
class _Tally:
    """The draws of one choice so far."""

    draws: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Sequence[float]) -> None:
        """Count more draws."""
        self.draws += len(values)
        self.total += math.fsum(values)
        self.squares += math.fsum(value * value for value in values)

    @property
    def mean(self) -> float:
        """Estimate of the score."""
        return self.total / self.draws

    @property
    def error(self) -> float:
        """Standard error; 0 for a score that one draw gives exactly. Draws are stratified, so this is rather too large."""
        if self.draws < 2:
            return 0.0
        spread = max(self.squares - self.total * self.total / self.draws, 0.0) / (self.draws - 1)
        return math.sqrt(spread / self.draws)


def race(exact: Sequence[Sequence[bool]], draw: Draw, *, rule: Race, draws: int, audited: Sequence[bool]) -> Raced:
    """Score the choices of documents.

    Args:
        exact: for every choice of every document, whether a single draw gives its score.
        draw: makes draws; look by look, with the choices that still need some.
        rule: when draws end.
        draws: of a choice in all.
        audited: documents that make all draws.
    """
    tallies = [[_Tally() for _ in choices] for choices in exact]
    racing = [list(range(len(choices))) for choices in exact]
    shown = [[0.0] * len(choices) for choices in exact]
    batches = rule.batches(draws)
    early: set[int] = set()
    for look, count in enumerate(batches):
        whole = [look == 0 or audited[document] for document in range(len(exact))]
        due = [
            (document, choice)
            for document, choices in enumerate(exact)
            for choice in (range(len(choices)) if whole[document] else racing[document] if len(racing[document]) > 1 else ())
            if look == 0 or not choices[choice]
        ]
        for (document, choice), values in zip(due, draw(due, look, count), strict=True):
            tallies[document][choice].add(values)
        for document, choices in enumerate(racing):
            if look and len(choices) < 2:
                continue
            for choice in choices:
                shown[document][choice] = tallies[document][choice].mean
            racing[document] = contenders(choices, tallies[document], margin=rule.margin)
            if look < len(batches) - 1 and len(racing[document]) < 2 and not all(exact[document]):
                early.add(document)
    for scores, left in zip(shown, racing, strict=True):  # who is out stays out, however the leader's mean moved afterwards
        most = max(scores[choice] for choice in left)
        scores[:] = [s if c in left else min(s, math.nextafter(most, -math.inf)) for c, s in enumerate(scores)]
    final = [
        [tally.mean for tally in tallies[document]] if audited[document] else list(scores)
        for document, scores in enumerate(shown)
    ]
    made = sum(tally.draws for choices in tallies for tally in choices)
    possible = sum(1 if is_exact else draws for choices in exact for is_exact in choices)
    return Raced(shown, final, made, possible, len(early), sum(audited[document] for document in early))


def contenders(choices: Sequence[int], tallies: Sequence[_Tally], *, margin: float) -> list[int]:
    """Return the choices that do not lie clearly behind the leader; a tie is never clear."""
    leader = max(choices, key=lambda choice: tallies[choice].mean)
    best = tallies[leader]
    return [
        choice
        for choice in choices
        if choice == leader or best.mean - tallies[choice].mean <= margin * math.hypot(best.error, tallies[choice].error)
    ]


def corrected(shown: Sequence[bool], final: Sequence[bool], *, audit: int) -> list[float]:
    """Return values whose mean is, on average over which documents are audited, the accuracy of all draws.

    Args:
        shown: right or wrong at the end of each document's race.
        final: the same after all draws where a document was audited, else as `shown`.
        audit: one document in so many was audited.

    >>> corrected([True, False, True], [True, True, True], audit=8)
    [1.0, 8.0, 1.0]
    """
    return [float(mark) + audit * (float(end) - float(mark)) for mark, end in zip(shown, final, strict=True)]


def is_audited(seed: int, rule: Race, *names: str | int) -> bool:
    """Tell whether a document makes all draws: a coin that knows the document and the seed, and no model."""
    return int(generator(seed, "audit", *names).initial_seed()) % rule.audit == 0

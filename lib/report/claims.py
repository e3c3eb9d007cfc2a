"""Claims with their rule, estimate, interval and verdict."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from lib.core.errors import InputError
from lib.report.results import DECIDED, NOT_BEYOND, VERDICTS, interval_text
from lib.report.tables import Table, display_table

Interval = tuple[float, float]
Direction = Literal["above", "below"]
KEY = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")
CLAIM_COLUMNS = ("claim", "model", "estimate [95 % interval]", "unit", "n", "verdict", "rule", "note")


@dataclass(frozen=True)
class Claim:
    """One statement about one model, and what the numbers say about it.

    `estimate` is in `unit`; `interval` is the 95 % interval of the estimate over `n` independent values (prompts, seeds or
    windows); an infinite end means that the data do not bound it.
    """

    key: str
    statement: str
    rule: str
    model: str
    estimate: float | None
    interval: Interval | None
    n: int
    unit: str
    verdict: str
    source: str
    note: str = ""


def check_claim(claim: Claim) -> Claim:
    """Refuse a claim that contradicts itself or leaves out what a reader needs; a failed claim is fine.

    Args:
        claim: what a notebook wants to record.

    Returns:
        The same claim.

    Raises:
        InputError: an empty text, an unknown verdict, a number where there can be none or none where one is needed.
    """
    where = f"claim {claim.key!r}"
    if not KEY.fullmatch(claim.key):
        raise InputError(f"the key of a claim must be lower-case words joined by - or _, got {claim.key!r}: rename it")
    for name in ("statement", "rule", "model", "source"):
        if not getattr(claim, name).strip():
            raise InputError(f"{where} must say its {name}, got none: write it")
    if claim.verdict not in VERDICTS:
        raise InputError(f"the verdict of {where} must be one of {', '.join(VERDICTS)}, got {claim.verdict!r}: choose one")
    if claim.verdict == "not tested" and not claim.note.strip():
        raise InputError(f"{where} must say in note why it was not tested, got none: write it")
    _check_numbers(claim, where)
    return claim


def verdict(interval: Sequence[float], *, threshold: float, direction: Direction, mask_alone: float | None = None) -> str:
    """Decide a claim of the form "the quantity is above (below) the threshold" from its interval.

    Args:
        interval: low and high end, in the unit of `threshold`.
        threshold: the border that the claim names.
        direction: the side that the claim says the quantity is on.
        mask_alone: what attention without any preference gives under the same masks, where masks differ or favour a position.

    Returns:
        `reproduced` when the whole interval lies on the claimed side, `not reproduced` when it lies on the other side, else
        `inconclusive`; an interval that touches the threshold is inconclusive. What would be reproduced, but does not lie on the
        claimed side of what the mask alone gives, is `reproduced, not beyond the mask`.

    Raises:
        InputError: the interval is not an ordered pair of numbers, or the direction is unknown.

    >>> verdict((0.2, 0.4), threshold=0.1, direction="above"), verdict((0.2, 0.4), threshold=0.3, direction="above")
    ('reproduced', 'inconclusive')
    >>> verdict((0.2, 0.4), threshold=0.1, direction="above", mask_alone=0.3)
    'reproduced, not beyond the mask'
    """
    low, high = _ordered(interval, "the interval of a verdict")
    if direction not in ("above", "below"):
        raise InputError(f"direction must be above or below, got {direction!r}: choose one of them")
    if not math.isfinite(threshold):
        raise InputError(f"threshold must be a finite number, got {threshold}: give the border that the claim names")
    if low > threshold or high < threshold:
        if (low > threshold) != (direction == "above"):
            return "not reproduced"
        beyond = mask_alone is None or (low > mask_alone if direction == "above" else high < mask_alone)
        return "reproduced" if beyond else NOT_BEYOND
    return "inconclusive"


def bootstrap_mean(
    values: Iterable[float], *, generator: torch.Generator, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float, float]:
    """Estimate a mean and its percentile bootstrap interval.

    Args:
        values: independent values, one per prompt (seed, window); repeated measures of one prompt must be averaged first.
        generator: CPU generator of the bootstrap stream, as from `runtime.generator(seed, "bootstrap", name)`.
        level: probability that the interval is meant to cover, in (0, 1).
        resamples: how many times the values are drawn again with replacement.

    Returns:
        Mean, low and high end. One value alone bounds nothing: its interval is (-inf, inf).

    Raises:
        InputError: no values, one that is not finite, or a level outside (0, 1).

    Source: Efron's percentile method. With fewer than about ten values it covers less than `level`.
    """
    data = np.asarray(list(values), dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all():
        raise InputError(f"a mean must be over finite numbers, got {data.tolist()[:8]}: leave out what was not measured")
    if not 0 < level < 1 or resamples < 1:
        raise InputError(f"level must be in (0, 1) and resamples positive, got {level} and {resamples}: use 0.95 and 2000")
    mean = float(data.mean())
    if data.size == 1:
        return mean, -math.inf, math.inf
    picks = torch.randint(data.size, (resamples, data.size), generator=generator).numpy()
    low, high = np.quantile(data[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    # Equal values may differ from their own mean in the last bit, and an interval has to hold its estimate.
    return mean, min(float(low), mean), max(float(high), mean)


def mean_verdict(
    values: Iterable[float],
    *,
    threshold: float,
    direction: Direction,
    generator: torch.Generator,
    mask_alone: float | None = None,
) -> dict[str, Any]:
    """Estimate a mean and judge it: the parts of `Run.claim` that follow from numbers.

    Args:
        values: one per prompt (seed, window); those that are not finite had nothing to measure and are left out.
        threshold: border that the claim names.
        direction: which side the claim is on, as in `verdict`.
        generator: CPU generator of the bootstrap stream.
        mask_alone: as in `verdict`.

    Returns:
        `estimate`, `interval`, `n` and `verdict`; without any value the claim is inconclusive.
    """
    kept = [float(value) for value in values if math.isfinite(value)]
    if not kept:
        return {"estimate": None, "interval": None, "n": 0, "verdict": "inconclusive"}
    estimate, low, high = bootstrap_mean(kept, generator=generator)
    judged = verdict((low, high), threshold=threshold, direction=direction, mask_alone=mask_alone)
    return {"estimate": estimate, "interval": (low, high), "n": len(kept), "verdict": judged}


def beyond_mask(estimate: float, interval: Sequence[float], *, mask_alone: float) -> str:
    """Say in a claim's note what its statistic is beyond the mask: less what attention without any preference gives.

    >>> beyond_mask(-0.0874, (-0.0896, -0.0854), mask_alone=-0.123)
    'the mask alone gives -0.123; beyond it 0.0356 [0.0334, 0.0376]'
    """
    low, high = interval
    rest = interval_text(estimate - mask_alone, (low - mask_alone, high - mask_alone))
    return f"the mask alone gives {mask_alone:.3g}; beyond it {rest}"


def claims_table(claims: Iterable[Claim]) -> Table:
    """Show claims as a table, one row each.

    Args:
        claims: recorded claims.

    Returns:
        A table with statement, model, estimate with interval, unit, n, verdict, rule and note.
    """
    rows = [(c.statement, c.model, interval_text(c.estimate, c.interval), c.unit, c.n, c.verdict, c.rule, c.note) for c in claims]
    return display_table(pd.DataFrame(rows, columns=pd.Index(CLAIM_COLUMNS)), caption="Claims and verdicts")


def _ordered(interval: Sequence[float], what: str) -> Interval:
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise InputError(f"{what} must be a pair (low, high) with low <= high, got {tuple(interval)}: give two numbers in order")
    return float(interval[0]), float(interval[1])


def _check_numbers(claim: Claim, where: str) -> None:
    if claim.n < 0 or (claim.n == 0 and claim.verdict in DECIDED):
        raise InputError(f"n of {where} must count the values behind its verdict, got {claim.n}: give their number")
    if claim.estimate is None:
        if claim.interval is not None or claim.verdict in DECIDED:
            raise InputError(f"{where} must give an estimate with its interval and verdict, got None: give it or say not tested")
        return
    if claim.verdict == "not tested":
        raise InputError(f"{where} must have no estimate when not tested, got {claim.estimate}: use inconclusive")
    if not math.isfinite(claim.estimate):
        raise InputError(f"the estimate of {where} must be finite, got {claim.estimate}: use None and say not tested")
    if claim.interval is not None:
        low, high = _ordered(claim.interval, f"the interval of {where}")
        if not low <= claim.estimate <= high:
            raise InputError(f"the interval of {where} must hold its estimate, got {claim.estimate} and [{low}, {high}]: mend it")

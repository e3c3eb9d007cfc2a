"""Which share of the damage a change recovers: a gain over a baseline, over what the baseline lost against the dense model."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lib.core.errors import require
from lib.evaluation import paired
from lib.evaluation.paired import ALPHA, Interval
from lib.texts import articles

PAIRS = {
    "sink-aware (Wanda)": "Wanda", "sink-aware (SparseGPT)": "SparseGPT", "Wanda": "SparseGPT", "Sink-Aware": "Baseline",
}  # fmt: skip
DENSE, AVERAGE = "dense", "Avg"


@dataclass(frozen=True)
class Recovered:
    """A gain as a share of the damage: (baseline - first) / (baseline - dense), of losses.

    Attributes:
        estimate: the share; 1 means that nothing is lost any more, below 0 that the change harms. None where the 95 % interval
            of the damage holds 0: there is nothing sure to have a share of.
        interval: 95 %, of the ratio in the same resamples of units and seeds; unbounded when a resample shows no damage, None
            with the estimate.
        p_value: two-sided, of the share being the threshold.
        p_within: of the share being outside of plus or minus the bound: the larger of two one-sided sign-flip tests.
        bound: the largest share that counts as no effect; in (0, 1).
        n: number of units.
        threshold: share that a claim names; 0 for a gain of any size.
    """

    estimate: float | None
    interval: Interval | None
    p_value: float
    p_within: float
    bound: float
    n: int
    threshold: float = 0.0


def share_recovered(
    first: Float[Tensor, "*_seed _unit"],
    base: Float[Tensor, "*_seed _unit"],
    dense: Float[Tensor, "*_seed _unit"],
    *,
    bound: float,
    seed: int,
    threshold: float = 0.0,
) -> Recovered:
    """Measure which share of what a baseline lost is recovered by a change, and whether it is less than a bound.

    Args:
        first: losses of the changed method, a value per unit, or per calibration seed and unit.
        base: of the baseline, with the same seeds in the same order, or a single one.
        dense: of the dense model on the same units.
        bound: shares between minus and plus it are no effect of the size that was claimed; written down before the run.
        seed: of the bootstrap and of the sign flips.
        threshold: share that the p-value compares with, in [0, 1).

    Raises:
        InputError: a bound outside (0, 1), a threshold outside [0, 1), or what `paired_difference` refuses.

    Source: Schuirmann, two one-sided tests (1987); they ask whether gain + bound x damage and bound x damage - gain are above
        0, so that no ratio enters them. As every p-value here they speak of the given seeds; the interval, of new ones too.

    >>> base, dense = torch.tensor([[3.0, 5.0, 4.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    >>> share_recovered(base - 0.25 * (base - dense), base, dense, bound=0.5, seed=0).estimate
    0.25
    """
    require(0 < bound < 1, "the bound of no effect must be in (0, 1)", f"{bound}", "use half of the claimed share")
    require(0 <= threshold < 1, "the threshold of a share must be in [0, 1)", f"{threshold}", "give a share, not per cent")
    pairs = paired.paired_difference(base, first, seed=seed), paired.paired_difference(base, dense, seed=seed)
    gain, damage = (_rows(base) - _rows(side) for side in (first, dense))
    contrasts = {"above": gain + bound * damage, "below": bound * damage - gain, "threshold": gain - threshold * damage}
    tests = {key: paired.paired_difference(values, 0 * values, seed=seed, draws=1) for key, values in contrasts.items()}
    estimate, interval = None, None
    if pairs[1].interval[0] > 0:
        seeds = max(len(gain), len(damage))
        sides = torch.stack([side.expand(seeds, -1) for side in (gain, damage)])
        estimate = pairs[0].estimate / pairs[1].estimate
        means = paired.resampled_means(sides, seed=seed)
        interval = _interval(means[0], means[1], estimate)
    within = max(_one_sided(tests["above"]), _one_sided(tests["below"]))
    return Recovered(estimate, interval, tests["threshold"].p_value, within, bound, pairs[0].n, threshold)


def paper_shares() -> Iterator[tuple[str, str, float, str, float]]:
    """Yield (pattern, method, sparsity, task, share of the damage) for all of the authors' numbers that allow it.

    Both tables are of LLaDA-8B. The structured one has no dense row: that of the other table stands in, where it has the task;
    its `Avg` is ours, of these tasks. The third pair, Wanda over SparseGPT, is of two baselines.

    Source: README of the release (paper.md section 1.4), accuracies; (sink-aware - baseline) / (dense - baseline).
    """
    rows = articles.read_rows("paper_llada_50")
    dense = next(row for row in rows if row["method"] == DENSE)
    tables = {("unstructured", 0.5): (rows, 1.0)}
    for row in (structured := articles.read_rows("paper_structured")):
        tables["structured", float(row["ratio"])] = ([one for one in structured if one["ratio"] == row["ratio"]], 100.0)
    for (pattern, sparsity), (listed, scale) in tables.items():
        by_method = {row["method"]: row for row in listed}
        for method, base in PAIRS.items():
            if method in by_method:
                for task, share in _shares(by_method[method], by_method[base], dense, scale):
                    yield pattern, method, sparsity, task, share


def paper_share(method: str, *, pattern: str = "unstructured", sparsity: float = 0.5, task: str = AVERAGE) -> float:
    """Return one of `paper_shares`, NaN where the authors' numbers give none.

    >>> round(paper_share("sink-aware (Wanda)"), 4), round(paper_share("Sink-Aware", pattern="structured", sparsity=0.3), 3)
    (0.0918, 0.194)
    """
    known = {tuple(key): share for *key, share in paper_shares()}
    return known.get((pattern, method, sparsity, task), math.nan)


def _shares(
    ours: Mapping[str, str], base: Mapping[str, str], dense: Mapping[str, str], scale: float
) -> Iterator[tuple[str, float]]:
    for task in (key for key in ours if key in dense and key != "method"):
        reached, start = scale * float(ours[task]), scale * float(base[task])
        yield task, (reached - start) / (float(dense[task]) - start)
    if AVERAGE not in ours:
        tasks = [key for key in ours if key in dense and key != "method"]
        reached, start = (scale * sum(float(row[task]) for task in tasks) for row in (ours, base))
        yield AVERAGE, (reached - start) / (sum(float(dense[task]) for task in tasks) - start)


def _rows(values: Tensor) -> Float[Tensor, "seed unit"]:
    return values.detach().cpu().double().reshape(-1, values.shape[-1])


def _interval(gains: Float[Tensor, "draw"], damages: Float[Tensor, "draw"], estimate: float) -> Interval:
    """Return the percentile interval of the ratio."""
    if bool((damages <= 0).any()):
        return -float("inf"), float("inf")
    low, high = np.quantile((gains / damages).numpy(), [ALPHA / 2, 1 - ALPHA / 2]).tolist()
    return min(low, estimate), max(high, estimate)


def _one_sided(found: paired.PairedDifference) -> float:
    """Return the p-value of the mean being above 0: half of the two-sided one, as the null's signs are symmetric."""
    return found.p_value / 2 if found.estimate > 0 else 1 - found.p_value / 2

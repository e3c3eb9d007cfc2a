"""Which share of the damage a change recovers: a gain over a baseline, over what the baseline lost against the dense model."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lib.core.errors import require
from lib.evaluation import paired
from lib.evaluation.paired import ALPHA, Interval


@dataclass(frozen=True)
class Recovered:
    """A gain as a share of the damage: (baseline - first) / (baseline - dense), of losses.

    Attributes:
        estimate: the share; 1 means that nothing is lost any more, below 0 that the change harms.
        interval: 95 %, of the ratio in the same resamples of units and seeds; unbounded when a resample shows no damage.
        p_value: two-sided, of the gain being 0.
        p_within: of the share being outside of plus or minus the bound: the larger of two one-sided sign-flip tests.
        bound: the largest share that counts as no effect; in (0, 1).
        n: number of units.
    """

    estimate: float
    interval: Interval
    p_value: float
    p_within: float
    bound: float
    n: int


def share_recovered(
    first: Float[Tensor, "*_seed _unit"],
    base: Float[Tensor, "*_seed _unit"],
    dense: Float[Tensor, "*_seed _unit"],
    *,
    bound: float,
    seed: int,
) -> Recovered:
    """Measure which share of what a baseline lost is recovered by a change, and whether it is less than a bound.

    Args:
        first: losses of the changed method, a value per unit, or per calibration seed and unit.
        base: of the baseline, with the same seeds in the same order, or a single one.
        dense: of the dense model on the same units.
        bound: shares between minus and plus it are no effect of the size that was claimed; written down before the run.
        seed: of the bootstrap and of the sign flips.

    Raises:
        InputError: a bound outside (0, 1), no damage on average, or what `paired_difference` refuses.

    Source: Schuirmann, two one-sided tests (1987); they ask whether gain + bound x damage and bound x damage - gain are above
        0, so that no ratio enters them.

    >>> base, dense = torch.tensor([[3.0, 5.0, 4.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    >>> share_recovered(base - 0.25 * (base - dense), base, dense, bound=0.5, seed=0).estimate
    0.25
    """
    require(0 < bound < 1, "the bound of no effect must be in (0, 1)", f"{bound}", "use half of the claimed share")
    found = paired.paired_difference(base, first, seed=seed)
    damage = paired.paired_difference(base, dense, seed=seed).estimate
    require(damage > 0, "a share of the damage needs damage on average", f"{damage:.3g} nats", "prune more, or more windows")
    above = paired.paired_difference((1 + bound) * base, first + bound * dense, seed=seed)  # gain + bound x damage
    below = paired.paired_difference(first, (1 - bound) * base + bound * dense, seed=seed)  # bound x damage - gain
    sides = [_rows(base - first), _rows(base - dense)]
    seeds = max(map(len, sides))
    means = paired.resampled_means(torch.stack([side.expand(seeds, -1) for side in sides]), seed=seed)
    estimate = found.estimate / damage
    return Recovered(
        estimate=estimate,
        interval=_interval(means[0], means[1], estimate),
        p_value=found.p_value,
        p_within=max(_one_sided(above), _one_sided(below)),
        bound=bound,
        n=found.n,
    )


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

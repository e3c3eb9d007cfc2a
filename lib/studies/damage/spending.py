"""Where the variance of gains comes from, measured: between calibrations, held-out windows and masks, and what follows."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.evaluation import components
from lib.pruning import pruner
from lib.pruning.methods import Method, Target
from lib.studies.pruning import runs
from lib.studies.pruning.bench import Bench, Calibrations
from lib.studies.pruning.runs import DENSE

COMPONENTS = {
    "calibration": "calibrations", "window": "windows", "both": "calibrations x windows", "masks": "masks", "rest": "rest",
}  # fmt: skip


@dataclass(frozen=True)
class ByMasks:
    """Losses of several methods with several calibrations under several sets of masks.

    Attributes:
        losses: in nats per token by name, those of the dense model, alike for all calibrations, among them.
        calibrating: seconds in which a method reads its text and prunes, a mean over methods and calibrations.
        reading: seconds of one window under one mask.
    """

    losses: dict[str, Float[Tensor, "calibration window set"]]
    calibrating: float
    reading: float


def losses_by_masks(bench: Bench, chosen: Mapping[str, Method], target: Target, *, seeds: Sequence[int], sets: int) -> ByMasks:
    """Measure methods with several calibrations under several sets of masks, which all calibrations share.

    Args:
        bench: a diffusion model, calibration pool, held-out windows; a set has as many masks a window as it says.
        chosen: methods by name.
        target: of all.
        seeds: calibration seeds, two or more.
        sets: of masks, two or more.

    Returns:
        The losses, and what measuring them took.
    """
    shared, found, calibrating = replace(bench, own_masks=False), dict[str, list[Tensor]](), 0.0

    def under_all_masks() -> Float[Tensor, "window set"]:
        return torch.stack([runs.loss(replace(shared, seed=bench.seed + at)) for at in range(sets)], dim=1)

    began = time.perf_counter()
    dense = under_all_masks()
    reading = (time.perf_counter() - began) / (len(bench.windows) * bench.draws * sets)
    for seed in seeds:
        began = time.perf_counter()
        of_seed = Calibrations(shared, seed)
        of_seed.prepare(chosen.values())
        for name, method in chosen.items():
            of_seed.share(method)
            with pruner.restored(bench.model):
                runs.prune_(of_seed, method, target)
                calibrating += time.perf_counter() - began
                found.setdefault(name, []).append(under_all_masks())
            began = time.perf_counter()
    losses = {DENSE: dense.expand(len(seeds), -1, -1), **{name: torch.stack(rows) for name, rows in found.items()}}
    return ByMasks(losses, calibrating / (len(seeds) * len(chosen)), reading)


def table(
    differences: Mapping[str, Float[Tensor, "calibration window set"]],
    *,
    calibrations: int,
    windows: int,
    sets: float = 1,
    draws: int = 1,
    per_calibration: float = 0.0,
) -> pd.DataFrame:
    """Tabulate variance components of differences, and the standard errors that they promise.

    Args:
        differences: by name, in nats per token.
        calibrations: that are to be measured.
        windows: held-out windows that each of them is to be measured on.
        sets: of masks on each of them; a fraction where they are to have fewer masks than a set has here.
        draws: masks of a set.
        per_calibration: what a calibration takes, in passes of one window under one mask.

    Returns:
        One row a difference: its mean; the share of each component in the variance of a single value, in per cent; the standard
        error of the planned mean with the same masks for all calibrations and with masks of their own, in nats per token, and
        how much narrower the second is; then what a calibration takes and the best that as many passes could be spent on, masks
        of their own, no more windows than planned: calibrations, windows, masks of each, and the standard error of that.
    """
    rows, fewest = [], min(2, calibrations)
    budget = calibrations * per_calibration + max(calibrations * windows * sets, fewest) * draws
    limits = {"most_windows": windows, "per_draw": draws, "fewest_calibrations": fewest, "own_masks": True}
    for name, values in differences.items():
        found = components.components(values)
        parts = {label: max(getattr(found, part), 0.0) for part, label in COMPONENTS.items()}
        whole = sum(parts.values())
        shared, own = (
            math.sqrt(found.variance(calibrations=calibrations, windows=windows, draws=sets, own_masks=own))
            for own in (False, True)
        )
        best = components.best_spending(found, budget=budget, per_calibration=per_calibration, **limits)
        rows.append({
            "difference": name, "mean": float(values.mean()),
            **{f"{label}, %": 100 * part / whole if whole else math.nan for label, part in parts.items()},
            "standard error, same masks": shared, "standard error, own masks": own,
            "times narrower": shared / own if own else math.nan,
            "passes of a calibration": per_calibration, "best calibrations": best.calibrations,
            "best windows": best.windows, "best masks": best.draws * draws,
            "standard error, best": best.standard_error,
        })  # fmt: skip
    return pd.DataFrame(rows)

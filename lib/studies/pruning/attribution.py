"""Which of the four changes between the released Wanda and sink-aware variants pays: a full 2 x 2 x 2 x 2 factorial."""

from collections.abc import Mapping, Sequence
from itertools import product

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lib.calibration.sets import CLEAN, Inputs
from lib.core.errors import require
from lib.evaluation import paired
from lib.evaluation.paired import PairedDifference
from lib.pruning.methods import SINKS, Method, Target
from lib.studies.pruning import runs
from lib.studies.pruning.runs import Bench, Outcome

FACTORS = ("noised text", "sink weights", "one-shot", "sum of norms")
WEIGHTS = FACTORS.index("sink weights")
COLUMNS = {"inputs": ("clean", "noised"), "weights": ("off", "on"), "order": ("sequential", "one-shot"), "norm": ("RMS", "sum")}
Cell = tuple[int, ...]
ALPHA = 0.05
WANDA: Cell = (0, 0, 0, 0)
SINK_AWARE: Cell = (1, 1, 1, 1)


def method_of(cell: Cell, *, noised: Inputs) -> Method:
    """Return the method of one cell: each factor off (as in Wanda) or on (as in the release's sink-aware variant).

    >>> method_of((1, 0, 0, 0), noised=Inputs("noised")).inputs.kind
    'noised'
    """
    return Method(
        "wanda",
        noised if cell[0] else CLEAN,
        SINKS if cell[1] else None,
        sequential=not cell[2],
        aggregate="sum_of_norms" if cell[3] else "root_mean_square",
    )


def name_of(cell: Cell) -> str:
    """Return the name of a cell.

    >>> name_of((1, 0, 1, 0))
    'noised, weights off, one-shot, RMS'
    """
    words = [levels[on] for levels, on in zip(COLUMNS.values(), cell, strict=True)]
    return f"{words[0]}, weights {words[1]}, {words[2]}, {words[3]}"


def cells(*, noised: bool = True) -> list[Cell]:
    """List all combinations of levels; without noised text the eight that an autoregressive model has."""
    return [cell for cell in product((0, 1), repeat=len(FACTORS)) if noised or not cell[0]]


def measure(
    bench: Bench, *, sparsity: float, seeds: Sequence[int], noised: Inputs, further: Mapping[str, Method] | None = None
) -> list[Outcome]:
    """Measure all cells with every calibration seed: sixteen of a diffusion model, eight of an autoregressive one.

    Args:
        bench: model, calibration pool, held-out windows.
        sparsity: of every cell.
        seeds: calibration seeds; a seed draws the same windows and the same noise in every cell.
        noised: how text is noised where it is.
        further: methods measured beside the cells, by name.
    """
    chosen = {name_of(cell): method_of(cell, noised=noised) for cell in cells(noised=not bench.model.is_causal)}
    return runs.compare(bench, {**chosen, **(further or {})}, [Target(sparsity)], seeds=seeds)


def quality(outcomes: Sequence[Outcome]) -> dict[Cell, Float[Tensor, "seed window"]]:
    """Return minus the loss of every cell that the model has: higher is better, so that an effect is a gain.

    Raises:
        InputError: outcomes of several models, which would count as calibrations.
    """
    names = sorted({found.model for found in outcomes})
    require(len(names) <= 1, "a factorial must be of one model", ", ".join(names), "take them one by one")
    noised = any(found.method.startswith(COLUMNS["inputs"][1]) for found in outcomes)
    return {cell: -runs.stack([o.loss for o in outcomes if o.method == name_of(cell)]) for cell in cells(noised=noised)}


def effects(values: Mapping[Cell, Float[Tensor, "seed window"]], *, seed: int) -> pd.DataFrame:
    """Return main effects and interactions as gains in nats per token, with intervals and Holm-adjusted p-values."""
    return paired.factorial_effects(values, FACTORS, seed=seed).rename(columns={"estimate": "gain"})


def total(values: Mapping[Cell, Float[Tensor, "seed window"]], *, seed: int) -> PairedDifference:
    """Return the gain of all changes together: the released sink-aware variant over the released Wanda."""
    return paired.paired_difference(values[max(values)], values[WANDA], seed=seed)


def main_effect(values: Mapping[Cell, Float[Tensor, "seed window"]], factor: int) -> Float[Tensor, "seed window"]:
    """Return a main effect for every seed and window: the mean over cells where the factor is on, minus where it is off."""
    signed = [value if cell[factor] else -value for cell, value in values.items()]
    return runs.stack(signed).sum(0) / (len(signed) / 2)


def weights_beyond_the_rest(values: Mapping[Cell, Float[Tensor, "seed window"]], *, seed: int) -> PairedDifference:
    """Return the main effect of the sink weights minus those of the other three changes together."""
    others = sum(main_effect(values, factor) for factor in range(len(FACTORS)) if factor != WEIGHTS)
    assert isinstance(others, Tensor)
    return paired.paired_difference(main_effect(values, WEIGHTS), others, seed=seed)


def cell_table(outcomes: Sequence[Outcome], *, seed: int) -> pd.DataFrame:
    """Tabulate the loss of every cell with its 95 % interval over windows and seeds."""
    rows = []
    for cell, found in quality(outcomes).items():
        loss = paired.paired_difference(-found, found * 0.0, seed=seed)
        levels = {column: names[on] for (column, names), on in zip(COLUMNS.items(), cell, strict=True)}
        rows.append({**levels, "loss": loss.estimate, "low": loss.interval[0], "high": loss.interval[1]})
    return pd.DataFrame(rows)


def due_to_weights(
    values: Mapping[Cell, Float[Tensor, "seed window"]], table: pd.DataFrame, *, adjusted: float, seed: int
) -> str:
    """Judge the claim that the released gain is due to the sink weights.

    Args:
        values: quality of every cell.
        table: from `effects`.
        adjusted: Holm-adjusted p-value of `weights_beyond_the_rest` in the family of the claims.
        seed: of the bootstrap.

    Returns:
        `"reproduced"` when the weights' main effect exceeds those of the other three changes together, is above 0 itself
        (interval, and p-value adjusted over all effects), and the whole released change gains; `"not reproduced"` when it gains
        and the other three exceed the weights; else `"inconclusive"`, also when there is no gain to attribute.
    """
    difference = weights_beyond_the_rest(values, seed=seed)
    unclear = adjusted >= ALPHA or difference.interval[0] <= 0 <= difference.interval[1]
    if unclear or total(values, seed=seed).interval[0] <= 0:
        return "inconclusive"
    if difference.interval[1] < 0:
        return "not reproduced"
    alone = table[table["effect"] == FACTORS[WEIGHTS]].iloc[0]
    return "reproduced" if alone["low"] > 0 and alone["p_holm"] < ALPHA else "inconclusive"

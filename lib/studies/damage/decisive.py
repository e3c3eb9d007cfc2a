"""The five decisive claims: whether the recipe gains, as much as the paper says, and what of it causes the gain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lib.calibration.sets import Inputs
from lib.calibration.token_weights import Weighting
from lib.evaluation import recovered
from lib.studies.damage import shares
from lib.studies.damage.shares import Gain
from lib.studies.pruning import attribution, gain_tables, runs
from lib.studies.pruning.attribution import FACTORS, WANDA
from lib.studies.pruning.bench import Bench
from lib.studies.pruning.runs import Outcome
from lib.studies.pruning.tables import dense_loss, losses

WHOLE = "whole recipe"
RANDOM = "recipe, random positions for sinks"
SINKS_OVER_RANDOM = "sinks over random positions"
PAPER = recovered.paper_share("sink-aware (Wanda)")  # of what Wanda loses at half sparsity; half of it is the bound of no effect
Gains = Mapping[str, Float[Tensor, "seed window"]]


@dataclass(frozen=True)
class Question:
    """A claim that decides something.

    Attributes:
        key, statement: of the claim.
        part: of the recipe, whose share of Wanda's damage is estimated.
        at: the threshold, in shares of the paper's share.
    """

    key: str
    statement: str
    part: str
    at: float


QUESTIONS = (
    Question("recipe-gains", "The sink-aware recipe recovers some of what Wanda loses", WHOLE, 0.0),
    Question("gain-of-the-papers-size", "The sink-aware recipe recovers at least half of the paper's share", WHOLE, 0.5),
    Question("sink-weights-give-half", "The sink weights give at least half of the paper's share", FACTORS[1], 0.5),
    Question("noised-text-gives-half", "Noised text gives at least half of the paper's share", FACTORS[0], 0.5),
    Question("sinks-beat-random", "Taking out sinks beats taking out as many random positions", SINKS_OVER_RANDOM, 0.0),
)


def measure(bench: Bench, *, sparsity: float, seeds: Sequence[int], noised: Inputs) -> list[Outcome]:
    """Measure the dense model, all combinations of the four changes, and the whole recipe with random positions for sinks.

    Args:
        bench: model, calibration pool, held-out windows.
        sparsity: of all.
        seeds: calibration seeds.
        noised: how text is noised; an autoregressive model reads clean text, and has half of the combinations.
    """
    recipe = attribution.method_of(max(attribution.cells(noised=not bench.model.is_causal)), noised=noised)
    further = {RANDOM: replace(recipe, weighting=Weighting("random"))}
    cells = attribution.measure(bench, sparsity=sparsity, seeds=seeds, noised=noised, further=further)
    return [*runs.dense_of(bench, seeds), *cells]


def parts(outcomes: Sequence[Outcome]) -> dict[str, Float[Tensor, "seed window"]]:
    """Return what each part of the recipe gains over Wanda, in nats per token, for every calibration and window of one model.

    Single changes count with their main effects: the mean over all combinations of the others, which is surer than one
    comparison. The last is the gain of the recipe over itself with random positions for sinks.
    """
    values = attribution.quality(outcomes)
    of_random = -runs.stack([found.loss for found in outcomes if found.method == RANDOM])
    whole, wanda = values[max(values)], values[WANDA]
    varied = [factor for factor in range(len(FACTORS)) if len({cell[factor] for cell in values}) > 1]
    singles = {FACTORS[factor]: attribution.main_effect(values, factor) for factor in varied}
    return {WHOLE: whole - wanda, **singles, RANDOM: of_random - wanda, SINKS_OVER_RANDOM: whole - of_random}


def gain_of(outcomes: Sequence[Outcome], part: str, *, seed: int, at: float = 0.0) -> Gain | None:
    """Return the share of Wanda's damage that a part of the recipe recovers on one model; None for a part it does not have."""
    found = parts(outcomes)
    if part not in found:
        return None
    wanda = next(one for one in outcomes if one.method == attribution.name_of(WANDA))
    base = losses(outcomes, model=wanda.model, method=wanda.method, sparsity=wanda.sparsity)
    dense = dense_loss(outcomes, wanda.model)
    given = {"name": part, "model": wanda.model, "sparsity": wanda.sparsity, "paper": PAPER, "at": at, "seed": seed}
    return shares.recovers(base.double() - found[part].double(), base, dense, **given)


def rule(question: Question, *, sparsity: float) -> str:
    """Write the rule of a claim, with its bounds.

    >>> rule(QUESTIONS[0], sparsity=0.5).split("; ")[1:]
    ['interval above 0 % and Holm-adjusted p < 0.05', 'no effect: interval and one-sided tests within ± 4.59 %']
    """
    half, where = f"{50 * PAPER:.2f} %", f"share of what Wanda loses at {100 * sparsity:g} %"
    border = f"{100 * question.at * PAPER:.3g} %"
    return (
        f"{question.part}: {where}; interval above {border} and Holm-adjusted p < 0.05; "
        f"no effect: interval and one-sided tests within ± {half}"
    )


def answers(outcomes: Mapping[str, Sequence[Outcome]], *, seed: int) -> list[tuple[Question, Gain]]:
    """Answer every question about every model that can be asked it, in order: the family of the decisive claims."""
    asked = [
        (question, gain_of(found, question.part, seed=seed, at=question.at))
        for found in outcomes.values()
        for question in QUESTIONS
    ]
    return [(question, gain) for question, gain in asked if gain is not None]


def table(outcomes: Mapping[str, Sequence[Outcome]], *, seed: int) -> pd.DataFrame:
    """Tabulate the gain of every part on every model, in nats per token and as a share of Wanda's damage.

    Returns:
        One row a model and part; the paper's share stands where the paper has the comparison, at the whole recipe.
    """
    rows = []
    for name, found in outcomes.items():
        for part in parts(found):
            gain = gain_of(found, part, seed=seed)
            assert gain is not None
            share = shares.columns(gain if part == WHOLE else replace(gain, paper=float("nan")))
            windows = {"windows": gain.comparison.result.n}
            rows.append({"model": name, "part": part, **gain_tables.gain_columns(gain.comparison), **share, **windows})
    return gain_tables.adjusted_table(rows, first=("model", "part"))

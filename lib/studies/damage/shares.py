"""Gains as shares of the damage, beside the paper's share: columns, tables, verdicts, and the numbers of a claim."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lib.evaluation import paired, recovered
from lib.evaluation.recovered import Recovered
from lib.report.results import interval_text
from lib.studies.pruning import gain_tables
from lib.studies.pruning.gain_tables import Comparison, Condition
from lib.studies.pruning.runs import DENSE, Outcome
from lib.studies.pruning.tables import Results, dense_loss, losses

SHARE = "share of the damage, %"
PAPER = "paper's share, %"
SHARE_COLUMNS = (SHARE, "share, low", "share, high")
UNIT = "% of the damage"
NO_CLAIM = 0.5  # bound where the paper claims no share: no verdict rests on it
Losses = Float[Tensor, "_seed window"]
NO_NAMES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Gain:
    """A gain in nats per token and as a share of the damage.

    Attributes:
        comparison: of the two conditions, in nats per token.
        share: of what the second lost against the dense model; None where the gain is over something else.
        paper: the paper's share, NaN where its tables give none; half of it is the bound of no effect.
    """

    comparison: Comparison
    share: Recovered | None = None
    paper: float = math.nan

    @property
    def p_value(self) -> float:
        """Two-sided, of the share being the threshold, or of no gain where there is no share."""
        return self.comparison.result.p_value if self.share is None else self.share.p_value

    @property
    def is_bounded(self) -> bool:
        """Whether there is a size that no effect can be told from."""
        return self.share is not None and math.isfinite(self.paper)


@dataclass(frozen=True)
class Judged:
    """What a gain's numbers say, in a family: the verdict, and both p-values, adjusted."""

    verdict: str
    adjusted: float
    adjusted_within: float


def recovers(
    first: Losses,
    base: Losses,
    dense: Losses,
    *,
    name: str,
    model: str,
    sparsity: float,
    seed: int,
    paper: float = math.nan,
    at: float = 0.0,
) -> Gain:
    """Measure a gain in nats and as a share of what a baseline lost.

    Args:
        first: loss of the better condition, or the baseline's less an effect that is a mean over many conditions.
        base: loss of the baseline.
        dense: of the dense model.
        name: for tables.
        model: on which model.
        sparsity: of the first.
        seed: of the bootstrap and of the sign flips.
        paper: the paper's share.
        at: threshold that a claim names, in shares of the paper's share: 0 for a gain of any size, 0.5 for half of it.

    Raises:
        InputError: windows or calibrations that do not pair.
    """
    known = math.isfinite(paper)
    options = {"bound": abs(paper) / 2 if known else NO_CLAIM, "threshold": at * paper if known else 0.0, "seed": seed}
    compared = gain_tables.gain(first, base, name=name, model=model, sparsity=sparsity, seed=seed)
    return Gain(compared, recovered.share_recovered(first, base, dense, **options), paper)


def between(
    outcomes: Sequence[Outcome],
    better: tuple[str, float],
    worse: tuple[str, float],
    *,
    model: str,
    seed: int,
    name: str = "",
    pattern: str = "unstructured",
    paper: float = math.nan,
) -> Gain:
    """Measure the gain of one (method, sparsity) over another, and which share it is of what the other lost.

    Args:
        outcomes: of both, with the same calibrations, and of the dense model.
        better: method and sparsity whose gain it is.
        worse: what it is a gain over.
        model: on which model.
        seed: of the bootstrap.
        name: for tables; the two methods when empty.
        pattern: of both.
        paper: the paper's share.

    Raises:
        KeyError: one of them was not measured.
    """
    first, base = (losses(outcomes, model=model, method=m, sparsity=s, pattern=pattern) for m, s in (better, worse))
    at = (model, *worse, pattern)
    seeds = [o.seed for o in outcomes if (o.model, o.method, o.sparsity, o.pattern) == at]
    given = {"name": name or f"{better[0]} - {worse[0]}", "model": model, "sparsity": better[1], "seed": seed, "paper": paper}
    return recovers(first, base, dense_loss(outcomes, model, seeds), **given)


def judge(gains: Sequence[Gain], *, besides: Iterable[float] = ()) -> list[Judged]:
    """Judge the gains of a family; both p-values are adjusted over all of it that have them.

    A gain for which the paper gives a share may also have no effect of that size, see `gain_tables.verdict_by_share`.

    Args:
        gains: of the family.
        besides: p-values of what else the family tests.
    """
    adjusted = paired.holm(dict(enumerate([*(found.p_value for found in gains), *besides])))
    within = {at: found.share.p_within for at, found in enumerate(gains) if found.is_bounded and found.share is not None}
    within = paired.holm(within)
    judged = []
    for at, found in enumerate(gains):
        if found.is_bounded and found.share is not None:
            given = {"adjusted": adjusted[at], "adjusted_within": within[at]}
            judged.append(Judged(gain_tables.verdict_by_share(found.share, **given), adjusted[at], within[at]))
        else:
            said = gain_tables.verdict(found.comparison.result, adjusted=adjusted[at])
            judged.append(Judged(said, adjusted[at], math.nan))
    return judged


def claim_numbers(found: Gain, judged: Judged) -> dict[str, Any]:
    """Return what `Run.claim` takes of a gain: in per cent of the damage where the paper gives a share, else in nats a token."""
    result = found.comparison.result
    nats = f"{interval_text(result.estimate, result.interval)} nats per token"
    numbers = {"model": found.comparison.model, "n": result.n, "verdict": judged.verdict}
    note = f"calibrations: {found.comparison.seeds}; Holm-adjusted p {judged.adjusted:.2g}"
    if not found.is_bounded or found.share is None:
        note += f"; smallest effect seen {result.smallest_effect:.2g}"
        return {**numbers, "estimate": result.estimate, "interval": result.interval, "unit": "nats per token", "note": note}
    note = f"{nats}; paper {100 * found.paper:.3g} %; {note}, of no effect {judged.adjusted_within:.2g}"
    estimate, low, high = _per_cent(found.share)
    if math.isnan(estimate):
        return {**numbers, "estimate": None, "interval": None, "unit": UNIT, "note": f"no damage that is sure; {note}"}
    return {**numbers, "estimate": estimate, "interval": (low, high), "unit": UNIT, "note": note}


def columns(found: Gain) -> dict[str, float]:
    """Return the columns of a share: estimate and interval, and the paper's, in per cent; NaN where there is none."""
    return dict(zip((*SHARE_COLUMNS, PAPER), (*_per_cent(found.share), 100 * found.paper), strict=True))


def with_accuracy_shares(
    compared: pd.DataFrame,
    pairs: Sequence[tuple[Condition, Condition]],
    by_calibration: Sequence[Results],
    dense: Results,
    *,
    seed: int,
    paper_tasks: Mapping[str, str] = NO_NAMES,
) -> pd.DataFrame:
    """Join to a table of accuracies which share of the lost accuracy the first recovers, in per cent, beside the paper's.

    Args:
        compared: from `gain_tables.mcnemar_table` or `gain_tables.accuracy_table`.
        pairs: that it was made of.
        by_calibration: answers of each calibration, by (model, method, sparsity, task).
        dense: answers of the dense model, among any others; without them there is no share.
        seed: of the bootstrap.
        paper_tasks: the paper's names of tasks; all others stand beside its average.

    Returns:
        The table with its columns; NaN where no loss of accuracy is sure, and where the paper has no number.
    """
    named = {" - ".join(gain_tables.condition_name(side) for side in pair): pair for pair in pairs}
    rows = []
    for model, task, comparison in compared[["model", "task", "comparison"]].itertuples(index=False, name=None):
        first, second = named[comparison]
        wrong = [1.0 - gain_tables.correct_answers(by_calibration, (model, *side, task)) for side in (first, second)]
        share, key = None, (model, DENSE, 0.0, task)
        if key in dense:
            of_dense = 1.0 - gain_tables.correct_answers([dense], key)
            share = recovered.share_recovered(wrong[0], wrong[1], of_dense, bound=NO_CLAIM, seed=seed)
        same = recovered.PAIRS.get(first[0]) == second[0] and first[1] == second[1]
        name = paper_tasks.get(task, recovered.AVERAGE)
        paper = recovered.paper_share(first[0], sparsity=first[1], task=name) if same else math.nan
        rows.append((*_per_cent(share), 100 * paper))
    return compared.join(pd.DataFrame(rows, columns=pd.Index([*SHARE_COLUMNS, PAPER])))


def own_columns(found: Gain) -> dict[str, float]:
    """Return the columns of a share without the paper's, for gains that the paper has no number of."""
    return dict(zip(SHARE_COLUMNS, _per_cent(found.share), strict=True))


def table(gains: Sequence[Gain]) -> pd.DataFrame:
    """Tabulate gains as `gain_tables.comparison_table` does, and their shares."""
    compared = gain_tables.comparison_table([found.comparison for found in gains])
    return compared.join(pd.DataFrame([columns(found) for found in gains], columns=pd.Index([*SHARE_COLUMNS, PAPER])))


def gain_by_sparsity(outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]], *, model: str, seed: int) -> pd.DataFrame:
    """Tabulate the gain of each (method, baseline) at every unstructured sparsity that both were measured at."""
    rows = []
    for method, baseline in pairs:
        measured = [
            {o.sparsity for o in outcomes if (o.model, o.method, o.pattern) == (model, name, "unstructured")}
            for name in (method, baseline)
        ]
        for sparsity in sorted(measured[0] & measured[1]):
            paper = recovered.paper_share(method, sparsity=sparsity)
            found = between(outcomes, (method, sparsity), (baseline, sparsity), model=model, seed=seed, paper=paper)
            own = {"model": model, "pair": f"{method} - {baseline}", "sparsity": sparsity}
            rows.append({**own, **gain_tables.gain_columns(found.comparison), **columns(found)})
    return pd.DataFrame(rows)


def gains_over(outcomes: Sequence[Outcome], *, base: str, sparsity: float, seed: int) -> pd.DataFrame:
    """Tabulate the gain of every method over one of them, model by model, with p-values adjusted over all rows.

    Args:
        outcomes: with the same calibration seeds for all methods of a model, and of its dense model under their masks.
        base: the method that the others are compared with.
        sparsity: of all.
        seed: of the bootstrap.
    """
    rows = []
    for model, method in dict.fromkeys((found.model, found.method) for found in outcomes):
        if method not in (base, DENSE):
            found = between(outcomes, (method, sparsity), (base, sparsity), model=model, seed=seed)
            rows.append({"model": model, "weighting": method, **gain_tables.gain_columns(found.comparison), **own_columns(found)})
    return gain_tables.adjusted_table(rows, first=("model", "weighting"))


def extension_table(
    groups: Mapping[str, tuple[Sequence[Outcome], Float[Tensor, "seed window"]]],
    *,
    best: tuple[str, Float[Tensor, "best_seed window"]],
    dense: Losses,
    seed: int,
) -> pd.DataFrame:
    """Tabulate extensions against the base that they change in one thing, and against the best baseline.

    Args:
        groups: outcomes by extension, and losses of its base; all with the same calibration seeds.
        best: name and losses of the best baseline.
        dense: losses of the dense model.
        seed: of the bootstrap.
    """
    rows = []
    for extension, (outcomes, base) in groups.items():
        for model, variant, sparsity in dict.fromkeys((o.model, o.method, o.sparsity) for o in outcomes):
            own = losses(outcomes, model=model, method=variant, sparsity=sparsity)
            given = {"name": variant, "model": model, "sparsity": sparsity, "seed": seed}
            over_base = recovers(own, base, dense, **given)
            over_best = gain_tables.gain(own, best[1], **given).result
            rows.append({
                "model": model, "extension": extension, "variant": variant, **gain_tables.gain_columns(over_base.comparison),
                **own_columns(over_base), "best baseline": best[0], "gain over best": over_best.estimate,
                "best, low": over_best.interval[0], "best, high": over_best.interval[1],
            })  # fmt: skip
    return gain_tables.adjusted_table(rows, first=("model", "extension", "variant"))


def _per_cent(found: Recovered | None) -> tuple[float, float, float]:
    if found is None or found.estimate is None or found.interval is None:
        return math.nan, math.nan, math.nan
    return 100 * found.estimate, 100 * found.interval[0], 100 * found.interval[1]

"""Tables of compressed models: loss by method and sparsity, paired comparisons, accuracies, the paper's numbers beside ours."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib import data, evaluation, paired
from lib.paired import PairedDifference
from lib.pruning_runs import DENSE, STRUCTURED, Outcome
from lib.tasks import TaskResult

PATTERNS = ("unstructured", "4:8", "2:4", STRUCTURED)


def losses(
    outcomes: Sequence[Outcome], *, model: str, method: str, sparsity: float, pattern: str = "unstructured"
) -> Float[Tensor, "seed window"]:
    """Stack the losses of one condition, a row a calibration seed.

    Raises:
        KeyError: nothing was measured under it.
    """
    wanted = (model, method, sparsity, pattern)
    rows = [found.loss for found in outcomes if (found.model, found.method, found.sparsity, found.pattern) == wanted]
    if not rows:
        raise KeyError(f"no outcome of {wanted}")
    return torch.stack(rows)


def dense_loss(outcomes: Sequence[Outcome], model: str) -> Float[Tensor, "one window"]:
    """Return the losses of the dense model."""
    return losses(outcomes, model=model, method=DENSE, sparsity=0.0)


def conditions(outcomes: Sequence[Outcome]) -> list[tuple[str, str, str, float]]:
    """List (model, method, pattern, sparsity) of what was measured, once each, in order."""
    return list(dict.fromkeys((found.model, found.method, found.pattern, found.sparsity) for found in outcomes))


def loss_table(outcomes: Sequence[Outcome], *, seed: int) -> pd.DataFrame:
    """Tabulate the loss of every condition and its increase over the dense model.

    Args:
        outcomes: of one or several models, each with its dense row.
        seed: of the bootstrap.

    Returns:
        One row a condition: `loss` in nats per token; `increase`, its 95 % interval over windows and calibration seeds; `seeds`.
    """
    rows = []
    for model, method, pattern, sparsity in conditions(outcomes):
        found = losses(outcomes, model=model, method=method, sparsity=sparsity, pattern=pattern)
        measured = [
            o.measured_sparsity
            for o in outcomes
            if (o.model, o.method, o.pattern, o.sparsity) == (model, method, pattern, sparsity)
        ]
        increase = paired.paired_difference(found, dense_loss(outcomes, model), seed=seed)
        rows.append({
            "model": model, "method": method, "pattern": pattern, "sparsity": sparsity,
            "measured sparsity": sum(measured) / len(measured), "loss": float(found.mean()), "increase": increase.estimate,
            "low": increase.interval[0], "high": increase.interval[1], "seeds": len(found),
        })  # fmt: skip
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Comparison:
    """A gain: by how much the first condition's loss lies below the second's, in nats per token.

    Attributes:
        name: of the comparison, for tables.
        model: on which model.
        sparsity: of both.
        result: of the paired test, positive when the first is better.
        seeds: calibration seeds.
    """

    name: str
    model: str
    sparsity: float
    result: PairedDifference
    seeds: int


def gain(
    first: Float[Tensor, "seed window"],
    second: Float[Tensor, "_seed window"],
    *,
    name: str,
    model: str,
    sparsity: float,
    seed: int,
) -> Comparison:
    """Compare two conditions on the same windows: positive when the first has the lower loss."""
    result = paired.paired_difference(second, first, seed=seed)
    return Comparison(name, model, sparsity, result, max(len(first), len(second)))


def comparison_table(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """Tabulate gains with intervals, p-values adjusted over all rows, and the smallest effect the run could have seen."""
    listed = list(comparisons)
    adjusted = paired.holm({index: found.result.p_value for index, found in enumerate(listed)})
    return pd.DataFrame([
        {
            "comparison": found.name, "model": found.model, "sparsity": found.sparsity, "gain": found.result.estimate,
            "low": found.result.interval[0], "high": found.result.interval[1], "p": found.result.p_value,
            "p (Holm)": adjusted[index], "effect size": found.result.effect_size,
            "smallest effect": found.result.smallest_effect, "windows": found.result.n, "seeds": found.seeds,
        }
        for index, found in enumerate(listed)
    ])  # fmt: skip


def accuracy_table(results: Mapping[tuple[str, str, float, str], TaskResult]) -> pd.DataFrame:
    """Tabulate accuracies with Wilson intervals.

    Args:
        results: by (model, method, sparsity, task).

    Returns:
        One row a result, in per cent; `usable` tells whether the dense model's interval lies above chance on that task.
    """
    usable = usable_tasks(results)
    rows = []
    for (model, method, sparsity, task), found in results.items():
        low, high = evaluation.share_interval(sum(found.correct), len(found.correct))
        rows.append({
            "model": model, "task": task, "method": method, "sparsity": sparsity,
            "accuracy": 100 * sum(found.correct) / len(found.correct), "low": 100 * low, "high": 100 * high,
            "chance": 100 * found.chance, "documents": len(found.correct), "usable": (model, task) in usable,
        })  # fmt: skip
    return pd.DataFrame(rows)


def usable_tasks(results: Mapping[tuple[str, str, float, str], TaskResult]) -> set[tuple[str, str]]:
    """Return the (model, task) on which the dense model's 95 % interval lies above chance: others give no verdict."""
    found = set()
    for (model, method, _, task), result in results.items():
        low, _high = evaluation.share_interval(sum(result.correct), len(result.correct))
        if method == DENSE and low > result.chance:
            found.add((model, task))
    return found


def mcnemar_table(
    results: Mapping[tuple[str, str, float, str], TaskResult], pairs: Sequence[tuple[str, str]], *, seed: int
) -> pd.DataFrame:
    """Compare the accuracies of pairs of methods at equal sparsity by exact McNemar tests, Holm-adjusted over all rows.

    Args:
        results: by (model, method, sparsity, task).
        pairs: (method, baseline).
        seed: of the bootstrap.
    """
    found = []
    for (model, method, sparsity, task), first in results.items():
        for better, baseline in pairs:
            second = results.get((model, baseline, sparsity, task))
            if method == better and second is not None:
                found.append(
                    (model, task, f"{better} - {baseline}", sparsity, paired.mcnemar(first.correct, second.correct, seed=seed))
                )
    adjusted = paired.holm({index: row[-1].p_value for index, row in enumerate(found)})
    return pd.DataFrame([
        {
            "model": model, "task": task, "comparison": name, "sparsity": sparsity, "difference, points": 100 * test.difference,
            "low": 100 * test.interval[0], "high": 100 * test.interval[1], "only first": test.only_first,
            "only second": test.only_second, "p": test.p_value, "p (Holm)": adjusted[index],
            "smallest effect, points": 100 * test.smallest_effect, "documents": test.n,
        }
        for index, (model, task, name, sparsity, test) in enumerate(found)
    ])  # fmt: skip


def paper_table(
    outcomes: Sequence[Outcome], results: Mapping[tuple[str, str, float, str], TaskResult], *, model: str
) -> pd.DataFrame:
    """Put our numbers at 50 % beside the authors' LLaDA-8B table, in its shape.

    Source: README of the release (paper.md section 1.4); `NaN` where it prints nothing.
    """
    rows = []
    for row in data.read_rows("paper_llada_50"):
        method = row["method"]
        sparsity = 0.0 if method == DENSE else 0.5
        ours: dict[str, float] = {
            "our loss, nats per token": float(losses(outcomes, model=model, method=method, sparsity=sparsity).mean())
        }
        for (name, kind, level, task), result in results.items():
            if (name, kind, level) == (model, method, sparsity):
                ours[f"our {task}, %"] = 100 * sum(result.correct) / len(result.correct)
        rows.append({"method": method, **{f"paper {key}": value for key, value in row.items() if key != "method"}, **ours})
    return pd.DataFrame(rows)

"""Tables of compressed models: loss by method and sparsity, accuracies, the paper's and the digest's numbers beside ours."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.evaluation import paired, sums
from lib.evaluation.tasks import TaskResult
from lib.studies.pruning.runs import DENSE, STRUCTURED, Outcome
from lib.texts import articles
from lib.texts.rows import loss_per_character

Condition = tuple[str, str, str, float]
Results = Mapping[tuple[str, str, float, str], TaskResult]
Weights = Mapping[str, Tensor]  # by model, of `rows.character_weights`
PER_CHARACTER = "loss per character"
Speeds = Mapping[str, Mapping[tuple[str, float], tuple[float, float, float]]]


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


def dense_loss(outcomes: Sequence[Outcome], model: str, seeds: Sequence[int] = ()) -> Float[Tensor, "seed window"]:
    """Return the losses of the dense model: a single row, or one for each calibration that has masks of its own.

    Args:
        outcomes: with dense rows.
        model: whose.
        seeds: calibrations wanted where there are several rows; all of them when empty.

    Raises:
        KeyError: the dense model was not measured under the masks of one of them.
    """
    rows = {found.seed: found.loss for found in outcomes if (found.model, found.method) == (model, DENSE)}
    if not rows:
        raise KeyError(f"no outcome of the dense {model}")
    return torch.stack(list(rows.values()) if len(rows) == 1 or not seeds else [rows[seed] for seed in seeds])


def conditions(outcomes: Sequence[Outcome]) -> list[Condition]:
    """List (model, method, pattern, sparsity) of what was measured, once each, in order."""
    return list(dict.fromkeys((found.model, found.method, found.pattern, found.sparsity) for found in outcomes))


def loss_columns(
    outcomes: Sequence[Outcome], condition: Condition, *, seed: int, weights: Weights | None = None
) -> dict[str, float]:
    """Return loss, increase over dense and its interval of one (model, method, pattern, sparsity); NaN if not measured.

    With weights the loss in nats per character stands beside that per token.
    """
    beside = () if weights is None else (PER_CHARACTER,)
    if condition not in conditions(outcomes):
        return dict.fromkeys(("loss", *beside, "increase", "low", "high"), math.nan)
    model, method, pattern, sparsity = condition
    found = losses(outcomes, model=model, method=method, sparsity=sparsity, pattern=pattern)
    seeds = [o.seed for o in outcomes if (o.model, o.method, o.pattern, o.sparsity) == condition]
    increase = paired.paired_difference(found, dense_loss(outcomes, model, seeds), seed=seed)
    low, high = increase.interval
    each = {} if weights is None else {PER_CHARACTER: loss_per_character(found, weights[model])}
    return {"loss": float(found.mean()), **each, "increase": increase.estimate, "low": low, "high": high}


def loss_table(outcomes: Sequence[Outcome], *, seed: int, weights: Weights | None = None) -> pd.DataFrame:
    """Tabulate the loss of every condition and its increase over the dense model.

    Args:
        outcomes: of one or several models, each with its dense row.
        seed: of the bootstrap.
        weights: by model, of `rows.character_weights`: what models of different tokenizers compare by.

    Returns:
        One row a condition: `loss` in nats per token, with weights in nats per character, too; `increase`, its 95 % interval over
        windows and calibration seeds; `seeds`.
    """
    rows = []
    for condition in conditions(outcomes):
        measured = [o.measured_sparsity for o in outcomes if (o.model, o.method, o.pattern, o.sparsity) == condition]
        named = dict(zip(("model", "method", "pattern", "sparsity"), condition, strict=True))
        mean = sum(measured) / len(measured)
        found = loss_columns(outcomes, condition, seed=seed, weights=weights)
        rows.append({**named, "measured sparsity": mean, **found, "seeds": len(measured)})
    return pd.DataFrame(rows)


def accuracy_table(results: Results) -> pd.DataFrame:
    """Tabulate accuracies with Wilson intervals.

    Args:
        results: by (model, method, sparsity, task).

    Returns:
        One row a result, in per cent; `usable` tells whether the dense model's interval lies above chance on that task.
    """
    usable = usable_tasks(results)
    rows = []
    for (model, method, sparsity, task), found in results.items():
        low, high = sums.share_interval(sum(found.correct), len(found.correct))
        rows.append({
            "model": model, "task": task, "method": method, "sparsity": sparsity,
            "accuracy": 100 * sum(found.correct) / len(found.correct), "low": 100 * low, "high": 100 * high,
            "chance": 100 * found.chance, "documents": len(found.correct), "usable": (model, task) in usable,
        })  # fmt: skip
    return pd.DataFrame(rows)


def usable_tasks(results: Results) -> set[tuple[str, str]]:
    """Return the (model, task) on which the dense model's 95 % interval lies above chance: others give no verdict."""
    found = set()
    for (model, method, _, task), result in results.items():
        low, _high = sums.share_interval(sum(result.correct), len(result.correct))
        if method == DENSE and low > result.chance:
            found.add((model, task))
    return found


def paper_table(outcomes: Sequence[Outcome], results: Results, *, model: str, seed: int) -> pd.DataFrame:
    """Put our numbers at 50 % beside the authors' LLaDA-8B table, in its shape.

    Source: README of the release (paper.md section 1.4); `NaN` where it prints nothing.
    """
    rows = []
    for row in articles.read_rows("paper_llada_50"):
        method = row["method"]
        sparsity = 0.0 if method == DENSE else 0.5
        found = loss_columns(outcomes, (model, method, "unstructured", sparsity), seed=seed)
        ours = {"our loss, nats per token": found["loss"]}
        for (name, kind, level, task), result in results.items():
            if (name, kind, level) == (model, method, sparsity):
                ours[f"our {task}, %"] = 100 * sum(result.correct) / len(result.correct)
        rows.append({"method": method, **{f"paper {key}": float(value) for key, value in row.items() if key != "method"}, **ours})
    return pd.DataFrame(rows)


def paper_structured_table(outcomes: Sequence[Outcome], *, model: str, seed: int) -> pd.DataFrame:
    """Put our structured losses beside the authors' structured table, in its shape.

    Source: README of the release (paper.md section 1.4); its baseline is not named, ours has the same calibration without
        sink weights.
    """
    ours = {"Baseline": "no sink weights", "Sink-Aware": "sink-aware (Wanda)"}
    rows = []
    for row in articles.read_rows("paper_structured"):
        ratio, method = float(row["ratio"]), ours[row["method"]]
        found = loss_columns(outcomes, (model, method, STRUCTURED, ratio), seed=seed)
        ours_columns = {"our loss": found["loss"], "our increase": found["increase"], "low": found["low"], "high": found["high"]}
        paper = {f"paper {key}": float(value) for key, value in row.items() if key not in ("ratio", "method")}
        rows.append({"ratio": ratio, "method": row["method"], **paper, "our method": method, **ours_columns})
    return pd.DataFrame(rows)


def digest_table(outcomes: Sequence[Outcome], results: Results, speeds: Speeds, *, seed: int) -> pd.DataFrame:
    """Regenerate the digest's table: its accuracies and speed-ups beside ours.

    Args:
        outcomes: measured losses.
        results: accuracies by (model, method, sparsity, task).
        speeds: by model, from `runs.speed_ups`.
        seed: of the bootstrap.

    Returns:
        One row a model and row of the digest. Our accuracy is that of each usable task; our speed-up is that of zeros in dense
        matrices, which is what these methods leave, and beside it that of smaller matrices of the same sparsity.

    Source: a research digest of the paper (paper.md section 1.7); not the paper's table.
    """
    usable, rows = usable_tasks(results), []
    for model, speed in speeds.items():
        for row in articles.read_rows("digest_gsm8k"):
            method, sparsity = row["method"], float(row["sparsity"])
            found = loss_columns(outcomes, (model, method, "unstructured", sparsity), seed=seed)
            line: dict[str, object] = {
                "model": model, "method": method, "pruned, %": 100 * sparsity, "digest GSM8K, %": float(row["GSM8K"]),
                "increase of the loss": found["increase"], "low": found["low"], "high": found["high"],
            }  # fmt: skip
            for task in sorted({task for name, task in usable if name == model}):
                result = results.get((model, method, sparsity, task))
                line[f"{task}, %"] = math.nan if result is None else 100 * sum(result.correct) / len(result.correct)
            line["digest speed-up"] = float(row["speed-up"])
            for label, pattern in (("zeros", "unstructured"), ("smaller", STRUCTURED)):
                unknown = (math.nan,) * 3 if sparsity else (1.0,) * 3  # the dense row is its own baseline
                middle, low, high = speed.get((pattern, sparsity), unknown)
                line |= {f"speed-up, {label}": middle, f"{label}, quartile 1": low, f"{label}, quartile 3": high}
            rows.append(line)
    return pd.DataFrame(rows)

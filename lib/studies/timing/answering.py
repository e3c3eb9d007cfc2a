"""Right answers by published decoder, and of commit rules against how many tokens a pass writes."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch

from lib.core.errors import require
from lib.decoding import systems as published_systems
from lib.decoding.commit import Commit
from lib.decoding.decoder import DecodingPlan
from lib.decoding.systems import System
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.tasks import LoadedTask
from lib.models.language_model import LanguageModel
from lib.studies.timing.runs import PLAIN
from lib.studies.timing.tasks import answer_block, answers, compared

LARGEST_DROP = 5.0  # points of accuracy below the first point, from which on points of a curve do not count
PENALTY = 3.0  # of accuracy lost, in the area under the curve


def curve(
    model: LanguageModel,
    task: LoadedTask,
    thresholds: Sequence[float],
    names: Sequence[str],
    *,
    settings: EvaluationSettings,
    limit: int,
    plain: Sequence[bool],
) -> pd.DataFrame:
    """Answer a task with commit rules at several settings of their dial.

    Args:
        model: a diffusion model with its tokenizer.
        task: of generation.
        thresholds: settings, see `systems.commits_by`.
        names: rules, of `systems.commits_by`.
        settings: lengths and blocks.
        limit: documents.
        plain: which of them the plain sampler answers with these settings.

    Returns:
        One row a rule and threshold: `task`; `block`, that of the answers; `parallelism`, tokens a forward pass; the columns of
        `tasks.compared`; and `area`, of the rule's curve, see `area`.
    """
    _known("curve_rules", names, list(published_systems.commits_by(0.5)))
    settings = replace(settings, batch_size=1)  # so that passes are of one text
    own = {"task": task.name, "block": answer_block(task, settings)}
    rows = [{**own, "rule": PLAIN, "threshold": 1.0, "parallelism": 1.0, **compared(plain, None)}]
    for name in names:
        for threshold in thresholds:
            tally: list[tuple[int, int]] = []
            plan = DecodingPlan(published_systems.commits_by(threshold)[name])
            right = answers(model, task, plan, settings=settings, limit=limit, tally=tally)
            point = {**own, "rule": name, "threshold": threshold, "parallelism": _parallelism(tally)}
            rows.append({**point, **compared(right, plain)})
    table = pd.DataFrame(rows)
    first = (1.0, 100 * sum(plain) / len(plain))
    areas = {PLAIN: first[1]}
    for name in names:
        own = table[table["rule"] == name]
        points = [first, *zip(own["parallelism"].tolist(), (100 * own["accuracy"]).tolist(), strict=True)]
        areas[name] = area(points)
    return table.assign(area=[areas[str(name)] for name in table["rule"]])


def settings_by_block(task: LoadedTask, settings: EvaluationSettings, lengths: Sequence[int]) -> list[EvaluationSettings]:
    """Return settings with each block length, but for those with which the answers have the same blocks as with an earlier one.

    >>> from lib.studies.timing.tasks import load
    >>> short, long = load("tiny_topic_generated"), load("tiny_topic_written")
    >>> [[each.block_length for each in settings_by_block(task, EvaluationSettings(), [8, 16, 64])] for task in (short, long)]
    [[8], [8, 16, 64]]
    """
    found: dict[int, EvaluationSettings] = {}
    for length in lengths:
        own = replace(settings, block_length=length)
        found.setdefault(answer_block(task, own), own)
    return list(found.values())


def check_names(curve_rules: Sequence[str], answering: Sequence[str], *, fixed: Commit) -> None:
    """Refuse names of rules and systems that there are none of, before anything is measured."""
    _known("curve_rules", curve_rules, list(published_systems.commits_by(0.5)))
    _known("answering_systems", answering, _every_system(fixed))


def _every_system(fixed: Commit) -> list[str]:
    """Return the names of all systems, those among them that some models have no place or no delimiter for."""
    return [each.name for each in published_systems.published(threshold=0.5, fixed=fixed, delimiters=(0,))]


def _known(setting: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names of nothing."""
    for name in names:
        require(name in known, f"{setting} must be among {', '.join(known)}", repr(name), "choose one")


def _parallelism(tally: Sequence[tuple[int, int]]) -> float:
    """Return tokens a forward pass."""
    tokens, forwards = (sum(part) for part in zip(*tally, strict=True))
    return tokens / forwards


def area(points: Sequence[tuple[float, float]]) -> float:
    """Return the area under accuracy against parallelism, accuracy that is lost being penalised.

    Args:
        points: (tokens a forward pass, accuracy in per cent), the first one the baseline's.

    Returns:
        r_1 y_1 + half the sum of (r_i - r_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))), W(y) = min(exp(-3 (1 - y / y_max)), 1), over
        the points in order of r whose y is at least y_1 - 5.

    Raises:
        InputError: no points.

    Source: AUP of hao-ai-lab's text-diffusion evaluation (d3LLM), with its alpha of 3.

    >>> area([(1.0, 50.0)]), round(area([(1.0, 50.0), (2.0, 50.0), (3.0, 44.0)]), 3)
    (50.0, 100.0)
    """
    require(len(points) > 0, "a curve must have points", "none", "measure some")
    first = points[0][1]
    kept = sorted(point for point in points if point[1] >= first - LARGEST_DROP)
    highest = max(y for _, y in kept)

    def weighted(y: float) -> float:
        return y * min(float(torch.exp(torch.tensor(-PENALTY * (1 - y / highest), dtype=torch.float64))), 1.0) if highest else 0.0

    total = kept[0][0] * kept[0][1]
    for (before, low), (now, high) in itertools.pairwise(kept):
        total += (now - before) * (weighted(high) + weighted(low)) / 2
    return total


def system_accuracies(
    model: LanguageModel,
    task: LoadedTask,
    listed: Sequence[System],
    *,
    settings: EvaluationSettings,
    limit: int,
    names: Sequence[str],
    plain: Sequence[bool],
) -> pd.DataFrame:
    """Answer a task with some systems, each compared with the plain sampler document by document.

    Args:
        model: a diffusion model with its tokenizer.
        task: of generation.
        listed: systems.
        settings: lengths and blocks.
        limit: documents.
        names: systems that answer; those that are not `listed` for this model are left out.
        plain: which documents the plain sampler answers with these settings.

    Returns:
        One row a system, the plain sampler first: `task`; `block`, that of the answers; and the columns of `tasks.compared`.
    """
    _known("answering_systems", names, _every_system(Commit()))
    own = {"task": task.name, "block": answer_block(task, settings)}
    rows = [{**own, "system": PLAIN, **compared(plain, None)}]
    for each in (each for each in listed if each.name in names):
        right = answers(model, task, each.plan, settings=settings, limit=limit)
        rows.append({**own, "system": each.name, **compared(right, plain)})
    return pd.DataFrame(rows)

"""The table of published decoders, its control, and accuracy against parallelism."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from lib.core.errors import require
from lib.decoding import systems as published_systems
from lib.decoding.by_attention.control import SETTINGS, Control
from lib.decoding.by_attention.recompute import D2Cache, Focus
from lib.decoding.commit import Commit
from lib.decoding.decoder import DecodingPlan
from lib.decoding.systems import System
from lib.evaluation import paired
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.sums import share_interval
from lib.evaluation.tasks import LoadedTask
from lib.models.language_model import LanguageModel
from lib.studies.timing import fidelity
from lib.studies.timing.fidelity import Fidelity
from lib.studies.timing.runs import PLAIN, Plan, judged, run_decoder
from lib.studies.timing.tasks import answers, difference_interval
from lib.timing import clock

PLAIN_SYSTEM = System(PLAIN, DecodingPlan(), PLAIN, "")
LARGEST_DROP = 5.0  # points of accuracy below the first point, from which on points of a curve do not count
PENALTY = 3.0  # of accuracy lost, in the area under the curve


def compare(
    model: LanguageModel,
    prompts: Int[Tensor, "prompt position"],
    listed: Sequence[System],
    *,
    new_tokens: int,
    block: int,
    repeats: int,
    seed: int,
    judge: LanguageModel | None = None,
    answered: Mapping[str, dict[str, float]] | None = None,
) -> pd.DataFrame:
    """Let every system continue the same prompts, one at a time.

    Args:
        model: a diffusion model.
        prompts: of equal length, two or more.
        listed: systems; the plain sampler is added.
        new_tokens: tokens after every prompt.
        block: tokens of a block.
        repeats: timed rounds.
        seed: of the bootstrap over prompts.
        judge: an autoregressive model with the same tokens.
        answered: of `accuracy_rows`, for the systems that answered a task.

    Returns:
        One row a system: its four choices, `rival` and `control`; `forwards`, `rows` (query positions computed) and `seconds`
        (median of the rounds) of all prompts; `top1` and `KL` against exact passes, in all and with at most a third (`late`), two
        thirds (`middle`) and more of the text masked (`early`); `agreement`, the share of the plain sampler's
        tokens; `nats` per token under the judge, with the paired `difference` to the rival's and its 95 % interval.
    """
    every = [PLAIN_SYSTEM, *listed]
    sizes: dict[str, Any] = {"new_tokens": new_tokens, "block_length": block, "batch_size": 1}
    plans: dict[str, Plan] = {each.name: PLAIN if each is PLAIN_SYSTEM else each.plan for each in every}
    runs = {name: _measured(model, prompts, plan, new_tokens=new_tokens, block=block) for name, plan in plans.items()}
    calls: dict[str, Callable[[], object]] = {
        name: partial(run_decoder, model, prompts, plan, **sizes) for name, plan in plans.items()
    }
    seconds = clock.interleaved(calls, repeats=repeats, warm_up=0, device=model.device)  # the texts have warmed up
    whole = torch.ones((len(prompts), new_tokens), dtype=torch.bool, device=model.device)
    nats = {name: None if judge is None else judged(judge, run.ids, whole) for name, run in runs.items()}
    rows = []
    for each in every:
        run = runs[each.name]
        same = (run.ids == runs[PLAIN].ids)[:, prompts.shape[1] :].double().mean()
        rows.append({
            "system": each.name, "choice": each.choice, **each.parts, "rival": each.rival,
            "control": "sinks" if each.name in published_systems.ranked(Control(), DecodingPlan().commit) else "",
            "block": block, "forwards": sum(part.forwards for part in run.decoded),
            "rows": sum(part.computed_tokens for part in run.decoded), "seconds": float(seconds[each.name].median()),
            "top1": float(run.top1.mean()), "KL": float(run.divergence.mean()), "agreement": float(same), **_by_ratio(run),
            **_against(nats[each.name], nats[each.rival], seed=seed), **((answered or {}).get(each.name, {})),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _measured(model: LanguageModel, prompts: Tensor, plan: Plan, *, new_tokens: int, block: int) -> Fidelity:
    """Measure fidelity, or where passes are exact only decode."""
    if not fidelity.is_exact(plan):
        return fidelity.measure(model, prompts, plan, new_tokens=new_tokens, block=block)
    sizes: dict[str, Any] = {"new_tokens": new_tokens, "block_length": block, "batch_size": 1}
    texts = tuple(run_decoder(model, prompt, plan, **sizes) for prompt in prompts.split(1))
    ones = torch.ones(len(prompts), dtype=torch.float64)
    both = torch.stack([ones, 0 * ones], 1)[:, None].expand(-1, len(fidelity.EDGES) - 1, -1)
    return Fidelity(texts, ones, 0 * ones, both)


def _by_ratio(run: Fidelity) -> dict[str, float]:
    """Return top-1 and KL at each third of mask ratios, means over the prompts that have one."""
    found = run.by_ratio.nanmean(0).T.tolist()
    names = [f"{what} {third}" for what in ("top1", "KL") for third in ("late", "middle", "early")]
    return dict(zip(names, [*found[0], *found[1]], strict=True))


def _against(values: Tensor | None, rival: Tensor | None, *, seed: int) -> dict[str, float]:
    """Return the mean of the judge's nats, and their paired difference to the rival's."""
    if values is None or rival is None:
        return dict.fromkeys(("nats", "nats difference", "nats low", "nats high"), float("nan"))
    pair = paired.paired_difference(values, rival, seed=seed)
    found = (float(values.mean()), pair.estimate, *pair.interval)
    return dict(zip(("nats", "nats difference", "nats low", "nats high"), found, strict=True))


def control(
    model: LanguageModel,
    prompts: Int[Tensor, "prompt position"],
    *,
    fixed: Commit,
    new_tokens: int,
    block: int,
    seed: int,
    settings: Sequence[str] = SETTINGS,
) -> pd.DataFrame:
    """Run every system that ranks by attention with sinks as they fall, forced in, forced out, at random, and by confidence.

    Args:
        model: a diffusion model.
        prompts: of equal length, two or more.
        fixed: the commit rule of systems that are not about committing.
        new_tokens: tokens after every prompt.
        block: tokens of a block.
        seed: of the random control and of the bootstrap.
        settings: of the control, those that systems have as they are published among them.

    Returns:
        The rows of `fidelity.control_rows` with the `system`, p-values also adjusted by Holm over all of them (`p Holm`).
    """
    sizes = {"new_tokens": new_tokens, "block": block}
    plain = run_decoder(model, prompts, PLAIN, new_tokens=new_tokens, block_length=block, batch_size=len(prompts)).ids
    rows: list[dict[str, object]] = []
    for name in published_systems.ranked(Control(), fixed):
        runs = {}
        for setting in settings:
            plan = published_systems.ranked(Control(setting, seed), fixed)[name]  # type: ignore[arg-type]
            runs[setting] = _measured(model, prompts, plan, **sizes)
        plan, usual = published_systems.ranked(Control(), fixed)[name], published_systems.REFERENCE.get(name, "as they fall")
        # FOCUS and d2Cache predict some open places alone, and which ones depends on the setting.
        by_text = fidelity.is_exact(plan) or isinstance(plan.recompute, Focus | D2Cache)
        own = fidelity.control_rows(runs, plain, start=prompts.shape[1], by_text=by_text, seed=seed, usual=usual)
        rows += [{"system": name, "block": block, "usual": usual, **row} for row in own]
    tested = {index: float(str(row["p"])) for index, row in enumerate(rows) if row["control"] != row["usual"]}
    adjusted = paired.holm(tested)
    return pd.DataFrame([{**row, "p Holm": adjusted.get(index, float("nan"))} for index, row in enumerate(rows)])


def curve(
    model: LanguageModel,
    task: LoadedTask,
    thresholds: Sequence[float],
    names: Sequence[str],
    *,
    settings: EvaluationSettings,
    limit: int,
) -> pd.DataFrame:
    """Answer a task with commit rules at several settings of their dial.

    Args:
        model: a diffusion model with its tokenizer.
        task: of generation.
        thresholds: settings, see `systems.commits_by`.
        names: rules, of `systems.commits_by`.
        settings: lengths and blocks.
        limit: documents.

    Returns:
        One row a rule and threshold: `parallelism`, tokens a forward pass; `accuracy` with its 95 % interval, and `difference` to
        one token a step with its own; `area`, of the rule's curve, see `area`.
    """
    _known("curve_rules", names, list(published_systems.commits_by(0.5)))
    settings = replace(settings, batch_size=1)  # so that passes are of one text
    plain = answers(model, task, PLAIN, settings=settings, limit=limit)
    rows = [_point("plain sampler", 1.0, 1.0, plain, plain)]
    for name in names:
        for threshold in thresholds:
            tally: list[tuple[int, int]] = []
            plan = DecodingPlan(published_systems.commits_by(threshold)[name])
            right = answers(model, task, plan, settings=settings, limit=limit, tally=tally)
            rows.append(_point(name, threshold, _parallelism(tally), right, plain))
    table = pd.DataFrame(rows)
    first = (1.0, 100 * sum(plain) / len(plain))
    areas = {"plain sampler": first[1]}
    for name in names:
        own = table[table["rule"] == name]
        points = [first, *zip(own["parallelism"].tolist(), (100 * own["accuracy"]).tolist(), strict=True)]
        areas[name] = area(points)
    return table.assign(area=[areas[str(name)] for name in table["rule"]])


def check_names(curve_rules: Sequence[str], answering: Sequence[str], *, fixed: Commit) -> None:
    """Refuse names of rules and systems that there are none of, before anything is measured."""
    _known("curve_rules", curve_rules, list(published_systems.commits_by(0.5)))
    listed = published_systems.published(threshold=0.5, fixed=fixed, delimiters=(0,))
    _known("answering_systems", answering, [each.name for each in listed])


def _known(setting: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names of nothing."""
    for name in names:
        require(name in known, f"{setting} must be among {', '.join(known)}", repr(name), "choose one")


def _parallelism(tally: Sequence[tuple[int, int]]) -> float:
    """Return tokens a forward pass."""
    tokens, forwards = (sum(part) for part in zip(*tally, strict=True))
    return tokens / forwards


def _point(name: str, threshold: float, parallelism: float, right: Sequence[bool], plain: Sequence[bool]) -> dict[str, object]:
    """Return one row of `curve`."""
    low, high = share_interval(sum(right), len(right))
    only = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((right, plain), (plain, right))]
    ends = difference_interval(only[0], only[1], documents=len(right))
    return {
        "rule": name, "threshold": threshold, "parallelism": parallelism, "accuracy": sum(right) / len(right),
        "accuracy low": low, "accuracy high": high, "difference": (only[0] - only[1]) / len(right),
        "difference low": ends[0], "difference high": ends[1], "documents": len(right),
    }  # fmt: skip


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


def accuracy_rows(
    model: LanguageModel,
    task: LoadedTask,
    listed: Sequence[System],
    *,
    settings: EvaluationSettings,
    limit: int,
    names: Sequence[str],
) -> Mapping[str, dict[str, float]]:
    """Answer a task with some systems, each compared with the plain sampler document by document.

    Args:
        model: a diffusion model with its tokenizer.
        task: of generation.
        listed: systems.
        settings: lengths and blocks.
        limit: documents.
        names: systems that answer.

    Returns:
        By name `accuracy`, `accuracy difference` to the plain sampler and the ends of its interval.
    """
    _known("answering_systems", names, [each.name for each in listed])
    plain = answers(model, task, PLAIN, settings=settings, limit=limit)
    found = {PLAIN: plain}
    for each in listed:
        if each.name in names:
            found[each.name] = answers(model, task, each.plan, settings=settings, limit=limit)
    rows = {}
    for name, right in found.items():
        point = _point(name, 0.0, 0.0, right, plain)
        keys = ("accuracy", "difference", "difference low", "difference high")
        rows[name] = {key.replace("difference", "accuracy difference"): float(str(point[key])) for key in keys}
    return rows

"""The table of published decoders, and its control."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from lib.decoding import systems as published_systems
from lib.decoding.by_attention.control import SETTINGS, Choice, Control, Setting, untested
from lib.decoding.by_attention.recompute import D2Cache, Focus
from lib.decoding.commit import Commit
from lib.decoding.decoder import DecodingPlan
from lib.decoding.recompute import Recompute
from lib.decoding.remask import Shadows
from lib.decoding.systems import System
from lib.decoding.visible import Visible
from lib.evaluation import paired
from lib.models.language_model import LanguageModel
from lib.studies.timing import fidelity
from lib.studies.timing.fidelity import Fidelity
from lib.studies.timing.runs import PLAIN, Plan, judged, run_decoder
from lib.timing import clock
from lib.timing.effort import watched

MEGABYTE = 1e6
PLAIN_SYSTEM = System(PLAIN, DecodingPlan(), PLAIN, "")
CONTROLLED = tuple(published_systems.ranked(Control(), Commit(), threshold=0.5))  # the systems that rank by attention


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

    Returns:
        One row a system: its four choices, `rival`, how it differs from that (`against rival`), and `control`; `forwards`, `rows`
        (query positions computed), `seconds` (median of the rounds, without any instrument of the control) and `peak MB` (memory
        beyond what was there before, once) of all prompts;
        `top1` and `KL` against exact passes, in all and with at most a third (`late`), two thirds (`middle`) and more of the text
        masked (`early`); `agreement`, the share of the plain sampler's tokens; `nats` per token under the judge, with the paired
        `difference` to the rival's and its 95 % interval. What does nothing at this length says so in `not tested`, and has no
        scores.
    """
    every = [PLAIN_SYSTEM, *listed]
    total, sizes = prompts.shape[1] + new_tokens, {"new_tokens": new_tokens, "block_length": block, "batch_size": 1}
    runnable = [each for each in every if not _shows_all(each.plan, total=total, new_tokens=new_tokens, block=block)]
    plans: dict[str, Plan] = {each.name: PLAIN if each is PLAIN_SYSTEM else each.plan for each in runnable}
    runs = {name: _measured(model, prompts, plan, new_tokens=new_tokens, block=block) for name, plan in plans.items()}
    calls = {name: partial(run_decoder, model, prompts, plan, **sizes) for name, plan in plans.items()}
    seconds = clock.interleaved(calls, repeats=repeats, warm_up=0, device=model.device)  # the texts have warmed up
    whole = torch.ones((len(prompts), new_tokens), dtype=torch.bool, device=model.device)
    peaks = {name: watched(call, device=model.device)[1].peak for name, call in calls.items()}
    nats = {name: None if judge is None else judged(judge, run.ids, whole) for name, run in runs.items()}
    by_name, rows = {each.name: each for each in every}, []
    for each in every:
        row = {"system": each.name, "choice": each.choice, **each.parts, "rival": each.rival,
               "against rival": each.against(by_name[each.rival]), "control": "sinks" if each.name in CONTROLLED else "",
               "block": block}  # fmt: skip
        run = runs.get(each.name)
        row["not tested"] = "nothing is cut off at this length" if run is None else _idle(each.plan, run)
        if run is not None:
            row |= _costs(run) | {"seconds": float(seconds[each.name].median()), "peak MB": peaks[each.name] / MEGABYTE}
        if run is not None and not row["not tested"]:
            same = (run.ids == runs[PLAIN].ids)[:, prompts.shape[1] :].double().mean()
            row |= {"agreement": float(same), **_fidelity(run), **_against(nats[each.name], nats.get(each.rival), seed=seed)}
        rows.append(row)
    return pd.DataFrame(rows)


def _costs(run: Fidelity) -> dict[str, int]:
    """Return the passes over all prompts, and the query positions that they computed."""
    forwards, computed = (sum(getattr(part, name) for part in run.decoded) for name in ("forwards", "computed_tokens"))
    return {"forwards": forwards, "rows": computed}


def _shows_all(plan: Plan, *, total: int, new_tokens: int, block: int) -> bool:
    """Tell whether a decoder that cuts the suffix finds nothing to cut."""
    if not isinstance(plan, DecodingPlan) or type(plan.visible) is not Visible or plan.visible == Visible():
        return False
    blocks = [range(first, first + block) for first in range(total - new_tokens, total, block)]
    return all(len(plan.visible.places(each, total=total, block_length=block)) == total for each in blocks)


def _idle(plan: Plan, run: Fidelity) -> str:
    """Say why a decoder did nothing of its own, "" where it did."""
    if not isinstance(plan, DecodingPlan):
        return ""
    full = all(each.computed_tokens == each.forwards * each.ids.numel() for each in run.decoded)
    if full and type(plan.recompute) not in (Recompute, Shadows):
        return "every pass is full at this length"
    if all(len(each.taken) == each.candidates for each in run.choices):
        if plan.visible.evicts:
            return "no key is evicted at this length"
        if isinstance(plan.recompute, Focus):
            return "no mask is dropped at this length"
    return ""


def _measured(model: LanguageModel, prompts: Tensor, plan: Plan, *, new_tokens: int, block: int) -> Fidelity:
    """Measure fidelity, or where passes are exact only decode; note what is chosen by attention."""
    tally: list[Choice] = []
    plan = _noting(plan, tally)
    if not fidelity.is_exact(plan):
        found = fidelity.measure(model, prompts, plan, new_tokens=new_tokens, block=block)
        return replace(found, choices=tuple(tally))
    sizes: dict[str, Any] = {"new_tokens": new_tokens, "block_length": block, "batch_size": 1}
    texts = tuple(run_decoder(model, prompt, plan, **sizes) for prompt in prompts.split(1))
    ones = torch.ones(len(prompts), dtype=torch.float64)
    both = torch.stack([ones, 0 * ones], 1)[:, None].expand(-1, len(fidelity.EDGES) - 1, -1)
    return Fidelity(texts, ones, 0 * ones, both, tuple(tally))


def _noting(plan: Plan, tally: list[Choice]) -> Plan:
    """Let the control of a decoder, where it has one, note what is chosen."""
    if not isinstance(plan, DecodingPlan):
        return plan
    choices = {name: getattr(plan, name) for name in ("commit", "recompute", "visible")}
    ranking = {name: choice for name, choice in choices.items() if hasattr(choice, "control")}
    return replace(plan, **{
        name: replace(choice, control=replace(choice.control, tally=tally)) for name, choice in ranking.items()
    })  # fmt: skip


def _fidelity(run: Fidelity) -> dict[str, float]:
    """Return top-1 and KL, also at each third of mask ratios, means over the prompts that have one."""
    found = run.by_ratio.nanmean(0).T.tolist()
    names = [f"{what} {third}" for what in ("top1", "KL") for third in ("late", "middle", "early")]
    both = {"top1": float(run.top1.mean()), "KL": float(run.divergence.mean())}
    return both | dict(zip(names, [*found[0], *found[1]], strict=True))


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
    threshold: float,
    new_tokens: int,
    block: int,
    seed: int,
    settings: Sequence[Setting] = SETTINGS,
) -> pd.DataFrame:
    """Run every system that ranks by attention with sinks as they fall, forced in, forced out, at random, and by confidence.

    Args:
        model: a diffusion model.
        prompts: of equal length, two or more.
        fixed: the commit rule of systems that are not about committing.
        threshold: of the one that is.
        new_tokens: tokens after every prompt.
        block: tokens of a block.
        seed: of the random control and of the bootstrap.
        settings: of the control, those that systems have as they are published among them.

    Returns:
        The rows of `fidelity.control_rows` with the `system`, p-values also adjusted by Holm over all that test something
        (`p Holm`).
    """
    sizes = {"new_tokens": new_tokens, "block": block}
    plain = run_decoder(model, prompts, PLAIN, new_tokens=new_tokens, block_length=block, batch_size=len(prompts)).ids
    rows: list[dict[str, object]] = []
    by_setting = {each: published_systems.ranked(Control(each, seed), fixed, threshold=threshold) for each in settings}
    for name in CONTROLLED:
        runs = {each: _measured(model, prompts, plans[name], **sizes) for each, plans in by_setting.items()}
        usual, plan = published_systems.REFERENCE.get(name, "as they fall"), by_setting[settings[0]][name]
        why = {each: _untested(each, run, runs[usual], plan) for each, run in runs.items() if each != usual}
        # FOCUS and d2Cache predict some open places alone, and which ones depends on the setting.
        by_text = fidelity.is_exact(plan) or isinstance(plan.recompute, Focus | D2Cache)
        own = fidelity.control_rows(runs, plain, start=prompts.shape[1], by_text=by_text, seed=seed, usual=usual, untested=why)
        rows += [{"system": name, "block": block, "usual": usual, **row} for row in own]
    compared = {index: row for index, row in enumerate(rows) if row["control"] != row["usual"] and not row["not tested"]}
    tested = {index: float(str(row["p"])) for index, row in compared.items()}
    adjusted = paired.holm(tested)
    return pd.DataFrame([{**row, "p Holm": adjusted.get(index, float("nan"))} for index, row in enumerate(rows)])


def _untested(setting: str, run: Fidelity, usual: Fidelity, plan: DecodingPlan) -> str:
    """Say why a setting of the control tests nothing, "" where it does."""
    why = untested(setting, run.choices, usual.choices)
    same = torch.equal(run.ids, usual.ids) and torch.equal(run.divergence, usual.divergence)
    return why or ("no pass follows the choice" if plan.visible.evicts and same else "")

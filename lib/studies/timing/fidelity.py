"""How faithful a decoder's passes are: what it predicts against a full pass over the same text, by mask ratio."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.decoding.by_attention.control import Choice
from lib.decoding.commit import Credit
from lib.decoding.decoder import Decoded, DecodingPlan
from lib.decoding.recompute import Recompute
from lib.decoding.remask import Shadows
from lib.decoding.view import View
from lib.decoding.visible import Visible
from lib.evaluation.paired import paired_difference
from lib.models.language_model import LanguageModel, logits_at
from lib.studies.timing.runs import Plan, run_decoder

EDGES = (0.0, 1 / 3, 2 / 3, 1.0)  # of mask ratios that are told apart


@dataclass(frozen=True)
class Fidelity:
    """A decoder's text of each prompt, and its predictions against exact ones.

    Attributes:
        decoded: of each prompt.
        top1: share of the open places it predicts where the best token is the exact one.
        divergence: KL(exact || decoder) there, in nats.
        by_ratio: both for each third of mask ratios, NaN where no pass falls, [prompt, third, 2].
        choices: of places by attention, over all prompts.
    """

    decoded: tuple[Decoded, ...] = field(repr=False)
    top1: Float[Tensor, "prompt"]
    divergence: Float[Tensor, "prompt"]
    by_ratio: Float[Tensor, "prompt third two"]
    choices: tuple[Choice, ...] = field(default=(), repr=False)

    @property
    def ids(self) -> Int[Tensor, "prompt position"]:
        """All texts."""
        return torch.cat([each.ids for each in self.decoded])


def measure(
    model: LanguageModel, prompts: Int[Tensor, "prompt position"], plan: Plan, *, new_tokens: int, block: int
) -> Fidelity:
    """Decode each prompt by itself, and make a full pass beside every pass of the decoder.

    The exact pass reads what is written, with all places masked that are not, those that the decoder hides as well. Drafts and
    the plain sampler make full passes only: their fidelity is 1 by what they are.

    Args:
        model: a diffusion model whose attention is not by blocks.
        prompts: of equal length.
        plan: the decoder.
        new_tokens: tokens after every prompt.
        block: tokens of a block.

    Raises:
        InputError: attention by blocks, where prefix caches are exact and nothing else is kept.
    """
    rule = "fidelity must be of a model whose attention is not by blocks"
    require(not model.goes_by_blocks, rule, f"{model.attention} with {model.name}", "its prefix cache is exact: leave it out")
    texts, rows = [], []
    for prompt in prompts.split(1):
        seen: list[View] = []  # compared afterwards: the network may be steered while a block is written

        def keep(view: View, seen: list[View] = seen) -> None:
            seen.append(replace(view, memory={}))

        sizes: dict[str, Any] = {"new_tokens": new_tokens, "block_length": block, "batch_size": 1}
        texts.append(run_decoder(model, prompt, plan, **sizes, on_pass=keep))
        found = [_compared(model, view, total=prompts.shape[1] + new_tokens) for view in seen]
        rows.append([each for each in found if each] or [(1.0, 1, 1.0, 0.0)])
    top1 = torch.tensor([_mean(passes, 2) for passes in rows], dtype=torch.float64)
    divergence = torch.tensor([_mean(passes, 3) for passes in rows], dtype=torch.float64)
    return Fidelity(tuple(texts), top1, divergence, torch.stack([_by_ratio(passes) for passes in rows]))


@torch.inference_mode()
def _compared(model: LanguageModel, view: View, *, total: int) -> tuple[float, int, float, float] | None:
    """Return (mask ratio, predictions, share that agrees, mean divergence) of a pass; None where it predicts nothing."""
    assert view.guess is not None
    where = view.guess.where & view.is_open
    if not bool(where.any()):
        return None
    ids = torch.full((1, total), view.mask_id, device=view.ids.device)
    ids[:, view.places] = view.ids
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[:, view.places] = where
    exact = logits_at(model, ids, wanted).double().log_softmax(-1)
    own = view.guess.log_probabilities()[view.is_open[view.guess.where]]
    same = (exact.argmax(-1) == own.argmax(-1)).double().mean()
    divergence = (exact.exp() * (exact - own)).sum(-1).mean()
    ratio = (ids[:, view.start :] == view.mask_id).double().mean()
    return float(ratio), int(where.sum()), float(same), float(divergence)


def _mean(passes: Sequence[tuple[float, int, float, float]], column: int) -> float:
    """Return a mean over predictions."""
    return sum(each[1] * each[column] for each in passes) / sum(each[1] for each in passes) if passes else float("nan")


def _by_ratio(passes: Sequence[tuple[float, int, float, float]]) -> Float[Tensor, "third two"]:
    """Return both means in each third of mask ratios."""
    thirds = [[each for each in passes if low < each[0] <= high] for low, high in itertools.pairwise(EDGES)]
    return torch.tensor([[_mean(part, 2), _mean(part, 3)] for part in thirds], dtype=torch.float64)


def control_rows(
    by_setting: dict[str, Fidelity],
    plain: Int[Tensor, "prompt position"],
    *,
    start: int,
    by_text: bool,
    seed: int,
    usual: str,
    untested: Mapping[str, str],
) -> list[dict[str, object]]:
    """Compare the settings of a control with the usual one, prompt by prompt.

    Args:
        by_setting: one run a setting, the usual one among them.
        plain: the plain sampler's texts.
        start: length of the prompts.
        by_text: judge the share of tokens that are not the plain sampler's: where passes are exact, or predict only the places
            that the ranking left.
        seed: of the bootstrap.
        usual: the setting that the others are compared with.
        untested: why a setting tests nothing, "" where it does, but for the usual one.

    Returns:
        One row a setting: `measure` (lower is better), its mean `value`, and the `difference` to the usual setting with its 95 %
        interval, `low` to `high`, and p-value `p` of sign flips; `top1`, `KL`, `other tokens`, `forwards` and `rows`. A setting
        that tests nothing has no scores, but says why in `not tested`.
    """

    def other(run: Fidelity) -> Tensor:
        return (run.ids[:, start:] != plain[:, start:]).double().mean(1).cpu()

    rows: list[dict[str, object]] = []
    for setting, run in by_setting.items():
        why, measure = untested.get(setting, ""), "other tokens" if by_text else "KL"
        if why:
            rows.append({"control": setting, "not tested": why, "measure": measure, "prompts": len(plain)})
            continue
        now, before = (other(each) if by_text else each.divergence for each in (run, by_setting[usual]))
        pair = paired_difference(now, before, seed=seed)
        rows.append({
            "control": setting,
            "not tested": "",
            "measure": measure,
            "value": float(now.mean()),
            "difference": pair.estimate,
            "low": pair.interval[0],
            "high": pair.interval[1],
            "p": pair.p_value,
            "top1": float(run.top1.mean()),
            "KL": float(run.divergence.mean()),
            "other tokens": float(other(run).mean()),
            "forwards": sum(each.forwards for each in run.decoded),
            "rows": sum(each.computed_tokens for each in run.decoded),
            "prompts": pair.n,
        })  # fmt: skip
    return rows


def is_exact(plan: Plan) -> bool:
    """Tell whether a decoder makes full passes over the whole text only."""
    if not isinstance(plan, DecodingPlan):
        return True
    full = type(plan.recompute) in (Recompute, Shadows) and plan.visible == Visible()
    return full and not isinstance(plan.commit, Credit)

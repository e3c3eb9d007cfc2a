"""Decoders compared with the plain sampler: passes, tokens a second, the same tokens, text quality."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.decoding.decoder import Decoded, DecodingPlan, OnPass, decode
from lib.decoding.speculation import Speculation, speculate
from lib.diffusion import sampler
from lib.evaluation.harness import end_tokens
from lib.models.language_model import LanguageModel, logits_at
from lib.models.layers.anatomy import is_encoder
from lib.timing import clock

Plan = DecodingPlan | Speculation | Literal["plain sampler"]
PLAIN: Literal["plain sampler"] = "plain sampler"  # `sampler.sample`: greedy, one token a step, nothing kept
JUDGED_ROWS = 16  # texts that the judge reads at one time


@dataclass(frozen=True)
class DecoderRun:
    """What one decoder made of all prompts, and how long it took in rounds that it shared with the others.

    Attributes:
        decoder: its name.
        plan: what it is.
        new: tokens after the prompts.
        is_text: those up to the first end token, which is one of them.
        forwards: passes through the network over all prompts.
        computed_tokens: query positions that went through the network.
        seconds: of each timed round.
        timed_tokens: tokens asked for in a timed round; those behind an end token count, as the plain sampler makes them too.
        nats: negative log-likelihood of a text under the judge, in nats per token; None without a judge.
    """

    decoder: str
    plan: Plan
    new: Int[Tensor, "prompt token"] = field(repr=False)
    is_text: Bool[Tensor, "prompt token"] = field(repr=False)
    forwards: int
    computed_tokens: int
    seconds: Float[Tensor, "repeat"]
    timed_tokens: int
    nats: Float[Tensor, "prompt"] | None

    @property
    def distinct(self) -> Float[Tensor, "prompt"]:
        """Share of distinct tokens of each text; a judge likes repetition, which this shows."""
        texts = [row[kept] for row, kept in zip(self.new, self.is_text, strict=True)]
        return torch.tensor([len(text.unique()) / len(text) for text in texts], dtype=torch.float64)


@dataclass(frozen=True)
class Workload:
    """How much is decoded, and how often it is timed.

    Attributes:
        new_tokens: tokens after every prompt.
        block_length: tokens of a block, the plain sampler's too.
        repeats: timed rounds.
        batch_size: prompts decoded together.
        timed_prompts: only the first prompts are timed; None is all of them.
    """

    new_tokens: int
    block_length: int
    repeats: int
    batch_size: int = 1
    timed_prompts: int | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        """What `run_decoder` takes of it."""
        return {"new_tokens": self.new_tokens, "block_length": self.block_length, "batch_size": self.batch_size}


def compare(
    model: LanguageModel,
    prompts: Int[Tensor, "prompt position"],
    plans: Mapping[str, Plan],
    work: Workload,
    *,
    judge: LanguageModel | None = None,
) -> list[DecoderRun]:
    """Let every decoder continue the same prompts: the `grid` of one model, its runs named after the plans and in their order."""
    runs = grid({"": model}, prompts, plans, work, judge=judge)
    return [replace(run, decoder=name) for (_, name), run in runs.items()]


def grid(
    models: Mapping[str, LanguageModel],
    prompts: Int[Tensor, "prompt position"],
    plans: Mapping[str, Plan],
    work: Workload,
    *,
    judge: LanguageModel | None = None,
) -> dict[tuple[str, str], DecoderRun]:
    """Let every decoder run on every format of a model's weights, first once for the texts, then in rounds that all share.

    Args:
        models: one diffusion model in several formats, by name; the first one is the dense one.
        prompts: of equal length, two or more.
        plans: decoders by the name that tables show; one of them `"plain sampler"`.
        work: lengths and rounds.
        judge: an autoregressive model with the same tokens, which says how likely the texts are.

    Returns:
        Runs by (format, decoder).

    Raises:
        InputError: no model; no plain sampler, or several; too few prompts; a judge of another kind or with other tokens; what a
            decoder refuses.
    """
    require(len(models) > 0, "a grid must have at least one model", "none", "give the dense one")
    for model in models.values():
        check(model, prompts, plans, judge)
    pairs = [(kind, name) for kind in models for name in plans]
    cells: dict[tuple[str, str], tuple[LanguageModel, Plan]] = {pair: (models[pair[0]], plans[pair[1]]) for pair in pairs}
    texts = {key: run_decoder(model, prompts, plan, **work.sizes) for key, (model, plan) in cells.items()}
    timed = prompts[: work.timed_prompts]
    calls = {" + ".join(key): partial(run_decoder, model, timed, plan, **work.sizes) for key, (model, plan) in cells.items()}
    device = next(iter(models.values())).device
    seconds = clock.interleaved(calls, repeats=work.repeats, warm_up=1, device=device)  # the texts have warmed up before
    return {
        key: DecoderRun(
            decoder=" + ".join(key),
            plan=plan,
            **_text(model, texts[key].ids, start=prompts.shape[1], judge=judge),
            forwards=texts[key].forwards,
            computed_tokens=texts[key].computed_tokens,
            seconds=seconds[" + ".join(key)],
            timed_tokens=len(timed) * work.new_tokens,
        )
        for key, (model, plan) in cells.items()
    }


def _text(model: LanguageModel, ids: Tensor, *, start: int, judge: LanguageModel | None) -> dict[str, Any]:
    """Return the fields of a run that say what was written after the prompts, of `start` tokens."""
    is_text = text_positions(ids[:, start:], ends=_ends(model))
    return {"new": ids[:, start:].cpu(), "is_text": is_text.cpu(), "nats": None if judge is None else judged(judge, ids, is_text)}


def run_decoder(
    model: LanguageModel,
    prompts: Int[Tensor, "prompt position"],
    plan: Plan,
    *,
    new_tokens: int,
    block_length: int,
    batch_size: int,
    on_pass: OnPass | None = None,
) -> Decoded:
    """Continue prompts, `batch_size` at one time, with the plain sampler or by a plan; drafts are of one prompt at a time.

    Args:
        model: a diffusion model.
        prompts: of equal length.
        plan: how.
        new_tokens: tokens after every prompt.
        block_length: tokens of a block.
        batch_size: prompts decoded together.
        on_pass: as `decode` takes it; the plain sampler and drafts have no view to tell of.
    """
    parts = []
    if isinstance(plan, Speculation):
        batch_size = 1
    for part in prompts.split(batch_size):
        if isinstance(plan, DecodingPlan):
            stop = None if model.tokenizer is None else cast(int | None, model.tokenizer.eos_token_id)
            sizes = {"new_tokens": new_tokens, "block_length": block_length}
            parts.append(decode(model, part, **sizes, plan=plan, stop_token_id=stop, on_pass=on_pass))
        elif isinstance(plan, Speculation):
            made = speculate(model, part, new_tokens=new_tokens, block_length=block_length, drafts=plan.drafts)
            parts.append(Decoded(made.ids, made.forwards, made.computed_tokens))
        else:
            ids = sampler.sample(model, part, new_tokens=new_tokens, steps=new_tokens, block_length=block_length)
            parts.append(Decoded(ids, new_tokens, new_tokens * ids.numel()))
    forwards, computed = sum(part.forwards for part in parts), sum(part.computed_tokens for part in parts)
    return Decoded(torch.cat([part.ids for part in parts]), forwards, computed)


def text_positions(new: Int[Tensor, "prompt token"], *, ends: set[int]) -> Bool[Tensor, "prompt token"]:
    """Mark the tokens up to the first end token, which is one of them.

    >>> text_positions(torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8]]), ends={2}).tolist()
    [[True, True, False, False], [True, True, True, True]]
    """
    is_end = torch.isin(new, torch.tensor(sorted(ends), dtype=new.dtype, device=new.device))
    return is_end.cumsum(1) - is_end.long() == 0


@torch.inference_mode()
def judged(
    judge: LanguageModel, ids: Int[Tensor, "prompt position"], is_text: Bool[Tensor, "prompt token"]
) -> Float[Tensor, "prompt"]:
    """Return the negative log-likelihood of each text after its prompt, in nats per token, in float64 on the CPU.

    Args:
        judge: an autoregressive model.
        ids: prompts and new tokens.
        is_text: which of the new tokens, the last positions of `ids`, count.
    """
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, ids.shape[1] - is_text.shape[1] :] = is_text
    found = []
    for rows, asked in zip(ids.split(JUDGED_ROWS), where.split(JUDGED_ROWS), strict=True):
        rows, asked = rows.to(judge.device), asked.to(judge.device)
        nats = torch.zeros(rows.shape, dtype=torch.float64, device=judge.device)
        nats[asked] = F.cross_entropy(logits_at(judge, rows, asked), rows[asked], reduction="none").double()
        found.append(nats.sum(1) / asked.sum(1))
    return torch.cat(found).cpu()


def _ends(model: LanguageModel) -> set[int]:
    return set() if model.tokenizer is None else end_tokens(model)


def check_plain(plans: Mapping[str, Plan]) -> None:
    """Refuse plans without the plain sampler, or with several.

    Raises:
        InputError: see above.
    """
    count = sum(plan == PLAIN for plan in plans.values())
    require(count == 1, f"plans must hold the {PLAIN} once, to compare with", f"{count} of them", f"add {PLAIN!r}")


def check(model: LanguageModel, prompts: Tensor, plans: Mapping[str, Plan], judge: LanguageModel | None) -> None:
    """Refuse before any decoding what cannot be compared.

    Raises:
        InputError: not one plain sampler, a model that does not fill masks in, fewer than two prompts, or a judge that is not
            autoregressive or has other tokens.
    """
    check_plain(plans)
    sampler.check_masks(model)
    require(len(prompts) > 1, "prompts must be two or more, as intervals are over prompts", str(len(prompts)), "add some")
    if judge is None:
        return
    require(judge.is_causal, "a judge must be autoregressive", judge.name, "use the autoregressive twin")
    rule, remedy = f"a judge must have the tokens of {model.name}", "use a judge with its tokenizer"
    require(same_tokens(model, judge), rule, f"those of {judge.name}", remedy)


def same_tokens(model: LanguageModel, judge: LanguageModel) -> bool:
    """Tell whether a judge reads the tokens that a model writes; two without tokenizers are believed to."""
    if model.tokenizer is None or judge.tokenizer is None:
        return True
    return model.tokenizer.get_vocab() == judge.tokenizer.get_vocab()


def left_out(model: LanguageModel) -> str:
    """Return why a diffusion model's decoders are not compared, empty where they are."""
    if model.goes_by_blocks:
        return "it goes by blocks, and has a sampler of its own"
    if is_encoder(model.network):
        return "it is an encoder, whose attention keeps no keys and values"
    if not model.noise.is_masked:
        return f"under {model.noise} noise no token is finished before the last step, so no masks are left to fill faster"
    return ""

"""Fast greedy decoding of masked diffusion models: caches, parallel commits by confidence, a trimmed suffix, an early stop.

The end of a block may also be written without further passes: by the best tokens of the last one, or by a fitted `LateStep`.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.decoding.caches import Hidden, Pass, block_pass, logits_from, new_store, states_at, whole_pass
from lib.decoding.late_steps import LateStep, beside, most_left
from lib.decoding.refresh import adaptive_pass
from lib.diffusion import block_sampler, commits, sampler
from lib.diffusion.block_rules import rule_of
from lib.models.language_model import LanguageModel, check_length

CacheKind = Literal["none", "prefix", "dual", "adaptive"]


@dataclass(frozen=True)
class DecodingPlan:
    """How text is decoded, block by block.

    Attributes:
        cache: `"none"`; `"prefix"` or `"dual"` as in `caches.block_pass`; `"adaptive"` as in `refresh.adaptive_pass`.
        refresh_every: denoising steps from one full pass to the next within a block; None is one at the block's start. 1 keeps
            nothing.
        refresh_ratio: share of positions recomputed by an adaptive cache, in (0, 1].
        threshold: commit every token of the block whose probability is above it, and the most probable one in any case; 1 is one
            token a step.
        steps_per_block: commit a fixed number of tokens a step instead, as `sampler.sample` does.
        suffix_blocks: masked blocks after the current one that the network sees; None is all of them.
        early_stop: end a text when an end token is committed and nothing before it is masked; what follows becomes end tokens.
        late_share: when at most this share of the block is still masked, write the rest at once without another pass.
        late_step: what predicts those tokens; None is the best token of the last pass.

    Raises:
        InputError: a value out of range, or options that do not go together.
    """

    cache: CacheKind = "none"
    refresh_every: int | None = None
    refresh_ratio: float | None = None
    threshold: float | None = None
    steps_per_block: int | None = None
    suffix_blocks: int | None = None
    early_stop: bool = False
    late_share: float | None = None
    late_step: LateStep | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.cache not in get_args(CacheKind):
            raise InputError(f"cache must be one of {', '.join(get_args(CacheKind))}, got {self.cache!r}: choose one")
        if (self.threshold is None) == (self.steps_per_block is None):
            got = f"{self.threshold} and {self.steps_per_block}"
            raise InputError(f"a plan must have either threshold or steps_per_block, got {got}: set one of them")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"threshold must be a probability, got {self.threshold}: choose one in [0, 1]")
        for name, least in (("steps_per_block", 1), ("refresh_every", 1), ("suffix_blocks", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}: raise it or leave it out")
        if self.cache == "none" and self.refresh_every is not None:
            raise InputError(f"refresh_every must go with a cache, got {self.refresh_every} without: drop it or choose a cache")
        if (self.cache == "adaptive") != (self.refresh_ratio is not None):
            raise InputError(
                f"refresh_ratio must go with cache='adaptive', got {self.refresh_ratio} with {self.cache!r}: set both or none"
            )
        if self.refresh_ratio is not None and not 0 < self.refresh_ratio <= 1:
            raise InputError(f"refresh_ratio must be a share in (0, 1], got {self.refresh_ratio}: use 0.25 for a quarter")
        if self.late_share is not None and not 0 < self.late_share < 1:
            raise InputError(f"late_share must be a share in (0, 1), got {self.late_share}: use 0.25 for a quarter")
        if self.late_step is not None and self.late_share is None:
            raise InputError("late_step must go with late_share, got none: say from which share of masks on it is used")


@dataclass(frozen=True)
class Decoded:
    """Decoded text and what it took.

    Attributes:
        ids: prompt and new tokens.
        forwards: passes through the network, each for all unfinished rows of the batch at once.
        computed_tokens: query positions that went through the network, summed over rows and passes.
    """

    ids: Int[Tensor, "batch position"]
    forwards: int
    computed_tokens: int


@torch.inference_mode()
def decode(
    model: LanguageModel,
    prompt: Int[Tensor, "batch prompt"],
    *,
    new_tokens: int,
    block_length: int,
    plan: DecodingPlan,
    stop_token_id: int | None = None,
) -> Decoded:
    """Denoise from all-masked to text, greedily.

    Args:
        model: a diffusion model.
        prompt: prompts of equal length; the text of a row does not depend on the other rows.
        new_tokens: tokens to generate.
        block_length: tokens of a semi-autoregressive block.
        plan: what is computed, kept, and committed.
        stop_token_id: the end token, needed for an early stop.

    Returns:
        Text and counts. With `cache="none"`, all of the suffix and `steps_per_block` it is the text of `sampler.sample` at
        temperature 0. As there, a position at which the network predicts the mask token itself may be left masked.

    Raises:
        InputError: an autoregressive model, a length that does not divide, an early stop without its token, layers with sliding
            windows in a cached plan; what a model whose attention goes by blocks has no use for.

    Source: Fast-dLLM (arXiv 2505.22618) for block caches and the threshold, Streaming-dLLM (arXiv 2601.17917) for the trimmed
        suffix and the early stop, dLLM-Cache (arXiv 2506.06295) for the adaptive refresh. Known deviations: the suffix is cut at
        a block's border with nothing kept beyond it, and the threshold is constant. A model whose attention goes by blocks is
        decoded by `block_sampler.generate`: it sees no suffix, and its prefix cache is exact.
    """
    if model.goes_by_blocks:
        return _decode_by_blocks(
            model, prompt, new_tokens=new_tokens, block_length=block_length, plan=plan, stop_token_id=stop_token_id
        )
    _check(model, new_tokens=new_tokens, block_length=block_length, plan=plan, stop_token_id=stop_token_id)
    start, mask_id = prompt.shape[1], cast(int, model.mask_token_id)
    total = start + new_tokens
    check_length(model, total)  # passes over a trimmed suffix would find out late
    ids = torch.full((len(prompt), total), mask_id, dtype=torch.long, device=model.device)
    ids[:, :start] = prompt.to(model.device)
    stop = stop_token_id if plan.early_stop else None
    forwards = computed = 0
    for first in range(start, total, block_length):
        block = range(first, first + block_length)
        unfinished = (ids[:, block.start : block.stop] == mask_id).any(1)
        if not bool(unfinished.any()):
            break
        end = total if plan.suffix_blocks is None else min(total, block.stop + plan.suffix_blocks * block_length)
        done = _finish_block(model, ids[unfinished], start=start, block=block, end=end, plan=plan, stop=stop)
        ids[unfinished] = done.ids
        forwards, computed = forwards + done.forwards, computed + done.computed_tokens
    return Decoded(ids, forwards, computed)


def _decode_by_blocks(
    model: LanguageModel,
    prompt: Tensor,
    *,
    new_tokens: int,
    block_length: int,
    plan: DecodingPlan,
    stop_token_id: int | None,
) -> Decoded:
    """Decode with a model whose attention goes by blocks; behind an early stop stand end tokens."""
    sampler.check_blocks(model, block_length=block_length)
    useless = {
        "cache": plan.cache in ("dual", "adaptive"),
        "refresh_every": plan.refresh_every is not None,
        "suffix_blocks": plan.suffix_blocks not in (None, 0),
        "late_share": plan.late_share is not None,
    }
    got = ", ".join(f"{name}={getattr(plan, name)!r}" for name, given in useless.items() if given)
    require(not got, "a plan must fit a model whose attention goes by blocks", got, "leave it out; cache='prefix' is exact there")
    _check_stop(model, plan, stop_token_id)
    rule = replace(
        rule_of(model),
        rule="quota" if plan.threshold is None else "above or best",
        threshold=plan.threshold,
        steps=plan.steps_per_block,
        edit_threshold=None,
    )
    stops = [cast(int, stop_token_id)] if plan.early_stop else []
    options = {"rule": rule, "stop_token_ids": stops, "use_cache": plan.cache == "prefix"}
    text = block_sampler.generate(model, prompt, new_tokens=new_tokens, **options)
    behind = torch.arange(text.ids.shape[1], device=text.ids.device) >= text.ends[:, None]
    ids = text.ids.masked_fill(behind, stops[0]) if stops else text.ids
    return Decoded(ids, text.forwards, text.computed_tokens)


def _finish_block(
    model: LanguageModel, ids: Tensor, *, start: int, block: range, end: int, plan: DecodingPlan, stop: int | None
) -> Decoded:
    """Commit the tokens of one block, the network seeing the positions before `end`."""
    mask_id = cast(int, model.mask_token_id)
    in_block = torch.zeros_like(ids, dtype=torch.bool)
    in_block[:, block.start : block.stop] = True
    # At least one token is committed a step, so a threshold needs no more steps than the block has tokens.
    steps = plan.steps_per_block or len(block)
    counts = commits.commit_schedule(((ids == mask_id) & in_block).sum(1), steps=steps)
    forwards = computed = 0
    with _passes(model, plan, block) as forward:
        for step in range(steps):
            where = (ids == mask_id) & in_block
            if not bool(where.any()):
                break
            run = partial(forward, ids[:, :end], step % (plan.refresh_every or steps) == 0)
            hidden = run()
            forwards, computed = forwards + 1, computed + hidden.computed
            logits = logits_from(model, hidden, where[:, :end], again=run)
            chosen = commits.choose_tokens(logits, temperature=0.0, generator=None)
            confidence = torch.full(ids.shape, float("-inf"), dtype=torch.float64, device=ids.device)
            confidence[where] = commits.probability_of(logits, chosen)
            if plan.threshold is None:
                committed = commits.most_confident(confidence, counts[:, step].minimum(where.sum(1)))
            else:
                committed = confident_positions(confidence, threshold=plan.threshold)
            guessed = ids.masked_scatter(where, chosen)
            ids = torch.where(committed, guessed, ids)
            if plan.late_share is not None:
                late = late_positions((ids == mask_id) & in_block, most=most_left(plan.late_share, block_length=len(block)))
                ids = _written_late(model, hidden, torch.where(late, guessed, ids), late, plan.late_step, guessed)
            if stop is not None:
                ids = torch.cat([ids[:, :start], fill_finished(ids[:, start:], mask_id=mask_id, stop_token_id=stop)], dim=1)
    return Decoded(ids, forwards, computed)


def _written_late(
    model: LanguageModel, hidden: Hidden, ids: Tensor, late: Tensor, step: LateStep | None, guessed: Tensor
) -> Tensor:
    """Correct the tokens at the positions `late`, which hold the best ones of the last pass."""
    if step is None or not bool(late.any()):
        return ids
    left, right = beside(guessed, late)
    return ids.masked_scatter(late, step.predict(model, states_at(model, hidden, late), left=left, right=right))


def late_positions(open_now: Bool[Tensor, "batch position"], *, most: int) -> Bool[Tensor, "batch position"]:
    """Mark the masked positions of the rows that have at most `most` of them.

    >>> late_positions(torch.tensor([[True, True], [False, True]]), most=1).tolist()
    [[False, False], [False, True]]
    """
    return open_now & (open_now.sum(1, keepdim=True) <= most)


def _passes(model: LanguageModel, plan: DecodingPlan, block: range) -> AbstractContextManager[Pass]:
    """Open the passes of one block."""
    if plan.cache == "none":
        return nullcontext(whole_pass(model))
    if plan.cache == "adaptive":
        return adaptive_pass(model, ratio=cast(float, plan.refresh_ratio), block=block)
    return nullcontext(block_pass(model, kind=plan.cache, block=block))


def confident_positions(confidence: Float[Tensor, "batch position"], *, threshold: float) -> Bool[Tensor, "batch position"]:
    """Mark the positions above the threshold, and the most confident one of each row in any case.

    Args:
        confidence: probability of the predicted token; minus infinity where there is none.
        threshold: probability.

    Returns:
        Nothing marked in a row without predictions.

    >>> confident_positions(torch.tensor([[0.1, 0.9, 0.8], [0.1, 0.3, 0.2]]), threshold=0.5).tolist()
    [[False, True, True], [False, True, False]]
    """
    best = torch.zeros_like(confidence, dtype=torch.bool).scatter(1, confidence.argmax(1, keepdim=True), True)
    return (best | (confidence > threshold)) & confidence.isfinite()


def fill_finished(generated: Int[Tensor, "batch position"], *, mask_id: int, stop_token_id: int) -> Int[Tensor, "batch position"]:
    """Let end tokens follow the first one in every row where nothing before it is masked any more.

    >>> fill_finished(torch.tensor([[5, 2, 9, 7], [9, 2, 9, 7]]), mask_id=9, stop_token_id=2).tolist()
    [[5, 2, 2, 2], [9, 2, 9, 7]]
    """
    ended = (generated == stop_token_id).cumsum(1) > 0
    is_open = ((generated == mask_id) & ~ended).any(1, keepdim=True)
    return generated.masked_fill(ended & ~is_open, stop_token_id)


def _check(model: LanguageModel, *, new_tokens: int, block_length: int, plan: DecodingPlan, stop_token_id: int | None) -> None:
    sampler.check_sampling(model, new_tokens=new_tokens, steps=new_tokens, block=block_length)
    _check_stop(model, plan, stop_token_id)
    if plan.late_share is not None:
        most_left(plan.late_share, block_length=block_length)
    if plan.cache != "none":
        new_store(model)


def _check_stop(model: LanguageModel, plan: DecodingPlan, stop_token_id: int | None) -> None:
    if plan.early_stop and (stop_token_id is None or stop_token_id == model.mask_token_id):
        raise InputError(f"an early stop must know an end token that is not the mask, got {stop_token_id}: pass stop_token_id")

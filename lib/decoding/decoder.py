"""Fast greedy decoding of masked diffusion models, out of four choices: commit, remask, recompute, visible.

The end of a block may also be written without further passes: by the best tokens of the last one, or by a fitted `LateStep`.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.decoding.caches import Hidden, logits_from, new_store, readable
from lib.decoding.commit import Commit, Credit, Quota, Threshold
from lib.decoding.late_steps import LateStep, late_count, most_left
from lib.decoding.plan import Decoded, DecodingPlan, OnPass
from lib.decoding.recompute import Adaptive, Blockwise, Pass, Recompute
from lib.decoding.remask import BlockEnds
from lib.decoding.view import Guess, View, guess
from lib.decoding.visible import Visible
from lib.diffusion import block_sampler, commits, sampler
from lib.diffusion.block_rules import rule_of
from lib.models.language_model import LanguageModel, check_length


@dataclass(frozen=True)
class _Job:
    """What stays the same while texts are written."""

    model: LanguageModel
    plan: DecodingPlan
    start: int
    total: int
    block_length: int
    stop: int | None
    on_pass: OnPass | None

    @property
    def mask_id(self) -> int:
        """The mask token."""
        return cast(int, self.model.mask_token_id)


@torch.inference_mode()
def decode(
    model: LanguageModel,
    prompt: Int[Tensor, "batch prompt"],
    *,
    new_tokens: int,
    block_length: int,
    plan: DecodingPlan,
    stop_token_id: int | None = None,
    on_pass: OnPass | None = None,
) -> Decoded:
    """Denoise from all-masked to text, greedily.

    Args:
        model: a diffusion model.
        prompt: prompts of equal length; the text of a row does not depend on the other rows.
        new_tokens: tokens to generate.
        block_length: tokens of a semi-autoregressive block.
        plan: what is computed, kept, and committed.
        stop_token_id: the end token, needed for an early stop.
        on_pass: called after every pass with the view that the choices get.

    Returns:
        Text and counts. With every choice left as it is, the text of `sampler.sample` at temperature 0. As there, a position at
        which the network predicts the mask token itself may be left masked.

    Raises:
        InputError: an autoregressive model, a length that does not divide, an early stop without its token, layers with sliding
            windows where keys are kept; what a model whose attention goes by blocks has no use for.

    Source: each choice names its own. A model whose attention goes by blocks is decoded by `block_sampler.generate`: it sees no
        suffix, and its prefix cache is exact.
    """
    sizes = {"new_tokens": new_tokens, "block_length": block_length}
    if model.goes_by_blocks:
        return _decode_by_blocks(model, prompt, **sizes, plan=plan, stop_token_id=stop_token_id)
    _check(model, **sizes, plan=plan, stop_token_id=stop_token_id)
    total = prompt.shape[1] + new_tokens
    check_length(model, total)  # passes over a trimmed suffix would find out late
    stop = stop_token_id if plan.early_stop else None
    job = _Job(model, plan, prompt.shape[1], total, block_length, stop, on_pass)
    parts = [_decode(job, part) for part in (prompt.split(1) if plan.alone else (prompt,))]
    forwards, computed = sum(part.forwards for part in parts), sum(part.computed_tokens for part in parts)
    return Decoded(torch.cat([part.ids for part in parts]), forwards, computed)


def _decode(job: _Job, prompt: Tensor) -> Decoded:
    """Write block after block."""
    ids = torch.full((len(prompt), job.total), job.mask_id, dtype=torch.long, device=job.model.device)
    ids[:, : job.start] = prompt.to(job.model.device)
    forwards = computed = 0
    first = job.start
    while first < job.total:
        block, looks, looked = _next_block(job, ids, first)
        first, forwards, computed = block.stop, forwards + looks, computed + looked
        unfinished = (ids[:, block.start : block.stop] == job.mask_id).any(1)
        if not bool(unfinished.any()):
            break
        done = _finish_block(job, ids[unfinished], block, passes=forwards)
        ids[unfinished] = done.ids
        forwards, computed = forwards + done.forwards, computed + done.computed_tokens
    return Decoded(ids, forwards, computed)


def _next_block(job: _Job, ids: Tensor, first: int) -> tuple[range, int, int]:
    """Return the block that begins at `first`, and the passes and positions that it took to find its end."""
    usual = range(first, min(first + job.block_length, job.total))
    end, looks, looked = job.plan.ends.end(job.model, ids, usual, new_tokens=job.total - job.start)
    return range(first, end), looks, looked


def _finish_block(job: _Job, ids: Tensor, block: range, *, passes: int) -> Decoded:
    """Write the tokens of one block."""
    plan = job.plan
    at = torch.tensor(plan.visible.places(block, total=job.total, block_length=job.block_length), device=ids.device)
    # At least one token is committed a step, so a rule without a schedule needs no more steps than the block has tokens.
    steps = plan.commit.steps or len(block)
    # Until its block is done an end token may be edited, too: nothing follows it before.
    edits_on = plan.remask is not None and plan.remask.post_passes > 0
    most = steps if plan.remask is None else plan.remask.most_steps(len(block))
    left = (ids[:, block.start : block.stop] == job.mask_id).sum(1)
    quota = commits.commit_schedule(left, steps=steps)
    view, computed = View(ids[:, at], at, block, job.start, job.mask_id, quota, passes=passes), 0
    with ExitStack() as stack:
        for choice in (plan.commit, plan.visible):
            stack.enter_context(choice.opened(job.model, view))
        forward = stack.enter_context(plan.recompute.passes(job.model, view))
        while _goes_on(plan, view, most, left):
            computed += _read(job, view, forward).computed
            ids[:, at] = _written(job, view)
            left = left - cast(Tensor, view.committed).sum(1)
            if not edits_on:
                ids = _closed(job, ids)
            changed = not torch.equal(view.ids, ids[:, at])
            view.after = 0 if bool(view.is_open.any()) else view.after + 1 if changed else len(block) * most
            view.ids, view.step, view.passes = ids[:, at], view.step + 1, view.passes + 1
    return Decoded(_closed(job, ids) if edits_on else ids, view.step, computed)


def _closed(job: _Job, ids: Tensor) -> Tensor:
    """Let end tokens follow where a text has ended, if it is to be noticed."""
    if job.stop is None:
        return ids
    new = fill_finished(ids[:, job.start :], mask_id=job.mask_id, stop_token_id=job.stop)
    return torch.cat([ids[:, : job.start], new], dim=1)


def _goes_on(plan: DecodingPlan, view: View, most: int, left: Tensor) -> bool:
    """Tell whether a block needs another pass: it has masks, or is looked at again after its last one.

    A pass over some of the places may predict fewer than the schedule asks; what is `left` to commit then takes more passes.
    """
    is_open = view.is_open.any(1)
    if bool(is_open.any()):
        return view.step < most + len(view.block) * bool((is_open & (left > 0)).any())
    return plan.remask is not None and view.after < plan.remask.post_passes


def _read(job: _Job, view: View, forward: Pass) -> Hidden:
    """Make one pass, and note in the view what it predicts."""
    plan, run = job.plan, partial(forward, view)
    view.hidden = hidden = run()
    asked = view.is_open if plan.remask is None else view.is_open | view.written
    where = asked & readable(job.model, hidden, view.ids.shape[1])
    logits = plan.commit.adjusted(view, logits_from(job.model, hidden, where, again=run), where)
    view.previous, view.guess = view.guess, guess(view.ids, where, logits)
    plan.visible.after(job.model, view)
    if job.on_pass is not None:
        job.on_pass(view)
    return hidden


def _written(job: _Job, view: View) -> Int[Tensor, "batch place"]:
    """Return the text after a pass: what is committed, and the end of the block where it is written at once."""
    plan, guessed = job.plan, cast(Tensor, view.guess and view.guess.tokens)
    view.committed = committed = plan.commit(view)
    ids = torch.where(committed, guessed, view.ids)
    if plan.late_share is not None:
        most = late_count(plan.late_share, block_length=len(view.block))  # a block that ends early may have none
        late = late_positions((ids == job.mask_id) & view.in_block, most=most)
        # FOCUS and d2Cache compute some places alone: the others have no state of this pass, and wait for the next one.
        late = late & cast(Guess, view.guess).where
        ids, view.committed = torch.where(late, guessed, ids), committed | late
        if plan.late_step is not None and bool(late.any()):
            # What a step looks at beside a late place is the text with the last pass' guesses, not only with what is committed.
            text = guessed if isinstance(plan.late_step, LateStep) else ids
            ids = ids.masked_scatter(late, plan.late_step.write(job.model, cast(Hidden, view.hidden), text, late))
    return ids if plan.remask is None else plan.remask(view, ids)


def late_positions(open_now: Bool[Tensor, "batch position"], *, most: int) -> Bool[Tensor, "batch position"]:
    """Mark the masked positions of the rows that have at most `most` of them.

    >>> late_positions(torch.tensor([[True, True], [False, True]]), most=1).tolist()
    [[False, False], [False, True]]
    """
    return open_now & (open_now.sum(1, keepdim=True) <= most)


def fill_finished(generated: Int[Tensor, "batch position"], *, mask_id: int, stop_token_id: int) -> Int[Tensor, "batch position"]:
    """Let end tokens follow the first one in every row where nothing before it is masked any more.

    >>> fill_finished(torch.tensor([[5, 2, 9, 7], [9, 2, 9, 7]]), mask_id=9, stop_token_id=2).tolist()
    [[5, 2, 2, 2], [9, 2, 9, 7]]
    """
    ended = (generated == stop_token_id).cumsum(1) > 0
    is_open = ((generated == mask_id) & ~ended).any(1, keepdim=True)
    return generated.masked_fill(ended & ~is_open, stop_token_id)


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
    _check_by_blocks(plan)
    _check_stop(model, plan, stop_token_id)
    threshold = plan.commit.threshold if type(plan.commit) is Threshold else None
    own = type(plan.commit) in (Quota, Threshold)
    rule = replace(
        rule_of(model),
        rule="quota" if threshold is None else "above or best",
        threshold=threshold,
        steps=plan.commit.steps,
        edit_threshold=None,
    )
    stops = [cast(int, stop_token_id)] if plan.early_stop else []
    choose = None if own else _Chooser(plan.commit, prompt.shape[1], cast(int, model.mask_token_id))
    options = {"rule": rule, "stop_token_ids": stops, "use_cache": plan.recompute.keeps, "choose": choose}
    text = block_sampler.generate(model, prompt, new_tokens=new_tokens, **options)
    behind = torch.arange(text.ids.shape[1], device=text.ids.device) >= text.ends[:, None]
    ids = text.ids.masked_fill(behind, stops[0]) if stops else text.ids
    return Decoded(ids, text.forwards, text.computed_tokens)


@dataclass
class _Chooser:
    """Lets a commit rule choose in a block sampler."""

    commit: Commit
    start: int
    mask_id: int
    view: View | None = None

    def __call__(self, ids: Tensor, where: Tensor, logits: Tensor, block: range, quota: int) -> Tensor:
        """Return what the rule commits of the predictions at `where`."""
        asked = torch.full((len(ids), 1), quota, device=ids.device)
        view = View(ids, torch.arange(ids.shape[1], device=ids.device), block, self.start, self.mask_id, asked)
        if self.view is not None and self.view.block == block:
            view.memory, view.previous, view.step = self.view.memory, self.view.guess, self.view.step + 1
        view.guess, self.view = guess(ids, where, logits), view
        return self.commit(view)


def _check_by_blocks(plan: DecodingPlan) -> None:
    """Refuse what a model whose attention goes by blocks has no use for."""
    kept = plan.recompute
    prefix = type(kept) is Recompute or (isinstance(kept, Blockwise) and kept.kind == "prefix" and kept.refresh_every is None)
    suffix = type(plan.visible) is Visible and plan.visible.suffix_blocks in (None, 0) and plan.visible.suffix_tokens in (None, 0)
    useless = {
        "commit": isinstance(plan.commit, Credit) or plan.commit.watches,
        "remask": plan.remask is not None,
        "ends": plan.ends != BlockEnds(),
        "recompute": not prefix,
        "visible": not suffix,
        "late_share": plan.late_share is not None,
    }
    got = ", ".join(f"{name}={getattr(plan, name)!r}" for name, given in useless.items() if given)
    require(not got, "a plan must fit a model whose attention goes by blocks", got, "leave it out; a prefix cache is exact there")


def _check(model: LanguageModel, *, new_tokens: int, block_length: int, plan: DecodingPlan, stop_token_id: int | None) -> None:
    sampler.check_sampling(model, new_tokens=new_tokens, steps=new_tokens, block=block_length)
    _check_stop(model, plan, stop_token_id)
    if plan.late_share is not None:
        most_left(plan.late_share, block_length=block_length)
    if plan.recompute.keeps or isinstance(plan.recompute, Adaptive):
        new_store(model)


def _check_stop(model: LanguageModel, plan: DecodingPlan, stop_token_id: int | None) -> None:
    if plan.early_stop and (stop_token_id is None or stop_token_id == model.mask_token_id):
        raise InputError(f"an early stop must know an end token that is not the mask, got {stop_token_id}: pass stop_token_id")

"""Generate with a model whose attention goes by blocks: block after block, finished ones fixed, later ones not there yet.

One loop with the options in which the families' own samplers differ: which predictions a step commits, parts of a block, a first
token from the context, edits of written tokens, end tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.diffusion import commits
from lib.diffusion.block_reader import BlockReader
from lib.diffusion.block_rules import BlockRule, block_ranges, committed_places, in_steps, rule_of, spread_steps
from lib.diffusion.commits import DenoisingStep
from lib.models.language_model import LanguageModel

# (text, places that are predicted, their logits, block, quota) -> places that are committed, in the stead of a rule's own choice
Chooser = Callable[[Tensor, Tensor, Tensor, range, int], Tensor]


@dataclass(frozen=True)
class BlockText:
    """Generated text and what it took.

    Attributes:
        ids: prompt and new tokens; what was not written, behind an end token, is the mask token.
        ends: length of each text, its end token included.
        forwards: passes through the network.
        computed_tokens: query positions that went through the network, over rows and passes.
    """

    ids: Int[Tensor, "batch position"]
    ends: Int[Tensor, "batch"]
    forwards: int
    computed_tokens: int


@dataclass
class _Canvas:
    """The text while it is written.

    Attributes:
        ids: to the end of the last block.
        is_open: places that are to be written.
        start, end: of what is wanted.
        ends: length of each text.
        limit: places from it on need not be written.
        steps: passes so far that wrote something.
    """

    ids: Int[Tensor, "batch position"]
    is_open: Bool[Tensor, "batch position"]
    start: int
    end: int
    ends: Int[Tensor, "batch"]
    limit: int
    steps: int = 0

    @property
    def position(self) -> Int[Tensor, "position"]:
        """Return 0, 1, ..."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)

    def waiting(self, part: range) -> Bool[Tensor, "batch"]:
        """Tell which rows have a needed place in `part` that is not written."""
        return self.is_open[:, part.start : min(part.stop, self.limit)].any(1)


@dataclass(frozen=True)
class _Writer:
    """Who reads, which tokens are chosen, when a text ends, and who is told."""

    reader: BlockReader
    rule: BlockRule
    temperature: float
    generator: torch.Generator | None
    stop: Int[Tensor, "stop"]
    on_step: Callable[[DenoisingStep], None] | None
    head: Callable[[Tensor], Tensor] = field(repr=False)
    choose: Chooser | None = None


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Int[Tensor, "batch prompt"],
    *,
    new_tokens: int,
    rule: BlockRule | None = None,
    steps: int | None = None,
    temperature: float = 0.0,
    stop_token_ids: Sequence[int] = (),
    use_cache: bool = True,
    generator: torch.Generator | None = None,
    on_step: Callable[[DenoisingStep], None] | None = None,
    choose: Chooser | None = None,
) -> BlockText:
    """Write block after block.

    Args:
        model: whose attention goes by blocks, of `model.block_length` positions (`dataclasses.replace` gives it others).
        prompt: prompts of equal length; a row does not depend on the others.
        new_tokens: tokens to generate.
        rule: which tokens are committed; `rule_of` the model when None.
        steps: passes in all that write tokens, spread over the blocks by their masks and evenly within; with the rule `"quota"`.
        temperature: 0 is greedy. A token's confidence is its probability at temperature 1.
        stop_token_ids: a text ends at the first of them with nothing unwritten before it.
        use_cache: keep keys and values of finished blocks; the text is the same.
        generator: CPU generator of the sampling stream, for a temperature above 0 or a random order.
        on_step: called after every pass that writes tokens; the ids it sees go to the end of the last block.
        choose: says which tokens a step commits, in the place of the rule.

    Returns:
        The texts and counts. A place at which the network predicts the mask token itself counts as written.

    Raises:
        InputError: a model of another kind, too few steps, or missing randomness.

    Source: see `BlockRule`. Known deviations: SDAR's sampler overwrites written places when fewer masks are left than its quota;
        that of Fast-dLLM v2 does not see a prompt of exactly one block.
    """
    rule = rule or (rule_of(model) if steps is None else in_steps(model))
    _check(model, new_tokens=new_tokens, rule=rule, steps=steps, generator=generator, temperature=temperature)
    start, end = prompt.shape[1], prompt.shape[1] + new_tokens
    blocks = block_ranges(model, start=start, end=end, cut_last=rule.cut_last)
    ids = torch.full((len(prompt), blocks[-1].stop), cast(int, model.mask_token_id), device=model.device)
    ids[:, :start] = prompt.to(model.device)
    is_open = (torch.arange(ids.shape[1], device=ids.device) >= start).repeat(len(ids), 1)
    limit = end if rule.edit_threshold is None else blocks[-1].stop  # an edit may depend on any place of its block
    canvas = _Canvas(ids, is_open, start, end, torch.full((len(prompt),), end, device=ids.device), limit)
    stop = torch.tensor(list(stop_token_ids), dtype=torch.long, device=ids.device)
    reader, head = BlockReader(model, origin=start, keeps=use_cache), cast(torch.nn.Linear, model.network.get_output_embeddings())
    writer = _Writer(reader, rule, temperature, generator, stop, on_step, head, choose)
    for block, quota in zip(blocks, _quotas(model, rule, blocks, canvas, steps), strict=True):
        if bool(canvas.is_open.any()):
            _write_block(writer, canvas, block, quota)
    return BlockText(canvas.ids[:, :end], canvas.ends, reader.forwards, reader.computed_tokens)


def _quotas(
    model: LanguageModel, rule: BlockRule, blocks: Sequence[range], canvas: _Canvas, steps: int | None
) -> list[list[int]]:
    """Return how many tokens each step of each block commits at least."""
    length = cast(int, model.block_length)
    if steps is None:
        whole = torch.tensor([length])
        return [commits.commit_schedule(whole, steps=rule.steps or length)[0].tolist()] * len(blocks)
    masks = [_masks(block, canvas.start, canvas.end) for block in blocks]
    seeds = [int(_is_seeded(rule, block, canvas.start)) for block in blocks]
    least = [1 + seed * (count > 1) for seed, count in zip(seeds, masks, strict=True)]
    require(steps >= sum(least), f"steps must be at least {sum(least)} for {len(blocks)} blocks", str(steps), "raise it")
    parts = zip(spread_steps(masks, steps, least=least), masks, seeds, strict=True)
    return [
        commits.commit_schedule(torch.tensor([count - seed]), steps=max(1, given - seed))[0].tolist()
        for given, count, seed in parts
    ]


def least_steps(model: LanguageModel, *, start: int, end: int) -> int:
    """Return the fewest steps in which a text is written: one a block, and one more where its first token is written alone.

    Args:
        model: whose attention goes by blocks.
        start: end of the prompt.
        end: of the text.
    """
    rule = in_steps(model)
    blocks = block_ranges(model, start=start, end=end, cut_last=True)
    return sum(1 + (_is_seeded(rule, block, start) and _masks(block, start, end) > 1) for block in blocks)


def _masks(block: range, start: int, end: int) -> int:
    """Count the positions of a block that are written."""
    return min(block.stop, end) - max(block.start, start)


def _is_seeded(rule: BlockRule, block: range, start: int) -> bool:
    return rule.seeded and block.start >= max(start, 1)


def _write_block(writer: _Writer, canvas: _Canvas, block: range, quota: Sequence[int]) -> None:
    """Write one block in all rows that are not finished."""
    rule, step = writer.rule, 0
    if _is_seeded(rule, block, canvas.start):
        _write_first(writer, canvas, block)
    size = rule.sub_block_length or len(block)
    post = torch.zeros(len(canvas.ids), dtype=torch.long, device=canvas.ids.device)
    settled = torch.full_like(post, rule.edit_threshold is None, dtype=torch.bool)
    settled |= ~canvas.is_open.any(1)  # a finished text is not edited
    for first in range(block.start, block.stop, size):
        part = range(first, min(first + size, block.stop))
        while True:
            waiting = canvas.waiting(part)
            post += ~waiting & ~settled
            active = waiting | (~settled & (post <= rule.max_post_steps))
            if not bool(active.any()):
                break
            edited = _write_step(writer, canvas, block, part, active, quota[min(step, len(quota) - 1)])
            settled |= ~waiting & ~edited
            step += 1
            if rule.edit_threshold is None:
                _close_ended(canvas, writer.stop)
    _close_ended(canvas, writer.stop)


def _write_first(writer: _Writer, canvas: _Canvas, block: range) -> None:
    """Write the first token of a block from what the finished text before it predicts."""
    state = writer.reader.context(canvas.ids[:, : block.start])[:, 0]
    chosen = commits.choose_tokens(writer.head(state).float(), temperature=writer.temperature, generator=writer.generator)
    where = torch.zeros_like(canvas.is_open)
    where[:, block.start] = canvas.is_open[:, block.start]
    _put(writer, canvas, where, torch.where(where, chosen[:, None], canvas.ids), keys=block.start)
    _close_ended(canvas, writer.stop)


def _write_step(
    writer: _Writer, canvas: _Canvas, block: range, part: range, active: Bool[Tensor, "batch"], quota: int
) -> Bool[Tensor, "batch"]:
    """Make one pass over a block, and commit and edit what the rule says; return which rows were edited."""
    rule, ids, position = writer.rule, canvas.ids, canvas.position
    inside = active[:, None] & (position >= part.start) & (position < part.stop)
    where = inside & (canvas.is_open if rule.edit_threshold is None else position >= canvas.start)
    states, first = writer.reader.block(ids[:, : block.stop], start=block.start)
    rows, columns = where.nonzero(as_tuple=True)
    shift = writer.reader.model.logit_shift
    logits = writer.head(states[rows, (columns - shift).clamp(min=0) - first]).float()
    chosen = commits.choose_tokens(logits, temperature=writer.temperature, generator=writer.generator)
    predicted = ids.masked_scatter(where, chosen)
    probability = torch.full(ids.shape, float("-inf"), dtype=torch.float64, device=ids.device)
    probability[where] = commits.probability_of(logits, chosen)
    confidence = probability.masked_fill(~canvas.is_open, float("-inf"))
    if writer.choose is None:
        committed = committed_places(confidence, rule, quota=quota, generator=writer.generator)
    else:
        committed = writer.choose(ids, where, logits, part, quota)
    edits = torch.zeros_like(committed)
    if rule.edit_threshold is not None:
        edits = where & ~canvas.is_open & (predicted != ids) & (probability > rule.edit_threshold)
    _put(writer, canvas, committed | edits, predicted, keys=block.stop)
    return edits.any(1)


def _put(writer: _Writer, canvas: _Canvas, where: Tensor, predicted: Tensor, *, keys: int) -> None:
    """Tell what is written, then write it."""
    if writer.on_step is not None:
        ratio = float(canvas.is_open[:, canvas.start : canvas.end].float().mean())
        shown = (canvas.ids.clone(), canvas.is_open.clone(), where.clone())
        writer.on_step(DenoisingStep(canvas.steps, *shown, ratio, keys))
    canvas.ids = torch.where(where, predicted, canvas.ids)
    canvas.is_open = canvas.is_open & ~where
    canvas.steps += 1


def _close_ended(canvas: _Canvas, stop: Int[Tensor, "stop"]) -> None:
    """Finish the rows that hold an end token with nothing unwritten before it."""
    is_end = torch.isin(canvas.ids, stop) & ~canvas.is_open & (canvas.position >= canvas.start)
    first = torch.where(is_end.any(1), is_end.int().argmax(1), canvas.ids.shape[1])
    whole = ~(canvas.is_open & (canvas.position < first[:, None])).any(1)
    ended = whole & (first < canvas.ends)
    canvas.ends = torch.where(ended, first + 1, canvas.ends)
    canvas.is_open = canvas.is_open & ~ended[:, None]


def _check(
    model: LanguageModel,
    *,
    new_tokens: int,
    rule: BlockRule,
    steps: int | None,
    generator: torch.Generator | None,
    temperature: float,
) -> None:
    rule_of_models = "a block sampler must get a model whose attention goes by blocks"
    require(model.goes_by_blocks, rule_of_models, f"{model.attention} in {model.name}", "use sampler.sample")
    if model.mask_token_id is None or model.block_length is None:
        got = f"{model.mask_token_id} and {model.block_length}"
        raise InputError(f"a block sampler must know the mask token and the length of blocks, got {got}: set both")
    require(new_tokens >= 1, "new_tokens must be at least 1", str(new_tokens), "ask for some")
    fits = steps is None or (rule.rule == "quota" and rule.steps is None and rule.cut_last)
    require(
        fits, "steps in all must go with the rule in_steps", f"{rule.rule!r} with steps={rule.steps}", "leave one of them out"
    )
    whole = rule.edit_threshold is None or rule.sub_block_length is None
    require(whole, "edits must be of whole blocks", f"sub_block_length {rule.sub_block_length}", "leave one of them out")
    is_random = temperature > 0 or rule.order == "random"
    commits.check_generator(generator, needed=is_random)

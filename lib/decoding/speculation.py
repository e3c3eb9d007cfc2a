"""Lossless self-speculation: drafts of the next tokens are read in one pass, and those that the sampler would write are kept."""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.decoding.caches import Hidden, logits_from, run_whole
from lib.decoding.view import guess
from lib.diffusion import sampler
from lib.models.language_model import LanguageModel, check_length


@dataclass(frozen=True)
class Speculation:
    """Drafts of a round, 1 or more."""

    drafts: int = 4


@dataclass(frozen=True)
class Speculated:
    """Text and what it took.

    Attributes:
        ids: of one text.
        forwards: passes, each over all drafts of a round.
        computed_tokens: query positions that went through the network, over all drafts.
    """

    ids: Int[Tensor, "one position"]
    forwards: int
    computed_tokens: int


def filled(
    ids: Int[Tensor, "position"], tokens: Int[Tensor, "position"], confidence: Float[Tensor, "position"], count: int
) -> list[Tensor]:
    """Return the text with the 1, 2, ... `count` most confident of the open places filled."""
    order = confidence.topk(min(count, int(confidence.isfinite().sum()))).indices
    drafts, text = [], ids
    for place in order:
        text = text.clone()
        text[place] = tokens[place]
        drafts.append(text)
    return drafts


@torch.inference_mode()
def speculate(
    model: LanguageModel, prompt: Int[Tensor, "one prompt"], *, new_tokens: int, block_length: int, drafts: int
) -> Speculated:
    """Write what `sampler.sample` writes greedily with one token a step, in fewer passes.

    A round reads drafts that fill the 1, 2, ... best open places. From each the sampler's next text is known; as long as it is
    the next draft, that is where the sampler would have come. The last one reached goes on, with its predictions already there.

    Args:
        model: a diffusion model.
        prompt: of one text.
        new_tokens: tokens to generate.
        block_length: tokens of a block.
        drafts: of a round, 1 or more; 1 is the plain sampler.

    Returns:
        The same text, but for ties that rounding breaks otherwise in a pass over several rows.

    Raises:
        InputError: drafts below 1, an autoregressive model, noise that is not all mask, or attention by blocks.

    Source: FreeDave (arXiv 2510.00294), generation/core.py at 8b48121, its nested drafts.
    """
    require(drafts >= 1, "drafts must be at least 1", str(drafts), "use 2 or more to gain passes")
    require(not model.goes_by_blocks, "drafts must go with attention that is not by blocks", model.attention, "use fast_plan")
    sampler.check_masks(model)
    mask_id, start = cast(int, model.mask_token_id), prompt.shape[1]
    check_length(model, start + new_tokens)
    ids = torch.full((start + new_tokens,), mask_id, device=model.device)
    ids[:start] = prompt[0].to(model.device)
    step, hidden, forwards, computed = 0, run_whole(model, ids[None]), 1, len(ids)
    while True:
        left = block_length - step % block_length
        opened = range(start + step - step % block_length, start + step + left)
        round_ = filled(ids, *_best(model, ids, hidden, opened), min(drafts, left))
        step += 1
        if step == new_tokens:
            return Speculated(round_[0][None], forwards, computed)
        read, at = run_whole(model, torch.stack(round_)), 0
        forwards, computed = forwards + 1, computed + read.computed
        while at + 1 < len(round_):
            (following,) = filled(round_[at], *_best(model, round_[at], _row(read, at), opened), 1)
            if not torch.equal(following, round_[at + 1]):
                break
            at, step = at + 1, step + 1
        ids, hidden = round_[at], _row(read, at)
        if step == new_tokens:
            return Speculated(ids[None], forwards, computed)


def _row(hidden: Hidden, row: int) -> Hidden:
    return Hidden(hidden.states[row : row + 1], None, 0)


def _best(
    model: LanguageModel, ids: Int[Tensor, "position"], hidden: Hidden, opened: range
) -> tuple[Int[Tensor, "position"], Float[Tensor, "position"]]:
    """Return the best tokens and their probabilities at the masks of the block in hand."""
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[opened.start : opened.stop] = ids[opened.start : opened.stop] == model.mask_token_id
    found = guess(ids[None], where[None], logits_from(model, hidden, where[None]))
    return found.tokens[0], found.confidence[0]

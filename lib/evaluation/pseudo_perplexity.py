"""The perplexity that the authors report for LLaDA: a few answer tokens of each window masked, the rest of the text shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.core.runtime import generator
from lib.diffusion.likelihood import masked_losses, part_sums, parts
from lib.models.language_model import LanguageModel, may_be_noised, require_masks


@dataclass(frozen=True)
class PseudoPerplexity:
    """The authors' figure: `value` = exp of the mean of `per_window`, the mean cross-entropies of the windows in nats per token.

    Two models measured with the same seed saw the same masks, so compare them by the differences of `per_window`.
    """

    value: float
    per_window: Float[Tensor, "window"]


def answer_windows(
    tokens: Int[Tensor, "position"], *, context_tokens: int = 960, answer_tokens: int = 64
) -> list[Int[Tensor, "_length"]]:
    """Cut a text into answers one behind the other, each behind as much of its context as there is up to a limit.

    Args:
        tokens: the whole text.
        context_tokens: most tokens before an answer.
        answer_tokens: tokens of an answer; also the length of the first context.

    Returns:
        Windows of context and answer. The first ones are shorter, and an answer that would end with the text is left out, both
        as in the release.

    Source: `eval_ppl_llada` of the authors' main_llada.py, with its lengths as defaults.

    >>> [window.tolist() for window in answer_windows(torch.arange(9), context_tokens=3, answer_tokens=2)]
    [[0, 1, 2, 3], [1, 2, 3, 4, 5], [3, 4, 5, 6, 7]]
    """
    require(
        context_tokens >= 1 and answer_tokens >= 1,
        "context_tokens and answer_tokens must be at least 1",
        f"{context_tokens} and {answer_tokens}",
        "use the defaults",
    )
    starts = range(answer_tokens, len(tokens) - answer_tokens, answer_tokens)
    return [tokens[max(0, start - context_tokens) : start + answer_tokens] for start in starts]


def answer_masks(length: int, *, answer_tokens: int, draws: int, generator: torch.Generator) -> Bool[Tensor, "draw {length}"]:
    """Hide exactly k of the last `answer_tokens` positions, k drawn anew from 1..answer_tokens for each draw.

    >>> masks = answer_masks(6, answer_tokens=2, draws=50, generator=torch.Generator().manual_seed(0))
    >>> bool(masks[:, :4].any()), sorted(set(masks.sum(1).tolist()))
    (False, [1, 2])
    """
    counts = torch.randint(1, answer_tokens + 1, (draws,), generator=generator)
    rank = torch.rand((draws, answer_tokens), generator=generator).argsort(1).argsort(1)
    masks = torch.zeros((draws, length), dtype=torch.bool)
    masks[:, length - answer_tokens :] = rank < counts[:, None]
    return masks


def _masks_of(part: Bool[Tensor, "position"], *, draws: int, generator: torch.Generator) -> Bool[Tensor, "draw position"]:
    """Hide as `answer_masks` does, the answer being the positions of a part."""
    count, masks = int(part.sum()), torch.zeros((draws, len(part)), dtype=torch.bool)
    masks[:, part] = answer_masks(count, answer_tokens=count, draws=draws, generator=generator)
    return masks


def pseudo_perplexity(
    model: LanguageModel,
    windows: Int[Tensor, "window position"] | Sequence[Int[Tensor, "_length"]],
    *,
    answer_tokens: int,
    draws: int = 8,
    seed: int,
    batch_size: int = 16,
) -> PseudoPerplexity:
    """Measure exp of the mean cross-entropy of masked answer tokens, the geometric mean over windows.

    Args:
        model: a diffusion model.
        windows: clean token windows, context first; as a sequence they may differ in length (see `answer_windows`).
        answer_tokens: how many tokens at the end of each window are the answer, those that are always shown counted out.
        draws: masks per window.
        seed: seed of the masking stream; the masks of a window depend on it and on the window's index and answer length alone.
        batch_size: draws per forward pass; changes the result by rounding only.

    Returns:
        The figure: lower is better. A mean over the k masked tokens, k uniform on 1..n, has the same expectation as the sum over
        them with weight n / k, divided by n. The log of the figure thus estimates the NELBO of the answers *given their
        context*, in nats per answer token; `diffusion.nelbo` masks whole windows instead. Where attention goes by blocks, each
        block has its own masks and counts by its length.

    Raises:
        InputError: an autoregressive model, noise that is not all mask, no windows or draws, or an answer that does not fit into
            a window.

    Source: `get_ppl` of the authors' main_llada.py. Deviation: there the masks come from the random state that the pruning
        method left behind, so every method is scored on other masks. The release's figure for Dream has another formula.
    """
    remedy = "use nelbo, the bound of its own noise"
    require_masks(model, "a pseudo-perplexity", instead="use next_token_nll", remedy=remedy)
    if not len(windows) or draws < 1:
        raise InputError(
            f"a pseudo-perplexity must have windows and draws >= 1, got {len(windows)} and {draws}: give at least one each"
        )
    shortest = min(len(ids) for ids in windows)
    if not 1 <= answer_tokens <= shortest:
        raise InputError(
            f"answer_tokens must be in [1, {shortest}], the shortest window, got {answer_tokens}: give longer windows or shorter "
            "answers"
        )
    losses = []
    for index, ids in enumerate(windows):
        stream, start = generator(seed, "pseudo_perplexity", index), len(ids) - answer_tokens
        answer = (torch.arange(len(ids)) >= start) & may_be_noised(model, ids.cpu())
        require(bool(answer.any()), "an answer must have a token that may be hidden", f"none in window {index}", "leave it out")
        split = parts(model, answer)
        masks = torch.stack([_masks_of(part, draws=draws, generator=stream) for part in split], 1)
        found = masked_losses(model, ids, masks.any(1), batch_size=batch_size, origin=start)
        means = torch.cat([part_sums(batch.cpu().double(), split) for batch in found]) / masks.sum(2)
        losses.append(float((means * (torch.stack(split).sum(1) / answer.sum()).double()).sum(1).mean()))
    per_window = torch.tensor(losses, dtype=torch.float64)
    return PseudoPerplexity(math.exp(float(per_window.mean())), per_window)

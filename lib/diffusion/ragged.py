"""Generate after prompts of unequal length in one batch: padding takes no part, so each row gets what it gets alone."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.diffusion import commits, sampler
from lib.models.finite import require_finite
from lib.models.language_model import LanguageModel, check_length

PADDING = 0  # any valid id, even the mask's: padding is known by its place, never by its id


@torch.inference_mode()
def denoise(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    steps: int,
    block_length: int | None = None,
    cfg_scale: float = 0.0,
) -> Int[Tensor, "batch new"]:
    """Denoise greedily after prompts of any lengths, the most confident predictions first.

    Args:
        model: a diffusion model.
        prompts: token ids, text by text.
        new_tokens: tokens to generate after each.
        steps: forward passes in all, split evenly over the blocks.
        block_length: tokens of a semi-autoregressive block, which begins where the prompt of its own row ends; None is one block.
            A model whose attention goes by blocks has its own, and takes one text at a time.
        cfg_scale: classifier-free guidance as in `sampler.sample`.

    Returns:
        The new tokens of each row: those of `sampler.sample` at temperature 0 for its prompt alone, up to rounding of the logits
        (attention with a mask is another kernel); exactly its result where all lengths are equal.

    Raises:
        InputError: no prompt, an autoregressive model, or lengths that do not divide.

    Source: ML-GSAI/LLaDA, generate.py, for each text. Padding stands on the right, where it moves no position.
    """
    if model.goes_by_blocks:
        require(len(prompts) > 0, "a batch must have at least one prompt", "none", "leave the call out")
        given: dict[str, Any] = {"new_tokens": new_tokens, "steps": steps, "block_length": block_length, "cfg_scale": cfg_scale}
        alone = [sampler.sample(model, torch.tensor([list(prompt)], dtype=torch.long), **given) for prompt in prompts]
        return torch.cat([ids[:, -new_tokens:] for ids in alone])
    if not model.noise.is_masked:
        return _from_noise(model, prompts, new_tokens=new_tokens, steps=steps, block_length=block_length, cfg_scale=cfg_scale)
    block = block_length or new_tokens
    sampler.check_sampling(model, new_tokens=new_tokens, steps=steps, block=block)
    if _are_equally_long(prompts):
        options: dict[str, Any] = {"new_tokens": new_tokens, "steps": steps, "block_length": block, "cfg_scale": cfg_scale}
        return sampler.sample(model, torch.tensor(prompts, dtype=torch.long), **options)[:, len(prompts[0]) :]
    mask_id, per_block = cast(int, model.mask_token_id), steps // (new_tokens // block)
    ids, real = _padded([[*prompt, *[mask_id] * new_tokens] for prompt in prompts], device=model.device)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=model.device)[:, None]
    ends = (starts[:, 0] + new_tokens).tolist()
    column = torch.arange(ids.shape[1], device=model.device)
    prompt_positions = (ids != mask_id) & real
    # A block is all masks when it begins, so that its schedule is the same for every row and block.
    counts = commits.commit_schedule(torch.full((len(prompts),), block), steps=per_block)
    for step in range(steps):
        first = starts + step // per_block * block
        where = (ids == mask_id) & (column >= first) & (column < first + block)
        logits = sampler.guided_logits(model, ids, where, prompt_positions, cfg_scale=cfg_scale, attention_mask=real.long())
        logits = sampler.written_alone(model, logits)
        chosen = commits.choose_tokens(logits, temperature=0.0, generator=None)
        confidence = torch.full(ids.shape, float("-inf"), dtype=torch.float64, device=ids.device)
        confidence[where] = commits.probability_of(logits, chosen)
        committed = _most_confident(confidence, counts[:, step % per_block], ends)
        ids = torch.where(committed, ids.masked_scatter(where, chosen), ids)
    return ids.gather(1, starts + torch.arange(new_tokens, device=ids.device))


@torch.inference_mode()
def continue_texts(model: LanguageModel, prompts: Sequence[Sequence[int]], *, new_tokens: int) -> Int[Tensor, "batch new"]:
    """Continue prompts of any lengths greedily, token by token, with the keys and values of earlier ones kept.

    Args:
        model: an autoregressive model.
        prompts: token ids, text by text; at least one token each.
        new_tokens: tokens to generate after each; an end token does not stop it.

    Returns:
        The new tokens of each row: those of `sampler.continue_text` for its prompt alone, up to rounding of the logits; exactly
        its result where all lengths are equal.

    Raises:
        InputError: no prompt, an empty one, or a diffusion model.
    """
    if not model.is_causal:
        raise InputError(f"token-by-token generation must use a causal model, got {model.name}: use denoise")
    rule, got = "a prompt to continue must have at least one token", "an empty one"
    are_equal = _are_equally_long(prompts)
    require(all(len(prompt) > 0 for prompt in prompts), rule, got, "begin it with BOS")
    if are_equal:
        ids = sampler.continue_text(model, torch.tensor(prompts, dtype=torch.long), new_tokens=new_tokens)
        return ids[:, len(prompts[0]) :]
    check_length(model, max(map(len, prompts)) + new_tokens - 1)
    # Padding on the left: the newest token of every row stands in the last column, where the next ones are appended.
    flipped, real = _padded([prompt[::-1] for prompt in prompts], device=model.device)
    read, real = flipped.flip(1), real.flip(1)
    positions, past, made = (real.cumsum(1) - 1).clamp(min=0), None, [read[:, :0]]
    for _ in range(new_tokens):
        given = {"input_ids": read, "attention_mask": real.long(), "position_ids": positions, "past_key_values": past}
        output = model.network(**given, use_cache=True, logits_to_keep=1)
        past, logits = output.past_key_values, output.logits[:, -1].float()
        _check_rows(model, logits, prompts, made)
        read = commits.choose_tokens(logits, temperature=0.0, generator=None)[:, None]
        made.append(read)
        real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    return torch.cat(made, dim=1)


def _from_noise(model: LanguageModel, prompts: Sequence[Sequence[int]], *, new_tokens: int, **options: Any) -> Tensor:
    """Denoise by `sampler.sample` prompts of one length at a time: noise of a row depends on its prompt alone."""
    _are_equally_long(prompts)
    found = torch.zeros((len(prompts), new_tokens), dtype=torch.long, device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        batch = torch.tensor([prompts[row] for row in rows.tolist()], dtype=torch.long).view(len(rows), length)
        found[rows] = sampler.sample(model, batch, new_tokens=new_tokens, **options)[:, length:]
    return found


def _check_rows(model: LanguageModel, logits: Tensor, prompts: Sequence[Sequence[int]], made: Sequence[Tensor]) -> None:
    """Refuse logits that are not finite; the layer is found on the first such text alone, where no padding is in the way."""
    spoiled = [row for row, total in enumerate(logits.sum(1).tolist()) if not math.isfinite(total)]
    for row in spoiled:
        text = torch.tensor([[*prompts[row], *torch.cat(list(made), dim=1)[row].tolist()]], device=model.device)
        alone = partial(model.network, input_ids=text, use_cache=False)
        require_finite(logits[row], alone, network=model.network, name=model.name)


def _are_equally_long(prompts: Sequence[Sequence[int]]) -> bool:
    """Tell whether no padding is needed: then the plain samplers are exact, and attention without a mask is faster."""
    require(len(prompts) > 0, "a batch must have at least one prompt", "none", "leave the call out")
    return len({len(prompt) for prompt in prompts}) == 1


def _padded(
    rows: Sequence[Sequence[int]], *, device: torch.device
) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]]:
    """Fill rows up on the right, and tell what was there before."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[PADDING] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def _most_confident(confidence: Tensor, counts: Tensor, ends: Sequence[int]) -> Bool[Tensor, "batch position"]:
    """Mark the `counts[row]` most confident positions of each row, cut at its end: which of equals wins depends on the width."""
    marked = torch.zeros_like(confidence, dtype=torch.bool)
    for row, end in enumerate(ends):
        marked[row : row + 1, :end] = commits.most_confident(confidence[row : row + 1, :end], counts[row : row + 1])
    return marked

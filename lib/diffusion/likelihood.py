"""The masked diffusion process: noising, the NELBO, and the log-likelihood of a continuation; other noise has its own bound."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.core.runtime import generator
from lib.diffusion import drawn_likelihood
from lib.diffusion.block_reader import block_logits
from lib.diffusion.noise import process_of, stratified_times
from lib.models.language_model import LanguageModel, blocks_of, logits_at, may_be_noised, require_diffusion

CountRule = Literal["stratified", "antithetic", "release"]
MaskRule = Literal["independent", "balanced"]


@dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo estimate over windows: the mean, its standard error, and the value of each window, in nats per token.

    `standard_error` covers both sources of noise, the choice of windows and the random masks. Two models measured with the same
    seed saw the same masks, so compare them by the differences of `per_window`.
    """

    mean: float
    standard_error: float
    per_window: Float[Tensor, "window"]


def exact_counts(length: int, draws: int, *, generator: torch.Generator) -> Int[Tensor, "draw"]:
    """Draw how many of `length` tokens to mask, once per draw, stratified over 1..length.

    Source: LLaDA's `get_log_likelihood` spreads the counts of a batch evenly from a random start.

    >>> sorted(exact_counts(4, 4, generator=torch.Generator().manual_seed(0)).tolist())
    [1, 2, 3, 4]
    """
    times = stratified_times(draws, generator=generator)
    return (times * length).long().clamp(max=length - 1) + 1


def release_counts(length: int, draws: int, *, generator: torch.Generator) -> Int[Tensor, "draw"]:
    """Draw mask counts as LLaDA's own evaluation does, its rounding included.

    Halves are rounded to even numbers, so when `length / draws` hits halves some counts come more often than others and the
    likelihood is biased (by 0.4 nats in 69 on the recorded example). For parity; use `exact_counts` otherwise.

    Source: LLaDA's `get_log_likelihood`, one batch of `draws`.
    """
    start = torch.randint(1, length + 1, (), generator=generator)
    grid = torch.linspace(float(start), float(start + (draws - 1) * (length / draws)), steps=draws)
    return (grid.round().long() - 1) % length + 1


def antithetic_counts(length: int, draws: int, *, generator: torch.Generator) -> Int[Tensor, "draw"]:
    """Draw counts as `exact_counts` does, but in every other stratum as far below its end as above its start in the others.

    A loss that rises with the count is then too low in one stratum where it is too high in the next, so that the mean over an
    even number of draws hardly depends on where the grid begins. Two draws mask n + 1 tokens together.

    >>> sum(antithetic_counts(8, 2, generator=torch.Generator().manual_seed(0)).tolist())
    9
    """
    offset = torch.rand((), generator=generator)
    stratum = (
        torch.arange(draws) + torch.randint(draws, (), generator=generator)
    ) % draws  # so that each draw may have any count
    times = (stratum + torch.where(stratum % 2 == 0, offset, 1.0 - offset)) / draws
    return (times * length).long().clamp(max=length - 1) + 1


COUNT_RULES = {"stratified": exact_counts, "antithetic": antithetic_counts, "release": release_counts}


def exact_count_masks(
    maskable: Bool[Tensor, "position"],
    draws: int,
    *,
    generator: torch.Generator,
    count_rule: CountRule = "stratified",
    masks: MaskRule = "independent",
) -> Bool[Tensor, "draw position"]:
    """Draw masks that hide exactly k of the maskable positions, k stratified over the draws.

    Args:
        maskable: positions that may be masked (the target of a likelihood, or the whole window).
        draws: number of masks.
        generator: CPU generator.
        count_rule: `"stratified"`, `"antithetic"` (both without bias), or `"release"` for the counts of LLaDA's evaluation.
        masks: `"independent"` given their counts, or `"balanced"` by `balanced_masks`. Each mask alone is a random one of its
            count either way.

    Returns:
        One mask per draw.
    """
    positions = maskable.nonzero()[:, 0]
    counts = COUNT_RULES[count_rule](len(positions), draws, generator=generator)
    order = torch.rand((draws, len(positions)), generator=generator).argsort(1)
    hidden = torch.zeros((draws, len(maskable)), dtype=torch.bool)
    hidden[:, positions] = balanced_masks(counts, order) if masks == "balanced" else order.argsort(1) < counts[:, None]
    return hidden


def balanced_masks(counts: Int[Tensor, "draw"], order: Int[Tensor, "draw token"]) -> Bool[Tensor, "draw token"]:
    """Choose masks of given counts so that every token weighs nearly the same in the mean over all of them.

    A mask of k tokens gives each of them the weight 1 / k. From the smallest count on, every draw hides the tokens that weigh
    least so far. As nothing else tells tokens apart but random orders, each mask alone is uniform over all of its count.

    Args:
        counts: tokens to hide in each draw.
        order: a random permutation of the tokens for each draw, which breaks ties.
    """
    weight = torch.zeros(order.shape[1], dtype=torch.float64)
    hidden = torch.zeros(order.shape, dtype=torch.bool)
    for draw in counts.argsort(stable=True).tolist():
        count = int(counts[draw])
        taken = order[draw][weight[order[draw]].argsort(stable=True)[:count]]
        hidden[draw, taken] = True
        weight[taken] += 1.0 / count
    return hidden


def parts(model: LanguageModel, maskable: Bool[Tensor, "position"]) -> list[Bool[Tensor, "position"]]:
    """Split the positions to score into those that are predicted together: all of them, or block by block.

    Args:
        model: a diffusion model.
        maskable: positions to score; where blocks are counted from the prompt's end, the first of them ends it.
    """
    if not model.goes_by_blocks:
        return [maskable]
    numbers = blocks_of(model, len(maskable), origin=int(maskable.int().argmax()))[0].to(maskable.device)
    return [maskable & (numbers == number) for number in numbers[maskable].unique()]


def part_sums(values: Float[Tensor, "row position"], split: Sequence[Tensor]) -> Float[Tensor, "row part"]:
    """Sum over the positions of each part, on the CPU."""
    return torch.stack([values.masked_fill(~part.to(values.device), 0.0).sum(1) for part in split], 1).cpu()


@torch.inference_mode()
def masked_log_likelihood(
    model: LanguageModel,
    input_ids: Int[Tensor, "position"],
    maskable: Bool[Tensor, "position"],
    *,
    draws: int,
    generator: torch.Generator,
    batch_size: int = 16,
    count_rule: CountRule = "stratified",
    masks: MaskRule = "independent",
) -> Float[Tensor, "draw"]:
    """Estimate the log-likelihood of the maskable tokens given the others, one estimate per draw.

    With k of n tokens masked, n / k times the summed log-probability of the masked tokens is an unbiased estimate of a lower
    bound of log p (in nats, for all n tokens together). Where attention goes by blocks, this holds for each block given those
    before it, and the estimates of the blocks are added. Under uniform or mixed noise it is `drawn_likelihood.log_likelihood`,
    a bound of the same quantity: the other tokens stay clean, and those to score are noised.

    Args:
        model: a diffusion model.
        input_ids: one sequence, clean.
        maskable: the n tokens to score; those that the model was always shown are given all the same.
        draws: Monte-Carlo draws.
        generator: CPU generator; the same state gives every model the same masks.
        batch_size: draws per forward pass; does not change the result.
        count_rule: how many tokens each draw masks, see `exact_count_masks`.
        masks: how the draws hang together, see there.

    Returns:
        Estimates whose mean is the bound.

    Raises:
        InputError: an autoregressive model, nothing to be scored, or another rule than the default for other noise than masks.

    Source: LLaDA (arXiv 2502.09992), Eq. 6, and its `get_log_likelihood`.
    """
    maskable = maskable & may_be_noised(model, input_ids.to(maskable.device))
    _check_scored(model, int(maskable.sum()), draws)
    if not model.noise.is_masked:
        _check_default(model, count_rule, masks)
        options = {"draws": draws, "generator": generator, "batch_size": batch_size}
        return drawn_likelihood.log_likelihood(model, process_of(model), input_ids, maskable, **options)
    draw, split = partial(exact_count_masks, draws=draws, count_rule=count_rule, masks=masks), parts(model, maskable.cpu())
    hidden = torch.stack([draw(part, generator=generator) for part in split], 1)
    weight = hidden.sum(2).reciprocal() * torch.stack(split).sum(1)
    losses = masked_losses(model, input_ids, hidden.any(1), batch_size=batch_size, origin=int(maskable.int().argmax()))
    return (torch.cat([-part_sums(batch, split) for batch in losses]) * weight).sum(1)


def _check_scored(model: LanguageModel, tokens: int, draws: int) -> None:
    require_diffusion(model, "a masked likelihood", instead="use next_token_nll")
    if tokens < 1 or draws < 1:
        raise InputError(f"a likelihood must have tokens to score and draws >= 1, got {tokens} and {draws}: give some")


def _check_default(model: LanguageModel, count_rule: CountRule, masks: MaskRule) -> None:
    rule, got = "rules for counts and masks must go with masked noise", f"{model.noise} noise in {model.name}"
    require(count_rule == "stratified" and masks == "independent", rule, got, "use stratified and independent")


@torch.inference_mode()
def masked_losses(
    model: LanguageModel,
    input_ids: Int[Tensor, "position"] | Int[Tensor, "row position"],
    masks: Bool[Tensor, "row position"],
    *,
    batch_size: int,
    origin: int = 0,
) -> Iterator[Float[Tensor, "batch position"]]:
    """Yield the cross-entropy of each masked token under each mask, 0 elsewhere, a batch of masks at a time.

    Args:
        model: a diffusion model.
        input_ids: one sequence for all masks, or one for each; clean.
        masks: positions to hide, on the CPU. Where attention goes by blocks, those of one block do not hide it from the others.
        batch_size: masks of a forward pass.
        origin: where the prompt ends, for blocks that are counted from there.
    """
    ids, mask_token_id = input_ids.to(model.device).expand(masks.shape), cast(int, model.mask_token_id)
    for rows, part in zip(ids.split(batch_size), masks.split(batch_size), strict=True):
        where = part.to(model.device)
        noisy = rows.masked_fill(where, mask_token_id)
        if model.goes_by_blocks:
            logits = block_logits(model, rows, noisy, where, origin=origin)
        else:
            logits = logits_at(model, noisy, where)
        losses = torch.zeros(where.shape, device=model.device)
        losses[where] = F.cross_entropy(logits, rows[where], reduction="none")
        yield losses


def nelbo(
    model: LanguageModel,
    windows: Int[Tensor, "window position"],
    *,
    draws: int,
    seed: int,
    batch_size: int = 16,
    count_rule: CountRule = "stratified",
    masks: MaskRule = "independent",
) -> Estimate:
    """Estimate the negative evidence lower bound of whole windows, in nats per token.

    Args:
        model: a diffusion model.
        windows: clean token windows of equal length.
        draws: masks per window.
        seed: seed of the masking stream; the masks of a window depend on it and on the window's index alone.
        batch_size: masks of any windows per forward pass; does not change the result.
        count_rule, masks: how masks are drawn, see `exact_count_masks`. The bound is the same, with about half the variance
            under `"antithetic"` at 2 to 8 draws, and under `"balanced"` at as many draws as tokens. Not so a difference of two
            models: the first changes nothing there, and the second was measured to make it noisier.

    Returns:
        The bound: lower is better. `pseudo_perplexity` is another quantity: it averages without the weights 1/t. Where attention
        goes by blocks, it is the sum of the bounds of the blocks, each given those before it. It is the bound of the noise that
        the model was trained with, so bounds of models of different noise compare. Tokens that the model was always shown are
        neither scored nor counted.

    Raises:
        InputError: an autoregressive model, nothing to score, or another rule than the default for other noise than masks.

    Source: MDLM / LLaDA's bound E_t[1/t sum CE], t replaced by the exact count k / length (equal in expectation, less noise).
    """
    _check_scored(model, windows.numel(), draws)
    whole = torch.ones(windows.shape[1], dtype=torch.bool)
    streams = [generator(seed, "nelbo", index) for index in range(len(windows))]
    if not model.noise.is_masked:
        _check_default(model, count_rule, masks)
        process = process_of(model)
        scored = may_be_noised(model, windows.cpu())
        of_rows = zip(windows, scored, streams, strict=True)
        noised = [drawn_likelihood.draw(process, ids, row, draws=draws, generator=stream) for ids, row, stream in of_rows]
        sums = drawn_likelihood.losses(model, process, drawn_likelihood.together(noised), batch_size=batch_size)
        return summarise(sums.view(len(windows), draws).mean(1) / scored.sum(1))
    split = parts(model, whole)
    draw = partial(exact_count_masks, draws=draws, count_rule=count_rule, masks=masks)
    pairs = zip(may_be_noised(model, windows.cpu()), streams, strict=True)
    drawn = [torch.stack([draw(part & row, generator=stream) for part in split], 1) for row, stream in pairs]
    hidden, rows = torch.cat(drawn), windows.repeat_interleave(draws, dim=0)
    losses = masked_losses(model, rows, hidden.any(1), batch_size=batch_size)
    means = torch.cat([part_sums(batch, split) for batch in losses]) / hidden.sum(2)
    share = torch.stack(split).sum(1) / windows.shape[1]
    return summarise((means * share).sum(1).view(len(windows), draws).mean(1).double())


@torch.inference_mode()
def next_token_nll(model: LanguageModel, windows: Int[Tensor, "window position"], *, batch_size: int = 16) -> Estimate:
    """Return the exact negative log-likelihood of an autoregressive model, in nats per predicted token (all but the first).

    Raises:
        InputError: the model is not autoregressive.
    """
    if not model.is_causal:
        raise InputError(f"a next-token likelihood must use an autoregressive model, got {model.name}: use nelbo")
    values = []
    where = torch.ones(windows.shape[1], dtype=torch.bool)
    where[0] = False
    for ids in windows.to(model.device).split(batch_size):
        logits = logits_at(model, ids, where.to(ids.device).expand(ids.shape))
        losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        values.append(losses.view(len(ids), -1).double().mean(1).cpu())
    return summarise(torch.cat(values))


def summarise(per_window: Float[Tensor, "window"]) -> Estimate:
    """Return mean and standard error over windows.

    >>> summarise(torch.tensor([1.0, 3.0])).standard_error
    1.0
    """
    count = len(per_window)
    error = float(per_window.std() / count**0.5) if count > 1 else float("nan")
    return Estimate(float(per_window.mean()), error, per_window)

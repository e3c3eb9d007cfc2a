"""The steps of a denoising sampler: which tokens it predicts, which of them it keeps, and what a callback sees."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import InputError, require

Remasking = Literal["low_confidence", "random"]
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class DenoisingStep:
    """What a trace callback sees after the forward pass of one step.

    Attributes:
        step: index of the denoising step, 0 = everything after the prompt is masked.
        input_ids: what the network read; with guidance the recorded passes hold these rows first, the unguided ones after them.
        is_masked: positions still masked in `input_ids`; of other noise, see `ancestral.generate`.
        is_committed: positions that this step turns into tokens, or under other noise into other ones.
        mask_ratio: share of the new tokens still masked in `input_ids`; under other noise its level, expected to be drawn anew.
        keys: positions that the network read, from the first one; None is all of them.
    """

    step: int
    input_ids: Int[Tensor, "batch position"]
    is_masked: Bool[Tensor, "batch position"]
    is_committed: Bool[Tensor, "batch position"]
    mask_ratio: float
    keys: int | None = None


def commit_schedule(masked: Int[Tensor, "batch"], *, steps: int) -> Int[Tensor, "batch step"]:
    """Split the masked tokens of each row evenly over the steps, the remainder going to the first ones.

    Source: LLaDA's `get_num_transfer_tokens` (linear schedule).

    >>> commit_schedule(torch.tensor([7]), steps=3).tolist()
    [[3, 2, 2]]
    """
    base, rest = masked // steps, masked % steps
    return base[:, None] + (torch.arange(steps, device=masked.device)[None, :] < rest[:, None])


def choose_tokens(
    logits: Float[Tensor, "selected vocab"], *, temperature: float, generator: torch.Generator | None
) -> Int[Tensor, "selected"]:
    """Pick a token per position: the best one, or Gumbel-max sampling in float64.

    Source: LLaDA's `add_gumbel_noise`; float32 noise is known to lower the quality of masked diffusion samples.
    """
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    return (logits.double() - temperature * torch.log(-torch.log(uniform))).argmax(-1)


def most_confident(confidence: Float[Tensor, "batch position"], counts: Int[Tensor, "batch"]) -> Bool[Tensor, "batch position"]:
    """Mark the `counts[row]` most confident positions of each row.

    >>> most_confident(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2])).tolist()
    [[False, True, True]]
    """
    marked = torch.zeros_like(confidence, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        marked[row, confidence[row].topk(count).indices] = True
    return marked


def keeping_order(
    logits: Float[Tensor, "selected vocab"],
    chosen: Int[Tensor, "selected"],
    *,
    remasking: Remasking,
    generator: torch.Generator | None,
) -> Float[Tensor, "selected"]:
    """Return how early each prediction deserves to be kept: its float64 probability, or a random number.

    Args:
        logits: at the positions in question.
        chosen: the token predicted at each.
        remasking: as in `sample`.
        generator: CPU generator of the sampling stream, for random numbers.
    """
    if remasking == "random":
        return torch.rand(chosen.shape, generator=generator, dtype=torch.float64).to(chosen.device)
    return probability_of(logits, chosen)


def probability_of(logits: Float[Tensor, "selected vocab"], chosen: Int[Tensor, "selected"]) -> Float[Tensor, "selected"]:
    """Return the float64 probabilities of the chosen tokens.

    >>> probability_of(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).tolist()
    [0.5]
    """
    # Rows in parts: all of them in float64 would be gigabytes at a vocabulary of 126,000.
    parts = zip(logits.split(ROWS_AT_ONCE), chosen.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([rows.double().softmax(-1).gather(1, picked[:, None])[:, 0] for rows, picked in parts])


def check_generator(generator: torch.Generator | None, *, needed: bool) -> None:
    """Raise `InputError` when there is no randomness where some is needed."""
    if needed and generator is None:
        raise InputError("random sampling must be given a generator, got None: pass runtime.generator(seed, 'sampling')")


def check_steps(*, new_tokens: int, steps: int, block: int) -> None:
    """Refuse lengths that do not divide.

    Args:
        new_tokens: tokens to generate.
        steps: forward passes in all.
        block: tokens of a block.

    Raises:
        InputError: see above.
    """
    rule, remedy = "block_length must divide new_tokens", "choose a divisor"
    require(new_tokens >= 1 and block >= 1 and not new_tokens % block, rule, f"{block} and {new_tokens}", remedy)
    rule, blocks = "steps must be a multiple of the number of blocks", new_tokens // block
    require(steps >= 1 and not steps % blocks, rule, f"{steps} for {blocks}", "change steps")


def changed(
    ids: Int[Tensor, "prompt step position"], texts: Int[Tensor, "prompt position"]
) -> Bool[Tensor, "prompt step position"]:
    """Tell which tokens each step changes.

    Args:
        ids: what the network read at each step.
        texts: what the last step left.
    """
    return torch.cat([ids[:, 1:], texts[:, None]], 1) != ids


def still_changing(
    ids: Int[Tensor, "prompt step position"], texts: Int[Tensor, "prompt position"]
) -> Bool[Tensor, "prompt step position"]:
    """Tell which positions change at a step or a later one, as `changed` takes its arguments.

    >>> still_changing(torch.tensor([[[4, 7], [5, 7], [4, 7]]]), torch.tensor([[4, 8]])).int().tolist()
    [[[1, 1], [1, 1], [0, 1]]]
    """
    return changed(ids, texts).flip(1).cummax(1).values.flip(1)

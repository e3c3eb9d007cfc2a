"""Sampling backwards through any noise: a step at a time from the mixing to clean tokens."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.diffusion.noise import Noise

Greedy = Literal["never", "last", "always"]
Denoiser = Callable[[Int[Tensor, "batch position"]], Float[Tensor, "batch position state"]]


@torch.no_grad()
def sample_back(
    denoiser: Denoiser,
    noise: Noise,
    input_ids: Int[Tensor, "batch position"],
    where: Bool[Tensor, "batch position"],
    *,
    steps: int,
    generator: torch.Generator,
    greedy: Greedy = "last",
) -> Int[Tensor, "batch position"]:
    """Fill positions with tokens by `steps` equal steps of the reverse process, from the mixing at t = 1.

    Args:
        denoiser: gives x_theta, probabilities of the clean token at each position, for noised ids.
        noise: the noise that the denoiser was trained with.
        input_ids: token ids; those outside `where` are kept.
        where: positions to fill.
        steps: number of steps; the error of independent draws falls as 1 / steps.
        generator: CPU generator.
        greedy: `"never"` draws every step (ancestral sampling); `"last"` takes the most probable clean token in the last step
            (Duo's greedy tail); `"always"` takes the most probable state in every step.

    Returns:
        The ids with the positions filled.

    Raises:
        InputError: fewer than one step, or probabilities that are no finite numbers.
    """
    require(steps >= 1, "steps must be at least 1", f"{steps}", "use 8 or more")
    everywhere = torch.ones(input_ids.shape)
    ids = noise.corrupt(input_ids, everywhere, generator=generator, may_change=where).input_ids
    for step in range(steps, 0, -1):
        probs = denoiser(ids)[where].double()
        got = "others" if bool(probs.isinf().any()) else "NaN"
        require(
            math.isfinite(float(probs.sum())), "probabilities of a denoiser must be finite", got, "check its weights and dtype"
        )
        back = noise.reverse(probs, ids[where], t=step / steps, s=(step - 1) / steps)
        if greedy == "always" or (greedy == "last" and step == 1):
            chosen = back.argmax(-1)
        else:
            chosen = torch.multinomial(back.cpu(), 1, generator=generator)[:, 0].to(ids.device)
        ids = ids.masked_scatter(where, chosen)
    return ids

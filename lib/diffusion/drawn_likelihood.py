"""The bound on the log-likelihood under any noise, for networks that are given no time.

How many of n tokens are drawn anew is uniform over 0..n when the time is, and given that count k the time follows Beta(k + 1,
n - k + 1). So counts are stratified, and the logits of one pass serve all times of its count, over which the integrand is
integrated by Gauss's rule: a single time would have an infinite variance, because the integrand grows as 1 / t where a token is
seen that is not the clean one. The whole of (0, 1) is covered: no smallest time, no reconstruction term beside the integral.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import roots_jacobi
from torch import Tensor

from lib.core.errors import require
from lib.diffusion.noise import Noise, stratified_times
from lib.models.language_model import LanguageModel, logits_at

# Nodes of Gauss's rule where at most so many tokens were drawn anew, else 4: -log(t) / t is then integrated to 2e-3 or better.
NODES = {1: 56, 3: 16, 7: 6}


@dataclass(frozen=True)
class Draws:
    """Noised copies of sequences: their ids, the clean ids, which tokens are scored, and how many were drawn anew."""

    noisy: Int[Tensor, "draw position"]
    clean: Int[Tensor, "draw position"]
    maskable: Bool[Tensor, "draw position"]
    counts: Int[Tensor, "draw"]


@lru_cache(maxsize=4096)
def times_given_count(count: int, length: int) -> tuple[Float[Tensor, "time"], Float[Tensor, "time"]]:
    """Return times and weights whose weighted sum of f is the mean of f over Beta(count + 1, length - count + 1).

    With m nodes it is exact for f(t) = p(t) / t with a polynomial p of 2 m - 1 degrees where a token was drawn, else for f = p.

    Args:
        count: tokens drawn anew, 0..length.
        length: tokens that might have been.

    >>> times, weights = times_given_count(2, 5)
    >>> round(float((weights / times).sum()), 6)  # B(2, 4) / B(3, 4)
    3.0
    """
    number = next((nodes for most, nodes in NODES.items() if count <= most), 4)
    nodes, weights = (torch.from_numpy(part) for part in roots_jacobi(number, length - count, max(count - 1, 0)))
    times, weights = (1.0 + nodes) / 2.0, weights / weights.sum()
    return times, weights * times * (length + 1) / count if count else weights


def draw(
    noise: Noise,
    input_ids: Int[Tensor, "position"],
    maskable: Bool[Tensor, "position"],
    *,
    draws: int,
    generator: torch.Generator,
) -> Draws:
    """Draw noised copies of one sequence, counts of redrawn tokens stratified over 0..n.

    Args:
        noise: mixing of the noise.
        input_ids: clean ids.
        maskable: the n positions that may change; the others stay clean (a prompt).
        draws: number of copies.
        generator: CPU generator.
    """
    positions = maskable.cpu().nonzero()[:, 0]
    length = len(positions)
    counts = (stratified_times(draws, generator=generator) * (length + 1)).long().clamp(max=length)
    order = torch.rand((draws, length), generator=generator).argsort(1).argsort(1)
    fresh = torch.multinomial(noise.mixing, draws * length, replacement=True, generator=generator).view(draws, length)
    clean = input_ids.cpu().expand(draws, -1)
    noisy = clean.clone()
    noisy[:, positions] = torch.where(order < counts[:, None], fresh, clean[:, positions])
    return Draws(noisy, clean, maskable.cpu().expand(draws, -1), counts)


def together(drawn: Sequence[Draws]) -> Draws:
    """Put draws of sequences of equal length into one."""
    return Draws(*(torch.cat([getattr(one, field.name) for one in drawn]) for field in fields(Draws)))


@torch.inference_mode()
def losses(model: LanguageModel, noise: Noise, drawn: Draws, *, batch_size: int) -> Float[Tensor, "draw"]:
    """Return the summed integrand of each noised copy, integrated over its times, in nats.

    Args:
        model: a diffusion model trained with this noise.
        noise: its noise.
        drawn: see `draw`.
        batch_size: copies of a forward pass; changes memory, not the result.
    """
    found = []
    for start in range(0, len(drawn.noisy), batch_size):
        rows = slice(start, start + batch_size)
        where = drawn.maskable[rows].to(model.device)
        clean, noisy = drawn.clean[rows].to(model.device), drawn.noisy[rows].to(model.device)
        log_probs = noise.clean_log_probs(logits_at(model, noisy, where))
        lengths = where.sum(1).tolist()
        parts = zip(log_probs.split(lengths), clean[where].split(lengths), noisy[where].split(lengths), strict=True)
        found += [_integral(noise, *part, count=int(count)) for part, count in zip(parts, drawn.counts[rows], strict=True)]
    return torch.stack(found).cpu()


def _integral(noise: Noise, log_probs: Tensor, clean: Tensor, noisy: Tensor, *, count: int) -> Tensor:
    """Integrate the summed loss of one copy over the times that fit its count."""
    total = torch.zeros((), dtype=torch.float64, device=clean.device)
    for time, weight in zip(*times_given_count(count, len(clean)), strict=True):
        at = time.to(clean.device, torch.float32).expand(len(clean))
        total += weight * noise.loss(log_probs, clean, noisy, at).double().sum()
    return total


def log_likelihood(
    model: LanguageModel,
    noise: Noise,
    input_ids: Int[Tensor, "position"],
    maskable: Bool[Tensor, "position"],
    *,
    draws: int,
    generator: torch.Generator,
    batch_size: int = 16,
) -> Float[Tensor, "draw"]:
    """Estimate a lower bound of the log-likelihood of the maskable tokens given the others, one unbiased estimate per draw.

    Args:
        model: a diffusion model trained with this noise.
        noise: its noise.
        input_ids: one sequence, clean.
        maskable: the tokens to score, all together.
        draws: noised copies.
        generator: CPU generator; the same state gives every model the same copies.
        batch_size: copies of a forward pass; does not change the result.

    Returns:
        Estimates in nats whose mean is the bound.

    Raises:
        InputError: nothing is to be scored.

    Source: the general bound of UDLM, XDLM and GIDD (`Noise.loss`), integrated over the counts drawn.
    """
    rule = "a likelihood must have tokens to score and draws >= 1"
    require(bool(maskable.any()) and draws >= 1, rule, f"{int(maskable.sum())} and {draws}", "give some")
    drawn = draw(noise, input_ids, maskable, draws=draws, generator=generator)
    return -losses(model, noise, drawn, batch_size=batch_size)

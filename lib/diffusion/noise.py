"""One noise for masked, uniform and mixed diffusion: how tokens are corrupted, the bound that trains, and the step back.

A token x stands at time t with the distribution q_t(z | x) = alpha_t [z = x] + b_t(z) with alpha_t = 1 - t and b_t = t pi. The
mixing pi is all mask (LLaDA, MDLM), uniform over the tokens (UDLM, Duo), or a share k of uniform and the rest mask (XDLM). The
network gives x_theta, a distribution over the clean token at each position; it is given no time.

The optimum of the bound under uniform or mixed noise is p(x_l | the other positions), not p(x_l | all of z): a confidence about a
token that is seen must use `full_posterior`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.models.language_model import LanguageModel, require_diffusion

NOISE_EPS = 1e-3
Schedule = Literal["llada", "dream"]


@dataclass(frozen=True)
class Corrupted:
    """A noised batch: `input_ids`, where tokens were drawn anew (some by chance as they were), and the time of each position."""

    input_ids: Int[Tensor, "batch position"]
    is_drawn: Bool[Tensor, "batch position"]
    t: Float[Tensor, "batch position"]


@dataclass(frozen=True)
class Noise:
    """A noise of the linear schedule, decided by its mixing.

    Attributes:
        vocab_size: number of states, the mask token included where there is one.
        mask_token_id: None when no state is a mask.
        uniform_share: share k of the mixing that is uniform, in [0, 1]; the rest is mask.
        mask_in_uniform: whether the uniform part covers the mask token too, as XDLM's does.
    """

    vocab_size: int
    mask_token_id: int | None
    uniform_share: float
    mask_in_uniform: bool = False

    def __post_init__(self) -> None:
        got = f"{self.uniform_share}"
        require(0.0 <= self.uniform_share <= 1.0, "uniform_share must be in [0, 1]", got, "0.1 is XDLM's")
        rule = "uniform_share must be 1 without a mask token"
        require(self.mask_token_id is not None or self.uniform_share == 1.0, rule, got, "name mask_token_id")

    @cached_property
    def mixing(self) -> Float[Tensor, "state"]:
        """Return pi, the distribution at t = 1, in float64."""
        spread = torch.ones(self.vocab_size, dtype=torch.float64)
        if self.mask_token_id is not None and not self.mask_in_uniform:
            spread[self.mask_token_id] = 0.0
        pi = self.uniform_share * spread / spread.sum()
        if self.mask_token_id is not None:
            pi[self.mask_token_id] += 1.0 - self.uniform_share
        return pi

    def corrupt(
        self,
        input_ids: Int[Tensor, "batch position"],
        t: Float[Tensor, "batch position"],
        *,
        generator: torch.Generator,
        may_change: Bool[Tensor, "batch position"] | None = None,
    ) -> Corrupted:
        """Draw each token anew from the mixing with probability t.

        Args:
            input_ids: clean token ids.
            t: time of each position, in [0, 1].
            generator: CPU generator; noises of different mixing draw at the same places.
            may_change: False for positions that stay as they are (a prompt). None lets all change.
        """
        drawn = torch.rand(input_ids.shape, generator=generator) < t.cpu()
        if may_change is not None:
            drawn &= may_change.cpu()
        fresh = torch.multinomial(self.mixing, input_ids.numel(), replacement=True, generator=generator).view(input_ids.shape)
        is_drawn = drawn.to(input_ids.device)
        return Corrupted(torch.where(is_drawn, fresh.to(input_ids.device), input_ids), is_drawn, t.to(input_ids.device))

    def fill(
        self,
        input_ids: Int[Tensor, "*batch position"],
        where: Bool[Tensor, "*batch position"],
        *,
        generator: torch.Generator,
    ) -> Int[Tensor, "*batch position"]:
        """Draw the tokens at chosen positions anew from the mixing; where that is all mask, nothing is drawn.

        Args:
            input_ids: clean token ids.
            where: which of them.
            generator: CPU generator.
        """
        if self.uniform_share == 0.0 and self.mask_token_id is not None:
            return input_ids.masked_fill(where, self.mask_token_id)
        count = int(where.sum())
        fresh = torch.multinomial(self.mixing, count, replacement=True, generator=generator) if count else torch.empty(0).long()
        return input_ids.masked_scatter(where, fresh.to(input_ids.device, input_ids.dtype))

    def clean_log_probs(self, logits: Float[Tensor, "*batch state"]) -> Float[Tensor, "*batch state"]:
        """Return the logarithm of x_theta: a clean token is never the mask token, so nothing is left to that."""
        if self.mask_token_id is not None:
            logits = logits.clone()
            logits[..., self.mask_token_id] = float("-inf")
        return logits.log_softmax(-1)

    def weight(self, clean: Int[Tensor, "position"], noisy: Int[Tensor, "position"], t: Float[Tensor, "position"]) -> Tensor:
        """Return r_t(z) / q_t(z), the jump rate into the state seen over its probability: 0 where the loss is 0 for any network.

        With alpha = 1 - t the rate b' - (alpha' / alpha) b is pi / (1 - t).
        """
        pi = self.mixing.to(t.device, t.dtype)[noisy]
        return pi / ((1.0 - t) * (1.0 - t) * (clean == noisy) + (1.0 - t) * t * pi)

    def loss(
        self,
        log_probs: Float[Tensor, "position state"],
        clean: Int[Tensor, "position"],
        noisy: Int[Tensor, "position"],
        t: Float[Tensor, "position"],
    ) -> Float[Tensor, "position"]:
        """Return the integrand of the negative evidence lower bound at each position, in nats; its mean over t is the bound.

        Args:
            log_probs: logarithms of x_theta.
            clean: tokens before the noise.
            noisy: tokens after it.
            t: time of each position, in (0, 1).

        Source: weight * (KL(q || q_theta) + rho - log rho - 1) with rho = q(z) / q_theta(z) and q_theta = alpha x_theta + b;
            equal to MDLM's cross-entropy / t at masks, to UDLM's and to XDLM's expressions.
        """
        alpha = 1.0 - t
        pi = self.mixing.to(t.device, t.dtype)
        at_clean, at_noisy = (log_probs.gather(1, ids[:, None])[:, 0].exp() for ids in (clean, noisy))
        same = (clean == noisy).to(t.dtype)
        q_clean, q_noisy = alpha + t * pi[clean], alpha * same + t * pi[noisy]
        theta_clean, theta_noisy = alpha * at_clean + t * pi[clean], alpha * at_noisy + t * pi[noisy]
        # sum_j q log(q / q_theta): the clean token apart, every other state of the mixing has q = t pi
        cross = self._mixing_divergence(log_probs, t)
        own = t * pi[clean] * (_log(t * pi[clean]) - _log(theta_clean))
        if self.uniform_share == 0.0:  # q_theta underflows where x_theta does; its logarithm does not
            divergence = q_clean * -log_probs.gather(1, clean[:, None])[:, 0] + cross
        else:
            divergence = cross - own + q_clean * (q_clean.log() - theta_clean.log())
        weight = self.weight(clean, noisy, t)
        ratio = torch.where(weight > 0, q_noisy / torch.where(weight > 0, theta_noisy, 1.0), 1.0)
        return torch.where(weight > 0, weight * (divergence + ratio - ratio.log() - 1.0), 0.0)

    def _mixing_divergence(self, log_probs: Tensor, t: Tensor) -> Tensor:
        """Return sum_j b_j log(b_j / q_theta(j)) over the states of the mixing."""
        support = self.mixing.nonzero()[:, 0]
        if len(support) < self.vocab_size // 2:
            log_probs, pi = log_probs[:, support.to(t.device)], self.mixing[support]
        else:
            pi = self.mixing
        pi = pi.to(t.device, t.dtype)
        # log(b / q_theta) = -log(1 + alpha x_theta / (t pi))
        scale = torch.where(pi > 0, 1.0 / pi.clamp(min=1e-30), 0.0)
        odds = ((1.0 - t) / t)[:, None] * log_probs.exp() * scale
        with torch.autocast(t.device.type, enabled=False):  # training runs under it; the terms cancel, so none may be rounded
            return -t * (odds.log1p() @ pi)

    def reverse(
        self,
        probs: Float[Tensor, "*batch state"],
        noisy: Int[Tensor, "*batch"],
        *,
        t: float,
        s: float,
    ) -> Float[Tensor, "*batch state"]:
        """Return p(z_s | z_t = noisy) for an earlier time s under the network's x_theta.

        Source: q_{s,theta}(j) (alpha_{t|s} [j = z] + b_t(z) - alpha_{t|s} b_s(z)) / q_{t,theta}(z), scaled to sum to 1.
        """
        require(0.0 <= s < t <= 1.0, "times must be 0 <= s < t <= 1", f"s {s} and t {t}", "go backwards in time")
        pi = self.mixing.to(probs.device, probs.dtype)
        stay = (1.0 - t) / (1.0 - s)
        jump = (t - stay * s) * pi[noisy][..., None]
        seen = torch.nn.functional.one_hot(noisy, self.vocab_size).to(probs.dtype)
        earlier = (1.0 - s) * probs + s * pi
        joint = earlier * (stay * seen + jump)
        total = joint.sum(-1, keepdim=True)
        return torch.where(total > 0, joint / total, seen)  # a seen token that x_theta excludes stays

    def full_posterior(
        self, probs: Float[Tensor, "*batch state"], noisy: Int[Tensor, "*batch"], *, t: float
    ) -> Float[Tensor, "*batch state"]:
        """Return p(x | all of z_t), which is proportional to x_theta(x) q_t(z | x): what a confidence must use."""
        return self.reverse(probs, noisy, t=t, s=0.0)


def process_of(model: LanguageModel) -> Noise:
    """Return the noise that a model was trained with.

    Args:
        model: a diffusion model.

    Raises:
        InputError: an autoregressive model, or attention by blocks under other noise than masks.
    """
    require_diffusion(model, "noise", instead="read clean text with it")
    states = int(model.network.config.vocab_size)
    if model.noise.is_masked:
        require(model.mask_token_id is not None, "masked noise must have a mask token", f"none with {model.name}", "name it")
        return Noise(states, model.mask_token_id, 0.0)
    rule, remedy = "attention by blocks must go with masked noise", "its blocks have no bound here"
    require(not model.goes_by_blocks, rule, f"{model.noise} noise in {model.name}", remedy)
    if model.noise.kind == "uniform":
        return uniform_noise(states, mask_token_id=model.noise.never_drawn)
    return Noise(states, model.mask_token_id, model.noise.uniform, mask_in_uniform=True)


def masked_noise(vocab_size: int, *, mask_token_id: int) -> Noise:
    """Return the noise of LLaDA and MDLM: tokens become masks."""
    return Noise(vocab_size, mask_token_id, 0.0)


def uniform_noise(vocab_size: int, *, mask_token_id: int | None = None) -> Noise:
    """Return the noise of UDLM and Duo: tokens become other tokens, never the mask token if the vocabulary has one."""
    return Noise(vocab_size, mask_token_id, 1.0)


def mixed_noise(vocab_size: int, *, mask_token_id: int, uniform_share: float = 0.1) -> Noise:
    """Return XDLM's noise: a share is uniform over all states, the mask token too, the rest becomes masks."""
    return Noise(vocab_size, mask_token_id, uniform_share, mask_in_uniform=True)


def stratified_times(batch: int, *, generator: torch.Generator) -> Float[Tensor, "batch"]:
    """Draw one diffusion time per row, one from each of `batch` equal parts of [0, 1).

    Source: LLaDA and MDLM draw the times of a batch on a shifted grid, which lowers the variance of the loss.

    >>> times = stratified_times(4, generator=torch.Generator().manual_seed(0))
    >>> sorted((times * 4).long().tolist())
    [0, 1, 2, 3]
    """
    offset = torch.rand((), generator=generator)
    return (offset + torch.arange(batch) / batch) % 1.0


@dataclass(frozen=True)
class Noised:
    """A noised batch: `input_ids` with masks put in, `is_masked` where, and `mask_rate` with which probability."""

    input_ids: Int[Tensor, "batch position"]
    is_masked: Bool[Tensor, "batch position"]
    mask_rate: Float[Tensor, "batch"]


def forward_noise(
    input_ids: Int[Tensor, "batch position"],
    *,
    mask_token_id: int,
    generator: torch.Generator,
    t: Float[Tensor, "batch"] | None = None,
    schedule: Schedule = "llada",
    eps: float = NOISE_EPS,
) -> Noised:
    """Mask each token independently with rate (1 - eps) t + eps.

    Args:
        input_ids: clean token ids.
        mask_token_id: id of the mask token, read from the checkpoint.
        generator: CPU generator of the masking stream.
        t: diffusion time per row in [0, 1]; drawn stratified over the batch when None.
        schedule: `"llada"` masks any position; `"dream"` never masks the first and the last one.
        eps: smallest mask rate.

    Returns:
        The noised batch on the device of `input_ids`.

    Source: LLaDA's forward process (its GUIDELINES and the release's calibration); Dream's variant as in the release.
    """
    rows, length = input_ids.shape
    times = stratified_times(rows, generator=generator) if t is None else t.to("cpu", torch.float32)
    rate = (1.0 - eps) * times + eps
    is_masked = torch.rand((rows, length), generator=generator) < rate[:, None]
    if schedule == "dream":
        is_masked[:, 0] = False
        is_masked[:, -1] = False
    is_masked = is_masked.to(input_ids.device)
    return Noised(input_ids.masked_fill(is_masked, mask_token_id), is_masked, rate.to(input_ids.device))


def training_times(rows: int, *, generator: torch.Generator, eps: float = NOISE_EPS) -> Float[Tensor, "row"]:
    """Draw one time per row, one from each of `rows` equal parts of (eps, 1), in random order."""
    times = stratified_times(rows, generator=generator)[torch.randperm(rows, generator=generator)]
    return times * (1.0 - 2 * eps) + eps


def _log(values: Tensor) -> Tensor:
    """Return the logarithm, 0 for 0: where it is used a factor of 0 stands before it."""
    return torch.where(values > 0, values, 1.0).log()

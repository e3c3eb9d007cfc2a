"""How much calibration tokens count: less on sinks, more on sinks, or less on as many others. Tensors in, tensors out."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.config import InputError
from lib.sinks import token_weight

Control = Literal["random", "first", "mask", "norm"]
CONTROLS: tuple[Control, ...] = ("random", "first", "mask", "norm")


def sinks_down(score: Float[Tensor, "sample position"]) -> Float[Tensor, "sample position"]:
    """Return omega = 1 - score: what sinks contribute is taken out (paper, Eq. 12)."""
    return token_weight(score)


def sinks_up(score: Float[Tensor, "sample position"], *, boost: float = 1.0) -> Float[Tensor, "sample position"]:
    """Return omega = 1 + boost x score: what sinks contribute counts more, so that the weights that read them stay.

    Args:
        score: sink score in [0, 1].
        boost: extra weight of a full sink.

    Raises:
        InputError: boost is not positive.

    Source: stands for the habit of autoregressive work to preserve sinks (StreamingLLM, arXiv 2309.17453, keeps them in the
        cache); the paper names the habit but no formula, so this one is ours.
    """
    if not boost > 0:
        raise InputError(f"boost must be positive, got {boost:g}: 1 doubles what a sink contributes")
    return 1.0 + boost * score


def average_over_levels(weight: Float[Tensor, "window level position"]) -> Float[Tensor, "window position"]:
    """Average token weights over the noise levels of each window.

    Source: the release's SparseGPT variant measures sinks on noised text and weights the clean text with their average.
    """
    return weight.mean(1)


def control_down(
    score: Float[Tensor, "sample position"],
    control: Control,
    *,
    input_ids: Int[Tensor, "sample position"],
    mask_token_id: int | None = None,
    activation_norm: Float[Tensor, "sample position"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "sample position"]:
    """Take out as many tokens of each sample as it has sinks, but others.

    Args:
        score: sink score; a position counts as a sink above one half.
        control: `"random"` positions, the `"first"` ones, `"mask"` tokens at random, or the largest activation `"norm"`.
        input_ids: for `"mask"`.
        mask_token_id: for `"mask"`.
        activation_norm: for `"norm"`.
        generator: CPU generator, for `"random"` and `"mask"`.

    Returns:
        Weights of 0 and 1. Where a sample has fewer mask tokens than sinks, all of them are taken out.

    Raises:
        InputError: what the control needs is missing.
    """
    order = _order(
        score, control, input_ids=input_ids, mask_token_id=mask_token_id, activation_norm=activation_norm, generator=generator
    )
    rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen: Bool[Tensor, "sample position"] = rank < (score > 0.5).sum(1, keepdim=True)
    return 1.0 - (chosen & order.isfinite()).to(score.dtype)


def _order(
    score: Tensor,
    control: Control,
    *,
    input_ids: Tensor,
    mask_token_id: int | None,
    activation_norm: Tensor | None,
    generator: torch.Generator | None,
) -> Float[Tensor, "sample position"]:
    """Return a number per position: the largest are taken out first, minus infinity never."""
    if control == "first":
        return -torch.arange(score.shape[1], device=score.device).expand(score.shape).float()
    if control == "norm":
        if activation_norm is None:
            raise InputError("the control 'norm' must be given activation norms, got None: pass activation_norm")
        return activation_norm.float()
    if generator is None:
        raise InputError(f"the control {control!r} must be given a generator, got None: pass runtime.generator(seed, 'control')")
    drawn = torch.rand(score.shape, generator=generator).to(score.device)
    if control == "random":
        return drawn
    if mask_token_id is None:
        raise InputError("the control 'mask' must be given a mask token, got None: pass mask_token_id of a diffusion model")
    return drawn.masked_fill(input_ids != mask_token_id, float("-inf"))

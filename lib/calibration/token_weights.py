"""How much calibration tokens count: less (or more) on sinks, less on as many others, or less where mass is unstable.

Tensors in, tensors out.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attention import sinks
from lib.core.errors import InputError, require

Kind = Literal[
    "sinks_down", "sinks_up", "random", "first", "mask", "norm", "variance", "presence", "confidence", "frontier"
]  # fmt: skip
Level = Literal["aggregate", "layer", "head"]
Rule = Literal["mean_std", "leave_one_out"]
Unit = Literal["sum", "mean_one"]
CONTROLS = ("random", "first", "mask", "norm")
INSTABILITY = ("variance", "presence")
DECODING = ("confidence", "frontier")
FRONTIER = 4  # masked tokens of a sample that are written next: as many as one step of our decoders writes


@dataclass(frozen=True)
class Weighting:
    """One way to weigh calibration tokens; the defaults are those of the authors' release.

    Attributes:
        kind: `"sinks_down"` is omega = 1 - sink score; `"sinks_up"` is 1 + boost x score; `"random"`, `"first"`, `"mask"` and
            `"norm"` take out as many other tokens as there are sinks; `"variance"` and `"presence"` take out tokens whose mass is
            unstable over noise levels (see `instability_score`); `"confidence"` and `"frontier"` count masked tokens more, the
            surer the model is of them (see `decoding_weight`).
        level: where masses are compared: summed over layers and heads, in each layer, or in each head.
        rule: threshold of a sink: mean + margin standard deviations, or the mean of the other keys + margin.
        margin: standard deviations, or the epsilon of the leave-one-out rule in the unit of the mass.
        alpha: steepness of the score; None is a step.
        unit: masses summed over layers and heads, or averaged so that their mean over keys is 1.
        boost: extra weight of a full sink, for `"sinks_up"`.
        averaged: measure on noised text and average over the noise levels of each window, as the release does for SparseGPT.
        levels: noise levels that weights over several of them are measured on when the calibration itself reads clean text.
    """

    kind: Kind = "sinks_down"
    level: Level = "aggregate"
    rule: Rule = "mean_std"
    margin: float = sinks.RELEASE_STD
    alpha: float | None = sinks.RELEASE_ALPHA
    unit: Unit = "sum"
    boost: float = 1.0
    averaged: bool = False
    levels: int = 10

    def __post_init__(self) -> None:
        require(
            self.kind in get_args(Kind),
            "a weighting must be a known kind",
            repr(self.kind),
            f"choose {', '.join(get_args(Kind))}",
        )
        require(self.boost > 0, "boost must be positive", f"{self.boost:g}", "1 doubles the inputs of a sink")
        require(
            self.level == "aggregate" or self.kind in ("sinks_down", "sinks_up"),
            "weights by layer or head must be those of sinks",
            self.kind,
            "use level aggregate",
        )

        require(
            not (self.averaged and self.kind in INSTABILITY),
            "averaged weights must be those of sinks or controls",
            self.kind,
            "instability is measured over levels already",
        )

    @property
    def over_levels(self) -> bool:
        """Tell whether one weight a token comes from several noise levels of its window."""
        return self.averaged or self.kind in INSTABILITY


def sink_score(mass: Float[Tensor, "layer sample head position"], weighting: Weighting) -> Tensor:
    """Return sink scores in [0, 1].

    Args:
        mass: attention received, 1 on average over keys.
        weighting: level, rule and score.

    Returns:
        Shape `[sample, position]`, `[layer, sample, position]` or `[layer, sample, head, position]`, by level.

    Source: paper, Eqs. 9 to 11; threshold and score of the authors' release.
    """
    return score_of(reduced(mass, level=weighting.level, unit=weighting.unit), weighting)


def reduced(mass: Float[Tensor, "layer sample head position"], *, level: Level, unit: Unit) -> Tensor:
    """Sum or average masses over what a level does not tell apart."""
    over = {"aggregate": (0, 2), "layer": (2,), "head": ()}[level]
    return mass if not over else mass.sum(over) if unit == "sum" else mass.mean(over)


def score_of(values: Tensor, weighting: Weighting) -> Tensor:
    """Return the sink scores of masses that are `reduced` already."""
    if weighting.rule == "mean_std":
        threshold = sinks.mean_std_threshold(values, num_std=weighting.margin)
    else:
        threshold = sinks.leave_one_out_threshold(values, epsilon=weighting.margin)
    if weighting.alpha is None:
        return (values > threshold).to(values.dtype)
    return sinks.soft_score(values, threshold, alpha=weighting.alpha)


def sinks_down(score: Float[Tensor, "*batch position"]) -> Float[Tensor, "*batch position"]:
    """Return omega = 1 - score: what sinks contribute is taken out (paper, Eq. 12)."""
    return sinks.token_weight(score)


def sinks_up(score: Float[Tensor, "*batch position"], *, boost: float = 1.0) -> Float[Tensor, "*batch position"]:
    """Return omega = 1 + boost x score: what sinks contribute counts more, so that the weights that read them stay.

    Args:
        score: sink score in [0, 1].
        boost: extra weight of a full sink.

    Source: stands for the habit of autoregressive work to preserve sinks (StreamingLLM, arXiv 2309.17453, keeps them in the
        cache); the paper names the habit but no formula, so this one is ours.
    """
    return 1.0 + boost * score


def average_over_levels(weight: Float[Tensor, "window level position"]) -> Float[Tensor, "window position"]:
    """Average token weights over the noise levels of each window.

    Source: the release's SparseGPT variant measures sinks on noised text and weights the clean text with their average.
    """
    return weight.mean(1)


def instability_score(
    mass: Float[Tensor, "window level position"], *, kind: Literal["variance", "presence"], margin: float = sinks.RELEASE_STD
) -> Float[Tensor, "window position"]:
    """Score tokens by how much their mass changes over noise levels, which is what the paper says and its release does not do.

    Args:
        mass: mean over layers and heads, 1 on average over positions.
        kind: `"variance"`: 1 where the variance of the mass over levels exceeds its mean over positions by `margin` standard
            deviations. `"presence"`: 4 f (1 - f), f the share of levels at which the token is a sink: 1 for a sink half of the
            time, 0 for one that always or never is.
        margin: standard deviations, of the variance or of the sink rule.

    Raises:
        InputError: fewer than two levels, over which nothing can vary.

    Source: temporal variance and transience, paper section 3.1; the formulas are ours.
    """
    if mass.shape[1] < 2:
        raise InputError(f"instability must be measured over at least 2 noise levels, got {mass.shape[1]}: raise levels")
    if kind == "presence":
        share = sinks.sinks_mean_std(mass, num_std=margin).to(mass.dtype).mean(1)
        return 4.0 * share * (1.0 - share)
    over_time = mass.var(1, correction=0)
    return (over_time > sinks.mean_std_threshold(over_time, num_std=margin)).to(mass.dtype)


def decoding_weight(
    confidence: Float[Tensor, "sample position"], masked: Bool[Tensor, "sample position"], *, kind: str
) -> Float[Tensor, "sample position"]:
    """Return the square root of how much tokens count in a Hessian: masked ones more, the more so the sooner they are written.

    Args:
        confidence: the model's highest probability at masked positions, in [0, 1].
        masked: which positions are masked.
        kind: `"confidence"`: 1/2 where a token stands, 1/2 + confidence where it is masked. `"frontier"`: the confidence of
            masked tokens, plus 1 for the `FRONTIER` surest of each sample, which would be written next; 0 where a token stands.

    Returns:
        Weights that multiply inputs, up to a common factor, which no method here sees.

    Source: confidence-guided quantization of DLLMQuant (arXiv 2508.14090), whose paper leaves the formula out: as one of two
        independent re-implementations has it. The frontier is FAIR-Calib's (arXiv 2606.06547) position prior after the paper's
        description; it counts hits along a decoding, here of one state.

    >>> decoding_weight(torch.tensor([[0.0, 0.75]]), torch.tensor([[False, True]]), kind="frontier")
    tensor([[0.0000, 1.3229]])
    """
    known = torch.where(masked, confidence, 0.0)
    if kind == "confidence":
        return (0.5 + known).sqrt()
    rank = known.masked_fill(~masked, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (known + (masked & (rank < FRONTIER)).to(known.dtype)).sqrt()


def control_down(
    score: Float[Tensor, "sample position"],
    control: str,
    *,
    input_ids: Int[Tensor, "sample position"],
    mask_token_id: int | None = None,
    activation_norm: Float[Tensor, "sample position"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "sample position"]:
    """Take out as many tokens of each sample as it has sinks, but others.

    Args:
        score: sink score; a position counts as a sink above one half.
        control: of those that are no sinks, `"random"` positions, the `"first"` ones, `"mask"` tokens at random, or those of the
            largest activation `"norm"`.
        input_ids: for `"mask"`.
        mask_token_id: for `"mask"`.
        activation_norm: for `"norm"`.
        generator: CPU generator, for `"random"` and `"mask"`.

    Returns:
        Weights of 0 and 1; sinks themselves keep 1. Where a sample has fewer such tokens than sinks, all of them are taken out.

    Raises:
        InputError: what the control needs is missing.
    """
    order = _order(
        score, control, input_ids=input_ids, mask_token_id=mask_token_id, activation_norm=activation_norm, generator=generator
    )
    is_sink: Bool[Tensor, "sample position"] = score > 0.5
    order = order.masked_fill(is_sink, float("-inf"))
    rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen: Bool[Tensor, "sample position"] = rank < is_sink.sum(1, keepdim=True)
    return 1.0 - (chosen & order.isfinite()).to(score.dtype)


def _order(
    score: Tensor,
    control: str,
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

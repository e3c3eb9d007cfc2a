"""Which predictions of a step a block sampler commits, and how steps spread over blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib.checkpoints.families import sampler_of
from lib.core.errors import require
from lib.diffusion import commits
from lib.models.language_model import LanguageModel

# Which tokens a step commits: its quota of the most confident; all above the threshold if they are the quota at least, else the
# quota's best; all above, or all at or above it, and always the best.
Rule = Literal["quota", "threshold or quota", "above or best", "at least or best"]
Order = Literal["low_confidence", "random", "sequential"]


@dataclass(frozen=True)
class BlockRule:
    """How the tokens of a block are committed.

    Attributes:
        rule: which tokens a step commits.
        steps: steps of a whole block, which set the quota; None is one token a step.
        threshold: of the probability of a token.
        order: what a quota takes first: the most probable, random places, or the left ones.
        edit_threshold: put another token in the place of one that is written when its probability is above it; None is never.
        max_post_steps: steps that may edit a block after its last mask.
        sub_block_length: parts of a block that are written from left to right; None is the whole block.
        seeded: take the first token of a new block from the output before the block.
        cut_last: end the last block with the text; else it is written as a whole, and cut afterwards.

    Raises:
        InputError: a value out of range, or a threshold without its rule.

    Source: the samplers of SDAR and LLaDA 2 ("threshold or quota"), Fast-dLLM v2 ("above or best"), Stable-DiffCoder and
        Nemotron-Labs-Diffusion ("at least or best"), LLaDA 2.1 (edits).
    """

    rule: Rule = "quota"
    steps: int | None = None
    threshold: float | None = None
    order: Order = "low_confidence"
    edit_threshold: float | None = None
    max_post_steps: int = 16
    sub_block_length: int | None = None
    seeded: bool = False
    cut_last: bool = False

    def __post_init__(self) -> None:
        require(self.rule in get_args(Rule), f"rule must be one of {', '.join(get_args(Rule))}", repr(self.rule), "choose one")
        require(
            self.order in get_args(Order), f"order must be one of {', '.join(get_args(Order))}", repr(self.order), "choose one"
        )
        got = f"{self.threshold} with {self.rule!r}"
        has_threshold = self.threshold is not None
        require(has_threshold == (self.rule != "quota"), "a threshold must go with its rule", got, "set both or none")
        for name in ("threshold", "edit_threshold"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"{name} must be a probability", str(value), "choose one in [0, 1]")
        for name in ("steps", "sub_block_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1", str(value), "raise it or leave it out")
        require(self.max_post_steps >= 0, "max_post_steps must not be negative", str(self.max_post_steps), "use 0 for none")


def rule_of(model: LanguageModel) -> BlockRule:
    """Return how a model's own family commits tokens, greedily; one token a step when that is not known."""
    own = sampler_of(model.family)
    shared = {name: getattr(own, name) for name in ("steps", "threshold", "edit_threshold", "max_post_steps", "sub_block_length")}
    rule = cast(Rule, own.rule if own.rule in get_args(Rule) else "quota")
    return BlockRule(rule, **shared, seeded=own.seeded or model.attention == "context-causal", cut_last=own.cut_last)


def in_steps(model: LanguageModel, order: Order = "low_confidence") -> BlockRule:
    """Return the rule that writes a text in a given number of steps."""
    return BlockRule(order=order, seeded=model.attention == "context-causal", cut_last=True)


def block_ranges(model: LanguageModel, *, start: int, end: int, cut_last: bool) -> list[range]:
    """Return the blocks that hold the positions from `start` (the prompt's end) to `end`."""
    length = cast(int, model.block_length)
    origin = start if model.block_origin == "prompt" else 0
    first = origin + (start - origin) // length * length
    return [range(begin, min(begin + length, end) if cut_last else begin + length) for begin in range(first, end, length)]


def spread_steps(masks: Sequence[int], steps: int, *, least: Sequence[int]) -> list[int]:
    """Split steps over blocks in proportion to their masks, each block getting its least.

    >>> spread_steps([2, 4, 4], 5, least=[1, 1, 1]), spread_steps([1, 9], 2, least=[1, 1])
    ([1, 2, 2], [1, 1])
    """
    found: list[int] = []
    for index, count in enumerate(masks):
        left, later = steps - sum(found), sum(least[index + 1 :])
        share = round(count * left / sum(masks[index:]))
        found.append(left if index + 1 == len(masks) else max(least[index], min(share, left - later)))
    return found


def committed_places(
    confidence: Float[Tensor, "batch position"], rule: BlockRule, *, quota: int, generator: torch.Generator | None = None
) -> Bool[Tensor, "batch position"]:
    """Mark the places that a step commits.

    Args:
        confidence: probability of the predicted token; minus infinity where nothing is to be committed.
        rule: which.
        quota: tokens of this step; fewer where fewer are left.
        generator: for a random order.

    >>> probability = torch.tensor([[0.9, 0.5, 0.8, 0.7]])
    >>> committed_places(probability, BlockRule("threshold or quota", threshold=0.8), quota=2).int().tolist()
    [[1, 0, 1, 0]]
    >>> committed_places(probability, BlockRule("at least or best", threshold=0.8), quota=2).int().tolist()
    [[1, 0, 1, 0]]
    >>> committed_places(probability, BlockRule("above or best", threshold=0.8), quota=2).int().tolist()
    [[1, 0, 0, 0]]
    """
    possible, priority = confidence.isfinite(), confidence
    if rule.order == "random":
        priority = torch.rand(confidence.shape, generator=generator, dtype=torch.float64).to(confidence.device)
    elif rule.order == "sequential":
        priority = -torch.arange(confidence.shape[1], device=confidence.device).expand(confidence.shape).double()
    priority = priority.masked_fill(~possible, float("-inf"))
    by_quota, by_best = rule.rule in ("quota", "threshold or quota"), torch.ones_like(possible.sum(1))
    least = commits.most_confident(priority, possible.sum(1).minimum(by_best * quota if by_quota else by_best))
    if rule.threshold is None:
        return least
    above = possible & (confidence >= rule.threshold if rule.rule == "at least or best" else confidence > rule.threshold)
    return torch.where(above.sum(1, keepdim=True) >= quota, above, least) if by_quota else above | least

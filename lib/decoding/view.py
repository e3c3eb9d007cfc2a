"""What the four choices of a decoder see of a block while it is written, and how it stands after each pass."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.decoding.caches import Hidden
from lib.diffusion import commits


@dataclass(frozen=True)
class Guess:
    """What a pass predicts.

    Attributes:
        where: places that it predicts.
        logits: of their tokens, in row-major order.
        tokens: best token of each place; elsewhere the text.
        confidence: float64 probability of that token, minus infinity elsewhere.
    """

    where: Bool[Tensor, "batch place"]
    logits: Float[Tensor, "selected vocab"] = field(repr=False)
    tokens: Int[Tensor, "batch place"]
    confidence: Float[Tensor, "batch place"]

    def spread(self, values: Float[Tensor, "selected"], empty: float) -> Float[Tensor, "batch place"]:
        """Put one number a prediction at its place, `empty` elsewhere."""
        return torch.full(self.where.shape, empty, dtype=values.dtype, device=values.device).masked_scatter(self.where, values)

    def log_probabilities(self) -> Float[Tensor, "selected vocab"]:
        """Return float64 log-probabilities."""
        return self.logits.double().log_softmax(-1)

    def probability_of(self, ids: Int[Tensor, "batch place"]) -> Float[Tensor, "batch place"]:
        """Return the probability of given tokens, NaN where nothing is predicted."""
        return self.spread(commits.probability_of(self.logits, ids[self.where]), float("nan"))


def guess(ids: Int[Tensor, "batch place"], where: Bool[Tensor, "batch place"], logits: Float[Tensor, "selected vocab"]) -> Guess:
    """Return the guess that logits at the places `where` amount to."""
    chosen = commits.choose_tokens(logits, temperature=0.0, generator=None)
    confidence = torch.full(ids.shape, float("-inf"), dtype=torch.float64, device=ids.device)
    confidence[where] = commits.probability_of(logits, chosen)
    return Guess(where, logits, ids.masked_scatter(where, chosen), confidence)


@dataclass
class View:
    """The text of a block's passes. A place is one of what the network is given; places up to the block's end are positions.

    Attributes:
        ids: the text, masks included.
        places: position of each place.
        block: places of the block.
        start: where the prompt ends.
        mask_id: the mask token.
        quota: tokens that each step commits where their number is fixed.
        step: passes before in this block.
        passes: passes before in the whole text.
        after: passes since the block's last mask, all of which changed something.
        guess: of the last pass.
        previous: of the pass before.
        hidden: what the last pass left.
        committed: places that the last step wrote.
        memory: what rules keep from pass to pass in a block.
    """

    ids: Int[Tensor, "batch place"]
    places: Int[Tensor, "place"]
    block: range
    start: int
    mask_id: int
    quota: Int[Tensor, "batch step"]
    step: int = 0
    passes: int = 0
    after: int = 0
    guess: Guess | None = None
    previous: Guess | None = None
    hidden: Hidden | None = None
    committed: Bool[Tensor, "batch place"] | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Int[Tensor, "place"]:
        """Return 0, 1, ..."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)

    @property
    def in_block(self) -> Bool[Tensor, "place"]:
        """Mark the block."""
        return (self.place >= self.block.start) & (self.place < self.block.stop)

    @property
    def is_masked(self) -> Bool[Tensor, "batch place"]:
        """Mark what is not written, in the block and behind it."""
        return (self.ids == self.mask_id) & (self.place >= self.start)

    @property
    def is_open(self) -> Bool[Tensor, "batch place"]:
        """Mark what is not written in the block."""
        return (self.ids == self.mask_id) & self.in_block

    @property
    def written(self) -> Bool[Tensor, "batch place"]:
        """Mark the block's tokens that are written and not the prompt's."""
        return (self.ids != self.mask_id) & self.in_block & (self.place >= self.start)

    @property
    def confidence(self) -> Float[Tensor, "batch place"]:
        """Return the last pass' confidence at the open places, minus infinity elsewhere."""
        assert self.guess is not None
        return self.guess.confidence.masked_fill(~self.is_open, float("-inf"))

    @property
    def asked(self) -> Int[Tensor, "batch"]:
        """Return how many tokens the schedule asks of this step; behind its end as many as of its last one, at least one."""
        last = self.quota.shape[1] - 1
        return self.quota[:, self.step] if self.step <= last else self.quota[:, last].clamp(min=1)

    @property
    def masked_share(self) -> Float[Tensor, "batch 1"]:
        """Return which share of the block is not written."""
        return self.is_open.sum(1, keepdim=True).double() / len(self.block)

"""The first choice: which predictions of a pass are committed. Each rule takes at least the best one of a row."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.decoding.view import View
from lib.diffusion import commits
from lib.models.language_model import LanguageModel


@dataclass(frozen=True)
class Commit:
    """A rule. `watches` tells that it looks at attention, so that rows are decoded one by one."""

    watches = False

    @property
    def steps(self) -> int | None:
        """Return how many steps a block takes where that is fixed."""
        return None

    def opened(self, model: LanguageModel, view: View) -> AbstractContextManager[object]:
        """Open what is needed while a block is written."""
        return nullcontext()

    def adjusted(self, view: View, logits: Float[Tensor, "selected vocab"], where: Bool[Tensor, "batch place"]) -> Tensor:
        """Return the logits that are read, of the network's own."""
        return logits

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Mark the open places whose predictions are committed."""
        raise NotImplementedError


def probability(name: str, value: float) -> None:
    """Refuse what is no probability.

    Raises:
        InputError: see above.
    """
    require(0 <= value <= 1, f"{name} must be a probability", str(value), "choose one in [0, 1]")


def best(confidence: Float[Tensor, "batch place"]) -> Bool[Tensor, "batch place"]:
    """Mark the most confident place of each row, none where all are minus infinity."""
    marked = torch.zeros_like(confidence, dtype=torch.bool).scatter(1, confidence.argmax(1, keepdim=True), True)
    return marked & confidence.isfinite()


def confident_positions(
    confidence: Float[Tensor, "batch place"], *, threshold: float | Float[Tensor, "batch 1"]
) -> Bool[Tensor, "batch place"]:
    """Mark the places above the threshold, and the most confident one of each row in any case.

    Args:
        confidence: probability of the predicted token; minus infinity where there is none.
        threshold: probability, one for all or one a row.

    Returns:
        Nothing marked in a row without predictions.

    >>> confident_positions(torch.tensor([[0.1, 0.9, 0.8], [0.1, 0.3, 0.2]]), threshold=0.5).tolist()
    [[False, True, True], [False, True, False]]
    """
    return (best(confidence) | (confidence > threshold)) & confidence.isfinite()


def largest_prefix(order: Float[Tensor, "batch place"], fits: Bool[Tensor, "batch rank"]) -> Bool[Tensor, "batch place"]:
    """Mark the places of the largest rank that fits and of all before it, and the first one in any case.

    Args:
        order: what ranks the places, largest first; minus infinity for those that cannot be marked.
        fits: whether the places up to each rank may be taken together.
    """
    ranks = torch.arange(1, order.shape[1] + 1, device=order.device)
    count = torch.where(fits, ranks, 0).amax(1).clamp(min=1)
    return commits.most_confident(order, count.minimum(order.isfinite().sum(1)))


@dataclass(frozen=True)
class Quota(Commit):
    """The most confident predictions, as many as a linear schedule over the block says.

    Attributes:
        per_block: steps of a block; None is one token a step.

    Source: LLaDA's sampler.
    """

    per_block: int | None = None

    def __post_init__(self) -> None:
        least = self.per_block is None or self.per_block >= 1
        require(least, "steps_per_block must be at least 1", str(self.per_block), "raise it or leave it out")

    @property
    def steps(self) -> int | None:
        """Return `per_block`."""
        return self.per_block

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Take this step's share."""
        possible = view.confidence.isfinite().sum(1)
        return commits.most_confident(view.confidence, view.asked.minimum(possible))


@dataclass(frozen=True)
class Threshold(Commit):
    """Every prediction above a probability. Source: Fast-dLLM (arXiv 2505.22618)."""

    threshold: float = 0.9

    def __post_init__(self) -> None:
        probability("threshold", self.threshold)

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Compare with the threshold."""
        return confident_positions(view.confidence, threshold=self.threshold)


@dataclass(frozen=True)
class Factor(Commit):
    """The n most confident predictions with the largest n for which (n + 1) (1 - c_n) < factor.

    Source: Fast-dLLM (arXiv 2505.22618), its theorem on parallel decoding; code at NVlabs/Fast-dLLM.
    """

    factor: float = 1.0

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Rank by confidence."""
        ranked = view.confidence.sort(dim=1, descending=True).values
        ranks = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        return largest_prefix(view.confidence, (ranks + 1) * (1 - ranked) < self.factor)


@dataclass(frozen=True)
class AdaptiveThreshold(Commit):
    """A threshold that falls with the masked share m of the block: threshold * (1 - fall * (1 - m)).

    Source: Streaming-dLLM (arXiv 2601.17917), generate.py at de3b628.
    """

    threshold: float = 0.9
    fall: float = 0.3

    def __post_init__(self) -> None:
        probability("threshold", self.threshold)
        probability("fall", self.fall)

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Compare with this step's threshold."""
        return confident_positions(view.confidence, threshold=self.threshold * (1 - self.fall * (1 - view.masked_share)))


@dataclass(frozen=True)
class EntropyBound(Commit):
    """The largest prefix S, by confidence, with sum of entropies over S minus the largest of them at most the bound (nats).

    Source: EB-sampler (arXiv 2505.24857), after the paper's description.
    """

    bound: float = 0.1

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Sum entropies along the ranking."""
        assert view.guess is not None
        logs = view.guess.log_probabilities()
        entropy = view.guess.spread(-(logs.exp() * logs).sum(1), float("inf"))
        ranked = entropy.gather(1, view.confidence.sort(dim=1, descending=True, stable=True).indices)
        excess = ranked.cumsum(1) - ranked.cummax(1).values
        return largest_prefix(view.confidence, excess <= self.bound)


@dataclass(frozen=True)
class Klass(Commit):
    """Confident predictions that have stood still: KL(p_t || p_(t-1)) below a bound in the last `steps_alike` passes.

    Source: KLASS (arXiv 2511.05664), after the paper's description.
    """

    threshold: float = 0.9
    divergence: float = 0.01
    steps_alike: int = 2

    def __post_init__(self) -> None:
        probability("threshold", self.threshold)

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Count the passes that a place has been still for."""
        assert view.guess is not None
        still: Tensor = view.memory.get("still", torch.zeros_like(view.ids))
        alike = torch.zeros_like(view.guess.where)
        if view.previous is not None:
            both = view.guess.where & view.previous.where
            now, before = (each.log_probabilities()[both[each.where]] for each in (view.guess, view.previous))
            alike[both] = (now.exp() * (now - before)).sum(1) < self.divergence
        view.memory["still"] = still = torch.where(alike, still + 1, 0)
        confidence = view.confidence
        taken = (confidence > self.threshold) & (still >= self.steps_alike)
        return torch.where(taken.any(1, keepdim=True), taken, best(confidence))


@dataclass(frozen=True)
class Hierarchy(Commit):
    """The best prediction of every unbroken run of masks if it is above `low`, all above `threshold`, and the best of all.

    Source: dInfer (arXiv 2510.08666), parallel_strategy.py at fce4e32: masks side by side depend on each other most.
    """

    threshold: float = 0.9
    low: float = 0.4

    def __post_init__(self) -> None:
        probability("threshold", self.threshold)
        probability("low", self.low)

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Number the runs of open places, and take the best of each."""
        is_open, confidence = view.is_open, view.confidence
        begins = is_open & ~F.pad(is_open, (1, 0))[:, :-1]
        run = torch.where(is_open, begins.cumsum(1), 0)
        most = torch.full_like(confidence, float("-inf")).scatter_reduce(1, run, confidence, "amax")
        leads = is_open & (confidence == most.gather(1, run)) & (confidence > self.low)
        return confident_positions(confidence, threshold=self.threshold) | (leads & first_of(leads, run))


def first_of(marked: Bool[Tensor, "batch place"], group: Int[Tensor, "batch place"]) -> Bool[Tensor, "batch place"]:
    """Mark the first marked place of every group.

    >>> first_of(torch.tensor([[True, True, False, True]]), torch.tensor([[1, 1, 1, 2]])).int().tolist()
    [[1, 0, 0, 1]]
    """
    place = torch.arange(marked.shape[1], device=marked.device).expand(marked.shape)
    far = torch.full_like(place, marked.shape[1])
    least = far.scatter_reduce(1, group, torch.where(marked, place, marked.shape[1]), "amin")
    return marked & (place == least.gather(1, group))


@dataclass(frozen=True)
class Credit(Threshold):
    """A threshold on logits to which credit for earlier guesses of the same token is added.

    C <- decay C for every token of a place, C[best] += confidence ^ power, logits += strength log(1 + C).

    Source: dInfer (arXiv 2510.08666), parallel_strategy.py at fce4e32.
    """

    strength: float = 0.7
    decay: float = 0.8
    power: float = 0.2

    def adjusted(self, view: View, logits: Float[Tensor, "selected vocab"], where: Bool[Tensor, "batch place"]) -> Tensor:
        """Add the credit of this and earlier passes."""
        block = slice(view.block.start, view.block.stop)
        shape = (len(view.ids), len(view.block), logits.shape[1])
        credit: Tensor = view.memory.get("credit", torch.zeros(shape, dtype=torch.float64, device=logits.device))
        inside, top = where[:, block], logits.argmax(1, keepdim=True)
        own = credit[inside] * self.decay
        own = own.scatter_add(1, top, commits.probability_of(logits, top[:, 0])[:, None] ** self.power)
        view.memory["credit"] = credit.masked_scatter(inside[..., None], own)
        return logits + (self.strength * torch.log1p(own)).to(logits.dtype)


@dataclass(frozen=True)
class CertaintyPrior(Commit):
    """The schedule's number of tokens, by confidence times how much nearby text is known.

    Source: d2Cache (arXiv 2509.23094), common.py at 72feb60: density is the share of written text under a Gaussian of distance.
    """

    width: float = 10.0
    per_block: int | None = None

    @property
    def steps(self) -> int | None:
        """Return `per_block`."""
        return self.per_block

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Take this step's share by score."""
        # Far from all written text the density underflows to 0, and 0 times minus infinity is no number.
        score = view.confidence.clamp(min=0) * known_density(view, width=self.width)
        score = score.masked_fill(~view.confidence.isfinite(), float("-inf"))
        return commits.most_confident(score, view.asked.minimum(score.isfinite().sum(1)))


def known_density(view: View, *, width: float) -> Float[Tensor, "batch place"]:
    """Return, for every place, the share of written text under a Gaussian of distance, in (0, 1].

    Args:
        view: the text.
        width: standard deviation of the Gaussian, in tokens.
    """
    distance = (view.places[:, None] - view.places[None]).double() / width
    near = torch.exp(-0.5 * distance.square())
    return (~view.is_masked).double() @ near / near.sum(0)


@dataclass(frozen=True)
class LocalLeap(Commit):
    """Every prediction above `threshold`, an anchor, and within `radius` of one every prediction above `low`.

    Source: LocalLeap (arXiv 2510.07081), after the paper's description.
    """

    threshold: float = 0.9
    low: float = 0.7
    radius: int = 4

    def __post_init__(self) -> None:
        probability("threshold", self.threshold)
        probability("low", self.low)

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Widen the anchors."""
        anchors = (view.confidence > self.threshold).double()[:, None]
        near = F.max_pool1d(anchors, 2 * self.radius + 1, stride=1, padding=self.radius)[:, 0] > 0
        return confident_positions(view.confidence, threshold=self.threshold) | (near & (view.confidence > self.low))

"""The control: what a rule that ranks places by attention does when sinks are forced in or out, or attention is not asked at all.

A rule says how many places it takes; the control only changes which. Random numbers and confidence stand in the place of
attention before the rule pools it over neighbours or spans, so that what is taken is as scattered as the rule's own choice.
What follows from the choice, such as filled gaps or the passes that the text then needs, may still differ.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attention import sinks
from lib.core.errors import require
from lib.core.runtime import generator
from lib.decoding.by_attention.watch import attention_of, watched
from lib.decoding.caches import read_out, readable
from lib.decoding.view import View
from lib.models.language_model import LanguageModel

Setting = Literal["as they fall", "sinks in", "sinks out", "random", "confidence"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
Pooling = Callable[[Tensor], Tensor]


def as_it_is(scores: Tensor) -> Tensor:
    """Return scores that are not pooled."""
    return scores


@dataclass(frozen=True)
class Choice:
    """One choice of places in a pass.

    Attributes:
        taken: places, in rising order.
        candidates: places that might have been taken.
        sinks: of the candidates, where the setting looks for sinks, else 0.
    """

    taken: tuple[int, ...]
    candidates: int
    sinks: int


@dataclass(frozen=True)
class Control:
    """How a ranking by attention is changed.

    Attributes:
        setting: `"as they fall"`: by the rule's own score; `"sinks in"` and `"sinks out"`: sinks first, or last; `"random"`: at
            random; `"confidence"`: by how probable the last pass found its best token at each place.
        seed: of random numbers, which depend on it, on the block and on the pass, not on the row.
        tally: takes every choice; None notes nothing, so that nothing is timed but the system.
    """

    setting: Setting = "as they fall"
    seed: int = 0
    tally: list[Choice] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = ", ".join(SETTINGS)
        require(self.setting in SETTINGS, f"a control must be one of {known}", repr(self.setting), "choose one")

    def opened(self, model: LanguageModel, view: View) -> AbstractContextManager[None]:
        """Open the instruments that the setting needs: only sinks that are forced in or out must be known."""
        return observed(model, view) if "sinks" in self.setting else nullcontext()

    def take(
        self, scores: Float[Tensor, "one place"], view: View, count: int, *, layer: int = 0, pooled: Pooling = as_it_is
    ) -> Int[Tensor, "taken"]:
        """Return the best places, the best one first, and note them.

        Args:
            scores, pooled: the rule's own, as `ranked` takes them.
            view: of the block.
            count: places to take, at most those that may be chosen.
            layer: for which they are.
        """
        taken = self.ranked(scores, view, layer=layer, pooled=pooled)[0].argsort(descending=True, stable=True)[:count]
        self.note(view, taken, among=scores[0] > float("-inf"))
        return taken

    def note(self, view: View, taken: Int[Tensor, "taken"], *, among: Bool[Tensor, "place"]) -> None:
        """Put a choice into the tally.

        Args:
            view: of the block.
            taken: places.
            among: the candidates.
        """
        if self.tally is not None:
            sinks = int((sinks_of(view)[0, : len(among)] & among).sum()) if "sinks" in self.setting else 0
            self.tally.append(Choice(tuple(sorted(taken.tolist())), int(among.sum()), sinks))

    def ranked(
        self, scores: Float[Tensor, "row place"], view: View, *, layer: int = 0, pooled: Pooling = as_it_is
    ) -> Float[Tensor, "row place"]:
        """Return the scores that are used in the place of a rule's own, larger first.

        Args:
            scores: the rule's own; minus infinity for what may not be chosen, which stays so.
            view: of the block, with what `observed` noted.
            layer: for which they are, where layers choose apart.
            pooled: what the rule does to its scores before it ranks, done to what stands in their place too.
        """
        possible = scores > float("-inf")
        if self.setting == "random":
            stream = generator(self.seed, "control", view.block.start, view.step, layer)
            scores = torch.rand(scores.shape[1], generator=stream).to(scores).expand(scores.shape)
        elif self.setting == "confidence":
            scores = seen_confidence(view)[:, : scores.shape[1]].to(scores.dtype)
        scores = pooled(scores)
        if self.setting in ("sinks in", "sinks out"):
            is_sink = sinks_of(view)[:, : scores.shape[1]]
            # Sinks among themselves, and the others, keep the order that they have, equals too: pooled scores have many.
            behind = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1).to(scores.dtype)
            shift = scores.shape[1] if self.setting == "sinks in" else -scores.shape[1]
            scores = shift * is_sink - behind
        return scores.masked_fill(~possible, float("-inf"))


def sinks_of(view: View) -> Bool[Tensor, "row place"]:
    """Mark the sinks of the last full pass: places whose mass lies two standard deviations above the mean."""
    return sinks.sinks_mean_std(cast(Tensor, view.memory["mass"]))


def seen_confidence(view: View) -> Float[Tensor, "row place"]:
    """Return the probability of the best token of each place in the last pass that computed it."""
    return cast(Tensor, view.memory["seen confidence"])


@contextmanager
def observed(model: LanguageModel, view: View) -> Iterator[None]:
    """Note the mass of every place, mean over heads and layers and 1 over places, in every pass that computes all places."""
    parts: list[Tensor] = []

    def watcher(layer: int, query: Tensor, key: Tensor) -> None:
        """Collect masses by layer, those of the last pass over all places."""
        if layer == 0:
            parts.clear()
        if query.shape[2] == view.ids.shape[1]:
            parts.append(attention_of(query, key).sum(1))
        if len(parts) == model.network.config.num_hidden_layers:  # a pass that is widened on its way shows the deep layers alone
            view.memory["mass"] = sinks.mean_one(torch.stack(parts).mean(0))

    with watched(model, watcher):
        yield


def note_confidence(model: LanguageModel, view: View) -> None:
    """Note how probable the last pass found its best token, at every place that it computed.

    Args:
        model: a diffusion model.
        view: after a pass.
    """
    assert view.hidden is not None
    states = view.hidden.states
    found = read_out(model, states.flatten(0, 1)).double().softmax(-1).amax(-1).view(states.shape[:2])
    kept = view.memory.get("seen confidence", torch.zeros(view.ids.shape, dtype=torch.float64, device=found.device))
    where = readable(model, view.hidden, view.ids.shape[1])
    index = view.hidden.index(view.ids.shape[1])[:, (view.place - model.logit_shift).clamp(min=0)]
    view.memory["seen confidence"] = torch.where(where, found.gather(1, index.clamp(min=0)), kept)


def untested(setting: str, choices: Sequence[Choice], reference: Sequence[Choice]) -> str:
    """Return why a setting tests nothing, "" where it does: it took the very places that the reference took.

    Args:
        setting: of the control.
        choices: that it made.
        reference: those of the setting that it is compared with.

    >>> untested("sinks in", [Choice((0, 3), 9, 1)], [Choice((0, 3), 9, 0)])
    'the sinks are in without force'
    >>> untested("random", [Choice((0, 1), 2, 0)], [Choice((0, 1), 2, 0)])
    'the budget covers every candidate'
    """
    if [each.taken for each in choices] != [each.taken for each in reference]:
        return ""
    if not any(each.taken for each in choices):
        return "nothing is ranked at this length"
    if all(len(each.taken) in (0, each.candidates) for each in choices):
        return "the budget covers every candidate"
    if "sinks" not in setting:
        return "it takes the same places"
    if not any(each.sinks for each in choices):
        return "no candidate is a sink"
    return f"the sinks are {setting.removeprefix('sinks ')} without force"

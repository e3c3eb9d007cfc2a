"""Commit an independent set: tokens that hardly attend to each other (DAPD)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib.core.runtime import generator
from lib.decoding.by_attention.control import Control, sinks_of
from lib.decoding.by_attention.watch import attention_of, watched
from lib.decoding.commit import Commit, best
from lib.decoding.view import View
from lib.diffusion import commits
from lib.models.language_model import LanguageModel


def independent(weights: Float[Tensor, "node node"], order: list[int], *, bound: float) -> list[int]:
    """Take nodes in an order, each that has no edge above the bound to one taken before: the first colour of a greedy colouring.

    >>> independent(torch.tensor([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), [1, 0, 2], bound=1.0)
    [1, 2]
    """
    taken: list[int] = []
    for node in order:
        if all(float(weights[node, other]) <= bound for other in taken):
            taken.append(node)
    return taken


@dataclass(frozen=True)
class Independent(Commit):
    """Of the predictions above a probability, the most confident one and all that depend on none taken before.

    Two places depend on each other when their attention, mean over heads, layers and both directions, is above a bound. In units
    of what a place would give to each of all places if it gave them the same. What looks is what a token is predicted from: under
    a logit shift of 1 the place before it.

    Attributes:
        threshold: probability.
        bound: of dependence; on the embedded model a quarter of the pairs lies below 2.
        control: `"sinks in"`: a sink depends on everybody; `"sinks out"`: on nobody, its share of attention going to the others;
            `"random"`: dependences change places; `"confidence"`: as many tokens, by confidence alone.

    Source: DAPD (arXiv 2603.12996), after its description; layers, threshold and stages are ours.
    """

    threshold: float = 0.5
    bound: float = 2.0
    control: Control = field(default_factory=Control)
    watches = True

    @contextmanager
    def opened(self, model: LanguageModel, view: View) -> Iterator[None]:
        """Sum attention over layers."""
        parts: list[Tensor] = []
        view.memory["attention"], view.memory["shift"] = parts, model.logit_shift

        def watcher(layer: int, query: Tensor, key: Tensor) -> None:
            """Collect attention by layer, that of the last pass."""
            if layer == 0:
                parts.clear()
            parts.append(attention_of(query, key)[0])

        with self.control.opened(model, view), watched(model, watcher):
            yield

    def __call__(self, view: View) -> Bool[Tensor, "one place"]:
        """Take an independent set."""
        surest = best(view.confidence)
        nodes = ((view.confidence > self.threshold) | surest)[0].nonzero()[:, 0]
        order = view.confidence[0, nodes].argsort(descending=True, stable=True).tolist()
        taken = independent(self.weights(view, nodes), order, bound=self.bound)
        chosen = torch.zeros_like(surest).index_fill(1, nodes[taken], True)
        if self.control.setting == "confidence":
            chosen = commits.most_confident(view.confidence, torch.tensor([len(taken)]))
        among = torch.zeros_like(surest).index_fill(1, nodes, True)
        self.control.note(view, chosen[0].nonzero()[:, 0], among=among[0])
        return chosen

    def weights(self, view: View, nodes: Tensor) -> Float[Tensor, "node node"]:
        """Return how much places depend on each other."""
        assert view.hidden is not None
        attention = torch.stack(cast(list[Tensor], view.memory["attention"])).mean(0)
        setting = self.control.setting
        if setting == "sinks out":
            attention = attention.masked_fill(sinks_of(view), 0.0)
            attention = attention / attention.sum(1, keepdim=True)
        looking = (nodes - view.memory["shift"]).clamp(min=0)
        among = attention[view.hidden.index(view.ids.shape[1])[0, looking]][:, nodes] * view.ids.shape[1]
        weights = (among + among.T) / 2
        if setting == "sinks in":
            is_sink = sinks_of(view)[0, nodes]
            return weights.masked_fill(is_sink[:, None] | is_sink[None], float("inf"))
        if setting == "random":
            left, right = torch.triu_indices(len(nodes), len(nodes), 1).unbind(0)
            moved = torch.randperm(len(left), generator=generator(self.control.seed, "edges", view.block.start, view.step))
            mixed = torch.zeros_like(weights).index_put((left, right), weights[left, right][moved])
            return mixed + mixed.T
        return weights

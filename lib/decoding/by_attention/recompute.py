"""Recomputation that is steered by attention: d2Cache, FOCUS, Elastic-Cache."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.decoding.by_attention.control import Control, note_confidence, seen_confidence
from lib.decoding.by_attention.watch import attention_of, scores_of, watched
from lib.decoding.caches import Hidden, KeyValueStore, new_store, run_rows, run_whole
from lib.decoding.commit import known_density
from lib.decoding.recompute import Delayed, Kept, Pass, as_rows
from lib.decoding.refresh import replaced
from lib.decoding.view import View
from lib.models.language_model import LanguageModel, network_body


@dataclass
class Rollout:
    """Attention through all layers of the last pass; rows that it does not compute stay as an identity would leave them.

    R <- norm(A + I) R from layer to layer, A the mean over heads; the mass of a place is its column's sum.
    """

    matrix: Tensor | None = None
    rows: Tensor | None = None

    def see(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Take a layer in."""
        attention = attention_of(query, key)[0]
        if layer == 0 or self.matrix is None:
            self.matrix = torch.eye(attention.shape[1], device=attention.device)
        rows = torch.arange(attention.shape[0], device=attention.device) if self.rows is None else self.rows[0]
        self.matrix[rows] = (attention @ self.matrix + self.matrix[rows]) / 2

    @property
    def mass(self) -> Float[Tensor, "one place"]:
        """Return the mass of every place."""
        return cast(Tensor, self.matrix).sum(0)[None]


def nucleus(mass: Float[Tensor, "place"], share: float) -> int:
    """Return how many of the largest masses hold a share of their sum.

    >>> nucleus(torch.tensor([1.0, 6.0, 3.0]), 0.6), nucleus(torch.tensor([1.0, 6.0, 3.0]), 0.7)
    (1, 2)
    """
    ranked = mass.double().sort(descending=True).values.cumsum(0)
    return int((ranked < share * ranked[-1] - 1e-9).sum()) + 1 if len(mass) and share > 0 else 0


def fill_gaps(chosen: Bool[Tensor, "place"], gap: int) -> Bool[Tensor, "place"]:
    """Mark also what lies between two chosen places at most `gap` apart.

    >>> fill_gaps(torch.tensor([1, 0, 0, 1, 0, 0, 0, 1]).bool(), 3).int().tolist()
    [1, 1, 1, 1, 0, 0, 0, 1]
    """
    filled, at = chosen.clone(), chosen.nonzero()[:, 0].tolist()
    for left, right in itertools.pairwise(at):
        if right - left <= gap:
            filled[left:right] = True
    return filled


@dataclass(frozen=True)
class D2Cache(Kept):
    """Masks likely to be written, what was just written, and of the rest the places that hold most of the attention roll-out.

    Attributes:
        candidates: masks, by the certainty prior, from the block's start to the end of the block that holds as many.
        share: of the roll-out's mass that the places of the rest hold.
        gap: longest distance of two chosen places whose gap is filled.
        width: of the certainty prior.
        control: which of the rest are taken; how many stays.

    Source: d2Cache (arXiv 2509.23094), src/cache/d2cache.py at 72feb60.
    """

    candidates: int = 32
    share: float = 0.1
    gap: int = 4
    width: float = 10.0
    control: Control = field(default_factory=Control)
    alone = True

    @contextmanager
    def passes(self, model: LanguageModel, view: View) -> Iterator[Pass]:
        """Open passes whose attention is rolled out."""
        store, rollout = new_store(model), Rollout()
        view.memory["store"] = store

        def run(now: View) -> Hidden:
            """Make a full pass, or one over the chosen places."""
            if self.is_fresh(now):
                rollout.rows = None
                return run_whole(model, now.ids, places=now.places, store=store)
            note_confidence(model, now)
            rollout.rows = as_rows(model, self.chosen(now, rollout.mass))
            return run_rows(model, now.ids, rollout.rows, store=store, places=now.places)

        with self.control.opened(model, view), watched(model, rollout.see):
            yield run

    def chosen(self, view: View, mass: Float[Tensor, "one place"]) -> Bool[Tensor, "one place"]:
        """Return the places of the next pass."""
        certain = self.candidates_of(view)
        if not bool((certain & view.is_open).any()):
            certain = certain | view.is_open  # else nothing of the block could be written
        certain = certain if view.committed is None else certain | view.committed
        rest = ~certain
        count = nucleus(mass[rest], self.share)
        certain[0, self.control.take(mass.masked_fill(~rest, float("-inf")), view, count)] = True
        return fill_gaps(certain[0], self.gap)[None]

    def candidates_of(self, view: View) -> Bool[Tensor, "one place"]:
        """Return the masks with the best certainty prior."""
        masks = (view.is_masked & (view.place >= view.block.start))[0].nonzero()[:, 0]
        last = int(masks[min(self.candidates, len(masks)) - 1]) - view.block.start
        end = view.block.start + (last // len(view.block) + 1) * len(view.block)
        inside = view.is_masked & (view.place >= view.block.start) & (view.place < end)
        score = (seen_confidence(view) * known_density(view, width=self.width)).masked_fill(~inside, float("-inf"))
        best = score[0].topk(min(self.candidates, int(inside.sum()))).indices
        return torch.zeros_like(inside).index_fill(1, best, True)


@dataclass
class ByLayer:
    """Passes in which every layer computes places of its own; what a layer has read of the others is kept.

    Attributes:
        store: keys and values.
        rows_of: places that a layer computes; asked before each layer, None is all.
    """

    store: KeyValueStore
    rows_of: Callable[[int], Int[Tensor, "query"] | None]
    inputs: dict[int, Tensor] = field(default_factory=dict)
    covered: Tensor | None = None
    computed: list[int] = field(default_factory=list)

    def forward(
        self, original: Callable[..., Any], hidden_states: Tensor, *, layer: int, position_embeddings: Any, **rest: Any
    ) -> Tensor:
        """Stand in for a decoder layer's `forward`."""
        if layer == 0:
            self.covered = None
            self.computed.clear()
        if self.covered is None:
            self.inputs[layer] = hidden_states.clone()
        else:
            self.inputs[layer][:, self.covered] = hidden_states
        rows = self.rows_of(layer)
        read = self.inputs[layer] if rows is None else self.inputs[layer][:, rows]
        self.covered, self.store.where = rows, None if rows is None else rows[None]
        rotations = position_embeddings if rows is None else tuple(part[:, rows] for part in position_embeddings)
        self.computed.append(read.shape[1])
        # Every query sees all kept keys; a mask and position ids made for all queries would not fit the chosen ones.
        rest.update(attention_mask=None, position_ids=None)
        return cast(Tensor, original(read, position_embeddings=rotations, **rest))

    def run(self, model: LanguageModel, view: View) -> Hidden:
        """Make a pass."""
        options = {"position_ids": view.places[None], "past_key_values": self.store, "use_cache": True}
        states = network_body(model)(input_ids=view.ids, **options).last_hidden_state
        mean = round(sum(self.computed) / len(self.computed))
        return Hidden(states, None if self.covered is None else self.covered[None], mean)

    @contextmanager
    def installed(self, model: LanguageModel) -> Iterator[None]:
        """Let it stand in for every layer."""
        layers = enumerate(cast(Any, model.network.get_decoder()).layers)
        with replaced({layer: partial(self.forward, layer.forward, layer=index) for index, layer in layers}):
            yield


def incoming(
    query: Float[Tensor, "one head query dim"],
    key: Float[Tensor, "one kv_head key dim"],
    among: Int[Tensor, "masked"],
    rows: Int[Tensor, "query"],
) -> Float[Tensor, "masked"]:
    """Return the attention that masks receive from each other: scores pooled over three neighbours, then softmax, then summed.

    Args:
        query: of the places `rows`.
        key: of all places.
        among: the masks.
        rows: places of the queries.
    """
    asking = (rows[None] == among[:, None]).int().argmax(1)
    scores = scores_of(query[:, :, asking], key[:, :, among])[0] * query.shape[-1] ** -0.5
    return F.max_pool1d(scores, 3, stride=1, padding=1).softmax(-1).sum((0, 1))


@dataclass(frozen=True)
class Focus(Kept):
    """From the third layer on only the masks whose incoming attention rises most from the first to the second, and few more.

    Attributes:
        factor: masks that are kept, in units of the mean number of tokens written a step.
        control: which masks are kept; how many stays.

    Source: FOCUS (arXiv 2601.23278), lmdeploy/pytorch/kernels/cuda/focus.py at 277f1d1. Known deviations: it is made there for
        attention by blocks; written tokens that are not frozen yet are always kept.
    """

    factor: float = 1.5
    control: Control = field(default_factory=Control)
    alone = True

    @contextmanager
    def passes(self, model: LanguageModel, view: View) -> Iterator[Pass]:
        """Open passes that drop masks after the second layer."""
        store, found = new_store(model), cast(dict[int, Tensor], {})
        view.memory["store"], delay = store, Delayed(right_neighbour=True)
        state: dict[str, Any] = {"rows": None, "view": view}

        def watcher(layer: int, query: Tensor, key: Tensor) -> None:
            """Measure what masks receive in the first two layers."""
            if layer < 2 and state["rows"] is not None:
                among = state["view"].is_open[0].nonzero()[:, 0]
                found[layer] = incoming(query, key, among, state["rows"])

        def rows_of(layer: int) -> Tensor | None:
            """Narrow the pass before the third layer."""
            if layer == 2 and state["rows"] is not None:
                state["rows"] = self.narrowed(model, state["view"], state["rows"], found[1] - found[0])
            return state["rows"]

        by_layer = ByLayer(store, rows_of)

        def run(now: View) -> Hidden:
            """Make a full pass, or one over masks and young tokens of the block."""
            state["view"], state["rows"] = now, None
            if not self.is_fresh(now):
                if self.control.setting == "confidence":
                    note_confidence(model, now)
                state["rows"] = as_rows(model, (now.is_open | delay.unfrozen(now)) & now.in_block)[0]
            return by_layer.run(model, now)

        with self.control.opened(model, view), watched(model, watcher), by_layer.installed(model):
            yield run

    def narrowed(self, model: LanguageModel, view: View, rows: Int[Tensor, "query"], rise: Float[Tensor, "masked"]) -> Tensor:
        """Return the rows that go on, given by how much the incoming attention of each open place rises."""
        among = view.is_open[0].nonzero()[:, 0]
        written = (len(view.block) - len(among)) / max(1, view.step)
        target = min(len(among), max(1, -int(-self.factor * max(1.0, written) // 1)))
        if len(among) <= target:
            return rows
        count = max(target, int((rise >= rise.mean() + rise.std(correction=0)).sum()))
        scores = torch.full(view.ids.shape, float("-inf"), device=rise.device).index_put((torch.zeros_like(among), among), rise)
        kept = torch.zeros_like(view.is_open)
        kept[0, self.control.take(scores, view, count)] = True
        kept[:, :-1] |= kept[:, 1:] & view.is_open[:, :-1]  # the left neighbour
        kept |= ~view.is_open
        wanted = torch.isin(rows, as_rows(model, kept & view.in_block)[0])
        return rows[wanted] if bool((kept & view.is_open).any()) else rows


@dataclass(frozen=True)
class Elastic(Kept):
    """The block, until in some layer the attention to one place has moved; from the next layer on everything.

    Attributes:
        threshold: of the cosine of that attention, over the block's queries, in two passes one after the other.
        control: which place is watched: the most attended one outside of the block, which mostly is a sink, or another.

    Source: Elastic-Cache (arXiv 2510.14973), after the paper's description.
    """

    threshold: float = 0.9
    control: Control = field(default_factory=Control)
    alone = True

    @contextmanager
    def passes(self, model: LanguageModel, view: View) -> Iterator[Pass]:
        """Open passes that widen at the layer where the sensor says so."""
        store, before = new_store(model), cast(dict[int, Tensor], {})
        view.memory["store"] = store
        first = max(view.block.start - model.logit_shift, 0)
        window = torch.arange(first, view.block.stop, device=view.ids.device)
        state: dict[str, Any] = {"wide": True, "view": view}

        def watcher(layer: int, query: Tensor, key: Tensor) -> None:
            """Ask the sensor of a layer."""
            now = attention_of(query, key)[0]
            now = now[window] if by_layer.covered is None else now
            if not state["wide"]:
                place = self.sensor(state["view"], before[layer], window, layer)
                state["next"] = float(F.cosine_similarity(now[:, place], before[layer][:, place], dim=0)) < self.threshold
            before[layer] = now

        def rows_of(layer: int) -> Tensor | None:
            """Widen the pass once a sensor has moved."""
            state["wide"] = state["wide"] or state.pop("next", False)
            return None if state["wide"] else window

        by_layer = ByLayer(store, rows_of)

        def run(now: View) -> Hidden:
            """Make a full pass, or one that begins with the block."""
            state.update(view=now, wide=self.is_fresh(now), next=False)
            if not state["wide"] and self.control.setting == "confidence":
                note_confidence(model, now)
            return by_layer.run(model, now)

        with self.control.opened(model, view), watched(model, watcher), by_layer.installed(model):
            yield run

    def sensor(self, view: View, attention: Float[Tensor, "query place"], window: Tensor, layer: int) -> int:
        """Return the place outside of the block that is watched in a layer."""
        mass = attention.sum(0).index_fill(0, window, float("-inf"))
        return int(self.control.take(mass[None], view, 1, layer=layer))

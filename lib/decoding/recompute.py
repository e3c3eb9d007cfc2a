"""The third choice: which places a pass computes anew; the others are seen through keys and values that are kept of them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.decoding.caches import Hidden, KeyValueStore, new_store, run_rows, run_whole
from lib.decoding.refresh import adaptive_pass
from lib.decoding.view import View
from lib.models.language_model import LanguageModel

BlockCache = Literal["prefix", "dual"]
Pass = Callable[[View], Hidden]


def check_refresh(every: int | None) -> None:
    """Refuse an interval without passes.

    Raises:
        InputError: see above.
    """
    require(every is None or every >= 1, "refresh_every must be at least 1", str(every), "raise it or leave it out")


@dataclass(frozen=True)
class Recompute:
    """Passes over one block. This one computes every place and keeps nothing.

    `alone` tells that rows are decoded one by one, since they would choose other numbers of places; `keeps` that keys and values
    are kept.
    """

    alone = False
    keeps = False

    def passes(self, model: LanguageModel, view: View) -> AbstractContextManager[Pass]:
        """Open the passes of the block of `view`."""
        return _opened(lambda now: run_whole(model, now.ids, places=now.places))


@contextmanager
def _opened(run: Pass) -> Iterator[Pass]:
    yield run


@dataclass(frozen=True)
class Kept(Recompute):
    """What all rules share that keep keys and values: the first pass of a block is full, and so is every `refresh_every`-th.

    Attributes:
        refresh_every: passes from one full pass to the next within a block; None is one at its start. 1 keeps nothing.
    """

    refresh_every: int | None = None
    keeps = True

    def __post_init__(self) -> None:
        check_refresh(self.refresh_every)

    def is_fresh(self, view: View) -> bool:
        """Tell whether the next pass is a full one."""
        return view.step == 0 or (self.refresh_every is not None and view.step % self.refresh_every == 0)

    def rows(self, model: LanguageModel, view: View) -> Int[Tensor, "batch query"] | range:
        """Return the places that a pass which is not full computes."""
        raise NotImplementedError

    def passes(self, model: LanguageModel, view: View) -> AbstractContextManager[Pass]:
        """Open passes over the full text and over `rows`."""
        store: KeyValueStore = new_store(model)
        view.memory["store"] = store

        def run(now: View) -> Hidden:
            if self.is_fresh(now):
                return run_whole(model, now.ids, places=now.places, store=store)
            return run_rows(model, now.ids, self.rows(model, now), store=store, places=now.places)

        return _opened(run)


@dataclass(frozen=True)
class Blockwise(Kept):
    """The block, and with `"prefix"` all behind it; what stands before the block, with `"dual"` also behind it, is kept.

    Source: Fast-dLLM (arXiv 2505.22618), section 3.2. With a logit shift of 1 the place before the block is computed too, because
        it predicts the block's first token.
    """

    kind: BlockCache = "dual"

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ", ".join(get_args(BlockCache))
        require(self.kind in get_args(BlockCache), f"cache must be one of {kinds}", repr(self.kind), "choose one")

    def rows(self, model: LanguageModel, view: View) -> range:
        """Return the block, or all from it on."""
        last = view.block.stop if self.kind == "dual" else view.ids.shape[1]
        return range(max(view.block.start - model.logit_shift, 0), last)


@dataclass(frozen=True)
class Vicinity(Kept):
    """The block and `radius` places on both sides; the first `warm_up` passes of a text are full ones.

    Source: dInfer (arXiv 2510.08666), vicinity refresh: 16 places, 4 passes.
    """

    radius: int = 16
    warm_up: int = 4

    def is_fresh(self, view: View) -> bool:
        """Count the passes of the text, too."""
        return view.passes < self.warm_up or super().is_fresh(view)

    def rows(self, model: LanguageModel, view: View) -> range:
        """Return the block and what lies around it."""
        first = max(view.block.start - max(self.radius, model.logit_shift), 0)
        return range(first, min(view.block.stop + self.radius, view.ids.shape[1]))


def as_rows(model: LanguageModel, chosen: Bool[Tensor, "one place"]) -> Int[Tensor, "one query"]:
    """Return the chosen places of a text and, for a logit shift of 1, the ones before them, from which they are predicted."""
    wanted = chosen.clone()
    if model.logit_shift:
        wanted[:, :-1] |= chosen[:, 1:]
    return wanted[0].nonzero()[:, 0][None]


@dataclass(frozen=True)
class Delayed(Kept):
    """All masks, and the tokens whose keys and values are not frozen yet: `delay` passes after they were written they are.

    Attributes:
        delay: passes that read a token before it is kept; the full pass at a block's start freezes all tokens that it reads.
        right_neighbour: freeze a token only when the one to its right is written as long.

    Source: dKV-Cache (arXiv 2505.15781), delay 1; FOCUS (arXiv 2601.23278) for the neighbour.
    """

    delay: int = 1
    right_neighbour: bool = False
    alone = True

    def rows(self, model: LanguageModel, view: View) -> Int[Tensor, "one query"]:
        """Return masks and young tokens."""
        return as_rows(model, self.unfrozen(view))

    def unfrozen(self, view: View) -> Bool[Tensor, "one place"]:
        """Mark what must be computed; to be asked at every pass that is not full."""
        age: Tensor = view.memory.get("age", torch.full_like(view.ids, self.delay))
        is_masked = (view.ids == view.mask_id) & (view.place >= view.start)
        just = view.committed if view.committed is not None else torch.zeros_like(is_masked)
        view.memory["age"] = age = torch.where(is_masked | just, 0, age + 1)
        young = is_masked | (age < self.delay)
        if self.right_neighbour:
            before = young.clone()
            young[:, :-1] |= before[:, 1:] & (view.place[:-1] >= view.start)
        return young


@dataclass(frozen=True)
class Adaptive(Recompute):
    """In every layer the share of places whose value vectors have moved most; full passes in between. Source: dLLM-Cache.

    Attributes:
        refresh_ratio: share of the places, in (0, 1].
        refresh_every: passes from one full pass to the next within a block; None is one at its start.
    """

    refresh_ratio: float = 0.25
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        check_refresh(self.refresh_every)
        rule, remedy = "refresh_ratio must be a share in (0, 1]", "use 0.25 for a quarter"
        require(0 < self.refresh_ratio <= 1, rule, str(self.refresh_ratio), remedy)

    @contextmanager
    def passes(self, model: LanguageModel, view: View) -> Iterator[Pass]:
        """Open passes as `refresh.adaptive_pass` makes them."""
        every = self.refresh_every
        with adaptive_pass(model, ratio=self.refresh_ratio, block=view.block) as run:
            yield lambda now: run(now.ids, now.step == 0 or (every is not None and now.step % every == 0), now.places)


@dataclass(frozen=True)
class Predicted(Kept):
    """The places that are likely to be written next, by the confidence of the last pass, with a window around each.

    Attributes:
        count: places.
        radius: of the window.

    Source: Focus-dLLM (arXiv 2602.02159), after the paper's description.
    """

    count: int = 8
    radius: int = 2
    alone = True

    def rows(self, model: LanguageModel, view: View) -> Int[Tensor, "one query"]:
        """Return windows around the surest open places, and what the last step wrote."""
        assert view.guess is not None
        confidence: Float[Tensor, "one place"] = view.confidence
        # A place that no pass has predicted yet has no confidence: it comes after those that have.
        rank = torch.where(view.is_open & confidence.isinf(), -1.0, confidence)
        surest = rank[0].topk(min(self.count, int(view.is_open.sum()))).indices
        near = ((view.place[:, None] - surest[None]).abs() <= self.radius).any(1)[None]
        near = near & view.in_block
        return as_rows(model, near if view.committed is None else near | view.committed)

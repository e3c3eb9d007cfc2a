"""Keys that are hidden for the rest of a block, by how much the block looks at them: Sparse-dLLM, MAGE, Focus-dLLM."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.decoding.by_attention.control import Control, note_confidence
from lib.decoding.by_attention.watch import attention_of, scores_of, watched
from lib.decoding.caches import KeyValueStore
from lib.decoding.view import View
from lib.decoding.visible import Visible
from lib.models.language_model import LanguageModel

Score = Literal["product", "attention"]


@dataclass(frozen=True)
class Evict(Visible):
    """Keep a share of the keys outside of the block, one set for all heads of a layer, chosen once a block.

    Attributes:
        keep: share of the candidates that stays.
        score: `"product"`: of the mean query of the block and each key, mean over heads; `"attention"`: that the block's queries
            give, after softmax.
        pool: neighbours whose largest score a key takes; 1 is its own.
        span: keys that are kept or evicted together, by their mean score.
        delay: passes of the block before the one whose scores count.
        prompt_only: candidates are the prompt's keys; others stay.
        control: which candidates stay; how many does not change.

    Source: Sparse-dLLM (arXiv 2508.02558), Cache.py at 3fd8986: product, pool 3, delay 1, share .7 (paper .5). MAGE
        (arXiv 2602.14209): attention, delay 0, after the paper's description. Focus-dLLM (arXiv 2602.02159): the prompt in spans,
        sinks always kept, after the paper's description; sinks are found there in one layer, here in the mean over layers.
    """

    keep: float = 0.7
    score: Score = "product"
    pool: int = 3
    span: int = 1
    delay: int = 1
    prompt_only: bool = False
    control: Control = field(default_factory=Control)
    alone = True
    evicts = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.keep <= 1, "keep must be a share in (0, 1]", str(self.keep), "use 0.5 for half")
        scores = ", ".join(get_args(Score))
        require(self.score in get_args(Score), f"score must be one of {scores}", repr(self.score), "choose one")
        require(self.pool % 2 == 1, "pool must be an odd number of keys", str(self.pool), "use 3, or 1 for none")

    @contextmanager
    def opened(self, model: LanguageModel, view: View) -> Iterator[None]:
        """Score keys in the pass that counts."""
        scores = view.memory["scores"] = cast(dict[int, Tensor], {})
        block = torch.arange(view.block.start, view.block.stop, device=view.ids.device)

        def watcher(layer: int, query: Tensor, key: Tensor) -> None:
            """Score the keys of a layer."""
            if view.step == self.delay:
                own = query[:, :, block] if query.shape[2] == view.ids.shape[1] else query[:, :, -len(block) :]
                scores[layer] = self.scored(own, key)

        with ExitStack() as stack:
            stack.enter_context(self.control.opened(model, view))
            stack.enter_context(watched(model, watcher))
            yield

    def scored(self, query: Float[Tensor, "one head query dim"], key: Float[Tensor, "one kv_head key dim"]) -> Tensor:
        """Return the score of every key, [1, key]."""
        if self.score == "product":
            return scores_of(query.float().mean(2, keepdim=True), key).mean(1)[:, 0]
        return attention_of(query, key).sum(1)

    def after(self, model: LanguageModel, view: View) -> None:
        """Evict after the pass that counts."""
        if self.control.setting == "confidence":  # the pass that counts may compute the block alone
            note_confidence(model, view)
        if view.step != self.delay:
            return
        store = cast(KeyValueStore, view.memory["store"])
        for layer, scores in view.memory["scores"].items():
            store.keep(layer, self.kept(model, view, scores, layer))

    def kept(self, model: LanguageModel, view: View, scores: Float[Tensor, "one place"], layer: int) -> Int[Tensor, "one kept"]:
        """Return the places that a layer keeps."""
        first = max(view.block.start - model.logit_shift, 0)
        fixed = (view.place >= first) & (view.place < view.block.stop)
        fixed = fixed | (view.place >= view.start) if self.prompt_only else fixed
        candidates = (~fixed).nonzero()[:, 0]
        count = min(len(candidates), max(1, round(self.keep * len(candidates) / self.span)) * self.span)
        among = torch.full(view.ids.shape, float("-inf"), dtype=scores.dtype, device=scores.device)
        among[:, candidates] = scores[:, candidates]
        taken = self.control.take(among, view, count, layer=layer, pooled=partial(self.pooled, candidates=candidates))
        return torch.cat([fixed.nonzero()[:, 0], taken]).sort().values[None]

    def pooled(self, scores: Float[Tensor, "one place"], *, candidates: Int[Tensor, "candidate"]) -> Float[Tensor, "one place"]:
        """Return the scores of candidates pooled over neighbours and spans among themselves, minus infinity elsewhere."""
        values = F.max_pool1d(scores[:, candidates], self.pool, stride=1, padding=self.pool // 2)[0]
        spans = torch.arange(len(values), device=values.device) // self.span
        sums, sizes = (torch.zeros(int(spans[-1]) + 1, dtype=values.dtype).to(values).index_add(0, spans, part)
                       for part in (values, torch.ones_like(values)))  # fmt: skip
        found = torch.full_like(scores, float("-inf"))
        found[0, candidates] = (sums / sizes)[spans]
        return found

"""Adaptive refresh: between full passes, recompute in each layer only the tokens whose value vectors have moved most."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lib.decoding.caches import Hidden, KeyValueStore, new_store
from lib.models.language_model import LanguageModel, network_body

DECIMALS = 5  # of a cosine similarity
Pass = Callable[..., Hidden]  # (visible ids, whether nothing kept may be used, positions if not 0, 1, ...) -> hidden states


def moved_most(
    new: Float[Tensor, "batch position feature"],
    kept: Float[Tensor, "batch position feature"],
    *,
    count: int,
    wanted: range = range(0),
) -> Int[Tensor, "batch count"]:
    """Return the positions whose vectors have the smallest cosine similarity with the kept ones, in rising order.

    Args:
        new: vectors of now.
        kept: vectors of the last time they were computed.
        count: positions to return.
        wanted: positions that come first among equals.

    >>> kept = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    >>> moved_most(torch.tensor([[[9.0, 0.0], [1.0, 1.0], [0.0, 1.0]]]), kept, count=2).tolist()
    [[1, 2]]
    >>> moved_most(kept, kept, count=1, wanted=range(2, 3)).tolist()
    [[2]]
    """
    # Rounded, with ties in a fixed order: rounding noise, which depends on the batch, must not choose among unmoved tokens.
    similarity = F.cosine_similarity(new.float(), kept.float(), dim=-1).round(decimals=DECIMALS)
    order = torch.tensor([*wanted, *(index for index in range(new.shape[1]) if index not in wanted)], device=new.device)
    return order[similarity[:, order].argsort(dim=-1, stable=True)[:, :count]].sort(-1).values


def refresh_count(positions: int, *, ratio: float) -> int:
    """Return how many positions a partial pass recomputes: at least one.

    >>> refresh_count(30, ratio=0.1), refresh_count(3, ratio=0.1)
    (3, 1)
    """
    return max(1, round(ratio * positions))


@dataclass
class _Features:
    """What is kept by layer: outputs of attention and MLP for every position, keys and values in `store`.

    `chosen` holds the positions that the layer now at work recomputes; None in a fresh pass.
    """

    ratio: float
    store: KeyValueStore
    wanted: range = range(0)
    fresh: bool = True
    chosen: Tensor | None = None
    attention: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)

    def attend(
        self, original: Callable[..., Any], hidden_states: Tensor, *, layer: Any, position_embeddings: Any, **rest: Any
    ) -> tuple[Tensor, None]:
        """Stand in for `self_attn.forward`."""
        index = int(layer.layer_idx)
        if self.fresh:
            self.store.where = self.chosen = None
            output, _ = original(hidden_states=hidden_states, position_embeddings=position_embeddings, **rest)
            self.attention[index] = output
            return output, None
        count = refresh_count(hidden_states.shape[1], ratio=self.ratio)
        values = layer.v_proj(hidden_states)
        self.store.where = self.chosen = moved_most(values, self.store.values_of(index), count=count, wanted=self.wanted)
        rotations = tuple(self._rows(part.expand(len(hidden_states), -1, -1)) for part in position_embeddings)
        # Every query sees all kept keys; a mask and position ids made for all queries would not fit the chosen ones.
        rest.update(attention_mask=None, position_ids=None)
        output, _ = original(hidden_states=self._rows(hidden_states), position_embeddings=rotations, **rest)
        return self._put(self.attention[index], output), None

    def feed(self, original: Callable[..., Any], hidden_states: Tensor, *, index: int) -> Tensor:
        """Stand in for `mlp.forward`, for the positions that the attention before it has chosen."""
        if self.chosen is None:
            self.mlp[index] = original(hidden_states)
            return self.mlp[index]
        return self._put(self.mlp[index], original(self._rows(hidden_states)))

    def _rows(self, values: Tensor) -> Tensor:
        chosen = cast(Tensor, self.chosen)
        return values[torch.arange(len(chosen), device=chosen.device)[:, None], chosen]

    def _put(self, kept: Tensor, new: Tensor) -> Tensor:
        chosen = cast(Tensor, self.chosen)
        kept[torch.arange(len(chosen), device=chosen.device)[:, None], chosen] = new
        return kept


@contextmanager
def adaptive_pass(model: LanguageModel, *, ratio: float, block: range = range(0)) -> Iterator[Pass]:
    """Let the network reuse the features of tokens that have hardly moved.

    Args:
        model: a diffusion model.
        ratio: share of the visible positions that each layer recomputes in a pass that is not fresh, in (0, 1].
        block: positions whose tokens are to be predicted, which are recomputed first where none has moved. In the first layer
            only new tokens have: masks have one embedding, whatever stands beside them, but must see what has come.

    Yields:
        Passes, to be called with the same number of visible positions every time; the first must be fresh. `computed` counts the
        recomputed positions of a layer; the value projection, by which they are chosen, runs on all positions.

    Raises:
        InputError: layers with sliding windows.

    Source: dLLM-Cache (arXiv 2506.06295). Known deviation: prompt and response are one set of candidates and are refreshed at the
        same passes; there the prompt has an interval of its own and no partial updates.
    """
    features = _Features(ratio, new_store(model), range(max(block.start - model.logit_shift, 0), block.stop))

    def run(ids: Int[Tensor, "batch position"], fresh: bool, places: Int[Tensor, "position"] | None = None) -> Hidden:
        features.fresh = fresh
        positions = _positions(ids) if places is None else places[None]
        output = network_body(model)(input_ids=ids, past_key_values=features.store, position_ids=positions, use_cache=True)
        queries = ids.shape[1] if fresh else refresh_count(ids.shape[1], ratio=ratio)
        return Hidden(output.last_hidden_state, None, len(ids) * queries)

    layers = list(cast(Any, model.network.get_decoder()).layers)
    stand_ins = {layer.self_attn: partial(features.attend, layer.self_attn.forward, layer=layer.self_attn) for layer in layers}
    stand_ins |= {layer.mlp: partial(features.feed, layer.mlp.forward, index=index) for index, layer in enumerate(layers)}
    with replaced(stand_ins):
        yield run


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)[None]


@contextmanager
def replaced(stand_ins: dict[Any, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another `forward` inside the context.

    Args:
        stand_ins: what to call instead, by module.
    """
    before = {module: vars(module).get("forward") for module in stand_ins}
    for module, stand_in in stand_ins.items():
        module.forward = stand_in
    try:
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own

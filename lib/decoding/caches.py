"""Keys and values kept between the passes of a masked diffusion decoder: block-wise caches of any bidirectional network.

The network stays the plain transformers class. It is given fewer query positions, their position ids, and a store in which their
new keys and values replace the ones kept at the same positions; no mask is given, so that every query sees every kept position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lib.core.errors import InputError
from lib.models.finite import require_finite
from lib.models.language_model import LanguageModel, network_body

BlockCache = Literal["prefix", "dual"]


@dataclass(frozen=True)
class Hidden:
    """What a pass brings out of the network, before the LM head.

    Attributes:
        states: final hidden states of consecutive positions.
        first: position of the first of them.
        computed: query positions that went through the network, over the batch.
    """

    states: Float[Tensor, "batch query feature"]
    first: int
    computed: int


Pass = Callable[[Tensor, bool], Hidden]  # (visible ids [batch, position], whether nothing kept may be used) -> hidden states


class _PositionLayer(CacheLayerMixin):
    """Keys and values of one layer, written at given positions."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the first keys and values as they are: a pass over everything."""
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        """Replace what is kept at the positions `args[0]`, or everything, and return all of it."""
        where = args[0] if args else None
        if where is None:
            self.lazy_initialization(key_states, value_states)
        else:
            rows = torch.arange(len(where), device=where.device)[:, None]
            cast(Tensor, self.keys)[rows, :, where] = key_states.transpose(1, 2)
            cast(Tensor, self.values)[rows, :, where] = value_states.transpose(1, 2)
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a pass sees: new ones replace kept ones, they do not come behind them."""
        return max(query_length, self.get_seq_length()), 0

    def get_seq_length(self) -> int:
        """Return how many positions are kept."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


class KeyValueStore(Cache):
    """Keys and values of every layer; those of a pass replace what is kept at `where`.

    Attributes:
        where: positions of the queries of the next pass, [batch, query]; None for all positions.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_PositionLayer() for _ in range(layers)])
        self.where: Int[Tensor, "batch query"] | None = None

    def values_of(self, layer: int) -> Float[Tensor, "batch position feature"]:
        """Return the kept value vectors of a layer, heads side by side as the value projection puts them."""
        kept = cast(Tensor, cast(_PositionLayer, self.layers[layer]).values)
        return kept.transpose(1, 2).flatten(2)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a layer, and return all that it keeps."""
        return cast(_PositionLayer, self.layers[layer_idx]).update(key_states, value_states, self.where)


def new_store(model: LanguageModel) -> KeyValueStore:
    """Return an empty store for a network.

    Raises:
        InputError: a layer sees a sliding window only, or attention goes by blocks, so that a mask is needed.
    """
    if model.goes_by_blocks:
        rule = "a cache of masked text must go with attention that is not by blocks"
        raise InputError(f"{rule}, got {model.attention} with {model.name}: use cache='prefix', which is exact there")
    config = model.network.config
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise InputError(f"a cache must see all positions in every layer, got sliding windows in {model.name}: use cache='none'")
    return KeyValueStore(config.num_hidden_layers)


def whole_pass(model: LanguageModel) -> Pass:
    """Return passes that keep nothing."""

    def run(ids: Int[Tensor, "batch position"], _: bool) -> Hidden:
        return Hidden(network_body(model)(input_ids=ids, use_cache=False).last_hidden_state, 0, ids.numel())

    return run


def block_pass(model: LanguageModel, *, kind: BlockCache, block: range) -> Pass:
    """Return passes over one block that reuse the keys and values of what lies outside.

    Args:
        model: a diffusion model.
        kind: `"prefix"` reuses what stands before the block, `"dual"` also what follows it.
        block: positions of the block.

    Returns:
        Passes, to be called with the same number of visible positions every time. A fresh one computes all positions, as the
        first must; the others use what the last fresh one kept outside.

    Raises:
        InputError: layers with sliding windows.

    Source: Fast-dLLM (arXiv 2505.22618), section 3.2. With a logit shift of 1 the position before the block is computed too,
        because it predicts the block's first token.
    """
    store = new_store(model)

    def run(ids: Int[Tensor, "batch position"], fresh: bool) -> Hidden:
        """Compute all positions, or those that the kept keys and values do not stand for."""
        first = 0 if fresh else max(block.start - model.logit_shift, 0)
        last = block.stop if kind == "dual" and not fresh else ids.shape[1]
        positions = torch.arange(first, last, device=ids.device)[None]
        store.where = None if fresh else positions.expand(len(ids), -1)
        queries = ids[:, first:last]
        output = network_body(model)(input_ids=queries, position_ids=positions, past_key_values=store, use_cache=True)
        return Hidden(output.last_hidden_state, first, queries.numel())

    return run


def states_at(model: LanguageModel, hidden: Hidden, where: Bool[Tensor, "batch position"]) -> Float[Tensor, "selected feature"]:
    """Return the states from which the LM head predicts the tokens at `where`, in row-major order.

    Args:
        model: any loaded model.
        hidden: states that cover these positions, and the ones before them for a logit shift of 1.
        where: positions whose token is to be predicted. With a shift, position 0 keeps its own state.
    """
    rows, positions = where.nonzero(as_tuple=True)
    return hidden.states[rows, (positions - model.logit_shift).clamp(min=0) - hidden.first]


def logits_from(
    model: LanguageModel, hidden: Hidden, where: Bool[Tensor, "batch position"], *, again: Callable[[], object] = lambda: None
) -> Float[Tensor, "selected vocab"]:
    """Run the LM head on `states_at`.

    Args:
        model: any loaded model.
        hidden: what a pass gave.
        where: positions whose token is to be predicted.
        again: repeats that pass, to find the layer at fault.

    Returns:
        Float32 logits as `models.logits_at` gives them.

    Raises:
        InputError: a logit that is no finite number.
    """
    return read_out(model, states_at(model, hidden, where), again=again)


def read_out(
    model: LanguageModel, states: Float[Tensor, "selected feature"], *, again: Callable[[], object] = lambda: None
) -> Float[Tensor, "selected vocab"]:
    """Run the LM head, in float32 afterwards.

    Args:
        model: any loaded model.
        states: final hidden states.
        again: repeats the pass that they come from, to find the layer at fault.

    Raises:
        InputError: a logit that is no finite number.
    """
    logits = cast(torch.nn.Linear, model.network.get_output_embeddings())(states).float()
    require_finite(logits, again, network=model.network, name=model.name)
    return logits

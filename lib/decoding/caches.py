"""Keys and values kept between the passes of a masked diffusion decoder: block-wise caches of any bidirectional network.

The network stays the plain transformers class. It is given fewer query positions, their position ids, and a store in which their
new keys and values replace the ones kept at the same positions; no mask is given, so that every query sees every kept position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lib.core.errors import InputError
from lib.diffusion import sampler
from lib.models.finite import require_finite
from lib.models.language_model import LanguageModel, network_body
from lib.models.layers.anatomy import head_of, require_decoder


@dataclass(frozen=True)
class Hidden:
    """What a pass brings out of the network, before the LM head.

    Attributes:
        states: final hidden states.
        rows: which place of the text each of them is of; None is every place in order.
        computed: query positions that went through the network, over the batch; a mean over layers where they differ.
    """

    states: Float[Tensor, "batch query feature"]
    rows: Int[Tensor, "batch query"] | None
    computed: int

    def index(self, places: int) -> Int[Tensor, "batch place"]:
        """Return where in `states` each of the first `places` places stands, -1 for those that were not computed."""
        if self.rows is None:
            return torch.arange(places, device=self.states.device).expand(len(self.states), -1)
        order = torch.arange(self.rows.shape[1], device=self.rows.device).expand(self.rows.shape)
        return torch.full((len(self.rows), places), -1, device=self.rows.device).scatter(1, self.rows, order)


class _PositionLayer(CacheLayerMixin):
    """Keys and values of one layer, written at given positions."""

    slots: Tensor | None = None  # [batch, position] where each position is kept, -1 for nowhere; None: in order

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the first keys and values as they are: a pass over everything."""
        self.keys, self.values, self.slots, self.is_initialized = key_states, value_states, None, True

    def keep(self, kept: Tensor) -> None:
        """Forget all positions but `kept`, [batch, count], which rise."""
        rows = torch.arange(len(kept), device=kept.device)[:, None]
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        places = torch.full((len(kept), keys.shape[2]), -1, device=kept.device)
        self.slots = places.scatter(1, kept, torch.arange(kept.shape[1], device=kept.device).expand(kept.shape))
        self.keys, self.values = keys[rows, :, kept].transpose(1, 2), values[rows, :, kept].transpose(1, 2)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        """Replace what is kept at the positions `args[0]`, or everything, and return all of it."""
        where = args[0] if args else None
        if where is None:
            self.lazy_initialization(key_states, value_states)
        elif isinstance(where, range) and self.slots is None:  # side by side: copied without an index
            cast(Tensor, self.keys)[:, :, where.start : where.stop] = key_states
            cast(Tensor, self.values)[:, :, where.start : where.stop] = value_states
        else:
            where = _as_rows(where, like=key_states)
            rows = torch.arange(len(where), device=where.device)[:, None]
            where = where if self.slots is None else self.slots.gather(1, where)
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


def _as_rows(where: Tensor | range, *, like: Tensor) -> Tensor:
    """Return positions as a tensor, [batch, query]."""
    return where if isinstance(where, Tensor) else torch.arange(where.start, where.stop, device=like.device).expand(len(like), -1)


class KeyValueStore(Cache):
    """Keys and values of every layer; those of a pass replace what is kept at `where`.

    Attributes:
        where: positions of the queries of the next pass, [batch, query], or the same side by side in all rows; None for all
            positions.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_PositionLayer() for _ in range(layers)])
        self.where: Int[Tensor, "batch query"] | range | None = None

    def keep(self, layer: int, kept: Int[Tensor, "batch count"]) -> None:
        """Let a layer forget the keys and values of all positions but `kept`; a pass over everything brings them back."""
        cast(_PositionLayer, self.layers[layer]).keep(kept)

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
    require_decoder(model.network, "a cache of keys and values", name=model.name, instead="use cache='none'")
    config = model.network.config
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise InputError(f"a cache must see all positions in every layer, got sliding windows in {model.name}: use cache='none'")
    return KeyValueStore(config.num_hidden_layers)


def run_whole(
    model: LanguageModel,
    ids: Int[Tensor, "batch place"],
    *,
    places: Int[Tensor, "place"] | None = None,
    store: KeyValueStore | None = None,
) -> Hidden:
    """Run the network on all places.

    Args:
        model: any loaded model.
        ids: what it reads.
        places: position of each place in the text; None is 0, 1, ...
        store: takes all keys and values, in the place of those that it keeps.
    """
    options: dict[str, Any] = {} if places is None else {"position_ids": places[None]}
    if store is not None:
        store.where = None
        positions = torch.arange(ids.shape[1], device=ids.device) if places is None else places
        options = {"position_ids": positions[None], "past_key_values": store}
    output = network_body(model)(input_ids=ids, use_cache=store is not None, **options)
    return Hidden(output.last_hidden_state, None, ids.numel())


def run_rows(
    model: LanguageModel,
    ids: Int[Tensor, "batch place"],
    rows: Int[Tensor, "batch query"] | range,
    *,
    store: KeyValueStore,
    places: Int[Tensor, "place"] | None = None,
) -> Hidden:
    """Run the network on some places of each row, which see what is kept of the others.

    Args:
        model: any loaded model.
        ids: the text.
        rows: places that are computed, a range where they are the same in all rows; their keys and values replace the kept ones.
        store: of a pass over everything before.
        places: as in `run_whole`.
    """
    store.where = rows
    rows = _as_rows(rows, like=ids)
    queries = ids.gather(1, rows)
    positions = rows if places is None else places[rows]
    output = network_body(model)(input_ids=queries, position_ids=positions, past_key_values=store, use_cache=True)
    return Hidden(output.last_hidden_state, rows, queries.numel())


def states_at(model: LanguageModel, hidden: Hidden, where: Bool[Tensor, "batch position"]) -> Float[Tensor, "selected feature"]:
    """Return the states from which the LM head predicts the tokens at `where`, in row-major order.

    Args:
        model: any loaded model.
        hidden: states that cover these positions, for a logit shift of 1 the ones before them.
        where: positions whose token is to be predicted. With a shift, position 0 keeps its own state.
    """
    rows, positions = where.nonzero(as_tuple=True)
    index = hidden.index(where.shape[1])[rows, (positions - model.logit_shift).clamp(min=0)]
    return hidden.states[rows, index]


def readable(model: LanguageModel, hidden: Hidden, places: int) -> Bool[Tensor, "batch place"]:
    """Mark the places whose token a pass predicts: those whose state, or for a logit shift the one before, it computed."""
    before = (torch.arange(places, device=hidden.states.device) - model.logit_shift).clamp(min=0)
    return hidden.index(places)[:, before] >= 0


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
    """Run the LM head, in float32 afterwards, and leave out what is never written.

    Args:
        model: any loaded model.
        states: final hidden states.
        again: repeats the pass that they come from, to find the layer at fault.

    Raises:
        InputError: a logit that is no finite number.
    """
    logits = head_of(model.network)(states).float()
    require_finite(logits, again, network=model.network, name=model.name)
    return sampler.written_alone(model, logits)

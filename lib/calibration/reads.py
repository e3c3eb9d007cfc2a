"""What linear layers read during a pass: caught by hooks, matched with the weights of tokens, and added up."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lib.calibration.sums import InputStatistics
from lib.models.experts import ExpertList, Routing, experts_of, routing_of
from lib.models.language_model import LanguageModel, LinearLayer, Role
from lib.models.layers.anatomy import blocks_in

# Layers that read the same tensor share their statistics; what an MLP reads is called its gate's, also where it has none.
READS: dict[Role, Role] = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}


@dataclass(frozen=True)
class Read:
    """What a layer read of a batch.

    Attributes:
        block: number of the block.
        role: that reads it first.
        inputs: `[sample, position, feature]`. What the `down` of experts read is `[row, feature]`, in the order of the routing.
        expert: whose it is, where it is the shared one's alone.
        routing: which tokens went to which expert, for what experts read.
        shape: samples and positions of the batch, with a routing.
    """

    block: int
    role: Role
    inputs: Tensor = field(repr=False)
    expert: Literal["shared"] | None = None
    routing: Routing | None = field(default=None, repr=False)
    shape: tuple[int, int] = (0, 0)

    def rows(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each expert that has tokens, what it read, and the flat numbers of its tokens."""
        routing = cast(Routing, self.routing)
        for expert, where in routing.parts():
            tokens = routing.tokens[where]
            yield expert, self.inputs[where] if self.role == "down" else self.inputs.flatten(0, 1)[tokens], tokens


def add_read(found: Mapping[Role, InputStatistics], read: Read, weight: Tensor | None) -> None:
    """Add a batch to the statistics of those that read it; weights by head reach `o` and `v`, their mean the others.

    Args:
        found: of the block.
        read: of a batch.
        weight: of its tokens, `[sample, position]` or `[sample, head, position]`.
    """
    if read.role not in found:
        return
    layer = found[read.role]
    if weight is not None and weight.dim() == 3 and read.role not in ("o", "v"):
        weight = weight.mean(1)
    if read.expert is not None:
        layer.experts[read.expert].add(read.inputs, weight)
    elif read.routing is None:
        layer.add(read.inputs, weight)
    else:
        _add_routed(layer, read, weight)


def _add_routed(layer: InputStatistics, read: Read, weight: Tensor | None) -> None:
    """Add what experts read to the statistics of each, and to those of the layer."""
    flat = None if weight is None else weight.to(read.inputs.device).flatten()
    for expert, rows, tokens in read.rows():
        of_rows = None if flat is None else flat[tokens]
        layer.experts[expert].add_rows(rows, of_rows, tokens // read.shape[1], shape=read.shape)
    if read.role == "down":
        tokens = cast(Routing, read.routing).tokens
        layer.add_rows(read.inputs, None if flat is None else flat[tokens], tokens // read.shape[1], shape=read.shape)
    else:
        layer.add(read.inputs, weight)


def statistics_of(found: Mapping[Role, InputStatistics], role: Role, expert: object = None) -> InputStatistics:
    """Return the statistics that a layer uses: layers that read the same tensor share them.

    Args:
        found: of the block.
        role: of the layer.
        expert: of the layer. One that saw too few tokens uses those of all tokens of the layer, see `is_short`; so do gate and up
            of the shared one, which read the same.
    """
    layer = found[role] if role in found else found[READS[role]]
    own = layer.experts.get(cast(Any, expert))
    return layer if own is None or (isinstance(expert, int) and own.is_short) else own


def fell_back(found: Mapping[Role, InputStatistics], layer: LinearLayer) -> bool:
    """Tell whether a matrix of an expert must use the statistics of its layer, for want of tokens."""
    return isinstance(layer.expert, int) and found[READS[layer.role]].experts[layer.expert].is_short


def ready(model: LanguageModel, block: int, found: Mapping[Role, InputStatistics], *, hessian: bool = False) -> list[LinearLayer]:
    """Return the layers of a block whose statistics are there, in the order of the table.

    Args:
        model: whose block.
        block: its number.
        found: its statistics, all or some of them.
        hessian: whether norms are not enough.
    """
    layers = [layer for layer in model.by_block[block] if _is_there(found, layer)]
    return [layer for layer in layers if not hessian or statistics_of(found, layer.role, layer.expert).products is not None]


def _is_there(found: Mapping[Role, InputStatistics], layer: LinearLayer) -> bool:
    role = READS[layer.role]
    reads_all = layer.expert is None or (layer.expert == "shared" and role == "gate")
    return role in found and (reads_all or layer.expert in found[role].experts)


def new_statistics(model: LanguageModel, block: int, *, hessian: bool, by_head: bool = False) -> dict[Role, InputStatistics]:
    """Make empty statistics for each tensor that is read; with weights by head, `v` has its own, a group a key-value head.

    Experts have their own for what each reads, beside those of the layer; the shared one for what its `down` reads.
    """
    layers, found = model.by_block[block], dict[Role, InputStatistics]()
    own: tuple[Role, ...] = ("v",) if by_head else ()
    for role in (*dict.fromkeys(READS.values()), *own):
        of_role = [layer for layer in layers if layer.role == role or (READS[layer.role] == role and reads_first(layer, layers))]
        groups = model.network.config.num_key_value_heads if role == "v" else None
        made = [_empty(layer, hessian=hessian, groups=groups) for layer in of_role]
        found[role] = made[0] if of_role[0].expert is None else _empty(of_role[0], hessian=hessian)
        found[role].experts = {
            layer.expert: each
            for layer, each in zip(of_role, made, strict=True)
            if isinstance(layer.expert, int) or (layer.expert == "shared" and role == "down")
        }
    return found


def _empty(layer: LinearLayer, *, hessian: bool, groups: int | None = None) -> InputStatistics:
    return InputStatistics(layer.module.in_features, hessian=hessian, device=layer.module.weight.device, groups=groups)


def reads_first(layer: LinearLayer, layers: Iterable[LinearLayer]) -> bool:
    """Tell whether a layer is the first of those that read its tensor.

    Args:
        layer: any.
        layers: of its block.
    """
    return READS[layer.role] == layer.role or (layer.role == "up" and all(other.role != "gate" for other in layers))


@contextmanager
def reading(model: LanguageModel, blocks: Iterable[int], use: Callable[[Read], None]) -> Iterator[None]:
    """Hand what every linear layer of some blocks reads to `use` during the passes inside the context.

    Layers that read the same tensor hand it over once, but `v` always, which may have weights by head. Experts hand theirs over
    together, with the routing.
    """
    handles: list[RemovableHandle] = []
    for block in set(blocks):
        layers = model.by_block[block]
        for layer in layers:
            if layer.expert is None and (reads_first(layer, layers) or layer.role == "v"):
                role = "v" if layer.role == "v" else READS[layer.role]
                handles.append(layer.module.register_forward_pre_hook(partial(_use_input, use, block, role, None)))
            elif layer.expert == "shared" and layer.role == "down":
                handles.append(layer.module.register_forward_pre_hook(partial(_use_input, use, block, "down", "shared")))
        if any(layer.expert is not None for layer in layers):
            handles += _Routed(use, block).hooks(blocks_in(model.network)[block])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _use_input(
    use: Callable[[Read], None],
    block: int,
    role: Role,
    expert: Literal["shared"] | None,
    _: torch.nn.Module,
    inputs: tuple[Tensor, ...],
) -> None:
    use(Read(block, role, inputs[0], expert))


class _Routed:
    """Hooks of one mixture, which put together what its experts read one after another."""

    def __init__(self, use: Callable[[Read], None], block: int) -> None:
        self._use, self._block = use, block
        self._hidden: Tensor | None = None
        self._options: dict[str, Any] = {}
        self._parts: list[Tensor] = []

    def hooks(self, block: torch.nn.Module) -> list[RemovableHandle]:
        """Hang them up."""
        experts = cast(ExpertList, experts_of(block))
        down = [cast(Any, expert).down_proj.register_forward_pre_hook(self._part) for expert in experts]
        mixture = cast(Any, block).mlp.register_forward_pre_hook(self._start)
        return [mixture, experts.register_forward_pre_hook(self._gate), *down, experts.register_forward_hook(self._down)]

    def _start(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]
        self._parts.clear()

    def _gate(self, experts: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden = cast(Tensor, self._hidden)
        routing = routing_of(inputs[1], experts=len(cast(ExpertList, experts)))
        self._options = {"routing": routing, "shape": tuple(hidden.shape[:2])}
        self._use(Read(self._block, "gate", hidden, **self._options))

    def _part(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._parts.append(inputs[0])

    def _down(self, *_: Any) -> None:
        inputs = torch.cat(self._parts)
        self._parts.clear()
        self._use(Read(self._block, "down", inputs, **self._options))

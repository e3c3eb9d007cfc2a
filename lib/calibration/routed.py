"""Hessians of experts, one at a time: from what a block's mixture read, kept between two passes, and from who went where.

The tensor that `down` reads is computed again, expert by expert, from the kept one: all of them before any gate or up changes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from lib.calibration.hidden_states import HiddenStates
from lib.calibration.reads import Read
from lib.calibration.sums import InputStatistics, weighted_rows, with_products
from lib.models.experts import Expert, ExpertList, experts_of, intermediate, shared_expert
from lib.models.language_model import Role

KEPT = -1  # the number of a block that hidden states keep the mixture's input under


@dataclass
class Mixture:
    """What the mixture of one block read of all batches.

    Attributes:
        block: the module.
        states: where inputs wait.
        weights: of the tokens of each batch, `[sample, position]`, by head or None.
        reads: routing of each batch; inputs are left out.
    """

    block: torch.nn.Module = field(repr=False)
    states: HiddenStates = field(repr=False)
    weights: list[Tensor | None] = field(repr=False)
    reads: list[Read] = field(default_factory=list, repr=False)

    def keep(self, read: Read) -> None:
        """Keep a batch, if it is what the router and the experts read."""
        if read.routing is not None and read.role == "gate":
            self.states.put(KEPT, len(self.reads), read.inputs)
            self.reads.append(replace(read, inputs=read.inputs[:0, :0]))

    def drop(self) -> None:
        """Forget what is kept."""
        for batch in range(len(self.reads)):
            self.states.drop(KEPT, batch)

    def rows(self, expert: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what an expert read of each batch, and the weights of its tokens."""
        for batch, read in enumerate(self.reads):
            where = dict(cast(Any, read.routing).parts()).get(expert)
            if where is not None:
                tokens, weight = cast(Any, read.routing).tokens[where], _by_token(self.weights[batch])
                rows = self.states.rows(KEPT, batch, tokens)
                yield rows, None if weight is None else weight.to(rows.device)[tokens]

    def everything(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what the shared expert read of each batch, and the weights of the tokens."""
        for batch in range(len(self.reads)):
            yield self.states.get(KEPT, batch).flatten(0, 1), _by_token(self.weights[batch])


def hessians(
    mixture: Mixture, norms: Mapping[Role, InputStatistics], *, give_away: bool
) -> Iterator[dict[Role, InputStatistics]]:
    """Yield the statistics of a mixture's matrices with their Hessians, in an order in which each may be written at once.

    Args:
        mixture: what it read; unchanged until the first is yielded.
        norms: of the block, complete.
        give_away: free a Hessian with the last layer that reads it.

    Yields:
        Of the role, the layer's statistics with those experts that are served now. Those with fewer tokens than input features
        come last, together, with the Hessian of all tokens of the layer (for `down`, of what all experts made of theirs).
    """
    experts, shared = cast(ExpertList, experts_of(mixture.block)), shared_expert(mixture.block)
    yield from _down(mixture, experts, norms["down"], give_away=give_away)
    if shared is not None:
        own = with_products(norms["down"].experts["shared"], readers=1 if give_away else None)
        for inputs, weight in mixture.everything():
            own.add_products(weighted_rows(intermediate(shared[1], inputs), weight))
        yield {"down": _serving(norms["down"], {"shared": own})}
        del own
    yield from _gate(mixture, norms["gate"], also=0 if shared is None else 2, give_away=give_away)


def _down(
    mixture: Mixture, experts: ExpertList, norms: InputStatistics, *, give_away: bool
) -> Iterator[dict[Role, InputStatistics]]:
    short = _short(norms)
    pooled = with_products(norms, readers=len(short) if give_away else None) if short else None
    for number in _routed(norms):
        own = None if number in short else with_products(norms.experts[number], readers=1 if give_away else None)
        for rows, weight in mixture.rows(number):
            values = weighted_rows(cast(Expert, experts[number]).intermediate(rows), weight)
            for each in (own, pooled):
                if each is not None:
                    each.add_products(values)
        if own is not None:
            yield {"down": _serving(norms, {number: own})}
        del own
    if pooled is not None:
        pooled.experts = {**short}
        yield {"down": pooled}


def _gate(mixture: Mixture, norms: InputStatistics, *, also: int, give_away: bool) -> Iterator[dict[Role, InputStatistics]]:
    """Serve gate and up of each expert, then those that use all tokens: `also` of the shared one, and those with too few."""
    short = _short(norms)
    for number in _routed(norms):
        if number not in short:
            own = with_products(norms.experts[number], readers=2 if give_away else None)
            for rows, weight in mixture.rows(number):
                own.add_products(weighted_rows(rows, weight))
            yield {"gate": _serving(norms, {number: own})}
            del own
    if short or also:
        layer = with_products(norms, readers=2 * len(short) + also if give_away else None)
        for inputs, weight in mixture.everything():
            layer.add_products(weighted_rows(inputs, weight))
        layer.experts = {**short}
        yield {"gate": layer}


def _routed(norms: InputStatistics) -> list[int]:
    return [expert for expert in norms.experts if isinstance(expert, int)]


def _short(norms: InputStatistics) -> dict[int, InputStatistics]:
    """Return the experts that saw too few tokens for a Hessian, their statistics marked so."""
    features, found = norms.squares.shape[1], {}
    for expert in _routed(norms):
        if norms.experts[expert].tokens < features:
            found[expert] = norms.experts[expert]
            found[expert].least = features
    return found


def _serving(layer: InputStatistics, experts: Mapping[Any, InputStatistics]) -> InputStatistics:
    """Return the statistics of a layer, without a Hessian, for some of its experts."""
    made = InputStatistics(1, hessian=False, device=layer.squares.device)
    made.squares, made.norms, made.samples = layer.squares, layer.norms, layer.samples
    made.experts = dict(experts)
    return made


def _by_token(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else (weight.mean(1) if weight.dim() == 3 else weight).flatten()

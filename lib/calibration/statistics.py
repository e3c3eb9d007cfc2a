"""Statistics of what linear layers read, one decoder block at a time, and pruning with them.

Only the statistics of one block exist at a time; between blocks there are the hidden states of the calibration samples.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.calibration.hidden_states import HiddenStates, ReachedError, first_inputs
from lib.calibration.reads import READS, Read, add_read, new_statistics, reading
from lib.calibration.routed import Mixture, hessians
from lib.calibration.sums import InputStatistics, OneHessian
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel, Role
from lib.models.layers.anatomy import blocks_in

# From the last tensor that a block reads to the first: what one of them holds does not depend on the matrices that read it or a
# later one, so those may be written at once, and all statistics are still those of the block as it was.
LAST_FIRST: tuple[Role, ...] = ("down", "gate", "o", "q")

Weights = Float[Tensor, "sample position"] | Float[Tensor, "layer sample position"] | Float[Tensor, "layer sample head position"]


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows, clean or noised, and how much each token counts.

    `token_weight` is omega of the paper's Eq. 12, 1 everywhere when None; it multiplies the input of every linear layer. It may
    differ by layer, and by attention head where heads can be told apart: the input of `o` and the rows of `v`.
    """

    input_ids: Int[Tensor, "sample position"]
    token_weight: Weights | None = None

    def __post_init__(self) -> None:
        weight, shape = self.token_weight, tuple(self.input_ids.shape)
        if weight is None:
            return
        got = tuple(weight.shape)
        fits = got == shape or (weight.dim() == 3 and got[1:] == shape) or (weight.dim() == 4 and (got[1], got[3]) == shape)
        if not fits:
            raise InputError(
                f"token weights must have the shape of the ids, {shape}, or one more by layer, got {got}: give one a token"
            )
        if not bool((weight.isfinite() & (weight >= 0)).all()) or not bool((weight > 0).any()):
            raise InputError("token weights must be finite, not negative and not all 0, got others: check the sink scores")

    @property
    def by_head(self) -> bool:
        """Tell whether each head has its own weights."""
        return self.token_weight is not None and self.token_weight.dim() == 4


Visit = Callable[[int, dict[Role, InputStatistics]], None]


@torch.no_grad()
def stream(
    model: LanguageModel,
    calibration: CalibrationSet,
    visit: Visit,
    *,
    hessian: bool = False,
    sequential: bool = True,
    batch_size: int = 4,
    states: HiddenStates | None = None,
    by_role: bool = False,
) -> None:
    """Walk through the blocks: collect the statistics of one, let `visit` use them, go on to the next.

    Args:
        model: any loaded model; `visit` may change its weights.
        calibration: what it reads.
        visit: called with the block's index and its statistics by reading role; with Hessians of experts many times, see `ready`.
        hessian: collect outer products too.
        sequential: True computes the next block's input with the block as `visit` left it, False with the block as it was.
        batch_size: samples at one time; changes memory, and the result only by rounding.
        states: where hidden states wait between blocks; on the device when None.
        by_role: collect one Hessian at a time, with a pass through the part of the block before it: `visit` is then called for
            each, in the order of `LAST_FIRST`, and may change what reads it. The first call brings the norms of all.

    Raises:
        InputError: the calibration set is empty.

    Source: the layer-by-layer scheme of SparseGPT and Wanda; `sequential=False` is the one-shot order of the sink variant.
    """
    if not len(calibration.input_ids):
        raise InputError("a calibration set must hold samples, got none: give at least one window")
    if hessian and calibration.by_head:
        raise InputError("token weights by head must go with norms, got a Hessian: use weights by layer with SparseGPT")
    check_weights(model, calibration.token_weight)
    blocks = blocks_in(model.network)
    states = states or HiddenStates("device", model.device)
    options = first_inputs(model, calibration.input_ids, states, batch_size)
    batches = range(-(-len(calibration.input_ids) // batch_size))
    roles = LAST_FIRST if hessian and by_role else LAST_FIRST[:1]
    for index, block in enumerate(blocks):
        last, weight = index + 1 == len(blocks), of_layer(calibration.token_weight, index)
        parts: list[Tensor | None] = [None] * len(batches) if weight is None else [*weight.split(batch_size)]
        walk = _Walk(model, index, block, states, options, parts, goes_on=not (sequential or last))
        if hessian and model.has_experts_in(index):
            _visit_mixture(walk, visit, by_role=by_role)
        elif len(roles) == 1:
            found = new_statistics(model, index, hessian=hessian, by_head=calibration.by_head)
            walk.through(found, None if walk.goes_on or model.has_experts_in(index) else roles[0], drops=True)
            visit(index, found)
            del found  # before the next ones exist
        else:
            for role in roles:
                found = _of_role(model, index, role)
                walk.through(found, None if role == roles[0] and walk.goes_on else role)
                visit(index, found)
                del found
        for batch in batches:
            if sequential and not last:
                states.put(index + 1, batch, block(states.get(index, batch), **options[batch]))
            states.drop(index, batch)


@dataclass(frozen=True)
class _Walk:
    """One block on the way, the hidden states it reads, and the weights of their tokens, batch by batch."""

    model: LanguageModel
    index: int
    block: torch.nn.Module
    states: HiddenStates
    options: list[dict[str, Any]]
    parts: list[Tensor | None]
    goes_on: bool  # whether the next block reads what the unchanged block gives

    def through(
        self,
        found: dict[Role, InputStatistics],
        until: Role | None,
        *,
        drops: bool = False,
        also: Callable[[Read], None] | None = None,
    ) -> None:
        """Pass all batches and add up what is read; a pass ends behind `until`, or goes on to the next block if that is None."""
        for batch, part in enumerate(self.parts):
            use = partial(_add, found, part, until, also)
            with suppress(ReachedError), reading(self.model, [self.index], use):
                output = self.block(self.states.get(self.index, batch), **self.options[batch])
                if until is None and self.goes_on:
                    self.states.put(self.index + 1, batch, output)
                    if drops:
                        self.states.drop(self.index, batch)


def _visit_mixture(walk: _Walk, visit: Visit, *, by_role: bool) -> None:
    """Collect the Hessians of a block with experts: those of attention as in other blocks, the experts' one after another.

    The first call brings the norms of all, with which inputs that are not finite are found before anything changes.
    """
    model, index = walk.model, walk.index
    found = new_statistics(model, index, hessian=False)
    found |= _of_role(model, index, "o") if by_role else {role: _of_tensor(model, index, role) for role in ("o", "q")}
    mixture = Mixture(walk.block, walk.states, walk.parts)
    walk.through(found, None, also=mixture.keep)
    visit(index, found)
    norms: dict[Role, InputStatistics] = {role: found[role] for role in ("gate", "down")}
    del found
    for served in hessians(mixture, norms, give_away=by_role):
        visit(index, served)
        del served
    mixture.drop()
    if by_role:
        found = _of_role(model, index, "q")
        walk.through(found, "q")
        visit(index, found)


def _of_tensor(model: LanguageModel, block: int, role: Role) -> InputStatistics:
    """Make empty statistics of one tensor, with a Hessian that stays."""
    linear = next(layer.module for layer in model.by_block[block] if layer.role == role)
    return InputStatistics(linear.in_features, hessian=True, device=linear.weight.device)


def _of_role(model: LanguageModel, block: int, role: Role) -> dict[Role, InputStatistics]:
    """Make empty statistics of one Hessian; the first of a block comes with the norms of all tensors.

    Inputs that are not finite are then found in the order of the layers, and before any of them is changed.
    """
    found = new_statistics(model, block, hessian=False) if role == LAST_FIRST[0] else {}
    readers = [layer.module for layer in model.by_block[block] if READS[layer.role] == role]
    found[role] = OneHessian(readers[0].in_features, device=readers[0].weight.device, readers=len(readers))
    return found


def _add(
    found: dict[Role, InputStatistics],
    weight: Tensor | None,
    until: Role | None,
    also: Callable[[Read], None] | None,
    read: Read,
) -> None:
    """Add what one layer read; behind the last one that is wanted, end the pass."""
    add_read(found, read, weight)
    if also is not None:
        also(read)
    if read.role == until:
        raise ReachedError


def check_weights(model: LanguageModel, weight: Tensor | None) -> None:
    """Raise `InputError` when token weights by layer or head are those of another model."""
    if weight is None or weight.dim() == 2:
        return
    wanted = (1 + model.layers[-1].block, model.network.config.num_attention_heads)
    got = (len(weight), weight.shape[2] if weight.dim() == 4 else wanted[1])
    if got != wanted:
        rule = f"token weights must be for {wanted[0]} layers of {wanted[1]} heads"
        raise InputError(f"{rule}, got {got[0]} and {got[1]}: measure them on this model")


def check_masses(model: LanguageModel, mass: Float[Tensor, "layer sample head position"]) -> None:
    """Raise `InputError`, naming the first layer, when attention masses are not finite: then its input was not."""
    finite = mass.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        name = next(layer.name for layer in model.layers if layer.block == bad)
        raise InputError(f"inputs of {name} must be finite, got some that are not: check the checkpoint and its dtype")


def of_layer(weight: Tensor | None, index: int) -> Tensor | None:
    """Return one layer's token weights, `[sample, position]` or `[sample, head, position]`."""
    return weight if weight is None or weight.dim() == 2 else weight[index]

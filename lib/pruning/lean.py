"""Prune block by block in little memory: hidden states off the device, one Hessian at a time; the weights are `pruner.prune_`'s.

A calibration of 128 windows of 2048 tokens leaves 2 GiB of hidden states between the blocks of LLaDA-8B in bfloat16. Here one
batch of them is on the device at a time; the others wait in host memory or on disk.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.calibration import one_shot, sets
from lib.calibration.hidden_states import HiddenStates, States, waiting
from lib.calibration.statistics import (  # fmt: skip
    READS,
    CalibrationSet,
    InputStatistics,
    ReachedError,
    add_weighted,
    first_inputs,
    new_statistics,
    of_layer,
    reading,
    statistics_of,
)
from lib.core.errors import require
from lib.models.language_model import LanguageModel, Role
from lib.pruning import pruner
from lib.pruning.importances import check_finite
from lib.pruning.methods import Method, Target

# From the last tensor that a block reads to the first: what one of them holds does not depend on the matrices that read it or a
# later one, so those may be written at once, and all statistics are still those of the block as it was.
LAST_FIRST: tuple[Role, ...] = ("down", "gate", "o", "q")


def prune_(
    model: LanguageModel,
    method: Method,
    target: Target,
    *,
    windows: Int[Tensor, "window position"] | None = None,
    seed: int = 0,
    batch_size: int = 4,
    memory_budget: int = one_shot.MEMORY_BUDGET,
    states: States = "cpu",
    by_role: bool = True,
    scratch: Path | str | None = None,
) -> None:
    """Prune every linear layer of a model in place, as `pruner.prune_` does and bit for bit with its result, in less memory.

    On the device there are then a block's matrices, one batch of what it reads and computes, and one Hessian with what SparseGPT
    makes of it: where a model's matrices are read when they are used (`streaming.load`); of one in memory all matrices are there
    too. Methods that read nothing, and those of one pass over the dense model, go to `pruner.prune_`: they keep no hidden states.

    Token weights are measured before the walk, by passes through the whole model that keep no states of it but what the weights
    are made of: one number a token, by layer or head one for each of these; for a weighting by instability the masses of every
    layer, head and token in host memory, 8 MiB a sample of 2048 tokens for LLaDA-8B. `states` does not change these.

    Args:
        model: the dense model, streamed or not; its weights change.
        method: how.
        target: how much.
        windows: clean token windows, for Wanda and SparseGPT.
        seed: of noise, sampling and random choices.
        batch_size: samples at one time; as much as is on the device at once.
        memory_budget: bytes of layer inputs that a method of one pass may keep, see `one_shot.one_shot_statistics`.
        states: where hidden states wait between blocks.
        by_role: collect SparseGPT's Hessians one after another, each with a pass through the part of the block before it. The
            default trades those passes for the memory of the others; without it all four exist at the same time.
        scratch: where to make a folder for states on disk, as many bytes as all of them and one batch (twice as many for a method
            that is not sequential); that of the system when None. It is removed at the end, also after an error.

    Raises:
        InputError: as `pruner.prune_`; another place for states, or a scratch folder that is not there.
    """
    require(states in get_args(States), f"states must be one of {get_args(States)}", repr(states), "disk takes the least memory")
    if windows is None or not method.needs_calibration or pruner.is_one_pass(method):
        given = {"windows": windows, "seed": seed, "batch_size": batch_size, "memory_budget": memory_budget}
        pruner.prune_(model, method, target, **given)
        return
    pruner.check(model, target)
    with waiting(states, model.device, scratch) as place:  # before hours of work, should it be impossible
        built = sets.build(model, windows, inputs=method.inputs, weighting=method.weighting, seed=seed, batch_size=batch_size)
        if built.by_head and method.importance == "sparsegpt":
            pruner.prune_on_(model, method, target, built)  # refuses it in the same words
        _walk_(model, method, target, built, place, batch_size=batch_size, by_role=by_role)


class _OneHessian(InputStatistics):
    """Statistics whose Hessian takes the place of their outer products, and is given away to the last layer that reads it.

    SparseGPT works on a copy: the matrix itself is then gone while the copy is inverted, which is the peak of a block.
    """

    def __init__(self, features: int, *, device: torch.device, readers: int) -> None:
        super().__init__(features, hessian=True, device=device)
        self._readers, self._is_hessian = readers, False

    def hessian(self) -> Float[Tensor, "feature feature"]:
        """Return the Hessian, as often as there are readers; nothing may be added afterwards."""
        found = cast(Tensor, self.products)
        if not self._is_hessian:
            found.mul_(2.0 / self.samples)
            self._is_hessian = True
        self._readers -= 1
        if not self._readers:
            self.products = None
        return found


@dataclass(frozen=True)
class _Walk:
    """What is the same for all blocks; `options` is what a block is called with beside the hidden states."""

    model: LanguageModel
    method: Method
    target: Target
    calibration_set: CalibrationSet
    batch_size: int
    states: HiddenStates
    options: dict[str, Any]

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-len(self.calibration_set.input_ids) // self.batch_size)


@torch.no_grad()
def _walk_(
    model: LanguageModel,
    method: Method,
    target: Target,
    built: CalibrationSet,
    states: HiddenStates,
    *,
    batch_size: int,
    by_role: bool,
) -> None:
    """Prune block after block: `calibration.stream` with `pruner.prune_on_`'s visit, whose order of sums it keeps."""
    options = first_inputs(model, built.input_ids, states, batch_size)
    walk = _Walk(model, method, target, built, batch_size, states, options)
    blocks = cast(Any, model.network.get_decoder()).layers
    one_by_one: list[tuple[Role, ...]] = [(role,) for role in LAST_FIRST]
    turns = one_by_one if by_role and method.importance == "sparsegpt" else [LAST_FIRST]
    for index, block in enumerate(blocks):
        ends = index + 1 == len(blocks)
        for turn in turns:
            found = _statistics(walk, index, turn, one_by_one=len(turns) > 1)
            passes_on = turn == turns[0] and not (method.sequential or ends)
            _collect(walk, index, block, found, until=None if passes_on else turn[0])
            _prune_(walk, index, turn, found)
            del found  # before the next Hessian exists
        for batch in range(walk.batches):
            if method.sequential and not ends:
                states.put(index + 1, batch, block(states.get(index, batch), **walk.options))
            states.drop(index, batch)


def _statistics(walk: _Walk, index: int, turn: tuple[Role, ...], *, one_by_one: bool) -> dict[Role, InputStatistics]:
    """Make empty statistics of what a turn collects.

    The first turn of several collects the norms of all tensors too: inputs that are not finite are then found in the order of the
    layers, and before any of them is pruned.
    """
    model, by_head = walk.model, walk.calibration_set.by_head
    if not one_by_one:
        return new_statistics(model, index, hessian=walk.method.importance == "sparsegpt", by_head=by_head)
    found = new_statistics(model, index, hessian=False) if turn[0] == LAST_FIRST[0] else {}
    readers = [layer.module for layer in model.layers if layer.block == index and READS[layer.role] == turn[0]]
    found[turn[0]] = _OneHessian(readers[0].in_features, device=readers[0].weight.device, readers=len(readers))
    return found


def _collect(walk: _Walk, index: int, block: Any, found: dict[Role, InputStatistics], *, until: Role | None) -> None:
    """Add all batches to the statistics.

    Args:
        walk: what is the same for all blocks.
        index: of the block.
        block: the module.
        found: what grows.
        until: the last tensor that is wanted, where a pass ends; None goes on to the outputs, which the next block reads.
    """
    weight, size = of_layer(walk.calibration_set.token_weight, index), walk.batch_size
    for batch in range(walk.batches):
        part = None if weight is None else weight[batch * size : (batch + 1) * size]
        use = partial(_add, found, part, until)
        with suppress(ReachedError), reading(walk.model, [index], use):
            outputs = block(walk.states.get(index, batch), **walk.options)
            walk.states.put(index + 1, batch, outputs)
            del outputs


def _add(found: dict[Role, InputStatistics], weight: Tensor | None, until: Role | None, read: tuple[int, Role, Tensor]) -> None:
    """Add what one layer read, and end the pass behind the last one that is wanted."""
    _, role, inputs = read
    add_weighted(found, role, inputs, weight)
    if role == until:
        raise ReachedError


def _prune_(walk: _Walk, index: int, turn: tuple[Role, ...], found: dict[Role, InputStatistics]) -> None:
    """Prune the layers that read the tensors of a turn, in the order of the model."""
    layers = [layer for layer in walk.model.layers if layer.block == index]
    for layer in layers:
        if READS[layer.role] in found:
            check_finite(statistics_of(found, layer.role).squares, name=layer.name, what="inputs")
    pruner.prune_layers_([layer for layer in layers if READS[layer.role] in turn], walk.method, walk.target, found)

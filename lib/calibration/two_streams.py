"""What layers read of the same text in the dense model and in the half-compressed one, block by block, and both multiplied."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lib.calibration.hidden_states import HiddenStates, first_inputs
from lib.calibration.reads import Read, add_read, new_statistics, reading
from lib.calibration.statistics import CalibrationSet, check_weights, of_layer
from lib.calibration.sums import InputStatistics, spread
from lib.core.errors import InputError, require
from lib.models.language_model import LanguageModel, Role
from lib.models.layers.anatomy import blocks_in

Crosses = dict[Role, Float[Tensor, "feature feature"]]
Visit = Callable[[int, dict[Role, InputStatistics], Crosses], None]


def check_dense(model: LanguageModel) -> None:
    """Raise `InputError` for a mixture of experts, where a token may go to other experts behind changed blocks."""
    rule = "two streams must pass the same matrices"
    require(not model.has_experts, rule, f"the mixture {model.name}", "leave the target unshifted")


@torch.no_grad()
def stream(model: LanguageModel, calibration: CalibrationSet, visit: Visit, *, batch_size: int = 4) -> None:
    """Walk through the blocks with two states of every sample: behind the dense blocks, and behind those that `visit` left.

    Args:
        model: the dense model; `visit` may change a block when it is called for it.
        calibration: what is read, and the token weights, alike for all heads.
        visit: called with the block's index; the statistics, with Hessians, of what it reads behind the changed blocks; and by
            the same roles 2 / samples times the sum of (omega x_dense)(omega x)^T.
        batch_size: samples at one time.

    Raises:
        InputError: token weights by head, weights of another model, or a mixture of experts.

    Source: asymmetric calibration of GPTAQ (arXiv 2504.02692), which collects the same sums.
    """
    if calibration.by_head:
        raise InputError("two streams must weigh tokens alike in all heads, got weights by head: use weights by layer")
    check_dense(model)
    check_weights(model, calibration.token_weight)
    blocks = blocks_in(model.network)
    dense, changed = HiddenStates("device", model.device), HiddenStates("device", model.device)
    options = first_inputs(model, calibration.input_ids, dense, batch_size)
    batches = range(-(-len(calibration.input_ids) // batch_size))
    for batch in batches:
        changed.put(0, batch, dense.get(0, batch))
    for index, block in enumerate(blocks):
        weight = of_layer(calibration.token_weight, index)
        parts = [None] * len(batches) if weight is None else weight.split(batch_size)
        found, crosses = new_statistics(model, index, hessian=True), Crosses()
        for batch, part in zip(batches, parts, strict=True):
            read: dict[Role, Tensor] = {}
            with reading(model, [index], partial(_keep, read)):
                dense.put(index + 1, batch, block(dense.get(index, batch), **options[batch]))
            with reading(model, [index], partial(_add, found, crosses, read, part)):
                block(changed.get(index, batch), **options[batch])
            dense.drop(index, batch)
        visit(index, found, {role: cross * (2.0 / found[role].samples) for role, cross in crosses.items()})
        for batch in batches:
            changed.put(index + 1, batch, block(changed.get(index, batch), **options[batch]))
            changed.drop(index, batch)


def _keep(kept: dict[Role, Tensor], read: Read) -> None:
    """Remember what a layer read."""
    kept[read.role] = read.inputs


def _add(
    found: dict[Role, InputStatistics], crosses: Crosses, dense: dict[Role, Tensor], weight: Tensor | None, read: Read
) -> None:
    """Add what one layer read in the changed model, alone and with what it read in the dense one."""
    role, inputs = read.role, read.inputs
    if role not in found:
        return
    add_read(found, read, weight)
    omega = 1.0 if weight is None else spread(weight, inputs.shape[-1]).to(inputs.device)
    both = ((values.float() * omega).flatten(0, 1) for values in (dense[role], inputs))
    first, second = both
    product = first.T @ second
    crosses[role] = crosses[role] + product if role in crosses else product

"""Statistics of all blocks of the dense model at once, for one-shot methods: token weights and norms from one forward pass."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.attention import masses
from lib.calibration.hidden_states import States, waiting
from lib.calibration.reads import Read, add_read, new_statistics, reading, reads_first
from lib.calibration.statistics import CalibrationSet, Weights, check_masses, check_weights, of_layer, stream
from lib.calibration.sums import InputStatistics, add_shared
from lib.core.errors import require
from lib.models import experts
from lib.models.language_model import LanguageModel, LinearLayer, Role, network_body, own_mask

LEAST_BUDGET = 2**28  # bytes of kept inputs that are allowed beside the smallest model


def input_bytes(model: LanguageModel, *, samples: int, positions: int) -> int:
    """Return how much memory the inputs of all linear layers of one batch take, in bytes."""
    # `v` reads the same tensor as `q`: it is kept twice by name, not in memory
    chosen = experts.choices(model.network)
    width = sum(_kept_width(model, layer, chosen) for layer in model.layers if reads_first(layer, model.by_block[layer.block]))
    return math.ceil(width * samples * positions) * model.layers[0].module.weight.element_size()


def _kept_width(model: LanguageModel, layer: LinearLayer, chosen: int) -> float:
    """Return how many numbers of a token are kept for a layer: of experts those that it went to, what they share once."""
    if layer.expert is None or layer.expert == "shared":
        return 0 if layer.expert == "shared" and layer.role == "gate" else layer.module.in_features
    there = sum(other.role == "gate" and isinstance(other.expert, int) for other in model.by_block[layer.block])
    return layer.module.in_features * (chosen if layer.role == "down" else 1) / there


@torch.no_grad()
def dense_statistics(
    model: LanguageModel,
    calibration: CalibrationSet,
    *,
    hessian: bool = False,
    batch_size: int = 4,
    states: States = "device",
    scratch: Path | str | None = None,
) -> list[dict[Role, InputStatistics]]:
    """Collect the statistics of every block of a model that does not change meanwhile.

    Args:
        model: the dense model.
        calibration: what it reads, and the token weights.
        hessian: collect outer products too, of all blocks at the same time.
        batch_size: samples at one time.
        states: where hidden states wait between blocks; elsewhere than on the device, one batch of them is there at a time.
        scratch: where to make a folder for states on disk; that of the system when None.

    Returns:
        Statistics by block and reading role.

    Raises:
        InputError: as `calibration.stream`; another place for states, or a scratch folder that is not there.
    """
    collected: list[dict[Role, InputStatistics]] = [{} for _ in model.by_block]
    with waiting(states, model.device, scratch) as place:
        given: dict[str, Any] = {"hessian": hessian, "sequential": False, "batch_size": batch_size, "states": place}
        stream(model, calibration, lambda block, found: _merge_(collected[block], found), **given)
    return collected


def _merge_(known: dict[Role, InputStatistics], found: Mapping[Role, InputStatistics]) -> None:
    """Put statistics of a block that come one after another together: those with a Hessian in the place of norms."""
    for role, new in found.items():
        experts_so_far = known[role].experts if role in known else {}
        if role not in known or new.products is not None:
            known[role] = new
        known[role].experts = {**experts_so_far, **new.experts}


@torch.no_grad()
def shared_statistics(
    model: LanguageModel, input_ids: Int[Tensor, "sample position"], weights: Sequence[Weights | None], *, batch_size: int = 4
) -> list[list[dict[Role, InputStatistics]]]:
    """Collect the statistics of the dense model for several token weights on the same text, from one pass over it.

    Args:
        model: the dense model.
        input_ids: calibration samples, clean or noised.
        weights: as a `CalibrationSet` holds them; None counts all tokens alike.
        batch_size: samples at one time.

    Returns:
        For each of the weights, norms by block and reading role, equal to those of `dense_statistics` but for rounding.

    Raises:
        InputError: weights of another model.
    """
    for weight in weights:
        check_weights(model, weight)
    blocks = range(1 + model.layers[-1].block)
    is_by_head = [weight is not None and weight.dim() == 4 for weight in weights]
    found = [[new_statistics(model, block, hessian=False, by_head=by_head) for block in blocks] for by_head in is_by_head]
    for rows in torch.arange(len(input_ids)).split(batch_size):

        def add(read: Read, rows: Tensor = rows) -> None:
            """Add what one layer read to the statistics of every weight."""
            alike: list[tuple[InputStatistics, Tensor | None]] = []
            for of_weight, weight, by_head in zip(found, weights, is_by_head, strict=True):
                layer = of_layer(weight, read.block)
                part = None if layer is None else layer[rows]
                if by_head or read.routing is not None or read.expert is not None:
                    add_read(of_weight[read.block], read, part)
                elif read.role in of_weight[read.block]:
                    alike.append((of_weight[read.block][read.role], part))
            if alike:
                add_shared([each for each, _ in alike], read.inputs, [part for _, part in alike])

        with reading(model, blocks, add):
            network_body(model)(input_ids=input_ids[rows].to(model.device), use_cache=False)
    return found


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each input feature of a layer, over all tokens."""

    mean: Float[Tensor, "feature"]
    deviation: Float[Tensor, "feature"]


@torch.no_grad()
def dense_moments(
    model: LanguageModel, input_ids: Int[Tensor, "sample position"], roles: Sequence[Role], *, batch_size: int = 4
) -> dict[tuple[int, str], Moments]:
    """Return mean and deviation of what some layers of the dense model read, by (block, role), summed in float64.

    Args:
        model: the dense model.
        input_ids: calibration samples, clean or noised.
        roles: of the layers, each the first reader of its tensor.
        batch_size: samples at one time.

    Raises:
        InputError: a mixture of experts, whose tokens a layer does not read all.
    """
    require(not model.has_experts, "moments must be of dense blocks", f"the mixture {model.name}", "use norms")
    sums: dict[tuple[int, str], Tensor] = {}

    def add(read: Read) -> None:
        """Add sum and sum of squares of what one layer read."""
        place = (read.block, read.role)
        if read.role in roles:
            values = read.inputs.flatten(0, 1).double()
            both = torch.stack([values.sum(0), values.square().sum(0)])
            sums[place] = sums[place] + both if place in sums else both

    with reading(model, range(1 + model.layers[-1].block), add):
        for batch in input_ids.split(batch_size):
            network_body(model)(input_ids=batch.to(model.device), use_cache=False)
    means = {place: both / input_ids.numel() for place, both in sums.items()}
    return {place: Moments(mean, (square - mean**2).clamp(min=0).sqrt()) for place, (mean, square) in means.items()}


@torch.no_grad()
def one_shot_statistics(
    model: LanguageModel,
    input_ids: Int[Tensor, "sample position"],
    weigh: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 4,
    memory_budget: int | None = None,
) -> list[dict[Role, InputStatistics]]:
    """Collect the statistics of every block of the dense model with token weights that its own attention masses decide.

    The weights of a batch are known only after its last layer, so what the linear layers read is kept until then: one forward
    pass a batch. Where that takes more memory than allowed, fewer samples go together; when even one is too much, a second pass
    adds up the statistics. All give the same numbers.

    Args:
        model: the dense model.
        input_ids: calibration samples, clean or noised.
        weigh: masses `[layer, sample, head, position]` to token weights as a `CalibrationSet` holds them.
        batch_size: most samples at one time.
        memory_budget: bytes that may be kept; see `default_budget` when None.

    Returns:
        Statistics by block and reading role; norms only.

    Source: the authors' release makes two passes for each (window, noise level).
    """
    blocks = range(1 + max(layer.block for layer in model.layers))
    budget = default_budget(model) if memory_budget is None else memory_budget
    fitting = budget // input_bytes(model, samples=1, positions=input_ids.shape[1])
    fits, found = fitting > 0, list[dict[Role, InputStatistics]]()
    for batch in input_ids.split(min(batch_size, fitting) if fits else batch_size):
        kept: list[Read] = []
        with masses.record(model) as recorder, reading(model, blocks if fits else (), kept.append):
            network_body(model)(input_ids=batch.to(model.device), use_cache=False)
            mass = recorder.pop()[:, :, :, 0]
        if model.goes_by_blocks:
            mass = masses.per_viewer(mass, own_mask(model, batch.to(model.device)))
        check_masses(model, mass)
        weight = weigh(mass)
        found = found or [new_statistics(model, block, hessian=False, by_head=weight.dim() == 4) for block in blocks]
        add = partial(_add_read, found, weight)
        if not fits:
            with reading(model, blocks, add):
                network_body(model)(input_ids=batch.to(model.device), use_cache=False)
        kept.reverse()
        while kept:  # each is forgotten when it was added
            add(kept.pop())
    return found


def default_budget(model: LanguageModel) -> int:
    """Return how many bytes of kept inputs are small beside the model: half of what its linear layers take, if that is more."""
    weights = sum(layer.module.weight.numel() * layer.module.weight.element_size() for layer in model.layers)
    return max(LEAST_BUDGET, weights // 2)


def _add_read(found: Sequence[dict[Role, InputStatistics]], weight: Tensor, read: Read) -> None:
    """Add what one layer read, weighted, to its statistics."""
    add_read(found[read.block], read, of_layer(weight, read.block))

"""Which experts the router of each block gives every calibration token to, and how much of it each gets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.calibration.statistics import CalibrationSet, check_weights, of_layer
from lib.core.errors import require
from lib.models.experts import experts_of
from lib.models.language_model import LanguageModel, network_body
from lib.models.layers.anatomy import blocks_in


@dataclass(frozen=True)
class Routes:
    """The choices of one router, on the CPU.

    Attributes:
        chosen: experts of every token, samples one after another.
        shares: their weights, as the router gives them.
        experts: how many there are.
    """

    chosen: Int[Tensor, "token choice"] = field(repr=False)
    shares: Float[Tensor, "token choice"] = field(repr=False)
    experts: int

    def counts(self, tokens: Tensor | None = None) -> Int[Tensor, "expert"]:
        """Return how many tokens, all or those marked, went to each expert.

        >>> Routes(torch.tensor([[2, 0], [0, 2], [1, 0]]), torch.ones(3, 2), 4).counts().tolist()
        [3, 1, 2, 0]
        """
        return (self.chosen if tokens is None else self.chosen[tokens]).flatten().bincount(minlength=self.experts)

    def mass(self, weight: Float[Tensor, "token"] | None = None) -> Float[Tensor, "expert"]:
        """Add up what the router gives each expert, every token times its weight.

        >>> Routes(torch.tensor([[2, 0], [0, 2]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 3).mass().tolist()
        [1.5, 0.0, 0.5]
        """
        shares = self.shares.double() if weight is None else self.shares.double() * weight.double()[:, None]
        return torch.zeros(self.experts, dtype=torch.float64).index_add_(0, self.chosen.flatten(), shares.flatten())


@torch.no_grad()
def routes(model: LanguageModel, input_ids: Int[Tensor, "sample position"], *, batch_size: int = 4) -> dict[int, Routes]:
    """Return the choices of every router on some samples.

    Args:
        model: any loaded model; as it is.
        input_ids: samples, clean or noised.
        batch_size: samples at one time.

    Returns:
        By block, of those with experts: none for a dense model.
    """
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {block: [] for block in model.by_block if model.has_experts_in(block)}
    blocks = blocks_in(model.network) if parts else ()
    lists = {block: cast(torch.nn.ModuleList, experts_of(blocks[block])) for block in parts}
    handles = [lists[block].register_forward_pre_hook(partial(_keep, parts[block])) for block in parts]
    try:
        for batch in input_ids.split(batch_size) if parts else ():
            network_body(model)(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        block: Routes(torch.cat([chosen for chosen, _ in own]), torch.cat([shares for _, shares in own]), len(lists[block]))
        for block, own in parts.items()
    }


def _keep(parts: list[tuple[Tensor, Tensor]], _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    parts.append((inputs[1].cpu(), inputs[2].cpu()))


def routed_mass(model: LanguageModel, calibration: CalibrationSet, *, batch_size: int = 4) -> dict[int, Float[Tensor, "expert"]]:
    """Add up what each expert gets of the tokens of a calibration, each token times its weight.

    Args:
        model: the dense model.
        calibration: what is read, and the token weights: of sinks, with the complement of their score; none counts all alike.
        batch_size: samples at one time.

    Returns:
        Router weights added up, in float64 on the CPU, by block.

    Raises:
        InputError: a model without experts, or token weights of another model.
    """
    require(model.has_experts, "routed mass must be of a mixture of experts", model.name, "use another structured method")
    check_weights(model, calibration.token_weight)
    found: Mapping[int, Routes] = routes(model, calibration.input_ids, batch_size=batch_size)
    masses = {}
    for block, own in found.items():
        weight = of_layer(calibration.token_weight, block)
        flat = None if weight is None else (weight.mean(1) if weight.dim() == 3 else weight).flatten().cpu()
        masses[block] = own.mass(flat)
    return masses

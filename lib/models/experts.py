"""Mixtures of experts as linear layers: every expert's gate, up and down matrix is a view of the stacked tensors.

transformers stacks the matrices of all experts in two tensors, `gate_up_proj` and `down_proj`, while files hold them one by one.
What is put in the place of a stack computes the same and has the names of the files, so each matrix can be read, pruned,
streamed and written like any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.core.errors import require

SHARED = ("shared_experts", "shared_expert")  # what families call the expert that every token passes
MATRICES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Routing:
    """Which tokens go to which expert, expert by expert.

    Attributes:
        tokens: flat number of the token, all of the first expert first, in rising order within an expert.
        slots: which of the token's choices it was.
        counts: tokens of each expert.
    """

    tokens: Int[Tensor, "routed"]
    slots: Int[Tensor, "routed"]
    counts: tuple[int, ...]

    def parts(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has tokens, and where they stand."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


def routing_of(top_k_index: Int[Tensor, "token choice"], *, experts: int) -> Routing:
    """Sort the router's choices by expert.

    Args:
        top_k_index: chosen experts of every token; a number from `experts` on is no choice.
        experts: how many there are.

    >>> routing_of(torch.tensor([[2, 0], [0, 2]]), experts=3).counts
    (2, 0, 2)
    """
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=experts)[:experts].tolist()
    order = order[: sum(counts)]
    return Routing(order // top_k_index.shape[1], order % top_k_index.shape[1], tuple(counts))


def intermediate(mlp: Any, hidden: Float[Tensor, "*row hidden"]) -> Float[Tensor, "*row width"]:
    """Return what the down matrix of a gated MLP reads."""
    return mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)


class Expert(nn.Module):
    """One expert: a gated MLP of three linear layers."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def intermediate(self, hidden: Float[Tensor, "row hidden"]) -> Float[Tensor, "row width"]:
        """Return what the down matrix reads."""
        return intermediate(self, hidden)

    def forward(self, hidden: Float[Tensor, "row hidden"]) -> Float[Tensor, "row hidden"]:
        """Apply the MLP."""
        return self.down_proj(self.intermediate(hidden))


class ExpertList(nn.ModuleList):
    """The experts of one block, called as transformers calls its stacks."""

    def forward(
        self,
        hidden_states: Float[Tensor, "token hidden"],
        top_k_index: Int[Tensor, "token choice"],
        top_k_weights: Float[Tensor, "token choice"],
    ) -> Float[Tensor, "token hidden"]:
        """Add up the weighted outputs of the chosen experts.

        Args:
            hidden_states: what the block's MLP reads.
            top_k_index: chosen experts of every token.
            top_k_weights: their weights.

        Source: sums are in float32 and rounded once, as LLaDA 2's own code does; transformers sums in the dtype of the network.
        """
        precise = torch.promote_types(hidden_states.dtype, torch.float32)
        total = torch.zeros_like(hidden_states, dtype=precise)
        routing = routing_of(top_k_index, experts=len(self))
        for expert, where in routing.parts():
            tokens, slots = routing.tokens[where], routing.slots[where]
            found = self[expert](hidden_states[tokens]).to(precise)
            total.index_add_(0, tokens, found * top_k_weights[tokens, slots, None].to(precise))
        return total.to(hidden_states.dtype)


def as_linears_(network: PreTrainedModel) -> PreTrainedModel:
    """Put lists of linear layers in the place of all stacks of experts; nothing is copied, and what is a list already stays.

    Args:
        network: with or without experts, also on the meta device.

    Returns:
        The network. Its names of experts' weights are those of checkpoints (`mlp.experts.3.up_proj.weight`), which transformers
        reads.

    Raises:
        InputError: a stack of another kind than gate and up rows, then down.
    """
    for name, module in list(network.named_modules()):
        if name.rpartition(".")[2] != "experts" or isinstance(module, ExpertList):
            continue
        stacks = dict(module.named_parameters(recurse=False))
        fits = stacks.keys() == {"gate_up_proj", "down_proj"} and all(each.dim() == 3 for each in stacks.values())
        fits = fits and _is_concatenated(module, *(stacks["gate_up_proj"].shape[1:], stacks["down_proj"].shape[1:]))
        rule = f"{name} must stack gate and up rows, and down, without biases"
        require(fits, rule, ", ".join(sorted(stacks)) or type(module).__name__, "this family's experts are not supported")
        network.set_submodule(name, _list_of(module))
    return network


def _is_concatenated(module: nn.Module, both: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Tell whether gate rows come first, then up rows, each a matrix of output by input features."""
    return bool(getattr(module, "is_concatenated", True)) and both == (2 * down[1], down[0])


def _list_of(stack: nn.Module) -> ExpertList:
    both, down = cast(Any, stack).gate_up_proj.detach(), cast(Any, stack).down_proj.detach()
    width, act_fn = down.shape[2], cast(Any, stack).act_fn
    made = [Expert(both[index, :width], both[index, width:], down[index], act_fn) for index in range(len(down))]
    return ExpertList(made).train(stack.training)


def _linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer whose weight is the given tensor."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def experts_of(block: nn.Module) -> ExpertList | None:
    """Return the experts of a decoder block; None for a dense one.

    Raises:
        InputError: they are still a stack.
    """
    found = getattr(getattr(block, "mlp", None), "experts", None)
    rule = "experts must be lists of linear layers"
    require(found is None or isinstance(found, ExpertList), rule, type(found).__name__, "call as_linears_ first")
    return found


def shared_expert(block: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the expert that every token passes, and its name in the block; None where there is none."""
    mlp = getattr(block, "mlp", None)
    found = next((name for name in SHARED if hasattr(mlp, name)), None)
    return None if found is None else (f"mlp.{found}", getattr(mlp, found))


def choices(network: PreTrainedModel) -> int:
    """Return how many experts a token goes to; 0 for a network without experts."""
    there = any(isinstance(module, ExpertList) for module in network.modules())
    return int(network.config.num_experts_per_tok) if there else 0

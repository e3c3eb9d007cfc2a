"""A loaded network with what this project asks of it: its prunable layers, its tokenizer, and logits where they are wanted."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.models.experts import experts_of, shared_expert

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
# Who may look at whom: everybody at everybody; at the own and earlier blocks; causally, but for the open block, which sees itself
# whole; at earlier positions only.
Attention = Literal["full", "block-causal", "context-causal", "causal"]
BlockOrigin = Literal["start", "prompt"]
ExpertNumber = int | Literal["shared"]

ROLES: dict[Role, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
MLP: tuple[Role, ...] = ("gate", "up", "down")


@dataclass(frozen=True)
class LinearLayer:
    """One prunable matrix: block number, role in it, parameter name, the module, and whose expert's it is, if any.

    `expert` is a number for those that the router chooses, and `"shared"` for the one that every token passes.
    """

    block: int
    role: Role
    name: str
    module: torch.nn.Linear = field(repr=False, compare=False)
    expert: ExpertNumber | None = None


@dataclass(frozen=True)
class LanguageModel:
    """A loaded checkpoint, diffusion or autoregressive.

    Attributes:
        network: `LlamaForCausalLM` or `Qwen2ForCausalLM` in evaluation mode.
        tokenizer: None when the folder has none.
        mask_token_id: None for an autoregressive model.
        logit_shift: 1 when the output at position i - 1 predicts position i (Dream and autoregressive models), else 0.
        is_causal: whether attention looks at earlier positions only.
        layers: the prunable linear layers, block by block in the order q k v o gate up down; where a block has experts, gate up
            down of each, then of the shared one. Routers and their biases are none.
        fingerprint: hash of config and weights.
        attention: which keys a query may see.
        block_length: positions of a block where attention goes by blocks, else None.
        block_origin: whether blocks are counted from the first position or from the prompt's end.
        stop_token_ids: tokens that end a text; empty when unknown.
        family: name of the family in the registry.
    """

    name: str
    source: ModelSource
    network: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False)
    mask_token_id: int | None
    logit_shift: int
    is_causal: bool
    layers: tuple[LinearLayer, ...] = field(repr=False)
    fingerprint: str
    attention: Attention = "full"
    block_length: int | None = None
    block_origin: BlockOrigin = "prompt"
    stop_token_ids: tuple[int, ...] = ()
    family: str = ""

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.network.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Number of weights, embeddings included."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @cached_property
    def by_block(self) -> dict[int, tuple[LinearLayer, ...]]:
        """The linear layers of each block, in their order."""
        found: dict[int, list[LinearLayer]] = {}
        for layer in self.layers:
            found.setdefault(layer.block, []).append(layer)
        return {block: tuple(layers) for block, layers in found.items()}

    @property
    def has_experts(self) -> bool:
        """Whether a router chooses some of the layers."""
        return any(map(self.has_experts_in, self.by_block))

    def has_experts_in(self, block: int) -> bool:
        """Tell whether a block is a mixture of experts."""
        return any(layer.expert is not None for layer in self.by_block[block])

    def describe(self) -> dict[str, object]:
        """Return what a result file records about the model."""
        return {
            "name": self.name,
            "source": self.source.source,
            "revision": self.source.revision,
            "fingerprint": self.fingerprint[:16],
            "parameters": self.num_parameters,
            "dtype": str(self.network.dtype).removeprefix("torch."),
            "kind": "autoregressive" if self.is_causal else "masked diffusion",
        }


def tokenizer_of(model: LanguageModel) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer.

    Raises:
        InputError: the checkpoint came without one, so it cannot be given text.
    """
    if model.tokenizer is None:
        raise InputError(f"a model that reads text must bring its tokenizer, got none with {model.name}: add its files")
    return model.tokenizer


def linear_layers(network: PreTrainedModel) -> tuple[LinearLayer, ...]:
    """Return the table of prunable linear layers by block, role and expert.

    Raises:
        InputError: nothing to prune under the expected names, or experts that are not linear layers yet.
    """
    found = []
    for block, layer in enumerate(cast(Any, network.get_decoder()).layers):
        for role, path, expert in _places(layer):
            module = cast(torch.nn.Linear, layer.get_submodule(path))
            found.append(LinearLayer(block, role, f"model.layers.{block}.{path}.weight", module, expert))
    if not found:
        raise InputError("a network must have decoder blocks to prune, got none: check num_hidden_layers in its config")
    return tuple(found)


def _places(block: torch.nn.Module) -> Iterator[tuple[Role, str, ExpertNumber | None]]:
    """Yield role, path in the block and expert of every prunable matrix of a decoder block."""
    experts, shared = experts_of(block), shared_expert(block)
    for role, path in ROLES.items():
        if experts is None or role not in MLP:
            yield role, path, None
    owners: dict[ExpertNumber, str] = {number: f"mlp.experts.{number}" for number in range(len(experts or ()))}
    if shared is not None:
        owners["shared"] = shared[0]
    for owner, path in owners.items():
        for role in MLP:
            yield role, f"{path}.{role}_proj", owner


@torch.inference_mode()
def logits_at(
    model: LanguageModel,
    input_ids: Int[Tensor, "batch position"],
    where: Bool[Tensor, "batch position"],
    *,
    attention_mask: Int[Tensor, "batch position"] | None = None,
) -> Float[Tensor, "selected vocab"]:
    """Run the network and the LM head only where a prediction is wanted.

    Args:
        model: any loaded model.
        input_ids: token ids, masks included.
        where: positions whose token is to be predicted, in row-major order of the result.
        attention_mask: 1 for real tokens, 0 for padding.

    Returns:
        Float32 logits that predict the tokens at the chosen positions. With a logit shift of 1 position i is predicted by the
        output at i - 1, and position 0 keeps its own (Dream's rule).
    """
    hidden = network_body(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    if model.logit_shift:
        hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
    head = cast(torch.nn.Linear, model.network.get_output_embeddings())
    return head(hidden[where]).float()


def network_body(model: LanguageModel) -> Callable[..., Any]:
    """Return the network without its LM head."""
    return cast(Callable[..., Any], model.network.get_decoder())

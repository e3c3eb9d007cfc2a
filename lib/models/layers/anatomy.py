"""Names of blocks, matrices and head in transformers' networks, and the table of prunable matrices that follows from them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from lib.core.errors import InputError, require
from lib.models.experts import experts_of, shared_expert

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
ExpertNumber = int | Literal["shared"]
MLP: tuple[Role, ...] = ("gate", "up", "down")


@dataclass(frozen=True)
class Anatomy:
    """What a kind of network calls its parts.

    Attributes:
        blocks: list of blocks, from the network.
        inside: the same, from the body, which is the network without its head.
        roles: prunable matrices of a block, from the block, in the order of the table.
        attention: attention of a block, from the block.
        head: the matrix of the head.
        embedding: the matrix of the embedding.
    """

    blocks: str
    inside: str
    roles: Mapping[Role, str]
    attention: str
    head: str
    embedding: str


DECODER = Anatomy(
    "model.layers",
    "layers",
    {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    "self_attn",
    "lm_head.weight",
    "model.embed_tokens.weight",
)
# No gate: what `up` gives goes through the activation alone. Norms stand behind attention and MLP, biases are everywhere.
DISTILBERT = Anatomy(
    "distilbert.transformer.layer",
    "transformer.layer",
    {
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
    },
    "attention",
    "vocab_projector.weight",
    "distilbert.embeddings.word_embeddings.weight",
)


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


def anatomy_of(config: object) -> Anatomy:
    """Return the names of a kind of network.

    Args:
        config: the network's; whatever is no encoder is named as a Llama is.

    >>> anatomy_of(object()) is DECODER
    True
    """
    return DISTILBERT if getattr(config, "model_type", None) == "distilbert" else DECODER


def is_encoder(network: object) -> bool:
    """Tell whether a network is an encoder: norms behind, biases, no gate, learned positions, no cache of keys and values."""
    return anatomy_of(getattr(network, "config", None)) is DISTILBERT


def require_decoder(network: object, what: str, *, name: str, instead: str) -> None:
    """Refuse an encoder.

    Args:
        network: any.
        what: is to be done, with its article.
        name: of the model.
        instead: what to do with an encoder.

    Raises:
        InputError: an encoder.
    """
    require(not is_encoder(network), f"{what} must be of a decoder", f"the encoder {name}", instead)


def blocks_in(network: Any) -> torch.nn.ModuleList:
    """Return the blocks of a network, from the first to the last."""
    body = network.get_decoder()
    return cast(torch.nn.ModuleList, body.transformer.layer if is_encoder(network) else body.layers)


def head_of(network: Any) -> Callable[[Float[Tensor, "*position feature"]], Float[Tensor, "*position word"]]:
    """Return what turns the body's output into logits: a matrix, or in an encoder a layer and a matrix."""
    if not is_encoder(network):
        return network.get_output_embeddings()
    return lambda hidden: network.vocab_projector(network.vocab_layer_norm(network.activation(network.vocab_transform(hidden))))


def number_attention_(network: PreTrainedModel) -> PreTrainedModel:
    """Tell every attention of an encoder which layer it is in, as those of decoders know themselves."""
    if is_encoder(network):
        for index, block in enumerate(blocks_in(network)):
            cast(Any, block).attention.layer_idx = index
    return network


def linear_layers(network: PreTrainedModel) -> tuple[LinearLayer, ...]:
    """Return the table of prunable linear layers by block, role and expert.

    Raises:
        InputError: nothing to prune under the expected names, or experts that are not linear layers yet.
    """
    names, found = anatomy_of(network.config), []
    for block, layer in enumerate(blocks_in(network)):
        for role, path, expert in _places(layer, names):
            module = cast(torch.nn.Linear, layer.get_submodule(path))
            found.append(LinearLayer(block, role, f"{names.blocks}.{block}.{path}.weight", module, expert))
    if not found:
        raise InputError("a network must have decoder blocks to prune, got none: check num_hidden_layers in its config")
    return tuple(found)


def _places(block: torch.nn.Module, names: Anatomy) -> Iterator[tuple[Role, str, ExpertNumber | None]]:
    """Yield role, path in the block and expert of every prunable matrix of a block."""
    experts, shared = (None, None) if names is DISTILBERT else (experts_of(block), shared_expert(block))
    for role, path in names.roles.items():
        if experts is None or role not in MLP:
            yield role, path, None
    owners: dict[ExpertNumber, str] = {number: f"mlp.experts.{number}" for number in range(len(experts or ()))}
    if shared is not None:
        owners["shared"] = shared[0]
    for owner, path in owners.items():
        for role in MLP:
            yield role, f"{path}.{role}_proj", owner

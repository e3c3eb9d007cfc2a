"""Build the smaller network that structured pruning leaves: dense matrices of smaller shape that reload like any checkpoint."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.models import experts
from lib.models.language_model import LanguageModel, linear_layers
from lib.models.layers import attention
from lib.models.layers.anatomy import is_encoder
from lib.pruning import structured
from lib.pruning.importances import check_finite
from lib.pruning.sparsegpt import DAMPING
from lib.pruning.structured import HeadShape

BIAS_FLAGS = ("attention_bias", "mlp_bias")  # with which a configuration gives o and down a bias


def head_shape(model: LanguageModel) -> HeadShape:
    """Return how the attention of a model is divided into heads."""
    config = model.network.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return HeadShape(config.num_attention_heads, config.num_key_value_heads, width)


def refusal(model: LanguageModel) -> str | None:
    """Return why heads and channels of a model cannot be cut out; None where they can."""
    if is_encoder(model.network):
        return f"{model.name} is an encoder, whose class has one width for heads and states"
    return f"{model.name} is a mixture of experts, which loses whole experts" if model.has_experts else None


def choose(
    model: LanguageModel, *, sparsity: float, input_norms: Mapping[tuple[int, str], Tensor] | None = None
) -> tuple[list[Int[Tensor, "group"]], list[Int[Tensor, "channel"]]]:
    """Choose the key-value groups and MLP channels to keep in every block, as many in each.

    Args:
        model: the dense model.
        sparsity: share of groups and of channels to remove, each rounded down.
        input_norms: norms of the input features by (block, role) for the roles `o` and `down`; None ranks by magnitude alone.

    Returns:
        Kept groups and kept channels by block.

    Raises:
        InputError: bad sparsity, nothing left, weights and norms that are not finite, a mixture of experts, or an encoder.

    Source: Wanda-sp (arXiv 2312.11983) per block; the paper's structured baseline is not named.
    """
    reason = refusal(model)
    require(reason is None, "heads and channels must be those of dense blocks", str(reason), "use expert_removal")
    shape, groups, channels = head_shape(model), [], []
    for layer in model.layers:
        if layer.role not in ("o", "down"):
            continue
        norm = None if input_norms is None else input_norms[layer.block, layer.role]
        check_finite(layer.module.weight, name=layer.name, what="weights")
        columns = structured.column_importance(layer.module.weight.detach(), norm)
        check_finite(columns, name=layer.name, what="importances")
        if layer.role == "o":
            groups.append(structured.kept_units(structured.group_importance(columns, shape=shape), sparsity=sparsity))
        else:
            channels.append(structured.kept_units(columns, sparsity=sparsity))
    return groups, channels


def compensated(
    model: LanguageModel,
    groups: Sequence[Int[Tensor, "_group"]],
    channels: Sequence[Int[Tensor, "_channel"]],
    *,
    hessians: Mapping[tuple[int, str], Tensor] | None = None,
    means: Mapping[tuple[int, str], Tensor] | None = None,
    damping: float = DAMPING,
) -> dict[str, Tensor]:
    """Return new weights, and biases, of the matrices that read what was cut: o and down.

    Args:
        model: the dense model.
        groups: kept key-value groups by block.
        channels: kept MLP channels by block.
        hessians: of the inputs of `o` and `down` by (block, role), about their means where these are given: the columns that stay
            are solved for anew, see `structured.restored`. None leaves them as they are.
        means: of the same inputs: a bias makes up for the mean output that is lost. None adds no bias.
        damping: share of the mean diagonal added to the Hessians.

    Returns:
        Tensors by parameter name, for `shrunk`.
    """
    shape, found = head_shape(model), {}
    for layer in model.layers:
        if layer.role not in ("o", "down"):
            continue
        kept = cast(Tensor, _kept_indices(layer.role, groups[layer.block], channels[layer.block], shape=shape)[1])
        weight, place = layer.module.weight.detach(), (layer.block, layer.role)
        new = weight[:, kept.to(weight.device)].clone()
        if hessians is not None:
            new = structured.restored(weight, kept, hessians[place], damping=damping)
        found[layer.name] = new
        if means is not None:
            bias = structured.lost_mean(weight, new, kept, means[place])
            old = layer.module.bias
            found[f"{layer.name.removesuffix('.weight')}.bias"] = bias if old is None else old.detach() + bias
    return found


@torch.no_grad()
def shrunk(
    model: LanguageModel,
    groups: Sequence[Int[Tensor, "_group"]],
    channels: Sequence[Int[Tensor, "_channel"]],
    *,
    replaced: Mapping[str, Tensor] | None = None,
) -> LanguageModel:
    """Return a new model with only the kept groups and channels.

    Args:
        model: the dense model, left as it is.
        groups: kept key-value groups by block.
        channels: kept MLP channels by block.
        replaced: tensors by parameter name instead of what was cut, see `compensated`. Biases set the configuration's flags
            `attention_bias` and `mlp_bias`, and the biases that come with them are 0.

    Returns:
        The smaller model; `network.save_pretrained` writes a checkpoint that loads without this project.

    Raises:
        InputError: blocks that keep different numbers, or biases, where the configuration cannot express them.
    """
    if len({len(kept) for kept in groups}) != 1 or len({len(kept) for kept in channels}) != 1:
        raise InputError("every block must keep as many groups and channels, got different numbers: prune all blocks alike")
    shape, config = head_shape(model), copy.deepcopy(model.network.config)
    config.head_dim = shape.width
    config.num_attention_heads = len(groups[0]) * shape.heads // shape.kv_heads
    config.num_key_value_heads = len(groups[0])
    config.intermediate_size = len(channels[0])
    weights = dict(model.network.state_dict())
    for layer in model.layers:
        kept = groups[layer.block], channels[layer.block]
        rows, columns = _kept_indices(layer.role, *kept, shape=shape)
        _cut_(weights, layer.name.removesuffix(".weight"), rows, columns)
    weights |= replaced or {}
    if any(name.endswith(".bias") for name in replaced or {}):
        _expect_biases_(config)
    return rebuilt(model, config, weights)


def rebuilt(model: LanguageModel, config: Any, weights: Mapping[str, Any]) -> LanguageModel:
    """Return a model of the same class with another shape and its weights, in the dtype and on the device of the old one.

    Args:
        model: the old one.
        config: with the new shape.
        weights: by name; biases that are new in the configuration and not here are 0.
    """
    network = experts.as_linears_(type(model.network)(config)).eval().requires_grad_(False)
    torch.nn.Module.to(network, device=model.device)
    for parameter in network.parameters():  # not the buffers: rotary frequencies stay in float32, as loaders leave them
        parameter.data = parameter.data.to(model.network.dtype)
    absent = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("proj.bias") and name not in weights}
    network.load_state_dict({**weights, **{name: torch.zeros_like(tensor) for name, tensor in absent.items()}})
    network.set_attn_implementation(attention.NAME)
    return replace(model, network=network, layers=linear_layers(network), fingerprint="")


def bias_refusal(config: Any) -> str | None:
    """Return why a configuration cannot give o and down a bias; None where it can."""
    flag = next((flag for flag in BIAS_FLAGS if not hasattr(config, flag)), None)
    if flag is None:
        return None
    return f"a bias must go with a layout that has the flag {flag}, got {config.model_type}: leave it out"


def _expect_biases_(config: Any) -> None:
    """Set the flags that give o and down a bias."""
    why_not = bias_refusal(config)
    if why_not is not None:
        raise InputError(why_not)
    for flag in BIAS_FLAGS:
        setattr(config, flag, True)


def _kept_indices(
    role: str, groups: Int[Tensor, "group"], channels: Int[Tensor, "channel"], *, shape: HeadShape
) -> tuple[Tensor | None, Tensor | None]:
    """Return the rows and the columns of a matrix that stay; None = all."""
    if role == "q":
        return structured.query_rows(groups, shape=shape), None
    if role in ("k", "v"):
        return structured.key_rows(groups, shape=shape), None
    if role == "o":
        return None, structured.query_rows(groups, shape=shape)
    return (None, channels) if role == "down" else (channels, None)


def _cut_(weights: dict[str, Any], name: str, rows: Tensor | None, columns: Tensor | None) -> None:
    """Cut a matrix, and its bias when rows go."""
    weight = cast(Tensor, weights[f"{name}.weight"])
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        if f"{name}.bias" in weights:
            weights[f"{name}.bias"] = weights[f"{name}.bias"][rows.to(weight.device)].clone()
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    weights[f"{name}.weight"] = weight.clone()

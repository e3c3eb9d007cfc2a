"""A loaded network with what this project asks of it: its prunable layers, its tokenizer, and logits where they are wanted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.checkpoints.facts import MASKED, NoiseKind
from lib.checkpoints.families import Attention, BlockOrigin
from lib.core.config import ModelSource
from lib.core.errors import InputError, require
from lib.models import visibility
from lib.models.finite import require_finite
from lib.models.layers.anatomy import DECODER, LinearLayer, head_of
from lib.models.layers.anatomy import ExpertNumber as ExpertNumber
from lib.models.layers.anatomy import Role as Role
from lib.models.layers.anatomy import linear_layers as linear_layers

ROLES = DECODER.roles
BY_BLOCKS: tuple[Attention, ...] = ("block-causal", "context-causal")


@dataclass(frozen=True)
class LanguageModel:
    """A loaded checkpoint, diffusion or autoregressive.

    Attributes:
        network: a `...ForCausalLM` of transformers in evaluation mode, or an encoder with its masked head.
        tokenizer: None when the folder has none.
        mask_token_id: what is to be written reads so; None for an autoregressive model, and under uniform noise.
        logit_shift: 1 when the output at position i - 1 predicts position i (Dream and autoregressive models), else 0.
        is_causal: whether attention looks at earlier positions only.
        layers: the prunable linear layers, block by block in the order q k v o gate up down (an encoder has no gate); where a
            block has experts, gate up down of each, then of the shared one. Routers and their biases are none.
        fingerprint: hash of config and weights.
        attention: which keys a query may see.
        block_length: positions of a block where attention goes by blocks, else None.
        block_origin: whether blocks are counted from the first position or from the prompt's end.
        stop_token_ids: tokens that end a text; empty when unknown.
        family: name of the family in the registry.
        notes: what is to be said about how it was read, such as an adapter that was merged.
        noise: that a diffusion model was trained with.
        seen_token_ids: tokens that noise never hides and no bound counts, such as an encoder's [CLS] and [SEP].
        generation: what its generation_config.json says, where that is more than its config.json; written again with the model.
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
    notes: tuple[str, ...] = ()
    noise: NoiseKind = MASKED
    seen_token_ids: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.network.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Number of weights, embeddings included."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def goes_by_blocks(self) -> bool:
        """Tell whether attention goes by blocks, so that a pass needs a mask which says where they lie."""
        return self.attention in BY_BLOCKS

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

    @property
    def kind(self) -> str:
        """What kind of model it is, in words."""
        if self.is_causal:
            return "autoregressive"
        return f"{self.noise} diffusion" + (" in blocks" if self.goes_by_blocks else "")

    def describe(self) -> dict[str, object]:
        """Return what a result file records about the model."""
        notes: dict[str, object] = {"notes": list(self.notes)} if self.notes else {}
        return notes | {
            "name": self.name,
            "source": self.source.source,
            "revision": self.source.revision,
            "fingerprint": self.fingerprint[:16],
            "parameters": self.num_parameters,
            "dtype": str(self.network.dtype).removeprefix("torch."),
            "kind": self.kind,
            "family": self.family,
            "attention": self.attention,
        }


def tokenizer_of(model: LanguageModel) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer.

    Raises:
        InputError: the checkpoint came without one, so it cannot be given text.
    """
    if model.tokenizer is None:
        raise InputError(f"a model that reads text must bring its tokenizer, got none with {model.name}: add its files")
    return model.tokenizer


def may_be_noised(model: LanguageModel, ids: Int[Tensor, "*batch position"]) -> Bool[Tensor, "*batch position"]:
    """Tell which tokens of clean texts noise may hide: all but those that the model was always shown."""
    return ~torch.isin(ids, torch.tensor(model.seen_token_ids, device=ids.device, dtype=ids.dtype))


def closing_token(model: LanguageModel) -> int | None:
    """Return the token that ends every row of a model that was always shown it, such as an encoder's [SEP]; None for others."""
    return next((token for token in model.stop_token_ids if token in model.seen_token_ids), None)


def require_diffusion(model: LanguageModel, what: str, *, instead: str) -> None:
    """Raise `InputError` for an autoregressive model.

    Args:
        model: any loaded model.
        what: is to be done, with its article.
        instead: what an autoregressive model takes.
    """
    require(not model.is_causal, f"{what} must use a diffusion model", model.name, instead)


def require_masks(model: LanguageModel, what: str, *, instead: str, remedy: str) -> None:
    """Refuse a model whose text is not written by turning masks into tokens.

    Args:
        model, what, instead: as in `require_diffusion`.
        remedy: what a diffusion model of another noise takes.

    Raises:
        InputError: an autoregressive model, or noise that is not all mask.
    """
    require_diffusion(model, what, instead=instead)
    require(model.noise.is_masked, f"{what} must use masked noise", f"{model.noise} noise in {model.name}", remedy)


@torch.inference_mode()
def logits_at(
    model: LanguageModel,
    input_ids: Int[Tensor, "batch position"],
    where: Bool[Tensor, "batch position"],
    *,
    attention_mask: Int[Tensor, "batch position"] | Bool[Tensor, "_ 1 query key"] | None = None,
) -> Float[Tensor, "selected vocab"]:
    """Run the network and the LM head only where a prediction is wanted.

    Args:
        model: any loaded model.
        input_ids: token ids, masks included.
        where: positions whose token is to be predicted, in row-major order of the result.
        attention_mask: as `network_body` takes it.

    Returns:
        Float32 logits that predict the tokens at the chosen positions. With a logit shift of 1 position i is predicted by the
        output at i - 1, and position 0 keeps its own (Dream's rule).

    Raises:
        InputError: a logit that is no finite number; the message names the layer.
    """

    def run() -> Tensor:
        return network_body(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    hidden = run()
    if model.logit_shift:
        hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
    logits = head_of(model.network)(hidden[where]).float()
    require_finite(logits, run, network=model.network, name=model.name)
    return logits


def network_body(model: LanguageModel) -> Callable[..., Any]:
    """Return the network without its LM head, to be called with `input_ids` by name and, at will, `attention_mask`.

    The mask is 1 for real tokens and 0 for padding, or a ready one, `[batch, 1, query, key]`, True = may look. Where attention
    goes by blocks and no ready mask is given, the model's own takes its place, see `own_mask`. Texts that are longer than the
    network has positions are refused, see `check_length`.
    """
    body = cast(Callable[..., Any], model.network.get_decoder())

    def checked(**given: Any) -> Any:
        """Check the positions, choose the mask, then run the network."""
        ids, places = given["input_ids"], given.get("position_ids")
        check_length(model, ids.shape[1] if places is None else int(places.max()) + 1)
        mask = given.get("attention_mask")
        if model.goes_by_blocks and (mask is None or mask.dim() == 2):
            rule = "a pass with kept keys must be given a ready mask where attention goes by blocks"
            require(given.get("past_key_values") is None, rule, "none", "pass attention_mask [batch, 1, query, key]")
            given |= {"attention_mask": own_mask(model, ids, real=None if mask is None else mask.bool())}
        return body(**given)

    return checked


def check_length(model: LanguageModel, positions: int) -> None:
    """Refuse positions that the network was not made for: rotary embeddings compute any, and what comes out means nothing.

    Args:
        model: any loaded model.
        positions: that a pass needs, from the first of the text.

    Raises:
        InputError: more than `max_position_embeddings` of the configuration, times the factor of stretched rotations.
    """
    config = getattr(model.network, "config", None)
    most, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if most is not None:
        most = int(most * max(rope.get("factor") or 1.0, 1.0))
    rule, remedy = f"a text for {model.name} must have at most {most} positions", "shorten it, or the answer that is asked for"
    require(most is None or positions <= most, rule, str(positions), remedy)


def blocks_of(model: LanguageModel, length: int, *, origin: int | Tensor = 0) -> Int[Tensor, "batch_or_one {length}"]:
    """Return the block of each position of a model whose attention goes by blocks, see `visibility.block_numbers`.

    Args:
        model: such a model.
        length: number of positions.
        origin: where the prompt ends, by row or for all; read only where blocks are counted from there.

    Raises:
        InputError: the model does not say how long a block is.
    """
    known = model.block_length is not None
    require(known, "a model whose attention goes by blocks must say their length", f"none for {model.name}", "set block_length")
    begins = origin if model.block_origin == "prompt" else 0
    return visibility.block_numbers(length, block_length=cast(int, model.block_length), origin=begins, device=model.device)


def own_mask(
    model: LanguageModel,
    input_ids: Int[Tensor, "batch position"],
    *,
    origin: int | Tensor = 0,
    real: Bool[Tensor, "batch position"] | None = None,
) -> Bool[Tensor, "_ 1 position position"]:
    """Return the mask under which a model whose attention goes by blocks reads a text.

    Args:
        model: such a model.
        input_ids: token ids, masks included.
        origin: as `blocks_of` takes it.
        real: False for padding.

    Raises:
        InputError: a causal context with masks in more than one block: there is one open block at a time.
    """
    blocks = blocks_of(model, input_ids.shape[1], origin=origin)
    if model.attention == "block-causal":
        return visibility.block_causal(blocks, real=real)
    is_masked = input_ids == model.mask_token_id
    last = torch.where(is_masked, blocks, -2).max(1, keepdim=True).values  # no mask, no open block
    rule, remedy = "a causal context must have masks in one block at a time", "use nelbo or masked_log_likelihood for whole texts"
    require(not bool((is_masked & (blocks != last)).any()), rule, f"several with {model.name}", remedy)
    return visibility.open_block(blocks == last, real=real)

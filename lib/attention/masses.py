"""Read the attention mass that each key receives, without keeping attention matrices, and block keys from being attended to.

A function registered with transformers' `AttentionInterface` returns the normal SDPA output and, beside it, sums the attention
probabilities over the queries, a chunk of queries at a time.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lib.attention import sinks
from lib.attention.recorder import QUERY_CHUNK, Extra, MassRecorder
from lib.core.errors import InputError
from lib.models import visibility
from lib.models.language_model import LanguageModel, network_body, own_mask
from lib.models.layers import attention
from lib.models.layers.attention import probabilities

__all__ = ["MassRecorder", "blocking", "per_viewer", "probabilities", "read_prefixes", "record", "sink_mass"]

NAME = "sink_mass"
Chooser = Callable[[int, Tensor], Tensor | None]  # (layer, mass [batch, head, key]) -> keys to block [batch, head, key], or None

_ACTIVE: ContextVar[MassRecorder | None] = ContextVar("active_mass_recorder", default=None)
_CHOOSER: ContextVar[Chooser | None] = ContextVar("active_key_chooser", default=None)


@torch.compiler.disable
def _recording_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA, plus the masses for the open recorder, without the keys that the open chooser blocks."""
    given = kwargs.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if given is None else given)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    recorder, choose = _ACTIVE.get(), _CHOOSER.get()
    if recorder is not None:
        # On a CPU the probabilities that are summed give the output too; a second softmax would cost as much as the first. They
        # are float32 and carry no gradient.
        plain = all(each.dtype == torch.float32 and not each.requires_grad for each in (query, key, value))
        once = plain and choose is None and attention_mask is None and query.device.type == "cpu"
        asked = {"scaling": scaling, "is_causal": is_causal, "value": value if once else None}
        with torch.autocast(query.device.type, enabled=False):  # sums of rounded probabilities are off by a thousandth
            output = recorder.add(query.detach(), key.detach(), attention_mask, **asked)
        recorder.add_values(value.detach())
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    if choose is not None:
        own = MassRecorder()
        with torch.autocast(query.device.type, enabled=False):
            own.add(query.detach(), key.detach(), attention_mask, scaling=scaling, is_causal=is_causal)
        blocked = choose(int(module.layer_idx), own.pop()[0, :, :, 0])  # type: ignore[arg-type]
        if blocked is not None:
            attention_mask = allowed_keys(attention_mask, blocked, queries=query.shape[2], is_causal=is_causal)
    return attention.attention(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _recording_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def _recording_network(model: LanguageModel) -> Iterator[None]:
    """Let the network use the registered function inside the context."""
    before = model.network.config._attn_implementation or attention.NAME
    model.network.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.network.set_attn_implementation(before)


@contextmanager
def record(
    model: LanguageModel,
    *,
    query_chunk: int = QUERY_CHUNK,
    marks: Sequence[int] | None = None,
    attention_mask: Int[Tensor, "batch position"] | Bool[Tensor, "_ 1 query key"] | None = None,
    keep: Collection[Extra] = (),
) -> Iterator[MassRecorder]:
    """Record the attention mass of every forward pass inside the context.

    Args:
        model: any loaded model.
        query_chunk: queries handled at one time; changes memory, not the result.
        marks: rising prefix lengths for which a mass is kept (autoregressive models: every prefix of a text in one pass).
        attention_mask: the mask given to the forward pass; its padding is excluded as query too. In a ready mask of as many
            queries as keys, padding is what does not see itself.
        keep: what to keep beside the masses, see `MassRecorder`.

    Yields:
        The recorder; call `pop()` after each pass. A mass is the sum over queries of the attention that a key receives: 1 on
        average over keys when queries and keys are the same positions. Inside `blocking` it is the mass that the layer's keys
        would receive without the block.

    Raises:
        InputError: `query_chunk` is not positive.
    """
    if query_chunk < 1:
        raise InputError(f"query_chunk must be at least 1, got {query_chunk}: use the default")
    real = None if attention_mask is None else _real_queries(attention_mask)
    recorder = MassRecorder(query_chunk, tuple(marks) if marks else None, real, keep)
    token = _ACTIVE.set(recorder)
    try:
        with _recording_network(model):
            yield recorder
    finally:
        _ACTIVE.reset(token)


def _real_queries(attention_mask: Tensor) -> Bool[Tensor, "batch query"] | None:
    if attention_mask.dim() == 2:
        return attention_mask.bool()
    square = attention_mask.shape[2] == attention_mask.shape[3]
    return attention_mask[:, 0].diagonal(dim1=-2, dim2=-1) if square else None


@contextmanager
def blocking(model: LanguageModel, choose: Chooser) -> Iterator[None]:
    """Keep chosen keys of chosen heads from being attended to, in every forward pass inside the context.

    Args:
        model: any loaded model, read without a key-value cache.
        choose: called in each layer with the layer's index and the masses that its keys would receive, `[batch, head, key]`;
            returns True for the keys to block, or None to block nothing.

    Source: attention to sink positions set to minus infinity, Rulli et al. (arXiv 2510.15731).
    """
    token = _CHOOSER.set(choose)
    try:
        with _recording_network(model):
            yield
    finally:
        _CHOOSER.reset(token)


def allowed_keys(
    mask: Tensor | None, blocked: Bool[Tensor, "batch head key"], *, queries: int, is_causal: bool
) -> Bool[Tensor, "batch head query key"]:
    """Take the blocked keys out of an attention mask.

    Args:
        mask: what SDPA received: boolean (True = may attend), or None.
        blocked: True for keys that a head may not attend to.
        queries: number of queries; equal to the number of keys.
        is_causal: whether None stands for the causal mask.

    Returns:
        A boolean mask. A query left without any key (the first one of a causal model whose first key is blocked) sees itself.

    Raises:
        InputError: an additive mask, or a pass with a key-value cache.
    """
    keys = blocked.shape[-1]
    if queries != keys or (mask is not None and mask.dtype != torch.bool):
        kind = "no mask" if mask is None else str(mask.dtype)
        raise InputError(
            f"keys must be blocked in full passes with boolean masks, got {queries} queries, {keys} keys, {kind}: no cache"
        )
    own = torch.eye(keys, dtype=torch.bool, device=blocked.device)
    if mask is None:
        mask = torch.ones_like(own).tril()[None, None] if is_causal else torch.ones_like(own)[None, None]
    allowed = mask & ~blocked[:, :, None, :]
    return allowed | (own & ~allowed.any(-1, keepdim=True))


@torch.inference_mode()
def sink_mass(
    model: LanguageModel,
    input_ids: Int[Tensor, "batch position"],
    *,
    attention_mask: Int[Tensor, "batch position"] | Bool[Tensor, "_ 1 position position"] | None = None,
    query_chunk: int = QUERY_CHUNK,
    by_viewer: bool | None = None,
) -> Float[Tensor, "layer batch head key"]:
    """Return the attention mass of each key, per layer and head, in one forward pass without the LM head.

    Args:
        model: any loaded model.
        input_ids: token ids.
        attention_mask: 1 for real tokens, 0 for padding, or a ready mask; padding gives and receives nothing.
        query_chunk: queries handled at one time.
        by_viewer: divide by the number of queries that may see a key, see `per_viewer`; None does so where attention goes by
            blocks, and not for causal models, whose first keys have the most viewers too.

    Returns:
        Column sums of the attention matrices, or what one viewer gives: 1 on average over the real keys.

    Source: incoming mass m(i), paper section 3.1 (there summed over layers and heads too).
    """
    mask = attention_mask
    if model.goes_by_blocks and (mask is None or mask.dim() == 2):
        mask = own_mask(model, input_ids, real=None if mask is None else mask.bool())
    with record(model, query_chunk=query_chunk, attention_mask=mask) as recorder:
        network_body(model)(input_ids=input_ids, attention_mask=mask, use_cache=False)
        mass = recorder.pop()[:, :, :, 0]
    if by_viewer is False or not model.goes_by_blocks:
        return mass
    return per_viewer(mass, cast(Tensor, mask))


def per_viewer(
    mass: Float[Tensor, "layer batch head key"], mask: Bool[Tensor, "batch_or_one 1 query key"]
) -> Float[Tensor, "layer batch head key"]:
    """Return what a query that may see a key gives it on average, scaled to mean 1 over the keys.

    An early key of a model that looks backwards receives much because many see it; this takes that out, and leaves masses of full
    attention as they are.

    Args:
        mass: column sums over the queries of the mask.
        mask: under which they were recorded; padding sees nothing of itself.
    """
    real = _real_queries(mask)
    seen = mask if real is None else mask & real[:, None, :, None]
    return sinks.per_viewer(mass, visibility.viewers(seen)[None, :, None])


@torch.inference_mode()
def read_prefixes(
    model: LanguageModel, input_ids: Int[Tensor, "batch position"], *, lengths: Sequence[int], keep: Collection[Extra] = ()
) -> MassRecorder:
    """Read a causal model at every prefix in `lengths`, from one pass over the whole text.

    Causal attention does not change when a text grows, so the mass at a prefix is the sum over the queries before its end.

    Returns:
        The recorder, its marks the prefixes: `pop()` gives `[layer, batch, head, prefix, key]`.

    Raises:
        InputError: the model is not causal (its earlier rows do depend on what follows).
    """
    if not model.is_causal:
        raise InputError(f"prefix masses must come from a causal model, got {model.name}: record its sampling steps instead")
    with record(model, marks=lengths, keep=keep) as recorder:
        network_body(model)(input_ids=input_ids, use_cache=False)
    return recorder

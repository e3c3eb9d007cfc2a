"""Look at the attention of every layer while a pass runs, without a mask of our own and without keeping matrices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lib.models.language_model import LanguageModel
from lib.models.layers import attention
from lib.models.layers.attention import probabilities

NAME = "decoding"
Watcher = Callable[[int, Tensor, Tensor], None]  # (layer, query [row, head, query, dim], key [row, kv head, key, dim])
_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())


@torch.compiler.disable
def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA, after telling all who watch."""
    for watcher in _WATCHERS.get():
        watcher(cast(int, module.layer_idx), query, key)
    return attention.attention(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def watched(model: LanguageModel, watcher: Watcher) -> Iterator[None]:
    """Call `watcher` in every layer of every pass inside the context, with queries and keys after the rotary embedding.

    Args:
        model: any loaded model; contexts may lie in each other.
        watcher: what to call; in a pass over some places the keys are all that are kept.
    """
    token = _WATCHERS.set((*_WATCHERS.get(), watcher))
    before = model.network.config._attn_implementation or attention.NAME
    if before != NAME:
        model.network.set_attn_implementation(NAME)
    try:
        yield
    finally:
        _WATCHERS.reset(token)
        if before != NAME:
            model.network.set_attn_implementation(before)


def attention_of(
    query: Float[Tensor, "row head query dim"], key: Float[Tensor, "row kv_head key dim"]
) -> Float[Tensor, "row query key"]:
    """Return attention probabilities, averaged over heads."""
    scaling = query.shape[-1] ** -0.5
    rows = (0, query.shape[2])
    return probabilities(query, key, None, rows=rows, scaling=scaling, is_causal=False).mean(1)


def scores_of(
    query: Float[Tensor, "row head query dim"], key: Float[Tensor, "row kv_head key dim"]
) -> Float[Tensor, "row head query key"]:
    """Return the products of queries and keys, before scaling and softmax; heads share keys in groups."""
    spread = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query.float() @ spread.float().transpose(2, 3)

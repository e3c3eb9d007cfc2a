"""How attention is computed: by SDPA, but where oneDNN multiplies, short texts by two products and a softmax, a share at a time.

torch's SDPA kernel for CPUs cuts a head into blocks whose products are tiny. MKL does not mind; with oneDNN's kernels, which
`core.processor` chooses where they are faster otherwise, it takes three times as long at 128 positions and heads of 32 to 64 as
plain products of all queries that share a key head (and these a little less than SDPA by MKL), at 512 positions as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_or_products"  # of the function, in a network's configuration
QUERIES = 4  # fewer are left to SDPA: a call is then all overhead
KEYS = 512  # more are left to SDPA
CHUNK = 128  # queries at one time
SHARE = 2**18  # probabilities at one time: 1 MiB stays in the processor's cache until they are read again
ALL = slice(None)


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as transformers' SDPA function does, equal but for rounding; the signature is that of `AttentionInterface`."""
    given = kwargs.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if given is None else given) and attention_mask is None
    if not _is_short(query, key, value, attention_mask, is_causal=is_causal) or kwargs.get("dropout"):
        return cast(tuple[Tensor, None], sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs))
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return by_products(query, key, value, attention_mask, scaling=scaling, is_causal=is_causal).transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def is_onednn() -> bool:
    """Tell whether float32 matrices on a CPU are multiplied by oneDNN's kernels, see `core.processor.use_products`."""
    return torch.get_float32_matmul_precision() == "medium"


@contextmanager
def without_products(network: PreTrainedModel) -> Iterator[None]:
    """Let a network attend by SDPA alone inside the context: to the bit what transformers computes without this project."""
    before = network.config._attn_implementation or NAME
    network.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def _is_short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool) -> bool:
    """Tell whether products are faster and give the same: float32 on a CPU, no gradient, every query with something to see."""
    queries, keys = query.shape[2], key.shape[2]
    if query.device.type != "cpu" or queries < QUERIES or keys > KEYS or torch.is_autocast_enabled("cpu") or not is_onednn():
        return False
    if any(each.dtype != torch.float32 or each.requires_grad for each in (query, key, value)) or (is_causal and queries != keys):
        return False
    return mask is None or (mask.dtype == torch.bool and bool(mask.any(-1).all()))


def by_products(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch kv_head key dim"],
    value: Float[Tensor, "batch kv_head key dim"],
    mask: Bool[Tensor, "_ _ _ key"] | None,
    *,
    scaling: float,
    is_causal: bool,
) -> Float[Tensor, "batch head query dim"]:
    """Return what queries attend to, from probabilities that exist for some rows, heads and queries at one time.

    Args:
        query: queries of all heads after the rotary embedding.
        key, value: of all key heads; query head h reads key head h // (heads / kv_heads).
        mask: True = may attend, broadcastable to `[batch, head, query, key]`, or None; every query sees a key at least.
        scaling: factor on the scores.
        is_causal: apply the causal mask when `mask` is None.

    Returns:
        Memory lies as `[batch, query, head, dim]`, as the layer's next product reads it.
    """
    batch, heads, total, _ = query.shape
    output = query.new_empty((batch, total, heads, value.shape[3])).transpose(1, 2)
    key, value = key.contiguous(), value.contiguous()  # each chunk reads all of them
    for rows, some, kv_heads in shares(query, key, chunk=CHUNK):
        part = (query[rows, some], key[rows, kv_heads], share_of(mask, rows, some))
        for start in range(0, total, CHUNK):
            stop = min(start + CHUNK, total)
            probs = probabilities(*part, rows=(start, stop), scaling=scaling, is_causal=is_causal)
            output[rows, some, start:stop] = attended(probs, value[rows, kv_heads])
    return output


def shares(query: Tensor, key: Tensor, *, chunk: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a layer into rows, heads and kv heads whose probabilities of one chunk of queries fit into the cache."""
    rows, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
    group = heads // kv_heads
    one = min(chunk, query.shape[2]) * key.shape[2] * group
    kv_step = min(max(1, SHARE // one), kv_heads)
    row_step = max(1, SHARE // (one * kv_step))
    for row in range(0, rows, row_step):
        for kv in range(0, kv_heads, kv_step):
            kv_end = min(kv + kv_step, kv_heads)
            yield slice(row, row + row_step), slice(kv * group, kv_end * group), slice(kv, kv_end)


def share_of(mask: Tensor | None, rows: slice, heads: slice) -> Tensor | None:
    """Return a mask's part for some rows and heads; a dimension of size 1 stands for all of them."""
    if mask is None:
        return None
    return mask[rows if mask.shape[0] > 1 else ALL, heads if mask.shape[1] > 1 else ALL]


def probabilities(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch kv_head key dim"],
    mask: Tensor | None,
    *,
    rows: tuple[int, int],
    scaling: float,
    is_causal: bool,
) -> Float[Tensor, "batch head chunk seen"]:
    """Return float32 attention probabilities of the queries `rows[0]:rows[1]`.

    Args:
        query: queries of all heads after the rotary embedding.
        key: keys; query head h reads key head h // (heads / kv_heads).
        mask: what SDPA received: boolean (True = may attend) or additive, broadcastable to `[batch, head, query, key]`, or None.
        rows: first query and the one after the last.
        scaling: factor on the scores.
        is_causal: apply the causal mask when `mask` is None.

    Returns:
        Rows that sum to 1. Under the causal mask keys after the last query are left out: `seen` = `rows[1]`.
    """
    start, stop = rows
    batch, heads, total, width = query.shape
    causal = is_causal and mask is None and total > 1
    seen = stop if causal else key.shape[2]
    kv_heads = key.shape[1]
    chunk = query[:, :, start:stop].float() * scaling
    grouped = chunk.reshape(batch, kv_heads, heads // kv_heads * (stop - start), width)
    scores = (grouped @ key[:, :, :seen].float().transpose(2, 3)).view(batch, heads, stop - start, seen)
    if causal:
        later = torch.ones((stop - start, stop - start), dtype=torch.bool, device=scores.device).triu(1)
        scores[..., start:].masked_fill_(later, float("-inf"))
    elif mask is not None:
        part = mask if mask.shape[2] == 1 else mask[:, :, start:stop]
        scores = scores.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else scores.add_(part)
    # In place: memory traffic, not arithmetic, decides the time of this step.
    return torch.softmax(scores, dim=-1, out=scores)


def attended(
    probs: Float[Tensor, "batch head chunk seen"], value: Float[Tensor, "batch kv_head key dim"]
) -> Float[Tensor, "batch head chunk dim"]:
    """Return the values that queries attend to; query head h reads value head h // (heads / kv_heads)."""
    batch, heads, chunk, seen = probs.shape
    grouped = probs.view(batch, value.shape[1], heads // value.shape[1] * chunk, seen)
    return (grouped @ value[:, :, :seen].to(probs.dtype)).view(batch, heads, chunk, -1)

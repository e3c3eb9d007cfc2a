"""Read the attention mass that each key receives, without keeping attention matrices.

A function registered with transformers' `AttentionInterface` returns the normal SDPA output and, beside it, sums the attention
probabilities over the queries, a chunk of queries at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lib.config import InputError
from lib.models import LanguageModel, network_body

NAME = "sink_mass"
QUERY_CHUNK = 128  # fastest of 32..512 on the CPU at 512 and 2048 positions


@dataclass
class MassRecorder:
    """Collects masses while a `record` context is open.

    Attributes:
        query_chunk: queries whose probabilities exist at one time.
        marks: prefix lengths; a mass is kept for the queries before each mark. None means all queries.
        query_is_real: `[batch, query]`, False for padding, whose attention is not counted. None means all are real.
        keep_map: also keep the attention matrix, averaged over layers and heads (`query x key` floats for each row of the batch).
    """

    query_chunk: int = QUERY_CHUNK
    marks: tuple[int, ...] | None = None
    query_is_real: Bool[Tensor, "batch query"] | None = None
    keep_map: bool = False
    _sums: list[Tensor] = field(default_factory=list)
    _maps: list[Tensor] = field(default_factory=list)

    def pop(self) -> Float[Tensor, "layer batch head mark key"]:
        """Return the masses since the last call, by layer, and forget them.

        Raises:
            InputError: no forward pass has run since.
        """
        if not self._sums:
            raise InputError("masses must be recorded before they are read, got no forward pass: run the network inside record()")
        sums, self._sums = torch.stack(self._sums), []
        return sums

    def pop_map(self) -> Float[Tensor, "batch query key"]:
        """Return the attention map, averaged over heads and layers, of the passes since the last call, and forget it."""
        maps, self._maps = torch.stack(self._maps), []
        return maps.mean(0)

    def add(self, query: Tensor, key: Tensor, mask: Tensor | None, *, scaling: float, is_causal: bool) -> None:
        """Sum the attention of one layer over its queries and keep the result."""
        total = query.shape[2]
        marks = self.marks or (total,)
        if any(mark > total for mark in marks) or list(marks) != sorted(set(marks)):
            raise InputError(f"marks must rise and end at most at the number of queries ({total}), got {marks}: change marks")
        running = query.new_zeros((query.shape[0], query.shape[1], key.shape[2]), dtype=torch.float32)
        kept, maps, start = [], [], 0
        for mark in marks:
            while start < mark:
                stop = min(start + self.query_chunk, mark)
                probs = probabilities(query, key, mask, rows=(start, stop), scaling=scaling, is_causal=is_causal)
                if self.query_is_real is not None:
                    # where, not a product: a padding query may see no key at all, and its row is then NaN
                    probs = torch.where(self.query_is_real[:, None, start:stop, None], probs, 0.0)
                # a product with ones sums the columns a third faster than sum(2) does
                running[..., : probs.shape[-1]] += (probs.new_ones((*probs.shape[:2], 1, stop - start)) @ probs)[:, :, 0]
                if self.keep_map:
                    maps.append(torch.nn.functional.pad(probs.mean(1), (0, key.shape[2] - probs.shape[-1])))
                start = stop
            kept.append(running.clone())
        self._sums.append(torch.stack(kept, dim=2))
        if self.keep_map:
            self._maps.append(torch.cat(maps, dim=1))


_ACTIVE: ContextVar[MassRecorder | None] = ContextVar("active_mass_recorder", default=None)


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


@torch.compiler.disable
def _recording_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA, plus the masses for the open recorder."""
    recorder = _ACTIVE.get()
    if recorder is not None:
        given = kwargs.get("is_causal")
        is_causal = bool(getattr(module, "is_causal", True) if given is None else given)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        recorder.add(query.detach(), key.detach(), attention_mask, scaling=scaling, is_causal=is_causal)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _recording_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def record(
    model: LanguageModel,
    *,
    query_chunk: int = QUERY_CHUNK,
    marks: Sequence[int] | None = None,
    attention_mask: Int[Tensor, "batch position"] | None = None,
    keep_map: bool = False,
) -> Iterator[MassRecorder]:
    """Record the attention mass of every forward pass inside the context.

    Args:
        model: any loaded model.
        query_chunk: queries handled at one time; changes memory, not the result.
        marks: rising prefix lengths for which a mass is kept (autoregressive models: every prefix of a text in one pass).
        attention_mask: the mask given to the forward pass; its padding is excluded as query too.
        keep_map: also keep the map averaged over layers and heads.

    Yields:
        The recorder; call `pop()` after each pass. A mass is the sum over queries of the attention that a key receives: 1 on
        average over keys when queries and keys are the same positions.

    Raises:
        InputError: `query_chunk` is not positive.
    """
    if query_chunk < 1:
        raise InputError(f"query_chunk must be at least 1, got {query_chunk}: use the default")
    real = None if attention_mask is None else attention_mask.bool()
    recorder = MassRecorder(query_chunk, tuple(marks) if marks else None, real, keep_map)
    before = model.network.config._attn_implementation or "sdpa"
    model.network.set_attn_implementation(NAME)
    token = _ACTIVE.set(recorder)
    try:
        yield recorder
    finally:
        _ACTIVE.reset(token)
        model.network.set_attn_implementation(before)


@torch.inference_mode()
def sink_mass(
    model: LanguageModel,
    input_ids: Int[Tensor, "batch position"],
    *,
    attention_mask: Int[Tensor, "batch position"] | None = None,
    query_chunk: int = QUERY_CHUNK,
) -> Float[Tensor, "layer batch head key"]:
    """Return the attention mass of each key, per layer and head, in one forward pass without the LM head.

    Args:
        model: any loaded model.
        input_ids: token ids.
        attention_mask: 1 for real tokens, 0 for padding; padding gives and receives nothing.
        query_chunk: queries handled at one time.

    Returns:
        Column sums of the attention matrices: 1 on average over the real keys.

    Source: incoming mass m(i), paper section 3.1 (there summed over layers and heads too).
    """
    with record(model, query_chunk=query_chunk, attention_mask=attention_mask) as recorder:
        network_body(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return recorder.pop()[:, :, :, 0]


@torch.inference_mode()
def prefix_masses(
    model: LanguageModel, input_ids: Int[Tensor, "batch position"], *, lengths: Sequence[int]
) -> Float[Tensor, "layer batch head prefix key"]:
    """Return the masses of a causal model at every prefix in `lengths`, from one pass over the whole text.

    Causal attention does not change when a text grows, so the mass at a prefix is the sum over the queries before its end.

    Raises:
        InputError: the model is not causal (its earlier rows do depend on what follows).
    """
    if not model.is_causal:
        raise InputError(f"prefix masses must come from a causal model, got {model.name}: record its sampling steps instead")
    with record(model, marks=lengths) as recorder:
        network_body(model)(input_ids=input_ids, use_cache=False)
        return recorder.pop()

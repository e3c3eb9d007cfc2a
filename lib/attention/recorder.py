"""What is summed up from attention probabilities while they exist: a chunk of queries at a time, never a whole matrix.

All layers' sums lie on the device of the first layer's, whatever devices a model is spread over.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib.core.errors import InputError
from lib.models.layers.attention import ALL, attended, probabilities, share_of, shares

QUERY_CHUNK = 128  # fastest of 64, 128 and 256 on the CPU at 2048 positions, by head
Extra = Literal["map", "argmax", "value_norm"]


@dataclass
class MassRecorder:
    """Collects masses, and on request more, from every layer of a forward pass.

    Attributes:
        query_chunk: queries whose probabilities exist at one time.
        marks: prefix lengths; a mass is kept for the queries before each mark. None means all queries.
        query_is_real: `[batch, query]`, False for padding, whose attention is not counted; one row stands for all. None means all
            are real.
        keep: what else to keep: `"map"`, the attention matrix averaged over layers and heads (`query x key` floats for each row
            of the batch); `"argmax"`, which keys are some query's favourite; `"value_norm"`, the norms of the value vectors.
    """

    query_chunk: int = QUERY_CHUNK
    marks: tuple[int, ...] | None = None
    query_is_real: Bool[Tensor, "batch query"] | None = None
    keep: Collection[Extra] = ()
    _sums: list[Tensor] = field(default_factory=list)
    _maps: list[Tensor] = field(default_factory=list)
    _favourites: list[Tensor] = field(default_factory=list)
    _value_norms: list[Tensor] = field(default_factory=list)

    def pop(self) -> Float[Tensor, "layer batch head mark key"]:
        """Return the masses since the last call, by layer, and forget them.

        Raises:
            InputError: no forward pass has run since.
        """
        return torch.stack(_emptied(self._sums, "masses"))

    def pop_map(self) -> Float[Tensor, "batch query key"]:
        """Return the attention map, averaged over heads and layers, of the passes since the last call, and forget it."""
        return torch.stack(_emptied(self._maps, "maps")).mean(0)

    def pop_argmax(self) -> Bool[Tensor, "layer batch mark key"]:
        """Return which keys are the favourite of some query before the mark, in the attention averaged over heads."""
        return torch.stack(_emptied(self._favourites, "favourites"))

    def pop_value_norms(self) -> Float[Tensor, "layer batch kv_head key"]:
        """Return the Euclidean norms of the value vectors."""
        return torch.stack(_emptied(self._value_norms, "value norms"))

    def add(
        self, query: Tensor, key: Tensor, mask: Tensor | None, *, scaling: float, is_causal: bool, value: Tensor | None = None
    ) -> Tensor | None:
        """Sum the attention of one layer over its queries and keep the result.

        Args:
            query: queries of all heads after the rotary embedding, `[batch, head, query, dim]`.
            key: keys, `[batch, kv_head, key, dim]`.
            mask: what SDPA received.
            scaling: factor on the scores.
            is_causal: apply the causal mask when `mask` is None.
            value: the values, when the layer's output is wanted too: the probabilities are there already.

        Returns:
            `[batch, head, query, dim]`, what SDPA returns but for rounding; None without values.
        """
        total = query.shape[2]
        marks = self.marks or (total,)
        if any(mark > total for mark in marks) or list(marks) != sorted(set(marks)):
            raise InputError(f"marks must rise and end at most at the number of queries ({total}), got {marks}: change marks")
        sums = query.new_zeros((*query.shape[:2], len(marks), key.shape[2]), dtype=torch.float32)
        output = None if value is None else query.new_empty((*query.shape[:3], value.shape[3]))
        key, value = key.contiguous(), None if value is None else value.contiguous()  # each chunk reads all of them
        whole = query.device.type != "cpu" or not {"map", "argmax"}.isdisjoint(self.keep)  # these are means over all heads
        for rows, heads, kv_heads in [(ALL, ALL, ALL)] if whole else shares(query, key, chunk=self.query_chunk):
            self._add_share(
                _Scores(query[rows, heads], key[rows, kv_heads], share_of(mask, rows, heads), scaling, is_causal),
                marks,
                real=None if self.query_is_real is None else self.query_is_real[rows if len(self.query_is_real) > 1 else ALL],
                value=None if value is None else value[rows, kv_heads],
                sums=sums[rows, heads],
                output=None if output is None else output[rows, heads],
            )
        _append(self._sums, sums)
        return output

    def _add_share(
        self,
        scores: "_Scores",
        marks: tuple[int, ...],
        *,
        real: Tensor | None,
        value: Tensor | None,
        sums: Tensor,
        output: Tensor | None,
    ) -> None:
        """Write the sums, and with values the output, of some rows and heads of a layer, a chunk of queries at a time."""
        favourite = torch.zeros_like(sums[:, 0, 0])
        favourites, maps, start = [], [], 0
        total = scores.query.shape[2]
        for index, mark in enumerate(marks if value is None or marks[-1] == total else (*marks, total)):
            counted = index < len(marks)  # of the queries after the last mark only the output is wanted
            if counted and index:
                sums[:, :, index] = sums[:, :, index - 1]
            while start < mark:
                stop = min(start + self.query_chunk, mark)
                probs = scores.probabilities(start, stop)
                if value is not None and output is not None:
                    output[:, :, start:stop] = attended(probs, value)
                if counted:
                    seen = None if real is None else real[:, start:stop]
                    if seen is not None:
                        # where, not a product: a padding query may see no key at all, and its row is then NaN
                        probs = torch.where(seen[:, None, :, None], probs, 0.0)
                    # a product with ones sums the columns a third faster than sum(2) does
                    sums[:, :, index, : probs.shape[-1]] += (probs.new_ones((*probs.shape[:2], 1, stop - start)) @ probs)[:, :, 0]
                    if "argmax" in self.keep:
                        votes = probs.new_ones(probs.shape[0], stop - start) if seen is None else seen.to(probs.dtype)
                        favourite.scatter_add_(1, probs.mean(1).argmax(-1), votes)
                    if "map" in self.keep:
                        maps.append(torch.nn.functional.pad(probs.mean(1), (0, sums.shape[3] - probs.shape[-1])))
                start = stop
            if counted and "argmax" in self.keep:
                favourites.append(favourite > 0)
        if favourites:
            _append(self._favourites, torch.stack(favourites, dim=1))
        if maps:
            _append(self._maps, torch.cat(maps, dim=1))

    def add_values(self, value: Float[Tensor, "batch kv_head key dim"]) -> None:
        """Keep the norms of one layer's value vectors, when they are wanted."""
        if "value_norm" in self.keep:
            _append(self._value_norms, value.float().norm(dim=-1))


@dataclass(frozen=True)
class _Scores:
    """What the attention of some rows and heads of a layer is computed from."""

    query: Float[Tensor, "batch head query dim"]
    key: Float[Tensor, "batch kv_head key dim"]
    mask: Tensor | None
    scaling: float
    is_causal: bool

    def probabilities(self, start: int, stop: int) -> Float[Tensor, "batch head chunk seen"]:
        """Return the attention of the queries from `start` to `stop`."""
        rows = (start, stop)
        return probabilities(self.query, self.key, self.mask, rows=rows, scaling=self.scaling, is_causal=self.is_causal)


def _append(parts: list[Tensor], value: Tensor) -> None:
    """Add a layer's part on the device of the first one: they are stacked."""
    parts.append(value.to(parts[0].device) if parts else value)


def _emptied(parts: list[Tensor], what: str) -> list[Tensor]:
    """Return a copy of the list and clear it."""
    if not parts:
        raise InputError(f"{what} must be recorded before they are read, got no forward pass: run the network inside record()")
    taken = parts.copy()
    parts.clear()
    return taken

"""Passes of a model whose attention goes by blocks: finished blocks are read again, or their keys and values are kept.

A finished block never looks at a later one, so what is kept of it is exact: both ways give the same numbers but for rounding.
"""

from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from lib.diffusion.commits import DenoisingStep
from lib.models import visibility
from lib.models.language_model import Attention, LanguageModel, blocks_of, network_body


def pass_mask(
    attention: Attention, blocks: Int[Tensor, "batch position"], *, opened: int | None
) -> Bool[Tensor, "batch 1 position position"]:
    """Return the mask of a pass over finished blocks and, behind them, the one that is being written.

    Args:
        attention: of the model.
        blocks: number of each position's block.
        opened: number of the block that is being written; None when all are finished.
    """
    if attention == "block-causal":
        return visibility.block_causal(blocks)
    return visibility.open_block(torch.zeros_like(blocks, dtype=torch.bool) if opened is None else blocks == opened)


class BlockReader:
    """Reads one text after another block.

    Attributes:
        model: whose attention goes by blocks.
        origin: where the prompt ends.
        keeps: whether keys and values of finished blocks are kept.
        forwards: passes so far.
        computed_tokens: query positions that went through the network, over the batch.
    """

    def __init__(self, model: LanguageModel, *, origin: int, keeps: bool) -> None:
        self.model, self.origin, self.keeps = model, origin, keeps
        self.forwards = self.computed_tokens = 0
        self._store, self._kept = DynamicCache(), 0
        self._before: Tensor | None = None  # state of the last position before the block

    def context(self, ids: Int[Tensor, "batch context"]) -> Float[Tensor, "batch 1 feature"]:
        """Read finished text, and return the state of its last position."""
        length = ids.shape[1]
        blocks = blocks_of(self.model, length, origin=self.origin)
        mask = pass_mask(self.model.attention, blocks, opened=None)
        if not self.keeps:
            self._before = self._pass(ids, mask)[:, -1:]
        elif self._kept < length:
            mask = mask[:, :, self._kept :]
            self._before = self._pass(ids[:, self._kept :], mask)[:, -1:]
            self._kept = length
        return cast(Tensor, self._before)

    def block(self, ids: Int[Tensor, "batch position"], *, start: int) -> tuple[Float[Tensor, "batch query feature"], int]:
        """Read an open block.

        Args:
            ids: the text up to the block's end.
            start: of the block.

        Returns:
            States of the block and, for a logit shift, of the position before it; and the position of the first of them.
        """
        end, first = ids.shape[1], max(start - self.model.logit_shift, 0)
        if not self.keeps:
            blocks = blocks_of(self.model, end, origin=self.origin)
            return self._pass(ids, pass_mask(self.model.attention, blocks, opened=int(blocks[0, -1])))[:, first:], first
        if start:
            self.context(ids[:, :start])
        states = self._pass(ids[:, start:], torch.ones((1, 1, end - start, end), dtype=torch.bool, device=ids.device))
        self._store.crop(start - end)
        return (torch.cat([cast(Tensor, self._before), states], dim=1), first) if first < start else (states, first)

    def _pass(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "batch query feature"]:
        """Run the network behind what is kept."""
        options = {}
        if self.keeps:
            positions = torch.arange(mask.shape[3] - ids.shape[1], mask.shape[3], device=ids.device)[None]
            options = {"past_key_values": self._store, "position_ids": positions}
        output = network_body(self.model)(input_ids=ids, attention_mask=mask, use_cache=self.keeps, **options)
        self.forwards, self.computed_tokens = self.forwards + 1, self.computed_tokens + ids.numel()
        return output.last_hidden_state


def viewers_of(model: LanguageModel, step: DenoisingStep, *, prompt_tokens: int) -> tuple[Int[Tensor, "key"] | None, int]:
    """Return how many queries of a step's pass over the whole text may see each key, and which block the step writes.

    Args:
        model: any diffusion model.
        step: one of its steps.
        prompt_tokens: length of the prompt.

    Returns:
        (None, 0) where all see all.
    """
    if not model.goes_by_blocks or step.keys is None:
        return None, 0
    blocks = blocks_of(model, step.input_ids.shape[1], origin=prompt_tokens)[0].cpu()
    inside = blocks[: step.keys]
    is_open = bool(step.is_masked[:, : step.keys].any())
    opened = int(inside[-1]) if is_open else int(blocks[step.keys])
    mask = pass_mask(model.attention, inside[None], opened=opened if is_open else None)
    return visibility.viewers(mask)[0], opened


@torch.inference_mode()
def block_logits(
    model: LanguageModel,
    clean: Int[Tensor, "batch position"],
    noisy: Int[Tensor, "batch position"],
    where: Bool[Tensor, "batch position"],
    *,
    origin: int = 0,
) -> Float[Tensor, "selected vocab"]:
    """Predict the tokens of every block behind clean earlier blocks, all blocks in one pass over two copies of the text.

    Args:
        model: whose attention goes by blocks.
        clean: the text.
        noisy: the same with masks.
        where: positions whose token is to be predicted.
        origin: as in `masked_losses`.

    Returns:
        Float32 logits in row-major order: those that each block gives alone behind the text before it.

    Source: the training pass of BD3-LM (arXiv 2503.09573).
    """
    length = clean.shape[1]
    blocks = blocks_of(model, length, origin=origin)
    output = network_body(model)(
        input_ids=torch.cat([noisy, clean], dim=1),
        attention_mask=visibility.two_copies(blocks, causal_context=model.attention == "context-causal"),
        position_ids=torch.arange(length, device=clean.device).repeat(2)[None],
        use_cache=False,
    )
    hidden, context = output.last_hidden_state.split(length, dim=1)
    if model.logit_shift:
        # What predicts the first token of a block is the last state of the finished block before it.
        begins = (blocks[:, 1:] != blocks[:, :-1])[..., None]
        hidden = torch.cat([hidden[:, :1], torch.where(begins, context[:, :-1], hidden[:, :-1])], dim=1)
    return cast(torch.nn.Linear, model.network.get_output_embeddings())(hidden[where]).float()

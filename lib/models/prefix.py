"""Passes through a network whose later blocks alone were changed: what earlier blocks give is kept, not computed again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lib.core.errors import require
from lib.models.language_model import LanguageModel
from lib.models.layers.anatomy import blocks_in

LIMIT = 2**30  # bytes of kept states


@dataclass
class Prefix:
    """What every block read in the passes of one measurement, in their order.

    Attributes:
        is_whole: False when it would have taken too much memory; nothing is kept then, and nothing skipped later.
    """

    is_whole: bool = True
    _reads: list[list[Tensor]] = field(default_factory=list, repr=False)  # by block, then by pass
    _bytes: int = 0


@contextmanager
def recorded(model: LanguageModel, *, limit: int = LIMIT) -> Iterator[Prefix]:
    """Keep what every block reads in the passes inside the context.

    Args:
        model: the model as it is before anything is changed.
        limit: bytes that may be kept.
    """
    blocks = _blocks(model)
    prefix = Prefix(_reads=[[] for _ in blocks])

    def keep(block: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Keep one block's input, or give up what was kept so far."""
        read = arguments[0].detach()
        prefix._bytes += read.numel() * read.element_size()
        prefix.is_whole &= prefix._bytes <= limit
        if prefix.is_whole:
            prefix._reads[numbers[id(block)]].append(read)
        else:
            prefix._reads.clear()

    numbers = {id(block): number for number, block in enumerate(blocks)}
    handles = [block.register_forward_pre_hook(keep) for block in blocks]
    try:
        yield prefix
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reused(model: LanguageModel, prefix: Prefix, *, first: int) -> Iterator[None]:
    """Skip the blocks before `first` in the passes inside the context, which must be those that were recorded, in their order.

    Args:
        model: the model, its blocks before `first` as they were.
        prefix: from `recorded`.
        first: the first block that is changed.

    Raises:
        InputError: more passes than were recorded, or of other texts by their shape.
    """
    if not prefix.is_whole or first == 0:
        yield
        return
    blocks, passes = _blocks(model), iter(prefix._reads[first])

    def replace(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Put the kept states in the place of what the skipped blocks passed on."""
        kept = next(passes, None)
        same = kept is not None and kept.shape == arguments[0].shape
        require(same, "passes must be those that were recorded", "another one", "measure both on the same texts")
        return (cast(Tensor, kept), *arguments[1:])

    skipped = [(block, vars(block).get("forward")) for block in blocks[:first]]  # one of its own where accelerate moves data
    for block, _ in skipped:
        block.forward = _unchanged  # type: ignore[method-assign]
    handle = blocks[first].register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()
        for block, own in skipped:
            del block.forward
            if own is not None:
                block.forward = own


def _unchanged(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def _blocks(model: LanguageModel) -> list[torch.nn.Module]:
    return list(blocks_in(model.network))

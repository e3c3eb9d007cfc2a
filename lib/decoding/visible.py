"""The fourth choice: which places the network is given at all. What is evicted from kept keys is in `by_attention.evict`."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from lib.core.errors import require
from lib.decoding.view import View
from lib.models.language_model import LanguageModel


@dataclass(frozen=True)
class Visible:
    """Everything, or the text up to a part of the masks behind the block.

    Attributes:
        suffix_blocks: masked blocks after the current one that the network sees; None is all of them.
        suffix_tokens: instead, masked tokens after it.
        tail: of what is cut off, show this place: `"last"` the last one, `"middle"` another one, the middle one; None is nothing.

    Source: Streaming-dLLM (arXiv 2601.17917): 32 tokens and the last place. That the last place may act as a sink is ours to ask,
        hence `"middle"`.
    """

    suffix_blocks: int | None = None
    suffix_tokens: int | None = None
    tail: str | None = None
    alone = False
    evicts = False

    def __post_init__(self) -> None:
        for name in ("suffix_blocks", "suffix_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} must be at least 0", str(value), "raise it or leave it out")
        both = self.suffix_blocks is not None and self.suffix_tokens is not None
        require(not both, "a suffix must be counted in blocks or in tokens", "both", "set one of them")
        require(self.tail in (None, "last", "middle"), "tail must be last or middle", repr(self.tail), "leave it out for none")

    def opened(self, model: LanguageModel, view: View) -> AbstractContextManager[object]:
        """Open what is needed while a block is written."""
        return nullcontext()

    def after(self, model: LanguageModel, view: View) -> None:
        """Take note of a pass, and hide keys from the next one. Nothing here."""

    def places(self, block: range, *, total: int, block_length: int) -> list[int]:
        """Return the positions that passes over a block are given.

        >>> Visible(suffix_tokens=1, tail="last").places(range(2, 4), total=9, block_length=2)
        [0, 1, 2, 3, 4, 8]
        """
        suffix = self.suffix_tokens if self.suffix_blocks is None else self.suffix_blocks * block_length
        end = total if suffix is None else min(total, block.stop + suffix)
        cut = range(end, total)
        tail = {"last": total - 1, "middle": (end + total - 1) // 2}
        return [*range(end), *([tail[self.tail]] if self.tail and cut else [])]

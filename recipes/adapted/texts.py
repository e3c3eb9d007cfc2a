"""Rows of text between [CLS] and [SEP], and how many characters each of their tokens stands for."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lib.core.errors import require
from lib.texts.articles import format_article
from recipes import corpus


@dataclass(frozen=True)
class Rows:
    """Rows of one length.

    Attributes:
        ids: clean token ids.
        chars: characters that a token stands for, white space before it included.
        is_text: True for tokens of a text: what is noised and scored. A special token is always seen.
    """

    ids: Int[Tensor, "row position"]
    chars: Int[Tensor, "row position"]
    is_text: Bool[Tensor, "row position"]

    def __getitem__(self, chosen: slice) -> "Rows":
        """Return some of the rows."""
        return Rows(self.ids[chosen], self.chars[chosen], self.is_text[chosen])


def joined(first: Rows, second: Rows) -> Rows:
    """Return the rows of both."""
    pairs = ((first.ids, second.ids), (first.chars, second.chars), (first.is_text, second.is_text))
    return Rows(*(torch.cat(pair) for pair in pairs))


def documents(articles: list[dict[str, str]], *, seed: int, epoch: int) -> list[str]:
    """Return the training articles of one epoch, shuffled, the description before the text or behind it."""
    rng = random.Random(f"adapted-{seed}-{epoch}")
    texts = [format_article(row, description_last=rng.random() < 0.5) for row in corpus.split_articles(articles, "train")]
    rng.shuffle(texts)
    return texts


def held_out(articles: list[dict[str, str]]) -> list[str]:
    """Return the articles that no training reads, the description before the text."""
    return [format_article(row, description_last=False) for row in corpus.split_articles(articles, "evaluation")]


def token_chars(tok: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Tokenise texts without special tokens; beside each token the characters since the end of the one before."""
    made = tok(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for ids, offsets in zip(made["input_ids"], made["offset_mapping"], strict=True):
        ends = [0, *(end for _, end in offsets)]
        found.append((ids, [after - before for before, after in itertools.pairwise(ends)]))
    return found


def framed(tok: PreTrainedTokenizerFast, texts: Sequence[str], *, length: int) -> Rows:
    """Cut one stream of texts into rows of [CLS], `length` - 2 tokens, [SEP]; a [SEP] stands between two texts.

    Args:
        tok: has [CLS] as its BOS and [SEP] as its EOS.
        texts: in order; the last part of a row is dropped.
        length: tokens of a row.
    """
    first, last = ((cast(int, number), 0, False) for number in (tok.bos_token_id, tok.eos_token_id))
    stream = [token for text in _marked(tok, texts) for token in (*text, last)]
    inner = length - 2
    starts = range(0, len(stream) - inner + 1, inner)
    return _rows([[first, *stream[start : start + inner], last] for start in starts], length)


def packed(tok: PreTrainedTokenizerFast, texts: Sequence[str], *, length: int) -> Rows:
    """Pack texts as the embedded pair was trained: BOS, text, EOS, BOS, ...

    A row begins with a text; what crosses its end is cut there.
    """
    first, last = ((cast(int, number), 0, False) for number in (tok.bos_token_id, tok.eos_token_id))
    rows: list[list[tuple[int, int, bool]]] = []
    row: list[tuple[int, int, bool]] = []
    for text in _marked(tok, texts):
        row += [first, *text, last]
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    return _rows(rows, length)


def alone(tok: PreTrainedTokenizerFast, text: str) -> Rows:
    """Return one text between BOS and EOS as a row of its own length."""
    first, last = ((cast(int, number), 0, False) for number in (tok.bos_token_id, tok.eos_token_id))
    row = [first, *_marked(tok, [text])[0], last]
    return _rows([row], len(row))


def _marked(tok: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[tuple[int, int, bool]]]:
    """Return every token of every text with its characters, and True."""
    return [[(number, count, True) for number, count in zip(*both, strict=True)] for both in token_chars(tok, texts)]


def _rows(rows: list[list[tuple[int, int, bool]]], length: int) -> Rows:
    require(bool(rows), f"texts must fill a row of {length} tokens", "too few", "give more")
    ids, chars, is_text = torch.tensor(rows).unbind(-1)
    return Rows(ids.contiguous(), chars.contiguous(), is_text.bool())

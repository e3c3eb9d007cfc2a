"""Rows of text as a model was trained on, which of their tokens are scored, and how many characters each stands for.

A decoder of this project reads documents one behind the other, each between BOS and EOS. An encoder reads [CLS], one stream of
texts with a [SEP] behind each, and a [SEP] at the end of every row, wherever the text is cut.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.core.errors import require
from lib.models.language_model import LanguageModel, may_be_noised, tokenizer_of
from lib.texts.articles import format_article, pack

Token = tuple[int, int, bool]  # id, characters, whether it is part of a text


@dataclass(frozen=True)
class Rows:
    """Rows of one length.

    Attributes:
        ids: clean token ids.
        chars: characters that a token stands for, white space before it included.
        is_text: True for tokens of a text, False for those that frame it.
    """

    ids: Int[Tensor, "row position"]
    chars: Int[Tensor, "row position"]
    is_text: Bool[Tensor, "row position"]

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.ids)

    def __getitem__(self, chosen: slice) -> "Rows":
        """Return some of the rows."""
        return Rows(self.ids[chosen], self.chars[chosen], self.is_text[chosen])


def joined(first: Rows, second: Rows) -> Rows:
    """Return the rows of both."""
    pairs = ((first.ids, second.ids), (first.chars, second.chars), (first.is_text, second.is_text))
    return Rows(*(torch.cat(pair) for pair in pairs))


def model_rows(model: LanguageModel, articles: Sequence[dict[str, str]], *, length: int) -> Rows:
    """Write articles (description before the text) as rows of the kind that a model was trained on, in the order given.

    Args:
        model: an encoder that was always shown its special tokens gets frames; every other model documents, packed.
        articles: title, extract, description and topic of each.
        length: tokens of a row.

    Raises:
        InputError: the model has no tokenizer, or that no end of text; all articles together are shorter than one row.
    """
    make = framed if model.seen_token_ids else packed
    return make(tokenizer_of(model), [format_article(row, description_last=False) for row in articles], length=length)


def framed(tok: PreTrainedTokenizerBase, texts: Sequence[str], *, length: int) -> Rows:
    """Cut one stream of texts into rows of [CLS], `length` - 2 tokens, [SEP]; a [SEP] stands between two texts.

    Args:
        tok: has [CLS] and [SEP].
        texts: in order; the last part of a row is dropped.
        length: tokens of a row.

    Raises:
        InputError: too few texts for a row, or a tokenizer without these tokens.
    """
    first, last = (_framing(tok, name) for name in ("cls", "sep"))
    stream = [token for text in _marked(tok, texts) for token in (*text, last)]
    inner = length - 2
    starts = range(0, len(stream) - inner + 1, inner)
    return _rows([[first, *stream[start : start + inner], last] for start in starts], length)


def packed(tok: PreTrainedTokenizerBase, texts: Sequence[str], *, length: int) -> Rows:
    """Pack texts as decoders were trained: BOS (where there is one), text, EOS, BOS, ..., see `articles.pack`.

    Args:
        tok: has an end-of-text token.
        texts: in order.
        length: tokens of a row.

    Raises:
        InputError: too few texts for a row, or a tokenizer without an end of text.
    """
    first, last = [] if tok.bos_token_id is None else [_framing(tok, "bos")], _framing(tok, "eos")
    return _rows(list(pack(([*first, *text, last] for text in _marked(tok, texts)), length=length)), length)


def alone(tok: PreTrainedTokenizerBase, text: str) -> Rows:
    """Return one text between BOS and EOS as a row of its own length."""
    row = [_framing(tok, "bos"), *_marked(tok, [text])[0], _framing(tok, "eos")]
    return _rows([row], len(row))


def scored(model: LanguageModel, ids: Int[Tensor, "row position"]) -> Bool[Tensor, "row position"]:
    """Tell which tokens the loss of whole rows counts: all but the first, or all that the model's noise may hide."""
    if not model.is_causal:
        return may_be_noised(model, ids)
    return (torch.arange(ids.shape[1]) > 0).expand(ids.shape)


def character_weights(model: LanguageModel, rows: Rows) -> Float[Tensor, "row"]:
    """Return weights that make one number in nats per character of losses in nats per token, see `loss_per_character`.

    Losses per token compare models of one tokenizer alone. What frames texts costs a decoder something and has no characters;
    an encoder is shown it.
    """
    counted = scored(model, rows.ids)
    return counted.sum(1).double() / rows.chars[counted].sum()


def loss_per_character(loss: Float[Tensor, "*batch row"], weights: Float[Tensor, "row"]) -> float:
    """Return the loss of all rows together in nats per character, the mean over what else there is.

    Args:
        loss: of each row, in nats per scored token.
        weights: of `character_weights`.

    >>> weights = torch.tensor([3.0, 1.0], dtype=torch.float64) / 10  # of 3 and 1 scored tokens, 10 characters together
    >>> loss_per_character(torch.tensor([2.0, 4.0]), weights)  # (3 * 2 + 1 * 4) nats
    1.0
    """
    return round(float((loss.double() * weights.double()).sum(-1).mean()), 12)


def token_chars(tok: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Tokenise texts without special tokens; beside each token the characters since the end of the one before.

    A tokenizer that does not say where its tokens lie gives the length of each, decoded alone.
    """
    if not tok.is_fast:
        plain = cast(list[list[int]], tok(list(texts), add_special_tokens=False)["input_ids"])
        return [(ids, [len(cast(str, tok.decode([number]))) for number in ids]) for ids in plain]
    made = tok(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for ids, offsets in zip(made["input_ids"], made["offset_mapping"], strict=True):
        ends = [0, *(end for _, end in offsets)]
        found.append((ids, [after - before for before, after in itertools.pairwise(ends)]))
    return found


def _marked(tok: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[Token]]:
    """Return every token of every text with its characters, and True."""
    return [[(number, count, True) for number, count in zip(*both, strict=True)] for both in token_chars(tok, texts)]


def _framing(tok: PreTrainedTokenizerBase, name: str) -> Token:
    """Return a special token, which has no characters."""
    number = getattr(tok, f"{name}_token_id")
    words = {"eos": "an end-of-text token, which stands between documents"}.get(name, f"a {name}_token, which frames texts")
    require(number is not None, f"a tokenizer must have {words}", "none", f"set {name}_token in its tokenizer_config.json")
    return cast(int, number), 0, False


def _rows(rows: list[list[Token]], length: int) -> Rows:
    require(bool(rows), f"texts must fill a row of {length} tokens", "too few", "give more")
    ids, chars, is_text = torch.tensor(rows).unbind(-1)
    return Rows(ids.contiguous(), chars.contiguous(), is_text.bool())

"""Texts shipped in `data/`, how an article is written as a document, and token windows and prompts from them."""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.core.config import ROOT
from lib.core.errors import InputError, require
from lib.texts.encoding import encode

DATA = ROOT / "data"
Token = TypeVar("Token")
EXTRACT_CHARS = 700  # about 160 tokens: leaves room for the description after the text in one 256-token window


def read_rows(name: str, *, folder: Path = DATA, fields: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read one JSON-lines file: of `data/`, or one that a user brings.

    Lines end at a newline alone (with a carriage return before it or without): U+2028 and the like are part of a text. Empty
    lines and a byte order mark count for nothing.

    Args:
        name: file name without `.jsonl`, such as `articles_evaluation`.
        folder: where the file lies.
        fields: what every line must have, as text; None is all that the first one has, of whatever type.

    Raises:
        InputError: the file is missing or empty, or a line is no JSON object, no UTF-8, or lacks a field.
    """
    path = folder / f"{name}.jsonl"
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise InputError(f"{path} must be readable JSON lines, got {error}: restore the file") from error
    rows = [(number, _row(line, path, number)) for number, line in enumerate(lines, 1) if line.strip()]
    require(bool(rows), f"{path} must hold one JSON object a line", "an empty file", "restore the file")
    needed = fields if fields is not None else [key for key, value in rows[0][1].items() if value is not None]
    for number, row in rows:
        for field in needed:
            value = row.get(field)
            holds = value is not None if fields is None else isinstance(value, str)
            kind = "a" if fields is None else "a text"
            require(holds, f"line {number} of {path} must have {kind} {field!r}", repr(value), "add it, or take the line out")
    return [row for _, row in rows]


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Read one line."""
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\ud" in line.lower():  # half of a character pair is JSON, but no text that a tokenizer takes
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise InputError(f"line {number} of {path} must be a JSON object in UTF-8, got {error}: correct the line") from error
    require(isinstance(row, dict), f"line {number} of {path} must be a JSON object", type(row).__name__, "correct the line")
    return row


def shorten(text: str, limit: int) -> str:
    """Cut a text at the last sentence end within `limit` characters (at a word when there is none)."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    end = head.rfind(". ")
    return head[: end + 1] if end > limit // 3 else head[: head.rfind(" ")]


def format_article(row: dict[str, str], *, description_last: bool) -> str:
    """Write one article as a document; the description stands before or after the text.

    Both orders are trained on, so that an autoregressive model can also choose a description from the text.
    """
    facts = "".join(f"{name}: {row[key]}\n" for name, key in (("Description", "description"), ("Topic", "topic")) if row[key])
    if description_last:
        return f"Title: {row['title']}\nText: {shorten(row['extract'], EXTRACT_CHARS)}\n{facts}".strip()
    return f"Title: {row['title']}\n{facts}Text: {row['extract']}"


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenise documents as BOS, text, EOS; without a BOS where the tokenizer has none (Qwen2.5's).

    Raises:
        InputError: the tokenizer has no EOS, so that documents could not be told apart.
    """
    rows = cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])
    rule = "a tokenizer must have an end-of-text token, which stands between documents"
    require(tokenizer.eos_token_id is not None, rule, "none", "set eos_token in its tokenizer_config.json")
    start = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    return [[*start, *row, cast(int, tokenizer.eos_token_id)] for row in rows]


def pack(documents: Iterable[list[Token]], *, length: int) -> Iterator[list[Token]]:
    """Pack tokenised documents into windows of exactly `length` tokens that each begin at a document start.

    The document that crosses the end of a window is cut there and its rest dropped.

    >>> list(pack([[1, 2], [3, 4, 5], [6], [7, 8]], length=3))
    [[1, 2, 3], [6, 7, 8]]
    """
    window: list[Token] = []
    for tokens in documents:
        window += tokens
        if len(window) >= length:
            yield window[:length]
            window = []


def article_windows(
    tokenizer: PreTrainedTokenizerBase, articles: list[dict[str, str]], *, length: int
) -> Int[Tensor, "window position"]:
    """Pack articles (description before the text) into token windows, in the order given.

    Raises:
        InputError: all articles together are shorter than one window.
    """
    texts = [format_article(row, description_last=False) for row in articles]
    windows = list(pack(encode_documents(tokenizer, texts), length=length))
    if not windows:
        raise InputError(f"articles must fill at least one window of {length} tokens, got {len(articles)} short ones: add some")
    return torch.tensor(windows)


def article_prompts(
    tokenizer: PreTrainedTokenizerBase, articles: list[dict[str, str]], *, count: int, length: int
) -> Int[Tensor, "prompt position"]:
    """Return the first `length` tokens of `count` articles, spread evenly over the list, with the tokenizer's own BOS if any.

    Which articles are taken depends on the list alone, so that models with different tokenizers get the same ones.

    Raises:
        InputError: fewer articles than prompts, or an article shorter than a prompt.
    """
    long_enough = [row for row in articles if len(row["extract"]) >= 8 * length]
    if count > len(long_enough):
        raise InputError(f"prompts must be at most {len(long_enough)} (articles long enough), got {count}: lower prompts")
    chosen = [long_enough[index * len(long_enough) // count] for index in range(count)]
    rows = [encode(tokenizer, format_article(row, description_last=False)) for row in chosen]
    shortest = min(len(row) for row in rows)
    if shortest < length:
        raise InputError(f"prompt_tokens must be at most {shortest} (the shortest article), got {length}: lower prompt_tokens")
    return torch.tensor([row[:length] for row in rows])

"""Texts shipped in `data/`, how an article is written as a document, and token windows and prompts from them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.core.config import ROOT
from lib.core.errors import InputError, require

DATA = ROOT / "data"
EXTRACT_CHARS = 700  # about 160 tokens: leaves room for the description after the text in one 256-token window


def read_rows(name: str, *, folder: Path = DATA) -> list[dict[str, str]]:
    """Read one JSON-lines file of `data/`.

    Args:
        name: file name without `.jsonl`, such as `articles_evaluation`.
        folder: where the file lies.

    Raises:
        InputError: the file is missing, empty, or a line is not a JSON object.
    """
    path = folder / f"{name}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be readable JSON lines, got {error}: restore the file from the repository") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} must hold one JSON object a line, got something else: restore the file from the repository")
    return rows


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


def pack(documents: Iterable[list[int]], *, length: int) -> Iterator[list[int]]:
    """Pack tokenised documents into windows of exactly `length` tokens that each begin at a document start.

    The document that crosses the end of a window is cut there and its rest dropped.

    >>> list(pack([[1, 2], [3, 4, 5], [6], [7, 8]], length=3))
    [[1, 2, 3], [6, 7, 8]]
    """
    window: list[int] = []
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
    rows = tokenizer([format_article(row, description_last=False) for row in chosen])["input_ids"]
    shortest = min(len(row) for row in rows)
    if shortest < length:
        raise InputError(f"prompt_tokens must be at most {shortest} (the shortest article), got {length}: lower prompt_tokens")
    return torch.tensor([row[:length] for row in rows])

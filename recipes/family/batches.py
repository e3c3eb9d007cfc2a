"""What one training step reads: rows of text and rows of tasks, the same for every member of the family.

Text is packed into windows that each begin with BOS; a document that crosses the end of a window goes on in the next one. A task
document stands alone in its row; its prompt is never noised, and its loss is over the answer alone. An answer of no fixed length
is filled with EOS up to the width of its field, as in LLaDA's fine-tuning, so that its length is learnt too.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lib.core.provenance import replacing
from lib.texts.articles import shorten
from recipes import corpus
from recipes.family import sources, tasks

DESCRIPTION_CHARS = 150
# Documents of each kind in one step, and the length of the row that they are filled up to.
COUNTS = {
    "tiny_add": 48,
    "tiny_facts": 24,
    "tiny_sort": 48,
    "biographies": 48,
    "tiny_sudoku": 32,
    "tiny_recall": 24,
    "tiny_topic": 6,
    "tiny_description": 6,
}
WIDTHS = {
    "tiny_add": 16,
    "tiny_facts": 16,
    "tiny_sort": 32,
    "biographies": 32,
    "tiny_sudoku": 48,
    "tiny_recall": 48,
    "tiny_topic": 48,
    "tiny_description": 96,
}
FIELDS = {"tiny_recall": 3, "tiny_facts": 3, "tiny_topic": 6, "tiny_description": 16}  # tokens of an answer, EOS included


@dataclass(frozen=True)
class Rows:
    """Rows of one length.

    Attributes:
        ids: clean token ids.
        is_answer: positions that are noised and that the loss is taken over (all of a text row).
        is_real: False for the padding after a task document.
    """

    ids: Int[Tensor, "row position"]
    is_answer: Bool[Tensor, "row position"]
    is_real: Bool[Tensor, "row position"]

    def to(self, device: torch.device) -> "Rows":
        """Return the rows on a device."""
        return Rows(self.ids.to(device), self.is_answer.to(device), self.is_real.to(device))


@dataclass(frozen=True)
class Corpus:
    """All that training reads: tokenizer, training windows in order, held-out windows by source, training articles."""

    tok: PreTrainedTokenizerFast
    windows: Int[np.ndarray, "window position"]
    held_out: dict[str, Int[Tensor, "window position"]]
    articles: list[dict[str, str]]


def encode(tok: PreTrainedTokenizerFast, task: str, document: tasks.Document) -> tuple[list[int], list[bool]]:
    """Tokenise a task document: BOS, its pieces, and EOS up to the width of the answer's field (one EOS where it has none)."""
    ids, answer = [cast(int, tok.bos_token_id)], [False]
    last = 0
    for text, is_answer in document:
        piece = cast(list[int], tok(text, add_special_tokens=False)["input_ids"])
        ids += piece
        answer += [is_answer] * len(piece)
        last = len(piece)
    ends = max(1, FIELDS.get(task, 0) - last)
    return [*ids, *[cast(int, tok.eos_token_id)] * ends], [*answer, *[True] * ends]


def fitting(tok: PreTrainedTokenizerFast, task: str, document: tasks.Document) -> tuple[list[int], list[bool]]:
    """Tokenise a task document, without its last questions where it would be longer than its row."""
    while True:
        ids, answer = encode(tok, task, document)
        if len(ids) <= WIDTHS[task]:
            return ids, answer
        document = document[:-2]
        assert document, f"{task} has a document that cannot fit its row"


def stack(tok: PreTrainedTokenizerFast, encoded: Sequence[tuple[list[int], list[bool]]], *, width: int) -> Rows:
    """Put tokenised documents into rows of one width, padding behind."""
    ids = torch.full((len(encoded), width), cast(int, tok.pad_token_id))
    is_answer, is_real = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, answer) in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        is_answer[row, : len(tokens)] = torch.tensor(answer)
        is_real[row, : len(tokens)] = True
    return Rows(ids, is_answer, is_real)


def text_rows(windows: Int[Tensor, "window position"]) -> Rows:
    """Return text windows as rows whose every position is answer."""
    everything = torch.ones_like(windows, dtype=torch.bool)
    return Rows(windows, everything, everything)


def article_document(task: str, row: dict[str, str]) -> tasks.Document:
    """Return the topic or description question of an article."""
    if task == "tiny_topic":
        return tasks.topic_document(row)
    return tasks.description_document(row, shorten(row["extract"], DESCRIPTION_CHARS))


def asks_well(tok: PreTrainedTokenizerFast, row: dict[str, str]) -> bool:
    """Tell whether an article has a topic and a description to ask for, and both questions fit into their rows."""
    if not row["description"] or row["topic"] in ("", "Uncategorized"):
        return False
    return all(
        len(encode(tok, task, article_document(task, row))[0]) <= WIDTHS[task] for task in ("tiny_topic", "tiny_description")
    )


def step_rows(corpus_: Corpus, step: int, *, text: int, tasks_share: float, seed: int) -> list[Rows]:
    """Return the rows of one step: text first, then the tasks by the length of their rows.

    Args:
        corpus_: tokenizer and windows.
        step: number of the step; rows depend on it and on the seed alone.
        text: rows of text.
        tasks_share: factor on `COUNTS` (a toy run takes fewer).
        seed: of the run.
    """
    tok = corpus_.tok
    taken = np.arange(step * text, (step + 1) * text) % len(corpus_.windows)
    found = [text_rows(torch.from_numpy(corpus_.windows[taken].astype(np.int64)))]
    for width in sorted(set(WIDTHS.values())):
        encoded = []
        for task in (name for name in COUNTS if WIDTHS[name] == width):
            count = max(1, round(COUNTS[task] * tasks_share))
            for number in range(step * count, (step + 1) * count):
                if task in tasks.MAKERS or task in ("tiny_facts", "biographies"):
                    document = tasks.training_document(task, number, seed=seed)
                else:
                    row = random.Random(f"{task}|{seed}|{number}").choice(corpus_.articles)
                    document = article_document(task, row)
                encoded.append(fitting(tok, task, document))
        found.append(stack(tok, encoded, width=width))
    return found


def pack(documents: Sequence[list[int]], *, length: int, bos: int) -> Iterator[list[int]]:
    """Pack tokenised documents (BOS first) into windows that all begin with BOS, dropping nothing but the last part window.

    >>> list(pack([[0, 1, 2], [0, 3], [0, 4, 5, 6, 7]], length=4, bos=0))
    [[0, 1, 2, 0], [0, 3, 0, 4], [0, 5, 6, 7]]
    """
    window: list[int] = []
    for tokens in documents:
        rest = tokens
        while rest:
            if not window and rest[0] != bos:
                window = [bos]
            room = length - len(window)
            window, rest = window + rest[:room], rest[room:]
            if len(window) == length:
                yield window
                window = []


def tokenise(tok: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Return the tokens of each text between BOS and EOS."""
    rows = cast(list[list[int]], tok(texts, add_special_tokens=False)["input_ids"])
    return [[cast(int, tok.bos_token_id), *row, cast(int, tok.eos_token_id)] for row in rows]


def build(
    tok: PreTrainedTokenizerFast,
    documents: dict[str, list[sources.Document]],
    articles: list[dict[str, str]],
    *,
    length: int,
    windows: int,
    seed: int,
) -> tuple[Int[np.ndarray, "window position"], dict[str, int]]:
    """Make training windows in order: rounds of every source (the encyclopaedia several times a round), shuffled by the seed.

    Returns:
        The windows, and the distinct tokens of each source.
    """
    plain = [tokenise(tok, [one.text for one in found if not sources.is_held_out(one.key)]) for found in documents.values()]
    once = [row for rows in plain for row in rows]
    training = corpus.split_articles(articles, "train")
    forms = [tokenise(tok, sources.article_texts(training, last=lambda _, last=last: last)) for last in (False, True)]
    distinct = {name: sum(map(len, rows)) for name, rows in zip(documents, plain, strict=True)}
    distinct["encyclopaedia"] = sum(map(len, forms[0]))
    found: list[np.ndarray] = []
    total = number = 0
    while total < windows:
        rng = random.Random(f"windows-{seed}-{number}")
        rows = [
            *once,
            *(forms[rng.random() < 0.5][i] for _ in range(sources.ENCYCLOPAEDIA_PER_ROUND) for i in range(len(training))),
        ]
        rng.shuffle(rows)
        packed = np.array(list(pack(rows, length=length, bos=cast(int, tok.bos_token_id))), dtype=np.uint16)
        found.append(packed[rng.sample(range(len(packed)), len(packed))])
        total, number = total + len(packed), number + 1
    return np.concatenate(found)[:windows], distinct


def held_out_windows(
    tok: PreTrainedTokenizerFast,
    documents: dict[str, list[sources.Document]],
    articles: list[dict[str, str]],
    *,
    length: int,
    windows: int,
) -> dict[str, Int[Tensor, "window position"]]:
    """Return the first held-out windows of each source; the encyclopaedia's are of the evaluation split."""
    texts = {name: [one.text for one in found if sources.is_held_out(one.key)] for name, found in documents.items()}
    texts["encyclopaedia"] = sources.article_texts(corpus.split_articles(articles, "evaluation"), last=lambda _: False)
    bos = cast(int, tok.bos_token_id)
    packed = {name: list(pack(tokenise(tok, found), length=length, bos=bos))[:windows] for name, found in texts.items()}
    return {name: torch.tensor(found) for name, found in packed.items() if found}


def save_windows(path: Path, windows: np.ndarray) -> None:
    """Write the windows in one step: the file says that all others are there."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, windows)

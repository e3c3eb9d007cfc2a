"""Token windows of the corpora that the paper's calibration and loss use, from the hub at pinned revisions or from local rows."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.core.errors import InputError
from lib.core.hub import first_line
from lib.core.runtime import generator
from lib.core.wheels import UnavailableError
from lib.texts import articles
from lib.texts.encoding import encode

Corpus = Literal["wikitext2", "c4", "articles"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class HubText:
    """A text column of a data set on the hub.

    Attributes:
        path, name, revision: as `datasets.load_dataset` takes them.
        files: by split, where the whole set would be too much to fetch.
        joiner: between the texts of a corpus that is read as one stream; None draws from one document at a time.
    """

    path: str
    name: str | None
    revision: str
    files: dict[Split, str] | None
    joiner: str | None


# The release joins WikiText-2 by one space; its C4 loader cannot run (it names undefined functions), so SparseGPT's is followed.
SOURCES: dict[Corpus, HubText] = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3", None, " "),
    "c4": HubText(
        "allenai/c4",
        None,
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"},
        None,
    ),
}
ARTICLES: dict[Split, str] = {"train": "articles_calibration", "test": "articles_evaluation"}


def identity(corpus: Corpus) -> str:
    """Name a corpus with its revision, as the grid's cells record it.

    >>> identity("wikitext2")
    'Salesforce/wikitext@b08601e04326c79dfdd32d625aee71d232d685c3'
    """
    return f"{SOURCES[corpus].path}@{SOURCES[corpus].revision}" if corpus in SOURCES else "articles"


def windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int,
    split: Split = "train",
    rows: Path | None = None,
) -> Int[Tensor, "window position"]:
    """Draw windows of consecutive tokens.

    Args:
        corpus: WikiText-2 is one stream of tokens, cut at random places; C4 is drawn document by document, each long enough and
            cut at a random place; `articles` are those that ship, packed.
        tokenizer: of the model that will read them.
        count: windows.
        length: tokens of each.
        seed: of the places; windows of a smaller count are the first of a larger one.
        split: `"train"` for calibration, `"test"` for the loss.
        rows: folder with `CORPUS/SPLIT.jsonl` (a `text` each) to read instead of the hub.

    Raises:
        InputError: the text is too short.
        UnavailableError: the hub's data cannot be fetched.

    Source: paper.md sections 1.3 and 2: WikiText-2 raw, training texts joined by a space, random windows; C4 as SparseGPT draws.
    """
    if corpus == "articles":
        made = articles.article_windows(tokenizer, articles.read_rows(ARTICLES[split]), length=length)
        return made[torch.randperm(len(made), generator=generator(seed, "corpus", corpus, split))[: _enough(len(made), count)]]
    texts = _local(rows, corpus, split) if rows is not None else _fetched(SOURCES[corpus], split)
    joiner = SOURCES[corpus].joiner
    stream = generator(seed, "corpus", corpus, split)
    if joiner is None:
        return _from_documents(list(texts), lambda text: encode(tokenizer, text), count=count, length=length, stream=stream)
    return _from_stream(encode(tokenizer, joiner.join(texts), special=False), count=count, length=length, stream=stream)


def file_windows(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int
) -> Int[Tensor, "window position"]:
    """Draw windows from a file of the user's own.

    Args:
        path: `.jsonl` with a `text` in each line, drawn document by document as C4 is; any other is one text, as WikiText-2 is.
        tokenizer: of the model that will read them.
        count: windows.
        length: tokens of each.
        seed: of the places.

    Raises:
        InputError: a file that cannot be read, or too short.
    """
    stream = generator(seed, "corpus", path.name)
    if path.suffix == ".jsonl":
        texts = [row["text"] for row in articles.read_rows(path.stem, folder=path.parent, fields=["text"])]
        return _from_documents(texts, lambda text: encode(tokenizer, text), count=count, length=length, stream=stream)
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a text file in UTF-8, got {error}: name another, or JSON lines with a text") from error
    return _from_stream(encode(tokenizer, whole, special=False), count=count, length=length, stream=stream)


def _from_stream(ids: list[int], *, count: int, length: int, stream: torch.Generator) -> Tensor:
    """Cut windows out of one long text, at places that may overlap."""
    last = len(ids) - length
    if last < 0:
        raise InputError(f"a corpus must have a window of {length} tokens, got {len(ids)} in all: shorten the windows")
    places = [int(torch.randint(last + 1, (), generator=stream)) for _ in range(count)]
    whole = torch.tensor(ids)
    return torch.stack([whole[place : place + length] for place in places])


def _from_documents(
    texts: list[str], read: Callable[[str], list[int]], *, count: int, length: int, stream: torch.Generator
) -> Tensor:
    """Cut one window out of each of several documents that are long enough, in random order."""
    found = []
    for index in torch.randperm(len(texts), generator=stream).tolist():
        if len(found) == count:
            break
        if len(texts[index]) < length:  # a token has at least one character
            continue
        ids = read(texts[index])
        if len(ids) >= length:
            place = int(torch.randint(len(ids) - length + 1, (), generator=stream))
            found.append(torch.tensor(ids[place : place + length]))
    _enough(len(found), count)
    return torch.stack(found)


def _enough(there: int, count: int) -> int:
    if there < count:
        raise InputError(f"windows must be at most {there} (those that the corpus has), got {count}: lower them or shorten them")
    return count


def _local(folder: Path, corpus: Corpus, split: Split) -> Iterator[str]:
    """Read local rows of a corpus."""
    return (row["text"] for row in articles.read_rows(split, folder=folder / corpus, fields=["text"]))


def _fetched(source: HubText, split: Split) -> Iterable[str]:
    """Fetch the texts of a corpus from the hub, or from its cache."""
    import datasets

    where: dict[str, Any] = {"revision": source.revision, "split": split, "name": source.name}
    if source.files is not None:
        where |= {"data_files": {split: source.files[split]}, "name": None}
    try:
        return cast(Iterable[str], datasets.load_dataset(source.path, **where)["text"])
    except (OSError, ValueError) as error:  # what datasets raises without a network, or for a revision that is gone
        reason = first_line(error)
        raise UnavailableError(
            f"{source.path}@{source.revision} must be cached or reachable, got: {reason}: connect, or set another corpus"
        ) from error

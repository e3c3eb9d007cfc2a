"""Prompts of unequal length in one batch: each row equals the plain samplers on its prompt alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.diffusion import commits, ragged, sampler
from lib.models import loading
from lib.models.language_model import LanguageModel
from recipes import rehearsal_models
from tests import tiny

LENGTHS = (9, 4, 1, 13, 4, 7)
DIFFUSION = ("llada", "dream", "plain")
AUTOREGRESSIVE = ("llama", "qwen2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    """Models of released layouts by name, in float64, where rounding cannot hide or feign a difference."""
    folder, loaded = tmp_path_factory.mktemp("ragged"), {}

    def get(name: str) -> LanguageModel:
        if name not in loaded:
            if name == "plain":
                tiny.folder(folder / name, causal=False)
            else:
                rehearsal_models.write(folder / name, name, seed=0)
            loaded[name] = loading.load(folder / name, dtype=torch.float64)
        return loaded[name]

    return get


def prompts(model: LanguageModel, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Texts without special tokens."""
    vocab = min(tiny.MASK, model.network.config.vocab_size)  # pyright: ignore
    return [tiny.ids(length, seed=number, vocab=vocab).tolist() for number, length in enumerate(lengths)]


def alone(model: LanguageModel, texts: Sequence[Sequence[int]], *, new_tokens: int, **options: Any) -> list[list[int]]:
    """One text after the other through the plain samplers."""
    generate = sampler.continue_text if model.is_causal else sampler.sample
    rows = [generate(model, torch.tensor([text]).long(), new_tokens=new_tokens, **options)[0, len(text) :] for text in texts]
    return [row.tolist() for row in rows]


# Denoising


@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize(("steps", "block"), [(12, None), (6, 4), (4, 6), (12, 3), (4, 12)])
def test_rows_equal_the_sampler_alone(
    made: Callable[[str], LanguageModel], name: str, cfg: float, steps: int, block: int | None
) -> None:
    model = made(name)
    texts = prompts(model)
    options: dict[str, Any] = {"new_tokens": 12, "steps": steps, "block_length": block, "cfg_scale": cfg}
    together = ragged.denoise(model, texts, **options)
    assert together.tolist() == alone(model, texts, **options)
    assert len({tuple(row) for row in together.tolist()}) == len(texts)  # rows do differ


@pytest.mark.parametrize("name", DIFFUSION)
def test_single_precision_gives_the_same_texts(made: Callable[[str], LanguageModel], name: str) -> None:
    model = made(name)
    single = loading.load(Path(model.source.source))
    assert single.network.dtype == torch.float32
    texts = prompts(single)
    options: dict[str, Any] = {"new_tokens": 8, "steps": 4, "block_length": 4, "cfg_scale": 0.5}
    assert ragged.denoise(single, texts, **options).tolist() == alone(single, texts, **options)


@pytest.mark.parametrize("name", DIFFUSION)
def test_padding_would_matter_and_its_content_does_not(
    made: Callable[[str], LanguageModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the mask the same rows come out wrong; with it, padding may be any token, the mask's included."""
    model = made(name)
    texts, options = prompts(model), {"new_tokens": 8, "steps": 8, "block_length": 4, "cfg_scale": 0.5}
    expected = ragged.denoise(model, texts, **options).tolist()
    for padding in (7, model.mask_token_id):
        monkeypatch.setattr(ragged, "PADDING", padding)
        assert ragged.denoise(model, texts, **options).tolist() == expected
    keep = sampler.logits_at
    monkeypatch.setattr(sampler, "logits_at", lambda model, ids, where, **_: keep(model, ids, where))
    wrong = ragged.denoise(model, texts, **options).tolist()
    longest = LENGTHS.index(max(LENGTHS))
    assert wrong[longest] == expected[longest]
    assert all(a != b for index, (a, b) in enumerate(zip(wrong, expected, strict=True)) if index != longest)


def test_the_unguided_half_sees_no_padding_either(made: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask for the first half only, with ones for the second, gives other texts."""
    model = made("llada")
    texts, options = prompts(model), {"new_tokens": 8, "steps": 8, "cfg_scale": 2.0}
    expected = ragged.denoise(model, texts, **options).tolist()
    keep = sampler.logits_at

    def half(model: LanguageModel, ids: Tensor, where: Tensor, *, attention_mask: Tensor) -> Tensor:
        spoiled = attention_mask.clone()
        spoiled[len(spoiled) // 2 :] = 1
        return keep(model, ids, where, attention_mask=spoiled)

    monkeypatch.setattr(sampler, "logits_at", half)
    assert ragged.denoise(model, texts, **options).tolist() != expected


@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_masks_in_a_prompt_stay_there(made: Callable[[str], LanguageModel], name: str, cfg: float) -> None:
    """They are neither filled nor counted; an empty prompt is nothing but masks."""
    model = made(name)
    texts: list[list[int]] = [*prompts(model, (6, 9, 3)), []]
    for text, place in zip(texts[:3], (5, 0, 1), strict=True):
        text[place] = model.mask_token_id or 0
    options: dict[str, Any] = {"new_tokens": 6, "steps": 4, "block_length": 3, "cfg_scale": cfg}
    assert ragged.denoise(model, texts, **options).tolist() == alone(model, texts, **options)


def test_a_network_that_predicts_masks_is_followed() -> None:
    """A committed mask is a mask still: what the plain sampler makes of that, this one does too."""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table[3] = torch.tensor([0.0, 1.0, 0.5, 1.2])

    def logits_of(ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], dtype=torch.float64)[:, None]
        return table[ids] + torch.sin(place * torch.tensor([1.0, 2.0, 3.0, 4.0]))

    texts = [[0, 1, 2], [1], [2, 2, 0, 1, 1]]
    options: dict[str, Any] = {"new_tokens": 6, "steps": 6, "block_length": 3}
    model = tiny.stub(logits_of, vocab=4, mask_token_id=3)
    expected = alone(model, texts, **options)
    assert any(3 in row for row in expected)
    assert ragged.denoise(model, texts, **options).tolist() == expected


@pytest.mark.parametrize("width", [5, 40])
def test_equal_confidences_are_broken_alike(width: int) -> None:
    """Which of equals goes first may depend on the length of a row, so padding must not be part of it."""
    model = tiny.stub(lambda ids: torch.nn.functional.one_hot(ids % 3, 4).float(), vocab=4, mask_token_id=3)
    texts = [[0, 1], [1, 2, 0], [2] * width]
    seen: list[Tensor] = []
    keep = commits.most_confident

    def watch(confidence: Tensor, counts: Tensor) -> Tensor:
        seen.append(keep(confidence, counts))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commits, "most_confident", watch)
        ragged.denoise(model, texts, new_tokens=24, steps=8)
        together = [[mark.tolist()[0] for mark in seen[row::3]] for row in range(3)]
        seen.clear()
        alone(model, texts, new_tokens=24, steps=8)
    assert [marks for row in together for marks in row] == [mark.tolist()[0] for mark in seen]


def test_forward_passes_are_shared_and_the_head_sees_masks_of_the_block_only() -> None:
    model = tiny.stub(lambda ids: torch.zeros((*ids.shape, 4)), vocab=4, mask_token_id=3)
    got = ragged.denoise(model, [[1, 2, 0], [1]], new_tokens=8, steps=4, block_length=4)
    assert got.shape == (2, 8)
    calls: Any = model.network.calls  # pyright: ignore
    assert [tuple(ids.shape) for ids in calls.inputs] == [(2, 11)] * 4
    assert calls.head_rows == 2 * (4 + 2 + 4 + 2)


@pytest.mark.parametrize("name", ["llada", "llama"])
def test_equal_lengths_are_the_plain_samplers_exactly(
    made: Callable[[str], LanguageModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mask is made at all: attention with one rounds differently."""
    model = made(name)
    texts = prompts(model, (5, 5, 5))
    monkeypatch.setattr(ragged, "_padded", None)
    options: dict[str, Any] = {"new_tokens": 6} if model.is_causal else {"new_tokens": 6, "steps": 3, "cfg_scale": 1.0}
    generate = sampler.continue_text if model.is_causal else sampler.sample
    together = ragged.continue_texts if model.is_causal else ragged.denoise
    assert torch.equal(together(model, texts, **options), generate(model, torch.tensor(texts), **options)[:, 5:])


# Autoregression


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize("new_tokens", [1, 15])
def test_continuations_equal_those_alone(made: Callable[[str], LanguageModel], name: str, new_tokens: int) -> None:
    model = made(name)
    texts = prompts(model)
    together = ragged.continue_texts(model, texts, new_tokens=new_tokens)
    assert together.tolist() == alone(model, texts, new_tokens=new_tokens)
    assert len({tuple(row) for row in together.tolist()}) > len(texts) // 2
    assert (
        ragged.continue_texts(loading.load(Path(model.source.source)), texts, new_tokens=new_tokens).tolist() == together.tolist()
    )


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_padding_on_the_left_would_matter_and_its_content_does_not(
    made: Callable[[str], LanguageModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(name)
    texts = prompts(model)
    expected = ragged.continue_texts(model, texts, new_tokens=8).tolist()
    for padding in (7, 1000):
        monkeypatch.setattr(ragged, "PADDING", padding)
        assert ragged.continue_texts(model, texts, new_tokens=8).tolist() == expected
    keep, longest = model.network.forward, LENGTHS.index(max(LENGTHS))
    monkeypatch.setattr(model.network, "forward", lambda attention_mask, **given: keep(**given))
    wrong = ragged.continue_texts(model, texts, new_tokens=8).tolist()
    assert wrong[longest] == expected[longest]
    assert all(a != b for index, (a, b) in enumerate(zip(wrong, expected, strict=True)) if index != longest)


def test_earlier_tokens_are_read_once(made: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of each row go on from its own prompt, whatever stands to its left."""
    model = made("qwen2")
    seen: list[tuple[tuple[int, ...], list[int]]] = []
    keep = model.network.forward

    def watch(**given: Any) -> Any:
        seen.append((tuple(given["input_ids"].shape), given["position_ids"][:, -1].tolist()))
        return keep(**given)

    monkeypatch.setattr(model.network, "forward", watch)
    ragged.continue_texts(model, prompts(model, (5, 2)), new_tokens=3)
    assert seen == [((2, 5), [4, 1]), ((2, 1), [5, 2]), ((2, 1), [6, 3])]


# Refusals


def test_what_cannot_be_generated_is_refused(made: Callable[[str], LanguageModel]) -> None:
    dlm, causal = made("llada"), made("llama")
    with pytest.raises(InputError, match="must use a causal model, got llada: use denoise"):
        ragged.continue_texts(dlm, [[1], [2, 3]], new_tokens=2)
    with pytest.raises(InputError, match="must use a diffusion model, got llama"):
        ragged.denoise(causal, [[1], [2, 3]], new_tokens=2, steps=2)
    with pytest.raises(InputError, match="block_length must divide new_tokens, got 4 and 10"):
        ragged.denoise(dlm, [[1], [2, 3]], new_tokens=10, steps=10, block_length=4)
    with pytest.raises(InputError, match="at least one token, got an empty one: begin it with BOS"):
        ragged.continue_texts(causal, [[1], []], new_tokens=2)
    with pytest.raises(InputError, match="at least one prompt, got none: leave"):
        ragged.denoise(dlm, [], new_tokens=2, steps=2)
    with pytest.raises(InputError, match="at least one prompt, got none: leave"):
        ragged.continue_texts(causal, [], new_tokens=2)

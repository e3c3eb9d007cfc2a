"""The mask token from its sources, and what goes into a configuration and comes back."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lib.checkpoints import facts, recognition
from lib.checkpoints.families import FAMILIES, Family
from lib.core.errors import InputError


def tokenizer(added: dict[str, int] | None = None, *, mask: int | None = None, end: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with added tokens at these ids; `mask` and `end` name their own tokens where nothing is added there."""
    names = {place: token for token, place in (added or {}).items()}
    vocabulary = {names.get(place, f"w{place}"): place for place in range(20)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")))
    made.add_tokens(list(names.values()), special_tokens=True)
    for kind, place in (("mask_token", mask), ("eos_token", end)):
        if place is not None:
            setattr(made, kind, names.get(place, f"w{place}"))
    return made


def read(raw: dict[str, Any], family: Family = FAMILIES["illada"], spoken: Any = None, **options: Any) -> facts.Facts:
    given: dict[str, Any] = {"vocabulary": 100, "folder": Path("there"), "generation": {}, **options}
    return facts.read(raw, family, spoken, **given)


@pytest.mark.parametrize(
    ("raw", "spoken", "mask"),
    [
        ({"mask_token_id": 7}, None, 7),  # the family's 5 is asked last
        ({"mask_token_id": 7}, tokenizer({"<|mask|>": 7, "<other>": 9}, mask=7), 7),
        ({}, tokenizer(mask=8), 8),
        *(({}, tokenizer({token: 9}), 9) for token in facts.MASK_TOKENS),
        ({}, tokenizer({"<|mask|>": 9, "<[MASK]>": 10}, mask=10), 10),
        ({}, tokenizer({"<unk>": 3}), 5),
        ({"mask_token_id": 0}, None, 0),
    ],
)
def test_the_mask_is_what_all_sources_say(raw: dict[str, Any], spoken: Any, mask: int) -> None:
    assert read(raw, spoken=spoken).mask_token_id == mask


@pytest.mark.parametrize(
    ("raw", "spoken", "got"),
    [
        ({"mask_token_id": 7}, tokenizer(mask=8), "7 in config.json, 8 in the tokenizer"),
        ({"mask_token_id": 7}, tokenizer({"<|mdm_mask|>": 9}), "7 in config.json, 9 in its added tokens"),
        ({}, tokenizer({"<|mask|>": 9}, mask=8), "8 in the tokenizer, 9 in its added tokens"),
        ({}, tokenizer({"<|mask|>": 9, "<[MASK]>": 10}), "9 or 10 in its added tokens"),
    ],
)
def test_sources_that_disagree_are_refused(raw: dict[str, Any], spoken: Any, got: str) -> None:
    with pytest.raises(InputError, match=f"must name the same one, got {got}"):
        read(raw, spoken=spoken)


@pytest.mark.parametrize("mask", [100, 126336, -1, True, "5", 5.0])
def test_a_mask_outside_the_vocabulary_is_refused(mask: object) -> None:
    with pytest.raises(InputError, match="must be one of the 100 tokens of the network"):
        read({"mask_token_id": mask})


def test_a_familys_mask_must_lie_in_the_vocabulary() -> None:
    with pytest.raises(InputError, match="must name its mask token, got none in there"):
        read({}, FAMILIES["llada"])
    assert read({}, FAMILIES["llada"], vocabulary=126464).mask_token_id == 126336


def test_stop_tokens_are_gathered_and_lie_in_the_vocabulary() -> None:
    found = read(
        {"eos_token_id": [4, 2], "mask_token_id": 1}, FAMILIES["sdar"], tokenizer(end=6, mask=1), generation={"eos_token_id": 2}
    )
    assert found.stop_token_ids == (4, 2, 6)
    wide = read({"eos_token_id": 151643}, FAMILIES["sdar"], vocabulary=151936)
    assert wide.stop_token_ids == (151645, 151643)
    assert read({"eos_token_id": 4, "stop_token_ids": [8]}).stop_token_ids == (8,)


@pytest.mark.parametrize("shift", [2, -1, "one"])
def test_another_shift_is_refused(shift: object) -> None:
    with pytest.raises(InputError, match="logit_shift must be 0 or 1"):
        read({"logit_shift": shift})
    assert read({"logit_shift": 0}, FAMILIES["dream"], vocabulary=152064).logit_shift == 0


def test_what_is_remembered_is_read_again() -> None:
    found = facts.Facts("sdar", False, 7, 1, "block-causal", 16, "start", (3, 4))
    config = LlamaConfig()
    facts.remember_(config, found)
    raw = config.to_dict()
    assert raw["attention_kind"] == "block-causal"
    family = recognition.recognise({**raw, "architectures": ["LlamaForCausalLM"]})
    assert facts.read(raw, family, None, vocabulary=100, folder=Path("there"), generation={}) == found


def test_an_autoregressive_configuration_stays_plain() -> None:
    config = LlamaConfig()
    facts.remember_(config, facts.Facts("llama", True, None, 1, "causal", None, "prompt", (2,)))
    assert config.to_dict().keys() - LlamaConfig().to_dict().keys() == {"is_causal", "stop_token_ids"}

"""Folders that somebody or something has spoilt: read as what they say, or refused in one line; never read as something else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from lib.checkpoints import files, lookup, tokenizers
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.models import loading, streaming
from lib.models.language_model import LanguageModel, tokenizer_of
from tests import tiny

READERS: Any = pytest.mark.parametrize("read", [loading.load, streaming.load])
Read = Callable[[Path], LanguageModel]
UP = "model.layers.0.mlp.up_proj.weight"


def logits(model: LanguageModel) -> Tensor:
    with torch.inference_mode():
        return model.network(input_ids=tiny.ids(1, 10), use_cache=False).logits


def refused(read: Read, folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    """A checkpoint in several shards, and where its tensors lie."""
    tiny.folder(folder, shard_size="20KB")
    return folder, files.shard_of(folder / files.INDEX)


# The index


@READERS
@pytest.mark.parametrize(
    "content", ['{"weight_map": null}', '{"metadata": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_says_nothing_is_refused(read: Read, content: str, tmp_path: Path) -> None:
    folder, _ = sharded(tmp_path / "x")
    (folder / files.INDEX).write_text(content)
    refused(read, folder, r"index\.json must name the file of every tensor in weight_map")
    refused(lambda path: lookup.check(ModelSource(str(path))), folder, "in weight_map")  # type: ignore[arg-type, return-value]


@READERS
@pytest.mark.parametrize("last", [True, False])
def test_of_two_copies_the_one_is_read_that_the_index_names(read: Read, last: bool, tmp_path: Path) -> None:
    folder, where = sharded(tmp_path / "x")
    wanted, name = logits(loading.load(folder)), "model.layers.0.mlp.up_proj.weight"
    others = [shard for shard in sorted(set(where.values())) if (shard > where[name]) == last and shard != where[name]]
    for shard in others:
        save_file({**load_file(folder / shard), name: torch.ones(40, 32)}, folder / shard)
    assert others and torch.equal(logits(read(folder)), wanted)


@READERS
def test_a_single_file_beside_an_index_is_refused(read: Read, tmp_path: Path) -> None:
    """transformers takes the single file and this project took the shards, without a word."""
    folder, where = sharded(tmp_path / "x")
    wanted, single = logits(loading.load(folder)), tiny.folder(tmp_path / "single", seed=1) / "model.safetensors"
    (folder / "model.safetensors").write_bytes(single.read_bytes())
    refused(read, folder, "must hold its weights once, got model.safetensors beside")
    with pytest.raises(InputError, match="must hold its weights once"):
        lookup.check(ModelSource(str(folder)))
    save_file({name: tensor for shard in set(where.values()) for name, tensor in load_file(folder / shard).items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / files.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(where, "model.safetensors")}))
    assert torch.equal(logits(read(folder)), wanted), "an index may name the single file"


# Kinds of numbers


@READERS
def test_every_shard_may_have_floats_of_its_own(read: Read, tmp_path: Path) -> None:
    """Those of double precision were taken for a quantization."""
    folder, where = sharded(tmp_path / "x")
    wanted = logits(loading.load(folder))
    for dtype, shard in zip(
        (torch.float64, torch.bfloat16, torch.float64, torch.float16), sorted(set(where.values())), strict=True
    ):
        save_file({key: value.to(dtype) for key, value in load_file(folder / shard).items()}, folder / shard)
    assert torch.allclose(logits(read(folder)), wanted, atol=0.3)


@READERS
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_a_matrix_of_other_numbers_is_refused(read: Read, dtype: torch.dtype, tmp_path: Path) -> None:
    """True and False were read as one and zero."""
    folder = tiny.folder(tmp_path / "x")
    tiny.edit_weights(folder, {UP: load_file(folder / files.SINGLE)[UP].to(dtype)})
    refused(read, folder, "weights must be plain floats")


# Settings


@READERS
@pytest.mark.parametrize("layout", ["llama", "llada_tiny", "sdar"])
def test_rotations_that_are_said_twice_must_agree(read: Read, layout: str, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x") if layout == "llama" else tiny.copied(tiny.PARITY / layout, tmp_path / "x")
    inside = {"rope_type": "default", "rope_theta": 77.0}
    refused(read, tiny.edit_config(folder, rope_theta=5e5, rope_parameters=inside), "rope_theta must be one in all of .*77.0")
    read(tiny.edit_config(folder, rope_theta=77, rope_parameters=inside))
    if layout == "llama":
        scaling = {"type": "linear", "factor": 2.0}
        refused(read, tiny.edit_config(folder, rope_scaling=scaling), "the type of rotations must be one in all of")
        both = {"rope_parameters": {**inside, "rope_type": "linear", "factor": 4.0}, "rope_scaling": scaling}
        refused(read, tiny.edit_config(folder, **both), "the factor of rotations must be one")


@pytest.mark.parametrize("said", ["LlamaForCausalLM", None, [None, "LlamaForCausalLM"]])
def test_an_architecture_may_be_missing_or_no_list(said: object, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    wanted = logits(loading.load(folder))
    raw = {**json.loads((folder / "config.json").read_text()), "architectures": said}
    (folder / "config.json").write_text(json.dumps(raw))
    assert torch.equal(logits(loading.load(folder)), wanted)


def test_an_architecture_that_is_no_list_is_not_overlooked(tmp_path: Path) -> None:
    """A Stable-DiffCoder says `llama` as its type, and was read as one."""
    model = loading.load(tiny.edit_config(tiny.folder(tmp_path / "x"), architectures="StableDiffcoderForCausalLM"))
    assert (model.family, model.is_causal, model.block_length) == ("stable-diffcoder", False, 4)


@READERS
@pytest.mark.parametrize("changes", [{"hidden_act": "swoosh"}, {"rope_parameters": {"rope_type": "wavy", "rope_theta": 1e4}}])
def test_a_network_that_cannot_be_built_is_refused_in_one_line(read: Read, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.edit_config(tiny.folder(tmp_path / "x"), **changes)
    refused(read, folder, r"config\.json must (describe a network that transformers can build|hold a complete)")


@READERS
@pytest.mark.parametrize("lost", ["llama_4_scaling_beta", "original_max_position_embeddings"])
def test_rotations_without_the_scale_of_queries_are_refused(read: Read, lost: str, tmp_path: Path) -> None:
    """They were loaded, and the first pass ended in a TypeError."""
    folder = tiny.copied(tiny.PARITY / "nemotron_labs_diffusion", tmp_path / "x")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    plain = {key: rope[key] for key in ("llama_4_scaling_beta", "original_max_position_embeddings", "rope_theta") if key != lost}
    refused(read, tiny.edit_config(folder, rope_parameters={**plain, "rope_type": "default"}), f"complete configuration.*{lost}")
    logits(read(tiny.edit_config(folder, rope_parameters=rope)))


# Mask and stop tokens


@pytest.mark.parametrize("said", [[30], "30", True, 30.0, -1, 31])
def test_a_mask_token_is_one_whole_number(said: object, tmp_path: Path) -> None:
    refused(loading.load, tiny.edit_config(tiny.folder(tmp_path / "x", causal=False), mask_token_id=said), "one of the 31 tokens")


def test_the_settings_of_generation_may_not_contradict_the_mask(tmp_path: Path) -> None:
    folder = tiny.copied(tiny.PARITY / "sdar", tmp_path / "x")
    (folder / "generation_config.json").write_text(json.dumps({"mask_token_id": 5}))
    refused(loading.load, folder, r"got 127 in config\.json, 5 in generation_config\.json")
    (folder / "generation_config.json").write_text(json.dumps({"mask_token_id": 127, "eos_token_id": [None, 2, 999]}))
    model = loading.load(folder)
    assert model.mask_token_id == 127 and 2 in model.stop_token_ids and not {None, 999} & set(model.stop_token_ids)
    tiny.edit_config(folder, mask_token_id=None)
    assert loading.load(folder).mask_token_id == 127  # Dream's says it there, too


# Tokenizers


def byte_level(**words: int) -> Tokenizer:
    made = Tokenizer(
        models.BPE({"Ġ": 0, **{letter: 1 + index for index, letter in enumerate("abcdefghijklmnopqrst")}, **words}, [])
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    return made


def sentence_pieces() -> Tokenizer:
    words = {"<unk>": 0, "▁": 1, **{letter: 2 + index for index, letter in enumerate("abcdefghijklmnopqrst")}, "▁a": 25}
    made = Tokenizer(models.BPE(words, [("▁", "a")], unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


def whole_words() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "bed": 2, "cat": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def word_pieces() -> Tokenizer:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "be": 2, "##d": 3, "cat": 4}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return made


def likely_pieces() -> Tokenizer:
    pieces = [("<unk>", -9.0), ("▁a", -1.0), ("▁bed", -2.0), ("▁", -3.0), ("cat", -4.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


CLASSES = (
    "Qwen2Tokenizer",
    "LlamaTokenizerFast",
    "GPT2Tokenizer",
    "BertTokenizer",
    "T5Tokenizer",
    "PreTrainedTokenizerFast",
    "Own",
)
TEXT = "a bed cat"


@pytest.mark.parametrize("stated", [None, *CLASSES])
@pytest.mark.parametrize("made", [byte_level, sentence_pieces, whole_words, word_pieces, likely_pieces])
def test_a_whole_file_is_read_as_it_is(made: Callable[[], Tokenizer], stated: str | None, tmp_path: Path) -> None:
    """transformers' classes rebuild it: of 390 such folders 205 came out wrong, or not at all, most without a word."""
    wanted = made().encode(TEXT, add_special_tokens=False).ids
    for kind, model_type in (("auto", "llama"), ("auto", "qwen2"), ("auto", "qwen3"), ("auto", "llada"), ("qwen2", "Dream")):
        folder = tmp_path / model_type
        folder.mkdir()
        made().save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        if stated:
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": stated}))
        found: Any = tokenizers.load(folder, kind=kind)  # type: ignore[arg-type]
        assert found(TEXT, add_special_tokens=False)["input_ids"] == wanted
        assert found.decode(wanted).strip() == made().decode(wanted).strip()


def test_the_tokenizer_of_another_network_is_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    byte_level(z=31).save(str(folder / "tokenizer.json"))
    refused(loading.load, folder, "words must be among the 31 tokens of the network, got token 31 of the tokenizer in")
    byte_level(**{f"z{index}": index for index in range(21, 31)}).save(str(folder / "tokenizer.json"))
    made = tokenizer_of(loading.load(folder))
    made.add_tokens(["unused"])
    made.save_pretrained(folder)
    assert len(tokenizer_of(loading.load(folder))) == 32  # a token that was added and never used
    made.add_special_tokens({"eos_token": "unused"})
    made.save_pretrained(folder)
    refused(loading.load, folder, "words must be among the 31 tokens")

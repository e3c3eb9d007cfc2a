"""Tokenizers of any folder: no code is run and nobody is asked, and none turns text into nothing."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from lib.checkpoints import files, lookup, tokenizers
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.models import export, loading, streaming
from lib.models.language_model import tokenizer_of
from tests import ggufs, tiny

CODE = "import pathlib\npathlib.Path({ran!r}).write_text('ran')\nclass Remote:\n    from_pretrained = None\n"
AUTO = {
    "AutoTokenizer": ["remote.Remote", "remote.Remote"],
    "AutoConfig": "remote.Remote",
    "AutoModel": "remote.Remote",
    "AutoModelForCausalLM": "remote.Remote",
}


@pytest.fixture(autouse=True)
def yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Somebody at the keyboard who answers every question with yes; nothing may be asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    yield
    assert not list(tmp_path.rglob("ran")), "code of the checkpoint was run"


def with_code(folder: Path, *, tokenizer_class: str = "Remote") -> Path:
    """Let configuration and tokenizer of a folder name code that leaves a file when it is imported."""
    (folder / "remote.py").write_text(CODE.format(ran=str(folder / "ran")))
    for name in ("config.json", "tokenizer_config.json"):
        raw = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        own = {"tokenizer_class": tokenizer_class} if name == "tokenizer_config.json" else {}
        (folder / name).write_text(json.dumps({**raw, **own, "auto_map": AUTO}))
    return folder


def spoken(folder: Path, *, family: str = "llama") -> Path:
    """A folder with a tokenizer in one file."""
    tiny.folder(folder, family=family)
    tiny.words().save_pretrained(folder)
    return folder


def letters(folder: Path) -> Path:
    """Add a byte-level tokenizer in two files."""
    (folder / "vocab.json").write_text(json.dumps({**{chr(97 + index): index for index in range(26)}, "ab": 26}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return folder


@pytest.mark.parametrize("tokenizer_class", ["Remote", "PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_tokenizer_that_names_code_is_read_from_its_file(family: str, tokenizer_class: str, tmp_path: Path) -> None:
    folder = with_code(spoken(tmp_path / "x", family=family), tokenizer_class=tokenizer_class)
    lookup.check(ModelSource(str(folder)))
    for loaded in (loading.load(folder), streaming.load(folder)):
        assert tokenizer_of(loaded)("w3 w0")["input_ids"] == tiny.words()("w3 w0")["input_ids"] == [1, 6, 3]


@pytest.mark.parametrize("layout", ["llada", "dream", "llama", "qwen2"])
def test_two_files_are_read_with_a_class_of_transformers(layout: str, tmp_path: Path) -> None:
    if layout in ("llama", "qwen2"):
        folder = tiny.folder(tmp_path / "x", family=layout)
    else:
        folder = Path(shutil.copytree({"llada": tiny.LLADA, "dream": tiny.DREAM}[layout], tmp_path / "x"))
    loaded = loading.load(with_code(letters(folder)))
    assert tokenizer_of(loaded)("cab")["input_ids"] == [2, 26]


def test_code_beside_a_gguf_is_not_looked_at(tmp_path: Path) -> None:
    ggufs.write(tmp_path / "tiny.gguf", tiny.network(), architecture="llama")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO, "tokenizer_class": "Remote"}))
    (tmp_path / "remote.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    assert tokenizer_of(loading.load(tmp_path / "tiny.gguf"))("cab")["input_ids"] == [2, 26]
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": AUTO, "model_type": "remote"}))
    assert tokenizer_of(loading.load(tmp_path))("cab")["input_ids"] == [2, 26]


def test_an_export_names_no_code(tmp_path: Path) -> None:
    loaded = loading.load(with_code(spoken(tmp_path / "x")))
    written = export.save_plain(loaded, tmp_path / "out")
    assert not [path for path in written.glob("*.json") if "auto_map" in path.read_text()]
    assert tokenizer_of(loading.load(written))("w3")["input_ids"] == [1, 6]


def test_a_class_that_is_only_code_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_code(tiny.folder(tmp_path / "x"))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(InputError, match=r"own must have tokenizer\.json, or vocab\.json with merges\.txt, got tokenizer\.model"):
        loading.load(folder)


def test_pieces_alone_are_refused_where_nothing_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.folder(tmp_path / "x")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"got tokenizer\.model alone in .*, and no sentencepiece"):
        loading.load(folder)


def test_only_the_whole_file_is_enough(tmp_path: Path) -> None:
    folder = spoken(tmp_path / "x")
    for path in folder.glob("*token*"):
        if path.name != "tokenizer.json":
            path.unlink()
    assert tokenizer_of(loading.load(folder))("w3 w0")["input_ids"] == [1, 6, 3]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    folder = spoken(tmp_path / "x")
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    lookup.check(ModelSource(str(folder)))
    assert tokenizer_of(loading.load(folder))("w3 w0")["input_ids"] == [1, 6, 3]
    assert tokenizer_of(streaming.load(folder))("w3 w0")["input_ids"] == [1, 6, 3]


@pytest.mark.parametrize(
    ("present", "said"),
    [
        (("tokenizer_config.json",), r"none of tokenizer\.json, vocab\.json with merges\.txt, tokenizer\.model"),
        (("vocab.json",), r"vocab\.json without merges\.txt"),
    ],
)
def test_half_a_tokenizer_is_refused(present: tuple[str, ...], said: str, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    letters(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        if name not in present:
            (folder / name).unlink()
    with pytest.raises(InputError, match=f"must have its vocabulary in .*{said}"):
        loading.load(folder)
    with pytest.raises(InputError, match=said):
        lookup.check_tokenizer(ModelSource(str(folder)))


def test_an_empty_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    Tokenizer(BPE()).save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match="must know words, got an empty vocabulary"):
        loading.load(folder)
    with pytest.raises(InputError, match="must bring its tokenizer, got an empty vocabulary"):
        lookup.check_tokenizer(ModelSource(str(folder)))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match=r"must know words|must be readable"):
        loading.load(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}'])
def test_a_damaged_tokenizer_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    folder = spoken(tmp_path / "x")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"the tokenizer in .* must be readable") as caught:
        loading.load(folder)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert tokenizers.load(tiny.folder(tmp_path / "x")) is None
    assert files.lacks_tokenizer(tmp_path / "x")


def test_a_network_that_names_code_is_read_without_it(tmp_path: Path) -> None:
    for family in ("llama", "qwen2"):
        folder = with_code(tiny.folder(tmp_path / family, family=family))
        (folder / "tokenizer_config.json").unlink()
        with torch.inference_mode():
            expected = tiny.network(family=family)(input_ids=tiny.ids(1, 8)).logits
            assert torch.equal(loading.load(folder).network(input_ids=tiny.ids(1, 8)).logits, expected)

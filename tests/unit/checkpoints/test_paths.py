"""Relative paths: what is read and what is written start at one place, where the command was typed."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from lib.checkpoints import files, lookup
from lib.core import config, variables
from lib.core.config import ROOT, ModelSource
from lib.core.errors import InputError
from lib.grid import cluster
from lib.launch import command
from lib.models import containers, export, loading, streaming
from lib.models.gguf.export import save_gguf
from tests import tiny


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder outside the repository."""
    monkeypatch.delenv("SINKS_CWD", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_written_below_the_working_folder_is_read_there(here: Path) -> None:
    model = tiny.model(here / "dense")
    export.save_plain(model, "out/plain")
    streaming.save(model, "out/streamed")
    containers.save_sparse(model, "out/sparse")
    containers.unpack_sparse("out/sparse", "out/unpacked")
    for name in ("plain", "streamed", "sparse", "unpacked"):
        assert (here / "out" / name / "config.json").exists()
        loaded = loading.load(f"out/{name}")
        assert loaded.source.source == f"out/{name}"
        assert torch.equal(loaded.layers[0].module.weight, model.layers[0].module.weight)
    assert not (ROOT / "out").exists()
    assert containers.bytes_by_kind("out/plain")["linear weights"] > 0


def test_the_launcher_remembers_where_it_was_called(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebooks and workers run in other folders; what was typed means the same there."""
    (here / "typed").mkdir()
    (here / "elsewhere").mkdir()
    tiny.folder(here / "typed" / "mine")
    monkeypatch.setenv("SINKS_CWD", str(here / "typed"))
    monkeypatch.chdir(here / "elsewhere")
    assert files.local_path("mine") == here / "typed" / "mine"
    export.save_plain(loading.load("mine"), "copy")
    assert (here / "typed" / "copy").is_dir() and not (here / "elsewhere" / "copy").exists()
    assert save_gguf(loading.load("mine"), "copy.gguf").path == here / "typed" / "copy.gguf"
    assert (here / "typed" / "copy.gguf").is_file() and not (here / "elsewhere" / "copy.gguf").exists()
    assert cluster.variables()["SINKS_CWD"] == str(here / "typed")
    monkeypatch.setenv("SINKS_OUTPUT", "results")
    assert config.output_root() == here / "typed" / "results"


def test_run_all_and_its_command_set_the_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = (ROOT / "run_all.sh").read_text().split("cd ")[0]
    shown = subprocess.run(["bash", "-c", f"{first}\necho $SINKS_CWD"], cwd=here, capture_output=True, text=True, check=True)
    assert Path(shown.stdout.strip()) == here
    monkeypatch.setattr(variables, "settings", dict)
    monkeypatch.setattr(command, "_inside", lambda: True)
    monkeypatch.setenv("SINKS_CWD", "kept")
    command._enter([])
    assert os.environ["SINKS_CWD"] == "kept"
    monkeypatch.delenv("SINKS_CWD")
    command._enter([])
    assert os.environ.pop("SINKS_CWD") == str(here)


def test_a_profiles_own_paths_are_in_the_repository(here: Path) -> None:
    source = config.load("quick").models["dlm"]
    assert not Path(source.source).is_absolute()
    assert lookup.local_path(source) == ROOT / source.source
    lookup.check(source)


def test_a_path_that_lies_at_both_places_is_refused(here: Path) -> None:
    tiny.folder(here / "models" / "reference" / "dlm")
    with pytest.raises(InputError, match=r"lies in both, got .*: write the whole path") as caught:
        lookup.check(ModelSource("models/reference/dlm"))
    assert str(here) in str(caught.value) and str(ROOT) in str(caught.value)
    lookup.check(ModelSource(str(here / "models" / "reference" / "dlm")))


def test_home_and_links(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    tiny.folder(here / "mine")
    assert files.local_path("~/mine") == here / "mine"
    export.save_plain(loading.load("~/mine"), "~/copy")
    assert (here / "copy").is_dir()
    (here / "models").symlink_to(ROOT / "models")
    lookup.check(ModelSource("models/reference/dlm"))

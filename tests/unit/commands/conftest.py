"""Tiny checkpoints, and a command typed in an empty folder."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lib.commands import command
from recipes import rehearsal_models


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    for name in ("llada", "dream", "llama"):
        rehearsal_models.write(folder / name, name, seed=0)
    return folder


@pytest.fixture(autouse=True)
def typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in this process, as if typed in an empty folder, without the network."""
    monkeypatch.setenv("SINKS_ENTERED", str(os.getpid()))
    monkeypatch.setenv("SINKS_CWD", str(tmp_path))


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """Run a command and read what it prints for programs."""
    assert command.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)

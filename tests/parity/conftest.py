"""The two recorded checkpoints and what the authors' release returned for them (see README.md in the folders' origin)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from lib.models import loading
from tests.tiny import DREAM, LLADA


def recorded(folder: Path) -> SimpleNamespace:
    """Load a checkpoint and its recorded outputs."""
    return SimpleNamespace(folder=folder, model=loading.load(folder), expected=load_file(folder / "expected.safetensors"))


@pytest.fixture(scope="session")
def llada() -> SimpleNamespace:
    return recorded(LLADA)


@pytest.fixture(scope="session")
def dream() -> SimpleNamespace:
    return recorded(DREAM)


@pytest.fixture(scope="session", params=["llada", "dream"])
def release(request: pytest.FixtureRequest) -> SimpleNamespace:
    return request.getfixturevalue(request.param)

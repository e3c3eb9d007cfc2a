"""A Ray of the tests' own, which writes nothing into the home folder and leaves no process behind."""

import importlib.util
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.grid.grids import Place, kill, of_ray, wait_for


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A store and all that belongs to it."""
    return Place(tmp_path)


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its files; a short path, since names of sockets below it may have 107 characters."""
    if importlib.util.find_spec("ray") is None:  # not imported here: it reads these variables when it is
        pytest.skip("Ray comes with requirements-cluster.lock")
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        # Ray would write a token into the home folder.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield folder
    try:
        wait_for(lambda: not of_ray(folder), seconds=20)
    finally:
        kill(*of_ray(folder))
        shutil.rmtree(folder, ignore_errors=True)

"""What several tests of the engine begin with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.grid.grids import Place, clean_up


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A store and all that belongs to it; no process may outlive the test."""
    found = Place(tmp_path)
    yield found
    clean_up(found)

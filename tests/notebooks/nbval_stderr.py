"""A plugin for nbval: stderr is not compared. Refreshed notebooks hold none, and bars of libraries differ from run to run."""

from typing import Any

import pytest
from nbval.plugin import IPyNbFile


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave stderr out of the comparison of a notebook's outputs."""
    if isinstance(collector, IPyNbFile):
        notebook: Any = collector  # nbval gives the tuple a fixed length
        notebook.skip_compare = (*notebook.skip_compare, "stderr")

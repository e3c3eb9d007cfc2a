"""Shapes in signatures are checked at run time here, and nothing reaches for the network."""

import os
import warnings
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Where somebody's own runs write and read is no matter of tests.
os.environ.pop("SINKS_OUTPUT", None)
os.environ.pop("SINKS_CELLS", None)
os.environ.pop("SINKS_CWD", None)

import jaxtyping
import matplotlib.pyplot as plt
import pytest
import torch

import tests.typecheck

# Before the first import of lib: only modules imported after it are checked. The hook looks both decorators up by name.
jaxtyping.jaxtyped = tests.typecheck.sparing
jaxtyping.install_import_hook("lib", "tests.typecheck.checked")


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    """Leave the kernels of float32 products as they were: a test that chooses them would round those behind it otherwise."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def strict_figures() -> Iterator[None]:
    """Take a warning for a failure, because it would stand in the notebook, and close what was drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")

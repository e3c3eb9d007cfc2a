"""Shapes in signatures are checked at run time here, and nothing reaches for the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping

import tests.typecheck  # noqa: F401  (the hook looks the checker up by name)

# Before the first import of lib: only modules imported after it are checked.
jaxtyping.install_import_hook("lib", "tests.typecheck.checked")

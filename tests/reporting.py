"""A notebook name, an output folder and a small run with one of everything, for the tests of the report modules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lib.core import config
from lib.report import figures
from lib.report import notebook as report

NAME = "01_sink_traces"
TITLE = "Do sinks move?"
BLOCK = "\n<!-- found:begin -->\nold\n<!-- found:end -->"
CLAIM: dict[str, Any] = {
    "statement": "Sinks move.", "rule": "reproduced if the interval lies above 1", "model": "dlm", "estimate": 2.0,
    "interval": (1.5, 2.5), "n": 8, "unit": "positions", "verdict": "reproduced", "source": "paper, abstract",
}  # fmt: skip
MODEL = {"name": "dlm", "source": "models/mine/dlm", "revision": None, "fingerprint": "ab12", "parameters": 9_000_000}


def begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **options: Any) -> report.Run:
    """Start a run whose notebook and outputs lie below `tmp_path`."""
    notebook = tmp_path / "notebooks" / f"{NAME}.ipynb"
    notebook.parent.mkdir(exist_ok=True, parents=True)
    cells = [{"cell_type": "markdown", "source": ["Note\n", f"# 01 · {TITLE}\n", BLOCK], "metadata": {}}]
    notebook.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    monkeypatch.setattr(config, "notebooks", lambda root=None: {"01": notebook})
    monkeypatch.setenv("SINKS_OUTPUT", str(tmp_path))
    return report.start(NAME, **options)


def line_figure(rows: int = 1, *, width: float = 5) -> tuple[Any, pd.DataFrame]:
    """Draw a small figure; return it with its numbers."""
    data = pd.DataFrame({"mask_ratio": [1.0, 0.5, 0.0], "mass": [1.0, 1 / 3, 2.0]})
    fig, axes = figures.subplots(rows, 1, width=width, height=2.5 * rows)
    for ax in np.atleast_1d(axes):
        ax.plot(data["mask_ratio"], data["mass"])
        ax.set(xlabel="mask ratio", ylabel="mass")
    return fig, data


def record_everything(run: report.Run) -> None:
    """Write one table, one figure, one animation and two claims, and finish."""
    run.models_used([MODEL])
    table = pd.DataFrame({"token": ["3.14", "<b>&", "a\nb"], "count": [1, 20, 3], "share": [1 / 3, np.nan, 0.5]})
    run.table("top", table, caption="Strongest sinks, share of all attention.")
    fig, data = line_figure()
    run.figure("line", fig, data, caption="Mass along denoising.")
    frames = np.random.default_rng(0).random((3, 6, 6))
    titles = [f"step {step} of 3" for step in range(3)]
    masked = np.tri(3, 6, dtype=bool)
    run.animation("map", frames, titles=titles, x_label="key", y_label="query", caption="Attention.", masked=masked)
    run.claim("sinks-move", **CLAIM)
    untested = {"estimate": None, "interval": None, "n": 0, "verdict": "not tested", "model": "smollm2", "note": "no file"}
    run.claim("sinks-move", **{**CLAIM, **untested})
    run.finish()

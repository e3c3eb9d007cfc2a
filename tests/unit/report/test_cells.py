"""What a notebook shows beside its code, and to whom."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.core import config, runtime
from lib.report import cells
from tests.reporting import begin, record_everything


class Shell:
    """As much of IPython as a cell needs: what was displayed, and who listens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[tuple[dict[str, str], Any]] = []
        self.events = SimpleNamespace(
            callbacks=defaultdict(list),
            register=lambda name, call: self.events.callbacks[name].append(call),
            unregister=lambda name, call: self.events.callbacks[name].remove(call),
        )
        display = SimpleNamespace(display=lambda data, raw, metadata: self.shown.append((data, metadata)))
        ipython = SimpleNamespace(get_ipython=lambda: self, display=display)
        # Only for the module that is tested: matplotlib asks IPython, too.
        monkeypatch.setattr(cells, "sys", SimpleNamespace(modules={"IPython": ipython}, stderr=sys.stderr))

    def run(self, source: str) -> None:
        for call in self.events.callbacks["pre_run_cell"]:
            call(SimpleNamespace(raw_cell=source))


def test_a_run_ends_with_a_sentence_a_claim_and_shows_images_with_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shell = Shell(monkeypatch)
    record_everything(begin(monkeypatch, tmp_path))
    pictures = {kind: metadata[kind]["alt"] for data, metadata in shell.shown for kind in data if kind.startswith("image/")}
    assert pictures == {"image/png": "Mass along denoising.", "image/gif": "Attention."}
    said = shell.shown[-1][0]["text/markdown"]
    assert said.splitlines() == [
        "**What this run found** (profile quick, seed 0; its commit stands in `results/quick/01_sink_traces.json`)",
        "",
        "- ✓ **reproduced** on `dlm`: Sinks move, 2.00 [1.50, 2.50] positions.",
        "- – **not tested** on `smollm2`: Sinks move.",
    ]


def test_an_animation_has_a_still_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from PIL import Image, ImageSequence

    record_everything(begin(monkeypatch, tmp_path))
    with Image.open(tmp_path / "figures/quick/01_map.gif") as movie, Image.open(tmp_path / "figures/quick/01_map.png") as still:
        frames = [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(movie)]
        assert frames.index(still.convert("RGB").tobytes()) == 1, "the middle one of three"
    record = json.loads((tmp_path / "results/quick/01_sink_traces.json").read_text())
    assert {"figures/quick/01_map.gif", "figures/quick/01_map.png"} <= set(record["outputs"])


def executed(folder: Path, seconds: dict[str, float]) -> None:
    """A copy as papermill leaves it."""
    made = [
        {"cell_type": "code", "source": [source], "metadata": {"papermill": {"duration": took}}}
        for source, took in seconds.items()
    ]
    path = folder / "runs" / "quick" / "01_sink_traces.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "", "metadata": {}}, *made]}))


def test_long_cells_say_how_long_they_took_before_they_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(monkeypatch)
    monkeypatch.setattr(runtime, "is_watched", lambda: True)
    executed(tmp_path, {"long()": 41.4, "short()": 2.0})
    begin(monkeypatch, tmp_path)
    begin(monkeypatch, tmp_path)  # the setup cell was run again
    assert capsys.readouterr().err == "expected for the whole notebook: 43 s here, last time\n" * 2
    for source in ("short()", "new()", "long()\n"):
        shell.run(source)
    assert capsys.readouterr().err == "expected for this cell: about 41 s\n"


def test_before_a_first_run_the_page_of_profiles_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Shell(monkeypatch)
    monkeypatch.setattr(runtime, "is_watched", lambda: True)
    begin(monkeypatch, tmp_path)
    row = next(line for line in (config.ROOT / "docs/profiles.md").read_text().splitlines() if line.startswith("| `quick` |"))
    said = capsys.readouterr().err
    assert f": {row.split('|')[3].strip()}, by docs/profiles.md\n" in said and "<!--" not in said
    assert cells.documented("rehearsal", "01") == "not known"


def test_nobody_watching_means_no_word_and_no_bar(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under papermill, nbclient and nbval, whose kernels have no session's name."""
    Shell(monkeypatch)
    for name in ("JPY_SESSION_NAME", "VSCODE_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    assert not runtime.is_watched()
    begin(monkeypatch, tmp_path)
    assert list(runtime.progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("JPY_SESSION_NAME", "01_sink_traces.ipynb")
    assert runtime.is_watched()
    monkeypatch.delitem(sys.modules, "ipykernel")
    assert not runtime.is_watched(), "a terminal inside JupyterLab is none"

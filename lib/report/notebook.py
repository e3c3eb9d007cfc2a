"""What a notebook writes: tables, figures, animations, claims, and one result file that says where they came from."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from lib.core import config, outputs, provenance, runtime
from lib.core.errors import InputError
from lib.report import animation, canvas, cells
from lib.report.claims import Claim, bootstrap_mean, check_claim, claims_table, mean_verdict, verdict
from lib.report.results import MODEL_FIELDS, SCHEMA_VERSION, in_words, known_outputs, notebook_title
from lib.report.tables import Table, csv_text, display_table, plain, text_columns

__all__ = ["Claim", "Run", "bootstrap_mean", "mean_verdict", "start", "verdict"]

NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
NOTEBOOK_NAME = re.compile(r"[0-9]{2}(_[a-z0-9]+)+")


class Run:
    """One run of one notebook: collects what it shows, writes each file at once and the result file at the end.

    Calling a method again with the same name replaces what was there, as when a cell is run twice. Attributes to read:
    `config` (the checked settings), `profile`, `seed`, `number`, `name`.
    """

    def __init__(self, name: str, settings: config.Config, overrides: Mapping[str, object], notebook: Path) -> None:
        self.name, self.number, self.config = name, name[:2], settings
        self.profile, self.seed = settings.profile, settings.seed
        self._overrides = dict(overrides)
        self._title = notebook_title(notebook)
        self._fingerprint = provenance.fingerprint(notebook, config=config.to_dict(settings))
        self._commit = provenance.commit()
        self._result = config.output_root() / "results" / self.profile / f"{self.name}.json"
        known = known_outputs(self._result)
        self._outputs = outputs.begin(config.output_root(), self.profile, self.name, known=known)
        self._models: list[dict[str, Any]] = []
        self._tables: dict[str, dict[str, Any]] = {}
        self._figures: dict[str, dict[str, Any]] = {}
        self._claims: dict[tuple[str, str], Claim] = {}

    def models_used(self, models: Sequence[Mapping[str, object]]) -> None:
        """Record the models behind the numbers; call it before the first figure, whose footer names them.

        Args:
            models: one mapping a model with `name` and any of `source`, `revision`, `fingerprint`, `parameters` (their count),
                `dtype`, `kind`, `family`, `attention` and `notes`.

        Raises:
            InputError: an entry without a name, or with another key.
        """
        for entry in models:
            if not entry.get("name") or set(entry) - set(MODEL_FIELDS):
                raise InputError(f"a model must be given by {', '.join(MODEL_FIELDS)}, got {', '.join(entry)}: rename its keys")
        self._models = [{key: entry.get(key) for key in MODEL_FIELDS} for entry in models]

    def table(self, name: str, frame: pd.DataFrame, caption: str, *, digits: int = 3) -> Table:
        """Write a table to `results/<profile>/NN_name.csv` and return it for display.

        Args:
            name: lower-case words joined by underscores.
            frame: the numbers; a named index becomes the first columns.
            caption: what the table shows, with units.
            digits: significant digits shown; the file keeps six.

        Returns:
            The table to look at, numbers with a fraction as text.

        Raises:
            InputError: a bad name, no caption, or columns without different names.
        """
        path = self._path("results", name, ".csv", caption)
        shown = display_table(frame, caption=caption, digits=digits)
        self._write(path, csv_text(frame).encode())
        entry = {"file": self._relative(path), "columns": list(shown.columns), "text": text_columns(frame), "digits": digits}
        self._tables[name] = {"name": name, "caption": caption, **entry}
        shown.file = entry["file"]
        return shown

    def figure(self, name: str, fig: Figure, data: pd.DataFrame, caption: str, *, models: Sequence[str] | None = None) -> None:
        """Write a figure and the numbers it shows to `figures/<profile>/NN_name.png` and `.csv`, show it, and close it.

        Args:
            name: lower-case words joined by underscores.
            fig: a figure made with `figures.subplots`.
            data: what is plotted.
            caption: what the figure shows; also its text for those who cannot see it.
            models: models named in the footer; when None those of the column `model`, or all of the run without one; none when
                empty (a worked example).

        Raises:
            InputError: a bad name, no caption, or no room for the labels.
        """
        path = self._path("figures", name, ".png", caption)
        canvas.add_footer(fig, self._footer(self._shown(data) if models is None else models))
        self._write(path.with_suffix(".csv"), csv_text(data).encode())
        drawn = canvas.png_bytes(fig)
        plt.close(fig)
        self._write(path, drawn)
        self._figures[name] = {
            "name": name, "kind": "figure", "caption": caption,
            "file": self._relative(path), "data": self._relative(path.with_suffix(".csv")),
        }  # fmt: skip
        cells.show_image("image/png", canvas.inline(drawn), f"{self._relative(path)}: {caption}", alt=caption)

    def animation(
        self,
        name: str,
        frames: Float[np.ndarray, "frame row column"] | Float[torch.Tensor, "frame row column"],
        *,
        titles: Sequence[str],
        x_label: str,
        y_label: str,
        caption: str,
        value_label: str = "attention",
        masked: Bool[np.ndarray, "frame column"] | Bool[torch.Tensor, "frame column"] | None = None,
        log: bool = True,
        models: Sequence[str] | None = None,
    ) -> None:
        """Write an animated map to `figures/<profile>/NN_name.gif` (at most 3 MB), a still of it as `.png`, and show the map.

        Args:
            name: lower-case words joined by underscores.
            frames: one matrix a frame, at most 100; the first row is drawn on top.
            titles: one a frame, such as `step 12 of 64, mask ratio 0.81`.
            x_label: what the columns are.
            y_label: what the rows are.
            caption: what the animation shows.
            value_label: what a colour means, with its unit.
            masked: which columns are still masked in each frame, drawn as a strip above the map.
            log: True for a logarithmic colour scale.
            models: models named in the footer, as for `figure`.

        Raises:
            InputError: a bad name, parts that do not fit together, or a file above 3 MB at the coarsest quality.
        """
        path = self._path("figures", name, ".gif", caption)
        strip = None if masked is None else _array(masked).astype(bool)
        movie = animation.Movie(_array(frames), titles, x_label, y_label, value_label, strip, log)
        data = animation.gif_bytes(movie, footer=self._footer(models))
        self._write(path, data)
        self._write(path.with_suffix(".png"), animation.still(data))
        self._figures[name] = {
            "name": name, "kind": "animation", "caption": caption, "frames": len(movie.titles),
            "file": self._relative(path), "still": self._relative(path.with_suffix(".png")),
        }  # fmt: skip
        cells.show_image("image/gif", data, f"{self._relative(path)}: {caption}", alt=caption)

    def page(self, name: str, html: str, caption: str) -> None:
        """Write a self-contained page to `figures/<profile>/NN_name.html` and show it in a frame.

        The frame holds the whole page, since a notebook does not know from where it will be read; a committed notebook keeps the
        name of the file alone, see `recipes/refresh_notebooks`.

        Args:
            name: lower-case words joined by underscores.
            html: the whole page.
            caption: what it shows.

        Raises:
            InputError: a bad name, or no caption.
        """
        path = self._path("figures", name, ".html", caption)
        self._write(path, html.encode())
        self._figures[name] = {"name": name, "kind": "page", "caption": caption, "file": self._relative(path)}
        frame = f'<iframe srcdoc="{escape(html)}" title="{escape(caption)}" width="100%" height="700" style="border:0"></iframe>'
        cells.show({"text/html": frame, "text/plain": f"{self._relative(path)}: {caption}"})

    def claim(
        self,
        key: str,
        *,
        statement: str,
        rule: str,
        model: str,
        estimate: float | None,
        interval: tuple[float, float] | None,
        n: int,
        unit: str,
        verdict: str,
        source: str,
        note: str = "",
    ) -> Claim:
        """Record a claim with its verdict; a claim that fails is a result, not an error.

        Args:
            key: lower-case words joined by `-` or `_`; one claim a key and model.
            statement: what the paper says, in a sentence.
            rule: how the verdict follows from the numbers, written before they were seen.
            model: name of the model it was tested on.
            estimate: the measured quantity in `unit`; None when it was not measured.
            interval: its 95 % interval, which holds the estimate.
            n: how many independent values (prompts, seeds) the interval is over.
            unit: unit of estimate and interval; empty for a plain number.
            verdict: `reproduced`, `not reproduced`, `inconclusive` or `not tested`.
            source: where the paper says it, such as `paper, abstract`.
            note: what a reader should know; why, when not tested.

        Returns:
            The recorded claim.

        Raises:
            InputError: the parts contradict each other or one is missing.
        """
        number = None if estimate is None else float(estimate)
        ends = None if interval is None else (float(interval[0]), float(interval[1])) if len(interval) == 2 else interval
        claim = check_claim(Claim(key, statement, rule, model, number, ends, int(n), unit, verdict, source, note))
        self._claims[key, model] = claim
        return claim

    def finish(self) -> Table:
        """Write `results/<profile>/NN_notebook.json`, say what was found, and return the claims as a table.

        The file holds neither dates nor durations: two runs of one commit from the same inputs give the same bytes. Files that
        only an earlier run of this notebook wrote are removed.

        Returns:
            One row a claim.
        """
        record = self._record()
        entries = (*record["tables"], *record["figures"])
        names = [entry[part] for entry in entries for part in ("file", "data", "still") if part in entry]
        record["outputs"] = {name: provenance.file_hash(self._outputs.root / name) for name in names}
        self._write(self._result, provenance.json_text(plain(record)).encode())
        self._outputs.finish()
        text = f"**What this run found** ({self._where()})\n\n{cells.sentences(record['claims'])}"
        cells.show({"text/markdown": text, "text/plain": text})
        return claims_table(self._claims.values())

    def _record(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION, "notebook": self.name, "number": self.number, "title": self._title,
            "profile": self.profile, "seed": self.seed, "overrides": self._overrides,
            "config": config.to_dict(self.config), "fingerprint": self._fingerprint, "commit": self._commit,
            "models": self._models,
            "versions": provenance.versions(), "device": runtime.describe_device(runtime.choose_device(self.config)),
            "tables": list(self._tables.values()), "figures": list(self._figures.values()),
            "claims": [vars(claim) for claim in self._claims.values()],
        }  # fmt: skip

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file of this run; a refusal of the file system becomes a line for the user."""
        try:
            self._outputs.write(path, data)
        except OSError as error:
            rule = f"{path.parent} must be a folder to write to"
            raise InputError(f"{rule}, got {error.strerror}: free space or rights") from error

    def _path(self, kind: str, name: str, suffix: str, caption: str) -> Path:
        if not NAME.fullmatch(name):
            raise InputError(f"a name must be lower-case words joined by _, got {name!r}: rename it")
        if not caption.strip():
            raise InputError(f"{name} must have a caption, got none: say what it shows, with units")
        return config.output_root() / kind / self.profile / f"{self.number}_{name}{suffix}"

    def _relative(self, path: Path) -> str:
        return path.relative_to(config.output_root()).as_posix()

    def _where(self) -> str:
        """Say what ran, and where its commit is written: in the notebook it would change with every commit."""
        return f"profile {self.profile}, seed {self.seed}; its commit stands in `{self._relative(self._result)}`"

    def _shown(self, data: pd.DataFrame) -> list[str] | None:
        """Return those of the run's models that the data speak of, if they name any."""
        seen = set(data["model"].astype(str)) if "model" in data else set()
        return [name for name in (str(entry["name"]) for entry in self._models) if name in seen] or None

    def _footer(self, models: Sequence[str] | None) -> str:
        words = {str(entry["name"]): in_words(entry) for entry in self._models}
        names = list(words.values()) if models is None else [words.get(name, name) for name in models]
        parts = [f"notebook {self.number}", f"profile {self.profile}", f"seed {self.seed}"]
        if names:
            parts.append(f"{'models' if len(names) > 1 else 'model'} {', '.join(names)}")
        changed = ", ".join(f"{key}={value}" for key, value in sorted(self._overrides.items()))
        return "  |  ".join(parts + ([f"set {changed}"] if changed else []))


def start(name: str, *, profile: str = "quick", seed: int | None = None, overrides: Mapping[str, object] | None = None) -> Run:
    """Check the settings and begin the record of a notebook.

    Args:
        name: the notebook's file name without ending, such as `01_sink_traces`.
        profile: `quick`, `full` or `paper`.
        seed: replaces the profile's seed.
        overrides: dotted key to value, as in `config.load`.

    Returns:
        The run, with the checked settings as `run.config`.

    Raises:
        InputError: no such notebook, or bad settings.
    """
    notebook = config.notebooks().get(name[:2])
    if not NOTEBOOK_NAME.fullmatch(name) or notebook is None or notebook.stem != name:
        known = ", ".join(path.stem for path in config.notebooks().values()) or "none"
        raise InputError(f"a run must bear the name of a notebook, got {name!r}: known are {known}")
    settings = config.load(profile, seed=seed, overrides=overrides)
    canvas.use_style()
    cells.announce(name, profile)
    return Run(name, settings, overrides or {}, notebook)


def _array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    """Bring values of any device and dtype to NumPy in double precision."""
    return values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, dtype=np.float64)

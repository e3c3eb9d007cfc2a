"""What was measured along training: tables of what the folders hold, and figures of these tables."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from lib.core.config import ModelSource
from lib.models.language_model import LanguageModel
from lib.report import canvas, figures
from lib.studies.traces import training
from tests import tiny

pytestmark = pytest.mark.usefixtures("strict_figures")
LOG = [
    {
        "tokens": 1_000_000 * step,
        "held_out": {"encyclopaedia": 9.0 - step},
        "sinks": {f"clean_{key}": 0.01 * step for key in training.QUANTITIES},
    }
    for step in (1, 2, 4)
]
DOSE: list[dict[str, Any]] = [
    {
        "tokens": 1_000_000 * step,
        "top_share": 0.02 * step,
        "uniform_share": 0.01,
        "damage": 0.1,
        "sinks": {"share": 0.1 * step, "low": 0.05 * step, "high": 0.2 * step, "p": 0.01},
        "random": {"share": low, "low": low, "high": low, "p": 1.0},
    }
    for step, low in ((1, None), (3, 0.0))
]


@pytest.fixture
def models(tmp_path: Path) -> list[LanguageModel]:
    """An autoregressive and a diffusion model with what their trainings left, and one without."""
    made = tiny.model(tmp_path / "model", causal=False)
    found = []
    for name, texts in (("ar", ["clean"]), ("dlm", ["clean", "noised"])):
        folder = tmp_path / name
        folder.mkdir()
        log = [line | {"sinks": {f"{text}_{key}": v for text in texts for key, v in shares(line).items()}} for line in LOG]
        (folder / training.LOG).write_text(json.dumps(log))
        (folder / training.DOSE).write_text(json.dumps(DOSE))
        found.append(replace(made, name=name, source=ModelSource(str(folder))))
    return [*found, replace(made, name="other", source=ModelSource(str(tmp_path / "model")))]


def shares(line: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix("clean_"): value for key, value in line["sinks"].items()}


def test_the_training_table_holds_every_measurement(models: list[LanguageModel]) -> None:
    table: Any = training.training_table(models)
    assert table.groupby(["model", "text"]).size().to_dict() == {("ar", "clean"): 3, ("dlm", "clean"): 3, ("dlm", "noised"): 3}
    last = table[(table["model"] == "dlm") & (table["text"] == "noised")].iloc[-1]
    assert last[training.TOKENS] == 4 and last[training.LOSS] == 5.0
    assert last["attention to the top key of a head, %"] == pytest.approx(4.0)
    assert last["value norm of the top key / others"] == pytest.approx(0.04), "a ratio is no share"
    assert training.training_table(models[2:]).empty and training.read_log(models[2]) == []


def test_training_is_drawn_as_it_is_tabulated(models: list[LanguageModel]) -> None:
    figure, table = training.sinks_along_training(training.training_table(models))
    canvas.png_bytes(figure, dpi=40)
    losses, first = figure.axes[0], figure.axes[1]
    assert len(losses.lines) == 2 and len(first.lines) == 3, "one loss a model, a share a text"
    assert first.get_yscale() == "log"
    assert all(ax.get_ylabel() for ax in figure.axes)
    assert set(table["model"]) == {"ar", "dlm"}


def test_the_dose_table_measures_sinks_against_no_preference(models: list[LanguageModel]) -> None:
    table: Any = training.dose_table(models)
    assert len(table) == 2 * 2 * 2 and set(table["model"]) == {"ar", "dlm"}
    rows = table[(table["model"] == "ar") & (table["weights"] == training.WEIGHED["sinks"])]
    assert rows[training.STRENGTH].tolist() == [2.0, 6.0]
    np.testing.assert_allclose(rows[[training.SHARE, "low, %", "high, %"]], [[10, 5, 20], [30, 15, 60]])
    unsure = table[table["weights"] == training.WEIGHED["random"]].iloc[0]
    assert np.isnan(unsure[training.SHARE]) and unsure["p"] == 1.0, "no share of a damage that is not sure"
    assert training.dose_table(models[2:]).empty


def test_effects_are_drawn_with_their_intervals(models: list[LanguageModel]) -> None:
    figure, _ = training.effect_as_sinks_grow(training.dose_table(models))
    canvas.png_bytes(figure, dpi=40)
    assert [ax.get_title() for ax in figure.axes] == ["ar", "dlm"]
    for ax in figure.axes:
        sinks, random = (part for part in ax.containers if isinstance(part, ErrorbarContainer))
        np.testing.assert_allclose(sinks[0].get_xydata(), [[2, 10], [6, 30]])  # pyright: ignore
        np.testing.assert_allclose(sinks[2][0].get_segments(), [[[2, 5], [2, 20]], [[6, 15], [6, 60]]])  # pyright: ignore
        assert sinks[0].get_color() == figures.METHODS["sink-aware"].color != random[0].get_color()

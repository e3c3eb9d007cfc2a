"""The figures of notebook 02: what is drawn is what is returned, axes say their units, and gaps in the data do no harm."""

import dataclasses
from itertools import product
from math import nan
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes

from lib.diffusion.traces import SinkTrace, mark_steps
from lib.report import canvas, figures
from lib.studies.variance import agreement_tables, tables
from lib.studies.variance import figures as variance_figures
from lib.studies.variance.figures import BLOCKED, PAIRS, READINGS
from lib.studies.variance.sink_effect import NOTHING

MODELS = ["dlm", "ar", "own"]
pytestmark = pytest.mark.usefixtures("strict_figures")


def drawn(figure: Any) -> list[Axes]:
    """Draw the figure as a file, and return its axes; every axis says what it shows."""
    canvas.png_bytes(figure, dpi=40)
    axes = figure.axes
    assert (figure.get_supxlabel() or all(ax.get_xlabel() for ax in axes)) and axes[0].get_ylabel()
    assert any(ax.get_legend() for ax in axes) or len(axes[0].lines) < 10
    return axes


def lines(ax: Axes, color: str) -> list[list[tuple[float, float]]]:
    """The points of all lines of a colour."""
    return [
        [(float(x), float(y)) for x, y in line.get_xydata()]  # pyright: ignore
        for line in ax.lines
        if line.get_color() == color and len(line.get_xdata()) > 1  # pyright: ignore
    ]


def points(rows: Any, x: str, y: str) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in zip(rows[x], rows[y], strict=True)]


def interval(value: float, *, bounded: bool = True) -> dict[str, float]:
    return {
        "mean": value,
        "low": value * 0.8 if bounded else nan,
        "high": value * 1.3 if bounded else nan,
        "n": 4 if bounded else 1,
    }


@pytest.mark.parametrize("names", [MODELS, ["dlm"]], ids=["models", "one model"])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one prompt"])
def test_variance_by_layer(names: list[str], bounded: bool) -> None:
    table: Any = pd.DataFrame([
        {"model": name, "layer": layer, "depth": layer / 2, "quantity": quantity}
        | interval((index + 1) * (layer + 1) / (1 if quantity == "spatial variance" else 100), bounded=bounded)
        for (index, name), layer, quantity in product(enumerate(names), range(3), ("spatial variance", "temporal variance"))
    ])  # fmt: skip
    # a layer whose heads never had a sink together has no centroid
    table.loc[(table["layer"] == 2) & (table["quantity"] == "temporal variance"), ["mean", "low", "high"]] = nan
    figure, data = variance_figures.variance_by_layer(table)
    axes = drawn(figure)
    assert data is table
    assert "squared" in axes[0].get_ylabel() and "squared" in axes[1].get_ylabel()
    assert axes[0].get_yscale() == "log"
    for ax, quantity in zip(axes, ("spatial variance", "temporal variance"), strict=True):
        for name, style in figures.model_styles(names).items():
            rows = table[(table["model"] == name) & (table["quantity"] == quantity)]
            (got,) = lines(ax, style.color)
            np.testing.assert_allclose(got, points(rows, "depth", "mean"))


def hand_trace(name: str, *, rows: int, sinks: list[int]) -> SinkTrace:
    """A diffusion trace whose only sink is at a given position at each step; at -1 all masses are equal and there is none."""
    steps, size = len(sinks), 16
    mass = torch.ones(rows, steps, size)
    for step, place in enumerate(sinks):
        if place >= 0:
            mass[:, step] = 0.2
            mass[:, step, place] = 13.0
    flat = torch.zeros(rows, steps)
    return SinkTrace(
        name=name, prompt_tokens=4, ids=torch.zeros(rows, steps, size, dtype=torch.long),
        is_masked=torch.zeros(rows, steps, size, dtype=torch.bool), keys=torch.full((steps,), size), mass=mass,
        layer_mass=mass[:, :, None], mark_steps=mark_steps(steps), head_mass=mass[:, :3, None, None], gu_rate=flat, gu_best=flat,
        rulli=flat, texts=torch.zeros(rows, size, dtype=torch.long),
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 8])
def test_centroid_paths(rows: int) -> None:
    first, second = hand_trace("dlm", rows=rows, sinks=[8, 8, 12, 4]), hand_trace("ar", rows=rows, sinks=[0, 0, -1, 0])
    second.mass[0, 2, 5] = 20.0  # one prompt has a sink where the others have none
    figure, data = variance_figures.centroid_paths([first, second], prompts=rows)
    axes = drawn(figure)
    assert [ax.get_title() for ax in axes] == ["dlm", "ar"]
    assert "%" in figure.get_supxlabel() and "share" in axes[0].get_ylabel()
    assert data["model"].tolist() == ["dlm"] * 4 + ["ar"] * 4 and data["step"].tolist() == [0, 1, 2, 3] * 2
    assert data["prompt 1"].tolist() == [0.5, 0.5, 0.75, 0.25, 0.0, 0.0, 5 / 16, 0.0]
    assert rows == 1 or data["prompt 2"].isna().tolist() == [False] * 6 + [True, False]
    for ax, name in zip(axes, ("dlm", "ar"), strict=True):
        mine = data[data["model"] == name].drop(columns=["model", "step"])
        np.testing.assert_allclose(ax.lines[0].get_ydata(), mine["prompt 1"])  # pyright: ignore
        assert len(ax.lines) == min(rows, variance_figures.SHOWN_PATHS) + 1
        assert ax.lines[-1].get_color() == "black"
        np.testing.assert_allclose(ax.lines[-1].get_ydata(), mine.median(axis=1))  # pyright: ignore
        np.testing.assert_allclose(ax.lines[-1].get_xdata(), [0, 100 / 3, 200 / 3, 100])  # pyright: ignore


def test_centroid_paths_without_any_sink_at_a_step() -> None:
    trace = hand_trace("dlm", rows=3, sinks=[8, -1, 4, 4])
    figure, data = variance_figures.centroid_paths([trace], prompts=3)
    drawn(figure)
    assert data["prompt 3"].isna().tolist() == [False, True, False, False]


def test_centroid_paths_show_the_first_seed_alone() -> None:
    trace = hand_trace("dlm", rows=4, sinks=[8, 8, 4, 4])
    _, data = variance_figures.centroid_paths([trace], prompts=2)
    assert [column for column in data.columns if column.startswith("prompt")] == ["prompt 1", "prompt 2"]


@pytest.mark.parametrize("names", [MODELS, ["dlm"]], ids=["models", "one model"])
def test_overlap_by_distance(names: list[str]) -> None:
    kinds = ["overlap", "steps shuffled", "positions shuffled", "beyond chance"]
    table: Any = pd.DataFrame([
        {"model": name, "level": level, "kind": kind, "step distance": distance}
        | interval(0.9 / (1 + index + kinds.index(kind)) - 0.01 * distance, bounded=index != 1)
        for (index, name), level, kind, distance in product(enumerate(names), ("aggregate", "layer", "head"), kinds, (1, 2, 4))
    ])  # fmt: skip
    table.loc[(table["level"] == "layer") & (table["model"] == names[-1]), ["mean", "low", "high"]] = nan
    figure, data = variance_figures.overlap_by_distance(table)
    axes = drawn(figure)
    assert data is table and [ax.get_title() for ax in axes] == ["aggregate", "layer", "head"]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["1", "2", "4"]
    for ax, (name, style) in product(axes, figures.model_styles(names).items()):
        rows = table[(table["model"] == name) & (table["level"] == ax.get_title())]
        expected = [points(rows[rows["kind"] == kind], "step distance", "mean") for kind in kinds[:3]]
        np.testing.assert_allclose(lines(ax, style.color), expected)
    legend = axes[-1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [*names, "sink sets", "steps shuffled", "positions shuffled"]


@pytest.mark.parametrize("names", [MODELS, ["dlm"]], ids=["models", "one model"])
def test_value_norms(names: list[str]) -> None:
    """The last model has no sink at all."""
    stream = np.random.default_rng(0)
    table: Any = pd.concat([
        pd.DataFrame({"model": name, "sink mass": stream.random(20) + 0.1, "relative value norm": 2 * stream.random(20),
                      "is a sink": np.arange(20) < 5 * (len(names) > 1 and name != names[-1])})
        for name in names
    ])  # fmt: skip
    figure, data = variance_figures.value_norms(table)
    axes = drawn(figure)
    assert data is table and [ax.get_title() for ax in axes] == names
    for ax, name in zip(axes, names, strict=True):
        for marks, is_sink in zip(ax.collections, (False, True), strict=True):
            rows = table[(table["model"] == name) & (table["is a sink"] == is_sink)]
            shown: Any = marks.get_offsets()
            np.testing.assert_allclose(np.asarray(shown).reshape(-1, 2), rows[["sink mass", "relative value norm"]].to_numpy())


@pytest.mark.parametrize("names", [["dlm"], ["dlm", "own"]], ids=["one model", "models"])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one prompt"])
def test_noise_agreement(names: list[str], bounded: bool) -> None:
    rows = [
        {"model": name, "pair": pair, "mask ratio": ratio} | interval(-0.2 + (index + 1) / 5 * (ratio or 1), bounded=bounded)
        for name, (index, pair), ratio in product(names, enumerate(PAIRS), (0.9, 0.5, 0.1, nan))
    ]
    table: Any = pd.DataFrame(rows).rename(columns={"mean": "mass", "low": "mass, low", "high": "mass, high"})
    table[["mass, low", "mass, high"]] = np.sort(table[["mass, low", "mass, high"]].to_numpy(), axis=1)
    figure, data = variance_figures.noise_agreement(table)
    axes = drawn(figure)
    assert len(data) == len(table) * 3 / 4  # not the averages over ratios
    for ax, name in zip(axes, names, strict=True):
        assert ax.get_xlim() == (1, 0)
        assert not bounded or ax.get_ylim()[0] <= float(data["mass, low"].to_numpy().min())  # even a negative one
        for pair, style in PAIRS.items():
            mine = data[(data["model"] == name) & (data["pair"] == pair)]
            np.testing.assert_allclose(lines(ax, style.color), [points(mine, "mask ratio", "mass")])


def effects(names: list[str], kinds: list[str], amounts: list[float], amount_name: str, *, bounded: bool) -> pd.DataFrame:
    rows = []
    for index, name in enumerate(names):
        rows.append({"model": name, "blocked": NOTHING, amount_name: 0, "increase": 0.0, "low": 0.0, "high": 0.0})
        for (place, kind), amount in product(enumerate(kinds), amounts):
            shown = interval((place - 0.5) * (1 + amount) * (1 + index) / 4, bounded=bounded)
            low, high = sorted((shown["low"], shown["high"]))
            rows.append(
                {"model": name, "blocked": kind, amount_name: amount, "increase": shown["mean"], "low": low, "high": high}
            )
    return pd.DataFrame(rows)


def all_in_sight(ax: Axes, table: Any) -> None:
    """The panels share their axis, so the model with the largest effect, here the last one, sets its range."""
    low, high = ax.get_ylim()
    assert low <= table[["increase", "low"]].min().min() and high >= table[["increase", "high"]].max().max()


@pytest.mark.parametrize("names", [MODELS, ["dlm"]], ids=["models", "one model"])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one prompt"])
def test_dose_response(names: list[str], bounded: bool) -> None:
    table: Any = effects(names, list(BLOCKED), [1, 5, 10], "keys asked", bounded=bounded)
    figure, data = variance_figures.dose_response(table)
    axes = drawn(figure)
    assert data is table and "nats per token" in axes[0].get_ylabel()
    for ax, name in zip(axes, names, strict=True):
        assert ax.get_xticks().tolist() == [1, 5, 10]  # 0 and 1 would touch
        for kind, style in BLOCKED.items():
            rows = table[(table["model"] == name) & (table["blocked"] == kind)]
            # a line, and the markers with their intervals
            expected = [(0.0, 0.0), *points(rows, "keys asked", "increase")]
            np.testing.assert_allclose(lines(ax, style.color)[0], expected)
        ends = [bar.lines[2][0].get_segments() for bar in ax.containers]  # pyright: ignore
        rows = table[(table["model"] == name) & (table["blocked"] == "sinks")]
        last = rows.iloc[-1]
        wanted = [last["low"], last["high"]] if bounded else [last["increase"]] * 2
        np.testing.assert_allclose(ends[0][-1][:, 1], wanted)
    all_in_sight(axes[0], table)


@pytest.mark.parametrize("names", [MODELS[:2], ["dlm"]], ids=["models", "one model"])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one prompt"])
def test_unstable_blocking(names: list[str], bounded: bool) -> None:
    table: Any = effects(names, list(READINGS), [0.5, 0.75, 0.9], "threshold", bounded=bounded)
    figure, data = variance_figures.unstable_blocking(table)
    axes = drawn(figure)
    assert data is table and "nats per token" in axes[0].get_ylabel()
    for ax, name in zip(axes, names, strict=True):
        assert ax.get_xticks().tolist() == [0.5, 0.75, 0.9]
        for reading, style in READINGS.items():
            rows = table[(table["model"] == name) & (table["blocked"] == reading)]
            np.testing.assert_allclose(lines(ax, style.color)[0], points(rows, "threshold", "increase"))
    all_in_sight(axes[0], table)


def test_the_tables_of_one_model_with_one_prompt_can_be_drawn() -> None:
    """One prompt bounds no mean: its intervals are missing from the table on."""
    trace = dataclasses.replace(hand_trace("dlm", rows=1, sinks=[8, 8, 4, 4]))
    table: Any = tables.layers_table([trace], prompts=1, seed=0)
    assert table["low"].isna().all() and table["n"].tolist() == [1, 1]
    drawn(variance_figures.variance_by_layer(table)[0])
    found = {("dlm", level): agreement_tables.overlaps(trace, level=level, prompts=1, seed=0) for level in ("aggregate", "layer")}
    drawn(variance_figures.overlap_by_distance(agreement_tables.overlap_table(found, distances=[1, 2], seed=0))[0])

"""Figures of notebook 06: every number of a table is drawn where it belongs."""

import numpy as np
import pandas as pd
import pytest

from lib.studies.timing import figures
from lib.timing.roofline import Peaks
from tests.drawing import drawn

PEAKS = Peaks(operations=2e9, bandwidth=1e9)  # the roof bends at 2 operations a byte


def layers() -> pd.DataFrame:
    speed_ups = {("dense", 1): 1.0, ("dense", 64): 1.0, ("CSR 50 %", 1): 0.25, ("CSR 50 %", 64): 0.5}
    rows = [
        {
            "layer": "q", "in_features": 8, "out_features": 16, "format": form, "rows": count, "seconds": 2.0,
            "operations": 4e9 * count, "bytes": 1e9,
            "speed_up": value, "speed_up_q1": value - 0.1, "speed_up_q3": value + 0.1, "not_run": "",
        }
        for (form, count), value in speed_ups.items()
    ]  # fmt: skip
    return pd.DataFrame([*rows, {"layer": "q", "format": "2:4", "rows": 1, "not_run": "needs CUDA"}])


def test_the_roofline_has_the_measured_points_under_a_roof_that_bends_where_both_sides_take_equally_long() -> None:
    figure, shown = figures.roofline(layers(), PEAKS, Peaks(operations=8e9, bandwidth=1e9))
    ax = figure.axes[0]
    assert drawn(ax) == {(4.0, 2.0), (256.0, 128.0)} and len(shown) == 4
    roofs = {str(line.get_label()): np.asarray(line.get_xydata()) for line in ax.lines if "roof" in str(line.get_label())}
    assert {name: points[:, 1].max() for name, points in roofs.items()} == {
        "roof, floating point": 2.0,
        "roof, 8-bit integers": 8.0,
    }
    points = roofs["roof, floating point"]
    np.testing.assert_allclose(points[:, 1], np.minimum(points[:, 0], 2.0))
    alone, _ = figures.roofline(layers(), PEAKS, None)
    assert not [line for line in alone.axes[0].lines if line.get_label() == "roof, 8-bit integers"]


def test_layers_show_what_ran_against_dense() -> None:
    figure, shown = figures.layers(layers())
    ax = figure.axes[0]
    assert {(0.0, 0.25), (1.0, 0.5)} <= drawn(ax) and set(shown["format"]) == {"dense", "CSR 50 %"}
    assert ax.get_title() == "q, 8 to 16" and [label.get_text() for label in ax.get_xticklabels()] == ["1", "64"]


def test_models_stand_in_rows_beside_what_the_digest_states() -> None:
    names = ("dense", "masked 50 %", "2:4")
    table = pd.DataFrame({
        "model": names, "speed_up": [1.0, 0.9, np.nan], "speed_up_q1": [1.0, 0.8, np.nan], "speed_up_q3": [1.0, 1.1, np.nan],
        "not_run": ["", "", "needs CUDA"],
    })  # fmt: skip
    figure, shown = figures.models(table)
    assert drawn(figure.axes[0]) == {(1.0, 0.0), (0.9, 1.0)} and list(shown["model"]) == ["dense", "masked 50 %"]
    assert {1.4, 1.8} <= {float(np.asarray(line.get_xdata())[0]) for line in figure.axes[0].lines}


def test_decoders_are_drawn_by_speed_and_loss() -> None:
    table = pd.DataFrame({
        "decoder": ["plain sampler", "dual"], "speed_up": [1.0, 4.0], "speed_up_q1": [1.0, 3.5], "speed_up_q3": [1.0, 4.5],
        "nats difference": [0.0, 0.2], "nats difference low": [0.0, -0.1], "nats difference high": [0.0, 0.5],
    })  # fmt: skip
    ax = figures.decoders(table)[0].axes[0]
    assert {(1.0, 0.0), (4.0, 0.2)} <= drawn(ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2"] and "times" in ax.get_xlabel()


def test_pairs_on_the_diagonal_multiply() -> None:
    table = pd.DataFrame({
        "format": ["dense", "int8 dynamic"], "decoder": ["plain sampler", "dual"], "predicted": [1.0, 3.0],
        "speed-up": [1.0, 2.5], "speed-up low": [1.0, 2.4], "speed-up high": [1.0, 2.6],
    })  # fmt: skip
    figure, _ = figures.composition(table)
    ax = figure.axes[0]
    assert {(1.0, 1.0), (3.0, 2.5)} <= drawn(ax)
    diagonal = next(line for line in ax.lines if len(np.asarray(line.get_xdata())) == 2 and line.get_marker() in ("None", ""))
    assert np.asarray(diagonal.get_xdata()).tolist() == pytest.approx(np.asarray(diagonal.get_ydata()).tolist())


def test_the_control_has_a_panel_a_measure_and_block_with_sure_rows_filled() -> None:
    rows = [
        {"model": "dlm", "block": block, "system": system, "control": control, "measure": measure, "difference": value,
         "low": value - 0.1, "high": value + 0.1, "p Holm": p}
        for block in (16, 64)
        for system, control, measure, value, p in (
            ("FOCUS", "sinks out", "other tokens", 0.3, 1.0), ("FOCUS", "random", "other tokens", 0.4, 0.01),
            ("Sparse-dLLM", "random", "KL", 0.02 * block, 0.2),
        )
    ]  # fmt: skip
    figure, shown = figures.sink_control(pd.DataFrame(rows))
    texts, others, exact, exact_too = figure.axes
    assert drawn(texts) == drawn(others) == {(0.3, 0.0), (0.4, 1.0)} and len(shown) == 6
    assert drawn(exact) == {(0.32, 0.0)} and drawn(exact_too) == {(1.28, 0.0)}
    filled = {str(box.lines[0].get_markerfacecolor()): np.asarray(box.lines[0].get_xdata()).tolist() for box in texts.containers}  # type: ignore[attr-defined]
    assert filled["white"] == [0.3] and [at for color, at in filled.items() if color != "white"] == [[0.4]]
    assert [label.get_text() for label in texts.get_yticklabels()] == ["FOCUS, sinks out", "FOCUS, random"]
    assert (texts.get_title(), others.get_title()) == ("dlm, blocks of 16", "dlm, blocks of 64")
    assert "nats" in exact.get_xlabel() and "share" in texts.get_xlabel()

"""Figures of notebook 05: every number of a table is drawn where it belongs."""

import numpy as np
import pandas as pd
import pytest

from lib.studies.joint import figures
from lib.studies.joint.comparisons import ORDERS, SPARSEGPT, WANDA
from tests.drawing import drawn


def test_the_front_fills_what_is_on_it() -> None:
    rows = [("dlm", "dense", 8.0, 0.0, True), ("dlm", SPARSEGPT, 4.0, 0.1, True), ("dlm", WANDA, 4.0, 0.3, False)]
    table = pd.DataFrame(rows, columns=["model", "method", "MB", "increase", "on the front"])
    figure, shown = figures.front(table)
    ax = figure.axes[0]
    assert {(8.0, 0.0), (4.0, 0.1), (4.0, 0.3)} <= drawn(ax) and len(shown) == 3
    faces = {
        tuple(float(value[0]) for value in np.asarray(line.get_xydata()).T): line.get_markerfacecolor()
        for line in ax.lines
        if line.get_linestyle() == "None" and len(np.asarray(line.get_xydata()))
    }
    assert faces[4.0, 0.3] == "white" and faces[4.0, 0.1] != "white"


def test_rounding_has_a_panel_for_each_model_and_group() -> None:
    rows = [
        {"model": model, "method": way, "group": group, "bits": bits, "increase": 0.1 * bits, "low": 0.0, "high": 1.0}
        for model in ("dlm", "ar")
        for way in ("nearest, search", "GPTQ, search")
        for group in (32.0, np.nan)
        for bits in (4, 3)
    ]
    figure, shown = figures.rounding(pd.DataFrame(rows))
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["dlm, groups of 32", "dlm, one scale a row", "ar, groups of 32", "ar, one scale a row"]
    assert "panel" not in shown and {round(y, 6) for _, y in drawn(figure.axes[0])} == {0.4, 0.3}
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["4", "3"]


def test_the_excess_of_each_order_stands_in_the_row_of_its_recipe() -> None:
    rows = [
        {"method": SPARSEGPT, "order": order, "sparsity": sparsity, "bits": 4, "excess": 0.01 * i + row, "low": -1.0, "high": 3.0}
        for row, sparsity in enumerate(("25 %", "50 %"))
        for i, order in enumerate(ORDERS)
    ]
    figure, _ = figures.excess(pd.DataFrame(rows))
    found = drawn(figure.axes[0])
    assert {(0.0, -0.22), (0.01, 0.0), (0.02, 0.22), (1.0, 0.78), (1.01, 1.0), (1.02, 1.22)} <= found
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["25 %, 4 bits", "50 %, 4 bits"]


def test_the_loss_by_noise_has_a_line_for_each_recipe() -> None:
    rows = [
        {"recipe": name, "mask ratio": ratio, "increase": 0.1 * ratio, "low": 0.0, "high": 0.2}
        for name in ("GPTQ, 4 bits", "SparseGPT")
        for ratio in (0.1, 0.9)
    ]
    figure, _ = figures.by_noise(pd.DataFrame(rows))
    ax = figure.axes[0]
    assert {(0.1, 0.01), (0.9, 0.09)} <= drawn(ax) and ax.get_xlim()[0] > ax.get_xlim()[1]  # all masked stands on the left
    legend = ax.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["GPTQ, 4 bits", "SparseGPT"]


def test_sensitivities_are_laid_out_by_layer_and_role() -> None:
    rows = [
        {"layer": layer, "role": role, "format": form, "increase": 10.0 * layer + place}
        for form, roles in (("int4", ("q", "down")), ("structured 50 %", ("attention", "MLP")))
        for layer in range(3)
        for place, role in enumerate(roles)
    ]
    figure, _ = figures.sensitivity(pd.DataFrame(rows))
    panels = {ax.get_title(): ax for ax in figure.axes if ax.get_title()}
    assert set(panels) == {"int4", "structured 50 %"}
    assert np.asarray(panels["int4"].images[0].get_array()).tolist() == [[0, 1], [10, 11], [20, 21]]
    labels = [text.get_text() for text in panels["structured 50 %"].get_xticklabels()]
    assert labels == ["attention", "MLP"]


def test_experts_are_shown_by_their_mean() -> None:
    rows = [
        {"layer": 0, "role": role, "format": "int4", "increase": increase}
        for role, increase in {"q": 1.0, "gate 0": 2.0, "gate 1": 4.0, "gate shared": 6.0}.items()
    ]
    figure, data = figures.sensitivity(pd.DataFrame(rows))
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["q", "gate"]
    assert np.asarray(ax.images[0].get_array()).tolist() == [[1.0, 4.0]]
    assert data.to_dict("records") == rows


def test_allocations_show_every_strategy_predicted_and_measured() -> None:
    rows = [
        {"budget": budget, "strategy": name, "predicted": 0.1 * i, "measured": 0.1 * i + 1, "low": 0.0, "high": 2.0}
        for budget in ("bytes <= 30 %", "seconds <= 70 %")
        for i, name in enumerate(("optimum", "greedy", "uniform", "random 1", "random 2", "annealed", "by measured loss"))
    ]
    figure, _ = figures.allocations(pd.DataFrame(rows))
    predicted, measured = (drawn(ax) for ax in figure.axes)
    assert {round(x, 6) for x, _ in predicted} == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6}
    assert {(round(x + 1, 6), y) for x, y in predicted} <= measured
    rows_of = [{round(y, 6) for x, y in predicted if round(x, 6) == round(0.1 * i, 6)} for i in (3, 4)]
    assert rows_of[0] == rows_of[1] == {0.06, 1.06}  # random draws share a line of their own
    assert len({round(y, 6) for _, y in predicted}) == 2 * 6
    assert {ax.get_xscale() for ax in figure.axes} == {"symlog"}  # one bad draw must not press the others into a point


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(Exception, match="must have a"):
        figures.excess(pd.DataFrame({"method": [], "sparsity": [], "bits": [], "order": []}))

"""Figures of notebook 03: one look a pruning method, the price of sparsity, patterns, and tasks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.report import figures, panels
from lib.report.figures import METHODS, OTHER_COLORS, OTHER_MARKERS, Style
from lib.report.panels import INCREASE, loss_axis, name_rows, numbers, points, select, unique

DENSE = "dense"
UNSTRUCTURED = "unstructured"
VALUES = ("increase", "low", "high")
PATTERNS = ("unstructured 50 %", "4:8", "2:4", "structured 30 %", "structured 50 %")
LEVELS: Mapping[str, Any] = MappingProxyType({"chance": (0, (5, 4)), DENSE: "-"})
DODGE = 0.72  # of the room of a group that its methods share


@dataclass(frozen=True)
class LineStyle(Style):
    """Colour, marker and dashes of one method, the same in every figure."""

    line: str = "-"


STYLES: Mapping[str, LineStyle] = MappingProxyType({
    **{
        label: LineStyle(METHODS[name].color, METHODS[name].marker)
        for label, name in {
            "dense": "dense", "random": "random", "magnitude": "magnitude", "Wanda": "wanda", "SparseGPT": "sparsegpt",
            "AR sink-preserve": "ar-sink-preserve", "sink-aware (Wanda)": "sink-aware",
        }.items()
    },
    "sink-aware (SparseGPT)": LineStyle(METHODS["sink-aware"].color, "P", "--"),
    "DWANDA": LineStyle(OTHER_COLORS[1], "<"),
})  # fmt: skip
TAKEN = {style.color for style in STYLES.values()}
REMAINING = (*(color for color in OTHER_COLORS if color not in TAKEN), "#6A51A3", "#8C6D31")


def style_of(label: str, labels: Iterable[str] = ()) -> LineStyle:
    """Return the look of a method; labels without a fixed one get the remaining looks in their order of appearance.

    Args:
        label: what the legend calls the method.
        labels: all labels of the figure, in an order that does not change from figure to figure.

    Returns:
        Its look.

    >>> style_of("Wanda").color, style_of("own", ["Wanda", "own"]).color
    ('#0072B2', '#CC79A7')
    """
    if label in STYLES:
        return STYLES[label]
    unknown = [name for name in dict.fromkeys([*labels, label]) if name not in STYLES]
    place = unknown.index(label)
    return LineStyle(REMAINING[place % len(REMAINING)], OTHER_MARKERS[place % len(OTHER_MARKERS)])


def percent(share: float) -> str:
    """Write a share as per cent without needless digits.

    >>> percent(0.3), percent(0.125)
    ('30 %', '12.5 %')
    """
    return f"{round(100 * share, 1):g} %"


def method_legend(ax: Axes, names: Sequence[str], labels: Sequence[str]) -> None:
    """Explain methods outside a panel; `labels` are all methods of the figure, which fixes the looks of unknown ones."""
    handles = []
    for name in names:
        style = style_of(name, labels)
        handles.append(panels.legend_key(name, style, line=style.line))
        if name == DENSE:
            handles[-1].set(marker="", linewidth=0.8)
    panels.legend_beside(ax, handles, handlelength=2.6)


def quality_curves(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the increase of the loss over the share of weights removed, a line a method and a panel a model.

    Args:
        table: columns model, method, pattern, sparsity, increase, low and high (nats per token over the dense model). Only the
            pattern "unstructured" is drawn; the dense model is the line at 0.
    """
    shown = select(table, pattern=UNSTRUCTURED)
    models, methods = unique(shown, "model"), unique(shown, "method")
    width = min(figures.WIDTH, 3.4 * len(models) + 2.2)
    figure, axes = panels.side_by_side(len(models), width=width, height=4.0, x_label="weights removed (%)", y_label=INCREASE)
    pruned = shown.take(np.flatnonzero(shown["method"] != DENSE).tolist())
    ticks = np.unique(100 * numbers(pruned, "sparsity"))
    for ax, model in zip(axes, models, strict=True):
        ax.axhline(0.0, color=STYLES[DENSE].color, linewidth=0.8)
        # From wide to thin: methods that remove nearly the same weights lie on one another, and all must stay visible.
        for method, wide in zip(methods, np.linspace(1.0, 0.0, len(methods)), strict=True):
            rows, style = select(pruned, model=model, method=method), style_of(method, methods)
            if len(rows):
                _curve(ax, rows.sort_values("sparsity"), style=style, wide=float(wide))
        ax.set(title=model, xticks=ticks)
        ax.xaxis.set_major_formatter("{x:g}")
    loss_axis(axes[0], numbers(pruned, *VALUES))
    method_legend(axes[-1], [DENSE, *(name for name in methods if name != DENSE)], methods)
    return figure, shown


def _curve(ax: Axes, rows: pd.DataFrame, *, style: LineStyle, wide: float) -> None:
    """Draw one method's line with its band, at a width between thin (0) and wide (1)."""
    figures.band(ax, 100 * rows["sparsity"], rows["increase"], rows["low"], rows["high"], style=style)
    ax.collections[-1].set_alpha(0.12)
    line, edge = ax.lines[-1], style.color if style.marker == "x" else "white"
    line.set(
        linestyle=style.line, linewidth=1.1 + 2.2 * wide, markeredgecolor=edge, markeredgewidth=1.4 if edge != "white" else 0.5
    )
    line.set_markersize(panels.marker_size(style, 4.5 + 4.0 * wide))


def pattern_points(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the increase of the loss by sparsity pattern, methods side by side in each group and a panel a model.

    Args:
        table: as in `quality_curves`; patterns "2:4", "4:8" and "structured" are drawn, and "unstructured" at one half.
    """
    structure = table["pattern"].isin([UNSTRUCTURED, "structured"])
    groups = table["pattern"].where(~structure, table["pattern"] + " " + table["sparsity"].map(percent))
    shown = table.assign(group=groups).take(np.flatnonzero(groups.isin(PATTERNS) & (table["method"] != DENSE)).tolist())
    models, methods = unique(shown, "model"), unique(shown, "method")
    present = [name for name in PATTERNS if name in set(shown["group"])]
    figure, axes = figures.subplots(len(models), 1, height=2.5 * len(models) + 0.8, sharex=True, sharey=True, squeeze=False)
    shifts = DODGE * (np.arange(len(methods)) - (len(methods) - 1) / 2) / len(methods)
    for ax, model in zip(axes[:, 0], models, strict=True):
        for place in range(0, len(present), 2):
            ax.axvspan(place - 0.5, place + 0.5, color="#F5F5F5", linewidth=0, zorder=0)
        ax.axhline(0.0, color=STYLES[DENSE].color, linewidth=0.8)
        for shift, method in zip(shifts, methods, strict=True):
            rows = select(shown, model=model, method=method)
            places = [present.index(str(name)) + float(shift) for name in rows["group"]]
            points(ax, rows, places, value="increase", style=style_of(method, methods), horizontal=False)
        ax.set(title=model, ylabel=INCREASE, xlim=(-0.5, len(present) - 0.5))
        ax.set_xticks(range(len(present)), present)
    loss_axis(axes[0, 0], numbers(shown, *VALUES))
    figure.supxlabel("pattern of the removed weights", fontsize="medium")
    method_legend(axes[0, 0], [DENSE, *methods], methods)
    return figure, shown


def task_accuracy(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw accuracies with their intervals by method and sparsity, a row of panels a task and a column a model.

    Args:
        table: columns model, task, method, sparsity, accuracy, low, high (shares of documents), and chance and dense, the
            accuracies of guessing and of the dense model.
    """
    amounts = [DENSE if m == DENSE else f"{m}, {percent(s)}" for m, s in zip(table["method"], table["sparsity"], strict=True)]
    shown = table.assign(label=amounts)
    models, tasks, methods, labels = (unique(shown, name) for name in ("model", "task", "method", "label"))
    height = (0.19 * len(labels) + 0.55) * len(tasks) + 0.8
    figure, axes = figures.subplots(len(tasks), len(models), height=height, sharex="row", sharey=True, squeeze=False)
    for (row, task), (column, model) in product(enumerate(tasks), enumerate(models)):
        ax, rows = axes[row, column], select(shown, task=task, model=model)
        for method in methods:
            part = select(rows, method=method)
            places = [labels.index(str(label)) for label in part["label"]]
            points(ax, part, places, value="accuracy", style=style_of(method, methods))
        for name, line in LEVELS.items():
            for level in set(rows[name].dropna()):
                ax.axvline(level, color="black", linewidth=0.8, linestyle=line, zorder=1)
        name_rows(ax, labels, size=8)
        ax.set_visible(len(rows) > 0)  # a model may be at chance on a task that another one can do
        ax.tick_params(labelleft=model == min(unique(select(shown, task=task), "model"), key=models.index))  # it names the rows
        ax.set_title(f"{task}, {model}", fontsize=10)
    figure.supxlabel("accuracy (% of documents)", fontsize="medium")
    handles = [Line2D([], [], linestyle=line, label=name, color="black", linewidth=0.8) for name, line in LEVELS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure, shown

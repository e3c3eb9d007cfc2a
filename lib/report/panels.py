"""Parts that figures of several studies share: panels side by side, points with intervals, axes of differences, legends."""

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.core.errors import require
from lib.report import figures
from lib.report.figures import Style

INCREASE = "increase of the loss\n(nats per token)"
DIFFERENCE = Style("#000000", "o")
LINEAR_BELOW = 0.01  # nats per token: smaller differences are drawn on a linear scale
NEAREST_TICKS = {"x": 0.09, "y": 0.07}  # of the axis: closer numbers would touch


def select(table: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """Return the rows whose columns have the given values.

    >>> select(pd.DataFrame({"model": ["a", "b"], "loss": [3.0, 4.0]}), model="b")["loss"].tolist()
    [4.0]
    """
    keep = np.ones(len(table), dtype=bool)
    for column, value in wanted.items():
        keep &= np.asarray(table[column] == value)
    return table.take(np.flatnonzero(keep).tolist())


def numbers(table: pd.DataFrame, *columns: str) -> Float[np.ndarray, "row column"]:
    """Return some columns as numbers."""
    return np.asarray(table[list(columns)], dtype=np.float64)


def unique(table: pd.DataFrame, column: str) -> list[str]:
    """List the values of a column in their order of appearance.

    Raises:
        InputError: there is none.
    """
    values = [str(value) for value in table[column].unique()]
    require(bool(values), f"a figure must have a {column} to draw", "a table without rows", "check what was measured")
    return values


def side_by_side(
    count: int, *, height: float, x_label: str, y_label: str = "", width: float = figures.WIDTH, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a row of panels that share the y axis, one label for all below them and one on the left.

    Args:
        count: number of panels.
        height: inches.
        x_label: what runs along x, with its unit.
        y_label: what runs along y.
        width: inches.
        options: as of `figures.subplots`.
    """
    figure, axes = figures.subplots(1, count, width=width, height=height, sharey=True, squeeze=False, **options)
    figure.supxlabel(x_label, fontsize="medium")
    axes[0, 0].set_ylabel(y_label)
    return figure, list(axes[0])


def points(
    ax: Axes,
    rows: pd.DataFrame,
    places: Sequence[float],
    *,
    value: str,
    style: Style,
    filled: bool = True,
    horizontal: bool = True,
    label: str | None = None,
) -> None:
    """Draw estimates with their intervals, as open markers where asked.

    Args:
        ax: axes to draw on.
        rows: with the column `value` and with `low` and `high`; an interval that is missing is not drawn.
        places: row or column of each estimate.
        value: column of the estimates.
        style: colour and marker.
        filled: False for open markers.
        horizontal: True when estimates run along x.
        label: entry in the legend.
    """
    figures.errorbar_points(ax, places, rows[value], rows["low"], rows["high"], style=style, label=label, horizontal=horizontal)
    look: dict[str, Any] = {} if filled else {"markerfacecolor": "white", "markeredgewidth": 1.4}
    ax.containers[-1].lines[0].set(markersize=marker_size(style), **look)  # type: ignore[attr-defined]


def differences(table: pd.DataFrame, *, rows: str, value: str, x_label: str) -> tuple[Figure, pd.DataFrame]:
    """Draw paired differences with their intervals, a row each and a panel a model.

    Args:
        table: columns model, low and high, and those that are named.
        rows: column that names the rows.
        value: column of the differences.
        x_label: what they are, with the unit.
    """
    models, names = unique(table, "model"), unique(table, rows)
    labels = [textwrap.fill(name, 48) for name in names]
    height = 1.2 + sum(0.16 + 0.14 * (1 + label.count("\n")) for label in labels)
    figure, axes = side_by_side(len(models), height=height, x_label=x_label, sharex=True)
    for ax, model in zip(axes, models, strict=True):
        own = select(table, model=model)
        difference_axis(ax)
        points(ax, own, [float(names.index(str(name))) for name in own[rows]], value=value, style=DIFFERENCE)
        name_rows(ax, labels)
        ax.set(title=model)
    return figure, table


def marker_size(style: Style, size: float = 6.0) -> float:
    """Return the size of a marker in points: stars are drawn larger, or they would look smaller than the rest."""
    return 1.6 * size if style.marker == "*" else size


def name_rows(ax: Axes, labels: Sequence[str], *, size: float = 8.5) -> None:
    """Name the rows of horizontal points, at 0, 1, 2, ... from the top down; the text has a size in points."""
    ax.set_yticks(range(len(labels)), labels, fontsize=size)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    ax.set_axisbelow(True)


def loss_axis(ax: Axes, values: Float[np.ndarray, "row column"], *, axis: Literal["x", "y"] = "y") -> None:
    """Make an axis of loss differences fit for 0.01 and 5 alike; call it when all panels are drawn.

    The axis is logarithmic on both sides of a linear part around 0, with plain numbers; it stays linear when all is small.

    Args:
        ax: one of the axes that share it.
        values: estimates and ends of intervals; those that are not finite do not count.
        axis: that shows them.
    """
    finite = np.append(values[np.isfinite(values)], 0.0)
    low, high = float(finite.min()), float(finite.max())
    if max(-low, high) <= 5 * LINEAR_BELOW:
        return
    ends = (1.35 * low - 0.2 * LINEAR_BELOW, 1.35 * high + 0.2 * LINEAR_BELOW)
    scale, number, limit = (
        (ax.set_xscale, ax.set_xticks, ax.set_xlim) if axis == "x" else (ax.set_yscale, ax.set_yticks, ax.set_ylim)
    )
    scale("symlog", linthresh=LINEAR_BELOW, linscale=0.5)
    ticks = _readable_ticks(ax.xaxis if axis == "x" else ax.yaxis, ends, nearest=NEAREST_TICKS[axis])
    number(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    ax.minorticks_off()
    limit(*ends)


def _readable_ticks(shown: Axis, ends: tuple[float, float], *, nearest: float) -> list[float]:
    """Choose 0, then powers of ten, then fives and twos, as many as fit between the ends."""
    decades = [10.0**power for power in range(-2, 4)]
    wishes = [0.0, *(sign * lead * decade for lead in (1, 5, 2) for decade in decades for sign in (1, -1))]
    transform = shown.get_transform().transform
    bottom, top = transform(np.asarray(ends))
    chosen: list[float] = []
    places: list[float] = []
    for wish in wishes:
        place = float(transform(np.asarray([wish]))[0])
        apart = all(abs(place - other) >= nearest * (top - bottom) for other in places)
        if bottom <= place <= top and apart:
            chosen.append(float(f"{wish:g}"))
            places.append(place)
    return sorted(chosen)


def legend_key(label: str, style: Style, *, line: str = "none") -> Line2D:
    """Make an entry of a legend: a marker alone unless dashes are given."""
    look = {"marker": style.marker, "markersize": marker_size(style), "linestyle": line, "linewidth": 1.4}
    return Line2D([], [], color=style.color, label=label, **look)  # type: ignore[arg-type]


def legend_beside(ax: Axes, handles: Sequence[Line2D] | None = None, **look: Any) -> None:
    """Put the legend to the right of an axes, with its own entries unless others are given."""
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), **look)


def difference_axis(ax: Axes, *, numbers: int = 5) -> None:
    """Draw the line of no difference along x, and leave room between the numbers."""
    ax.axvline(0.0, color="black", linewidth=0.8, zorder=1)
    ax.locator_params(axis="x", nbins=numbers)

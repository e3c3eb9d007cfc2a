"""Figures of notebook 05: quality against size, whether errors add, where the error sits, and what an allocation buys."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.models.language_model import ROLES
from lib.report import figures, panels
from lib.report.figures import METHODS, OTHER_COLORS, Style
from lib.studies.joint.comparisons import SINK_AWARE, SPARSEGPT, WANDA

FAMILY_STYLES: Mapping[str, Style] = MappingProxyType({
    "dense": METHODS["dense"], SPARSEGPT: METHODS["sparsegpt"], SINK_AWARE: METHODS["sink-aware"], WANDA: METHODS["wanda"],
})  # fmt: skip
ORDER_STYLES: Mapping[str, Style] = MappingProxyType({
    "prune, quantize": Style(OTHER_COLORS[0], "v"), "quantize, prune": Style(OTHER_COLORS[1], "P"),
    "joint": Style(OTHER_COLORS[3], "o"),
})  # fmt: skip
SERIES = tuple(Style(color, marker) for color, marker in zip(
    ("#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#777777"), "osDvPX<", strict=True
))  # fmt: skip
ALLOCATIONS: Mapping[str, Style] = MappingProxyType({
    "optimum": Style("#D55E00", "*"), "greedy": Style("#0072B2", "s"), "uniform": Style("#000000", "o"),
    "random": Style("#BBBBBB", "x"), "annealed": Style("#CC79A7", "P"), "by measured loss": Style("#009E73", "D"),
})  # fmt: skip
SIZE = "size of the model as stored (MB)"


def front(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw loss against size, a panel a model: what no other recipe dominates is filled and joined, the rest is open.

    Args:
        table: from `tables.front_table`.
    """
    models = panels.unique(table, "model")
    figure, axes = panels.side_by_side(len(models), height=4.4, x_label=SIZE, y_label=panels.INCREASE)
    for ax, model in zip(axes, models, strict=True):
        rows = panels.select(table, model=model)
        best = panels.select(rows, **{"on the front": True}).sort_values("MB")
        ax.plot(best["MB"], best["increase"], color="#999999", linewidth=1.0, zorder=1)
        for method, style in FAMILY_STYLES.items():
            for marked in (False, True):
                some = panels.select(rows, method=method, **{"on the front": marked})
                face = style.color if marked else "white"
                ax.plot(
                    some["MB"], some["increase"], style.marker, color=style.color, markerfacecolor=face,
                    markersize=panels.marker_size(style, 6.0 if marked else 4.0), linestyle="none", zorder=3 if marked else 2,
                )  # fmt: skip
        ax.set(title=model)
    panels.loss_axis(axes[0], panels.numbers(table, "increase"))
    _legend(
        figure, {name: style for name, style in FAMILY_STYLES.items() if name in set(table["method"])}, "on the front: filled"
    )
    return figure, table


def _legend(figure: Figure, styles: Mapping[str, Style], title: str = "") -> None:
    """Explain markers above the panels."""
    handles = [panels.legend_key(name, style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), title=title or None)


def rounding(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw what rounding alone costs by number of bits, a line a way of rounding, a panel a model and group size.

    Args:
        table: rows of a `tables.loss_table` with rounding alone.
    """
    table = table.assign(panel=[f"{m}, {_group(g)}" for m, g in zip(table["model"], table["group"], strict=True)])
    names, ways = panels.unique(table, "panel"), panels.unique(table, "method")
    columns = len(names) // len(panels.unique(table, "model")) or 1
    figure, axes = figures.subplots(
        len(names) // columns, columns, height=2.6 * (len(names) // columns) + 0.8, sharey=True, sharex=True, squeeze=False
    )
    bits = sorted(set(table["bits"]), reverse=True)
    for ax, name in zip(axes.flat, names, strict=True):
        for way, style in zip(ways, SERIES, strict=False):
            rows = panels.select(table, panel=name, method=way)
            places = [bits.index(value) + 0.07 * (ways.index(way) - len(ways) / 2) for value in rows["bits"]]
            ax.plot(places, rows["increase"], color=style.color, linewidth=1.2)
            panels.points(ax, rows, places, value="increase", style=style, horizontal=False)
        ax.set_title(name, fontsize=10)
        ax.set_xticks(range(len(bits)), [f"{value:g}" for value in bits])
        ax.set_xlim(-0.5, len(bits) - 0.5)
        ax.axhline(0.0, color="black", linewidth=0.8)
    panels.loss_axis(axes[0, 0], panels.numbers(table, "increase", "low", "high"))
    figure.supxlabel("bits of a weight", fontsize="medium")
    figure.supylabel(panels.INCREASE.replace("\n", " "), fontsize="medium")
    _legend(figure, dict(zip(ways, SERIES, strict=False)))
    return figure, table.drop(columns="panel")


def _group(size: float) -> str:
    """Name a group size.

    >>> _group(64.0), _group(float("nan"))
    ('groups of 64', 'one scale a row')
    """
    return f"groups of {size:g}" if np.isfinite(size) else "one scale a row"


def excess(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw by how much the cost of both steps passes the sum of their costs, a panel a method, a marker an order.

    Args:
        table: one model of `tables.interactions`.
    """
    methods = panels.unique(table, "method")
    conditions = list(dict.fromkeys(zip(table["sparsity"], table["bits"], strict=True)))
    height = 0.34 * len(conditions) + 1.6
    figure, axes = panels.side_by_side(
        len(methods), height=height, x_label="cost of both minus the sum of the costs (nats per token)"
    )
    for ax, method in zip(axes, methods, strict=True):
        panels.difference_axis(ax, numbers=4)
        for shift, (order, style) in zip((-0.22, 0.0, 0.22), ORDER_STYLES.items(), strict=True):
            rows = panels.select(table, method=method, order=order)
            places = [conditions.index(pair) + shift for pair in zip(rows["sparsity"], rows["bits"], strict=True)]
            panels.points(ax, rows, places, value="excess", style=style)
        panels.name_rows(ax, [f"{sparsity}, {bits} bits" for sparsity, bits in conditions])
        ax.set_title(method, fontsize=10)
    _legend(figure, ORDER_STYLES)
    return figure, table


def by_noise(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the increase of the loss by mask ratio, a line a recipe.

    Args:
        table: one model of `tables.noise_table`.
    """
    figure, ax = figures.subplots(height=4.0)
    for name, style in zip(panels.unique(table, "recipe"), SERIES, strict=False):
        rows = panels.select(table, recipe=name)
        ax.plot(rows["mask ratio"], rows["increase"], color=style.color, linewidth=1.2)
        panels.points(ax, rows, rows["mask ratio"].tolist(), value="increase", style=style, horizontal=False, label=name)
    ax.axhline(0.0, color="black", linewidth=0.8)
    panels.loss_axis(ax, panels.numbers(table, "increase", "low", "high"))
    figures.mask_ratio_axis(ax)
    ax.set_xlim(1.03, -0.03)  # room for markers at both ends
    ax.set_ylabel("increase of the loss\n(nats per masked token)")
    panels.legend_beside(ax)
    return figure, table


def sensitivity(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the increase of the loss when one unit alone takes a format: layer by role, a panel a format.

    Args:
        table: one model: columns layer (index of the block), role, format and increase (nats per token). Matrices of experts
            ("gate 3") are shown by their mean over the experts of a block.
    """
    names, shown = panels.unique(table, "format"), table.assign(role=[str(role).split()[0] for role in table["role"]])
    columns = min(3, len(names))
    rows_of = -(-len(names) // columns)
    figure, axes = figures.subplots(rows_of, columns, height=2.7 * rows_of + 0.4, squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        wide = panels.select(shown, format=name).pivot_table(index="layer", columns="role", values="increase")
        roles = [role for role in (*ROLES, "attention", "MLP") if role in wide.columns]
        figures.heatmap(ax, wide[roles], label="increase (nats per token)", y_label="layer", title=name, difference=True)
        ax.set_xticks(range(len(roles)), roles, fontsize=7)
    for ax in axes.flat[len(names) :]:
        ax.remove()
    return figure, table


def allocations(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw predicted and measured loss of the allocations at each budget.

    Args:
        table: one model of `tables.allocation_table`, only rows that were measured.
    """
    budgets = panels.unique(table, "budget")
    kinds = table["strategy"].str.replace(r" \d+$", "", regex=True)
    figure, axes = figures.subplots(1, 2, height=0.6 * len(budgets) + 2.0, sharey=True, sharex=True)
    shifts = np.linspace(-0.3, 0.3, len(ALLOCATIONS)).tolist()
    for shift, (name, style) in zip(shifts, ALLOCATIONS.items(), strict=True):
        rows = table.take(np.flatnonzero(kinds == name).tolist())
        places = [budgets.index(str(value)) + shift for value in rows["budget"]]
        axes[0].plot(rows["predicted"], places, style.marker, color=style.color, markersize=panels.marker_size(style))
        panels.points(axes[1], rows, places, value="measured", style=style)
    for ax, title in zip(axes, ("predicted: sum over units", "measured"), strict=True):
        panels.difference_axis(ax)
        panels.loss_axis(ax, panels.numbers(table, "predicted", "measured", "low", "high"), axis="x")
        panels.name_rows(ax, budgets)
        ax.set_title(title, fontsize=10)
    figure.supxlabel("increase of the loss (nats per token)", fontsize="medium")
    _legend(figure, ALLOCATIONS)
    return figure, table

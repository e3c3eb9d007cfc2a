"""Figures of notebook 04: which of the released changes pays, the controls, the doses, and what is removed instead."""

import re
import textwrap
from collections.abc import Mapping
from itertools import product
from types import MappingProxyType

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib import figures
from lib.figures import METHODS, OTHER_MARKERS, Style
from lib.models import ROLES
from lib.pruning_figures import (
    LineStyle, line_with_band, loss_axis, name_rows, percent, points, style_of, unique,
)  # fmt: skip

GAIN = "decrease of the loss (nats per token)"
SINK_COLOR = METHODS["sink-aware"].color
GREY = "#777777"
SINK_EFFECT = "sink weights"
SIGNIFICANT = 0.05
CORNERS: Mapping[tuple[str, str, str, str], str] = MappingProxyType({
    ("clean", "off", "sequential", "RMS"): "Wanda as released",
    ("noised", "off", "sequential", "RMS"): "DWANDA-like",
    ("noised", "on", "one-shot", "sum"): "sink-aware as released",
})  # fmt: skip
CELL_STYLES: Mapping[str, Style] = MappingProxyType({"off": METHODS["wanda"], "on": METHODS["sink-aware"]})
CONTROLS: Mapping[str, Style] = MappingProxyType({
    "sinks down": METHODS["sink-aware"],
    **{name: Style(GREY, marker) for name, marker in zip(
        ("random positions", "largest norms", "mask tokens", "first positions"), OTHER_MARKERS, strict=False)},
    "sinks kept": METHODS["ar-sink-preserve"],
})  # fmt: skip
PLAIN = Style("#000000", "o")
BIN_SIZE = 20  # channels at least: fewer make a mean of noise
BINS = 12
ROW = 0.25  # inches


def _zero(ax: Axes) -> None:
    """Draw the line of no difference."""
    ax.axvline(0.0, color="black", linewidth=0.8, zorder=1)


def _trim(axes: np.ndarray, used: int) -> None:
    """Take the unused axes out of a grid; the lowest of each column shows the numbers of the shared x axis."""
    for ax in list(axes.flat)[used:]:
        ax.remove()
    for ax in list(axes.flat)[max(0, used - axes.shape[1]) : used]:
        ax.tick_params(axis="x", labelbottom=True)


def _keys(figure: Figure, *, filled: str, opened: str) -> None:
    """Explain filled and open markers above the panels."""
    look = {"color": "black", "marker": "o", "linestyle": "none"}
    handles = [Line2D([], [], label=filled, **look), Line2D([], [], label=opened, markerfacecolor="white", **look)]  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)


def attribution(effects: pd.DataFrame, total: Mapping[str, float]) -> tuple[Figure, pd.DataFrame]:
    """Draw how much of the released gain is due to each of its changes, and their interactions beside it.

    Args:
        effects: columns effect, order (1 = main effect), gain, low, high (decrease of the loss, nats per token) and p_holm.
        total: gain, low and high of the whole released change.
    """
    first = pd.DataFrame([{"effect": "released change", "order": 0, **total}])
    shown = pd.concat([first, effects], ignore_index=True)
    figure, axes = figures.subplots(1, 2, height=4.6, sharex=True, gridspec_kw={"width_ratios": [1.2, 1]})
    parts = (shown[shown["order"] <= 1], shown[shown["order"] > 1])
    for ax, rows, size in zip(axes, parts, (9.0, 7.0), strict=True):
        _zero(ax)
        for place, (name, order, p_holm) in enumerate(zip(rows["effect"], rows["order"], rows["p_holm"], strict=True)):
            color = "#000000" if order == 0 else SINK_COLOR if SINK_EFFECT in name else GREY
            style = Style(color, "D" if order == 0 else "*" if name == SINK_EFFECT else "o")
            points(ax, rows.iloc[[place]], [place], value="gain", style=style, filled=order == 0 or p_holm < SIGNIFICANT)
        names = [_effect_label(row, with_value=ax is axes[0]) for row in rows.to_dict("records")]
        name_rows(ax, names, size=size)
    axes[0].axhline(0.5, color="#999999", linewidth=0.8)
    axes[0].set_title("whole change and main effects")
    axes[1].set_title("interactions")
    figure.supxlabel(GAIN, fontsize="medium")
    _keys(figure, filled=f"p < {SIGNIFICANT:g} (Holm), or whole change", opened=f"p ≥ {SIGNIFICANT:g}")
    return figure, shown


def _effect_label(row: Mapping[object, object], *, with_value: bool) -> str:
    """Name an effect in short lines, with its value where the eye should find it."""
    name = textwrap.fill(str(row["effect"]), 32)
    return f"{name}\n{row['gain']:+.2g}".replace("-0", "−0") if with_value else name


def factorial_cells(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the losses of all 16 combinations, sink weights off and on joined, so that one sees whether weights ever matter.

    Args:
        table: columns inputs (clean, noised), weights (off, on), order (sequential, one-shot), norm (RMS, sum), and loss, low
            and high (nats per token).
    """
    figure, ax = figures.subplots(height=4.8)
    rows_of = {
        (str(i), str(w), str(o), str(n)): place
        for place, (i, w, o, n) in enumerate(table[["inputs", "weights", "order", "norm"]].itertuples(index=False))
    }
    combinations = [
        key for key in product(("clean", "noised"), ("sequential", "one-shot"), ("RMS", "sum"))
        if any((key[0], weights, *key[1:]) in rows_of for weights in CELL_STYLES)
    ]  # fmt: skip
    for place, (inputs, order, norm) in enumerate(combinations):
        cells = {weights: (inputs, weights, order, norm) for weights in CELL_STYLES}
        ends = []
        for (weights, cell), shift in zip(cells.items(), (-0.17, 0.17), strict=True):
            if cell in rows_of:
                row = table.iloc[[rows_of[cell]]]
                ends.append((float(row["loss"].iloc[0]), place + shift))
                points(ax, row, [place + shift], value="loss", style=CELL_STYLES[weights])
                _name_corner(ax, CORNERS.get(cell), row, place + shift, color=CELL_STYLES[weights].color)
        ax.plot(*zip(*ends, strict=True), color="#999999", linewidth=1.0, zorder=1)
    name_rows(ax, [", ".join(key) for key in combinations])
    ax.set(xlabel="loss after pruning (nats per token)", ylabel="calibration inputs, order, sum of norms")
    handles = [
        Line2D([], [], color=style.color, marker=style.marker, linestyle="none", label=f"sink weights {name}")
        for name, style in CELL_STYLES.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure, table


def _name_corner(ax: Axes, name: str | None, row: pd.DataFrame, height: float, *, color: str) -> None:
    """Name a cell outside the right border, with a thin line to it."""
    if name is None:
        return
    end = float(row["high"].fillna(row["loss"]).iloc[0])
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "linestyle": ":", "shrinkA": 0, "shrinkB": 2}
    ax.annotate(
        name, (end, height), (1.02, height), textcoords=ax.get_yaxis_transform(), va="center", fontsize=8.5, color=color,
        arrowprops=line, annotation_clip=False,
    )  # fmt: skip


def controls(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the gain of every way to weigh calibration tokens over no weights, a panel a model.

    Args:
        table: columns model, weighting, gain, low and high (decrease of the loss against no weights, nats per token).
    """
    models, found = unique(table, "model"), unique(table, "weighting")
    order = [*(name for name in CONTROLS if name in found), *(name for name in found if name not in CONTROLS)]
    width = min(figures.WIDTH, 3.6 * len(models) + 1.8)
    figure, axes = figures.subplots(
        1, len(models), width=width, height=0.34 * len(order) + 1.4, sharex=True, sharey=True, squeeze=False
    )
    for ax, model in zip(axes[0], models, strict=True):
        _zero(ax)
        for place, name in enumerate(order):
            rows = table[(table["model"] == model) & (table["weighting"] == name)]
            points(ax, rows, [place] * len(rows), value="gain", style=CONTROLS.get(name) or style_of(name, order))
        name_rows(ax, order, size=9)
        ax.set(title=model)
    axes[0, 0].set_ylabel("tokens weighed")
    figure.supxlabel(GAIN, fontsize="medium")
    return figure, table


def dose(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the gain over each setting of the weights, a panel a setting; the released value is an open marker.

    Args:
        table: columns factor, setting (text), gain, low, high (decrease of the loss, nats per token), share (tokens taken out, in
            per cent) and released (True for the authors' value).
    """
    factors = unique(table, "factor")
    columns = min(2, len(factors)) if len(factors) > 2 else 1
    rows_of = {factor: table[table["factor"] == factor] for factor in factors}
    most = [max(len(rows_of[name]) for name in factors[at : at + columns]) for at in range(0, len(factors), columns)]
    figure, axes = figures.subplots(
        len(most), columns, height=sum(ROW * count + 0.55 for count in most) + 0.8, sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": [ROW * count + 0.1 for count in most]},
    )  # fmt: skip
    for ax, factor in zip(axes.flat, factors, strict=False):
        rows = rows_of[factor]
        _zero(ax)
        for place, released in enumerate(rows["released"]):
            style = Style(SINK_COLOR, "o")
            points(ax, rows.iloc[[place]], [place], value="gain", style=style, filled=not released)
        name_rows(ax, [_setting(name, share) for name, share in zip(rows["setting"], rows["share"], strict=True)])
        ax.set_title(factor, loc="left", fontsize=10)
    _trim(axes, len(factors))
    figure.supylabel("setting (share of tokens taken out)", fontsize="medium")
    figure.supxlabel(GAIN, fontsize="medium")
    _keys(figure, filled="other setting", opened="as released")
    return figure, table


def _setting(name: object, share: float) -> str:
    """Name a setting, with the share of tokens it takes out where there is one."""
    return f"{name} ({percent(share / 100)})" if np.isfinite(share) else str(name)


def mask_overlap(table: pd.DataFrame, *, limits: tuple[float, float] | None = None) -> tuple[Figure, pd.DataFrame]:
    """Draw the overlap of the weights that two methods remove, by layer and role.

    Args:
        table: columns layer (index from 0), role and jaccard.
        limits: ends of the colour scale; from the data when None.
    """
    found = unique(table, "role")
    roles = [*(name for name in ROLES if name in found), *(name for name in found if name not in ROLES)]
    wide = table.pivot_table(index="layer", columns="role", values="jaccard", dropna=False)[roles]
    figure, ax = figures.subplots(width=6.0, height=min(8.0, 0.3 * len(wide) + 1.8))
    label = "Jaccard overlap of removed weights"
    image = figures.heatmap(ax, wide, label=label, x_label="role of the matrix", y_label="layer", limits=limits)
    ax.set_xticks(range(len(roles)), roles)
    if len(wide) <= 16:
        ax.set_yticks(range(len(wide)), [str(layer) for layer in wide.index])
        for (row, column), value in np.ndenumerate(wide.to_numpy()):
            if np.isfinite(value):
                dark = float(image.norm(value)) < 0.55
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    return figure, table


def binned_mean(
    share: Float[np.ndarray, " channel"], net: Float[np.ndarray, " channel"]
) -> tuple[Float[np.ndarray, " bin"], Float[np.ndarray, " bin"]]:
    """Average over bins with equally many channels each.

    Args:
        share: what the bins are made of.
        net: what is averaged.

    Returns:
        Median share and mean net of each bin, by rising share.

    >>> binned_mean(np.array([0.2, 0.1]), np.array([4.0, 2.0]))
    (array([0.15]), array([3.]))
    """
    order = np.argsort(share, kind="stable")
    parts = np.array_split(order, int(np.clip(len(order) // BIN_SIZE, 1, BINS)))
    return np.array([np.median(share[part]) for part in parts]), np.array([net[part].mean() for part in parts])


def channel_energy(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw which input channels lose weights to sink-aware pruning, against their energy on sinks, a panel a role.

    Args:
        table: columns role, share (of the channel's energy that lies on sink rows, in [0, 1]) and net (weights of the channel
            removed by sink-aware only minus by the baseline only, in per cent of the channel). Shares of 0 have no place on the
            logarithmic axis and are left out.
    """
    shown = table[table["share"] > 0]
    roles = unique(shown, "role")
    columns = min(4, len(roles))
    lines = -(-len(roles) // columns)
    figure, axes = figures.subplots(lines, columns, height=2.3 * lines + 1.0, sharex=True, sharey=True, squeeze=False)
    logs, net = np.log10(shown["share"].to_numpy(dtype=np.float64)), shown["net"].to_numpy(dtype=np.float64)
    extent = (logs.min() - 0.05, logs.max() + 0.05, net.min() - 0.05, net.max() + 0.05)
    maps = []
    for ax, role in zip(axes.flat, roles, strict=False):
        rows = shown[shown["role"] == role]
        x, y = rows["share"].to_numpy(dtype=np.float64), rows["net"].to_numpy(dtype=np.float64)
        maps.append(ax.hexbin(x, y, gridsize=28, xscale="log", extent=extent, mincnt=1, cmap="cividis", linewidths=0.1))
        ax.axhline(0.0, color="black", linewidth=0.8)
        ax.plot(*binned_mean(x, y), color=SINK_COLOR, marker="o", markersize=3.5, markeredgecolor="white", markeredgewidth=0.6)
        ax.set_title(role)
    _trim(axes, len(roles))
    norm = figures.color_norm(np.concatenate([np.asarray(m.get_array()) for m in maps]), difference=False, log=True, limits=None)
    for image in maps:
        image.set_norm(norm)
    bar = figure.colorbar(maps[0], ax=list(axes.flat)[: len(roles)], aspect=30, pad=0.02, format="{x:g}")
    bar.set_label("channels in a cell")
    figure.supxlabel("share of the channel's energy on sink rows", fontsize="medium")
    figure.supylabel("net removal by sink-aware pruning\n(% of the channel's weights)", fontsize="medium", ha="center")
    return figure, shown


def extensions(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the gains of the extensions' variants over the baseline of equal sparsity, a panel an extension.

    Args:
        table: columns extension, variant, gain, low and high (decrease of the loss, nats per token).
    """
    names = unique(table, "extension")
    counts = [int((table["extension"] == name).sum()) for name in names]
    figure, axes = figures.subplots(
        len(names), 1, height=sum(ROW * count + 0.5 for count in counts) + 0.8, sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": [ROW * count + 0.1 for count in counts]},
    )  # fmt: skip
    for ax, name in zip(axes[:, 0], names, strict=True):
        rows = table[table["extension"] == name]
        _zero(ax)
        points(ax, rows, list(range(len(rows))), value="gain", style=PLAIN)
        name_rows(ax, [textwrap.fill(str(variant), 44) for variant in rows["variant"]])
        ax.set_title(name, loc="left", fontsize=10)
    figure.supxlabel("decrease of the loss against the baseline of equal sparsity (nats per token)", fontsize="medium")
    return figure, table


def gain_by_sparsity(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the gain of one method over another against sparsity, a line a pair.

    Args:
        table: columns pair ("method - baseline"), sparsity, gain, low and high (decrease of the loss, nats per token).
    """
    pairs = unique(table, "pair")
    styles = _pair_styles(pairs)
    figure, ax = figures.subplots(width=7.6, height=3.9)
    ax.axhline(0.0, color="black", linewidth=0.8)
    # Neighbours stand side by side, half a per cent apart: at one place their intervals would hide each other.
    shifts = 0.5 * (np.arange(len(pairs)) - (len(pairs) - 1) / 2)
    for shift, (pair, style) in zip(shifts, styles.items(), strict=True):
        rows = table[table["pair"] == pair].sort_values("sparsity")
        places = 100 * rows["sparsity"].to_numpy(dtype=np.float64) + shift
        ax.plot(places, rows["gain"], color=style.color, linestyle=style.line, linewidth=1.2)
        points(ax, rows, places.tolist(), value="gain", style=style, horizontal=False)
    ax.set_xticks(sorted(100 * table["sparsity"].unique()))
    ax.xaxis.set_major_formatter("{x:g}")
    loss_axis(ax, table[["gain", "low", "high"]].to_numpy(dtype=np.float64))
    ax.set(xlabel="weights removed (%)", ylabel=GAIN)
    handles = [
        Line2D(
            [], [], color=style.color, marker=style.marker, linestyle=style.line, linewidth=1.2, label=re.sub(" - ", " − ", pair)
        )
        for pair, style in styles.items()
    ]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure, table


def _pair_styles(pairs: list[str]) -> dict[str, LineStyle]:
    """Give each pair the look of its first method, or one of its own where another pair has that look already."""
    firsts = [re.split(r"\s[-–−]\s", pair)[0] for pair in pairs]
    styles: dict[str, LineStyle] = {}
    for pair, first in zip(pairs, firsts, strict=True):
        look = style_of(first, firsts)
        styles[pair] = style_of(pair, [*firsts, *pairs]) if look in styles.values() else look
    return styles

"""Figures of notebook 04: which of the released changes pays, the controls, the doses, and what is removed instead."""

import textwrap
from collections.abc import Mapping
from itertools import product
from types import MappingProxyType

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lib.models.language_model import ROLES
from lib.report import figures, panels
from lib.report.figures import METHODS, OTHER_MARKERS, Style
from lib.studies.pruning import figures as pf
from lib.studies.pruning.repairs import ALPS, CLEAN_RIVAL, CONTROL, RIVAL, SINK, WANDA

GAIN = "decrease of the loss (nats per token)"
SINK_COLOR = METHODS["sink-aware"].color
TIMES = " × "
SINK_EFFECT = "sink weights"
SIGNIFICANT = 0.05
CORNERS: Mapping[tuple[str, str, str, str], str] = MappingProxyType({
    ("clean", "off", "sequential", "RMS"): "Wanda as released",
    ("noised", "off", "sequential", "RMS"): "DWANDA-like",
    ("noised", "on", "one-shot", "sum"): "sink-aware as released",
})  # fmt: skip
CELL_STYLES: Mapping[str, Style] = MappingProxyType({"off": METHODS["wanda"], "on": METHODS["sink-aware"]})
CELL_SHIFTS: Mapping[str, float] = MappingProxyType({"off": -0.17, "on": 0.17})
GREYS = zip(("random positions", "largest norms", "mask tokens", "first positions"), OTHER_MARKERS, strict=False)
CONTROLS: Mapping[str, Style] = MappingProxyType({
    "sinks down": METHODS["sink-aware"], **{name: Style(METHODS["magnitude"].color, marker) for name, marker in GREYS},
    "sinks kept": METHODS["ar-sink-preserve"],
})  # fmt: skip
REPAIRED: Mapping[str, Style] = MappingProxyType({
    WANDA: METHODS["wanda"], RIVAL: Style("#000000", "v"), CLEAN_RIVAL: Style("#000000", "^"), SINK: METHODS["sink-aware"],
    CONTROL: Style(METHODS["magnitude"].color, "D"), ALPS: Style("#CC79A7", "P"),
})  # fmt: skip
ROLE_ORDER: list[str] = list(ROLES)
PLAIN = Style("#000000", "o")
BIN_SIZE = 20  # channels at least: fewer make a mean of noise
BINS = 12
ROW = 0.25  # inches


def _stacked(table: pd.DataFrame, column: str, *, columns: int) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Make a panel for each value of a column, all sharing x, each as high as its number of rows asks; one or two go below."""
    parts = {name: panels.select(table, **{column: name}) for name in panels.unique(table, column)}
    counts, columns = [len(rows) for rows in parts.values()], columns if len(parts) > 2 else 1
    ratios = [ROW * max(counts[at : at + columns]) + 0.1 for at in range(0, len(counts), columns)]
    height, grid = sum(ratios) + 0.45 * len(ratios) + 0.8, {"height_ratios": ratios}
    figure, axes = figures.subplots(len(ratios), columns, height=height, sharex=True, squeeze=False, gridspec_kw=grid)
    used = _used(axes, len(parts))
    for ax, name in zip(used, parts, strict=True):
        panels.difference_axis(ax)
        ax.set_title(name, loc="left", fontsize=10)
        if columns > 1:
            ax.tick_params(axis="x", labelsize=8)  # larger numbers touch in a narrow panel
    return figure, list(zip(used, parts.values(), strict=True))


def _used(axes: np.ndarray, count: int) -> list[Axes]:
    """Take unused axes out of a grid; the lowest of each column shows the numbers of the shared x axis."""
    flat = list(axes.flat)
    for ax in flat[count:]:
        ax.remove()
    for ax in flat[max(0, count - axes.shape[1]) : count]:
        ax.tick_params(axis="x", labelbottom=True)
    return flat[:count]


def _keys(figure: Figure, *, filled: str, opened: str) -> None:
    """Explain filled and open markers above the panels."""
    handles = [panels.legend_key(filled, PLAIN), panels.legend_key(opened, PLAIN)]
    handles[1].set_markerfacecolor("white")
    figure.legend(handles=handles, loc="outside upper right", ncols=2)


def attribution(effects: pd.DataFrame, total: Mapping[str, float]) -> tuple[Figure, pd.DataFrame]:
    """Draw how much of the released gain is due to each of its changes, and their interactions beside it.

    Args:
        effects: columns effect, order (1 = main effect), gain, low, high (decrease of the loss, nats per token) and p_holm.
        total: gain, low and high of the whole released change.
    """
    shown = pd.concat([pd.DataFrame([{"effect": "released change", "order": 0, **total}]), effects], ignore_index=True)
    figure, axes = figures.subplots(1, 2, height=4.6, sharex=True, gridspec_kw={"width_ratios": [1.2, 1]})
    for ax, rows, size in zip(axes, (shown[shown["order"] <= 1], shown[shown["order"] > 1]), (9.0, 7.0), strict=True):
        panels.difference_axis(ax)
        for place, (name, order, p_holm) in enumerate(zip(rows["effect"], rows["order"], rows["p_holm"], strict=True)):
            color = "#000000" if order == 0 else SINK_COLOR if SINK_EFFECT in name else METHODS["magnitude"].color
            style = Style(color, "D" if order == 0 else "*" if name == SINK_EFFECT else "o")
            panels.points(ax, rows.iloc[[place]], [place], value="gain", style=style, filled=order == 0 or p_holm < SIGNIFICANT)
        pairs = zip(rows["effect"], rows["gain"] if ax is axes[0] else [None] * len(rows), strict=True)
        panels.name_rows(ax, [_effect_label(name, gain) for name, gain in pairs], size=size)
    axes[0].axhline(0.5, color="#999999", linewidth=0.8)
    axes[0].set_title("whole change and main effects")
    axes[1].set_title("interactions")
    figure.supxlabel(GAIN, fontsize="medium")
    _keys(figure, filled=f"p < {SIGNIFICANT:g} (Holm), or whole change", opened=f"p ≥ {SIGNIFICANT:g}")
    return figure, shown


def _effect_label(effect: str, gain: float | None) -> str:
    """Name an effect in short lines, with its value where the eye should find it."""
    parts = effect.split(TIMES)
    name = f"\n{TIMES[1:]}".join(TIMES.join(parts[at : at + 2]) for at in range(0, len(parts), 2))
    return name if gain is None else f"{name}\n{gain:+.2g}".replace("\n-", "\n−")


def factorial_cells(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the losses of all 16 combinations, sink weights off and on joined, so that one sees whether weights ever matter.

    Args:
        table: columns inputs (clean, noised), weights (off, on), order (sequential, one-shot), norm (RMS, sum), and loss, low
            and high (nats per token).
    """
    figure, ax = figures.subplots(height=4.8)
    found = set(table[["inputs", "order", "norm"]].itertuples(index=False, name=None))
    combinations = [key for key in product(("clean", "noised"), ("sequential", "one-shot"), ("RMS", "sum")) if key in found]
    for place, (inputs, order, norm) in enumerate(combinations):
        rows = panels.select(table, inputs=inputs, order=order, norm=norm)
        heights = [place + CELL_SHIFTS[weights] for weights in rows["weights"]]
        ax.plot(rows["loss"], heights, color="#999999", linewidth=1, zorder=1)
        for weights, style in CELL_STYLES.items():
            cell, height = panels.select(rows, weights=weights), place + CELL_SHIFTS[weights]
            panels.points(ax, cell, [height] * len(cell), value="loss", style=style)
            if len(cell) and (name := CORNERS.get((inputs, weights, order, norm))):
                _name_corner(ax, name, (float(np.nanmax(panels.numbers(cell, "loss", "high"))), height), color=style.color)
    panels.name_rows(ax, [", ".join(key) for key in combinations])
    ax.set(xlabel="loss after pruning (nats per token)", ylabel="inputs, order, norms")
    handles = [panels.legend_key(f"sink weights {name}", style) for name, style in CELL_STYLES.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure, table


def _name_corner(ax: Axes, name: str, end: tuple[float, float], *, color: str) -> None:
    """Name a released cell outside the right border, with a thin line to its interval."""
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "linestyle": ":", "shrinkA": 0, "shrinkB": 2}
    look = {"va": "center", "fontsize": 8.5, "color": color, "annotation_clip": False, "arrowprops": line}
    ax.annotate(name, end, (1.02, end[1]), textcoords=ax.get_yaxis_transform(), **look)


def controls(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the gain of every way to weigh calibration tokens over no weights, a panel a model.

    Args:
        table: columns model, weighting, gain, low and high (decrease of the loss against no weights, nats per token).
    """
    models, found = panels.unique(table, "model"), panels.unique(table, "weighting")
    order = [*(name for name in CONTROLS if name in found), *(name for name in found if name not in CONTROLS)]
    size = {"width": min(figures.WIDTH, 3.6 * len(models) + 1.8), "height": 0.34 * len(order) + 1.4}
    figure, axes = panels.side_by_side(len(models), x_label=GAIN, y_label="tokens weighed", **size, sharex=True)
    for ax, model in zip(axes, models, strict=True):
        panels.difference_axis(ax)
        for place, name in enumerate(order):
            rows = panels.select(table, model=model, weighting=name)
            panels.points(ax, rows, [place] * len(rows), value="gain", style=CONTROLS.get(name) or pf.style_of(name, order))
        panels.name_rows(ax, order, size=9)
        ax.set(title=model)
    return figure, table


def repairs(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw what every mask loses behind every repair, a panel a model.

    Args:
        table: columns model, mask, repair, increase, low and high (of the loss over the dense model, nats per token).
    """
    models, names, masks = (panels.unique(table, column) for column in ("model", "repair", "mask"))
    size = {"width": min(figures.WIDTH, 3.6 * len(models) + 1.8), "height": 0.7 * len(names) + 1.6}
    label = "increase of the loss (nats per token)"
    figure, axes = panels.side_by_side(len(models), x_label=label, y_label="repair", **size, sharex=True)
    for ax, model in zip(axes, models, strict=True):
        for place, mask in enumerate(masks):
            rows = panels.select(table, model=model, mask=mask)
            shift = 0.16 * (place - (len(masks) - 1) / 2)
            places = [names.index(repair) + shift for repair in rows["repair"]]
            panels.points(ax, rows, places, value="increase", style=REPAIRED[mask])
        panels.name_rows(ax, names, size=9)
        ax.set(title=model)
    figure.legend(handles=[panels.legend_key(mask, REPAIRED[mask]) for mask in masks], loc="outside upper right", ncols=2)
    return figure, table


def dose(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the gain over each setting of the weights, a panel a setting; the released value is an open marker.

    Args:
        table: columns factor, setting (text), gain, low, high (decrease of the loss, nats per token), share (tokens taken out, in
            per cent) and released (True for the authors' value).
    """
    figure, parts = _stacked(table, "factor", columns=2)
    for ax, rows in parts:
        for place, released in enumerate(rows["released"]):
            panels.points(ax, rows.iloc[[place]], [place], value="gain", style=Style(SINK_COLOR, "o"), filled=not released)
        taken = [f" ({pf.percent(share / 100)} out)" if np.isfinite(share) else "" for share in rows["share"]]
        ax.set_title(rows["factor"].iloc[0], loc="left", fontsize=10)
        panels.name_rows(ax, [f"{name}{share}" for name, share in zip(rows["setting"], taken, strict=True)])
    figure.supxlabel(GAIN, fontsize="medium")
    _keys(figure, filled="other setting", opened="as released")
    return figure, table


def mask_overlap(table: pd.DataFrame, *, limits: tuple[float, float] | None = None) -> tuple[Figure, pd.DataFrame]:
    """Draw the overlap of the weights that two methods remove, by layer and role.

    Args:
        table: columns layer (index from 0), role and jaccard.
        limits: ends of the colour scale; from the data when None.
    """
    roles = sorted(panels.unique(table, "role"), key=ROLE_ORDER.index)
    wide = table.pivot_table(index="layer", columns="role", values="jaccard", dropna=False)[roles]
    figure, ax = figures.subplots(width=6.0, height=min(8.0, max(3.8, 0.3 * len(wide) + 1.8)))
    image = figures.heatmap(ax, wide, label="Jaccard overlap of removed weights", y_label="layer", limits=limits)
    ax.set(xlabel="role of the matrix", xticks=range(len(roles)), xticklabels=roles)
    middle = np.mean(image.get_clim())
    if len(wide) <= 16:
        ax.set_yticks(range(len(wide)), [str(layer) for layer in wide.index])
        for (row, column), value in np.ndenumerate(np.asarray(wide, dtype=np.float64)):
            if np.isfinite(value):
                color = "white" if value < middle else "black"  # on dark and on light cells
                ax.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=7, color=color)
    return figure, table


def binned_mean(
    share: Float[np.ndarray, " channel"], net: Float[np.ndarray, " channel"]
) -> tuple[Float[np.ndarray, " bin"], Float[np.ndarray, " bin"]]:
    """Return median share and mean net of bins with equally many channels each, by rising share.

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
    shown = table.take(np.flatnonzero(table["share"] > 0).tolist())
    roles = sorted(panels.unique(shown, "role"), key=ROLE_ORDER.index)
    columns, lines = min(4, len(roles)), -(-len(roles) // 4)
    size = {"width": min(figures.WIDTH, 2.0 * columns + 3.0), "height": 2.3 * lines + 1.2}
    figure, axes = figures.subplots(lines, columns, **size, sharex=True, sharey=True, squeeze=False)
    used = _used(axes, len(roles))
    logs, nets = np.log10(panels.numbers(shown, "share")), panels.numbers(shown, "net")
    # One grid for all panels, never of zero width, or its cells could not be compared.
    extent = (logs.min() - 0.05, logs.max() + 0.05, nets.min() - 0.05, nets.max() + 0.05)
    maps = []
    for ax, role in zip(used, roles, strict=True):
        share, net = panels.numbers(panels.select(shown, role=role), "share", "net").T
        maps.append(ax.hexbin(share, net, gridsize=28, xscale="log", extent=extent, mincnt=1, cmap="cividis", linewidths=0.1))
        ax.axhline(0.0, color="black", linewidth=0.8)
        ax.plot(*binned_mean(share, net), color=SINK_COLOR, marker="o", markersize=4, markeredgecolor="white")
        ax.set_title(role)
    norm = figures.color_norm(np.concatenate([np.asarray(m.get_array()) for m in maps]), difference=False, log=True, limits=None)
    for image in maps:
        image.set_norm(norm)
    scale = {"format": "{x:g}", "ticks": LogLocator(subs=(1, 2, 5)), "label": "channels in a cell"}
    figure.colorbar(maps[0], ax=used, aspect=30, pad=0.02, **scale).minorticks_off()
    figure.supxlabel("share of the channel's energy on sink rows", fontsize="medium")
    for ax in axes[:, 0]:
        ax.set_ylabel("net removal by sink-aware\npruning (% of the channel)", fontsize=8.5)
    mean = panels.legend_key("mean of equally many channels", Style(SINK_COLOR, "o"), line="-")
    figure.legend(handles=[mean], loc="outside upper right")
    return figure, shown


def extensions(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the gains of the extensions' variants over the baseline of equal sparsity, a panel an extension.

    Args:
        table: columns extension, variant, gain, low and high (decrease of the loss, nats per token).
    """
    figure, parts = _stacked(table, "extension", columns=1)
    for ax, rows in parts:
        panels.points(ax, rows, list(range(len(rows))), value="gain", style=PLAIN)
        panels.name_rows(ax, [textwrap.fill(str(variant), 44) for variant in rows["variant"]])
    figure.supxlabel("decrease of the loss against the baseline of equal sparsity (nats per token)", fontsize="medium")
    return figure, table


def gain_by_sparsity(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the gain of one method over another against sparsity, a line a pair.

    Args:
        table: columns pair ("method - baseline"), sparsity, gain, low and high (decrease of the loss, nats per token).
    """
    pairs = panels.unique(table, "pair")
    firsts = [pair.split(" - ")[0] for pair in pairs]
    # Each pair has the look of its first method, unless an earlier pair has that already.
    looks = [pair if first in firsts[:at] else first for at, (pair, first) in enumerate(zip(pairs, firsts, strict=True))]
    styles = {pair: pf.style_of(look, looks) for pair, look in zip(pairs, looks, strict=True)}
    figure, ax = figures.subplots(width=7.6, height=3.9)
    ax.axhline(0.0, color="black", linewidth=0.8)
    # Neighbours stand side by side, half a per cent apart: at one place their intervals would hide each other.
    shifts = 0.5 * (np.arange(len(pairs)) - (len(pairs) - 1) / 2)
    for shift, (pair, style) in zip(shifts, styles.items(), strict=True):
        rows = panels.select(table, pair=pair).sort_values("sparsity")
        places = 100 * panels.numbers(rows, "sparsity")[:, 0] + shift
        ax.plot(places, rows["gain"], color=style.color, linestyle=style.line, linewidth=1.2)
        panels.points(ax, rows, places.tolist(), value="gain", style=style, horizontal=False)
    ax.set_xticks(np.unique(100 * panels.numbers(table, "sparsity")))
    ax.xaxis.set_major_formatter("{x:g}")
    panels.loss_axis(ax, panels.numbers(table, "gain", "low", "high"))
    ax.set(xlabel="weights removed (%)", ylabel=GAIN)
    handles = [panels.legend_key(pair.replace(" - ", " − "), style, line=style.line) for pair, style in styles.items()]
    panels.legend_beside(ax, handles)
    return figure, table

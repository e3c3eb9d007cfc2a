"""Figures of notebook 02: each returns the figure and the table of what is drawn."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.diffusion.traces import SinkTrace
from lib.report import figures, panels
from lib.report.figures import Style
from lib.studies.variance import statistics as ts
from lib.studies.variance.sink_effect import NOTHING

KINDS: Mapping[str, tuple[str, str]] = MappingProxyType({
    "overlap": ("-", "sink sets"), "steps shuffled": ("--", "steps shuffled"), "positions shuffled": (":", "positions shuffled"),
})  # fmt: skip
PAIRS: Mapping[str, Style] = MappingProxyType({
    "generation, noised": Style("#D55E00", "o"), "noised, noised": Style("#777777", "v"),
    "generation, noised with prompt kept": Style("#0072B2", "s"), "noised, noised with prompt kept": Style("#BBBBBB", "^"),
})  # fmt: skip
BLOCKED: Mapping[str, Style] = MappingProxyType({
    "sinks": Style("#D55E00", "o"), "large non-sinks": Style("#0072B2", "s"), "random keys": Style("#777777", "x"),
})  # fmt: skip
READINGS: Mapping[str, Style] = MappingProxyType({
    "literal": Style("#CC79A7", "D"), "only former sinks": Style("#009E73", "^"),
})  # fmt: skip
SHOWN_PATHS = 6
HARMLESS = 0.05  # nats per token, the border of the claims: 5 % more perplexity


def variance_by_layer(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw spatial and temporal variance over the depth, a line a model with its interval.

    Args:
        table: from `tables.layers_table`.
    """
    figure, axes = figures.subplots(1, 2, height=3.8)
    styles = figures.model_styles(table["model"].unique())
    labels = {
        "spatial variance": "variance over positions (mass squared)",
        "temporal variance": "variance of the centroid (length squared)",
    }
    for ax, (quantity, label) in zip(axes, labels.items(), strict=True):
        for name, rows in table[table["quantity"] == quantity].groupby("model", sort=False):
            figures.band(ax, rows["depth"], rows["mean"], rows["low"], rows["high"], style=styles[str(name)], label=str(name))
        ax.set(xlabel="depth (0 = first layer, 1 = last)", ylabel=label, title=quantity)
        ax.set_yscale("log" if quantity == "spatial variance" else "symlog", **_linear_below(quantity))
    panels.legend_beside(axes[-1])
    return figure, table


def _linear_below(quantity: str) -> dict[str, float]:
    """Give the temporal axis, whose values may be 0, a linear part below a centroid that moves by 1 % of the length."""
    return {"linthresh": 1e-4} if quantity == "temporal variance" else {}


def centroid_paths(traces: Sequence[SinkTrace], *, prompts: int) -> tuple[Figure, pd.DataFrame]:
    """Draw the path of the sink centroid for some prompts, a panel a model, with the median over all.

    Args:
        traces: one per model.
        prompts: number of prompts; only the first seed of each is drawn.
    """
    figure, axes = panels.side_by_side(
        len(traces), height=3.8, x_label="share of the steps passed (%)", y_label="sink centroid (share of the length)"
    )
    styles = figures.model_styles(trace.name for trace in traces)
    tables = []
    for ax, trace in zip(axes, traces, strict=True):
        paths = (ts.centroids(trace)[:prompts] / trace.mass.shape[-1]).numpy()
        passed = np.linspace(0, 100, paths.shape[1])
        for path in paths[:SHOWN_PATHS]:
            ax.plot(passed, path, color=styles[trace.name].color, linewidth=0.8, alpha=0.55)
        ax.plot(passed, pd.DataFrame(paths).median().to_numpy(), color="black", linewidth=2)
        ax.set(title=trace.name, ylim=(-0.03, 1))
        wide = pd.DataFrame(paths.T, columns=[f"prompt {index + 1}" for index in range(len(paths))])
        tables.append(pd.concat([pd.DataFrame({"model": trace.name, "step": range(len(wide))}), wide], axis=1))
    return figure, pd.concat(tables, ignore_index=True)


def overlap_by_distance(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw overlap of sink sets against step distance with both nulls, a panel a level.

    Args:
        table: from `agreement_tables.overlap_table`.
    """
    levels = list(ts.LEVELS)
    figure, axes = figures.subplots(1, len(levels), height=4.0, sharey=True)
    styles = figures.model_styles(table["model"].unique())
    for ax, level in zip(axes, levels, strict=True):
        for group, rows in table[table["level"] == level].groupby(["model", "kind"], sort=False):
            name, kind = cast(tuple[str, str], group)
            if kind in KINDS:
                style, (line, _) = styles[name], KINDS[kind]
                marker = style.marker if kind == "overlap" else ""
                ax.plot(rows["step distance"], rows["mean"], color=style.color, linestyle=line, marker=marker, markersize=4)
                if kind == "overlap":
                    ax.fill_between(rows["step distance"], rows["low"], rows["high"], color=style.color, alpha=0.18, linewidth=0)
        ax.set(xlabel="step distance", title=level, ylim=(0, 1.02), xscale="log")
        distances = sorted(int(distance) for distance in table["step distance"].unique())
        # neighbours closer than a factor of 1.4 would run into each other
        labels = [str(d) if not i or d >= 1.4 * distances[i - 1] else "" for i, d in enumerate(distances)]
        ax.set_xticks(distances, labels)
        ax.minorticks_off()
    axes[0].set_ylabel("Jaccard overlap of sink sets")
    _legend_of_lines(axes[-1], styles)
    return figure, table


def _legend_of_lines(ax: Axes, styles: Mapping[str, Style]) -> None:
    """Explain colours (models) and line styles (kinds) once, beside the last panel."""
    for name, style in styles.items():
        ax.plot([], [], color=style.color, marker=style.marker, markersize=4, label=name)
    for line, label in KINDS.values():
        ax.plot([], [], color="black", linestyle=line, label=label)
    panels.legend_beside(ax)


def value_norms(points: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw value norm against sink mass, a panel a model.

    Args:
        points: from `tables.value_norm_points`, models joined.
    """
    names = panels.unique(points, "model")
    figure, axes = panels.side_by_side(
        len(names), height=3.8, x_label="sink mass in the head (mean 1)", y_label="value norm / mean of the head"
    )
    for ax, name in zip(axes, names, strict=True):
        rows = panels.select(points, model=name)
        for is_sink, color, label in ((False, "#999999", "other keys"), (True, "#D55E00", "sinks (Rulli)")):
            part = rows[rows["is a sink"] == is_sink]
            ax.scatter(part["sink mass"], part["relative value norm"], s=5, alpha=0.35, color=color, linewidth=0, label=label)
        ax.axhline(1.0, color="black", linewidth=0.8)
        ax.set(xscale="log", title=name)
        ax.set_xlim(left=1e-2)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside upper center", ncols=2, markerscale=3)
    return figure, points


def noise_agreement(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the rank correlation of masses between generation and random masks along denoising, a panel a model.

    Args:
        table: from `agreement_tables.noise_table`, models joined.
    """
    masses = table.dropna(subset="mask ratio")
    names = list(masses["model"].unique())
    figure, axes = figures.subplots(1, len(names), height=3.8, width=min(9.0, 6.0 * len(names)), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        for pair, rows in masses[masses["model"] == name].groupby("pair", sort=False):
            style = PAIRS[str(pair)]
            figures.band(
                ax, rows["mask ratio"], rows["mass"], rows["mass, low"], rows["mass, high"], style=style, label=str(pair)
            )
        figures.mask_ratio_axis(ax)
        ax.set(title=name, ylim=(min(0.0, float(masses["mass, low"].to_numpy().min())), 1.0))
    axes[0, 0].set_ylabel("rank correlation of sink masses")
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure, masses


def dose_response(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the increase of the loss against the number of blocked keys, a panel a model.

    Args:
        table: from `tables.effects_table`. The dashed line is the border of "harmless" in the claims.
    """
    figure, axes = _increases(
        table, BLOCKED, start=[NOTHING], amount="keys asked", height=3.8, x_label="keys blocked in every head"
    )
    look: dict[str, Any] = {"color": "black", "linewidth": 0.8, "linestyle": (0, (5, 4))}
    for ax in axes:
        ax.axhline(HARMLESS, **look)
    _loss_axis(axes[0], table)
    axes[-1].plot([], [], label="border of harmless", **look)
    panels.legend_beside(axes[-1])
    return figure, table


def unstable_blocking(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the increase of the loss against the threshold of the digest's rule, a panel a model.

    Args:
        table: from `tables.effects_table` with `amount_name="threshold"`.
    """
    figure, axes = _increases(table, READINGS, amount="threshold", height=3.6, x_label="blocked above this frequency variance")
    for ax in axes:
        ax.tick_params(axis="x", labelsize=8, rotation=60)
    _loss_axis(axes[0], table)
    panels.legend_beside(axes[-1])
    return figure, table


def _increases(
    table: pd.DataFrame, looks: Mapping[str, Style], *, start: Sequence[str] = (), amount: str, height: float, x_label: str
) -> tuple[Figure, list[Axes]]:
    """Draw the increase of the loss against an amount, a line for each of what is blocked; lines begin at the `start` rows."""
    names, label = panels.unique(table, "model"), "increase of the loss (nats per token)"
    figure, axes = panels.side_by_side(len(names), height=height, x_label=x_label, y_label=label)
    for ax, name in zip(axes, names, strict=True):
        for blocked, style in looks.items():
            rows = panels.select(table, model=name)
            rows = rows.take(np.flatnonzero(rows["blocked"].isin([blocked, *start])).tolist())
            ax.plot(rows[amount], rows["increase"], color=style.color, linewidth=1.2)
            panels.points(ax, rows, rows[amount].tolist(), value="increase", style=style, horizontal=False, label=blocked)
        ax.axhline(0.0, color="black", linewidth=0.8)
        ax.set(title=name, xticks=sorted(table.loc[table["blocked"].isin(list(looks)), amount].unique()))
    return figure, axes


def _loss_axis(ax: Axes, table: pd.DataFrame) -> None:
    """Make the shared axis of loss increases logarithmic, with a linear part around 0; call it when all panels are drawn."""
    ax.set_yscale("symlog", linthresh=HARMLESS)
    ticks = [0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0]
    top = 1.3 * ax.get_ylim()[1]  # markers at the top stay whole
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(1.3 * float(table[["increase", "low"]].fillna(0.0).to_numpy().min()) - 0.005, top)

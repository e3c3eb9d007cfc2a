"""Figures of notebook 06: the roofline, speed-ups of layers and models, decoders against text quality, and their composition."""

from collections.abc import Mapping
from itertools import cycle
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.report import figures, panels
from lib.report.figures import Style
from lib.timing.roofline import Peaks

FORMAT_STYLES: Mapping[str, Style] = MappingProxyType({
    "dense": Style("#000000", "o"), "masked 50 %": Style("#777777", "x"), "CSR 50 %": Style("#8C6D31", "v"),
    "2:4": Style("#009E73", "^"), "structured 30 %": Style("#E69F00", "D"), "structured 50 %": Style("#D55E00", "D"),
    "int8 dynamic": Style("#0072B2", "s"), "int8 weights": Style("#56B4E9", "s"), "int4 weights": Style("#CC79A7", "P"),
})  # fmt: skip
SERIES = tuple(Style(color, marker) for color, marker in zip(
    ("#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#777777", "#56B4E9", "#8C6D31", "#332288", "#88CCEE",
     "#882255"), "osDvPX<^>ph*", strict=True
))  # fmt: skip
SPEED_UP = "speed-up over dense (times)"
DIGEST = (1.4, 1.8)  # what the digest states for 30 % and 50 %
SURE = 0.05  # of a Holm-adjusted p
CONTROLLED: Mapping[str, str] = MappingProxyType({
    "KL": "more KL to exact passes (nats)", "other tokens": "more tokens unlike the plain sampler's (share)",
})  # fmt: skip


def roofline(table: pd.DataFrame, peaks: Peaks, integers: Peaks | None) -> tuple[Figure, pd.DataFrame]:
    """Draw operations a second against operations a byte, under the roof of the device.

    Args:
        table: of `latency.measure_layers`.
        peaks: of floating-point products and of copies.
        integers: of products of 8-bit integers, whose roof is dashed.
    """
    rows = ran(table)
    rows = rows.assign(intensity=rows["operations"] / rows["bytes"], rate=rows["operations"] / rows["seconds"] / 1e9)
    figure, ax = figures.subplots(height=4.6)
    intensity = panels.numbers(rows, "intensity")
    ends = float(intensity.min()) / 2, max(float(intensity.max()), 4 * peaks.ridge)
    for roof, line, label in ((peaks, "-", "roof, floating point"), (integers, "--", "roof, 8-bit integers")):
        if roof is not None:
            x = np.geomspace(*ends, 200)
            y = np.minimum(roof.operations, roof.bandwidth * x) / 1e9
            ax.plot(x, y, color="#999999", linestyle=line, linewidth=1.2, label=label)
    for name, style in FORMAT_STYLES.items():
        some = panels.select(rows, format=name)
        if len(some):
            ax.plot(some["intensity"], some["rate"], style.marker, color=style.color, label=name, markersize=5, linestyle="none")
    ax.set(xscale="log", yscale="log", xlabel="operations a byte moved", ylabel="billions of operations a second")
    panels.legend_beside(ax)
    return figure, rows


def ran(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that were measured."""
    return table.take(np.flatnonzero(table["not_run"] == "").tolist())


def layers(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the speed-up of each format by tokens at once, a panel a layer.

    Args:
        table: of `latency.measure_layers`.
    """
    rows = ran(table)
    names = panels.unique(rows, "layer")
    figure, axes = panels.side_by_side(len(names), height=3.8, x_label="tokens at once", y_label=SPEED_UP)
    counts = sorted(set(rows["rows"]))
    for ax, name in zip(axes, names, strict=True):
        for form, style in FORMAT_STYLES.items():
            some = panels.select(rows, layer=name, format=form)
            if form == "dense" or not len(some):
                continue
            places = [counts.index(count) for count in some["rows"]]
            ax.plot(places, some["speed_up"], color=style.color, linewidth=1.0)
            low, high = some["speed_up_q1"], some["speed_up_q3"]
            figures.errorbar_points(ax, places, some["speed_up"], low, high, style=style, label=form)
        ax.axhline(1.0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(counts)), [str(count) for count in counts])
        shape = panels.select(rows, layer=name).iloc[0]
        ax.set_title(f"{name}, {shape['in_features']:g} to {shape['out_features']:g}", fontsize="medium")
        ax.set_yscale("log")
        plain_ticks(ax, axis="y")
    panels.legend_beside(axes[-1])
    return figure, rows


def plain_ticks(ax: Axes, *, axis: str) -> None:
    """Put plain numbers on a logarithmic axis of speed-ups."""
    low, high = ax.get_ylim() if axis == "y" else ax.get_xlim()
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
    setter: Any = ax.set_yticks if axis == "y" else ax.set_xticks
    setter(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def models(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the speed-up of whole models, with the values of the digest as dotted lines.

    Args:
        table: of `latency.measure_models`.
    """
    rows = ran(table)
    figure, ax = figures.subplots(height=0.34 * len(rows) + 1.4)
    for place, (_, row) in enumerate(rows.iterrows()):
        style = FORMAT_STYLES.get(str(row["model"]), SERIES[0])
        low, high = [row["speed_up_q1"]], [row["speed_up_q3"]]
        figures.errorbar_points(ax, [place], [row["speed_up"]], low, high, style=style, horizontal=True)
    ax.axvline(1.0, color="black", linewidth=0.8)
    for value in DIGEST:
        ax.axvline(value, color="#999999", linewidth=1.0, linestyle=":")
    panels.name_rows(ax, [str(name) for name in rows["model"]])
    ax.set_xlabel("speed-up of a forward pass over dense (times); dotted: the digest's 1.4 and 1.8")
    return figure, rows


def decoders(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw what each decoder gains in speed and loses in text quality against the plain sampler.

    Args:
        table: of `tables.table`, with a judge.
    """
    figure, ax = figures.subplots(height=4.6)
    for (_, row), style in zip(table.iterrows(), cycle(SERIES), strict=False):
        x, y = [row["speed_up"]], [row["nats difference"]]
        ax.plot([row["speed_up_q1"], row["speed_up_q3"]], y * 2, color=style.color, linewidth=1.2)
        low, high = [row["nats difference low"]], [row["nats difference high"]]
        figures.errorbar_points(ax, x, y, low, high, style=style, label=str(row["decoder"]))
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set(xscale="log", xlabel="speed-up over the plain sampler (times)")
    plain_ticks(ax, axis="x")
    ax.set_ylabel("nats per token under the judge,\nminus the plain sampler's")
    panels.legend_beside(ax)
    return figure, table


def composition(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw measured against predicted speed-ups of formats with decoders; on the diagonal speed-ups multiply.

    Args:
        table: of `tables.composition`.
    """
    figure, ax = figures.subplots(width=7.5, height=4.6)
    kinds, names = panels.unique(table, "format"), panels.unique(table, "decoder")
    for _, row in table.iterrows():
        color = FORMAT_STYLES.get(str(row["format"]), SERIES[kinds.index(str(row["format"])) % len(SERIES)]).color
        style = Style(color, "osDvPX<^>"[names.index(str(row["decoder"]))])
        low, high = [row["speed-up low"]], [row["speed-up high"]]
        figures.errorbar_points(ax, [row["predicted"]], [row["speed-up"]], low, high, style=style)
    values = panels.numbers(table, "predicted", "speed-up")
    ends = [0.9 * float(values.min()), 1.1 * float(values.max())]
    ax.plot(ends, ends, color="#999999", linewidth=1.0, zorder=1)
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in ("x", "y"):
        plain_ticks(ax, axis=axis)
    ax.set(xlabel="speed-up(format) x speed-up(decoder)", ylabel="measured speed-up (times)")
    looks = [panels.legend_key(kind, Style(FORMAT_STYLES.get(kind, SERIES[at % 9]).color, "o")) for at, kind in enumerate(kinds)]
    looks += [panels.legend_key(name, Style("#555555", "osDvPX<^>"[at])) for at, name in enumerate(names)]
    panels.legend_beside(ax, looks)
    return figure, table


def parallelism(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw accuracy against tokens a forward pass, one line a commit rule, with the area under each.

    Args:
        table: of `answering.curve`, of one task and block.
    """
    figure, ax = figures.subplots(height=4.6)
    first = table.iloc[0]
    ax.set_title(f"{first['task']}, blocks of {first['block']}")
    for name, style in zip(panels.unique(table, "rule"), cycle(SERIES), strict=False):
        own = panels.select(table, rule=name).sort_values("parallelism")
        x, y = panels.numbers(own, "parallelism")[:, 0].tolist(), panels.numbers(own, "accuracy")[:, 0].tolist()
        low, high = (panels.numbers(own, f"accuracy {end}")[:, 0].tolist() for end in ("low", "high"))
        label = f"{name} ({float(own['area'].iloc[0]):.0f})"
        figures.errorbar_points(ax, x, y, low, high, style=style, label=label)
        ax.plot([first["parallelism"], *x], [first["accuracy"], *y], color=style.color, linewidth=1.0, alpha=0.6)
    ax.set(xlabel="tokens a forward pass", ylabel="share of right answers")
    panels.legend_beside(ax)
    return figure, table


def sink_control(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw what each setting of the sink control changes: a column a model and block, a row of panels a measure.

    Args:
        table: of `systems.control`, without what tests nothing; columns model, block, system, control, measure, difference, low,
            high and `p Holm`. What is sure after Holm's adjustment has a filled marker.
    """
    cases = list(dict.fromkeys(zip(table["model"], table["block"], strict=True)))
    measures = panels.unique(table, "measure")
    names = {key: panels.unique(panels.select(table, measure=key).assign(row=_settings), "row") for key in measures}
    heights = [0.8 + 0.3 * len(names[key]) for key in measures]
    options = {"sharex": "row", "squeeze": False, "gridspec_kw": {"height_ratios": heights}}
    figure, axes = figures.subplots(len(measures), len(cases), height=0.6 + sum(heights), **options)
    for line, key in zip(axes, measures, strict=True):
        for ax, (model, block) in zip(line, cases, strict=True):
            own = panels.select(table, measure=key, model=model, block=block).assign(row=_settings)
            for sure in (True, False):
                some = own.take(np.flatnonzero(np.asarray(own["p Holm"] < SURE) == sure).tolist())
                places = [float(names[key].index(name)) for name in some["row"]]
                panels.points(ax, some, places, value="difference", style=panels.DIFFERENCE, filled=sure)
            panels.difference_axis(ax, numbers=4)
            panels.name_rows(ax, names[key] if ax is line[0] else [""] * len(names[key]))
            ax.set(title=f"{model}, blocks of {block}" if key == measures[0] else "", xlabel=CONTROLLED[key])
    return figure, table


def _settings(table: pd.DataFrame) -> list[str]:
    return [f"{system}, {control}" for system, control in zip(table["system"], table["control"], strict=True)]

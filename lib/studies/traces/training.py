"""When did sinks appear, and does weighing them pay as they grow? What the recipe of the embedded family measured along training
(notebooks 01 and 04).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from lib.checkpoints import lookup
from lib.models.language_model import LanguageModel
from lib.report import figures, panels

LOG = "training_log.json"
DOSE = "sink_weights.json"
NO_VALUE = float("nan")
TOKENS, LOSS = "million tokens", "held-out loss, nats per token"
# What the log calls it, what it is, and by what it is multiplied.
QUANTITIES = {
    "first_token": ("attention to the first token, %", 100.0),
    "top_share": ("attention to the top key, %", 100.0),
    "top_share_by_head": ("attention to the top key of a head, %", 100.0),
    "value_norm_ratio": ("value norm of the top key / others", 1.0),
}
CROWDED = 8.0  # times from the least to the largest value: beyond that, labels at every digit would touch each other
LINES = {"clean": "--", "noised": "-"}
WEIGHED = {"sinks": "sinks weighed down", "random": "random positions weighed down"}
STRENGTH, SHARE = "attention to the top key, times that without preference", "share of Wanda's damage recovered, %"
ENDS = {SHARE: "share", "low, %": "low", "high, %": "high"}
LOOKS = {"sinks": ("sink-aware", "-"), "random": ("random", "--")}  # style of figures.METHODS, line


def training_table(models: Sequence[LanguageModel]) -> pd.DataFrame:
    """Tabulate how far sinks had formed at each measurement along training.

    Args:
        models: those whose folder holds the log of `recipes.family.train`; others are left out.

    Returns:
        One row a model, text (clean, or noised at time 1/2 for a diffusion model) and measurement: training tokens, the loss of
        held-out articles, attention shares in per cent of all attention and the ratio of value norms, each a mean over layers,
        heads and held-out windows.
    """
    rows = []
    for model in models:
        for line in read_log(model):
            place = {TOKENS: line["tokens"] / 1e6, LOSS: line["held_out"].get("encyclopaedia", NO_VALUE)}
            for text in (text for text in LINES if f"{text}_top_share" in line["sinks"]):
                found = {words: scale * line["sinks"][f"{text}_{key}"] for key, (words, scale) in QUANTITIES.items()}
                rows.append({"model": model.name, "text": text, **place, **found})
    return pd.DataFrame(rows, columns=["model", "text", TOKENS, LOSS, *(words for words, _ in QUANTITIES.values())])


def read_log(model: LanguageModel) -> list[dict[str, Any]]:
    """Return the measurements along training that lie in a model's folder; none where there are none."""
    return _read(model, LOG)


def _read(model: LanguageModel, name: str) -> list[dict[str, Any]]:
    path = lookup.local_path(model.source) / name if lookup.is_local(model.source) else Path(name)
    return json.loads(path.read_text(encoding="utf-8")) if lookup.is_local(model.source) and path.is_file() else []


def sinks_along_training(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw loss, attention to the first and to the top key, and the value norm there, against training tokens.

    Args:
        table: of `training_table`.
    """
    drawn = [LOSS, *(QUANTITIES[key][0] for key in ("first_token", "top_share_by_head", "value_norm_ratio"))]
    figure, axes = figures.subplots(2, 2, height=6.4, sharex=True)
    for ax, column in zip(axes.flat, drawn, strict=True):
        _draw(ax, table, column)
    for ax in axes[1]:
        ax.set_xlabel("training tokens (millions)")
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, handlelength=3.5)
    return figure, table.loc[:, ["model", "text", TOKENS, *drawn]]


def _draw(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """Draw one quantity, a line for each model and text; shares on a logarithmic axis."""
    styles = figures.model_styles(table["model"].unique())
    for key, rows in table.groupby(["model", "text"], sort=False):
        name, text = cast(tuple[str, str], key)
        if column == LOSS and text == "noised":
            continue  # a loss has its own noise: one line
        style = styles[name]
        line = "-" if column == LOSS else LINES[text]
        look = {"color": style.color, "marker": style.marker, "markersize": 3.5}
        ax.plot(rows[TOKENS], rows[column], line, label=f"{name}, {text} text", **look)
    ax.set_ylabel(column)
    if column.endswith("%"):
        ax.set_yscale("log")
        shares = table[column].to_numpy(dtype=float)
        if shares.max() > CROWDED * shares.min():
            ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        for axis_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.grid(alpha=0.3)


def dose_table(models: Sequence[LanguageModel]) -> pd.DataFrame:
    """Tabulate what token weights did to pruning at several points of training, as sinks grew.

    Args:
        models: those whose folder holds what `recipes.family.dose` found; others are left out.

    Returns:
        One row a model, point of training and weighting: training tokens, strength of the sinks, Wanda's damage at 50 % in nats
        per token, and the share of it that the weights recover, with 95 % interval and p-value. Empty where nothing is damaged.
    """
    rows = []
    for model in models:
        for line in _read(model, DOSE):
            place = {"model": model.name, TOKENS: line["tokens"] / 1e6, STRENGTH: line["top_share"] / line["uniform_share"]}
            for key, words in WEIGHED.items():
                found = line[key]
                percents = {name: NO_VALUE if found[end] is None else 100 * found[end] for name, end in ENDS.items()}
                rows.append({**place, "damage": line["damage"], "weights": words, **percents, "p": found["p"]})
    return pd.DataFrame(rows, columns=["model", TOKENS, STRENGTH, "damage", "weights", *ENDS, "p"])


def effect_as_sinks_grow(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the share that token weights recover against the strength of the sinks, a panel a model, along its training.

    Args:
        table: of `dose_table`, not empty.
    """
    names = list(dict.fromkeys(table["model"]))
    figure, axes = figures.subplots(1, len(names), height=3.4, sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        for key, (look, line) in LOOKS.items():
            rows = panels.select(table, model=name, weights=WEIGHED[key])
            ends = np.array([rows[SHARE] - rows["low, %"], rows["high, %"] - rows[SHARE]])
            style = {"color": figures.METHODS[look].color, "marker": figures.METHODS[look].marker, "linestyle": line}
            ax.errorbar(rows[STRENGTH], rows[SHARE], yerr=ends, label=WEIGHED[key], capsize=2.5, linewidth=1.2, **style)
        ax.axhline(0.0, color="black", linewidth=0.8)
        ax.set_title(name)
    axes[0, 0].set_ylabel(SHARE.replace(" recovered", "\nrecovered"))
    figure.supxlabel(STRENGTH, fontsize="medium")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure, table

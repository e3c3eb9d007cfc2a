"""The figure of the decisive claims: which share of the damage the recipe recovers, and what causes it."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib.report import figures, panels
from lib.report.figures import METHODS, Style
from lib.studies.damage.decisive import RANDOM, SINKS_OVER_RANDOM, WHOLE
from lib.studies.damage.shares import SHARE
from lib.studies.pruning.attribution import FACTORS, WEIGHTS

GREY = METHODS["magnitude"].color
SINKS = METHODS["sink-aware"].color
LOOKS: Mapping[str, Style] = MappingProxyType({
    WHOLE: Style("#000000", "D"), FACTORS[WEIGHTS]: Style(SINKS, "*"), FACTORS[0]: Style(METHODS["wanda"].color, "o"),
    RANDOM: Style(GREY, "D"), SINKS_OVER_RANDOM: Style(SINKS, "P"),
})  # fmt: skip
LABELS: Mapping[str, str] = MappingProxyType(
    {RANDOM: "recipe with random\npositions for sinks", SINKS_OVER_RANDOM: "sinks over\nrandom positions"}
)
ORDER = (WHOLE, FACTORS[WEIGHTS], SINKS_OVER_RANDOM, *(name for name in FACTORS if name != FACTORS[WEIGHTS]), RANDOM)
PAPER_COLOR, BAND_COLOR = "#CC79A7", "#DDDDDD"


def shares(table: pd.DataFrame, *, paper: float) -> tuple[Figure, pd.DataFrame]:
    """Draw which share of Wanda's damage each part of the recipe recovers, a panel a model.

    Args:
        table: columns model, part, share of the damage (with low and high, in per cent); rows without a share are left out.
        paper: the paper's share, in per cent; half of it is drawn as the border of no effect.
    """
    names = {"model": "model", "part": "part", "share": SHARE, "low": "share, low", "high": "share, high"}
    shown = pd.DataFrame({name: table[column] for name, column in names.items()})
    shown = shown.take(np.flatnonzero(np.isfinite(panels.numbers(shown, "share", "low", "high")).all(1)).tolist())
    models = panels.unique(shown, "model")
    order = [part for part in ORDER if part in set(shown["part"])]
    size = {"width": min(figures.WIDTH, 3.4 * len(models) + 2.2), "height": 0.42 * len(order) + 1.9}
    label = "share of what Wanda loses that is recovered (%)"
    figure, axes = panels.side_by_side(len(models), x_label=label, y_label="part of the recipe", **size)
    for ax, model in zip(axes, models, strict=True):
        ax.axvspan(-paper / 2, paper / 2, color=BAND_COLOR, linewidth=0, zorder=0)
        panels.difference_axis(ax)
        ax.axvline(paper, color=PAPER_COLOR, linestyle="--", linewidth=1.5)
        for place, part in enumerate(order):
            rows = panels.select(shown, model=model, part=part)
            panels.points(ax, rows, [place] * len(rows), value="share", style=LOOKS.get(part) or Style(GREY, "o"))
        panels.name_rows(ax, [LABELS.get(part, part) for part in order], size=9)
        ax.set(title=model)
    line = Line2D([], [], color=PAPER_COLOR, linestyle="--", linewidth=1.5, label=f"paper, LLaDA-8B: {paper:.1f} %")
    band = Patch(color=BAND_COLOR, label=f"no effect of that size: within ± {paper / 2:.1f} %")
    figure.legend(handles=[line, band], loc="outside upper right", ncols=2)
    return figure, shown

"""The figure of the decisive claims: every part at its share, the paper's line and the borders of no effect, nothing covered."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from lib.core.errors import InputError
from lib.report import canvas
from lib.studies.damage import figures
from lib.studies.damage.decisive import RANDOM, SINKS_OVER_RANDOM, WHOLE
from lib.studies.damage.shares import SHARE
from lib.studies.pruning.attribution import FACTORS
from tests.drawing import drawn

pytestmark = pytest.mark.usefixtures("strict_figures")
PARTS = (WHOLE, *FACTORS, RANDOM, SINKS_OVER_RANDOM)


def table(models: dict[str, tuple[str, ...]]) -> pd.DataFrame:
    rows = [
        {"model": model, "part": part, "gain": 0.01, "low": -0.01, "high": 0.02,
         SHARE: 1.0 + at, "share, low": -2.0 + at, "share, high": 3.0 + at}
        for model, parts in models.items()
        for at, part in enumerate(parts)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def labels(ax: Axes) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in ax.get_yticklabels()]


def test_parts_stand_at_their_shares_beside_the_papers() -> None:
    """A model that has no noised text has an empty row there, and all others at their own height."""
    figure, shown = figures.shares(table({"dlm": PARTS, "ar": PARTS[:1] + PARTS[2:]}), paper=9.18)
    canvas.add_footer(figure, "profile quick; models dlm, ar")
    canvas.png_bytes(figure, dpi=100)
    assert [ax.get_title() for ax in figure.axes] == ["dlm", "ar"]
    names = labels(figure.axes[0])
    assert names[0] == WHOLE and names[1] == "sink weights" and len(names) == len(PARTS)
    points = drawn(figure.axes[0])
    for at, part in enumerate(PARTS):
        height = names.index({RANDOM: "recipe with random positions for sinks"}.get(part, part))
        assert (1.0 + at, float(height)) in points
    assert len(drawn(figure.axes[1])) == len(PARTS) - 1
    for ax in figure.axes:
        assert 9.18 in {float(np.atleast_1d(line.get_xdata())[0]) for line in ax.lines if line.get_linestyle() == "--"}
        band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
        assert (band.x0, band.x1) == pytest.approx((-4.59, 4.59))
        assert not [found for found in ax.collections if isinstance(found, PathCollection)]
    assert len(shown) == 2 * len(PARTS) - 1 and "(%)" in figure.get_supxlabel()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    assert not any(figure.legends[0].get_window_extent(renderer).overlaps(ax.bbox) for ax in figure.axes)
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["paper, LLaDA-8B: 9.2 %", "no effect of that size: within ± 4.6 %"]


def test_shares_that_are_not_known_are_left_out() -> None:
    """A model whose damage is not sure has no panel; with none at all there is no figure."""
    known, unknown = table({"dlm": PARTS}), table({"ar": PARTS}).assign(**{SHARE: math.nan})
    unbounded = table({"bd": PARTS}).assign(**{"share, high": math.inf})
    figure, shown = figures.shares(pd.concat([known, unknown, unbounded]), paper=9.18)
    assert [ax.get_title() for ax in figure.axes] == ["dlm"] and set(shown["model"]) == {"dlm"}
    with pytest.raises(InputError, match="a figure must have a model to draw"):
        figures.shares(unknown, paper=9.18)

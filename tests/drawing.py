"""What tests of figures read off an axis."""

import numpy as np
from matplotlib.axes import Axes


def drawn(ax: Axes) -> set[tuple[float, float]]:
    """Return the points of all markers, rounded; the caps of intervals are none."""
    return {
        (round(float(x), 6), round(float(y), 6))
        for line in ax.lines
        if line.get_marker() not in ("None", "", None, "_", "|")
        for x, y in zip(np.atleast_1d(line.get_xdata()), np.atleast_1d(line.get_ydata()), strict=True)
    }

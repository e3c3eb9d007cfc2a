"""One look for all figures: colours and markers by model and method, heat maps, axes of denoising, intervals."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import ArrayLike

from lib.core.errors import InputError
from lib.report.canvas import FILE_DPI, INLINE_DPI, WIDTH, subplots, use_style

__all__ = [
    "FILE_DPI", "INLINE_DPI", "WIDTH", "subplots", "use_style", "METHODS", "MODELS", "Style", "model_styles",
    "heatmap", "color_norm", "shared_colorbar", "mask_ratio_axis", "mark_fractions", "errorbar_points", "band",
    "token_label",
]  # fmt: skip

MAP_STYLE = MappingProxyType({"magnitude": "cividis", "difference": "RdBu_r"})
MISSING = "#D9D9D9"


@dataclass(frozen=True)
class Style:
    """Colour and marker of one model or method, the same in every figure."""

    color: str
    marker: str


MODELS = MappingProxyType({"dlm": Style("#D55E00", "o"), "ar": Style("#0072B2", "s"), "smollm2": Style("#009E73", "^")})
METHODS = MappingProxyType({
    "dense": Style("#000000", "o"), "random": Style("#BBBBBB", "x"), "magnitude": Style("#777777", "v"),
    "wanda": Style("#0072B2", "s"), "sparsegpt": Style("#E69F00", "D"), "ar-sink-preserve": Style("#009E73", "^"),
    "sink-aware": Style("#D55E00", "*"),
})  # fmt: skip
OTHER_COLORS = ("#CC79A7", "#56B4E9", "#E69F00", "#000000")
OTHER_MARKERS = ("D", "v", "P", "X", "<")


def model_styles(names: Iterable[str]) -> dict[str, Style]:
    """Give each model its colour and marker; models without a fixed one get the remaining ones in the order given.

    Args:
        names: names of the models as the settings call them.

    Returns:
        Style by name.

    >>> model_styles(["dlm", "llada"])["llada"]
    Style(color='#CC79A7', marker='D')
    """
    styles: dict[str, Style] = {}
    others = 0
    for name in names:
        if name in MODELS:
            styles[name] = MODELS[name]
        elif name not in styles:
            styles[name] = Style(OTHER_COLORS[others % len(OTHER_COLORS)], OTHER_MARKERS[others % len(OTHER_MARKERS)])
            others += 1
    return styles


def heatmap(
    ax: Axes,
    values: ArrayLike,
    *,
    label: str,
    x_label: str = "",
    y_label: str = "",
    title: str = "",
    difference: bool = False,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    extent: tuple[float, float, float, float] | None = None,
    colorbar: bool = True,
) -> AxesImage:
    """Draw a matrix with the first row on top; missing cells are light grey.

    Args:
        ax: axes to draw on.
        values: matrix [row, column].
        label: what a colour means, with its unit; written beside the colour bar.
        x_label: what the columns are.
        y_label: what the rows are.
        title: title of the axes.
        difference: True for signed values: diverging colours, white at 0.
        log: True for a logarithmic colour scale (positive magnitudes only).
        limits: lowest and highest value of the colour scale; from the data when None.
        extent: left, right, bottom and top of the matrix in data coordinates; (0, positions, 0, 1) puts mask ratio 1 on top.
        colorbar: False when several axes share one (`shared_colorbar`).

    Returns:
        The image.

    Raises:
        InputError: not a matrix, or no finite value in it.
    """
    matrix = np.ma.masked_invalid(np.asarray(values, dtype=np.float64))
    if matrix.ndim != 2 or matrix.count() == 0:
        raise InputError(f"a heat map must have rows, columns and a finite value, got shape {matrix.shape}: check its input")
    colors = plt.get_cmap(MAP_STYLE["difference" if difference else "magnitude"]).with_extremes(bad=MISSING)
    norm = color_norm(matrix.compressed(), difference=difference, log=log, limits=limits)
    image = ax.imshow(matrix, aspect="auto", cmap=colors, norm=norm, extent=extent, interpolation="nearest")
    ax.set(xlabel=x_label, ylabel=y_label, title=title)
    if extent is None:
        ax.locator_params(integer=True)
    if colorbar:
        shared_colorbar(image, ax, label)
    return image


def color_norm(
    values: Float[np.ndarray, " value"], *, difference: bool, log: bool, limits: tuple[float, float] | None
) -> Normalize:
    """Choose the colour scale: signed values symmetric about 0, logarithmic over at most four decades, else linear.

    Args:
        values: finite values that are drawn.
        difference: True for signed values.
        log: True for a logarithmic scale.
        limits: ends of the scale; from the values when None.

    Returns:
        The scale.
    """
    low, high = limits or (float(values.min()), float(values.max()))
    if difference:
        bound = max(abs(low), abs(high)) or 1.0
        return Normalize(-bound, bound)
    if log and high > 0:
        return LogNorm(min(max(low, high * 1e-4), high * 0.5), high, clip=True)
    return Normalize(low, high if high > low else low + 1.0)


def shared_colorbar(image: AxesImage, axes: Any, label: str) -> None:
    """Add one labelled colour bar beside one or several axes.

    Args:
        image: any of the images that share the colour scale.
        axes: the axes beside which the bar stands.
        label: what a colour means, with its unit.
    """
    figure = image.figure
    assert figure is not None
    bar = figure.colorbar(image, ax=axes, label=label, aspect=30, pad=0.02)
    if isinstance(image.norm, LogNorm):
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.outline.set_visible(False)  # type: ignore[operator]


def mask_ratio_axis(ax: Axes, *, axis: Literal["x", "y"] = "x") -> None:
    """Make an axis run along denoising: mask ratio 1 at the left (on top), 0 at the right (at the bottom).

    Args:
        ax: axes whose data coordinate on that axis is the mask ratio.
        axis: which axis.
    """
    ticks = [1.0, 0.75, 0.5, 0.25, 0.0]
    if axis == "x":
        ax.set(xlim=(1, 0), xticks=ticks, xlabel="mask ratio (1 = all masked)")
    else:
        ax.set(ylim=(0, 1), yticks=ticks, ylabel="mask ratio (1 = all masked)")


def mark_fractions(ax: Axes, fractions: Sequence[float] = (0.25, 0.5, 0.75), *, axis: Literal["x", "y"] = "y") -> None:
    """Mark how much of the trajectory has passed by dashed lines; time runs from left to right, or from top to bottom.

    Args:
        ax: axes with their final limits.
        fractions: fractions of the trajectory in [0, 1].
        axis: the axis that time runs along.
    """
    on_map = bool(ax.images)
    color = "white" if on_map else "#595959"
    outline: list[Any] = [patheffects.withStroke(linewidth=2.4, foreground="black", alpha=0.55)] if on_map else []
    look: dict[str, Any] = {"color": color, "linewidth": 1.0, "linestyle": (0, (5, 4)), "path_effects": outline, "zorder": 1.5}
    for fraction in fractions:
        if axis == "y":
            bottom, top = ax.get_ylim()
            ax.axhline(top + fraction * (bottom - top), **look)
            place, shift = (1.0, 1 - fraction), (-3, 2)
        else:
            left, right = ax.get_xlim()
            ax.axvline(left + fraction * (right - left), **look)
            place, shift = (fraction, 1.0), (-3, -9)
        ax.annotate(
            f"{fraction * 100:g} %", place, shift, xycoords="axes fraction", textcoords="offset points", ha="right",
            fontsize=7.5, color=color, path_effects=outline, annotation_clip=False,
        )  # fmt: skip


def token_label(text: str) -> str:
    """Make the text of a token fit for a label: white space visible, dollar signs not read as mathematics.

    Args:
        text: what the tokenizer decodes the token to.

    Returns:
        The label.

    >>> token_label(" the"), token_label("\\n"), token_label("")
    ('␣the', '\\\\n', '(empty)')
    """
    shown = text.replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$")
    return shown or "(empty)"


def errorbar_points(
    ax: Axes,
    x: ArrayLike,
    estimate: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    style: Style,
    label: str | None = None,
    horizontal: bool = False,
) -> None:
    """Draw estimates as markers with their intervals.

    Args:
        ax: axes to draw on.
        x: place of each estimate.
        estimate: the estimates.
        low: lower ends of the intervals.
        high: upper ends of the intervals.
        style: colour and marker.
        label: entry in the legend.
        horizontal: True when the estimates run along x and `x` gives the rows.
    """
    middle = np.asarray(estimate, dtype=np.float64)
    error = np.stack([middle - np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64) - middle])
    # An end that the data do not bound (one value only) would stretch the axis for ever: the bar is left out instead.
    error[~np.isfinite(error)] = 0.0
    places: dict[str, Any] = {"x": middle, "y": x, "xerr": error} if horizontal else {"x": x, "y": middle, "yerr": error}
    ax.errorbar(**places, color=style.color, marker=style.marker, linestyle="none", capsize=3, elinewidth=1.4, label=label)


def band(
    ax: Axes,
    x: ArrayLike,
    estimate: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    style: Style,
    label: str | None = None,
) -> None:
    """Draw a line with its interval as a shaded band.

    Args:
        ax: axes to draw on.
        x: places along the axis.
        estimate: the line.
        low: lower border of the band.
        high: upper border of the band.
        style: colour and marker; the marker stands on about eight places of the line.
        label: entry in the legend.
    """
    every = max(1, len(np.asarray(x)) // 8)
    ax.plot(np.asarray(x), np.asarray(estimate), color=style.color, marker=style.marker, markevery=every, label=label)
    ax.fill_between(np.asarray(x), np.asarray(low), np.asarray(high), color=style.color, alpha=0.18, linewidth=0)

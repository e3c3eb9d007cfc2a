"""The sheet that figures are drawn on: text sizes, layout, the footer that says what ran, and PNG files without a date."""

import io
import textwrap
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from lib.core.errors import InputError

WIDTH = 9.0  # inches: a page shows figures about 900 pixels wide, so that 1 point of text is 1.4 pixels
FILE_DPI = 200
INLINE_DPI = 100
FOOTER_SIZE = 7
FOOTER_SHARE = 0.25  # of the height at most: many overrides would leave no room for axes
RC: Mapping[Any, Any] = MappingProxyType({
    "figure.constrained_layout.use": True, "figure.facecolor": "white", "savefig.facecolor": "white",
    "figure.dpi": INLINE_DPI, "savefig.dpi": FILE_DPI, "figure.figsize": (WIDTH, 4.5),
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "xtick.labelsize": 9,
    "ytick.labelsize": 9, "legend.fontsize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 6, "image.cmap": "cividis",
    "image.interpolation": "nearest", "axes.unicode_minus": True,
})  # fmt: skip


def use_style() -> None:
    """Set the look of all later figures, whatever the user's own matplotlib settings are."""
    plt.style.use("default")
    plt.rcParams.update(dict(RC))


def subplots(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float | None = None, **options: Any
) -> tuple[Figure, Any]:
    """Make a figure with axes in the project's look.

    Args:
        rows: rows of axes.
        columns: columns of axes.
        width: inches; the default fills a page.
        height: inches; by default 3.2 a row.
        options: passed to `matplotlib.pyplot.subplots`, such as `sharex=True`.

    Returns:
        Figure and axes, as `matplotlib.pyplot.subplots` does.
    """
    use_style()
    return plt.subplots(rows, columns, figsize=(width, height or 3.2 * rows + 0.8), **options)


def add_footer(figure: Figure, text: str) -> None:
    """Write a small footer and keep everything else above it.

    Args:
        figure: a figure with constrained layout.
        text: what ran; wrapped to the width of the figure, and cut where it would take more than a quarter of its height.

    Raises:
        InputError: the figure was made without constrained layout.
    """
    try:
        if figure.get_layout_engine() is None or not hasattr(figure.get_layout_engine(), "_params"):
            figure.set_layout_engine("constrained")
        width, height = figure.get_size_inches()
        most = max(1, int(FOOTER_SHARE * height * 72 / (FOOTER_SIZE * 1.25)))
        columns = max(20, int(width * 72 / (FOOTER_SIZE * 0.6)))
        lines = textwrap.wrap(text, columns, max_lines=most, placeholder=" ...") or [""]
        share = (len(lines) * FOOTER_SIZE * 1.25 + 5) / 72 / height
        floor = share + _raise_common_label(figure, share)
        figure.get_layout_engine().set(rect=(0, floor, 1, 1 - floor))  # type: ignore[union-attr, call-arg]
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"a figure must use constrained layout, got {error}: make it with figures.subplots") from error
    footer = figure.text(0.005, 3 / 72 / height, "\n".join(lines), fontsize=FOOTER_SIZE, color="#595959", va="bottom")
    footer.set(in_layout=False, parse_math=False)


def _raise_common_label(figure: Figure, share: float) -> float:
    """Lift the x label that all axes have in common above the footer; return its height as a fraction of the figure.

    Constrained layout would keep it at the very bottom, on top of the footer.
    """
    label = getattr(figure, "_supxlabel", None)
    if label is None or not label.get_text():
        return 0.0
    label._autopos = False
    label.set(position=(0.5, share), va="bottom")
    return label.get_fontsize() * 1.5 / 72 / figure.get_size_inches()[1]


def png_bytes(figure: Figure, *, dpi: int = FILE_DPI) -> bytes:
    """Draw a figure as PNG; the same figure gives the same bytes.

    Args:
        figure: what to draw.
        dpi: pixels an inch.

    Returns:
        The content of the file, without date or program name.

    Raises:
        InputError: the figure is too small for what it holds.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Token labels may hold characters that the font lacks: an empty box is better than a warning in every notebook.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("error", message="constrained_layout not applied")
        try:
            figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        except UserWarning as error:
            raise InputError(f"a figure must have room for its labels, got {error}: make it larger") from error
    return buffer.getvalue()


def inline(drawn: bytes) -> bytes:
    """Make the smaller picture that a notebook shows out of the file's PNG, which is quicker than drawing it a second time."""
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(drawn)).convert("RGB")
    picture.reduce(FILE_DPI // INLINE_DPI).save(buffer, format="png", optimize=True)
    return buffer.getvalue()

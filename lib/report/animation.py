"""Animated GIFs of a matrix that changes along denoising."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from lib.core.errors import InputError
from lib.report import canvas, figures

MAX_FRAMES = 100
MAX_BYTES = 3_000_000
FRAME_MS = 180
LAST_FRAME_MS = 1500
# From sharp to coarse: the first that fits into MAX_BYTES is taken. Dots an inch, and colours for the map.
QUALITIES = ((110, 128), (90, 96), (75, 64), (60, 48))


@dataclass(frozen=True)
class Movie:
    """Frames with their texts: `frames` [frame, row, column], one title each, and which columns are masked in each frame."""

    frames: Float[np.ndarray, "frame row column"]
    titles: Sequence[str]
    x_label: str
    y_label: str
    value_label: str
    masked: Bool[np.ndarray, "step position"] | None = None
    log: bool = True


def gif_bytes(movie: Movie, *, footer: str) -> bytes:
    """Draw a movie as a looping GIF; the same movie gives the same bytes.

    All frames share one colour scale and one palette. The last frame stands longer than the others.

    Args:
        movie: what to draw.
        footer: small text below, which says what ran.

    Returns:
        The content of the file.

    Raises:
        InputError: frames, titles and masks do not fit together, or no quality keeps the file at 3 MB.
    """
    _check(movie)
    for dpi, colors in QUALITIES:
        data = _encode(_draw(movie, footer=footer, dpi=dpi), _palette(colors))
        if len(data) <= MAX_BYTES:
            return data
    raise InputError(f"an animation must have at most {MAX_BYTES} bytes, got {len(data)}: show fewer frames or positions")


def still(gif: bytes) -> bytes:
    """Return the frame in the middle of a GIF as PNG, for paper and for those who want nothing to move."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(gif)) as picture:
        picture.seek(getattr(picture, "n_frames", 1) // 2)
        picture.convert("RGB").save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _check(movie: Movie) -> None:
    shape = np.shape(movie.frames)
    if len(shape) != 3 or not 1 <= shape[0] <= MAX_FRAMES or not np.isfinite(movie.frames).any():
        raise InputError(f"an animation must have 1 to {MAX_FRAMES} frames of rows and columns, got shape {shape}: pick frames")
    if len(movie.titles) != shape[0]:
        raise InputError(f"an animation must have one title a frame, got {len(movie.titles)} for {shape[0]}: give the others")
    if movie.masked is not None and np.shape(movie.masked) != (shape[0], shape[2]):
        expected = (shape[0], shape[2])
        raise InputError(f"masked must have shape {expected}, got {np.shape(movie.masked)}: one row a frame, one entry a column")


def _draw(movie: Movie, *, footer: str, dpi: int) -> list[Int[np.ndarray, "y x channel"]]:
    """Draw every frame; the layout is computed once, so that nothing but the data moves."""
    canvas.use_style()
    figure = Figure(figsize=(6.4, 6.2), dpi=dpi, layout="constrained")
    canvas_agg = FigureCanvasAgg(figure)
    heights = [1.0] if movie.masked is None else [0.045, 1.0]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    norm = figures.color_norm(movie.frames[np.isfinite(movie.frames)], difference=False, log=movie.log, limits=None)
    image = figures.heatmap(
        axes[-1], movie.frames[0], label=movie.value_label, x_label=movie.x_label, y_label=movie.y_label, colorbar=False
    )
    image.set_norm(norm)
    figures.shared_colorbar(image, list(axes), movie.value_label)
    strip = None if movie.masked is None else _mask_strip(axes[0], movie.masked)
    title = axes[0].set_title(max(movie.titles, key=len), fontsize=11, parse_math=False)
    canvas.add_footer(figure, footer)
    canvas_agg.draw()
    figure.set_layout_engine("none")
    pictures = []
    for index, text in enumerate(movie.titles):
        image.set_data(np.ma.masked_invalid(movie.frames[index]))
        title.set_text(text)
        if strip is not None and movie.masked is not None:
            strip.set_data(movie.masked[index][None].astype(float))
        canvas_agg.draw()
        pictures.append(np.asarray(canvas_agg.buffer_rgba())[..., :3].astype(np.int64))
    return pictures


def _mask_strip(axes: Axes, masked: Bool[np.ndarray, "frame column"]) -> AxesImage:
    """Draw the row of cells above the map: dark where a position is still masked, light where it holds text."""
    strip = axes.imshow(masked[:1].astype(float), cmap="Greys", vmin=-0.25, vmax=1.25, aspect="auto", interpolation="nearest")
    axes.set(yticks=[0], yticklabels=["masked"])
    axes.tick_params(bottom=False, labelbottom=False, left=False)
    return strip


def _palette(colors: int) -> Int[np.ndarray, "color channel"]:
    """Make one palette for all frames: the colours of the map, and greys from black to white for text and lines."""
    shades = matplotlib.colormaps["cividis"](np.linspace(0, 1, colors))[:, :3]
    greys = np.repeat(np.linspace(0, 1, 256 - colors)[:, None], 3, axis=1)
    return np.round(255 * np.concatenate([shades, greys])).astype(np.int64)


def _encode(pictures: Sequence[Int[np.ndarray, "y x channel"]], palette: Int[np.ndarray, "color channel"]) -> bytes:
    frames = []
    for picture in pictures:
        frame = Image.fromarray(_nearest(picture, palette), mode="P")
        frame.putpalette(palette.astype(np.uint8).tobytes())
        frames.append(frame)
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)
    return buffer.getvalue()


def _nearest(picture: Int[np.ndarray, "y x channel"], palette: Int[np.ndarray, "color channel"]) -> UInt8[np.ndarray, "y x"]:
    """Give each pixel the index of its nearest palette colour, exactly: Pillow's own search turns white into grey."""
    packed = (picture[..., 0] << 16) | (picture[..., 1] << 8) | picture[..., 2]
    found, places = np.unique(packed, return_inverse=True)
    colors = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1)
    distance = ((colors[:, None] - palette[None]) ** 2).sum(axis=2)
    return distance.argmin(axis=1).astype(np.uint8)[places].reshape(packed.shape)

"""An interactive page of one generation: where the sinks of every model, layer and head sit, step by step, in the text itself."""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool, Float, Int

from lib.core.errors import InputError, require

TEMPLATES = Path(__file__).resolve().parent / "templates"
MAX_BYTES = 5_000_000
LIMITS = (0.25, 8.0)  # of the colours, as in the figures of the same masses
ABSENT = "#d9d9d9"
TARGET = "map"  # the element that the map is drawn into
FINEST = 65535  # masses are stored in 16 bits, 0 to the largest possible, which is the number of keys


@dataclass(frozen=True)
class Scene:
    """One generation by one model.

    Attributes:
        name: of the model, in words.
        steps: a title for each step that is shown.
        layers: a title for each layer that is shown.
        depth: how many layers the model has.
        tokens: text of the token that the model read, by step and position.
        masked: which of them are masks.
        keys: how many positions exist at each step.
        mass: attention received, 1 on average over the keys that exist.
    """

    name: str
    steps: Sequence[str]
    layers: Sequence[str]
    depth: int
    tokens: Sequence[Sequence[str]]
    masked: Bool[np.ndarray, "step position"]
    keys: Int[np.ndarray, "step"]
    mass: Float[np.ndarray, "step layer head position"]


def render(scenes: Sequence[Scene], *, title: str, footer: str) -> str:
    """Make the page: a map of masses by step and position, and below it the text of the chosen step with its sinks marked.

    Sinks are keys above mean + 2 standard deviations, the released rule, of the mean over whatever layers and heads are chosen.

    Args:
        scenes: one a model.
        title: of the page.
        footer: what ran.

    Returns:
        HTML that needs nothing else, at most 5 MB; the same scenes give the same text.

    Raises:
        InputError: no scene, or more than fits.
    """
    require(bool(scenes), "an interactive page must have a model to show", "none", "trace one")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    page = environment.get_template("explorer.html.j2").render(
        title=title,
        footer=footer,
        library=_library(),
        script=(TEMPLATES / "explorer.js").read_text(encoding="utf-8"),
        item=_in_script(_map(max(len(scene.steps) for scene in scenes), max(scene.masked.shape[1] for scene in scenes))),
        scenes=_in_script([_plain(scene) for scene in scenes]),
    )
    size = len(page.encode())
    if size > MAX_BYTES:
        raise InputError(
            f"an interactive page must have at most {MAX_BYTES} bytes, got {size}: show fewer steps, layers or models"
        )
    return page


@cache
def _library() -> str:
    """Return the part of Bokeh that runs in a browser."""
    from bokeh.util.paths import bokehjs_path

    return (bokehjs_path() / "js" / "bokeh.min.js").read_text(encoding="utf-8")


def _map(steps: int, positions: int) -> dict[str, Any]:
    """Describe the map to Bokeh: an image, a band on the chosen step, and rings on its sinks; the page's script fills them."""
    from bokeh.core.types import ID
    from bokeh.embed import json_item
    from bokeh.models import ColorBar, ColumnDataSource, HoverTool, LogColorMapper, Range1d
    from bokeh.palettes import Cividis256
    from bokeh.plotting import figure

    mapper = LogColorMapper(palette=Cividis256, low=LIMITS[0], high=LIMITS[1], nan_color=ABSENT)
    plot: Any = figure(
        x_range=Range1d(start=-0.5, end=positions - 0.5), y_range=Range1d(start=steps - 0.5, end=-0.5), height=360,
        sizing_mode="stretch_width", x_axis_label="token position", y_axis_label="step that is shown",
        tools="box_zoom,reset", active_drag=None, toolbar_location="above",
    )  # fmt: skip
    image = ColumnDataSource({"image": [np.full((steps, positions), np.nan, dtype=np.float32)]}, name="masses")
    drawn = plot.image("image", x=-0.5, y=-0.5, dw=positions, dh=steps, color_mapper=mapper, source=image)
    band = ColumnDataSource({"y": [0.0]}, name="chosen")
    plot.rect(
        x=(positions - 1) / 2, y="y", width=positions, height=1, source=band, fill_alpha=0, line_color="white", line_width=2
    )
    rings = ColumnDataSource({"x": [0.0], "y": [0.0]}, name="sinks")
    plot.scatter("x", "y", source=rings, size=9, fill_alpha=0, line_color="#D55E00", line_width=2)
    tips = [("position", "$x{0}"), ("step", "$y{0}"), ("mass", "@image{0.00}")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips))
    plot.add_layout(ColorBar(color_mapper=mapper, title="sink mass (1 = mean over keys)", title_standoff=6), "below")
    plot.toolbar.logo = None
    return _renumbered(json_item(plot, ID(TARGET)))


def _renumbered(item: Any) -> dict[str, Any]:
    """Number Bokeh's objects from 1: it counts through a whole process, and equal pages must be equal files."""
    numbers: dict[str, str] = {}
    text = re.sub(r'"p\d+"', lambda found: numbers.setdefault(found.group(), f'"p{len(numbers) + 1}"'), json.dumps(item))
    return json.loads(text)


def _plain(scene: Scene) -> dict[str, Any]:
    """Return a scene as JSON takes it: tokens by number, masses in 16 bits."""
    vocabulary = sorted({token for row in scene.tokens for token in row})
    number = {token: index for index, token in enumerate(vocabulary)}
    heads, positions = scene.mass.shape[2:]
    stored = np.round(np.clip(scene.mass / positions, 0, 1) * FINEST).astype("<u2")
    return {
        "name": scene.name, "steps": list(scene.steps), "layers": list(scene.layers), "depth": scene.depth,
        "heads": heads, "positions": positions,
        "vocabulary": vocabulary, "tokens": [[number[token] for token in row] for row in scene.tokens],
        "masked": ["".join("01"[int(each)] for each in row) for row in scene.masked],
        "keys": [int(count) for count in scene.keys], "scale": positions / FINEST,
        "mass": base64.b64encode(stored.tobytes()).decode(),
    }  # fmt: skip


def _in_script(value: object) -> str:
    """Write JSON that may stand inside a script element, whatever a token says."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)  # Bokeh's objects keep their order
    return text.replace("<", "\\u003c")

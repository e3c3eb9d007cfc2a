"""Figures of sink traces (notebook 01): each returns the figure and the table of what is drawn."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from lib.diffusion.traces import MARKS, SinkTrace
from lib.report import figures
from lib.studies.traces.views import relative_to_frontier

MASS_LABEL = "sink mass (1 = mean over keys)"
# One colour scale for every panel. Cut at 8, so that the weaker sinks of small models stay visible beside a mass of 50.
LIMITS = (0.25, 8.0)
STEP_LABEL = "generation step"
LAYER_COLUMNS = 8
SHOWN_STEPS = 14


def position_by_step(traces: Sequence[SinkTrace], *, prompt: int = 0) -> tuple[Figure, pd.DataFrame]:
    """Draw sink mass by position and step, one panel a model, for one prompt.

    Args:
        traces: one per model.
        prompt: which prompt.

    Source: the view of the paper's Figure 2.
    """
    panels = [(trace.name, trace.mass[prompt]) for trace in traces]
    offsets = [range(trace.mass.shape[-1]) for trace in traces]
    return _step_panels(panels, offsets, x_label="token position")


def frontier_by_step(traces: Sequence[SinkTrace], *, reach: int) -> tuple[Figure, pd.DataFrame]:
    """Draw sink mass averaged over prompts by distance from the unmasked frontier, one panel a model.

    Args:
        traces: one per model.
        reach: largest distance, in tokens.
    """
    panels = [(trace.name, relative_to_frontier(trace.mass, trace.frontier, keys=trace.keys, reach=reach)) for trace in traces]
    return _step_panels(
        panels, [range(-reach, reach)] * len(panels), x_label="tokens from the frontier (0 = first not yet written)"
    )


def _step_panels(
    panels: Sequence[tuple[str, Float[Tensor, "step column"]]], columns: Sequence[range], *, x_label: str
) -> tuple[Figure, pd.DataFrame]:
    """Draw one heat map a model with steps downwards, sharing one colour scale."""
    figure, axes = figures.subplots(1, len(panels), height=4.2, sharey=True, squeeze=False)
    tables = []
    for index, ((name, values), span) in enumerate(zip(panels, columns, strict=True)):
        ax = axes[0, index]
        shown = _absent_as_nan(values.numpy())
        steps = len(shown)
        image = figures.heatmap(
            ax,
            shown,
            label=MASS_LABEL,
            title=name,
            y_label=STEP_LABEL if index == 0 else "",
            log=True,
            limits=LIMITS,
            extent=(span[0] - 0.5, span[-1] + 0.5, steps - 0.5, -0.5),
            colorbar=False,
        )
        figures.mark_fractions(ax, MARKS, axis="y")
        table = pd.DataFrame(shown, columns=[str(column) for column in span])
        tables.append(pd.concat([pd.DataFrame({"model": name, "step": range(steps)}), table], axis=1))
    figure.supxlabel(x_label, fontsize="medium")
    _mass_colorbar(image, axes)
    return figure, pd.concat(tables, ignore_index=True)


def layers_by_step(traces: Sequence[SinkTrace], *, prompt: int = 0) -> tuple[Figure, pd.DataFrame]:
    """Draw position by step for single layers: a row a model, up to eight layers spread over its depth.

    Args:
        traces: one per model, with equal numbers of steps.
        prompt: which prompt.
    """
    steps = np.unique(np.linspace(0, traces[0].mass.shape[1] - 1, SHOWN_STEPS).round().astype(int))
    panels = {
        (trace.name, layer): (steps, trace.layer_mass[prompt, :, layer].numpy()[steps])
        for trace in traces
        for layer in _spread(trace)
    }
    return _layer_panels(panels, row_name="step")


def heads_at_mark(traces: Sequence[SinkTrace], *, prompt: int = 0, mark: int = 1) -> tuple[Figure, pd.DataFrame]:
    """Draw position by head at one mark: a row a model, up to eight layers, one line of pixels a head.

    Args:
        traces: one per model.
        prompt: which prompt.
        mark: 0, 1, 2 for 25, 50, 75 % of the generation.
    """
    panels = {}
    for trace in traces:
        for layer in _spread(trace):
            values = trace.head_mass[prompt, mark, layer].numpy()
            panels[trace.name, layer] = (np.arange(len(values)), values)
    return _layer_panels(panels, row_name="head")


def _layer_panels(panels: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]], *, row_name: str) -> tuple[Figure, pd.DataFrame]:
    """Draw small heat maps in a grid of models by layers; each panel is (row labels, values [row, position])."""
    names = list(dict.fromkeys(name for name, _ in panels))
    figure, axes = figures.subplots(len(names), LAYER_COLUMNS, height=1.9 * len(names) + 0.6, squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    tables = []
    for row, name in enumerate(names):
        layers = [layer for model, layer in panels if model == name]
        for ax, layer in zip(axes[row], layers, strict=False):
            labels, values = panels[name, layer]
            ax.set_visible(True)
            shown = _absent_as_nan(values)
            title = f"layer {layer}"
            image = figures.heatmap(ax, shown, label=MASS_LABEL, title=title, log=True, limits=LIMITS, colorbar=False)
            _plain_ticks(ax, positions=values.shape[1], rows=labels)
            table = pd.DataFrame(shown, columns=[str(position) for position in range(values.shape[1])])
            tables.append(pd.concat([pd.DataFrame({"model": name, "layer": layer, row_name: labels}), table], axis=1))
        axes[row, 0].set_ylabel(f"{name}\n{row_name}")
    figure.supxlabel("token position", fontsize="medium")
    _mass_colorbar(image, axes)
    return figure, pd.concat(tables, ignore_index=True)


def _mass_colorbar(image: AxesImage, axes: np.ndarray) -> None:
    """Add the shared colour bar, its ticks doubling: decades alone would leave a single one."""
    figures.shared_colorbar(image, axes, MASS_LABEL)
    assert image.colorbar is not None
    image.colorbar.set_ticks([0.25, 0.5, 1, 2, 4, 8], labels=["0.25", "0.5", "1", "2", "4", "8+"])
    image.colorbar.minorticks_off()


def _spread(trace: SinkTrace) -> list[int]:
    """Choose up to eight layers spread evenly over the depth, first and last included."""
    depth = trace.layer_mass.shape[2]
    return sorted(set(np.linspace(0, depth - 1, min(depth, LAYER_COLUMNS)).round().astype(int).tolist()))


def _absent_as_nan(values: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row column"]:
    """Turn keys that do not exist yet (mass exactly 0) into NaN, which is drawn in light grey."""
    return np.where(values > 0, values, np.nan)


def _plain_ticks(ax: Axes, *, positions: int, rows: np.ndarray) -> None:
    """Label the first and last position and row only: small panels have no room for more."""
    ax.set_xticks([0, positions - 1])
    ax.set_yticks([0, len(rows) - 1], [str(rows[0]), str(rows[-1])])

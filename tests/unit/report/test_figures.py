"""The look of figures: colours, axes, footers, files and animations."""

import io
import itertools
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import LogNorm
from PIL import Image

from lib.core.errors import InputError
from lib.report import animation, canvas, figures, panels
from tests.reporting import begin, line_figure

FOOTER = "notebook 01  |  profile quick  |  seed 0  |  models dlm, ar, smollm2"


@pytest.fixture(autouse=True)
def _close_figures() -> Any:
    yield
    plt.close("all")


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def movie(frames: int = 4, size: int = 8, **options: Any) -> animation.Movie:
    values = np.random.default_rng(0).random((frames, size, size))
    titles = options.pop("titles", [f"step {index} of {frames}" for index in range(frames)])
    return animation.Movie(values, titles, "key", "query", "attention", **options)


def test_colors_are_the_agreed_ones() -> None:
    assert {name: style.color for name, style in figures.MODELS.items()} == {
        "dlm": "#D55E00", "ar": "#0072B2", "smollm2": "#009E73",
    }  # fmt: skip
    assert figures.METHODS["sink-aware"].color == "#D55E00"
    assert figures.METHODS["wanda"].color == "#0072B2"
    assert figures.METHODS["sparsegpt"].color == "#E69F00"
    assert figures.METHODS["ar-sink-preserve"].color == "#009E73"
    assert figures.METHODS["dense"].color == "#000000"


def test_every_method_and_model_has_its_own_color_and_marker() -> None:
    for styles in (figures.METHODS, figures.model_styles(["dlm", "ar", "smollm2", "llada", "dream", "mmada", "own"])):
        for one, other in itertools.combinations(styles.values(), 2):
            assert one.color != other.color
            assert one.marker != other.marker


def test_other_models_keep_their_style_in_any_company() -> None:
    assert figures.model_styles(["dlm", "llada"])["llada"] == figures.model_styles(["llada", "ar", "llada"])["llada"]


def test_style_does_not_depend_on_the_users_settings() -> None:
    fig, _ = line_figure()
    first = canvas.png_bytes(fig)
    plt.rcParams.update({"font.size": 20, "axes.facecolor": "black", "figure.autolayout": True})
    fig, _ = line_figure()
    assert canvas.png_bytes(fig) == first


def test_png_has_200_dpi_and_no_date_or_program() -> None:
    fig, _ = line_figure()
    image = picture(canvas.png_bytes(fig))
    assert image.size == (1000, 500)
    assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    assert set(image.info) == {"dpi"}


@pytest.mark.parametrize("layout", ["single", "maps", "many", "long footer", "endless footer", "common label"])
def test_footer_overlaps_nothing(layout: str) -> None:
    rows, columns = {"maps": (1, 3), "many": (6, 6), "common label": (2, 2)}.get(layout, (1, 1))
    fig, axes = figures.subplots(rows, columns, height=9 if layout == "many" else None)
    flat = np.atleast_1d(np.asarray(axes, dtype=object)).ravel()
    for ax in flat:
        image = figures.heatmap(ax, np.arange(6.0).reshape(2, 3), label="mass", x_label="position", colorbar=False)
    figures.shared_colorbar(image, list(flat), "mass")
    if layout == "common label":
        fig.supxlabel("position")
    canvas.add_footer(fig, FOOTER * {"long footer": 4, "endless footer": 60}.get(layout, 1))
    canvas.png_bytes(fig)
    assert fig.texts[-1].get_text().endswith(" ...") == (layout == "endless footer")
    renderer = fig.canvas.get_renderer()  # type: ignore[attr-defined]
    footer = fig.texts[-1].get_window_extent(renderer)
    assert footer.x1 <= fig.bbox.x1
    assert footer.y0 >= 0
    others = [box for ax in fig.axes if (box := ax.get_tightbbox(renderer)) is not None]
    if layout == "common label":
        label = fig._supxlabel.get_window_extent(renderer)  # type: ignore[attr-defined]
        assert label.y0 >= footer.y1
        assert not any(label.overlaps(box) for box in others)
    assert min(box.y0 for box in others) >= footer.y1


def test_footer_is_not_read_as_mathematics() -> None:
    fig, _ = line_figure()
    canvas.add_footer(fig, "set a=$x, b=$y_{")
    canvas.png_bytes(fig)


def test_figure_without_room_is_refused() -> None:
    fig, _ = figures.subplots(5, 5, width=1, height=0.5)
    with pytest.raises(InputError, match="must have room"):
        canvas.png_bytes(fig)


def test_missing_glyphs_do_not_warn() -> None:
    fig, ax = figures.subplots()
    ax.set_title("\u4e2d\u6587")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas.png_bytes(fig)


def test_heatmap_scales() -> None:
    _, axes = figures.subplots(1, 4)
    difference = figures.heatmap(axes[0], [[-1.0, 3.0]], label="difference", difference=True)
    assert (difference.norm.vmin, difference.norm.vmax) == (-3, 3)
    assert difference.get_cmap().name == "RdBu_r"
    magnitude = figures.heatmap(axes[1], torch.tensor([[0.0, 4.0], [float("nan"), 1.0]]), label="mass")
    assert (magnitude.norm.vmin, magnitude.norm.vmax) == (0, 4)
    assert magnitude.get_cmap().name == "cividis"
    log = figures.heatmap(axes[2], [[0.0, 1e-9, 2.0]], label="mass", log=True)
    assert isinstance(log.norm, LogNorm)
    assert (log.norm.vmin, log.norm.vmax) == pytest.approx((2e-4, 2.0))
    flat = figures.heatmap(axes[3], np.ones((2, 2)), label="mass", limits=(0, 5))
    assert (flat.norm.vmin, flat.norm.vmax) == (0, 5)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_heatmap_of_equal_values_is_drawn(value: float, log: bool) -> None:
    fig, ax = figures.subplots()
    figures.heatmap(ax, np.full((2, 2), value), label="mass", log=log)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas.png_bytes(fig)


def test_colorbar_is_labelled_in_plain_numbers() -> None:
    fig, ax = figures.subplots()
    figures.heatmap(ax, [[0.01, 10.0]], label="sink mass (1 = uniform)", log=True)
    canvas.png_bytes(fig)
    bar = fig.axes[1]
    assert bar.get_ylabel() == "sink mass (1 = uniform)"
    assert {"0.01", "0.1", "1", "10"} <= {label.get_text() for label in bar.get_yticklabels()}


@pytest.mark.parametrize("values", [np.ones(3), np.full((2, 2), np.nan)])
def test_heatmap_refuses_what_cannot_be_drawn(values: np.ndarray) -> None:
    _, ax = figures.subplots()
    with pytest.raises(InputError, match="a heat map must have"):
        figures.heatmap(ax, values, label="x")


def test_mask_ratio_runs_from_one_to_zero() -> None:
    _, (left, right) = figures.subplots(1, 2)
    figures.mask_ratio_axis(left, axis="x")
    figures.mask_ratio_axis(right, axis="y")
    assert left.get_xlim() == (1, 0)
    assert right.get_ylim() == (0, 1)  # bottom is 0: time runs downwards, as in a heat map


def test_marks_follow_time_on_every_kind_of_axis() -> None:
    _, axes = figures.subplots(1, 4)
    figures.mask_ratio_axis(axes[0], axis="x")
    figures.mark_fractions(axes[0], (0.25,), axis="x")
    assert axes[0].lines[0].get_xdata()[0] == 0.75
    axes[1].set_xlim(0, 64)
    figures.mark_fractions(axes[1], (0.25,), axis="x")
    assert axes[1].lines[0].get_xdata()[0] == 16
    figures.heatmap(axes[2], np.ones((64, 3)), label="x", extent=(0, 3, 64, 0), colorbar=False)  # step 0 on top
    figures.mark_fractions(axes[2], (0.25,))
    assert axes[2].lines[0].get_ydata()[0] == 16
    figures.heatmap(axes[3], np.ones((64, 3)), label="x", extent=(0, 3, 0, 1), colorbar=False)  # mask ratio 1 on top
    figures.mark_fractions(axes[3], (0.25,))
    assert axes[3].lines[0].get_ydata()[0] == 0.75


def test_error_bars_reach_the_interval_and_skip_unbounded_ends() -> None:
    _, ax = figures.subplots()
    style = figures.MODELS["dlm"]
    figures.errorbar_points(ax, [0, 1], [1.0, 2.0], [0.5, -np.inf], [2.0, np.inf], style=style, label="dlm")
    segments = ax.containers[0].lines[2][0].get_segments()
    assert segments[0][:, 1].tolist() == [0.5, 2.0]
    assert segments[1][:, 1].tolist() == [2.0, 2.0]


def test_token_labels_show_white_space() -> None:
    assert figures.token_label(" a\n\t") == "␣a\\n\\t"
    fig, ax = figures.subplots()
    ax.set_title(figures.token_label("$x_{$"))
    canvas.png_bytes(fig)


# Animations


def test_animation_has_all_frames_loops_and_is_white_outside() -> None:
    data = animation.gif_bytes(movie(), footer=FOOTER)
    image = picture(data)
    assert image.n_frames == 4  # type: ignore[attr-defined]
    assert image.info["loop"] == 0
    assert image.info["duration"] == animation.FRAME_MS
    shown = []
    for index in range(4):
        image.seek(index)
        shown.append(np.asarray(image.convert("RGB")))
        assert shown[-1][1, 1].tolist() == [255, 255, 255]
    assert all((one != other).any() for one, other in itertools.combinations(shown, 2))
    assert data == animation.gif_bytes(movie(), footer=FOOTER)


def test_animation_moves_nothing_but_map_strip_and_title() -> None:
    masked = np.tri(4, 8, dtype=bool)
    image = picture(animation.gif_bytes(movie(masked=masked), footer=FOOTER))
    first = np.asarray(image.convert("RGB")).astype(int)
    image.seek(3)
    changed = np.abs(np.asarray(image.convert("RGB")).astype(int) - first).sum(axis=2) > 60
    height, width = changed.shape
    assert changed[:, int(width * 0.87) :].sum() == 0  # colour bar and its labels
    assert changed[int(height * 0.92) :].sum() == 0  # axis label and footer
    assert changed[: height // 20].any()  # title


def test_quality_falls_until_the_file_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animation, "QUALITIES", ((60, 64), (40, 32)))
    sharp = animation.gif_bytes(movie(), footer=FOOTER)
    monkeypatch.setattr(animation, "MAX_BYTES", len(sharp) - 1)
    coarse = animation.gif_bytes(movie(), footer=FOOTER)
    assert len(coarse) < len(sharp)
    assert picture(coarse).width < picture(sharp).width


def test_too_large_animation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animation, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="show fewer frames"):
        animation.gif_bytes(movie(), footer=FOOTER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"titles": ["one"]}, "one title a frame, got 1 for 4"),
        ({"frames": 101}, "1 to 100 frames"),
        ({"masked": np.zeros((4, 7), dtype=bool)}, r"must have shape \(4, 8\), got \(4, 7\)"),
    ],
)
def test_animation_parts_must_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        animation.gif_bytes(movie(**options), footer=FOOTER)


def test_nearest_palette_color_is_exact() -> None:
    palette = np.array([[0, 0, 0], [250, 250, 250], [255, 255, 255], [200, 0, 0]])
    pixels = np.array([[[255, 255, 255], [252, 252, 252]], [[190, 10, 0], [3, 2, 1]]])
    assert animation._nearest(pixels, palette).tolist() == [[2, 1], [3, 0]]


# Through a run


def test_run_shows_nothing_outside_a_notebook(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = begin(monkeypatch, tmp_path)
    fig, data = line_figure()
    run.figure("line", fig, data, caption="Mass.")
    frames = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    run.animation("map", frames, titles=["a", "b"], x_label="key", y_label="query", caption="Map.")
    assert capfd.readouterr() == ("", "")
    assert not plt.get_fignums()


def test_broken_figure_data_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path)
    fig, _ = line_figure()
    with pytest.raises(InputError, match="different names"):
        run.figure("line", fig, pd.DataFrame(), caption="Mass.")
    assert not list(tmp_path.glob("figures/**/*.*"))


def test_differences_stand_in_the_row_of_their_name_and_the_panel_of_their_model() -> None:
    """Model n lacks a row and has the rest in another order."""
    rows = [("m", "a - b", 0.1), ("m", "c - d", -0.2), ("m", "e - f", 0.3), ("n", "e - f", 0.4), ("n", "a - b", 0.5)]
    table = pd.DataFrame(rows, columns=pd.Index(["model", "comparison", "gain"]))
    table = table.assign(low=table["gain"] - 0.05, high=table["gain"] + 0.1)
    figure, drawn = panels.differences(table, rows="comparison", value="gain", x_label="gain (nats)")
    assert drawn is table and [ax.get_title() for ax in figure.axes] == ["m", "n"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a - b", "c - d", "e - f"]
    found: list[Any] = [ax.containers[0].lines[0].get_xydata().tolist() for ax in figure.axes]  # type: ignore[attr-defined]
    assert found == [[[0.1, 0], [-0.2, 1], [0.3, 2]], [[0.4, 2], [0.5, 0]]]

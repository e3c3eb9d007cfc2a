"""The figures of notebooks 03 and 04: what is drawn is what the table says, in its look, with units, and nothing is cut off."""

from itertools import combinations, pairwise, product
from math import nan
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.text import Text

from lib.core.errors import InputError
from lib.report import canvas, figures, panels
from lib.studies.pruning import figures as pruning_figures
from lib.studies.pruning import sink_figures
from lib.studies.pruning.figures import DENSE, STYLES, style_of
from lib.studies.pruning.sink_figures import CELL_SHIFTS, CELL_STYLES, CONTROLS, SINK_COLOR, binned_mean

MODELS = ["dlm", "ar", "own"]
pytestmark = pytest.mark.usefixtures("strict_figures")
METHODS = [name for name in STYLES if name != DENSE]
FOOTER = "profile quick; model dlm; seeds 0, 1, 2; 16 windows of 128 tokens; commit 0123456; " * 2
CHANGES = ["noised text", "sink weights", "one-shot", "sum of norms"]


def drawn(figure: Any, *, unit: str = "nats per token") -> list[Axes]:
    """Draw the figure with its footer, and return its axes: units are named, no text is cut off, no legend covers data."""
    canvas.add_footer(figure, FOOTER)
    canvas.png_bytes(figure, dpi=100)
    renderer, page = figure.canvas.get_renderer(), figure.bbox
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert any(unit in text.get_text() for text in texts)
    axes = figure.axes
    gone = [tick for ax in axes for axis in (ax.xaxis, ax.yaxis) for tick in out_of_range(axis)]
    unseen = {id(label) for tick in gone for label in (tick.label1, tick.label2)}
    for text in texts:
        box = text.get_window_extent(renderer)
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
        assert inside or id(text) in unseen, text
    legends = [*figure.legends, *(ax.get_legend() for ax in axes if ax.get_legend())]
    assert not any(legend.get_window_extent(renderer).overlaps(ax.bbox) for legend, ax in product(legends, axes))
    footer = figure.texts[-1].get_window_extent(renderer)
    assert min(ax.get_tightbbox(renderer).y0 for ax in axes) >= footer.y1 - 1
    for ax in axes:
        apart(ax.xaxis, renderer)
        apart(ax.yaxis, renderer)
    return axes


def out_of_range(axis: Axis) -> list[Any]:
    """Ticks beyond the limits: they exist without being drawn."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-6 * (high - low)
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [tick for tick in ticks if not low - slack <= tick.get_loc() <= high + slack]


def apart(axis: Axis, renderer: Any) -> None:
    """Neighbouring numbers of an axis do not run into each other."""
    unseen = {id(tick) for tick in out_of_range(axis)}
    labels = [tick.label1 for tick in axis.get_major_ticks() if id(tick) not in unseen and tick.label1.get_visible()]
    boxes = [label.get_window_extent(renderer) for label in labels if label.get_text()]
    assert not any(first.overlaps(second) for first, second in pairwise(boxes))


def marks(ax: Axes, *, horizontal: bool = True) -> list[tuple[str, str, float, float, float, float, bool]]:
    """All points with intervals: colour, marker, place, estimate, low, high, filled."""
    found = []
    for bar in ax.containers:
        line, _, (segments,) = bar.lines  # type: ignore[attr-defined]
        points = np.asarray(line.get_xydata()).reshape(-1, 2)
        filled = to_hex(line.get_markerfacecolor()) != "#ffffff"
        for (x, y), ends in zip(points, segments.get_segments(), strict=True):
            place, value = (y, x) if horizontal else (x, y)
            low, high = ends[:, 0 if horizontal else 1]
            numbers = (float(place), float(value), float(low), float(high))
            found.append((line.get_color(), line.get_marker(), *numbers, filled))
    return found


def one(ax: Axes, place: float, *, horizontal: bool = True) -> tuple[str, str, float, float, float, bool]:
    """The only point at a place, without the place."""
    (found,) = [(*mark[:2], *mark[3:]) for mark in marks(ax, horizontal=horizontal) if abs(mark[2] - place) < 1e-9]
    return found


def triple(row: Any, value: str) -> Any:
    """Estimate and ends of a row; a missing interval is drawn as a bare point."""
    ends = (row["low"], row["high"]) if np.isfinite(row["low"]) else (row[value], row[value])
    return pytest.approx((row[value], *ends))


def row_names(ax: Axes) -> list[str]:
    """Names at the rows, also where a panel to the left shows them."""
    return ax.yaxis.get_major_formatter().format_ticks([float(tick) for tick in ax.get_yticks()])


def interval(name: str, value: float, *, width: float, bounded: bool) -> dict[str, float]:
    """Ends at unequal distances, so that a swapped pair shows."""
    low, high = (value - width, value + 1.5 * width) if bounded else (nan, nan)
    return {name: value, "low": low, "high": high}


def losses(models: list[str], patterns: list[tuple[str, float]], *, methods: list[str] = METHODS, bounded: bool = True) -> Any:
    """Increases between 0.01 and 5 nats, sparsities not in order."""
    rows = [{"model": name, "method": DENSE, "pattern": "unstructured", "sparsity": 0.0, "loss": 3.0, "increase": 0.0,
             "low": 0.0, "high": 0.0} for name in models]  # fmt: skip
    for (index, name), (pattern, sparsity), (rank, method) in product(enumerate(models), patterns[::-1], enumerate(methods)):
        value = 0.01 * (1 + rank) * (1 + index) * 10 ** (2 * sparsity) + 0.001 * len(pattern)
        rows.append({"model": name, "method": method, "pattern": pattern, "sparsity": sparsity, "loss": 3 + value}
                    | interval("increase", value, width=0.1 * value, bounded=bounded))  # fmt: skip
    return pd.DataFrame(rows)


def test_looks_are_fixed_distinct_and_those_of_the_other_notebooks() -> None:
    assert (style_of("Wanda").color, style_of("Wanda").marker) == ("#0072B2", "s")
    assert style_of("sink-aware (Wanda)").marker == "*"
    assert style_of("sink-aware (SparseGPT)").color == style_of("sink-aware (Wanda)").color == SINK_COLOR
    assert style_of("sink-aware (SparseGPT)").line == "--" and style_of("DWANDA").color == "#56B4E9"
    labels = [*STYLES, *(f"own {index}" for index in range(5))]
    assert len({style_of(label, labels) for label in labels}) == len(labels)
    taken = {style.color for style in STYLES.values()}
    assert not any(style_of(label, labels).color in taken for label in labels[len(STYLES) :])


def test_unknown_methods_get_their_look_by_order_of_appearance() -> None:
    labels = ["Wanda", "own b", "own a", "own b"]
    first = style_of("own b", labels)
    assert first == style_of("anything", ["anything"]) and style_of("own a", labels) != first
    assert style_of("own b", ["own b", "Wanda", "own a"]) == first


@pytest.mark.parametrize("models", [MODELS, ["dlm"]], ids=["models", "one model"])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one window"])
def test_quality_curves(models: list[str], bounded: bool) -> None:
    amounts = [0.3, 0.5, 0.7, 0.8]
    table = losses(models, [*(("unstructured", amount) for amount in amounts), ("2:4", 0.5)], bounded=bounded)
    figure, data = cast(tuple[Any, Any], pruning_figures.quality_curves(table))
    axes = drawn(figure)
    assert set(data["pattern"]) == {"unstructured"} and len(data) == len(table) - len(models) * len(METHODS)
    assert "%" in figure.get_supxlabel()
    for ax, name in zip(axes, models, strict=True):
        curves = ax.lines[1:]  # after the line at 0
        assert ax.get_title() == name and len(curves) == len(METHODS) == len(ax.collections)
        for method in METHODS:
            rows = data[(data["model"] == name) & (data["method"] == method)].sort_values("sparsity")
            style = style_of(method)
            look = (style.color, style.marker, style.line)
            (curve,) = [line for line in curves if (line.get_color(), line.get_marker(), line.get_linestyle()) == look]
            np.testing.assert_allclose(curve.get_xdata(), [30, 50, 70, 80])  # pyright: ignore
            np.testing.assert_allclose(curve.get_ydata(), rows["increase"])  # pyright: ignore
            if bounded:
                border = ax.collections[curves.index(curve)].get_paths()[0].vertices
                assert {*rows["low"], *rows["high"]} <= set(np.asarray(border)[:, 1])
    labels = [text.get_text() for text in axes[-1].get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels[0] == DENSE and set(labels[1:]) == set(METHODS)
    assert axes[0].get_ylim()[1] > np.nanmax(data[["increase", "high"]])


def test_quality_curves_of_an_empty_table_are_refused() -> None:
    with pytest.raises(InputError, match="must have a model to draw"):
        pruning_figures.quality_curves(losses(["dlm"], [])[:0])


@pytest.mark.parametrize(("low", "high"), [(0.0, 5.0), (-5.0, 5.0), (-0.4, 0.6), (0.003, 0.2), (-3.0, 0.0)])
def test_loss_axis_has_plain_numbers_apart_on_both_sides_of_0(low: float, high: float) -> None:
    figure, ax = figures.subplots(height=2.6)
    ax.plot([0, 1], [low, high])
    panels.loss_axis(ax, np.array([[low, high], [nan, np.inf]]))
    canvas.png_bytes(figure, dpi=50)
    ticks = [float(label.replace("−", "-")) for label in row_names(ax)]
    assert ax.get_yscale() == "symlog" and len(ticks) >= 4 and 0 in ticks
    np.testing.assert_allclose(ticks, ax.get_yticks())
    apart(ax.yaxis, figure.canvas.get_renderer())  # type: ignore[attr-defined]
    assert ax.get_ylim()[0] <= low and high <= ax.get_ylim()[1]


def test_loss_axis_of_small_differences_stays_linear() -> None:
    _, ax = figures.subplots()
    panels.loss_axis(ax, np.array([[-0.01, 0.02]]))
    assert ax.get_yscale() == "linear"


@pytest.mark.parametrize("models", [MODELS[:2], ["dlm"]], ids=["models", "one model"])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one window"])
@pytest.mark.parametrize("missing", [0, 2], ids=["all groups", "without two"])
def test_pattern_points(models: list[str], bounded: bool, missing: int) -> None:
    every = {"unstructured 50 %": ("unstructured", 0.5), "4:8": ("4:8", 0.5), "2:4": ("2:4", 0.5),
             "structured 30 %": ("structured", 0.3), "structured 50 %": ("structured", 0.5)}  # fmt: skip
    groups = dict(list(every.items())[missing:])
    table = losses(models, [*groups.values(), ("unstructured", 0.7)], bounded=bounded)
    figure, data = pruning_figures.pattern_points(table)
    axes = drawn(figure)
    assert len(data) == len(groups) * len(models) * len(METHODS)  # neither the dense model nor 70 %
    assert [label.get_text() for label in axes[-1].get_xticklabels()] == list(groups)
    for ax, name in zip(axes, models, strict=True):
        found = marks(ax, horizontal=False)
        assert ax.get_title() == name and len(found) == len(groups) * len(METHODS)
        assert len({mark[2] for mark in found}) == len(found)  # side by side
        for (place, (pattern, sparsity)), method in product(enumerate(groups.values()), METHODS):
            keys = {"model": name, "pattern": pattern, "sparsity": sparsity, "method": method}
            (row,) = panels.select(table, **keys).to_dict("records")
            style = style_of(method)
            (mark,) = [m for m in found if m[:2] == (style.color, style.marker) and abs(m[2] - place) < 0.5]
            assert mark[3:6] == triple(row, "increase")


@pytest.mark.parametrize("models", [MODELS[:2], ["dlm"]], ids=["models", "one model"])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one document"])
def test_task_accuracy(models: list[str], bounded: bool) -> None:
    tasks, methods = {"cloze": 0.25, "copy": nan}, ["Wanda", "sink-aware (Wanda)", "own"]
    table = pd.DataFrame([
        {"model": name, "task": task, "method": method, "sparsity": sparsity, "chance": chance, "dense": 0.6 + 0.1 * index}
        | interval("accuracy", 0.3 + 0.05 * rank + 0.1 * sparsity + 0.02 * index, width=0.04, bounded=bounded)
        for (index, name), (task, chance), (rank, method), sparsity in product(
            enumerate(models), tasks.items(), enumerate(methods), (0.3, 0.5))
    ])  # fmt: skip
    figure, data = cast(tuple[Any, Any], pruning_figures.task_accuracy(table))
    axes = drawn(figure, unit="% of documents")
    assert [ax.get_title() for ax in axes] == [f"{task}, {name}" for task, name in product(tasks, models)]
    names = [f"{method}, {amount}" for method, amount in product(methods, ("30 %", "50 %"))]
    for ax, (task, (index, name)) in zip(axes, product(tasks, enumerate(models)), strict=True):
        assert row_names(ax) == names
        rows = data[(data["model"] == name) & (data["task"] == task)]
        assert len(rows) == len(marks(ax))
        for row in rows.to_dict("records"):
            style = style_of(str(row["method"]), methods)
            color, marker, *numbers, _ = one(ax, names.index(f"{row['method']}, {100 * row['sparsity']:.0f} %"))
            assert (color, marker) == (style.color, style.marker) and tuple(numbers) == triple(row, "accuracy")
        levels = {line.get_linestyle(): line.get_xdata()[0] for line in ax.lines if line.get_color() == "black"}  # pyright: ignore
        assert levels == pytest.approx({"-": 0.6 + 0.1 * index} | ({"--": 0.25} if task == "cloze" else {}))


def test_task_accuracy_has_no_panel_without_answers_and_names_its_rows_beside_the_first() -> None:
    table = pd.DataFrame([
        {"model": name, "task": task, "method": "Wanda", "sparsity": 0.5, "chance": 0.1, "dense": 0.6}
        | interval("accuracy", 0.3, width=0.04, bounded=True)
        for name, task in (("dlm", "add"), ("ar", "facts"), ("ar", "add"))
    ])  # fmt: skip
    figure, _ = cast(tuple[Any, Any], pruning_figures.task_accuracy(table))
    shown = {ax.get_title(): ax.yaxis.get_tick_params()["labelleft"] for ax in figure.axes if ax.get_visible()}
    assert shown == {"add, dlm": True, "add, ar": False, "facts, ar": True}


def effect_table(scale: float, *, bounded: bool) -> Any:
    """Effects of all orders; every other one is significant."""
    names = [(order, " × ".join(group)) for order in (1, 2, 3, 4) for group in combinations(CHANGES, order)]
    return pd.DataFrame([
        {"effect": name, "order": order, "p_holm": 0.01 if place % 2 else 0.05}
        | interval("gain", scale * (place - 4) / order, width=scale, bounded=bounded)
        for place, (order, name) in enumerate(names)
    ])  # fmt: skip


@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one window"])
@pytest.mark.parametrize("scale", [0.03, 1e-5], ids=["large", "tiny"])
def test_attribution(bounded: bool, scale: float) -> None:
    effects = effect_table(scale, bounded=bounded)
    total = interval("gain", 5.5 * scale, width=2 * scale, bounded=bounded)
    figure, data = sink_figures.attribution(effects, total)
    left, right = drawn(figure)
    assert left.get_xlim() == right.get_xlim() and len(data) == 16
    assert [name.split("\n")[0] for name in row_names(left)] == ["released change", *CHANGES]
    assert row_names(left)[0].split("\n")[1] == f"{5.5 * scale:+.2g}" and "−" in row_names(left)[1]
    assert [name.replace("\n", " ") for name in row_names(right)] == list(effects["effect"][4:])
    assert one(left, 0)[2:5] == triple(total, "gain") and one(left, 0)[0] == "#000000"
    rows = effects.to_dict("records")
    for ax, place, row in [(left, 1 + at, rows[at]) for at in range(4)] + [(right, at, rows[4 + at]) for at in range(11)]:
        color, _, *numbers, filled = one(ax, place)
        assert tuple(numbers) == triple(row, "gain")
        assert filled == (row["p_holm"] < 0.05) and (color == SINK_COLOR) == ("sink weights" in row["effect"])


@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one window"])
def test_factorial_cells(bounded: bool) -> None:
    cells = list(product(("clean", "noised"), ("off", "on"), ("sequential", "one-shot"), ("RMS", "sum")))
    order = np.random.default_rng(0).permutation(len(cells))
    table: Any = pd.DataFrame([
        dict(zip(("inputs", "weights", "order", "norm"), cells[at], strict=True))
        | interval("loss", 3 + 0.01 * at, width=0.003, bounded=bounded)
        for at in order
    ])  # fmt: skip
    figure, data = sink_figures.factorial_cells(table)
    (ax,) = drawn(figure)
    assert data is table and len(marks(ax)) == 16 and len(row_names(ax)) == 8
    for row in table.to_dict("records"):
        place = row_names(ax).index(f"{row['inputs']}, {row['order']}, {row['norm']}")
        color, marker, *numbers, _ = one(ax, place + CELL_SHIFTS[row["weights"]])
        style = CELL_STYLES[row["weights"]]
        assert (color, marker) == (style.color, style.marker) and tuple(numbers) == triple(row, "loss")
    joins = [set(line.get_xdata()) for line in ax.lines if line.get_color() == "#999999"]  # pyright: ignore
    assert len(joins) == 8
    for inputs, sequence, norm in product(("clean", "noised"), ("sequential", "one-shot"), ("RMS", "sum")):
        assert set(panels.select(table, inputs=inputs, order=sequence, norm=norm)["loss"]) in joins
    named = {note.get_text(): note.xy for note in ax.texts}  # type: ignore[attr-defined]
    end = 0.0045 if bounded else 0.0
    assert named["Wanda as released"] == pytest.approx((3.0 + end, 0 - 0.17))
    assert named["DWANDA-like"] == pytest.approx((3.08 + end, 4 - 0.17))
    assert named["sink-aware as released"] == pytest.approx((3.15 + end, 7 + 0.17))


def test_factorial_cells_with_one_cell_missing() -> None:
    table = pd.DataFrame({"inputs": ["clean"] * 3, "weights": ["on", "off", "off"], "order": ["sequential"] * 3,
                          "norm": ["RMS", "RMS", "sum"], "loss": [3.0, 3.1, 3.2], "low": 2.9, "high": 3.3})  # fmt: skip
    (ax,) = drawn(sink_figures.factorial_cells(table)[0])
    assert row_names(ax) == ["clean, sequential, RMS", "clean, sequential, sum"] and len(marks(ax)) == 3


@pytest.mark.parametrize("models", [MODELS, ["dlm"]], ids=["models", "one model"])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one window"])
def test_controls(models: list[str], bounded: bool) -> None:
    names = ["own", *(name for name in list(CONTROLS)[::-1] if len(models) > 1 or name != "first positions")]
    table: Any = pd.DataFrame([
        {"model": name, "weighting": weighting} | interval("gain", 0.001 * (place - index), width=0.004, bounded=bounded)
        for (index, name), (place, weighting) in product(enumerate(models), enumerate(names))
        if len(models) == 1 or (name, weighting) != ("ar", "mask tokens")
    ])  # fmt: skip
    figure, data = sink_figures.controls(table)
    axes = drawn(figure)
    order = [*(name for name in CONTROLS if name in names), "own"]
    assert data is table and row_names(axes[0]) == order
    for ax, name in zip(axes, models, strict=True):
        rows = table[table["model"] == name]
        assert ax.get_title() == name and len(marks(ax)) == len(rows) and ax.lines[0].get_xdata()[0] == 0  # pyright: ignore
        for row in rows.to_dict("records"):
            color, _, *numbers, _ = one(ax, order.index(row["weighting"]))
            assert tuple(numbers) == triple(row, "gain")
            assert (color == SINK_COLOR) == (row["weighting"] == "sinks down")


def test_repairs_are_rows_and_masks_their_marks() -> None:
    cells = [*product(("Wanda", "sink-weighted Wanda"), ("mask alone", "refit")), ("ALPS", "its own")]
    table: Any = pd.DataFrame([
        {"model": "dlm", "mask": mask, "repair": repair} | interval("increase", 0.1 * place, width=0.01, bounded=True)
        for place, (mask, repair) in enumerate(cells)
    ])  # fmt: skip
    figure, data = sink_figures.repairs(table)
    (ax,) = drawn(figure)
    assert data is table and row_names(ax) == ["mask alone", "refit", "its own"]
    assert len(marks(ax)) == len(table)


@pytest.mark.parametrize("count", [1, 2, 5], ids=["one factor", "two", "all"])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one window"])
def test_dose(count: int, bounded: bool) -> None:
    settings = {"threshold k": ["3", "1", "0.5", "2"], "epsilon": ["0.001", "0.01"], "alpha": ["5", "10", "20"],
                "noise levels": ["1", "2", "4", "8"], "times": ["uniform", "late half"]}  # fmt: skip
    factors = list(settings)[:count]
    rows = [
        {"factor": factor, "setting": text, "share": nan if factor == "times" else 2.5 * place, "released": place == 1}
        | interval("gain", 0.002 * (place - 1), width=0.003, bounded=bounded)
        for factor in factors
        for place, text in enumerate(settings[factor])
    ]
    table: Any = pd.DataFrame(rows)
    figure, data = sink_figures.dose(table)
    axes = drawn(figure)
    assert data is table and len({ax.get_xlim() for ax in axes}) == 1
    for ax, factor in zip(axes, factors, strict=True):
        mine = [row for row in rows if row["factor"] == factor]
        assert ax.get_title(loc="left").startswith(factor)
        assert ax.get_title(loc="left") == factor
        shares = [f" ({row['share']:g} % out)" if np.isfinite(row["share"]) else "" for row in mine]
        assert row_names(ax) == [f"{row['setting']}{share}" for row, share in zip(mine, shares, strict=True)]
        for place, row in enumerate(mine):
            *_, value, low, high, filled = one(ax, place)
            assert (value, low, high) == triple(row, "gain") and filled != row["released"]


@pytest.mark.parametrize("layers", [3, 20])
def test_mask_overlap(layers: int) -> None:
    roles = ["down", "q", "o"]
    table: Any = pd.DataFrame([
        {"layer": layer, "role": role, "jaccard": 0.9 + 0.01 * place - 0.002 * layer}
        for layer, (place, role) in product(reversed(range(layers)), enumerate(roles))
    ])  # fmt: skip
    table.loc[(table["layer"] == 1) & (table["role"] == "o"), "jaccard"] = nan
    figure, data = sink_figures.mask_overlap(table)
    ax = drawn(figure, unit="Jaccard overlap")[0]
    assert data is table and [label.get_text() for label in ax.get_xticklabels()] == ["q", "o", "down"]
    (image,) = ax.images
    values: Any = image.get_array()
    for layer, (column, (place, role)) in product(range(layers), enumerate([(1, "q"), (2, "o"), (0, "down")])):
        gone = layer == 1 and role == "o"
        assert values.mask[layer, column] == gone
        assert gone or values[layer, column] == pytest.approx(0.9 + 0.01 * place - 0.002 * layer)
    assert len(ax.texts) == (3 * layers - 1 if layers == 3 else 0)
    assert image.get_clim() == pytest.approx((np.nanmin(table["jaccard"]), np.nanmax(table["jaccard"])))
    whole, _ = sink_figures.mask_overlap(table, limits=(0.0, 1.0))
    assert whole.axes[0].images[0].get_clim() == (0, 1)


@given(st.integers(1, 300), st.integers(0, 2**16))
def test_binned_means_against_a_loop(size: int, seed: int) -> None:
    share, net = np.random.default_rng(seed).normal(size=(2, size))
    pairs = [(float(a), float(b)) for a, b in zip(share, net, strict=True)]
    middles, means = binned_mean(share, net)
    ranked = sorted(pairs, key=lambda pair: pair[0])
    bins = min(12, max(1, len(pairs) // 20))
    assert len(means) == bins
    start = 0
    for at in range(bins):
        count = len(pairs) // bins + (at < len(pairs) % bins)
        part = ranked[start : start + count]
        assert middles[at] == pytest.approx(np.median([pair[0] for pair in part]))
        assert means[at] == pytest.approx(sum(pair[1] for pair in part) / count)
        start += count


@pytest.mark.parametrize("roles", [["q", "k", "v", "o", "gate", "up", "down"], ["down"]], ids=["roles", "one role"])
@pytest.mark.parametrize("channels", [1, 90])
def test_channel_energy(roles: list[str], channels: int) -> None:
    stream = np.random.default_rng(0)
    table: Any = pd.concat([
        pd.DataFrame({"layer": layer, "role": role, "channel": range(channels), "share": 10 ** -(3 * stream.random(channels)),
                      "net": (1 + place) * stream.normal(size=channels)})
        for layer, (place, role) in product(range(2), enumerate(roles[::-1]))
    ], ignore_index=True)  # fmt: skip
    table.loc[0, "share"] = 0.0
    figure, data = sink_figures.channel_energy(table)
    axes = drawn(figure, unit="% of the channel")
    assert len(data) == len(table) - 1 and "share" in figure.get_supxlabel()
    scales = set()
    for ax, role in zip(axes, roles, strict=False):
        rows = data[data["role"] == role]
        (cells,) = ax.collections
        assert ax.get_title() == role and ax.get_xscale() == "log" and np.sum(cells.get_array()) == len(rows)  # pyright: ignore
        np.testing.assert_allclose(ax.lines[1].get_xydata(), np.transpose(binned_mean(*rows[["share", "net"]].to_numpy().T)))  # pyright: ignore
        scales.add(cells.get_clim())
    assert len(scales) == 1  # one colour means one number everywhere


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one window"])
def test_extensions(count: int, bounded: bool) -> None:
    variants = {"A: phases": ["early", "late", "phases merged by their maximum over all of the steps"],
                "B: layers": ["by sink mass"], "C: instability": ["variance", "presence"]}  # fmt: skip
    names = list(variants)[:count]
    rows = [
        {"extension": name, "variant": text} | interval("gain", 0.002 * (place - 1), width=0.003, bounded=bounded)
        for name in names
        for place, text in enumerate(variants[name])
    ]
    table: Any = pd.DataFrame(rows[::-1])
    figure, data = sink_figures.extensions(table)
    axes = drawn(figure)
    assert data is table and len({ax.get_xlim() for ax in axes}) == 1
    for ax, name in zip(axes, reversed(names), strict=True):
        mine = [row for row in rows[::-1] if row["extension"] == name]
        assert ax.get_title(loc="left") == name
        assert [label.replace("\n", " ") for label in row_names(ax)] == [row["variant"] for row in mine]
        assert [one(ax, place)[2:5] for place in range(len(mine))] == [triple(row, "gain") for row in mine]


@pytest.mark.parametrize("scale", [1.0, 0.01], ids=["large", "small"])
@pytest.mark.parametrize("bounded", [True, False], ids=["intervals", "one window"])
@pytest.mark.parametrize("count", [1, 4])
def test_gain_by_sparsity(scale: float, bounded: bool, count: int) -> None:
    pairs = {"sink-aware (Wanda) - Wanda": "sink-aware (Wanda)", "DWANDA - Wanda": "DWANDA",
             "sink-aware (SparseGPT) - SparseGPT": "sink-aware (SparseGPT)", "sink-aware (Wanda) - DWANDA": None}  # fmt: skip
    names = list(pairs)[:count]
    table: Any = pd.DataFrame([
        {"pair": pair, "sparsity": sparsity}
        | interval("gain", scale * (sparsity - 0.5 + 0.1 * place), width=0.02 * scale, bounded=bounded)
        for (place, pair), sparsity in product(enumerate(names), (0.7, 0.3, 0.5))
    ])  # fmt: skip
    figure, data = sink_figures.gain_by_sparsity(table)
    (ax,) = drawn(figure)
    assert data is table and "%" in ax.get_xlabel() and ax.get_yscale() == ("symlog" if scale == 1 else "linear")
    found, looks = marks(ax, horizontal=False), set()
    for place, pair in enumerate(names):
        rows = table[table["pair"] == pair].sort_values("sparsity").to_dict("records")
        mine = found[3 * place : 3 * place + 3]
        assert [mark[3:6] for mark in mine] == [triple(row, "gain") for row in rows]
        np.testing.assert_allclose([mark[2] for mark in mine], [30, 50, 70], atol=1)
        looks.add(mine[0][:2])
        method = pairs[pair]
        assert method is None or mine[0][:2] == (style_of(method).color, style_of(method).marker)
    assert len(looks) == count

"""What a sweep would do, as lines of text: cells, rows, hours, memory, disk, what is there already and what cannot be had."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import pandas as pd

from lib.core import runtime
from lib.core.config import Config
from lib.core.settings.grid import Grid
from lib.evaluation import tasks
from lib.grid import availability, cells, costs
from lib.grid.availability import Found
from lib.grid.cells import Cell, Variant
from lib.grid.costs import Cost, Shape
from lib.grid.work import SAMPLES_AT_ONCE
from lib.texts import corpora

HOUR = 3600.0
GIGABYTE = 1e9
RELEASED_ITEMSIZE = 2  # checkpoints on the hub are in bfloat16
GPU_TERAFLOPS = 300.0  # assumed where models want a GPU and there is none: about a third of an H100's peak in bfloat16
WANTS_GPU = 1e9  # weights


@dataclass(frozen=True)
class Speed:
    """Operations a second (10^12), where the number comes from, and bytes of a weight there."""

    teraflops: float
    origin: str
    itemsize: int


@dataclass(frozen=True)
class Plan:
    """A priced grid.

    Attributes:
        cells: all of them, with the ids that the store knows them by.
        finished: ids that the store holds.
        shapes: by model; a model whose shape is not known has none, and no price.
        speed: of the estimate.
        models, data: where checkpoints, corpora and the data of tasks are.
    """

    cells: Mapping[str, Cell] = field(repr=False)
    finished: frozenset[str]
    shapes: Mapping[str, Shape]
    speed: Speed
    models: Mapping[str, Found]
    data: Mapping[str, Found]

    @property
    def missing(self) -> dict[str, str]:
        """What cannot be had, and why."""
        return {name: it.reason for name, it in {**self.models, **self.data}.items() if it.state == "cannot be had"}


def make(config: Config, *, code: str, finished: Iterable[str], grid: Grid) -> Plan:
    """Price every cell of the grid; nothing but configurations is downloaded.

    Args:
        config: a profile with a grid.
        code: version of the code, `cells.code_version`.
        finished: ids in the store.
        grid: the profile's.

    Raises:
        InputError: see `cells.expand`.
    """
    named = {cell.spec(code=code)["id"]: cell for cell in cells.expand(config)}
    sources = {**grid.models, **grid.references}
    shapes = {name: shape for name, source in sources.items() if (shape := costs.shape_of(source)) is not None}
    models = {name: availability.checkpoint(source) for name, source in sources.items()}
    found = frozenset(finished).intersection(named)
    return Plan(named, found, shapes, _speed(config, grid, shapes), models, _data(grid, list(named.values())))


def hours(plan: Plan) -> float:
    """Return the hours of what is open."""
    open_cells = [cell for key, cell in plan.cells.items() if key not in plan.finished]
    return sum(_hours(plan, cell) for cell in open_cells) + sum(_pruning_hours(plan, one) for one in cells.groups(open_cells))


def missing_of_core(plan: Plan, own: Sequence[Cell]) -> list[str]:
    """Say what some cells need that cannot be had."""
    needed = {name for cell in own for name in (cell.variant.model, cell.task)}
    needed |= {cell.variant.calibration.corpus for cell in own if cell.variant.calibration is not None}
    return [_not_had(name, reason) for name, reason in plan.missing.items() if name in needed]


def lines(plan: Plan, grid: Grid, *, itemsize: int, gpus: float = 1) -> list[str]:
    """Return the plan as text.

    Args:
        plan: a priced grid.
        grid: its settings.
        itemsize: bytes of a weight.
        gpus: of one cell, for weights that are spread over them.
    """
    variants = len({cell.variant for cell in plan.cells.values()})
    head = [
        f"{len(plan.cells)} cells on {variants} variants of {len(plan.shapes)} models: {len(plan.finished)} finished, "
        f"{len(plan.cells) - len(plan.finished)} to compute",
        f"speed: {plan.speed.teraflops:.3g} TFLOP/s, {plan.speed.origin}; "
        f"{_short(hours(plan))} hours of one such device for what is open",
        "",
    ]
    body = [
        by_model(plan, grid),
        by_memory(plan, grid, itemsize=itemsize, gpus=gpus),
        by_task(plan, grid),
        by_method(plan, grid, itemsize=itemsize, gpus=gpus),
        by_data(plan),
    ]
    text = [line for table in body for line in (*table.to_string(index=False).splitlines(), "")]
    notes = [_not_had(name, reason) for name, reason in plan.missing.items()]
    assumed = "a forward passes one batch; tokens of a text are round assumptions; hours leave out head and attention scores"
    return [*head, *text, *notes, *([""] if notes else []), assumed]


def by_model(plan: Plan, grid: Grid) -> pd.DataFrame:
    """Tabulate the work by model: variants, cells, rows, forwards and hours, finished ones included."""
    rows = []
    for name, shape in plan.shapes.items():
        own = {key: cell for key, cell in plan.cells.items() if cell.variant.model == name}
        of_model, costed = _of(plan, name), [costs.measuring(cell) for cell in own.values()]
        passes = [costs.pruning(one) for one in of_model]
        forwards = sum(it.forwards(grid.batch_size) for it in costed) + sum(it.forwards(_samples(grid)) for it in passes)
        rows.append({
            "model": name,
            "billion weights": _short(shape.weights / 1e9),
            "variants": len(of_model),
            "cells": len(own),
            "finished": len(plan.finished & own.keys()),
            "million rows": _short(sum(it.rows for it in (*costed, *passes)) / 1e6),
            "million forwards": _short(forwards / 1e6),
            "hours": _short(sum(_hours(plan, cell) for cell in own.values()) + sum(_pruning_hours(plan, it) for it in of_model)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def by_memory(plan: Plan, grid: Grid, *, itemsize: int, gpus: float) -> pd.DataFrame:
    """Tabulate by model where its checkpoint is, and what its dearest cell and its files take."""
    peak_of = f"GB on each of {gpus:g} GPUs" if grid.weights == "spread" and gpus > 1 else "GB on the device"
    rows = []
    for name, shape in plan.shapes.items():
        found, of_model = plan.models[name], _of(plan, name)
        pruned = [one for one in of_model if one.options is not None]
        size = RELEASED_ITEMSIZE * shape.weights if found.size is None else found.size
        fetched = {"to be fetched": size if found.missing is None else found.missing}.get(found.state, 0)
        row = {
            "model": name,
            "checkpoint": found.state,
            "GB to fetch": _gigabytes(fetched),
            peak_of: _gigabytes(max(_peak(one, shape, grid, itemsize=itemsize, gpus=gpus) for one in of_model)),
        }
        if grid.states != "device":
            states = max(costs.states_bytes(one, shape, itemsize=itemsize) for one in of_model)
            row[f"GB of states ({grid.states})"] = _gigabytes(states)
        row["GB of checkpoint"] = _gigabytes(size)
        kept = sum(costs.kept_bytes(one, shape, itemsize=itemsize) for one in pruned)
        row["GB of kept variants"] = _gigabytes(kept if grid.keep_weights else 0)
        rows.append(row)
    return pd.DataFrame(rows)


def by_task(plan: Plan, grid: Grid) -> pd.DataFrame:
    """Tabulate what one cell of each task costs on the first model, and how many there are."""
    rows = []
    for task in dict.fromkeys(cell.task for cell in plan.cells.values()):
        own = [cell for cell in plan.cells.values() if cell.task == task]
        known = next((cell for cell in own if cell.variant.model in plan.shapes), own[0])
        cost = costs.measuring(known)
        rows.append({
            "task": task,
            "cells": len(own),
            "rows of a cell": f"{cost.rows:,.0f}",
            "forwards of a cell": f"{cost.forwards(grid.batch_size):,}",
            "tokens of a row": _short(cost.tokens / max(cost.rows, 1)),
            "hours of a cell": _short(_hours(plan, known)),
            "on": known.variant.model,
        })  # fmt: skip
    return pd.DataFrame(rows)


def by_method(plan: Plan, grid: Grid, *, itemsize: int, gpus: float) -> pd.DataFrame:
    """Tabulate what a pruned model of each method takes where it takes most: passes, hours, memory of a cell, and files."""
    dearest: dict[str, tuple[float, Variant]] = {}
    for one in cells.groups(list(plan.cells.values())):
        what = f"{one.method}, structured" if one.pattern == cells.STRUCTURED_PATTERN else one.method
        hours = _pruning_hours(plan, one)
        if what not in dearest or hours > dearest[what][0]:
            dearest[what] = hours, one
    rows = []
    for what, (hours, one) in dearest.items():
        passes, shape = costs.pruning(one), plan.shapes.get(one.model)
        rows.append({
            "method": what,
            "calibration rows": f"{passes.rows:,.0f}",
            "forwards": f"{passes.forwards(_samples(grid)):,}",
            "hours": _short(hours),
            "GB on the device": _gigabytes(_peak(one, shape, grid, itemsize=itemsize, gpus=gpus)) if shape else "unknown",
            "GB of its files": _gigabytes(costs.kept_bytes(one, shape, itemsize=itemsize)) if shape and one.options else "0",
            "on": one.model,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _peak(variant: Variant, shape: Shape, grid: Grid, *, itemsize: int, gpus: float) -> int:
    """Return the estimated bytes on a device while a variant is pruned and measured."""
    how = {"batch_size": grid.batch_size, "weights": grid.weights, "states": grid.states, "itemsize": itemsize}
    return costs.memory_bytes(variant, shape, gpus=gpus, **how)


def by_data(plan: Plan) -> pd.DataFrame:
    """Tabulate where the corpora and the data of tasks are."""
    return pd.DataFrame([{"data": name, "state": found.state} for name, found in plan.data.items()])


def _data(grid: Grid, priced: Sequence[Cell]) -> dict[str, Found]:
    """Look for every corpus that calibrates or measures the loss, and for every benchmark."""
    rows = None if grid.rows is None else cells.rows_folder(grid)
    tasks_here = list(dict.fromkeys(cell.task for cell in priced))
    read = dict.fromkeys((text.corpus, "train") for cell in priced if (text := cell.variant.calibration) is not None)
    read |= {("wikitext2", "test"): None} if cells.LOSS in tasks_here else {}
    found: dict[str, Found] = {}
    for name in dict.fromkeys(corpus for corpus, _ in read):
        splits = cast(list[corpora.Split], [split for corpus, split in read if corpus == name])
        found[name] = availability.corpus(cast(corpora.Corpus, name), rows, splits)
    for task in tasks_here:
        if task != cells.LOSS:
            is_here = rows is not None or task in tasks.local_names()
            found[task] = Found("here") if is_here else availability.benchmark(task)
    return found


def _of(plan: Plan, model: str) -> list[Variant]:
    return [one for one in cells.groups(list(plan.cells.values())) if one.model == model]


def _samples(grid: Grid) -> int:
    """Calibration windows of a forward pass."""
    return min(SAMPLES_AT_ONCE, grid.batch_size)


def _not_had(name: str, reason: str) -> str:
    return f"cannot be had now, recorded as not tested: {name} ({reason})"


def _gigabytes(size: float) -> str:
    return _short(size / GIGABYTE)


def _hours(plan: Plan, cell: Cell) -> float:
    return _seconds(plan, cell.variant, costs.measuring(cell)) / HOUR


def _pruning_hours(plan: Plan, variant: Variant) -> float:
    return _seconds(plan, variant, costs.pruning(variant)) / HOUR


def _seconds(plan: Plan, variant: Variant, cost: Cost) -> float:
    shape = plan.shapes.get(variant.model)
    return 0.0 if shape is None else cost.seconds(shape, teraflops=plan.speed.teraflops)


def _speed(config: Config, grid: Grid, shapes: Mapping[str, Shape]) -> Speed:
    """Take the stated speed, measure one block of the first model here, or assume a GPU where one is wanted and none is there."""
    device = runtime.choose_device(config)
    large = device.device.type == "cpu" and any(shape.weights >= WANTS_GPU for shape in shapes.values())
    itemsize = RELEASED_ITEMSIZE if large else device.dtype.itemsize
    if grid.teraflops is not None or not shapes:
        origin = "as grid.teraflops says" if grid.teraflops else "assumed: no model is known"
        return Speed(grid.teraflops or 1.0, origin, itemsize)
    if large:
        origin = "assumed for a GPU of 80 GB, as this machine has none (--set grid.teraflops=... says another)"
        return Speed(GPU_TERAFLOPS, origin, itemsize)
    name, shape = next(iter(shapes.items()))
    speed = costs.measured_teraflops(shape, device=device.device, dtype=device.dtype)
    return Speed(speed, f"measured with a block of {name} on {runtime.describe_device(device)}", itemsize)


def _short(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"

"""What a sweep would do, as lines of text: cells, rows, hours, memory, disk, what is there already and what cannot be had."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pandas as pd

from lib import cells, checkpoints, costs, runtime, standins, tasks
from lib.cells import Cell, Variant
from lib.config import Config, ModelSource
from lib.costs import Cost, Shape
from lib.sections import Grid

HOUR = 3600.0
GIGABYTE = 1e9


@dataclass(frozen=True)
class Speed:
    """Operations a second (10^12), and where the number comes from."""

    teraflops: float
    origin: str


@dataclass(frozen=True)
class Plan:
    """A priced grid.

    Attributes:
        cells: all of them, with the ids that the store knows them by.
        finished: ids that the store holds.
        shapes: by model; a model whose shape is not known has none, and no price.
        speed: of the estimate.
        missing: what cannot be had, and why.
    """

    cells: Mapping[str, Cell] = field(repr=False)
    finished: frozenset[str]
    shapes: Mapping[str, Shape]
    speed: Speed
    missing: Mapping[str, str]


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
    missing = {name: reason for name, source in sources.items() if (reason := _absent(source))}
    if grid.rows is None:
        missing |= {task: reason for task in dict.fromkeys(cell.task for cell in named.values()) if (reason := _no_data(task))}
    return Plan(named, frozenset(finished).intersection(named), shapes, _speed(config, grid, shapes), missing)


def lines(plan: Plan, grid: Grid, *, itemsize: int) -> list[str]:
    """Return the plan as text.

    Args:
        plan: a priced grid.
        grid: its settings.
        itemsize: bytes of a weight.
    """
    variants = len({cell.variant for cell in plan.cells.values()})
    open_cells = [cell for key, cell in plan.cells.items() if key not in plan.finished]
    hours = sum(_hours(plan, cell) for cell in open_cells) + sum(_pruning_hours(plan, one) for one in cells.groups(open_cells))
    head = [
        f"{len(plan.cells)} cells on {variants} variants of {len(plan.shapes)} models: {len(plan.finished)} finished, "
        f"{len(open_cells)} to compute",
        f"speed: {plan.speed.teraflops:.3g} TFLOP/s, {plan.speed.origin}; {hours:,.3g} hours of one such device for what is open",
        "",
    ]
    body = [by_model(plan, grid, itemsize=itemsize), by_task(plan), by_method(plan)]
    text = [line for table in body for line in (*table.to_string(index=False).splitlines(), "")]
    notes = [f"cannot be had now, recorded as not tested: {name} ({reason})" for name, reason in plan.missing.items()]
    assumed = "tokens of a text are round assumptions; head and attention scores are left out of the hours"
    return [*head, *text, *notes, *([""] if notes else []), assumed]


def by_model(plan: Plan, grid: Grid, *, itemsize: int) -> pd.DataFrame:
    """Tabulate the grid by model."""
    rows = []
    for name, shape in plan.shapes.items():
        own = {key: cell for key, cell in plan.cells.items() if cell.variant.model == name}
        of_model = cells.groups(list(own.values()))
        streamed = grid.weights == "streamed"
        peak = max(
            costs.memory_bytes(one, shape, batch_size=grid.batch_size, streamed=streamed, itemsize=itemsize) for one in of_model
        )
        kept = (len(of_model) - 1) * shape.weights * itemsize if grid.keep_weights else 0
        rows.append({
            "model": name,
            "billion weights": _short(shape.weights / 1e9),
            "variants": len(of_model),
            "cells": len(own),
            "finished": len(plan.finished & own.keys()),
            "million rows": _short(sum(costs.measuring(cell).rows for cell in own.values()) / 1e6),
            "hours": _short(sum(_hours(plan, cell) for cell in own.values()) + sum(_pruning_hours(plan, it) for it in of_model)),
            "peak memory GB": _short(peak / GIGABYTE),
            "disk GB": _short((kept + shape.weights * itemsize) / GIGABYTE),
        })  # fmt: skip
    return pd.DataFrame(rows)


def by_task(plan: Plan) -> pd.DataFrame:
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
            "tokens of a row": _short(cost.tokens / max(cost.rows, 1)),
            "hours of a cell": _short(_hours(plan, known)),
            "on": known.variant.model,
        })  # fmt: skip
    return pd.DataFrame(rows)


def by_method(plan: Plan) -> pd.DataFrame:
    """Tabulate what pruning by each method costs, at its dearest."""
    dearest: dict[str, tuple[float, Variant]] = {}
    for one in cells.groups(list(plan.cells.values())):
        what = f"{one.method}, structured" if one.pattern == cells.STRUCTURED_PATTERN else one.method
        hours = _pruning_hours(plan, one)
        if what not in dearest or hours > dearest[what][0]:
            dearest[what] = hours, one
    rows = []
    for what, (hours, one) in dearest.items():
        passes = costs.pruning(one)
        rows.append({"method": what, "calibration rows": f"{passes.rows:,.0f}", "hours": _short(hours), "on": one.model})
    return pd.DataFrame(rows)


def _hours(plan: Plan, cell: Cell) -> float:
    return _seconds(plan, cell.variant, costs.measuring(cell)) / HOUR


def _pruning_hours(plan: Plan, variant: Variant) -> float:
    return _seconds(plan, variant, costs.pruning(variant)) / HOUR


def _seconds(plan: Plan, variant: Variant, cost: Cost) -> float:
    shape = plan.shapes.get(variant.model)
    return 0.0 if shape is None else cost.seconds(shape, teraflops=plan.speed.teraflops)


def _speed(config: Config, grid: Grid, shapes: Mapping[str, Shape]) -> Speed:
    """Take the stated speed, or measure one block of the first model here."""
    if grid.teraflops is not None or not shapes:
        return Speed(grid.teraflops or 1.0, "as grid.teraflops says" if grid.teraflops else "assumed: no model is known")
    name, shape = next(iter(shapes.items()))
    device = runtime.choose_device(config)
    speed = costs.measured_teraflops(shape, device=device.device, dtype=device.dtype)
    return Speed(speed, f"measured with a block of {name} on {runtime.describe_device(device)}")


def _absent(source: ModelSource) -> str:
    """Say why a checkpoint cannot be had; nothing when it is here or can be fetched."""
    if checkpoints.is_local(source):
        return ""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source.source, "config.json", revision=source.revision), str):
        return ""
    return _refused(source.source, "model")


def _no_data(task: str) -> str:
    """Say why the data of an official task cannot be fetched."""
    if task == cells.LOSS or task in tasks.local_names():
        return ""
    from huggingface_hub import try_to_load_from_cache

    name = standins.dataset(task)
    cached = try_to_load_from_cache(name, "README.md", repo_type="dataset")  # datasets fetches it with the rows
    return "" if isinstance(cached, str) else _refused(name, "dataset")


def _refused(name: str, kind: str) -> str:
    """Ask the hub whether a repository may be read."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().auth_check(name, repo_type=kind)
    except GatedRepoError:
        return f"{name} is gated: accept its terms on the hub and log in"
    except OfflineModeIsEnabled:
        return f"{name} is not in the cache, and the hub is switched off by HF_HUB_OFFLINE"
    except (HfHubHTTPError, OSError) as error:
        return f"{name}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return ""


def _short(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"

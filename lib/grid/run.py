"""The experiment grid of a profile: its store, its groups of cells, a plan of it, and running it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from lib.core import runtime
from lib.core.config import ROOT, Config, cells_root
from lib.core.errors import InputError, require
from lib.core.settings.grid import Grid
from lib.grid import cells, engine, plan
from lib.grid.cells import Cell, Variant
from lib.grid.core import expansion, listing, verdicts
from lib.grid.engine import Summary
from lib.grid.group import Group

Say = Callable[[str], None]
WORK = "lib.grid.work:work"


@dataclass(frozen=True)
class Engine:
    """What runs the cells.

    Attributes:
        jobs: groups of cells at one time; None for as many as get their GPUs, or one on CPUs: its cores then work together.
        ray: address of a Ray cluster, `"auto"` for the one that this machine belongs to; None starts Ray on this machine alone.
        gpus_per_cell: GPUs of a process, which sees no others; a part of one shares it. None is 1, or all of this machine for
            weights that are spread over them.
        retry: run again what has failed.
    """

    jobs: int | None = None
    ray: str | None = None
    gpus_per_cell: float | None = None
    retry: bool = False


def show(config: Config, chosen: Engine | None = None, *, say: Say) -> None:
    """Say what a run would compute and cost, and what is there already; downloads no weights and no data.

    Args:
        config: a profile with a grid.
        chosen: what would run the cells; the default one when None.
        say: takes each line.

    Raises:
        InputError: no grid, or settings that cannot be used.
    """
    grid, store = settings(config), cells.store_of(config)
    code, finished = cells.code_version(ROOT), store.ids()
    made = plan.make(config, code=code, finished=finished, grid=grid)
    if grid.core is not None:
        for line in _core_lines(config, made, grid, code=code, finished=finished):
            say(line)
        if grid.scope == "core":
            say("")
            say(f"the rest of the grid, --set grid.scope=all: {len(made.cells):,} cells, {plan.hours(made):,.0f} hours of it")
            return
        say("")
    gpus = gpus_per_cell(config, chosen or Engine())
    for line in plan.lines(made, grid, itemsize=made.speed.itemsize, gpus=gpus):
        say(line)


def _core_lines(config: Config, made: plan.Plan, grid: Grid, *, code: str, finished: Sequence[str]) -> list[str]:
    """Return the plan of the core, its verdicts so far, and what it needs that cannot be had."""
    core, missing = expansion.core_of(config), plan.missing_of_core(made, expansion.cells_of(config))
    shape = made.shapes.get(core.model)
    if shape is None:
        return [f"core: no shape of {core.model} is known, so it has no price"]
    how = {"teraflops": made.speed.teraflops, "itemsize": made.speed.itemsize, "finished": finished, "code": code}
    priced = listing.Priced(expansion.turns(config), core, grid, shape, **how)
    found = verdicts.of_profile(config)
    said = verdicts.lines(found, config) if any(record is not None for record in found.values()) else []
    return [*listing.lines(priced, origin=made.speed.origin), *missing, *said]


def run(config: Config, chosen: Engine, *, say: Say) -> Summary:
    """Compute every cell that the store lacks.

    Args:
        config: a profile with a grid.
        chosen: what runs the cells.
        say: takes lines of progress.

    Returns:
        How many cells are done, failed, and not tested.

    Raises:
        InputError: no grid, settings that cannot be used, or a damaged store.
    """
    grid, store = settings(config), cells.store_of(config)
    done = engine.run(
        groups(config, grid),
        store=store,
        work=WORK,
        batch_size=grid.batch_size,
        say=say,
        jobs=chosen.jobs,
        address=chosen.ray,
        gpus_per_group=gpus_per_cell(config, chosen),
        keep_failed=not chosen.retry,
    )
    if grid.core is not None:
        for line in verdicts.lines(verdicts.of_profile(config), config):
            say(line)
    return done


def settings(config: Config) -> Grid:
    """Return the grid of a profile.

    Raises:
        InputError: it has none.
    """
    if config.grid is None:
        raise InputError(f"a profile must have a grid for this, got {config.profile} without one: use paper or rehearsal")
    return config.grid


def groups(config: Config, grid: Grid) -> list[Group]:
    """Return the cells of a grid as the engine takes them, grouped by their weights: the core in its order, then the rest."""
    code = cells.code_version(ROOT)
    turns = expansion.turns(config)
    found = [_group(turn.variant, turn.cells, config, grid, code=code, turn=f" round {turn.round}") for turn in turns]
    if not turns or grid.scope == "all":
        known = {cell["id"] for group in found for cell in group.cells}  # the loss of a variant is in both
        rest = [_group(one, own, config, grid, code=code) for one, own in cells.groups(cells.expand(config)).items()]
        rest = [replace(group, cells=tuple(cell for cell in group.cells if cell["id"] not in known)) for group in rest]
        found += [group for group in rest if group.cells]
    return found


def _group(variant: Variant, found: Sequence[Cell], config: Config, grid: Grid, *, code: str, turn: str = "") -> Group:
    key, device = cells.variant_key(variant, code=code), runtime.choose_device(config)
    keep = grid.keep_weights if not turn or grid.core is None else grid.core.keep_weights
    kept = cells_root() / "runs" / config.profile / "weights" / key if keep else None
    place = {
        "source": asdict(variant.source),
        "device": device.device.type,
        "dtype": str(device.dtype).removeprefix("torch."),
        "kept": None if kept is None else str(kept),
        "weights": grid.weights,
        "states": grid.states,
        "rows": None if grid.rows is None else str(cells.rows_folder(grid)),
    }
    specs = tuple(cell.spec(code=code) for cell in found)
    shared = {"variant": cells.to_plain(variant), "place": place, "label": variant.label}
    return Group(key=f"{key}{turn}", cells=specs, shared=shared, lane=key)


def gpus_per_cell(config: Config, chosen: Engine) -> float:
    """Return how many GPUs a process gets; none when the profile computes on the CPU.

    Args:
        config: a profile with a grid.
        chosen: what runs the cells.

    Raises:
        InputError: more than this machine has, where no cluster is named.
    """
    asked, here = chosen.gpus_per_cell, _gpus()
    if chosen.ray is None and asked is not None:
        rule, remedy = f"GPUs of a cell must be at most the {here} of this machine", "lower --gpus-per-cell, or name a cluster"
        require(asked <= here, rule, f"{asked:g}", remedy)
    if runtime.choose_device(config).device.type != "cuda":
        return 0
    if asked is not None:
        return asked
    return max(1, here) if settings(config).weights == "spread" and chosen.ray is None else 1


def _gpus() -> int:
    """Count the GPUs that this process sees."""
    import torch

    return torch.cuda.device_count()

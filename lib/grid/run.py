"""The experiment grid of a profile: its store, its groups of cells, a plan of it, and running it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from lib.core import runtime
from lib.core.config import ROOT, Config, output_root
from lib.core.errors import InputError, require
from lib.core.sections import Grid
from lib.grid import cells, engine, plan
from lib.grid.cells import Cell, Variant
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
    grid = settings(config)
    made = plan.make(config, code=cells.code_version(ROOT), finished=cells.store_of(config).ids(), grid=grid)
    gpus = gpus_per_cell(config, chosen or Engine())
    for line in plan.lines(made, grid, itemsize=made.speed.itemsize, gpus=gpus):
        say(line)


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
    return engine.run(
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


def settings(config: Config) -> Grid:
    """Return the grid of a profile.

    Raises:
        InputError: it has none.
    """
    if config.grid is None:
        raise InputError(f"a profile must have a grid for this, got {config.profile} without one: use paper or rehearsal")
    return config.grid


def groups(config: Config, grid: Grid) -> list[Group]:
    """Return the cells of a grid, grouped by the weights they share, as the engine takes them."""
    code = cells.code_version(ROOT)
    return [_group(variant, found, config, grid, code=code) for variant, found in cells.groups(cells.expand(config)).items()]


def _group(variant: Variant, found: Sequence[Cell], config: Config, grid: Grid, *, code: str) -> Group:
    key, device = cells.variant_key(variant, code=code), runtime.choose_device(config)
    kept = output_root() / "runs" / config.profile / "weights" / key if grid.keep_weights else None
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
    return Group(key=key, cells=specs, shared={"variant": cells.to_plain(variant), "place": place, "label": variant.label})


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

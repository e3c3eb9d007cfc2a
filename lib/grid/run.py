"""The experiment grid of a profile: its store, its groups of cells, a plan of it, and running it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from lib.core import runtime
from lib.core.config import ROOT, Config, output_root
from lib.core.errors import InputError, require
from lib.core.sections import Grid
from lib.grid import cells, plan, sweep
from lib.grid.cells import Cell, Variant
from lib.grid.sweep import Group, Summary

Say = Callable[[str], None]
WORK = "lib.grid.run.work:work"


@dataclass(frozen=True)
class Engine:
    """What runs the cells.

    Attributes:
        jobs: processes at one time; None is one a GPU, or one on a CPU.
        ray: address of a Ray cluster, `"auto"` for the one on this machine; None stays on this machine without Ray.
        gpus_per_cell: GPUs of a process, which sees no others; without Ray a whole number. None is 1, or all of this machine for
            weights that are spread over them.
        retry: run again what has failed.
    """

    jobs: int | None = None
    ray: str | None = None
    gpus_per_cell: float | None = None
    retry: bool = False


def show(config: Config, engine: Engine | None = None, *, say: Say) -> None:
    """Say what a run would compute and cost, and what is there already; downloads no weights and no data.

    Args:
        config: a profile with a grid.
        engine: what would run the cells; the default one when None.
        say: takes each line.

    Raises:
        InputError: no grid, or settings that cannot be used.
    """
    grid, device = settings(config), runtime.choose_device(config)
    made = plan.make(config, code=cells.code_version(ROOT), finished=cells.store_of(config).ids(), grid=grid)
    gpus = gpus_per_cell(config, engine or Engine())
    for line in plan.lines(made, grid, itemsize=device.dtype.itemsize, gpus=gpus):
        say(line)


def run(config: Config, engine: Engine, *, say: Say) -> Summary:
    """Compute every cell that the store lacks.

    Args:
        config: a profile with a grid.
        engine: what runs the cells.
        say: takes lines of progress.

    Returns:
        How many cells are done, failed, and not tested.

    Raises:
        InputError: no grid, settings that cannot be used, or a damaged store.
    """
    grid, store = settings(config), cells.store_of(config)
    gpus = gpus_per_cell(config, engine)
    return sweep.run(
        groups(config, grid),
        store=store,
        work=WORK,
        jobs=engine.jobs or _jobs(gpus, with_ray=engine.ray is not None),
        engine="loky" if engine.ray is None else "ray",
        ray_address=engine.ray,
        gpus_per_cell=gpus,
        batch_size=grid.batch_size,
        keep_failed=not engine.retry,
        say=say,
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


def gpus_per_cell(config: Config, engine: Engine) -> float:
    """Return how many GPUs a process gets; none when the profile computes on the CPU.

    Args:
        config: a profile with a grid.
        engine: what runs the cells.

    Raises:
        InputError: without Ray, a part of a GPU, or more than this machine has.
    """
    asked, here = engine.gpus_per_cell, _gpus()
    if engine.ray is None and asked is not None:
        rule, remedy = "GPUs of a cell must be a whole number from 1 without Ray", "add --ray auto to share GPUs among cells"
        require(asked >= 1 and float(asked).is_integer(), rule, f"{asked:g}", remedy)
        rule, remedy = f"GPUs of a cell must be at most the {here} of this machine", "lower --gpus-per-cell, or use Ray"
        require(asked <= here, rule, f"{asked:g}", remedy)
    if runtime.choose_device(config).device.type != "cuda":
        return 0
    if asked is not None:
        return asked
    return max(1, here) if settings(config).weights == "spread" and engine.ray is None else 1


def _jobs(gpus: float, *, with_ray: bool) -> int:
    """As many processes as have GPUs, or one on a CPU: its cores then work together. Ray knows of other machines' GPUs."""
    if not gpus:
        return 1
    return max(1, _gpus() if with_ray else int(_gpus() // gpus))


def _gpus() -> int:
    """Count the GPUs that this process sees."""
    import torch

    return torch.cuda.device_count()

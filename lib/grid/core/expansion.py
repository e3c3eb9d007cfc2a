"""The cells of the core, in the order in which they are computed: rounds of tasks, and in each round every variant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from lib.calibration.token_weights import Weighting
from lib.core.config import Config
from lib.core.errors import InputError, require
from lib.core.settings.grid import Core, Grid
from lib.evaluation import tasks
from lib.grid import cells
from lib.grid.cells import DENSE, LOSS, Cell, Variant
from lib.pruning.methods import METHODS, RELEASE, Method

# The control of the sink-aware pair: as many tokens of every window are taken out, at random among those that are no sinks.
RANDOM = "random positions (Wanda)"
KNOWN: Mapping[str, Method] = MappingProxyType({
    **METHODS, RANDOM: replace(RELEASE["sink_wanda"], weighting=Weighting("random"))
})  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """What one process does: some tasks of one variant, in one round."""

    round: int
    variant: Variant
    cells: tuple[Cell, ...]


def turns(config: Config) -> list[Turn]:
    """Return the core of a profile, nothing where it has none.

    The first round should say most for its time: what comes later can be waited for with verdicts at hand.

    Raises:
        InputError: a model, method or task that nothing goes by, or rows that are missing.
    """
    grid = config.grid
    if grid is None or grid.core is None:
        return []
    core = grid.core
    _check(core, grid)
    variants = _variants(core, grid, seed=config.seed)
    return [
        Turn(number, variant, tuple(_cell(variant, task, core, grid, config) for task in tasks_of_round))
        for number, tasks_of_round in enumerate(core.rounds)
        for variant in variants
    ]


def cells_of(config: Config) -> list[Cell]:
    """Return the cells of the core in their order."""
    return [cell for turn in turns(config) for cell in turn.cells]


def core_of(config: Config) -> Core:
    """Return the settings of a profile's core.

    Raises:
        InputError: it has none.
    """
    if config.grid is None or config.grid.core is None:
        raise InputError(f"a profile must have a core for this, got {config.profile} without one: use paper or rehearsal")
    return config.grid.core


def _check(core: Core, grid: Grid) -> None:
    """Refuse names that nothing goes by, before anything is read."""
    cells.check(grid)
    known_tasks = (LOSS, *tasks.OFFICIAL[cells.PUBLISHED[_family(core, grid)]], *tasks.local_names())
    asked = [task for tasks_of_round in core.rounds for task in tasks_of_round]
    wanted: tuple[tuple[str, Sequence[str], Sequence[str]], ...] = (
        ("model", (core.model,), tuple(grid.models)),
        ("methods", core.methods, (DENSE, *KNOWN)),
        ("rounds", asked, known_tasks),
        ("documents", tuple(core.documents), asked),
        ("draws", tuple(core.draws), asked),
    )
    for what, chosen, known in wanted:
        for name in chosen:
            require(name in known, f"grid.core.{what} must be among {', '.join(known)}", repr(name), "use one of these")
    twice = sorted({task for task in asked if asked.count(task) > 1})
    require(not twice, "grid.core.rounds must name a task once", ", ".join(twice), "leave one out")
    require(
        LOSS not in asked or grid.loss_windows > 0, f"{LOSS} must have windows", "loss_windows 0", "raise it, or leave it out"
    )


def _family(core: Core, grid: Grid) -> Any:
    return grid.families.get(core.model, "llada")


def _variants(core: Core, grid: Grid, *, seed: int) -> list[Variant]:
    dense = cells.dense_variant(core.model, grid.models[core.model], grid)
    text = next(iter(grid.calibrations.values()))
    return [dense if name == DENSE else _pruned(dense, name, core, text, seed=seed) for name in core.methods]


def _pruned(dense: Variant, name: str, core: Core, text: Any, *, seed: int) -> Variant:
    method = KNOWN[name]
    read = text if method.needs_calibration else None
    return replace(dense, method=name, options=method, sparsity=core.sparsity, calibration=read, seed=seed)


def _cell(variant: Variant, task: str, core: Core, grid: Grid, config: Config) -> Cell:
    """Describe one measurement; of the loss, the one that the whole grid makes too."""
    if task == LOSS:
        return cells.measurement(variant, task, grid, config)
    wanted = replace(grid, draws=core.draws.get(task, grid.draws), gen_length=core.gen_length, limit=None)
    made = cells.measurement(variant, task, wanted, config)
    is_generated = task in tasks.OFFICIAL[variant.published] and tasks.OFFICIAL[variant.published][task].draws is None
    evaluation, own = dict(made.settings["evaluation"]), {"documents": documents(core, grid, task)}
    if is_generated:
        evaluation |= {"block_length": core.block_length}
        own |= {"cache": core.cache}
    else:
        own |= {"race": {"first": core.first_draws, "margin": core.margin, "audit": core.audit}}
    return replace(made, settings={**made.settings, "evaluation": evaluation, "core": own})


def documents(core: Core, grid: Grid, task: str) -> int | None:
    """Return how many documents of a task are drawn (of each part of it); None is all."""
    limits = [limit for limit in (core.documents.get(task), grid.limit) if limit is not None]
    return min(limits, default=None)

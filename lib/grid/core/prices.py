"""What the core costs and how fine it resolves, by arithmetic alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lib.core.settings.grid import Core, Grid
from lib.grid import costs
from lib.grid.cells import LOSS, Cell, Variant
from lib.grid.core import expansion
from lib.grid.core.expansion import Turn
from lib.grid.costs import LOCAL, QUESTIONS, Shape

PASS_SECONDS = 0.0008  # of one block: no pass is faster, as its kernels have to be launched and its weights to be read
EQUALLY_LONG = 8  # prompts of one length, that are written together with kept keys and values
START_SECONDS = 20.0  # of a process
READ_SECONDS = 2.0  # of a gigabyte of a checkpoint, hashes included
SWEEP_SECONDS = 0.0002  # of one column of a matrix, where SparseGPT goes through it
DISK_ITEMSIZE = 2


@dataclass(frozen=True)
class Price:
    """Rows that pass through the network, all their tokens, and the passes."""

    rows: float
    tokens: float
    forwards: float

    def seconds(self, shape: Shape, *, teraflops: float) -> float:
        """Return the time at a speed, at least that of as many passes over next to nothing."""
        return max(
            costs.Cost(self.rows, self.tokens).seconds(shape, teraflops=teraflops), self.forwards * PASS_SECONDS * shape.layers
        )


@dataclass(frozen=True)
class Resolution:
    """Half of the 95 % interval of a paired difference of the average over tasks, in points.

    Attributes:
        here: for the same benchmarks with all of their documents.
        anew: for other documents of the same kind.
        anew_at_best: the same, had every document been asked.
    """

    here: float
    anew: float
    anew_at_best: float


def distinct_masks(tokens: int, draws: float) -> float:
    """Return how many different masks of an answer are expected among some draws: one that comes twice passes once.

    Args:
        tokens: of the answer.
        draws: each hides k tokens, every k from 1 to `tokens` equally often, all sets of k alike.

    >>> round(distinct_masks(3, 128), 3), round(distinct_masks(30, 64), 1)
    (7.0, 62.8)
    """
    found = 0.0
    for hidden in range(1, tokens + 1):
        sets = math.comb(tokens, hidden)
        found += sets * -math.expm1(draws / tokens * math.log1p(-1.0 / sets)) if sets > 1 else min(1.0, draws / tokens)
    return found


def asked(task: str, core: Core, grid: Grid) -> tuple[int, int]:
    """Return how many documents of a task are asked, and how many it has."""
    size = QUESTIONS.get(task, LOCAL)
    limit = expansion.documents(core, grid, task)
    return min(size.documents, size.parts * (size.documents if limit is None else limit)), size.documents


def measuring(cell: Cell, core: Core, grid: Grid, *, drawn: float | None = None) -> Price:
    """Return what it takes to measure a cell on weights that are there.

    Args:
        cell: of the core.
        core: its settings.
        grid: of which it is.
        drawn: share of the draws that a race makes; the assumed one when None.
    """
    if cell.task == LOSS:
        cost = costs.measuring(cell)
        return Price(cost.rows, cost.tokens, cell.settings["loss"]["windows"])
    settings, size = cell.settings["evaluation"], QUESTIONS.get(cell.task, LOCAL)
    count, _ = asked(cell.task, core, grid)
    if "race" not in cell.settings["core"]:
        return _generating(count, size.tokens, settings, cache=core.cache)
    share = (core.drawn if drawn is None else drawn) if settings["draws"] > core.first_draws else 1.0
    masks = 1.0 if size.answer == 1 else distinct_masks(size.answer, share * settings["draws"])
    rows = count * size.texts * masks * (1 + (settings["cfg_scale"] > 0))
    return Price(rows, rows * size.tokens, math.ceil(rows / grid.batch_size))


def _generating(count: int, prompt: int, settings: Mapping[str, int], *, cache: str) -> Price:
    """Price generation: a pass over everything at the beginning of a block, then over the block (and what is behind it)."""
    new, steps, block = settings["gen_length"], settings["steps"], settings["block_length"]
    blocks, together = new // block, math.ceil(count / EQUALLY_LONG)
    whole = prompt + new
    if cache == "none":
        return Price(count * steps, count * steps * whole, together * steps)
    behind = (blocks - 1) * block / 2 if cache == "prefix" else 0
    return Price(count * steps, count * (blocks * whole + (steps - blocks) * (block + behind)), together * steps)


def making(variant: Variant, shape: Shape, *, teraflops: float) -> float:
    """Return the seconds that it takes to prune a variant: calibration, and SparseGPT's way through the columns."""
    calibrating = costs.pruning(variant).seconds(shape, teraflops=teraflops)
    sweeps = variant.options is not None and variant.options.updates
    columns = shape.layers * (6 * shape.hidden + shape.mlp) if sweeps else 0
    return calibrating + columns * SWEEP_SECONDS


def reading(shape: Shape) -> float:
    """Return the seconds from the start of a process until its model is there."""
    return START_SECONDS + READ_SECONDS * DISK_ITEMSIZE * shape.weights / 1e9


def seconds(turn: Turn, core: Core, grid: Grid, shape: Shape, *, teraflops: float, drawn: float | None = None) -> float:
    """Return the time of one turn: its model is read, pruned in the first round (in every one if not kept), and measured."""
    total = reading(shape) + sum(
        measuring(cell, core, grid, drawn=drawn).seconds(shape, teraflops=teraflops) for cell in turn.cells
    )
    return total + (making(turn.variant, shape, teraflops=teraflops) if turn.round == 0 or not core.keep_weights else 0.0)


def resolution(core: Core, grid: Grid, names: Sequence[str]) -> Resolution:
    """Return how fine the average over tasks is resolved when a share `core.discordant` of each one's documents tells two apart.

    Args:
        core: its settings.
        grid: of which it is.
        names: the tasks.

    Source: 1.96 sqrt(d / n) for one task with n documents, the variances of the tasks added; of a sample without replacement from
        N documents times sqrt(1 - n / N).
    """
    sizes = [asked(task, core, grid) for task in names]

    def half(terms: Sequence[float]) -> float:
        return 100 * 1.96 * math.sqrt(core.discordant * sum(terms)) / len(names)

    return Resolution(
        here=half([1 / count - 1 / whole for count, whole in sizes]),
        anew=half([1 / count for count, _ in sizes]),
        anew_at_best=half([1 / whole for _, whole in sizes]),
    )


def benchmarks(core: Core) -> list[str]:
    """Return the tasks of the core's average, in their order."""
    return [task for tasks_of_round in core.rounds for task in tasks_of_round if task != LOSS]

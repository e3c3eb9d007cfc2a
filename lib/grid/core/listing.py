"""The plan of the core as text: hours by round, by task and by variant, and how fine it resolves."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pandas as pd

from lib.core.settings.grid import Core, Grid
from lib.grid import costs
from lib.grid.cells import LOSS, Cell
from lib.grid.core import prices
from lib.grid.core.expansion import Turn
from lib.grid.core.verdicts import PAIRS
from lib.grid.costs import Shape

HOUR = 3600.0


@dataclass(frozen=True)
class Priced:
    """A core with what decides its price.

    Attributes:
        turns: in their order.
        core: its settings.
        grid: of which it is.
        shape: of its model.
        teraflops: assumed or measured speed.
        itemsize: bytes of a weight on the device.
        finished: ids of cells that the store holds.
        code: version of the code, which the ids come from.
    """

    turns: Sequence[Turn]
    core: Core
    grid: Grid
    shape: Shape
    teraflops: float
    itemsize: int
    finished: Collection[str]
    code: str

    def hours(self, turn: Turn, *, drawn: float | None = None, left: bool = False) -> float:
        """Return the hours of a turn, or of what is left of it."""
        if left and not self.open(turn):
            return 0.0
        open_turn = Turn(turn.round, turn.variant, tuple(self.open(turn))) if left else turn
        how = {"teraflops": self.teraflops, "drawn": drawn}
        return prices.seconds(open_turn, self.core, self.grid, self.shape, **how) / HOUR

    def open(self, turn: Turn) -> list[Cell]:
        """Return the cells of a turn that have no record."""
        return [cell for cell in turn.cells if cell.spec(code=self.code)["id"] not in self.finished]


def lines(priced: Priced, *, origin: str) -> list[str]:
    """Return the plan as text.

    Args:
        priced: the core.
        origin: where the speed comes from.
    """
    turns, core = priced.turns, priced.core
    cells = [cell for turn in turns for cell in turn.cells]
    done = len(cells) - sum(len(priced.open(turn)) for turn in turns)
    whole, left = (sum(priced.hours(turn, left=left) for turn in turns) for left in (False, True))
    slowest = sum(priced.hours(turn, drawn=1.0) for turn in turns)
    gigabytes = (f"{size / 1e9:.0f}" for size in bytes_taken(priced))
    fine = prices.resolution(core, priced.grid, prices.benchmarks(core))
    documents = sum(prices.asked(task, core, priced.grid)[0] for task in prices.benchmarks(core))
    tables = (by_round(priced), by_task(priced), by_variant(priced))
    return [
        f"core: {len(core.methods)} variants of {core.model} at {core.sparsity:.0%}, {len(cells)} cells, {done} finished; "
        f"{whole:.1f} hours of one such device, {left:.1f} of them open",
        f"speed: {priced.teraflops:.3g} TFLOP/s, {origin}",
        "",
        *(line for made in tables for line in (*made.to_string(index=False).splitlines(), "")),
        "memory: at most {} GB on the device; {} GB of pruned weights on disk".format(*gigabytes),
        f"priced as if races made {core.drawn:.0%} of their draws; if none ended early, {slowest:.1f} hours",
        f"average over tasks, {documents:,} documents: a paired difference is resolved to {fine.here:.2f} points on these "
        f"benchmarks, to {fine.anew:.2f} for new documents ({fine.anew_at_best:.2f} at best, with all of them), "
        f"where {core.discordant:.0%} of the documents tell two variants apart",
    ]


def bytes_taken(priced: Priced) -> tuple[int, int]:
    """Return what the dearest variant takes on the device, and what all kept ones take on disk."""
    variants, grid, shape = dict.fromkeys(turn.variant for turn in priced.turns), priced.grid, priced.shape
    how = {"batch_size": grid.batch_size, "weights": grid.weights, "states": grid.states, "itemsize": priced.itemsize}
    peak = max(costs.memory_bytes(variant, shape, **how) for variant in variants)
    kept = [costs.kept_bytes(one, shape, itemsize=priced.itemsize) for one in variants if one.options is not None]
    return peak, sum(kept) if priced.core.keep_weights else 0


def by_round(priced: Priced) -> pd.DataFrame:
    """Tabulate the rounds: their hours, when they are over, and when the first pair of `verdicts.PAIRS` can be compared."""
    rows, before = [], 0.0
    pair = next((pair for pair in PAIRS if set(pair) <= set(priced.core.methods)), ())
    for number, names in enumerate(priced.core.rounds):
        own = [turn for turn in priced.turns if turn.round == number]
        until = list(accumulate(priced.hours(turn) for turn in own))
        last = max((place for place, turn in enumerate(own) if turn.variant.method in pair), default=len(own) - 1)
        rows.append({
            "round": number + 1,
            "tasks": ", ".join(names),
            "hours": f"{until[-1]:.2f}",
            "first pair after": f"{before + until[last]:.2f}",
            "all after": f"{before + until[-1]:.2f}",
        })  # fmt: skip
        before += until[-1]
    return pd.DataFrame(rows)


def by_task(priced: Priced) -> pd.DataFrame:
    """Tabulate what a task costs."""
    rows, first = [], priced.turns[0].variant
    for cell in (cell for turn in priced.turns if turn.variant == first for cell in turn.cells):
        cost = prices.measuring(cell, priced.core, priced.grid)
        hours = cost.seconds(priced.shape, teraflops=priced.teraflops) / HOUR
        asked, size = (0, 0) if cell.task == LOSS else prices.asked(cell.task, priced.core, priced.grid)
        rows.append({
            "task": cell.task,
            "documents": f"{asked:,}" if size else f"{priced.grid.loss_windows} windows",
            "of": f"{size:,}" if size else "",
            "rows of a cell": f"{cost.rows:,.0f}",
            "million tokens": f"{cost.tokens / 1e6:.1f}",
            "hours of a cell": f"{hours:.2f}",
            "of all variants": f"{hours * len(priced.core.methods):.2f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def by_variant(priced: Priced) -> pd.DataFrame:
    """Tabulate what a variant costs: pruning, reading its weights in every round, and all together."""
    rows = []
    for variant in dict.fromkeys(turn.variant for turn in priced.turns):
        own = [turn for turn in priced.turns if turn.variant == variant]
        times = 1 if priced.core.keep_weights else len(own)
        pruning = times * prices.making(variant, priced.shape, teraflops=priced.teraflops)
        rows.append({
            "variant": variant.method,
            "minutes of pruning": f"{pruning / 60:.1f}",
            "minutes of reading": f"{len(own) * prices.reading(priced.shape) / 60:.1f}",
            "hours": f"{sum(priced.hours(turn) for turn in own):.2f}",
        })  # fmt: skip
    return pd.DataFrame(rows)

"""What additivity costs: allocations changed step by step from the solver's answer on, and chosen by their measured loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from lib.core.runtime import generator, progress
from lib.evaluation import paired
from lib.studies.joint import measured_formats, search
from lib.studies.joint.configurations import DENSE, Prepared
from lib.studies.joint.hardware_aware import Budget, Tried, changed
from lib.studies.joint.search import Allocation, Choice
from lib.studies.pruning import runs

ANNEALED, CHOSEN = "annealed", "by measured loss"
WARMTH = 0.25  # share of the first loss by which a worse allocation is accepted at first
MOST = 3  # choices that one step changes
TRIES = 200  # proposals a step, until one fits
COLUMNS = (
    "model", "budget", "strategy", "layers changed", "predicted", "measured", "measured - predicted", "measured to choose",
    "measured elsewhere", "energy, mJ", "share of energy",
)  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """Where a walk led.

    Attributes:
        best: the allocation with the least measured loss.
        losses: of all that were measured, in order; the first is that of the start.
    """

    best: Allocation
    losses: tuple[float, ...]


def walk(
    start: Allocation,
    options: Sequence[Choice],
    measure: Callable[[Allocation], float],
    *,
    limits: Mapping[str, float],
    steps: int,
    stream: torch.Generator,
) -> Walk:
    """Change one to three choices at a time, keep what measures better, and at first also what measures a little worse.

    Args:
        start: an allocation within the limits.
        options: all choices, dense ones among them.
        measure: loss of an allocation, which need not be a sum.
        limits: of seconds and bytes; every allocation keeps them.
        steps: allocations that are measured beside the start.
        stream: random stream, on the CPU.

    Source: simulated annealing (Kirkpatrick et al. 1983) with a threshold that falls to 0, instead of one over sums.
    """
    current, losses = start, [measure(start)]
    best, value = start, losses[0]
    for step in range(steps):
        found = _proposal(current, options, limits, stream)
        if found is None:
            break
        losses.append(measure(found))
        threshold = WARMTH * abs(losses[0]) * (1 - (step + 1) / steps)
        if losses[-1] <= value + threshold:
            current, value = found, losses[-1]
        if losses[-1] < min(losses[:-1]):
            best = found
    return Walk(best, tuple(losses))


def _proposal(
    current: Allocation, options: Sequence[Choice], limits: Mapping[str, float], stream: torch.Generator
) -> Allocation | None:
    """Return another allocation within the limits; None where none was found."""
    for _ in range(TRIES):
        count = int(torch.randint(1, MOST + 1, (1,), generator=stream))
        found = current
        for index in torch.randint(len(options), (count,), generator=stream).tolist():
            found = with_choice(found, options[index], options)
        if changed(found) != changed(current) and all(getattr(found, name) <= limit for name, limit in limits.items()):
            return found
    return None


def with_choice(current: Allocation, taken: Choice, options: Sequence[Choice]) -> Allocation:
    """Put a choice into an allocation; layers that lose a common choice through it become dense.

    >>> rows = [Choice((name,), form, loss, 1.0, 2) for name in "ab" for form, loss in (("dense", 0.0), ("int4", 0.5))]
    >>> start = search.optimise([*rows, Choice(("a", "b"), "cut", -1.0, 1.0, 2)])
    >>> start.formats, with_choice(start, rows[1], rows).formats
    ({'a': 'cut', 'b': 'cut'}, {'a': 'int4', 'b': 'dense'})
    """
    stay = [choice for choice in current.chosen if not set(choice.layers) & set(taken.layers)]
    covered = {layer for choice in (*stay, taken) for layer in choice.layers}
    order = [layer for choice in current.chosen for layer in choice.layers]
    bare = [choice for choice in options if choice.format == DENSE and choice.layers[0] in set(order) - covered]
    rows = sorted([*stay, taken, *bare], key=lambda choice: min(order.index(layer) for layer in choice.layers))
    loss, seconds = (math.fsum(getattr(choice, name) for choice in rows) for name in ("loss", "seconds"))
    return Allocation(tuple(rows), loss, seconds, sum(choice.bytes for choice in rows))


def compare(
    prepared: Prepared,
    options: Sequence[Choice],
    tried: Sequence[Tried],
    windows: Int[Tensor, "window position"],
    *,
    steps: int,
    draws: int,
    rows: int,
    seed: int,
) -> tuple[list[Tried], pd.DataFrame]:
    """Walk from the solver's answer at each budget, and choose by measured loss among all that was found.

    What was chosen by sums on some windows seems better there than it is. So the walk and the choice go by the windows that the
    calibration read, which the sums did not see, and are judged on those of the bench, as all are.

    Args:
        prepared: a model's layers in all formats.
        options: of `measured_formats.choices`.
        tried: of `hardware_aware.compare_allocations` on this model.
        windows: those of `measured_formats.sensitivity`.
        steps: allocations measured for each budget.
        draws: masks per window there.
        rows: tokens of the estimate of energy.
        seed: of the masks there and of the walk.

    Returns:
        Two more records a budget, untimed; and a table of what every allocation was predicted to lose, what it loses on the same
        windows (the difference is what additivity costs), on those that choose, and on the bench's, and its energy.
    """
    floored, base = search.floor_at_zero(options), runs.loss(prepared.found.bench)
    same = _increase(prepared, windows, draws=draws, seed=seed)
    choosing = _increase(prepared, prepared.found.windows, draws=draws, seed=seed)
    more, listed = [], []
    for budget in progress(dict.fromkeys(one.budget for one in tried), desc="annealing"):
        own = {one.strategy: one for one in tried if one.budget == budget and one.allocation is not None}
        if "optimum" not in own:
            continue
        first = own["optimum"]
        stream, limits = generator(seed, "annealing", budget.name), budget.limits(first.dense)
        start = first.allocation
        assert start is not None
        found = {name: one.allocation for name, one in own.items() if one.allocation is not None}
        found[ANNEALED] = walk(start, floored, choosing, limits=limits, steps=steps, stream=stream).best
        found[CHOSEN] = min(found.values(), key=choosing)
        for name in (ANNEALED, CHOSEN):
            loss = measured_formats.loss_in(prepared, found[name].formats)
            judged = paired.paired_difference(loss, base, seed=seed)
            more.append(
                replace(first, strategy=name, allocation=found[name], as_measured=math.nan, increase=judged, forward=None)
            )
        judged = {one.strategy: one.increase for one in (*own.values(), *more[-2:])}
        listed += [
            _row(prepared, budget, name, each, (same(each), choosing(each)), judged[name], rows=rows)
            for name, each in found.items()
        ]
    return more, pd.DataFrame(listed, columns=pd.Index(COLUMNS))


def _increase(
    prepared: Prepared, windows: Int[Tensor, "window position"], *, draws: int, seed: int
) -> Callable[[Allocation], float]:
    """Return what measures the increase of the loss on some windows, of every allocation once."""
    bench = replace(prepared.found.bench, windows=windows, seed=seed, draws=draws)
    dense, known = float(runs.loss(bench).mean()), dict[object, float]()

    def measure(found: Allocation) -> float:
        """Measure, or remember."""
        key = changed(found)
        if key not in known:
            known[key] = float(measured_formats.loss_in(prepared, found.formats, bench=bench).mean()) - dense
        return known[key]

    return measure


def _row(
    prepared: Prepared, budget: Budget, name: str, found: Allocation, measured: tuple[float, float], judged: object, *, rows: int
) -> tuple[object, ...]:
    """Return one row of the table."""
    joules, whole = (measured_formats.energy(prepared, formats, rows=rows) for formats in (found.formats, {}))
    elsewhere = getattr(judged, "estimate", math.nan)
    same, choosing = measured
    numbers = (len(changed(found)), found.loss, same, same - found.loss, choosing, elsewhere, 1e3 * joules, joules / whole)
    return prepared.model.name, budget.name, name, *numbers

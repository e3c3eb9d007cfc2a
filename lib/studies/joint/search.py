"""Hardware-aware allocation: which format each layer gets, for the least loss increase within a time and a size.

Losses, seconds and bytes are taken to add up over layers: true of bytes, nearly true of the seconds of layers that run in turn,
and assumed of losses measured one unit at a time, so measure the chosen model again.
"""

import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Context
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import LinearConstraint, milp

from lib.core.errors import InputError, require

Unit = tuple[str, ...]
Limit = float | None
SCALE = 1e3  # of a limit and of the largest loss: the solver's absolute tolerances (1e-6) then mean a billionth
SIX_UP = Context(prec=6, rounding=ROUND_CEILING)
SLACK = 1e-9  # by which seconds may pass their limit, relative: sums of times round


@dataclass(frozen=True)
class Choice:
    """A format that a unit can take: one layer, or all that must take it together, as q, k, v and o do when heads go.

    Attributes:
        layers: the layers (matrices) of the unit.
        format: name of the format; `uniform` and the start of `greedy` go by it.
        loss: increase of the loss (NELBO, nats per token) when only this unit takes the format; noise may make it negative.
        seconds: measured time of these layers in the format.
        bytes: size of their weights in the format.
    """

    layers: Unit
    format: str
    loss: float
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Allocation:
    """Choices that cover each layer once, in the order of the layers, and their totals."""

    chosen: tuple[Choice, ...]
    loss: float
    seconds: float
    bytes: int

    @property
    def formats(self) -> dict[str, str]:
        """Format by layer."""
        return {layer: choice.format for choice in self.chosen for layer in choice.layers}


@dataclass(frozen=True)
class _Problem:
    choices: tuple[Choice, ...]
    layers: tuple[str, ...]
    limits: dict[str, float]  # of seconds and bytes, as far as given


_Step = tuple[float, float, tuple[Choice, ...], tuple[Choice, ...]]  # saving, added loss, choices that go, choices that come


def floor_at_zero(options: Sequence[Choice]) -> list[Choice]:
    """Count negative losses as 0, for any of the searches below.

    Without this a search seeks out formats that seemed to help, mostly by noise; with it they tie with those that cost nothing.

    >>> [choice.loss for choice in floor_at_zero([Choice(("a",), "int8", -0.5, 1.0, 4), Choice(("a",), "int4", 0.5, 1.0, 2)])]
    [0.0, 0.5]
    """
    return [replace(choice, loss=0.0 if -math.inf < choice.loss < 0 else choice.loss) for choice in options]


def optimise(options: Sequence[Choice], *, seconds: Limit = None, bytes: Limit = None) -> Allocation:
    """Choose formats with the least total loss within the limits, exactly.

    Each choice is a binary variable and each layer is covered by exactly one that is taken (a set partition), so units may
    overlap: a layer takes a format of its own, or one together with the other layers of a structured choice.

    Args:
        options: all choices; losses may be negative.
        seconds: largest total time, met to within a billionth; None is no limit.
        bytes: largest total size; None is no limit.

    Returns:
        The best allocation. Losses that differ by less than a billionth of the largest one count as equal; and where a better
        one passes a limit by less than a billionth, others that fill it to within two billionths may be overlooked.

    Raises:
        InputError: options that cannot be used, or limits that cannot be met: which, and the least that can be reached.

    >>> rows = [Choice(("a",), "dense", 0.0, 2.0, 8), Choice(("a",), "int4", 0.3, 1.0, 2)]
    >>> rows += [Choice(("b",), "dense", 0.0, 2.0, 8), Choice(("b",), "int4", 0.1, 1.0, 2)]
    >>> optimise(rows, seconds=3.0).formats
    {'a': 'dense', 'b': 'int4'}
    """
    problem = _problem(options, seconds, bytes)
    return _solve(problem) or _refuse(problem)


def uniform(options: Sequence[Choice], *, seconds: Limit = None, bytes: Limit = None) -> Allocation:
    """Give all layers the one format that fits and loses least; a format that some layer is not offered does not count.

    Arguments and errors are those of `optimise`; that no single format fits is one more error.

    >>> rows = [Choice((name,), "int4", 0.1, 1.0, 2) for name in "ab"] + [Choice(("a",), "int2", 0.0, 1.0, 1)]
    >>> uniform(rows, bytes=4).formats
    {'a': 'int4', 'b': 'int4'}
    """
    problem = _problem(options, seconds, bytes)
    names = dict.fromkeys(choice.format for choice in problem.choices)
    fitting = [found for name in names if (found := _solve(_of_format(problem, name)))]
    if fitting:
        return min(fitting, key=lambda found: found.loss)
    totals = {name: _solve(_of_format(replace(problem, limits={}), name)) for name in names}
    got = ", ".join(f"{name} with {found.seconds:.4g} s and {found.bytes} bytes" for name, found in totals.items() if found)
    raise InputError(
        f"one format must fit {_wanted(problem)}, got {got or 'none of all layers'}: raise the limits or use optimise"
    )


def greedy(options: Sequence[Choice], *, start: str = "dense", seconds: Limit = None, bytes: Limit = None) -> Allocation:
    """Start from one format and take the step with the best saving per added loss; return the first allocation that fits.

    A step gives one unit another format: a layer, or all layers of a structured choice, which then take that choice, or one and
    the same format alone. Its saving is the fall of the excess, the sum over limits of the share of the limit by which it is
    passed; saving more than a limit asks for does not count. Steps that add no loss come first.

    Args:
        options, seconds, bytes: as for `optimise`.
        start: format that every layer begins with.

    Raises:
        InputError: as for `optimise`, a start that some layer does not have, or no step that saves before the limits are met.

    >>> rows = [Choice(("a",), "dense", 0.0, 2.0, 8), Choice(("a",), "int4", 0.3, 1.0, 2)]
    >>> greedy(rows, seconds=1.0).loss
    0.3
    """
    problem = _problem(options, seconds, bytes)
    first = _solve(_of_format(replace(problem, limits={}), start))
    if first is None:
        raise InputError(f"the start must be a format of all layers, got {start!r}: name another or give every layer that choice")
    current, moves = first, _moves(problem)
    while _excess(problem, current.seconds, current.bytes):
        steps = list(_steps(problem, moves, current)) or _refuse(problem, stuck=True)
        _, _, gone, added = max(steps, key=lambda step: (1, step[0]) if step[1] <= 0 else (0, step[0] / step[1]))
        current = _allocation(problem, [*(choice for choice in current.chosen if choice not in gone), *added])
    return current


def random(
    options: Sequence[Choice], *, draws: int, generator: torch.Generator, seconds: Limit = None, bytes: Limit = None
) -> list[Allocation]:
    """Draw allocations that fit, with replacement: what `optimise` would choose if losses were noise.

    The noise is uniform in [0, 1) for each layer of a choice: without limits all formats of a layer are equally likely, and
    structured choices rarer. Under a tight limit the draws lie just within it, as those of `optimise` do.

    Args:
        options, seconds, bytes: as for `optimise`.
        draws: number of allocations.
        generator: random stream.

    Returns:
        As many allocations as asked, with the losses of the options.

    Raises:
        InputError: as for `optimise`, or fewer than one draw.

    >>> rows = [Choice(("a",), "dense", 0.0, 2.0, 8), Choice(("a",), "int4", 0.3, 1.0, 2)]
    >>> [found.loss for found in random(rows, draws=2, generator=torch.Generator(), bytes=7)]
    [0.3, 0.3]
    """
    require(draws >= 1, "draws must be positive", str(draws), "ask for one at least")
    problem = _problem(options, seconds, bytes)
    noise = torch.rand(draws, len(options), generator=generator, dtype=torch.float64).numpy()
    return [_solve(problem, row * [len(choice.layers) for choice in options]) or _refuse(problem) for row in noise]


def _problem(options: Sequence[Choice], seconds: Limit, bytes: Limit) -> _Problem:
    require(len(options) > 0, "options must have a choice for every layer", "none", "measure some")
    seen = set()
    for choice in options:
        key = frozenset(choice.layers), choice.format
        sound = math.isfinite(choice.loss) and 0 <= choice.seconds < math.inf and choice.bytes >= 0
        rule = "a choice must have distinct layers, a finite loss, seconds >= 0 and bytes >= 0"
        require(sound and 0 < len(choice.layers) == len(key[0]), rule, str(choice), "correct the table")
        require(key not in seen, "a unit must be offered a format once", f"{choice} again", "keep one or rename the format")
        seen.add(key)
    limits = {name: limit for name, limit in (("seconds", seconds), ("bytes", bytes)) if limit is not None}
    positive = all(0 < limit < math.inf for limit in limits.values())
    require(positive, "limits must be positive and finite", str(limits), "use None for no limit")
    return _Problem(tuple(options), tuple(dict.fromkeys(layer for choice in options for layer in choice.layers)), limits)


def _solve(problem: _Problem, minimise: str | Float[np.ndarray, "_choice"] = "loss") -> Allocation | None:
    """Return the allocation with the least of loss, seconds, bytes or the given values; None where nothing fits."""
    choices = problem.choices
    values = np.array([getattr(choice, minimise) for choice in choices], float) if isinstance(minimise, str) else minimise
    cover = np.array([[float(layer in choice.layers) for choice in choices] for layer in problem.layers])
    if not cover.any(axis=1).all():
        return None
    # What passes a limit by less than the solver's tolerance may still pass it: then ask again with a limit that much lower.
    for margin in (0.0, 2e-6):
        with _silent():
            result = milp(
                values * (SCALE / (np.abs(values).max() or 1.0)),
                integrality=np.ones(len(choices)),
                constraints=[LinearConstraint(cover, 1, 1), *(_row(problem, name, margin) for name in problem.limits)],
                options={"mip_rel_gap": 0.0},
            )
        if result.status == 2:
            return None
        taken = [choice for choice, share in zip(choices, result.x, strict=True) if share > 0.5] if result.status == 0 else []
        found, covered = _allocation(problem, taken), [layer for choice in taken for layer in choice.layers]
        if sorted(covered) == sorted(problem.layers) and not _excess(problem, found.seconds, found.bytes):
            return found
    raise RuntimeError(f"the solver's answer is no allocation within the limits: {result.message}")


@contextmanager
def _silent() -> Iterator[None]:
    """Send standard output nowhere: HiGHS prints lines past its own switch (HiGHS.jl issue 312), into notebooks too."""
    library, kept = ctypes.CDLL(None), os.dup(1)
    library.fflush(None)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        library.fflush(None)  # what the solver printed still waits in the C library's buffer
        os.dup2(kept, 1)
        os.close(kept)


def _row(problem: _Problem, name: str, margin: float) -> LinearConstraint:
    """Return one limit as a row for the solver, scaled so that the limit is `SCALE`."""
    share = np.array([getattr(choice, name) for choice in problem.choices], dtype=float) / problem.limits[name]
    row = SCALE * np.minimum(share, 2.0)  # twice the limit is out of reach as well; larger numbers would spoil the scaling
    return LinearConstraint(row[None], -np.inf, SCALE - margin)


def _allocation(problem: _Problem, taken: Sequence[Choice]) -> Allocation:
    rank = {layer: index for index, layer in enumerate(problem.layers)}
    chosen = tuple(sorted(taken, key=lambda choice: min(rank[layer] for layer in choice.layers)))
    loss, seconds = (math.fsum(getattr(choice, name) for choice in chosen) for name in ("loss", "seconds"))
    return Allocation(chosen, loss, seconds, sum(choice.bytes for choice in chosen))


def _excess(problem: _Problem, seconds: float, bytes: int) -> float:
    """Return the sum over limits of the share of the limit by which it is passed; 0 where all are met."""
    shares = {name: total / problem.limits.get(name, math.inf) - 1 for name, total in (("seconds", seconds), ("bytes", bytes))}
    return sum(share for name, share in shares.items() if share > (SLACK if name == "seconds" else 0.0))


def _of_format(problem: _Problem, name: str) -> _Problem:
    return replace(problem, choices=tuple(choice for choice in problem.choices if choice.format == name))


def _moves(problem: _Problem) -> dict[Unit, list[tuple[Choice, ...]]]:
    """Return what each unit can become: one of its own choices, or one format in each of its layers alone."""
    single = {(choice.layers[0], choice.format): choice for choice in problem.choices if len(choice.layers) == 1}
    moves: dict[Unit, list[tuple[Choice, ...]]] = {}
    for choice in problem.choices:
        moves.setdefault(choice.layers, []).append((choice,))
    for layers in (unit for unit in moves if len(unit) > 1):
        rows = ([single.get((layer, name)) for layer in layers] for name in dict.fromkeys(name for _, name in single))
        moves[layers] += [tuple(choice for choice in row if choice) for row in rows if all(row)]
    return moves


def _steps(problem: _Problem, moves: Mapping[Unit, list[tuple[Choice, ...]]], current: Allocation) -> Iterator[_Step]:
    """Yield the steps from here that save; a unit that cuts through a larger one in use has none."""
    owner = {layer: choice for choice in current.chosen for layer in choice.layers}
    before = _excess(problem, current.seconds, current.bytes)
    for layers, rows in moves.items():
        gone = tuple(dict.fromkeys(owner[layer] for layer in layers))
        if sum(len(choice.layers) for choice in gone) != len(layers):
            continue
        loss, seconds, size = (sum(getattr(choice, name) for choice in gone) for name in ("loss", "seconds", "bytes"))
        for added in rows:
            slower = current.seconds - seconds + sum(choice.seconds for choice in added)
            saving = before - _excess(problem, slower, current.bytes - size + sum(choice.bytes for choice in added))
            if saving > 1e-12:  # rounding must not pass for a saving: steps would go round in circles
                yield saving, sum(choice.loss for choice in added) - loss, gone, added


def _refuse(problem: _Problem, *, stuck: bool = False) -> NoReturn:
    """Say why nothing fits: no cover, a limit out of reach, limits out of reach together, or only that greedy is stuck."""
    if _solve(replace(problem, limits={})) is None:
        got = f"{len(problem.choices)} choices that cannot"
        raise InputError(f"options must be able to cover each layer exactly once, got {got}: give each layer one of its own")
    if stuck and _solve(problem):
        raise InputError(f"greedy steps must reach {_wanted(problem)}, got none that do: use optimise, which does")
    alone = {name: _least(problem, name, {}) for name in problem.limits}
    broken = [name for name, limit in problem.limits.items() if _solve(replace(problem, limits={name: limit})) is None]
    if broken:
        rule = " and ".join(f"{name} must be at least {alone[name]}" for name in broken)
        met = "".join(f" ({name} can be met: {alone[name]} is the least)" for name in alone if name not in broken)
        raise InputError(f"{rule}{met}, got {_wanted(problem)}: raise {' and '.join(broken)} or measure smaller formats")
    within = {name: _least(problem, name, {key: problem.limits[key] for key in alone if key != name}) for name in alone}
    least = "; ".join(f"{name} can be {alone[name]} alone, {within[name]} within the other limit" for name in alone)
    raise InputError(f"seconds and bytes must be within reach together, got {_wanted(problem)} ({least}): raise one")


def _least(problem: _Problem, name: str, limits: dict[str, float]) -> str:
    """Write the least bytes within limits that can be met, or the least seconds, rounded up to six digits to serve as a limit."""
    value = getattr(_solve(replace(problem, limits=limits), name), name)
    return str(value) if name == "bytes" else f"{float(SIX_UP.create_decimal(value * (1 - SLACK / 2))):g}"


def _wanted(problem: _Problem) -> str:
    return " and ".join(f"{name} <= {limit}" for name, limit in problem.limits.items()) or "no limit"

"""Annealing against all allocations of a small problem whose losses do not add up; records and columns on a tiny model."""

import math
from itertools import product

import pytest
import torch

from lib.core.runtime import generator
from lib.studies.joint import annealing, configurations, hardware_aware, measured_formats, search
from lib.studies.joint.hardware_aware import Budget
from lib.studies.joint.search import Allocation, Choice
from lib.studies.pruning import runs
from lib.studies.pruning.runs import Bench, Calibrations
from tests import tiny

ROWS = [
    Choice((name,), form, loss, 1.0, size)
    for name in "abcd"
    for form, loss, size in (("dense", 0.0, 8), ("int4", 0.1, 2), ("int3", 0.2, 1))
]


def together(found: Allocation) -> float:
    """Losses that do not add up: `a` and `b` harm each other, `c` and `d` make up for one another."""
    small = {layer for layer, form in found.formats.items() if form != "dense"}
    return found.loss + (5.0 if {"a", "b"} <= small else 0.0) - (0.1 if {"c", "d"} <= small else 0.0)


def test_a_walk_finds_what_sums_do_not_see_and_keeps_the_limits() -> None:
    limits = {"bytes": 20.0}
    start = search.optimise(ROWS, bytes=20)
    every = [dict(zip("abcd", forms, strict=True)) for forms in product(("dense", "int4", "int3"), repeat=4)]
    made = []
    for formats in every:
        chosen = [row for row in ROWS if formats[row.layers[0]] == row.format]
        made.append(Allocation(tuple(chosen), math.fsum(row.loss for row in chosen), 4.0, sum(row.bytes for row in chosen)))
    best = min(together(found) for found in made if found.bytes <= 20)
    bad = next(found for found in made if found.formats == {"a": "int4", "b": "int4", "c": "dense", "d": "dense"})
    assert bad.loss == pytest.approx(start.loss) and together(bad) > best + 4
    seen: list[Allocation] = []

    def measure(found: Allocation) -> float:
        seen.append(found)
        return together(found)

    got = annealing.walk(bad, ROWS, measure, limits=limits, steps=150, stream=generator(3, "walk"))
    assert together(got.best) == pytest.approx(best) == pytest.approx(min(got.losses)) and len(got.losses) == 151
    assert all(found.bytes <= 20 for found in seen) and got.losses[0] == together(bad)
    again = annealing.walk(bad, ROWS, together, limits=limits, steps=150, stream=generator(3, "walk"))
    assert again.losses == got.losses
    assert annealing.walk(bad, ROWS, together, limits=limits, steps=0, stream=generator(3)).best is bad


def test_a_walk_ends_where_nothing_else_fits() -> None:
    only = search.optimise(ROWS, bytes=4)
    assert annealing.walk(only, ROWS, together, limits={"bytes": 4.0}, steps=9, stream=generator(0)).losses == (together(only),)


def test_records_are_judged_on_other_windows_than_they_are_chosen_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny.model(tmp_path_factory.mktemp("annealing"), causal=False)
    bench = Bench(model, tiny.ids(8, 16, seed=3), tiny.ids(3, 16, seed=4), 4, 2, 5)
    prepared, others = (
        configurations.prepare(Calibrations(bench, 1), configurations.named(["int4", "int3"])),
        tiny.ids(2, 16, seed=8),
    )
    units = measured_formats.sensitivity(prepared, others, seed=7, draws=1)
    seconds, sizes = dict.fromkeys(prepared.offers(), 1.0), measured_formats.sizes(prepared)
    options, budget = measured_formats.choices(units, seconds, sizes), Budget(bytes=0.25)
    tried = hardware_aware.compare_allocations(prepared, options, [budget], draws=1, repeats=0)
    given = {"steps": 5, "draws": 1, "rows": 16, "seed": 7}
    more, table = annealing.compare(prepared, options, tried, others, **given)
    assert [one.strategy for one in more] == [annealing.ANNEALED, annealing.CHOSEN]
    by_name = table.set_index("strategy")
    assert list(by_name.index) == ["optimum", "uniform", "greedy", "random 1", "annealed", "by measured loss"]
    assert by_name.loc["by measured loss", "measured to choose"] == by_name["measured to choose"].min()
    assert by_name.loc["annealed", "measured to choose"] <= by_name.loc["optimum", "measured to choose"]
    first = tried[0].allocation
    assert first is not None and first.bytes <= 0.25 * tried[0].dense.bytes
    own, choosing = (
        float((measured_formats.loss_in(prepared, first.formats, bench=each) - runs.loss(each)).mean())
        for each in (Bench(model, bench.pool, read, 4, 1, 7) for read in (others, prepared.found.windows))
    )
    assert by_name.loc["optimum", "measured to choose"] == pytest.approx(choosing)
    assert by_name.loc["optimum", "measured"] == pytest.approx(own)
    assert by_name.loc["optimum", "measured - predicted"] == pytest.approx(own - first.loss)
    elsewhere = float((measured_formats.loss_in(prepared, first.formats) - runs.loss(bench)).mean())
    assert by_name.loc["optimum", "measured elsewhere"] == pytest.approx(elsewhere)
    assert bool((table["share of energy"] < 1).all()) and torch.equal(runs.loss(bench), runs.loss(bench))
    assert all(one.forward is None and one.increase is not None for one in more)

"""Allocation under a time and a size: against enumeration and dynamic programming, with units that overlap."""

import ctypes
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib.core.errors import InputError
from lib.studies.joint import search
from lib.studies.joint.search import Allocation, Choice

# The checker of types draws at random which item of a tuple it looks at, also when a strategy makes a Choice.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
SLACK = 1 + 1e-9


def partitions(options: Sequence[Choice], left: frozenset[str]) -> Iterator[tuple[Choice, ...]]:
    """Yield every way to cover the layers once each."""
    if not left:
        yield ()
        return
    first = min(left)
    for choice in options:
        if first in choice.layers and left.issuperset(choice.layers):
            for rest in partitions(options, left - set(choice.layers)):
                yield (choice, *rest)


def every(options: Sequence[Choice]) -> list[tuple[Choice, ...]]:
    return list(partitions(options, frozenset(layer for choice in options for layer in choice.layers)))


def total(chosen: Sequence[Choice], name: str) -> Any:
    return math.fsum(getattr(choice, name) for choice in chosen)


def within(chosen: Sequence[Choice], seconds: float | None, bytes: float | None) -> bool:
    fast = seconds is None or total(chosen, "seconds") <= seconds * SLACK
    return fast and (bytes is None or total(chosen, "bytes") <= bytes)


def singles(layer: str, **formats: tuple[float, float, int]) -> list[Choice]:
    """Make the choices of one layer: loss, seconds and bytes by format."""
    return [Choice((layer,), name, *values) for name, values in formats.items()]


@st.composite
def instances(draw: st.DrawFn) -> list[Choice]:
    """Draw up to five layers in two to three formats, and up to three structured choices that overlap as they like.

    Few different values make ties and exact hits of a limit common.
    """
    layers = "abcde"[: draw(st.integers(1, 5))]
    seconds = st.integers(1, 9).map(lambda value: value / 10)
    row = st.tuples(st.integers(-3, 9).map(lambda value: value / 4), seconds, st.integers(1, 9).map(lambda value: 96 * value))
    formats = ("dense", "int4", "2:4")[: draw(st.integers(2, 3))]
    options = [Choice((layer,), name, *draw(row)) for layer in layers for name in formats]
    units = [unit for size in range(2, len(layers) + 1) for unit in itertools.combinations(layers, size)]
    if units:
        keys = draw(st.lists(st.tuples(st.sampled_from(units), st.sampled_from(("half", "int4"))), max_size=3, unique=True))
        options += [Choice(unit, name, *draw(row)) for unit, name in keys]
    return draw(st.permutations(options))


limits = st.none() | st.floats(0.3, 1.2)


def scaled(options: list[Choice], share: float | None, name: str) -> float | None:
    """Return a share of the largest total, or None."""
    return None if share is None else share * max(total(chosen, name) for chosen in every(options))


def check(found: Allocation, options: list[Choice], seconds: float | None = None, bytes: float | None = None) -> None:
    """Each layer once, only what was offered, totals that are true, limits met."""
    layers = list(dict.fromkeys(layer for choice in options for layer in choice.layers))
    assert sorted(layer for choice in found.chosen for layer in choice.layers) == sorted(layers)
    assert set(found.chosen) <= set(options) and set(found.formats) == set(layers)
    firsts = [min(layers.index(layer) for layer in choice.layers) for choice in found.chosen]
    assert firsts == sorted(firsts)
    assert (found.loss, found.seconds) == (total(found.chosen, "loss"), total(found.chosen, "seconds"))
    assert found.bytes == sum(choice.bytes for choice in found.chosen)
    assert within(found.chosen, seconds, bytes)


# --- exact ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(instances(), limits, limits)
def test_the_best_allocation_of_all(options: list[Choice], fast: float | None, small: float | None) -> None:
    seconds, bytes = scaled(options, fast, "seconds"), scaled(options, small, "bytes")
    fitting = [chosen for chosen in every(options) if within(chosen, seconds, bytes)]
    if not fitting:
        with pytest.raises(InputError):
            search.optimise(options, seconds=seconds, bytes=bytes)
        return
    found = search.optimise(options, seconds=seconds, bytes=bytes)
    check(found, options, seconds, bytes)
    assert found.loss == pytest.approx(min(total(chosen, "loss") for chosen in fitting), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(instances(), st.data())
def test_a_limit_that_an_allocation_just_meets_admits_it(options: list[Choice], data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(every(options)))
    seconds, bytes = total(target, "seconds"), int(total(target, "bytes"))
    assert search.optimise(options, seconds=seconds, bytes=bytes).loss <= total(target, "loss") + 1e-9
    found = search.optimise(options, bytes=bytes)
    assert found.bytes <= bytes and found.loss <= total(target, "loss") + 1e-9


@settings(max_examples=25, deadline=None)
@given(instances(), st.lists(st.floats(0.3, 1.2), min_size=2, max_size=4))
def test_a_larger_budget_never_loses_more(options: list[Choice], shares: list[float]) -> None:
    least = {name: min(total(chosen, name) for chosen in every(options)) for name in ("seconds", "bytes")}
    for name in ("seconds", "bytes"):
        budgets = sorted(max(least[name], scaled(options, share, name) or 0.0) for share in shares)
        losses = [search.optimise(options, **{name: budget}).loss for budget in budgets]
        assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(losses))


def slow_knapsack(options: Sequence[Choice], limit: int) -> float:
    """Least loss within a whole number of bytes, single layers only, by dynamic programming."""
    best = np.full(limit + 1, np.inf)
    best[0] = 0.0
    for layer in dict.fromkeys(choice.layers for choice in options):
        rows = [np.full(limit + 1, np.inf)]
        for choice in (choice for choice in options if choice.layers == layer and choice.bytes <= limit):
            rows.append(np.concatenate([np.full(choice.bytes, np.inf), best[: limit + 1 - choice.bytes] + choice.loss]))
        best = np.min(rows, axis=0)
    return float(best.min())


@pytest.mark.parametrize("unit", [1e-7, 1.0, 1e4])
def test_many_layers_whatever_the_unit_of_the_loss(unit: float) -> None:
    """The solver by itself would accept what is within 1e-4 or, of small losses, within 1e-6 of the best."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 400, 60)
    options = [
        Choice((f"layer {index}",), name, unit * (100.0 + loss * float(rng.lognormal())), 1.0, int(size * share))
        for index, size in enumerate(sizes)
        for name, share, loss in (("dense", 1.0, 0.0), ("int8", 0.52, 0.1), ("int4", 0.27, 0.4), ("2:4", 0.5625, 0.3))
    ]
    for share in (0.35, 0.5, 0.8):
        limit = int(share * sizes.sum())
        found = search.optimise(options, bytes=limit)
        assert found.bytes <= limit
        assert found.loss / unit == pytest.approx(slow_knapsack(options, limit) / unit, rel=1e-11)


def test_a_byte_too_many_is_too_many() -> None:
    """A thousandth of a billionth over: no solver sees that by itself."""
    options = singles("a", dense=(0.0, 1.0, 10**12 + 1), int4=(1.0, 1.0, 5 * 10**11))
    assert search.optimise(options, bytes=10**12).formats == {"a": "int4"}
    assert search.optimise(options, bytes=10**12 + 1).formats == {"a": "dense"}
    assert search.optimise(options, bytes=10**12 + 0.5).formats == {"a": "int4"}


def test_times_meet_their_limit_whatever_the_order_of_the_sum() -> None:
    options = [Choice((name,), "dense", 0.0, 0.1, 1) for name in "abc"]
    assert search.optimise(options, seconds=0.3).seconds == pytest.approx(0.3)  # 0.1 + 0.1 + 0.1 > 0.3
    with pytest.raises(InputError, match=r"seconds must be at least 0\.3,"):
        search.optimise(options, seconds=0.3 * (1 - 1e-6))


def test_extreme_limits_and_sizes_do_not_confuse_the_solver() -> None:
    options = singles("a", dense=(0.0, 1e-6, 1), int4=(0.5, 1e5, 10**13)) + singles(
        "b", dense=(0.0, 1e-6, 1), int4=(-1.0, 2e-6, 2)
    )
    assert search.optimise(options, seconds=1e9, bytes=1e18).formats == {"a": "dense", "b": "int4"}
    assert search.optimise(options, seconds=2e-6).formats == {"a": "dense", "b": "dense"}
    assert search.optimise(options, seconds=3e-6, bytes=3).formats == {"a": "dense", "b": "int4"}


def test_losses_that_are_all_zero() -> None:
    options = singles("a", dense=(0.0, 2.0, 8), int4=(0.0, 1.0, 2)) + singles("b", dense=(0.0, 0.0, 0))
    assert search.optimise(options, bytes=2).formats == {"a": "int4", "b": "dense"}


# --- structured ----------------------------------------------------------------------------------------------------------


def test_a_structured_choice_takes_all_its_layers_or_none() -> None:
    """Halving the width of gate, up and down costs 0.5 and leaves 3 s; per layer only 2 s and 0.4 could be had for q."""
    roles = ("gate", "up", "down", "q")
    options = [choice for role in roles for choice in singles(role, dense=(0.0, 2.0, 8), int4=(0.4, 1.5, 2))]
    options.append(Choice(("gate", "up", "down"), "width 0.5", 0.5, 3.0, 12))
    found = search.optimise(options, seconds=5.0)  # of the 8 s; three int4 and a half: 1.2 and 6.5 s
    assert found.formats == {"gate": "width 0.5", "up": "width 0.5", "down": "width 0.5", "q": "dense"}
    assert (found.loss, found.seconds, found.bytes) == (0.5, 5.0, 20) and len(found.chosen) == 2
    assert search.optimise(options, seconds=7.5).loss == 0.4  # one int4, no matter which
    assert search.optimise(options, seconds=4.5).loss == pytest.approx(0.9)


def test_units_that_cut_through_each_other_are_never_taken_together() -> None:
    """Both pairs are free of charge and fast, but share b."""
    options = [choice for layer in "abc" for choice in singles(layer, dense=(0.25, 2.0, 4))]
    options += [Choice(("a", "b"), "half", -1.0, 1.0, 2), Choice(("b", "c"), "half", -2.0, 1.0, 2)]
    found = search.optimise(options)
    assert found.formats == {"a": "dense", "b": "half", "c": "half"} and found.loss == -1.75
    assert found.seconds == 3.0


def test_layers_that_only_a_unit_offers() -> None:
    options = [Choice(("a", "b"), "dense", 0.0, 4.0, 8), Choice(("b", "a"), "half", 0.5, 2.0, 4)]
    assert search.optimise(options, seconds=3).formats == {"a": "half", "b": "half"}
    assert search.uniform(options, seconds=3) == search.greedy(options, seconds=3) == search.optimise(options, seconds=3)


def test_options_that_cannot_cover_the_layers_once_each() -> None:
    options = [Choice(("a", "b"), "dense", 0.0, 1.0, 1), Choice(("b", "c"), "dense", 0.0, 1.0, 1)]
    with pytest.raises(InputError, match="cover each layer exactly once, got 2 choices that cannot: give each layer"):
        search.optimise(options)


# --- noise below zero ----------------------------------------------------------------------------------------------------


def test_negative_losses_are_sought_unless_floored() -> None:
    options = singles("a", dense=(0.0, 2.0, 8), int8=(-0.25, 1.5, 4), int4=(0.5, 1.0, 2))
    options += singles("b", dense=(0.0, 2.0, 8), int4=(0.125, 1.0, 2))
    seeking = search.optimise(options, seconds=3.5)
    assert seeking.formats == {"a": "int8", "b": "dense"} and seeking.loss == -0.25
    assert search.optimise(options).formats["a"] == "int8"
    floored = search.floor_at_zero(options)
    assert [choice.loss for choice in floored] == [0.0, 0.0, 0.5, 0.0, 0.125]
    assert search.optimise(floored, seconds=3.5).loss == 0.0
    assert search.optimise(floored, seconds=2.0).loss == 0.625
    assert options[1].loss == -0.25


# --- limits that cannot be met -------------------------------------------------------------------------------------------

TABLE = [
    *singles("a", dense=(0.0, 4.0, 40), fast=(0.5, 1.0, 30), small=(0.5, 3.0, 10)),
    *singles("b", dense=(0.0, 4.0, 40), fast=(0.5, 1.0, 30), small=(0.5, 3.0, 10)),
]
METHODS: list[Callable[..., Any]] = [
    search.optimise,
    search.greedy,
    lambda options, **limits: search.random(options, draws=2, generator=torch.Generator(), **limits),
]


@pytest.mark.parametrize("method", METHODS, ids=["optimise", "greedy", "random"])
@pytest.mark.parametrize(
    ("seconds", "bytes", "words"),
    [
        (1.5, None, "seconds must be at least 2, got seconds <= 1.5: raise seconds or measure smaller formats"),
        (None, 15, "bytes must be at least 20, got bytes <= 15: raise bytes or measure"),
        (
            1.5,
            60,
            "seconds must be at least 2 (bytes can be met: 20 is the least), got seconds <= 1.5 and bytes <= 60: raise seconds",
        ),
        (
            3.0,
            15,
            "bytes must be at least 20 (seconds can be met: 2 is the least), got seconds <= 3.0 and bytes <= 15: raise bytes",
        ),
        (1.5, 15, "seconds must be at least 2 and bytes must be at least 20, got"),
        (1.5, 15, "got seconds <= 1.5 and bytes <= 15: raise seconds and bytes or"),
        (
            3.0,
            30,
            "seconds and bytes must be within reach together, got seconds <= 3.0 and bytes <= 30 (seconds can be 2 alone, 6",
        ),
        (3.0, 30, "6 within the other limit; bytes can be 20 alone, 60 within the other limit): raise one"),
    ],
)
def test_a_refusal_says_which_limit_binds(
    method: Callable[..., Any], seconds: float | None, bytes: float | None, words: str
) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        method(TABLE, seconds=seconds, bytes=bytes)


@settings(max_examples=40, deadline=None)
@given(instances(), st.floats(0.05, 0.9), st.floats(0.05, 0.9))
def test_what_a_refusal_promises_can_be_had(options: list[Choice], fast: float, small: float) -> None:
    seconds, bytes = scaled(options, fast, "seconds"), scaled(options, small, "bytes")
    allocations = every(options)
    assume(not any(within(chosen, seconds, bytes) for chosen in allocations))
    with pytest.raises(InputError) as caught:
        search.optimise(options, seconds=seconds, bytes=bytes)
    message = str(caught.value)
    reachable = {
        "seconds": any(within(chosen, seconds, None) for chosen in allocations),
        "bytes": any(within(chosen, None, bytes) for chosen in allocations),
    }
    assert ("together" in message) == all(reachable.values())
    for name, can in reachable.items():
        assert (f"{name} must be at least" in message) == (not can)
    for name, least in re.findall(r"(seconds|bytes) (?:must be at least|can be met:|can be) (\d[\d.e+-]*)", message):
        assert search.optimise(options, **{name: float(least)})
        assert float(least) == pytest.approx(min(total(chosen, name) for chosen in allocations), rel=1e-5)
    for least, other in zip(re.findall(r"(\d[\d.e+-]*) within", message), ("seconds", "bytes"), strict=False):
        changed = {"seconds": seconds, "bytes": bytes, other: float(least)}
        assert search.optimise(options, **changed)


def test_the_least_time_is_rounded_up_so_that_it_can_be_asked_for() -> None:
    options = singles("a", dense=(0.0, 1 / 3, 1)) + singles("b", dense=(0.0, 1e-7, 1))
    with pytest.raises(InputError, match=r"seconds must be at least 0\.333334,"):
        search.optimise(options, seconds=0.1)
    assert search.optimise(options, seconds=0.333334)


# --- baselines -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(instances(), st.floats(0.3, 1.1), limits)
def test_baselines_fit_and_never_beat_the_best(options: list[Choice], fast: float, small: float | None) -> None:
    budget = {"seconds": scaled(options, fast, "seconds"), "bytes": scaled(options, small, "bytes")}
    assume(any(within(chosen, *budget.values()) for chosen in every(options)))
    best = search.optimise(options, **budget).loss
    found = search.random(options, draws=2, generator=torch.Generator().manual_seed(1), **budget)
    baselines: list[Callable[..., Allocation]] = [search.uniform, search.greedy]
    for method in baselines:
        with suppress(InputError):  # there may be no such allocation; that they find one is tested below
            found.append(method(options, **budget))
    for allocation in found:
        check(allocation, options, *budget.values())
        assert allocation.loss >= best - 1e-9


@settings(max_examples=30, deadline=None)
@given(instances(), st.floats(0.3, 1.1))
def test_greedy_always_arrives_with_one_limit_and_no_structure(options: list[Choice], share: float) -> None:
    options = [choice for choice in options if len(choice.layers) == 1]
    seconds = scaled(options, share, "seconds")
    assume(any(within(chosen, seconds, None) for chosen in every(options)))
    check(search.greedy(options, seconds=seconds), options, seconds)


@settings(max_examples=30, deadline=None)
@given(instances(), limits)
def test_uniform_is_the_best_of_one_format(options: list[Choice], share: float | None) -> None:
    seconds = scaled(options, share, "seconds")
    fitting = [
        total(chosen, "loss")
        for chosen in every(options)
        if len({choice.format for choice in chosen}) == 1 and within(chosen, seconds, None)
    ]
    if fitting:
        assert search.uniform(options, seconds=seconds).loss == pytest.approx(min(fitting), abs=1e-9)
    else:
        with pytest.raises(InputError, match=r"one format must fit seconds <= .*, got .*: raise the limits or use optimise"):
            search.uniform(options, seconds=seconds)


def test_uniform_passes_over_formats_that_a_layer_lacks() -> None:
    options = singles("a", dense=(0.0, 4.0, 40), int4=(0.5, 2.0, 10), int8=(0.0, 1.0, 20)) + singles("b", int4=(0.25, 2.0, 10))
    assert search.uniform(options).formats == {"a": "int4", "b": "int4"}
    with pytest.raises(InputError, match="one format must fit bytes <= 15, got int4 with 4 s and 20 bytes: raise"):
        search.uniform(options, bytes=15)
    with pytest.raises(InputError, match="one format must fit no limit, got none of all layers"):
        search.uniform(options[:1] + options[3:])


def test_greedy_takes_the_best_ratio_and_not_the_least_loss() -> None:
    """Of 6 s one must go: a saves 3 s for 0.3, b 0.5 s for 0.1 (worse ratio), c 1 s for 0.25; more than 1 s does not count."""
    options = singles("a", dense=(0.0, 4.0, 4), int4=(0.3, 1.0, 1))
    options += singles("b", dense=(0.0, 1.0, 4), int4=(0.1, 0.5, 1)) + singles("c", dense=(0.0, 1.0, 4), int4=(0.25, 0.0, 1))
    assert search.greedy(options, seconds=6.0).loss == 0.0
    # Saved seconds for the loss: a 1/0.3, b 0.5/0.1, c 1/0.25. So b goes, then 0.5 s is left: a 0.5/0.3, c 0.5/0.25.
    assert search.greedy(options, seconds=5.0).formats == {"a": "dense", "b": "int4", "c": "int4"}
    # Four seconds: a 3/0.3 = 10 comes first, then b 0.5/0.1 = 5 before c 1/0.25 = 4, then c.
    assert search.greedy(options, seconds=2.5).formats == {"a": "int4", "b": "int4", "c": "dense"}
    # Two: 3 of 4 saved by a; b and c then bring 0.5 and 1 of the missing 1: 5 and 4 a loss, so b, and c for the rest.
    assert search.greedy(options, seconds=2.0).loss == pytest.approx(0.65)
    assert search.optimise(options, seconds=2.0).loss == pytest.approx(0.55)


def test_greedy_takes_what_costs_nothing_first_and_the_largest_saving_of_that() -> None:
    options = singles("a", dense=(0.0, 4.0, 4), int4=(1e-9, 0.0, 1))
    options += singles("b", dense=(0.0, 4.0, 4), int8=(-0.5, 3.5, 2), int4=(0.0, 3.0, 1))
    assert search.greedy(options, seconds=7.0).formats == {"a": "dense", "b": "int4"}


def test_greedy_weighs_both_limits_by_their_size() -> None:
    """Only time is short at 10 s: small saves bytes that nobody asked for, and the bytes' larger numbers must not lead."""
    options = singles("a", dense=(0.0, 6.0, 4000), small=(0.1, 6.0, 10), fast=(0.4, 3.0, 4000))
    options += singles("b", dense=(0.0, 6.0, 4000), small=(0.2, 5.0, 1000), fast=(0.5, 4.0, 4000))
    assert search.greedy(options, seconds=10.0, bytes=9000).formats == {"a": "fast", "b": "dense"}
    # Both short: excess 0.2 of the time and 0.6 of the bytes; a small saves 0.6 for 0.1, then time is as before.
    assert search.greedy(options, seconds=10.0, bytes=5000).formats == {"a": "small", "b": "fast"}


def test_greedy_moves_in_and_out_of_a_structured_choice() -> None:
    options = [choice for layer in "ab" for choice in singles(layer, dense=(0.0, 4.0, 4), int4=(2.0, 1.0, 1))]
    options.append(Choice(("a", "b"), "half", 0.5, 4.0, 4))
    assert search.greedy(options, seconds=4.0).formats == {"a": "half", "b": "half"}
    assert search.greedy(options, seconds=3.0).formats == {"a": "int4", "b": "int4"}  # by way of half
    options = [choice for choice in options if choice.layers != ("b",) or choice.format == "dense"]
    options += singles("b", int8=(0.1, 1.0, 2))
    with pytest.raises(InputError, match=r"greedy steps must reach seconds <= 3\.0, got none that do: use optimise, which does"):
        search.greedy(options, seconds=3.0)  # out of half only as int4 and int8, which are two formats
    assert search.optimise(options, seconds=3.0).formats == {"a": "int4", "b": "int8"}


def test_greedy_starts_where_it_is_told() -> None:
    options = singles("a", dense=(0.0, 4.0, 4), int8=(0.1, 3.0, 2), int4=(0.5, 1.0, 1))
    assert search.greedy(options, start="int8", seconds=9.0).formats == {"a": "int8"}
    with pytest.raises(InputError, match="the start must be a format of all layers, got 'int3': name another"):
        search.greedy(options, start="int3", seconds=9.0)
    with pytest.raises(InputError, match="got 'int8'"):
        search.greedy(options + singles("b", dense=(0.0, 1.0, 1)), start="int8", seconds=9.0)


def test_random_draws_follow_the_generator_and_ignore_the_losses() -> None:
    options = [choice for layer in "abcdef" for choice in singles(layer, dense=(0.0, 4.0, 4), int4=(0.5, 1.0, 1))]
    other = [Choice(choice.layers, choice.format, 7.0 - choice.loss, choice.seconds, choice.bytes) for choice in options]

    def draw(rows: list[Choice], seed: int) -> list[Allocation]:
        return search.random(rows, draws=5, generator=torch.Generator().manual_seed(seed), seconds=16.0)

    first = draw(options, 0)
    assert draw(options, 0) == first and draw(options, 1) != first
    assert [found.formats for found in draw(other, 0)] == [found.formats for found in first]
    assert len({tuple(found.formats.values()) for found in first}) > 1
    for found in first:
        check(found, options, 16.0)


def test_without_limits_all_formats_of_a_layer_are_equally_likely() -> None:
    options = [
        choice for layer in "abcd" for choice in singles(layer, dense=(0.0, 4.0, 4), int8=(0.1, 2.0, 2), int4=(9.0, 1.0, 1))
    ]
    drawn = search.random(options, draws=150, generator=torch.Generator().manual_seed(0))
    counts = [sum(list(found.formats.values()).count(name) for found in drawn) for name in ("dense", "int8", "int4")]
    assert sum(counts) == 600 and all(abs(count - 200) < 4.5 * math.sqrt(600 * 2 / 9) for count in counts)


def test_structured_choices_are_drawn_too_but_not_for_counting_once() -> None:
    """One number for two layers would make the pair win two times in three; a number for each layer, one time in six or so."""
    options = [choice for layer in "ab" for choice in singles(layer, dense=(0.0, 4.0, 4), int4=(0.1, 2.0, 2))]
    options.append(Choice(("a", "b"), "half", 0.0, 4.0, 4))
    drawn = search.random(options, draws=200, generator=torch.Generator().manual_seed(0))
    share = sum(len(found.chosen) == 1 for found in drawn) / 200
    assert 0.2 < share < 0.47  # P(2 u < min + min) = 1/3


# --- what cannot be used -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "options must have a choice for every layer, got none"),
        ([Choice(("a",), "dense", math.nan, 1.0, 1)], "finite loss, .*got Choice.*nan.*: correct"),
        ([Choice(("a",), "dense", -math.inf, 1.0, 1)], "finite loss"),
        ([Choice(("a",), "dense", 0.0, -1.0, 1)], "seconds >= 0"),
        ([Choice(("a",), "dense", 0.0, math.nan, 1)], "seconds >= 0"),
        ([Choice(("a",), "dense", 0.0, math.inf, 1)], "seconds >= 0"),
        ([Choice(("a",), "dense", 0.0, 1.0, -1)], "bytes >= 0"),
        ([Choice((), "dense", 0.0, 1.0, 1)], "distinct layers"),
        ([Choice(("a", "a"), "dense", 0.0, 1.0, 1)], "distinct layers"),
        (singles("a", dense=(0.0, 1.0, 1)) * 2, "a unit must be offered a format once, got .* again"),
        ([Choice(("a", "b"), "half", 0.0, 1.0, 1), Choice(("b", "a"), "half", 0.0, 2.0, 1)], "a format once"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(options: list[Choice], words: str) -> None:
    for method in (*METHODS, search.uniform):
        with pytest.raises(InputError, match=words):
            method(options, seconds=1.0)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["seconds", "bytes"])
def test_limits_that_are_none_are_refused(limit: float, name: str) -> None:
    for method in (*METHODS, search.uniform):
        with pytest.raises(InputError, match=f"limits must be positive and finite, got .*'{name}': .*: use None"):
            method(TABLE, **{name: limit})


def test_no_draws_are_refused() -> None:
    with pytest.raises(InputError, match="draws must be positive, got 0"):
        search.random(TABLE, draws=0, generator=torch.Generator())


# --- the solver ----------------------------------------------------------------------------------------------------------


def test_what_the_solver_prints_is_swallowed_and_nothing_else(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints from C, past its own switch; what waits in the buffers before and what comes after must still arrive."""
    solve, library = search.milp, ctypes.CDLL(None)

    def chatty(*args: Any, **options: Any) -> Any:
        library.printf(b"from the C library\n")
        os.write(1, b"straight to the file\n")
        return solve(*args, **options)

    monkeypatch.setattr(search, "milp", chatty)
    library.printf(b"before\n")
    search.optimise(TABLE)
    library.printf(b"after\n")
    library.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def test_standard_output_comes_back_when_the_solver_fails(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(search, "milp", broken)
    with pytest.raises(MemoryError):
        search.optimise(TABLE)
    os.write(1, b"here\n")
    assert capfd.readouterr().out == "here\n"


@pytest.mark.parametrize("status", [0, 1, 3, 4])
def test_answers_of_the_solver_are_checked(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time ran out, unbounded, trouble; or called optimal though layer a is taken twice and b never."""
    answer = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]) if status == 0 else None
    monkeypatch.setattr(search, "milp", lambda *_, **__: SimpleNamespace(status=status, x=answer, message="told so"))
    with pytest.raises(RuntimeError, match="told so"):
        search.optimise(TABLE)

"""The prices of the core by hand, and what the paper profile and its page say of them."""

import dataclasses
import itertools
import math
from typing import Any

import pytest

from lib.core import config
from lib.core.config import Config
from lib.core.settings.grid import Core, Grid
from lib.grid import cells, costs, run
from lib.grid.core import expansion, listing, prices
from lib.grid.core.prices import Price
from lib.grid.costs import Shape
from recipes.pages import values

SHAPE = costs.SHAPES["GSAI-ML/LLaDA-8B-Base"]


def paper(**changes: Any) -> tuple[Config, Grid, Core]:
    loaded = config.load("paper")
    assert loaded.grid is not None and loaded.grid.core is not None
    core = dataclasses.replace(loaded.grid.core, **changes)
    grid = dataclasses.replace(loaded.grid, core=core)
    return dataclasses.replace(loaded, grid=grid), grid, core


def cell_of(loaded: Config, task: str) -> cells.Cell:
    return next(cell for cell in expansion.cells_of(loaded) if cell.task == task)


def by_counting(tokens: int, draws: int) -> float:
    """Expected masks: each set of k tokens comes with the probability 1 / C(tokens, k) in each of draws / tokens draws."""
    return sum(
        1 - (1 - 1 / math.comb(tokens, len(mask))) ** (draws / tokens)
        for hidden in range(1, tokens + 1)
        for mask in itertools.combinations(range(tokens), hidden)
    )


@pytest.mark.parametrize(("tokens", "draws"), [(1, 1), (2, 8), (3, 128), (6, 64), (9, 32)])
def test_masks_that_come_twice_are_counted_once(tokens: int, draws: int) -> None:
    assert prices.distinct_masks(tokens, draws) == pytest.approx(by_counting(tokens, draws), rel=1e-9)


def test_likelihoods_are_priced_by_rows() -> None:
    loaded, grid, core = paper()
    made = prices.measuring(cell_of(loaded, "hellaswag"), core, grid)
    rows = 900 * 4 * prices.distinct_masks(30, 64) * 2  # half of 128 draws, with and without the question
    assert (made.rows, made.tokens) == pytest.approx((rows, rows * 110)) and made.forwards == math.ceil(rows / 32)
    letters = prices.measuring(cell_of(loaded, "mmlu"), core, grid)
    assert letters == Price(14042, 14042 * 700, math.ceil(14042 / 32))
    whole = prices.measuring(cell_of(loaded, "hellaswag"), core, grid, drawn=1.0)
    assert whole.rows == pytest.approx(900 * 4 * prices.distinct_masks(30, 128) * 2)


@pytest.mark.parametrize(
    ("cache", "tokens"),
    [
        ("none", 256 * 1156),
        ("prefix", 8 * 1156 + sum(31 * (256 - 32 * block) for block in range(8))),
        ("dual", 8 * 1156 + 248 * 32),
    ],
)
def test_generation_is_priced_by_what_a_pass_computes(cache: str, tokens: int) -> None:
    loaded, grid, core = paper(cache=cache)
    made = prices.measuring(cell_of(loaded, "gsm8k"), core, grid)
    assert made == Price(1319 * 256, 1319 * tokens, 165 * 256)


def test_seconds_by_hand() -> None:
    shape = Shape(hidden=8, layers=2, heads=2, kv_heads=2, mlp=16, vocab=10)
    weights = 2 * (4 * 8 * 8 + 3 * 8 * 16)
    assert Price(1, 1e12, 1).seconds(shape, teraflops=2.0) == pytest.approx(2 * weights / 2.0)
    assert Price(1, 1, 1000).seconds(shape, teraflops=2.0) == pytest.approx(1000 * 2 * 0.0008)  # no pass is faster
    assert prices.reading(shape) == pytest.approx(20 + 2 * 2 * shape.weights / 1e9)


def test_a_turn_prunes_in_the_first_round_or_in_every_one() -> None:
    loaded, grid, core = paper()
    turns = [turn for turn in expansion.turns(loaded) if turn.variant.method == "SparseGPT"]
    how: dict[str, Any] = {"teraflops": 100.0}
    pruning = prices.making(turns[0].variant, SHAPE, **how)
    calibration = 2 * 2 * 128 * 2048 * SHAPE.linear_weights / 100e12  # two passes over 128 windows
    assert pruning == pytest.approx(calibration + 32 * (6 * 4096 + 12288) * 0.0002)
    for number, turn in enumerate(turns):
        measured = sum(prices.measuring(cell, core, grid).seconds(SHAPE, **how) for cell in turn.cells)
        found = prices.seconds(turn, core, grid, SHAPE, **how)
        assert found == pytest.approx(measured + prices.reading(SHAPE) + (pruning if number == 0 else 0))
        _, _, forgetful = paper(keep_weights=False)
        assert prices.seconds(turn, forgetful, grid, SHAPE, **how) == pytest.approx(measured + prices.reading(SHAPE) + pruning)


def test_the_resolution_by_hand() -> None:
    _, grid, core = paper(discordant=0.2, documents={"hellaswag": 500})
    found = prices.resolution(core, grid, ["piqa", "hellaswag"])
    new = 1 / 1838 + 1 / 500
    assert found.anew == pytest.approx(100 * 1.96 * math.sqrt(0.2 * new) / 2)
    assert found.here == pytest.approx(100 * 1.96 * math.sqrt(0.2 * (1 / 500 - 1 / 10042)) / 2)
    assert found.anew_at_best == pytest.approx(100 * 1.96 * math.sqrt(0.2 * (1 / 1838 + 1 / 10042)) / 2)
    few = dataclasses.replace(grid, limit=10)
    assert prices.asked("mmlu", core, few) == (570, 14042) and prices.asked("hellaswag", core, few) == (10, 10042)


def test_the_paper_is_a_day_and_a_quarter_of_a_point() -> None:
    loaded, grid, core = paper()
    hours = sum(prices.seconds(turn, core, grid, SHAPE, teraflops=300.0) for turn in expansion.turns(loaded)) / 3600
    assert 18 < hours <= 24
    names = prices.benchmarks(core)
    assert len(names) == 8 and sum(prices.asked(task, core, grid)[1] for task in names) == 31173
    assert 0.2 < prices.resolution(core, grid, names).here <= 0.25
    fewer = dataclasses.replace(core, documents={"hellaswag": 850})
    assert prices.resolution(fewer, dataclasses.replace(grid, core=fewer), names).here > 0.25  # 900 are not too many


def said(**overrides: Any) -> list[str]:
    lines: list[str] = []
    run.show(config.load("paper", overrides={"grid.teraflops": 300.0, **overrides}), say=lines.append)
    return lines


def test_the_plan_prices_the_core_first_and_the_rest_behind() -> None:
    lines = said()
    assert lines[0].startswith("core: 7 variants of llada-8b at 50%, 63 cells, 0 finished; ")
    assert lines[1] == "speed: 300 TFLOP/s, as grid.teraflops says"
    assert lines[-1].startswith("the rest of the grid, --set grid.scope=all: 2,988 cells, ")
    assert not any("llama-3.1-8b" in line for line in lines)  # the core does not need it
    everything = said(**{"grid.scope": "all"})
    assert everything[: len(lines) - 1] == lines[:-1]
    assert everything[len(lines) - 1].startswith("2988 cells on ")
    hours = [line.split()[-1] for line in lines if line.split()[:2] in (["1", "nelbo"], ["4", "race,"])]
    assert float(hours[0]) < 1 and lines[0].split("; ")[1].startswith(f"{float(hours[1]):.1f} hours")


def test_the_page_says_what_the_plan_says() -> None:
    lines = said()
    hours, slowest = (
        lines[0].split("; ")[1].split()[0],
        next(line for line in lines if line.startswith("priced as if")).split()[-2],
    )
    assert (values.value("core.hours"), values.value("core.hours_without_races")) == (hours, slowest)
    words = next(line for line in lines if line.startswith("memory: ")).split()
    assert (values.value("core.gpu_gigabytes"), values.value("core.disk_gigabytes")) == (words[3], words[8])
    rest = lines[-1].split(": ")[1].split()
    assert (values.value("grid.cells"), values.value("grid.hours")) == (rest[0], rest[2])
    table = [line.split() for line in lines if line.split()[:1] in (["1"], ["2"], ["3"], ["4"])]
    for number, line in enumerate(table[:4], 1):
        assert [values.value(f"core.round{number}.{key}") for key in ("hours", "first", "all")] == line[-3:]


def test_finished_cells_cost_nothing_more() -> None:
    loaded, grid, core = paper()
    turns = expansion.turns(loaded)
    done = [cell.spec(code="c")["id"] for cell in turns[0].cells]
    made = listing.Priced(turns, core, grid, SHAPE, teraflops=300.0, itemsize=2, finished=done, code="c")
    assert made.hours(turns[0], left=True) == 0 < made.hours(turns[0]) and made.hours(turns[1], left=True) == made.hours(turns[1])

"""The table of verdicts, from records written by hand."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest

from lib.core import config
from lib.core.config import Config
from lib.grid.cells import LOSS, Cell
from lib.grid.core import expansion, verdicts
from lib.grid.store import Record

SINK, WANDA = verdicts.PAIRS[0]
MARKS = {SINK: "1111111110" * 10, WANDA: "0111111110" * 10}  # ten of a hundred documents tell them apart, all one way


@pytest.fixture
def profile() -> Config:
    """The first pair on two tasks and the loss."""
    loaded = config.load("paper")
    assert loaded.grid is not None and loaded.grid.core is not None
    core = dataclasses.replace(
        loaded.grid.core, methods=(SINK, WANDA), rounds=((LOSS,), ("piqa", "hellaswag")), draws={}, audit=4
    )
    return dataclasses.replace(loaded, grid=dataclasses.replace(loaded.grid, core=core))


def result(marks: str, *, of: int, final: str | None = None) -> dict[str, Any]:
    counts = {"draws": 30, "all_draws": 40, "stopped": 8, "audited": 3}
    scores = {"metric": "acc", "documents": len(marks), "scores": {"acc": marks}, "asked of": of}
    return {**scores, "race": counts, "final": {"acc": final or marks}}


def found(loaded: Config, given: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[Cell, Record | None]:
    def record(cell: Cell) -> Record | None:
        own = given.get((cell.variant.method, cell.task))
        return None if own is None else Record({}, "c", "d", "done", dict(own))

    return {cell: record(cell) for cell in expansion.cells_of(loaded)}


def rows(loaded: Config, given: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    made = verdicts.table(found(loaded, given), loaded)
    assert set(made["better"]) == {SINK} and set(made["than"]) == {WANDA}
    return made.set_index("measure").to_dict("index")


def test_nothing_is_said_of_what_is_missing(profile: Config) -> None:
    made = rows(profile, {(SINK, LOSS): {"nats per token": [1.0, 2.0]}, (SINK, "piqa"): result("10", of=2)})
    assert {row["verdict"] for row in made.values()} == {"not tested"} and list(made) == [LOSS, "average", "piqa", "hellaswag"]
    assert all(math.isnan(row["gain"]) for row in made.values())
    assert (made["piqa"]["paper"], made["average"]["paper"]) == (0.55, 0.48)  # 73.18 - 72.63, 53.18 - 52.70
    assert made["average"]["unit"] == "points, 0 of 2 tasks finished"


def test_a_lower_loss_is_a_gain(profile: Config) -> None:
    losses = {WANDA: [2.0, 3.0, 2.5, 2.25], SINK: [1.9, 2.8, 2.4, 2.05]}
    made = rows(profile, {(name, LOSS): {"nats per token": values} for name, values in losses.items()})[LOSS]
    assert made["gain"] == pytest.approx(0.15) and made["n"] == 4 and 0 < made["low"] < 0.15 < made["high"]
    assert made["verdict"] == "reproduced" and made["unit"] == "nats per token"
    other = rows(profile, {(name, LOSS): {"nats per token": losses[name]} for name in ()})
    assert other[LOSS]["verdict"] == "not tested"


def test_the_average_counts_tasks_alike_and_its_interval_adds_variances(profile: Config) -> None:
    given = {(name, "piqa"): result(marks, of=100) for name, marks in MARKS.items()}
    given |= {(SINK, "hellaswag"): result("1100", of=400), (WANDA, "hellaswag"): result("1010", of=400)}
    made = rows(profile, given)
    large = ((10 + 1) / 102 - (10 / 102) ** 2) / 102
    small = ((2 + 1) / 6 - 0) / 6
    half = 100 * 1.96 * math.sqrt(large)
    assert (made["piqa"]["gain"], made["piqa"]["low"], made["piqa"]["high"]) == pytest.approx((10, 10 - half, 10 + half))
    assert made["piqa"]["verdict"] == "reproduced" and made["hellaswag"]["verdict"] == "inconclusive"
    average = made["average"]
    half, here = (100 * 1.96 * math.sqrt(value) / 2 for value in (large + small, 0 * large + 0.99 * small))
    assert (average["gain"], average["low"], average["high"]) == pytest.approx((5, 5 - half, 5 + half))
    assert (average["low here"], average["high here"]) == pytest.approx((5 - here, 5 + here))
    assert (average["n"], average["verdict"], average["unit"]) == (104, "inconclusive", "points, 2 tasks")


def test_all_documents_leave_no_doubt_about_themselves(profile: Config) -> None:
    given = {(name, task): result(marks, of=100) for name, marks in MARKS.items() for task in ("piqa", "hellaswag")}
    average = rows(profile, given)["average"]
    assert average["low here"] == average["high here"] == pytest.approx(10) and average["verdict here"] == "reproduced"
    assert average["low"] < 10 < average["high"]


def test_audited_documents_correct_beside_the_estimate(profile: Config) -> None:
    given = {(name, task): result(marks, of=100) for name, marks in MARKS.items() for task in ("piqa", "hellaswag")}
    changed = "0" + MARKS[SINK][1:]
    made = rows(profile, given | {(SINK, "piqa"): result(MARKS[SINK], of=100, final=changed)})
    assert (made["piqa"]["gain"], made["piqa"]["corrected"]) == pytest.approx((10, 6))  # one in four is audited: four points
    assert (made["average"]["gain"], made["average"]["corrected"]) == pytest.approx((10, 8))
    said = verdicts.lines(found(profile, given | {(SINK, "piqa"): result(MARKS[SINK], of=100, final=changed)}), profile)
    assert said[-1].startswith("races made 75% of the draws and ended early for 32 documents; of 12 audited ones 1 were marked")
    assert sum("average" in line for line in said) == 1 and not any("hellaswag" in line for line in said)


def test_without_discordant_documents_there_is_still_a_variance() -> None:
    mean, variance = verdicts.spread([0] * 198)
    assert mean == 0 and 1.96 * math.sqrt(variance) == pytest.approx(0.0098, abs=5e-5)  # as studies.timing.tasks has it

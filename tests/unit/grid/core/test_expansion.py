"""The cells of the core: their order, their settings, and what the scope decides."""

import dataclasses
from typing import Any

import pytest

from lib.core import config
from lib.core.config import Config
from lib.core.errors import InputError
from lib.grid import cells, engine, run, tables
from lib.grid.cells import DENSE, LOSS
from lib.grid.core import expansion
from lib.grid.core.expansion import RANDOM
from lib.grid.group import Group
from lib.pruning.methods import METHODS

ORDER = ["Wanda", "sink-aware (Wanda)", DENSE, "SparseGPT", "sink-aware (SparseGPT)", "DWANDA", RANDOM]
TASKS = {"mmlu", "arc_challenge", "piqa", "winogrande", "gsm8k", "gpqa_main_n_shot", "race", "hellaswag"}


def paper(*, scope: str = "core", limit: int | None = None, **changes: Any) -> Config:
    loaded = config.load("paper")
    assert loaded.grid is not None and loaded.grid.core is not None
    core = dataclasses.replace(loaded.grid.core, **changes)
    return dataclasses.replace(loaded, grid=dataclasses.replace(loaded.grid, core=core, scope=scope, limit=limit))


def test_rounds_come_one_after_another_and_pairs_side_by_side() -> None:
    turns = expansion.turns(paper())
    assert [turn.variant.method for turn in turns] == ORDER * 4
    assert [turn.round for turn in turns] == [number for number in range(4) for _ in ORDER]
    assert {cell.task for turn in turns[:7] for cell in turn.cells} == {LOSS}
    assert {cell.task for turn in turns for cell in turn.cells} == TASKS | {LOSS}
    assert all(cell.variant == turn.variant for turn in turns for cell in turn.cells)
    assert len({cell.spec(code="c")["id"] for turn in turns for cell in turn.cells}) == 7 * 9


def test_variants_are_the_grids_own_and_the_control_differs_in_its_weights_alone() -> None:
    loaded = paper()
    own = {turn.variant.method: turn.variant for turn in expansion.turns(loaded)}
    whole = set(cells.groups(cells.expand(loaded)))
    assert {one for name, one in own.items() if name != RANDOM} <= whole
    control, sink = own[RANDOM].options, METHODS["sink-aware (Wanda)"]
    assert control is not None and control.weighting is not None and sink.weighting is not None
    assert control.weighting.kind == "random" and dataclasses.replace(control, weighting=sink.weighting) == sink
    assert dataclasses.replace(own[RANDOM], method="sink-aware (Wanda)", options=sink) == own["sink-aware (Wanda)"]


def test_settings_are_published_ones_but_for_what_the_core_says() -> None:
    loaded = paper()
    core = {cell.task: cell for cell in expansion.cells_of(loaded) if cell.variant.method == DENSE}
    plain = {cell.task: cell for cell in cells.expand(loaded) if (cell.variant.model, cell.variant.method) == ("llada-8b", DENSE)}
    assert core[LOSS] == plain[LOSS]
    arc = core["arc_challenge"].settings
    assert (arc["evaluation"]["draws"], arc["evaluation"]["cfg_scale"], arc["limit"]) == (128, 0.5, None)
    assert arc["core"] == {"documents": None, "race": {"first": 16, "margin": 3.0, "audit": 16}}
    assert core["race"].settings["evaluation"]["draws"] == 64 and core["mmlu"].settings["evaluation"]["draws"] == 1
    assert core["hellaswag"].settings["core"]["documents"] == 900
    sums = core["gsm8k"].settings
    assert [sums["evaluation"][name] for name in ("gen_length", "steps", "block_length")] == [256, 256, 32]
    assert sums["core"] == {"documents": None, "cache": "dual"}
    few = {cell.task: cell.settings["core"]["documents"] for cell in expansion.cells_of(paper(limit=1000)) if cell.task != LOSS}
    assert (few["hellaswag"], few["piqa"]) == (900, 1000)


def ids(loaded: Config) -> set[str]:
    return {cell.spec(code="c")["id"] for cell in expansion.cells_of(loaded)}


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"keep_weights": False}, 0),
        ({"drawn": 0.9, "discordant": 0.2}, 0),
        ({"cache": "none"}, 7),
        ({"block_length": 64}, 7),
        ({"audit": 8}, 7 * 7),
        ({"margin": 4.0}, 7 * 7),
        ({"documents": {"hellaswag": 901}}, 7),
        ({"draws": {"race": 32}}, 7),
        ({"sparsity": 0.25}, 6 * 9),
    ],
    ids=str,
)
def test_what_changes_a_result_changes_its_cells_and_no_others(changes: dict[str, Any], moved: int) -> None:
    assert len(ids(paper()) - ids(paper(**changes))) == moved


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model": "llada"}, r"grid\.core\.model must be among llada-8b"),
        ({"methods": ("wanda",)}, r"grid\.core\.methods must be among dense"),
        ({"rounds": (("nelbo", "piqua"),)}, r"grid\.core\.rounds must be among nelbo"),
        ({"documents": {"arc_easy": 3}}, r"grid\.core\.documents must be among"),
        ({"rounds": (("piqa",), ("piqa", "hellaswag", "race"))}, r"grid\.core\.rounds must name a task once, got piqa"),
    ],
)
def test_names_are_checked(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        expansion.turns(paper(**changes))


def test_the_scope_says_whether_the_rest_is_computed_too() -> None:
    core, everything = paper(), paper(scope="all")
    small = run.groups(core, run.settings(core))
    assert [cell["id"] for group in small for cell in group.cells] == [
        cell.spec(code=small[0].cells[0]["code"])["id"] for cell in expansion.cells_of(core)
    ]
    large = run.groups(everything, run.settings(everything))
    assert large[: len(small)] == small
    named = [cell["id"] for group in large for cell in group.cells]
    assert len(named) == len(set(named)) == 63 + 2988 - 6  # the loss of six variants is the same cell
    assert len({group.key for group in large}) == len(large)
    assert list(tables.of_profile(core)) == expansion.cells_of(core)
    assert len(tables.of_profile(everything)) == 2988


def test_weights_are_kept_between_rounds_and_no_two_processes_make_them() -> None:
    loaded = paper()
    groups = run.groups(loaded, run.settings(loaded))
    kept = {group.lane: group.shared["place"]["kept"] for group in groups}
    assert len(kept) == 7 and all(str(place).endswith(lane) for lane, place in kept.items())
    assert engine._next(groups, []) is groups[0] and engine._next(groups[6:], [groups[6]]) is groups[7]
    assert engine._next(groups[7:14], groups[:7]) is None
    alone = Group("a", (), {})
    assert engine._next([alone], [alone]) is alone  # no lane, no wait
    loaded = paper(keep_weights=False)
    assert {group.shared["place"]["kept"] for group in run.groups(loaded, run.settings(loaded))} == {None}


def test_a_profile_without_a_core_has_none() -> None:
    assert expansion.turns(config.load("quick")) == expansion.turns(config.load("laptop")) == []
    with pytest.raises(InputError, match="a profile must have a core for this, got laptop without one"):
        expansion.core_of(config.load("laptop"))

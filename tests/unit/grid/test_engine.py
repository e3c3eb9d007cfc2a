"""The engine on a real Ray of this machine, without faults from outside: what runs, how often, and what the records say."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib.core.config import ROOT
from lib.core.errors import InputError
from lib.grid import cluster, engine
from lib.grid.engine import Summary
from lib.grid.group import Group, Order, compute
from lib.grid.store import Record, Store
from tests.unit.grid import cells_at_work, grids
from tests.unit.grid.grids import Place, cell


@pytest.fixture(scope="module", autouse=True)
def ray(ray_folder: Path) -> Iterator[Any]:
    """Two cores and five GPUs, which need not be there for Ray to give them away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cluster.LOCAL, "num_gpus", 5)
        with cluster.connected(None, jobs=2, gpus_per_group=0) as room:
            yield room.ray


def run(place: Place, *groups: Group, lines: list[str] | None = None, **options: Any) -> Summary:
    said = [] if lines is None else lines
    return engine.run(
        groups, **({"store": place.store, "work": grids.WORK, "jobs": 1, "batch_size": 8, "say": said.append} | options)
    )


def record(place: Place, wanted: dict[str, Any]) -> Record:
    found = place.store.read(wanted["id"])
    assert found is not None
    return found


def test_every_cell_is_computed_once_and_never_again(place: Place) -> None:
    groups = place.grid(2, 3)
    lines: list[str] = []
    assert run(place, *groups, lines=lines) == Summary(6, 6, (), ())
    assert {len(place.notes(number)) for number in (0, 1, 2, 10, 11, 12)} == {1}
    assert [record(place, one).result for one in groups[1].cells] == [{"square": n * n} for n in (10, 11, 12)]
    assert lines[0] == "cells: 0 of 6 finished" and lines[-1] == "cells: 6 of 6 finished"
    processes = {number: place.notes(number)[0][1] for number in (0, 2, 10, 12)}
    assert processes[0] == processes[2] != processes[10] == processes[12], "a fresh process for each group"
    assert os.getpid() not in processes.values()
    before = place.content()
    assert run(place, *groups, lines=lines) == Summary(6, 0, (), ())
    assert lines[-1] == "cells: 6 of 6 finished"
    more = place.group("group-0", *groups[0].cells, cell(77))
    assert run(place, more, groups[1]) == Summary(7, 1, (), ())
    assert sum(place.executions().values()) == 7
    assert before.items() <= place.content().items() and len(place.content()) == 7
    assert place.left_over() == []


def test_two_groups_share_the_machine(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(engine, "LINE_SECONDS", 0.0)
    lines: list[str] = []
    monkeypatch.chdir(place.folder)
    assert run(place, *place.grid(3, 2, seconds=0.5), jobs=2, store=Store(Path("here")), lines=lines).computed == 6
    assert [place.notes(number)[0][2] for number in (0, 10, 20)] == [1, 1, 1], "two cores for two groups"
    assert len(Store(place.folder / "here").ids()) == 6, "a relative folder is the driver's"
    assert len(lines) > 3
    run(place, *place.grid(1, 1))
    assert max(note[2] for note in place.notes(0)) == 2, "both cores for one group"


def test_lines_of_progress_keep_their_distance(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(engine, "LINE_SECONDS", 3600.0)
    lines: list[str] = []
    run(place, *place.grid(2, 2, seconds=0.1), lines=lines)
    assert lines == ["cells: 0 of 4 finished", "cells: 4 of 4 finished"]


def test_a_failure_costs_one_cell_and_says_why(place: Place) -> None:
    acts = ["", "bug", "", "input", "unavailable", "nan", "survived", "", "skip"]
    cells = [cell(number, act=act) for number, act in enumerate(acts)]
    summary = run(place, place.group("group", *cells))
    records = [record(place, one) for one in cells]
    expected = ["done", "failed", "done", "failed", "not tested", "failed", "failed", "done", "failed"]
    assert [one.status for one in records] == expected
    assert [len(place.notes(number)) for number in range(9)] == [1] * 9, "none of these is tried again"
    reasons = {act: one.reason for act, one in zip(acts, records, strict=True)}
    assert reasons["bug"] == reasons["survived"] == "ZeroDivisionError: division by zero"
    assert reasons["input"] == "a rule, got something: a remedy"
    assert reasons["unavailable"] == "data must be there, got a gate: ask for access"
    assert reasons["nan"].startswith("ValueError: Out of range float")
    assert f"in the order given, got None for {cells[8]['id']}" in reasons["skip"]
    assert place.notes(6)[0][1] == place.notes(7)[0][1] == place.notes(8)[0][1], "what the function survived goes on"
    assert place.notes(1)[0][1] != place.notes(2)[0][1], "what it raised gives the rest a fresh process"
    failed = {one["id"] for one, status in zip(cells, expected, strict=True) if status == "failed"}
    assert set(summary.failed) == failed and summary.not_tested == (cells[4]["id"],) and summary.computed == 9
    logs = {path.stem for path in (place.store.folder / "logs").iterdir()}
    assert logs == failed - {cells[3]["id"]}, "a foreseen failure needs no traceback"
    assert "Traceback" in place.store.log(cells[1]["id"]).read_text()


@pytest.mark.parametrize(
    ("act", "attempts", "batches"), [("kill", 4, [8, 4, 2, 1]), ("kill", 3, [8, 4, 1]), ("crash", 2, [8, 1]), ("leave", 1, [8])]
)
def test_a_cell_that_ends_its_process_is_tried_again_and_then_reported(
    place: Place, act: str, attempts: int, batches: list[int]
) -> None:
    cells = [cell(0), cell(1, act=act), cell(2)]
    run(place, place.group("before", cells[0]))
    summary = run(place, place.group("group", *cells), attempts=attempts)
    assert summary == Summary(3, 2, (cells[1]["id"],), ())
    times = f"{attempts} time{'s' * (attempts > 1)}"
    assert f"its process died {times}, at last while it was computed: " in record(place, cells[1]).reason
    assert [note[0] for note in place.notes(1)] == batches
    for number in (0, 2):
        assert record(place, cells[number]).result == {"square": number**2}
        assert [note[0] for note in place.notes(number)] == [8]


def test_kills_are_counted_cell_by_cell(place: Place) -> None:
    cells = [cell(number, act="kill once") for number in range(4)]
    assert run(place, place.group("group", *cells), attempts=2) == Summary(4, 4, (), ())
    assert place.executions() == dict.fromkeys(range(4), 2)


def test_what_another_driver_recorded_stands(place: Place) -> None:
    """It computed the cell that fails here, and the next one is nobody's fault."""
    cells = [cell(0, act="bug"), cell(1)]
    group = place.group("group", *cells)
    order = Order(place.store, "tests.unit.grid.cells_at_work:work", batch_size=1, attempts=1, threads=1)
    done = Record(cells[0]["settings"], "c", "d", "done", {"square": 0})

    def recorded_meanwhile(shared: Any, cells: Any, *, batch_size: int) -> Any:
        place.store.write(done)
        return cells_at_work.work(shared, cells, batch_size=batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells_at_work, "recorded_meanwhile", recorded_meanwhile, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        compute(group, replace(order, work="tests.unit.grid.cells_at_work:recorded_meanwhile"))
    assert record(place, cells[0]) == done
    assert place.store.missing(group.cells) == [cells[1]]


@pytest.mark.parametrize("act", ["memory", "torch"])
def test_out_of_memory_halves_the_batch(place: Place, act: str) -> None:
    cells = [cell(0, act=act, fits=2), cell(1, act=act, fits=0), cell(2)]
    assert run(place, place.group("group", *cells), attempts=1).failed == (cells[1]["id"],)
    assert [[note[0] for note in place.notes(number)] for number in range(3)] == [[8, 4, 2], [2, 1], [8]]
    assert len({note[1] for note in place.notes(0)}) == 1, "the same process tries again"
    assert record(place, cells[0]).result == {"square": 0}
    said = {"memory": "MemoryError: no room for 1", "torch": "RuntimeError: [enforce fail at alloc_cpu.cpp:119] Default"}[act]
    assert record(place, cells[1]).reason.startswith(f"out of memory with a batch size of 1: {said}")


def test_cells_that_failed_are_kept_or_computed_again_by_choice(place: Place) -> None:
    cells = [cell(0, act="bug"), cell(1, act="unavailable"), cell(2)]
    group = place.group("group", *cells)
    first = run(place, group)
    assert run(place, group) == Summary(3, 0, first.failed, first.not_tested)
    assert sum(place.executions().values()) == 3
    assert [note[0] for note in place.notes(0)] == [8], "another error does not pass for memory"
    assert run(place, group, keep_failed=False) == Summary(3, 2, first.failed, first.not_tested)
    assert place.executions() == {0: 2, 1: 2, 2: 1}


def test_a_damaged_store_is_refused_before_anything_runs_and_foreign_files_are_left_alone(place: Place) -> None:
    (group,) = place.grid(1, 2)
    run(place, place.group("group-0", group.cells[1]))
    path = place.store.folder / f"{group.cells[1]['id']}.json"
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(InputError, match="got half a file, or no JSON: delete it and run again"):
        run(place, group)
    assert place.executions() == {1: 1}
    path.unlink()
    foreign = [".DS_Store", ".nfs0000000001", f"{path.name}~", f".{path.name}.swp", "notes.json"]
    for name in foreign:
        (place.store.folder / name).write_text("{")
    assert run(place, group).computed == 2
    assert all((place.store.folder / name).read_text() == "{" for name in foreign)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"work": "tests.unit.grid.cells_at_work"}, "work must be module:function, got 'tests.unit.grid.cells_at_work'"),
        ({"work": "lib.no_such_module:work"}, "work must be module:function, got 'lib.no_such_module:work'"),
        (
            {"gpus_per_group": 8},
            "must find its GPUs on one machine, of which the largest has 5, got 8 wanted: lower",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(place: Place, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(place, *place.grid(1, 1), **options)
    assert not place.executions()


def test_a_grid_that_contradicts_itself_is_refused(place: Place) -> None:
    with pytest.raises(InputError, match=r"a cell must be in the grid once, got \['[0-9a-f]{24}'\] twice"):
        run(place, place.group("a", cell(0)), place.group("b", cell(0)))
    with pytest.raises(InputError, match=r"a group must be in the grid once, got \['a'\] twice"):
        run(place, place.group("a", cell(0)), place.group("a", cell(1)))
    with pytest.raises(InputError, match="the id of a cell must be that of its settings"):
        run(place, place.group("a", cell(0) | {"code": "newer"}))


def test_work_that_cannot_be_imported_fails_its_cells(place: Place) -> None:
    group = place.group("a", cell(0))
    assert len(run(place, group, work="tests.unit.grid.cells_at_work:play").failed) == 1
    assert record(place, group.cells[0]).reason.startswith(
        "AttributeError: module 'tests.unit.grid.cells_at_work' has no attribute"
    )


def test_cells_see_the_gpus_of_their_group_only(place: Place) -> None:
    groups = place.grid(2, 1, act="devices", seconds=2)  # so long that both are at work
    run(place, *groups, jobs=None, gpus_per_group=2)
    seen = [result["devices"].split(",") for group in groups if (result := record(place, group.cells[0]).result)]
    assert [len(devices) for devices in seen] == [2, 2] and len({*seen[0], *seen[1]}) == 4


@pytest.mark.parametrize(
    ("jobs", "gpus", "expected"),
    [
        (100, 1, (8, 8)),
        (4, 1, (4, 16)),
        (100, 0.5, (16, 4)),
        (100, 2, (4, 16)),
        (100, 0, (64, 1)),
        (None, 0, (1, 64)),
        (None, 2, (4, 16)),
    ],
)
def test_there_are_as_many_groups_as_the_cluster_has_room_for(jobs: int | None, gpus: float, expected: tuple[int, int]) -> None:
    assert cluster.room({"CPU": 64.0, "GPU": 8.0}, jobs=jobs, gpus_per_group=gpus) == expected


@pytest.mark.parametrize(("problem", "offline"), [("", None), ("the hub cannot be reached (no route)", "1")])
def test_without_a_network_no_process_asks_the_hub(monkeypatch: pytest.MonkeyPatch, problem: str, offline: str | None) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(cluster.hub, "problem", lambda: problem)
    assert cluster.variables().get("HF_HUB_OFFLINE") == offline


def test_processes_get_what_a_run_needs_and_what_its_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    found = cluster.variables()
    assert (found["OMP_WAIT_POLICY"], found["GOMP_SPINCOUNT"]) == ("passive", "0")
    assert found["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "elsewhere"]
    assert found["TOKENIZERS_PARALLELISM"] == "false"
    if sys.platform.startswith("linux"):
        assert found["MALLOC_TOP_PAD_"] == "1"


@pytest.mark.parametrize(("address", "place_of_it"), [("10.0.0.1:6379", "10.0.0.1:6379"), (None, "this machine")])
def test_no_cluster_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, address: str | None, place_of_it: str) -> None:
    class Lonely:
        @staticmethod
        def is_initialized() -> bool:
            return False

        @staticmethod
        def init(*_: object, **__: object) -> None:
            raise ConnectionError("Failed to connect") from RuntimeError("a token is missing\nsee the manual")

    monkeypatch.setattr(cluster, "_import", lambda: Lonely)
    got = (
        rf"a Ray cluster must answer at {place_of_it}, got a token is missing see the manual: start one with ray start --head, or"
    )
    with pytest.raises(InputError, match=got), cluster.connected(address, jobs=2, gpus_per_group=0):
        pass


def test_ray_that_is_not_installed_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    remedy = r"python -m pip install -r requirements-cluster\.lock -c requirements\.lock$"
    message = f"must be installed to compute a grid, got no package ray: {remedy}"
    with pytest.raises(InputError, match=message), cluster.connected("auto", jobs=2, gpus_per_group=0):
        pass
    assert os.path.exists(ROOT / cluster.LOCK)


@pytest.mark.parametrize(
    ("finished", "new", "seconds", "left"),
    [(5, 1, 2, "10 s"), (5, 2, 120, "5 min"), (9, 3, 10800, "1.0 h"), (9, 2, 9000, "1.2 h")],
)
def test_time_left_counts_what_this_run_finished(finished: int, new: int, seconds: float, left: str) -> None:
    line = engine._line(Summary(10, finished, ("a", "b"), ("c",)), new=new, seconds=seconds)
    assert line == f"cells: {finished} of 10 finished, 2 failed, 1 not tested; about {left} left"
    assert "left" not in engine._line(Summary(10, finished, (), ()), new=0, seconds=seconds)

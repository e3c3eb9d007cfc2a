"""The grid on one machine without faults from outside: what runs, how often, and what the records say."""

import fcntl
import json
import os
import sys
import threading
import types
from pathlib import Path

import pytest

from lib.core.errors import InputError
from lib.grid import supervisor, sweep
from lib.grid.store import Record, Store
from lib.grid.sweep import Group, Summary
from tests.unit.grid import grids
from tests.unit.grid.grids import Place, cell


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    found = Place(tmp_path)
    monkeypatch.setattr(supervisor.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS", 0.05)
    return found


def run(place: Place, *groups: Group, lines: list[str] | None = None, **options: object) -> Summary:
    """Run in this process: the workers' processes are real, joblib starts no worker for one job."""
    said = [] if lines is None else lines
    chosen = {"work": grids.WORK, "jobs": 1, "batch_size": 8} | options
    return sweep.run(groups, store=place.store, say=said.append, **chosen)  # pyright: ignore[reportArgumentType]


def record(place: Place, wanted: dict) -> Record:
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
    before = place.content()
    assert run(place, *groups, lines=lines) == Summary(6, 0, (), ())
    assert lines[-1] == "cells: 6 of 6 finished"
    more = place.group("group-0", *groups[0].cells, cell(77))
    assert run(place, more, groups[1]) == Summary(7, 1, (), ())
    assert sum(place.executions().values()) == 7
    assert before.items() <= place.content().items() and len(place.content()) == 7
    assert sorted(path.name for path in place.store.folder.iterdir() if path.suffix != ".json") == ["logs"]
    assert not list((place.store.folder / "logs").iterdir())


def test_lines_of_progress_keep_their_distance(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(sweep, "LINE_SECONDS", 3600.0)
    lines: list[str] = []
    run(place, *place.grid(3, 4), lines=lines)
    assert lines == ["cells: 0 of 12 finished", "cells: 12 of 12 finished"]
    monkeypatch.setattr(sweep, "LINE_SECONDS", 0.0)
    run(place, *place.grid(5, 4), lines=lines)
    assert len(lines) > 4


def test_the_folder_may_be_relative(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    (group,) = place.grid(1, 1)
    sweep.run([group], store=Store(Path("here")), work=grids.WORK, jobs=1, batch_size=1, say=[].append)
    assert Store(place.folder / "here").ids() == [group.cells[0]["id"]]


def test_one_process_computes_a_group(place: Place) -> None:
    run(place, *place.grid(2, 2))
    processes = {number: place.notes(number)[0][1] for number in (0, 1, 10, 11)}
    assert processes[0] == processes[1] != processes[10] == processes[11]
    assert os.getpid() not in processes.values()


def test_two_workers_share_the_machine(place: Place) -> None:
    groups = place.grid(2, 1, seconds=1)
    out = grids.finish(place.drive(groups))
    assert "Summary(cells=2, computed=2, failed=(), not_tested=())" in out
    cores = supervisor.environment.physical_cores()
    assert [place.notes(number)[0][2] for number in (0, 10)] == [max(1, cores // 2)] * 2
    grids.clean_up(place)


@pytest.mark.parametrize(("problem", "offline"), [("", None), ("the hub cannot be reached (no route)", "1")])
def test_without_a_network_no_process_asks_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str, offline: str | None
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(supervisor.hub, "problem", lambda: problem)
    plan = supervisor.Plan((), Store(tmp_path), "work", 1, 1, "run")
    assert supervisor._variables(plan, "cpu-0").get("HF_HUB_OFFLINE") == offline


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
    ("act", "attempts", "how", "batches"),
    [
        ("kill", 3, "was killed by signal 9 (3 times), at last with a batch size of 1", [8, 4, 1]),
        ("kill", 5, "was killed by signal 9 (5 times), at last with a batch size of 1", [8, 4, 2, 1, 1]),
        ("crash", 2, "was killed by signal 6 (2 times), at last with a batch size of 8", [8, 8]),
        ("leave", 1, "ended with code 0 (1 time), at last with a batch size of 8", [8]),
    ],
)
def test_a_cell_that_ends_its_process_is_tried_again_and_then_reported(
    place: Place, act: str, attempts: int, how: str, batches: list[int]
) -> None:
    cells = [cell(0), cell(1, act=act), cell(2)]
    summary = run(place, place.group("group", *cells), attempts=attempts)
    assert summary == Summary(3, 3, (cells[1]["id"],), ())
    assert record(place, cells[1]).reason == f"its process {how}"
    assert [note[0] for note in place.notes(1)] == batches
    for number in (0, 2):
        assert record(place, cells[number]).result == {"square": number**2}
        assert [note[0] for note in place.notes(number)] == [8]
    if act == "crash":
        assert "Fatal Python error: Aborted" in place.store.log("group").read_text()


@pytest.mark.parametrize("act", ["memory", "torch"])
def test_out_of_memory_halves_the_batch(place: Place, act: str) -> None:
    cells = [cell(0, act=act, fits=2), cell(1, act=act, fits=0), cell(2)]
    assert run(place, place.group("group", *cells), attempts=1).failed == (cells[1]["id"],)
    assert [[note[0] for note in place.notes(number)] for number in range(3)] == [[8, 4, 2], [2, 1], [8]]
    assert record(place, cells[0]).result == {"square": 0}
    said = {"memory": "MemoryError: no room for 1", "torch": "RuntimeError: [enforce fail at alloc_cpu.cpp:119] Default"}[act]
    assert record(place, cells[1]).reason.startswith(f"out of memory with a batch size of 1: {said}")


def test_other_errors_do_not_pass_for_memory(place: Place) -> None:
    assert run(place, place.group("group", cell(0, act="bug"))).computed == 1
    assert [note[0] for note in place.notes(0)] == [8]


def test_cells_that_failed_are_kept_or_computed_again_by_choice(place: Place) -> None:
    cells = [cell(0, act="bug"), cell(1, act="unavailable"), cell(2)]
    group = place.group("group", *cells)
    first = run(place, group)
    assert run(place, group) == Summary(3, 0, first.failed, first.not_tested)
    assert sum(place.executions().values()) == 3
    assert run(place, group, keep_failed=False) == Summary(3, 2, first.failed, first.not_tested)
    assert place.executions() == {0: 2, 1: 2, 2: 1}


def test_a_claim_that_a_dead_process_left_is_taken_over(place: Place) -> None:
    for key in ("group-0", "group-0.child"):
        claim = place.store.folder / "claims" / key / "3"
        claim.parent.mkdir(parents=True)
        owner = {"host": supervisor_host(), "pid": 2**22 - 3, "started": 1.0, "token": "a"}
        claim.write_text(json.dumps(owner))
    assert run(place, *place.grid(1, 2)).computed == 2
    assert not (place.store.folder / "claims").exists()


def supervisor_host() -> str:
    from lib.grid import leases

    return leases._host()


def test_a_damaged_store_is_refused_before_anything_runs(place: Place) -> None:
    (group,) = place.grid(1, 2)
    run(place, place.group("group-0", group.cells[1]))
    path = place.store.folder / f"{group.cells[1]['id']}.json"
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(InputError, match="got half a file, or no JSON: delete it and run again"):
        run(place, group)
    path.unlink()
    (place.store.folder / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"got .*other\.json: move it elsewhere"):
        run(place, group)
    assert place.executions() == {1: 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"work": "tests.unit.grid.cells_at_work"}, "work must be module:function, got 'tests.unit.grid.cells_at_work'"),
        ({"work": "lib.no_such_module:work"}, "work must be module:function, got 'lib.no_such_module:work'"),
    ],
)
def test_what_cannot_be_used_is_refused(place: Place, options: dict, message: str) -> None:
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
    with pytest.raises(InputError, match="a claim must be named by letters"):
        run(place, place.group("a/b", cell(0)))


def test_work_that_cannot_be_imported_fails_its_cells(place: Place) -> None:
    group = place.group("a", cell(0))
    assert len(run(place, group, work="tests.unit.grid.cells_at_work:play").failed) == 1
    assert record(place, group.cells[0]).reason.startswith(
        "AttributeError: module 'tests.unit.grid.cells_at_work' has no attribute"
    )


def test_a_device_that_another_process_uses_is_left_alone(place: Place) -> None:
    handle = supervisor._lock_file("cpu-0")
    fcntl.flock(handle, fcntl.LOCK_EX)
    thread = threading.Thread(target=run, args=(place, *place.grid(1, 1)))
    thread.start()
    thread.join(1)
    assert thread.is_alive() and not place.executions()
    os.close(handle)
    thread.join(20)
    assert not thread.is_alive() and place.executions() == {0: 1}


def test_slots_are_locked_device_by_device(place: Place) -> None:
    with supervisor._slot(["cuda-0,1"]) as both, supervisor._slot(["cuda-1", "cuda-1,2", "cuda-2"]) as other:
        assert both and other
        assert (both.name, other.name) == ("cuda-0,1", "cuda-2")
        with supervisor._slot(["cuda-0", "cuda-2"]) as none, supervisor._slot([""]) as shared:
            assert none is None
            assert shared and shared.locks == ()
    with supervisor._slot(["cuda-1,2"]) as again:
        assert again


def test_a_process_sees_the_gpus_of_its_slot(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    plan = supervisor.Plan((), place.store, grids.WORK, attempts=1, batch_size=1, run="run", threads=5)
    variables = supervisor._variables(plan, "cuda-2,3")
    assert (variables["CUDA_VISIBLE_DEVICES"], variables["OMP_NUM_THREADS"]) == ("2,3", "5")
    assert supervisor._variables(plan, "cpu-0")["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def pretend(monkeypatch: pytest.MonkeyPatch, *, gpus: int) -> None:
    """Let this machine seem to have GPUs."""
    found = types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=lambda: gpus))
    monkeypatch.setitem(sys.modules, "torch", found)
    monkeypatch.setattr(sweep, "GPU_FILES", (__file__,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("jobs", "expected"), [(2, {"0,1", "2,3"}), (1, {"0,1"})])
def test_cells_see_the_gpus_of_their_group_only(
    place: Place, monkeypatch: pytest.MonkeyPatch, jobs: int, expected: set[str]
) -> None:
    pretend(monkeypatch, gpus=5)
    monkeypatch.setenv("TMPDIR", str(place.folder / "tmp"))
    groups = place.grid(2, 1, act="devices", seconds=3)  # so long that no worker takes both
    run(place, *groups, jobs=jobs, gpus_per_cell=2)
    results = [record(place, group.cells[0]).result for group in groups]
    assert {result["devices"] for result in results if result} == expected and all(results)


def test_parts_of_gpus_need_ray(place: Place) -> None:
    with pytest.raises(InputError, match=r"must be a whole number without Ray, got 0\.5: use Ray"):
        run(place, *place.grid(1, 1), gpus_per_cell=0.5)
    assert not place.executions()


@pytest.mark.parametrize(
    ("visible", "count", "jobs", "gpus", "expected"),
    [
        (None, 0, 2, 0, ("cpu-0", "cpu-1")),
        (None, 4, 8, 0, ("cuda-0", "cuda-1", "cuda-2", "cuda-3")),
        (None, 4, 3, 1, ("cuda-0", "cuda-1", "cuda-2")),
        (None, 5, 8, 2, ("cuda-0,1", "cuda-2,3")),
        ("GPU-a,GPU-b,GPU-c", 3, 8, 1, ("cuda-GPU-a", "cuda-GPU-b", "cuda-GPU-c")),
        ("3,1", 2, 8, 0, ("cuda-3", "cuda-1")),
        (None, 8, 8, 4, ("cuda-0,1,2,3", "cuda-4,5,6,7")),
    ],
)
def test_each_process_has_gpus_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, jobs: int, gpus: int, expected: tuple[str, ...]
) -> None:
    pretend(monkeypatch, gpus=count)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sweep._slots(jobs, max(1, gpus)) == expected
    if count:
        with pytest.raises(InputError, match=rf"a process must have its GPUs, got {count} GPUs, {count + 1} wanted"):
            sweep._slots(jobs, count + 1)


@pytest.mark.parametrize(
    ("finished", "new", "seconds", "left"),
    [(5, 1, 2, "10 s"), (5, 2, 120, "5 min"), (9, 3, 10800, "1.0 h"), (9, 2, 9000, "1.2 h")],
)
def test_time_left_counts_what_this_run_finished(finished: int, new: int, seconds: float, left: str) -> None:
    line = sweep._line(Summary(10, finished, ("a", "b"), ("c",)), new=new, seconds=seconds)
    assert line == f"cells: {finished} of 10 finished, 2 failed, 1 not tested; about {left} left"
    assert "left" not in sweep._line(Summary(10, finished, (), ()), new=0, seconds=seconds)

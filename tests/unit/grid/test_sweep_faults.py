"""Whatever is killed, at whatever moment, the store ends with the bytes of an undisturbed run."""

import random
import signal
import time

import psutil
import pytest

from tests.unit.grid.grids import Place, finish, kill, undisturbed_run, wait_for, workers

SHAPE = {"groups": 6, "cells": 2}
CELLS = SHAPE["groups"] * SHAPE["cells"]
SECONDS = 0.2  # of one cell


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The records of a run that nobody touched."""
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"), seconds=SECONDS, **SHAPE)


def left_over(place: Place) -> list[str]:
    return [path.name for path in place.store.folder.iterdir() if path.suffix != ".json" or path.name.startswith(".")]


def test_processes_killed_at_random_moments_cost_their_cell_alone(place: Place, undisturbed: dict[str, bytes]) -> None:
    draw, killed = random.Random(1), 0
    driver = place.drive(place.grid(**SHAPE, seconds=SECONDS), attempts=20)
    while driver.poll() is None and killed < 5:
        wait_for(lambda: place.computing() or driver.poll() is not None)
        time.sleep(draw.uniform(0, 2 * SECONDS))
        victims = place.computing()
        kill(*victims[:1])
        killed += bool(victims)
    finish(driver)
    assert killed == 5
    assert place.content() == undisturbed
    again = sum(place.executions().values()) - CELLS
    assert 0 <= again <= killed, "a kill repeats the cell in progress at most"
    assert left_over(place) == ["logs"]


def test_workers_killed_at_random_moments_cost_nothing(place: Place, undisturbed: dict[str, bytes]) -> None:
    draw = random.Random(2)
    driver = place.drive(place.grid(**SHAPE, seconds=SECONDS))
    for _ in range(2):
        wait_for(lambda: len(workers(driver)) == 2 and place.computing())
        time.sleep(draw.uniform(0, 2 * SECONDS))
        kill(draw.choice(workers(driver)))
    out = finish(driver)
    assert "a worker died (TerminatedWorkerError): new ones go on" in out
    assert place.content() == undisturbed
    assert set(place.executions().values()) == {1}, "the pool ends its other workers, but no process that computes"
    assert left_over(place) == ["logs"]


def test_drivers_killed_at_random_moments_cost_nothing(place: Place, undisturbed: dict[str, bytes]) -> None:
    draw, groups = random.Random(3), place.grid(**SHAPE, seconds=SECONDS)
    for _ in range(2):
        driver = place.drive(groups)
        wait_for(place.computing)
        time.sleep(draw.uniform(0, 2 * SECONDS))
        orphans = workers(driver)
        kill(driver)
        driver.communicate()
        _, alive = psutil.wait_procs(orphans, timeout=10)
        assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive), "workers end with their driver"
    before = len(place.content())
    assert before < CELLS, "without a driver nobody goes on to another group"
    assert f"computed={CELLS - before}" in finish(place.drive(groups))
    assert place.content() == undisturbed
    assert set(place.executions().values()) == {1}, "processes of a killed driver finish their group"
    assert left_over(place) == ["logs"]


def test_everything_killed_at_once_costs_the_cells_in_progress(place: Place, undisturbed: dict[str, bytes]) -> None:
    groups = place.grid(**SHAPE, seconds=SECONDS)
    driver = place.drive(groups)
    wait_for(lambda: len(place.content()) >= 2 and len(place.computing()) == 2)
    kill(driver, *workers(driver), *place.children())
    driver.communicate()
    wait_for(lambda: not place.children())
    finish(place.drive(groups))
    assert place.content() == undisturbed
    assert sum(place.executions().values()) <= CELLS + 2
    assert left_over(place) == ["logs"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_two_drivers_share_one_store(place: Place, undisturbed: dict[str, bytes], jobs: int) -> None:
    groups = place.grid(**SHAPE, seconds=SECONDS)
    # The second one has other places for its locks, as a second machine has.
    (place.folder / "elsewhere").mkdir()
    drivers = [place.drive(groups, jobs=jobs), place.drive(groups[::-1], jobs=jobs, tmp=str(place.folder / "elsewhere"))]
    outs = [finish(driver) for driver in drivers]
    assert all(f"cells={CELLS}, " in out and f"cells: {CELLS} of {CELLS} finished" in out for out in outs)
    assert place.content() == undisturbed
    assert set(place.executions().values()) == {1}
    if jobs == 1:
        processes = {place.notes(10 * group)[0][1] for group in range(SHAPE["groups"])}
        assert len(processes) == SHAPE["groups"]
    assert left_over(place) == ["logs"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_ends_every_process_and_leaves_no_failure(place: Place, undisturbed: dict[str, bytes], jobs: int) -> None:
    groups = place.grid(**SHAPE, seconds=SECONDS)
    driver = place.drive(groups, jobs=jobs)
    wait_for(lambda: place.content() and place.computing())
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=20)
    assert driver.returncode != 0 and err.strip().endswith("KeyboardInterrupt")
    assert not place.children(), "the driver waits for them"
    partial = place.content()
    assert 0 < len(partial) < CELLS and partial.items() <= undisturbed.items()
    finish(place.drive(groups))
    assert place.content() == undisturbed


def test_a_process_that_outlives_its_worker_keeps_its_device(place: Place) -> None:
    groups = place.grid(2, 1, seconds=2)
    driver = place.drive(groups, jobs=1)
    wait_for(lambda: place.executions())
    kill(driver)
    driver.communicate()
    second = place.drive(groups, jobs=1)
    wait_for(lambda: len(place.content()) == 1)
    assert place.executions() == {0: 1}, "one process a device: the second waited for the first"
    finish(second)
    assert place.executions() == {0: 1, 10: 1}


def test_a_suspended_worker_on_this_machine_keeps_its_claims(place: Place) -> None:
    groups = place.grid(1, 2, seconds=1)
    driver = place.drive(groups, jobs=1)
    wait_for(place.computing)
    victims = [psutil.Process(driver.pid), *place.children()]
    for process in victims:
        process.suspend()
    second = place.drive(groups, jobs=1, tmp=str(place.folder))
    time.sleep(2)
    assert second.poll() is None and len(place.executions()) <= 1
    for process in victims:
        process.resume()
    finish(driver)
    finish(second)
    assert set(place.executions().values()) == {1}

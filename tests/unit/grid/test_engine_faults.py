"""Whatever is killed on a real Ray, at whatever moment, the store ends with the bytes of an undisturbed run."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lib.grid.store import Record
from tests.unit.grid.grids import Place, computing, finish, kill, of_ray, wait_for

SHAPE = {"groups": 3, "cells": 4}
CELLS = SHAPE["groups"] * SHAPE["cells"]
SECONDS = 0.3  # of one cell
# A dead machine is noticed within a second or two instead of half a minute.
ATTENTIVE = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}


@pytest.fixture
def groups(place: Place) -> list[Any]:
    return place.grid(**SHAPE, seconds=SECONDS)


@pytest.fixture
def expected(tmp_path: Path, groups: list[Any]) -> dict[str, bytes]:
    """The records that must be there in the end, written here one by one."""
    calm = Place(tmp_path / "calm")
    for cell in (cell for group in groups for cell in group.cells):
        squared = {"square": cell["settings"]["number"] ** 2}
        calm.store.write(Record(cell["settings"], cell["code"], cell["data"], "done", squared))
    return calm.content()


def computed_all(out: str) -> bool:
    return f"cells: {CELLS} of {CELLS} finished" in out and "failed=(), not_tested=()" in out


def test_workers_killed_at_random_moments_cost_their_cell_alone(
    place: Place, groups: list[Any], expected: dict[str, bytes], ray_folder: Path
) -> None:
    draw, killed = random.Random(1), 0
    driver = place.drive(groups, attempts=20)
    while driver.poll() is None and killed < 4:
        wait_for(lambda: computing(ray_folder) or driver.poll() is not None)
        time.sleep(draw.uniform(0, 2 * SECONDS))
        victims = computing(ray_folder)
        kill(*victims[:1])
        killed += bool(victims)
    assert computed_all(finish(driver))
    assert killed == 4
    assert place.content() == expected
    assert sum(place.executions().values()) <= CELLS + killed, "a kill repeats the cell in progress at most"
    assert place.left_over() == []


def test_drivers_killed_at_random_moments_cost_the_cells_in_progress(
    place: Place, groups: list[Any], expected: dict[str, bytes], ray_folder: Path
) -> None:
    draw, before = random.Random(3), 0
    for _ in range(2):
        driver = place.drive(groups)
        wait_for(lambda so_far=before: len(place.content()) > so_far and computing(ray_folder))
        time.sleep(draw.uniform(0, 2 * SECONDS))
        kill(driver)
        driver.communicate()
        wait_for(lambda: not of_ray(ray_folder))  # nothing outlives a driver that started Ray itself
        before = len(place.content())
        assert before < CELLS and place.content().items() <= expected.items()
    assert computed_all(finish(place.drive(groups)))
    assert place.content() == expected
    assert sum(place.executions().values()) <= CELLS + 4, "two drivers with two cells in progress each"


def test_an_interrupt_ends_every_process_and_leaves_no_failure(
    place: Place, groups: list[Any], expected: dict[str, bytes], ray_folder: Path
) -> None:
    driver = place.drive(groups)
    wait_for(lambda: place.content() and computing(ray_folder))
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode != 0 and err.strip().endswith("KeyboardInterrupt")
    wait_for(lambda: not of_ray(ray_folder), seconds=10)
    partial = place.content()
    assert 0 < len(partial) < CELLS and partial.items() <= expected.items()
    assert computed_all(finish(place.drive(groups)))
    assert place.content() == expected


@pytest.fixture(scope="module")
def nodes(ray_folder: Path) -> Iterator[Any]:
    """A cluster of two nodes with a core each; more can be added."""
    from ray.cluster_utils import Cluster

    one = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args={**one, "_system_config": ATTENTIVE})
    found.add_node(**{key: value for key, value in one.items() if key != "include_dashboard"})
    yield found
    found.shutdown()


def raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


@pytest.mark.parametrize("finished", [0, 3, 7])
def test_a_node_that_dies_costs_its_cell_alone(
    place: Place, groups: list[Any], expected: dict[str, bytes], ray_folder: Path, nodes: Any, finished: int
) -> None:
    driver = place.drive(groups, address=nodes.address)
    wait_for(lambda: len(place.content()) >= finished and computing(ray_folder))
    victim = nodes.worker_nodes.copy().pop()
    kill(raylet(victim))
    nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    assert computed_all(finish(driver))
    nodes.remove_node(victim, allow_graceful=False)
    assert place.content() == expected
    assert sum(place.executions().values()) <= CELLS + 2
    again = finish(place.drive(groups, address=nodes.address))
    assert f"Summary(cells={CELLS}, computed=0, failed=(), not_tested=())" in again
    assert place.content() == expected and place.left_over() == []


def test_two_drivers_on_one_store_write_the_same_bytes(
    place: Place, groups: list[Any], expected: dict[str, bytes], nodes: Any
) -> None:
    drivers = [place.drive(order, address=nodes.address) for order in (groups, groups[::-1])]
    assert all(computed_all(finish(driver)) for driver in drivers)
    assert place.content() == expected
    assert place.left_over() == []

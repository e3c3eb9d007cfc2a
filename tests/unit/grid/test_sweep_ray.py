"""The grid on a real Ray of two workers on this machine: the same bytes as without it, whatever is killed."""

import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib.core.config import ROOT
from lib.core.errors import InputError
from lib.grid import cluster
from tests.unit.grid.grids import Place, finish, kill, listed, undisturbed_run, wait_for

# Started by the code that a user without a cluster starts it with; it ends with its standard input.
HEAD = """
import sys
from lib import cluster
with cluster.pool(None, jobs=2, gpus_per_worker=0):
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""
SHAPE = {"groups": 5, "cells": 2}
CELLS = SHAPE["groups"] * SHAPE["cells"]
SECONDS = 0.3


def ray_processes(folder: Path) -> list[Any]:
    """The processes of the Ray that keeps its files in a folder, and those that these started."""
    found = listed()
    own = [process for process in found if str(folder) in " ".join(process.info["cmdline"])]
    return [*own, *(process for process in found if process.info["ppid"] in {other.pid for other in own})]


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """A short path: names of sockets below it may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        # Ray would write a token into the home folder.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def address(ray_folder: Path) -> Iterator[str]:
    command = [sys.executable, "-c", HEAD]
    head = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert head.stdin and head.stdout
    yield head.stdout.readline().strip()
    head.stdin.close()
    assert head.wait(30) == 0
    wait_for(lambda: not ray_processes(ray_folder), seconds=20)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The records of a run without Ray."""
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"), seconds=SECONDS, **SHAPE)


def drive(place: Place, address: str) -> subprocess.Popen[str]:
    return place.drive(place.grid(**SHAPE, seconds=SECONDS), engine="ray", ray_address=address)


def actors(folder: Path) -> list[Any]:
    """Ray's workers that supervise groups."""
    return [process for process in ray_processes(folder) if process.info["name"].startswith("ray::PoolActor")]


def test_kills_on_a_cluster_cost_the_cell_in_progress_at_most(
    place: Place, address: str, ray_folder: Path, undisturbed: dict[str, bytes]
) -> None:
    draw = random.Random(4)
    driver = drive(place, address)
    wait_for(lambda: len(place.computing()) == 2)
    assert len(actors(ray_folder)) == 2
    kill(draw.choice(place.computing()))
    wait_for(lambda: len(place.content()) >= 3)
    time.sleep(draw.uniform(0, SECONDS))
    kill(draw.choice(actors(ray_folder)))
    out = finish(driver)
    assert f"Summary(cells={CELLS}, computed={CELLS}, failed=(), not_tested=())" in out
    assert "a worker died (" in out
    assert place.content() == undisturbed
    assert CELLS <= sum(place.executions().values()) <= CELLS + 1, "the killed process repeats its cell, the killed worker none"
    assert not (place.store.folder / "claims").exists()


def test_a_driver_killed_on_a_cluster_costs_nothing(
    place: Place, address: str, ray_folder: Path, undisturbed: dict[str, bytes]
) -> None:
    driver = drive(place, address)
    wait_for(lambda: len(place.computing()) == 2)
    kill(driver)
    driver.communicate()
    wait_for(lambda: not actors(ray_folder), seconds=20)
    before = len(place.content())
    assert before < CELLS
    finish(drive(place, address))
    assert place.content() == undisturbed
    assert set(place.executions().values()) == {1}, "processes of a killed driver finish their group"


@pytest.mark.parametrize(
    ("jobs", "gpus", "expected"), [(100, 1, (8, 8)), (4, 1, (4, 16)), (100, 0.5, (16, 4)), (100, 2, (4, 16)), (100, 0, (64, 1))]
)
def test_there_are_as_many_workers_as_the_cluster_has_room_for(
    monkeypatch: pytest.MonkeyPatch, jobs: int, gpus: float, expected: tuple[int, int]
) -> None:
    fake_ray(monkeypatch, {"CPU": 64.0, "GPU": 8.0})
    with cluster.pool("auto", jobs=jobs, gpus_per_worker=gpus) as (workers, threads, how):
        assert (workers, threads) == expected
        args = {"num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        assert how == {"backend": "ray", "ray_remote_args": args}


@pytest.mark.parametrize(("jobs", "gpus"), [(1, 0), (8, 8), (8, 5)])
def test_room_for_one_worker_is_refused(monkeypatch: pytest.MonkeyPatch, jobs: int, gpus: int) -> None:
    fake_ray(monkeypatch, {"CPU": 64.0, "GPU": 8.0})
    got = rf"two processes at once, got room for 1 \(64 cores, 8 GPUs, {gpus} GPUs for each of {jobs} processes\): add nodes"
    with pytest.raises(InputError, match=got), cluster.pool("auto", jobs=jobs, gpus_per_worker=gpus):
        pass


def fake_ray(monkeypatch: pytest.MonkeyPatch, resources: dict[str, float]) -> None:
    """Put a cluster that is connected already in the place of Ray, so nothing is started or shut down."""

    class Connected:
        @staticmethod
        def is_initialized() -> bool:
            return True

        @staticmethod
        def cluster_resources() -> dict[str, float]:
            return resources

    monkeypatch.setattr(cluster, "_import", lambda: Connected)


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
    with pytest.raises(InputError, match=got), cluster.pool(address, jobs=2, gpus_per_worker=0):
        pass


def test_ray_that_is_not_installed_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    remedy = r"python -m pip install -r requirements-cluster\.lock -c requirements\.lock$"
    with (
        pytest.raises(InputError, match=f"must be installed, got no package ray: {remedy}"),
        cluster.pool("auto", jobs=2, gpus_per_worker=0),
    ):
        pass
    assert os.path.exists(ROOT / cluster.LOCK)

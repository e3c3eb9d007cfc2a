import os

import psutil
import pytest
from joblib.externals.loky.backend import context

from lib.core import variables
from lib.core.environment import ROOT


def test_cores_are_physical_and_at_least_one() -> None:
    assert 1 <= variables.physical_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("share", "cores", "expected"), [(8, 4, 4), (6, 4, 4), (2, 4, 2), (8, None, 8)], ids=["all", "some", "few", "unknown"]
)
def test_hyper_threads_do_not_count_and_a_share_of_the_machine_does(
    share: int, cores: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of eight processors on four cores, of which a container may use a share."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(context, "_cpu_count_user", lambda _: share)
    monkeypatch.setattr(context, "_count_physical_cores", lambda: (4, None))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else cores)
    assert variables.settings({})["OMP_NUM_THREADS"] == str(expected)


def test_what_the_user_set_wins() -> None:
    chosen = variables.settings({"OMP_NUM_THREADS": "7", "PYTHONPATH": "/mine"})
    assert "OMP_NUM_THREADS" not in chosen
    assert chosen["PYTHONPATH"] == f"{ROOT}{os.pathsep}/mine"
    assert chosen["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    assert variables.settings(chosen)["PYTHONPATH"] == chosen["PYTHONPATH"], "set twice, it does not grow"


@pytest.mark.parametrize(("platform", "expected"), [("linux", True), ("darwin", False)])
def test_allocator_is_set_on_linux_only(monkeypatch: pytest.MonkeyPatch, platform: str, expected: bool) -> None:
    monkeypatch.setattr(variables.sys, "platform", platform)
    monkeypatch.setattr(variables, "physical_cores", lambda: 2)
    assert ("MALLOC_TRIM_THRESHOLD_" in variables.settings({})) is expected

import os

import joblib
import pytest

from lib.core import variables
from lib.core.environment import ROOT


def test_cores_are_physical_and_at_least_one() -> None:
    assert 1 <= variables.physical_cores() <= (os.cpu_count() or 1)


def test_hyper_threads_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda only_physical_cores=False: 2 if only_physical_cores else 4)
    assert variables.settings({})["OMP_NUM_THREADS"] == "2"


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

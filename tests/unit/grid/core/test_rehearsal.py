"""The core of the rehearsal from end to end: the paper's, on a tiny checkpoint, interrupted after its first round."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lib.core import config
from lib.core.config import Config, ModelSource
from lib.grid import cells, engine, run, work
from lib.grid.core import expansion, verdicts
from lib.grid.group import Group, Order, compute
from recipes import rehearsal


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The rehearsal as it stands, its files and its outputs elsewhere."""
    files = rehearsal.write(tmp_path / "rehearsal")
    monkeypatch.setenv("SINKS_OUTPUT", str(tmp_path))
    loaded = config.load("rehearsal")
    assert loaded.grid is not None
    small: dict[str, Any] = {"models": {"llada-8b": ModelSource(str(files / "models" / "llada"))}, "references": {}}
    small |= {"families": {}, "rows": str(files / "rows"), "teraflops": 0.1}
    return dataclasses.replace(loaded, grid=dataclasses.replace(loaded.grid, **small))


def here(groups: Sequence[Group], *, store: Any, work: str, batch_size: int, **_: Any) -> engine.Summary:
    """Compute groups in this process, as a worker of Ray does."""
    for group in groups:
        compute(group, Order(store, work, batch_size, 1, 1))
    return engine.summary(groups, store)


def test_the_rehearsals_core_is_computed_round_by_round(profile: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a worker sets its own
    monkeypatch.setattr(run.engine, "run", lambda groups, **given: here(groups[:7], **given))  # an interruption
    said: list[str] = []
    run.run(profile, run.Engine(), say=said.append)
    first = verdicts.table(verdicts.of_profile(profile), profile).set_index("measure")
    assert "not tested" not in set(first.loc["nelbo", "verdict"]) and set(first.loc["average", "verdict"]) == {"not tested"}
    store = cells.store_of(profile)
    before = {name: (store.folder / f"{name}.json").stat().st_mtime_ns for name in store.ids()}
    assert len(before) == 7
    said.clear()
    run.show(profile, say=said.append)
    assert said[0].startswith("core: 7 variants of llada-8b at 50%, 63 cells, 7 finished; ")
    assert any(line.startswith("verdicts so far") for line in said)
    monkeypatch.setattr(run.engine, "run", here)
    monkeypatch.setattr(work, "pruned", lambda *_, **__: pytest.fail("pruned again, although the weights were kept"))
    said.clear()
    done = run.run(profile, run.Engine(), say=said.append)
    assert (done.cells, done.computed, done.failed, done.not_tested) == (63, 63, (), ())
    assert all((store.folder / f"{name}.json").stat().st_mtime_ns == when for name, when in before.items())
    made = verdicts.table(verdicts.of_profile(profile), profile)
    assert len(made) == 4 * (2 + 8) and "not tested" not in set(made["verdict"])
    average = made[made["measure"] == "average"]
    assert set(average["unit"]) == {"points, 8 tasks"} and set(average["n"]) == {3 * 2 + 7 * 2}  # three subjects of MMLU
    assert average["paper"].tolist()[:2] == [0.48, 0.02]
    assert sum("average, points, 8 tasks" in line for line in said) == 4 and said[-1].startswith("races made ")
    raced = {cell.task: record.result for cell, record in verdicts.of_profile(profile).items() if record and record.result}
    assert all(raced[task]["race"]["draws"] > 0 for task in prices_tasks(profile) - {"gsm8k"}) and "race" not in raced["gsm8k"]


def prices_tasks(profile: Config) -> set[str]:
    return {cell.task for cell in expansion.cells_of(profile)} - {cells.LOSS}

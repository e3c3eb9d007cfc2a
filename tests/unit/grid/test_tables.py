"""Tables of the grid's store, from records written by hand."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest

from lib.core import config, provenance
from lib.core.config import ROOT, Config
from lib.core.errors import InputError
from lib.evaluation.sums import share_interval
from lib.grid import cells, tables
from lib.grid.cells import DENSE, LOSS, Cell
from lib.grid.store import Record
from lib.launch import batch
from lib.studies.pruning import gain_tables
from lib.texts import articles
from recipes import rehearsal

ANSWERS = {DENSE: "1101", "Wanda": "1100", "sink-aware (Wanda)": "0111", "magnitude": "0000"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rehearsal.write(tmp_path_factory.mktemp("tables") / "rehearsal")


@pytest.fixture
def profile(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The rehearsal's grid with two models and two tasks, its store in a folder of its own."""
    monkeypatch.setenv("SINKS_OUTPUT", str(tmp_path))
    loaded = config.load("rehearsal")
    assert loaded.grid is not None
    models = {name: dataclasses.replace(source, source=str(files / "models" / Path(source.source).name))
              for name, source in loaded.grid.models.items() if name in ("llada-8b", "dream-7b")}  # fmt: skip
    small: dict[str, Any] = {"models": models, "references": {}, "families": {"dream-7b": "dream"}, "seeds": 2, "core": None}
    small |= {"task_names": ("piqa", "arc_challenge"), "rows": str(files / "rows"), "patterns": ("2:4",)}
    return dataclasses.replace(loaded, grid=dataclasses.replace(loaded.grid, **small))


@functools.cache
def code() -> str:
    return cells.code_version(ROOT)


def write(loaded: Config, cell: Cell, **fields: Any) -> None:
    spec = cell.spec(code=code())
    cells.store_of(loaded).write(Record(spec["settings"], spec["code"], spec["data"], **fields))


def answered(marks: str) -> dict[str, Any]:
    share = marks.count("1") / len(marks)
    scores = {"acc": marks, "acc_norm": marks[::-1]}
    numbers = {"low": 0.0, "high": 1.0, "chance": 0.5, "truncated": 1, "measured_sparsity": 0.5}
    return {"metric": "acc", "documents": len(marks), "accuracy": share, "scores": scores, **numbers}


def fill(loaded: Config, *, model: str = "llada-8b") -> None:
    """Write what `ANSWERS` says for one model, the second seed one answer better, and losses 1, 2 (dense) or 2, 3."""
    for cell in cells.expand(loaded):
        one = cell.variant
        if one.model != model or one.method not in ANSWERS or one.pattern == "structured":
            continue
        if cell.task == LOSS:
            losses = [1.0, 2.0] if one.method == DENSE else [2.0, 3.0]
            write(loaded, cell, status="done", result={"nats per token": losses, "measured_sparsity": 0.5})
        else:
            write(loaded, cell, status="done", result=answered("1111" if one.seed else ANSWERS[one.method]))


def test_a_profile_without_a_grid_has_nothing() -> None:
    assert tables.of_profile(config.load("quick")) == {}


def test_an_empty_store_is_shown_as_missing(profile: Config) -> None:
    found = tables.of_profile(profile)
    assert list(found) == cells.expand(profile) and set(found.values()) == {None}
    state = tables.state(found)
    assert sum(state["missing"]) == len(found) and not state[["done", "failed", "not tested"]].to_numpy().any()
    assert len(tables.summary(found)) == 0 and tables.answers(found) == {}
    table = tables.paper_table(found, model="llada-8b")
    assert table["PIQA (paper)"].tolist()[0] == 74.10 and all(math.isnan(value) for value in table["PIQA (ours)"])


def test_what_became_of_the_cells_is_counted(profile: Config) -> None:
    first, second, third, *_ = [
        cell for cell in cells.expand(profile) if cell.task == "piqa" and cell.variant.model == "dream-7b"
    ]
    write(profile, first, status="not tested", reason="it is gated")
    write(profile, second, status="failed", reason="out of memory")
    write(profile, third, status="done", result=answered("10"))
    found = tables.of_profile(profile)
    row = tables.state(found).set_index(["model", "task"]).to_dict("index")[("dream-7b", "piqa")]
    own = [cell for cell in found if (cell.variant.model, cell.task) == ("dream-7b", "piqa")]
    assert (row["done"], row["failed"], row["not tested"], row["missing"]) == (1, 1, 1, len(own) - 3)
    assert row["reason"] == "it is gated"  # the first one


def test_results_are_put_side_by_side(profile: Config) -> None:
    fill(profile)
    table = tables.summary(tables.of_profile(profile))
    assert set(table["model"]) == {"llada-8b"} and list(table.columns[:5]) == list(tables.WHAT)
    main = table[table["calibration"].isin(["", "wikitext2, 2 x 48"]) & (table["pattern"] == "unstructured")].set_index("method")
    assert main.loc[DENSE, "piqa, %"] == 75 and main.loc[DENSE, "loss, nats per token"] == 1.5
    assert main.loc["Wanda", "arc_challenge, %"] == 75  # the mean over both seeds, 50 and 100
    assert main.loc["magnitude", "piqa, %"] == 0 and main.loc["magnitude", "loss, nats per token"] == 2.5
    long = tables.results(tables.of_profile(profile)).set_index(["method", "pattern", "calibration", "seed", "task"])
    numbers = long.to_dict("index")
    wanda = numbers[("Wanda", "2:4", "wikitext2, 2 x 48", 0, "piqa")]
    assert (wanda["value"], wanda["n"]) == (0.5, 4) and 0 < wanda["low"] < 0.5 < wanda["high"] < 1
    loss = numbers[(DENSE, "unstructured", "", 0, LOSS)]
    half = 1.96 * math.sqrt(0.5) / math.sqrt(2)
    assert (loss["low"], loss["high"]) == pytest.approx((1.5 - half, 1.5 + half))


def test_answers_are_compared_in_pairs(profile: Config) -> None:
    fill(profile)
    answers = tables.answers(tables.of_profile(profile))
    wanda = answers["llada-8b", "Wanda", 0.5, "piqa"]
    assert wanda.correct == (True, True, False, False) and wanda.scores["acc_norm"] == (False, False, True, True)
    assert (wanda.truncated, wanda.chance, wanda.settings.draws) == (1, 0.5, 2)
    assert answers["llada-8b", DENSE, 0.0, "piqa"].accuracy == 0.75
    at = (("sink-aware (Wanda)", 0.5), ("Wanda", 0.5))
    table = gain_tables.mcnemar_table(answers, [at], seed=0).set_index("task")
    assert table.loc["piqa", "difference, points"] == 25  # 0111 against 1100: two against one
    assert len(table) == 2


def test_the_authors_table_takes_the_main_calibration_and_no_pattern(profile: Config) -> None:
    fill(profile)
    for cell in cells.expand(profile):
        one = cell.variant
        other = one.pattern == "2:4" or (one.calibration is not None and one.calibration.corpus == "c4")
        if one.model == "llada-8b" and one.method == "Wanda" and cell.task == "piqa" and other:
            write(profile, cell, status="done", result=answered("0000"))
    table = tables.paper_table(tables.of_profile(profile), model="llada-8b").set_index("method")
    authors = {row["method"]: row for row in articles.read_rows("paper_llada_50")}
    assert table.loc["Wanda", "PIQA (ours)"] == 75 and table.loc["Wanda", "PIQA (paper)"] == float(authors["Wanda"]["PIQA"])
    assert table.loc["dense", "ARC-C (ours)"] == 75 and all(math.isnan(value) for value in table["MMLU (ours)"])
    assert all(math.isnan(value) for value in table["MMLU (±)"])


def test_fewer_documents_give_a_wider_interval_beside_the_authors_numbers(profile: Config) -> None:
    def width(answers: str) -> float:
        for cell in cells.expand(profile):
            if (cell.variant.model, cell.variant.method, cell.task) == ("llada-8b", DENSE, "piqa"):
                write(profile, cell, status="done", result=answered(answers))
        table = tables.paper_table(tables.of_profile(profile), model="llada-8b").set_index("method")
        assert table.loc["dense", "PIQA (ours)"] == 75
        return table.loc["dense", "PIQA (±)"]

    low, high = share_interval(3, 4)
    assert width("0111") == pytest.approx(100 * (high - low) / 2) and width("0111" * 50) < width("0111") / 5


def test_notebooks_that_show_the_grid_run_again_when_it_went_on(profile: Config) -> None:
    plain, notebooks = config.to_dict(profile), config.notebooks()
    before = {number: batch._fingerprint(path, profile, plain) for number, path in notebooks.items()}
    fill(profile)
    after = {number: batch._fingerprint(path, profile, plain) for number, path in notebooks.items()}
    assert {number for number in notebooks if before[number] != after[number]} == {"03", "04"}
    assert before["01"] == provenance.fingerprint(notebooks["01"], config=plain)


def test_a_damaged_store_is_refused(profile: Config) -> None:
    fill(profile)
    next(cells.store_of(profile).folder.glob("*.json")).write_text("{")
    with pytest.raises(InputError, match="must be the record of its cell, got half a file"):
        tables.of_profile(profile)

"""Numbers between marks: written anew, refused where a mark names nothing, and each computed from what it stands for."""

import json
from pathlib import Path

import pytest

from lib.core import config
from lib.core.errors import InputError
from lib.evaluation.recovered import paper_share
from recipes.pages import marks, times, values

NAMED = {"runs.hours": "7", "runs.share": "12 %"}


def put(folder: Path, name: str, text: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_numbers_are_written_between_their_marks_and_nothing_else_changes() -> None:
    page = "a <!--=runs.hours-->6<!--/--> b\n| <!--=runs.share-->\n<!--/--> | <!-- models:begin -->3<!-- models:end -->"
    found = marks.written(page, value=NAMED.__getitem__)
    assert found == page.replace("-->6<", "-->7<").replace("-->\n<", "-->12 %<")
    assert marks.written(found, value=NAMED.__getitem__) == found


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("<!--=runs.days-->6<!--/-->", "must name a number of .*, got 'runs.days'"),
        ("<!--=runs.hours-->6", "a mark must have a name and an end"),
        ("6<!--/-->", "a mark must have a name and an end"),
        ("<!--=runs hours-->6<!--/-->", "a mark must have a name and an end"),
    ],
)
def test_a_mark_without_a_name_or_an_end_is_refused(page: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        marks.written(page, value=NAMED.__getitem__)


def test_pages_with_old_numbers_are_found_and_written(tmp_path: Path) -> None:
    page = "Intervals are of <!--=rules.level-->{}<!--/-->.\n"
    old = put(tmp_path, "docs/one.md", page.format("90 %"))
    new = put(tmp_path, "README.md", page.format("95 %"))
    assert marks.stale(tmp_path) == ["docs/one.md"] == marks.update(tmp_path)
    assert old.read_text() == new.read_text() and marks.stale(tmp_path) == []


def test_values_are_of_what_they_stand_for() -> None:
    share = values.percent(paper_share("sink-aware (Wanda)"), 1)
    assert values.value("rules.wanda_share") == share == "9.2 %"
    rows = (config.ROOT / "data" / "articles_evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    assert values.value("data.articles_evaluation.rows") == str(len(rows))
    assert values.value("data.tiny_add.questions") == "4,000" and values.value("data.tiny_description.chance") == "25 %"
    with pytest.raises(KeyError):
        values.value("data.nothing.rows")


def test_the_core_answers_by_its_settings() -> None:
    assert values.value("core.looks") == "16, 32, 64 and 128" and values.value("core.draws") == "128"
    assert values.value("core.race_bound") == "1.2 %"  # 3 looks before all draws, 3 other choices, 0.00135 each
    assert values.value("grid.sparsities") == "25 %, 50 % and 75 %"
    assert float(values.value("core.hours")) < float(values.value("core.hours_at_sixty_percent"))


def run_of(folder: Path, number: str, seconds: float, **more: object) -> None:
    put(folder, f"runs/full/{number}_name.json", json.dumps({"seconds": seconds, **more}))


def test_times_of_a_run_are_kept_and_those_of_others_stay(tmp_path: Path) -> None:
    record = tmp_path / "docs" / "times.json"
    with pytest.raises(InputError, match="must hold the record of a run"):
        times.keep("full", output=tmp_path, record=record)
    run_of(tmp_path, "03", 4000.0, peak_bytes=2.04e9)
    run_of(tmp_path, "06", 50.0)
    assert times.keep("full", output=tmp_path, record=record) == ["03", "06"]
    (tmp_path / "runs/full/03_name.json").unlink()
    run_of(tmp_path, "06", 60.0, peak_bytes=1e9)
    assert times.keep("full", output=tmp_path, record=record) == ["06"]
    kept = json.loads(record.read_text())["full"]
    assert [times.in_words(kept[number]) for number in ("03", "06")] == ["67 min, 2.0 GB", "60 s, 1.0 GB"]
    assert kept["03"]["machine"] == times.this_machine()


def test_times_name_their_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(times, "RECORD", put(tmp_path, "times.json", json.dumps({
        "full": {"06": {"seconds": 3000, "peak_bytes": None, "machine": "2 cores of A"},
                 "05": {"seconds": 30, "peak_bytes": None, "machine": "2 cores of B"}},
    })))  # fmt: skip
    found = times.times.__wrapped__()
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[3:9]]
        for line in found["table"].strip().splitlines()
    }
    assert rows["profile"] == ["01", "02", "03", "04", "05", "06"]
    assert rows["`full`"] == [times.NOT_RECORDED] * 4 + ["30 s", "50 min"] and rows["`quick`"] == [times.NOT_RECORDED] * 6
    assert set(rows["`laptop`"]) == {"not measured: gigabytes of weights"} and "<!--" not in found["table"]
    assert found["full.machine"] == "2 cores of A; 2 cores of B" and found["quick.machine"] == times.NOT_RECORDED

"""What a run may remove: what a run wrote, unchanged since, and nothing else."""

import json
from pathlib import Path

import pytest

from lib.core import outputs

NAME = "01_toy"


def begin(root: Path) -> outputs.Outputs:
    return outputs.begin(root, "quick", NAME)


def run(root: Path, *names: str) -> None:
    files = begin(root)
    for name in names:
        files.write(root / name, name.encode())
    files.finish()


def test_what_another_run_wrote_goes_and_what_a_person_wrote_stays(tmp_path: Path) -> None:
    run(tmp_path, "results/quick/01_a.csv", "figures/quick/01_b.png")
    own = [tmp_path / "results/quick/01_my_notes.txt", tmp_path / "figures/quick/01_x.png"]
    for path in own:
        path.write_text("mine")
    run(tmp_path, "results/quick/01_a.csv")
    assert (tmp_path / "results/quick/01_a.csv").exists()
    assert not (tmp_path / "figures/quick/01_b.png").exists()
    assert all(path.read_text() == "mine" for path in own)


def test_a_file_that_somebody_changed_is_somebodys(tmp_path: Path) -> None:
    run(tmp_path, "results/quick/01_a.csv")
    (tmp_path / "results/quick/01_a.csv").write_text("with my remarks")
    run(tmp_path)
    assert (tmp_path / "results/quick/01_a.csv").read_text() == "with my remarks"


def test_a_run_that_was_killed_is_cleaned_up_after(tmp_path: Path) -> None:
    run(tmp_path, "results/quick/01_a.csv")
    begin(tmp_path).write(tmp_path / "results/quick/01_b.csv", b"then it was killed")
    assert set(outputs.read(tmp_path, "quick", NAME)) == {"results/quick/01_a.csv", "results/quick/01_b.csv"}
    run(tmp_path, "results/quick/01_c.csv")
    assert {path.name for path in tmp_path.glob("results/quick/*")} == {"01_c.csv"}


def test_files_known_from_another_record_go_too(tmp_path: Path) -> None:
    old = tmp_path / "results/quick/01_old.csv"
    run(tmp_path, "results/quick/01_old.csv")
    known = outputs.read(tmp_path, "quick", NAME)
    outputs.manifest(tmp_path, "quick", NAME).unlink()
    run(tmp_path)
    assert old.exists()
    outputs.begin(tmp_path, "quick", NAME, known=known).finish()
    assert not old.exists()


@pytest.mark.parametrize(
    "name",
    [
        "results/quick/02_other.csv",
        "results/full/01_a.csv",
        "results/quick/../full/01_a.csv",
        "notebooks/01_toy.ipynb",
        "01_a.csv",
    ],
)
def test_a_damaged_manifest_cannot_name_foreign_files(tmp_path: Path, name: str) -> None:
    run(tmp_path, "results/quick/01_a.csv")
    foreign = tmp_path / name
    foreign.parent.resolve().mkdir(parents=True, exist_ok=True)
    foreign.write_text("foreign")
    digest = outputs.provenance.file_hash(foreign)
    outputs.manifest(tmp_path, "quick", NAME).write_text(json.dumps({name: digest}))
    run(tmp_path)
    assert foreign.read_text() == "foreign"


@pytest.mark.parametrize("text", ["{", "[]", '{"results/quick/01_a.csv": 1}'])
def test_a_damaged_manifest_removes_nothing(tmp_path: Path, text: str) -> None:
    run(tmp_path, "results/quick/01_a.csv")
    outputs.manifest(tmp_path, "quick", NAME).write_text(text)
    run(tmp_path)
    assert (tmp_path / "results/quick/01_a.csv").exists()

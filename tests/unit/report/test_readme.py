"""The generated block of README.md."""

from pathlib import Path

import pytest

from lib.core import provenance
from lib.core.errors import InputError
from lib.report import readme
from tests.reporting import CLAIM, begin, record_everything

README = f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nThe end.\n"


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    record_everything(begin(monkeypatch, tmp_path, profile="full"))
    file = tmp_path / "README.md"
    file.write_text(README)
    return file


def test_block_lists_claims_and_notebooks(path: Path) -> None:
    assert readme.readme_block().splitlines() == [
        "| claim | source | model | estimate [95 % interval] | n | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
        "| Sinks move. | paper, abstract | dlm | 2.00 [1.50, 2.50] positions | 8 | **reproduced** |",
        "| Sinks move. | paper, abstract | smollm2 | - | 0 | **not tested** (no file) |",
        "",
        "- [Notebook 01](notebooks/01_sink_traces.ipynb), Do sinks move? (full, commit "
        f"{provenance.commit()}: 1 table, 2 figures, 2 claims; "
        "[numbers](results/full/01_sink_traces.json), [figures](figures/full))",
    ]


def test_update_replaces_only_the_block_and_notices_staleness(path: Path) -> None:
    assert not readme.is_current(path)
    assert readme.update_readme(path)
    text = path.read_text()
    assert text.startswith(f"# Title\n\n{readme.BEGIN}\n| claim |")
    assert text.endswith(f"\n{readme.END}\n\nThe end.\n")
    assert "old" not in text
    assert readme.is_current(path)
    assert not readme.update_readme(path)
    assert path.read_text() == text
    path.write_text(text.replace("**reproduced**", "**not reproduced**"))
    assert not readme.is_current(path)


def test_results_may_lie_in_another_folder(path: Path, tmp_path: Path) -> None:
    assert readme.readme_block(root=tmp_path) == readme.readme_block()


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_results_of_other_profiles_are_not_mixed_in(
    monkeypatch: pytest.MonkeyPatch, path: Path, tmp_path: Path, profile: str
) -> None:
    before = readme.readme_block()
    run = begin(monkeypatch, tmp_path, profile=profile)
    run.claim("sinks-move", **CLAIM)
    run.finish()
    assert readme.readme_block() == before


def test_without_results_the_block_says_so(tmp_path: Path) -> None:
    assert readme.readme_block(root=tmp_path) == "No results yet: `./run_all.sh full` makes them."


def test_a_run_without_claims_still_has_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begin(monkeypatch, tmp_path, profile="full").finish()
    assert readme.readme_block().startswith("No claim has been tested yet.\n\n- [Notebook 01]")


def test_bars_and_line_ends_cannot_break_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path, profile="full")
    run.claim("sinks-move", **{**CLAIM, "statement": "P(a|b)\nis large."})
    run.finish()
    assert "| P(a\\|b) is large. |" in readme.readme_block()


@pytest.mark.parametrize("text", ["", readme.BEGIN, readme.END + readme.BEGIN, README + README])
def test_readme_without_its_marks_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(InputError, match=r"README.md must hold"):
        readme.update_readme(path)


def test_missing_readme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"README.md must be a readable file"):
        readme.is_current(tmp_path / "README.md")

"""The generated blocks of README.md and docs/verdicts.md."""

import json
from pathlib import Path

import pandas as pd
import pytest

from lib.core import config, provenance
from lib.core.errors import InputError
from lib.report import markdown
from tests.reporting import CLAIM, NAME, TITLE, begin, record_everything


def page(*names: str) -> str:
    return "# Title\n" + "".join(f"\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in names) + "\nThe end.\n"


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    record_everything(begin(monkeypatch, tmp_path, profile="full"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(page("models", "headlines"))
    (tmp_path / "docs" / "verdicts.md").write_text(page("verdicts"))
    return tmp_path


def test_block_lists_claims_and_notebooks(pages: Path) -> None:
    assert markdown.verdict_block().splitlines() == [
        "| claim | verdict | estimate [95 % interval] | n | model | source | rule | note |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| Sinks move. | ✓ **reproduced** | 2.00 [1.50, 2.50] positions | 8 prompts | dlm | paper, abstract "
        f"| {CLAIM['rule']} |  |",
        f"| Sinks move. | – **not tested** | - | 0 | smollm2 | paper, abstract | {CLAIM['rule']} | no file |",
        "",
        "- [Notebook 01](../notebooks/01_sink_traces.ipynb), Do sinks move? (full, commit "
        f"{provenance.commit()}: 1 table, 2 figures, 2 claims; "
        "[numbers](../results/full/01_sink_traces.json), [figures](../figures/full))",
    ]


def test_losses_of_the_dense_models_stand_where_gains_in_nats_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the dense rows alone, and of the first table that has losses; a notebook without such a table says nothing."""
    run = begin(monkeypatch, tmp_path, profile="full")
    rows = [("dlm", "Wanda", 3.9), ("dlm", "dense", 3.7096), ("ar", "dense", 3.1274), ("ar", "random", 5.0)]
    run.table("loss", pd.DataFrame(rows, columns=pd.Index(["model", "method", "loss"])), "Losses.")
    run.finish()
    assert markdown.verdict_block().endswith("; loss of the dense models, nats per token: `dlm` 3.71, `ar` 3.13)")
    assert [markdown.counted({"key": "k", "n": 5, "unit": unit}, "06") for unit in ("times", "nats per token")] == [
        "5 repeats", "5 prompts",
    ]  # fmt: skip


def test_claims_of_the_digest_stand_apart() -> None:
    block = markdown.verdict_block(root=config.ROOT)
    first, second = block.split(markdown.OF_THE_DIGEST)
    source = markdown.HEADER.index("source") + 1
    of_first, of_second = (
        [line.split(" | ")[source - 1] for line in part.splitlines() if line.startswith("| ") and "---" not in line][1:]
        for part in (first, second)
    )
    assert of_second and set(of_second) == {"digest"}
    assert of_first and not any(name.startswith("digest") for name in of_first)


def test_headlines_are_the_chosen_claims_that_were_run(pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (("02", "none-such", "dlm"), ("01", "sinks-move", "dlm"))
    monkeypatch.setattr(markdown, "HEADLINES", asked)
    assert markdown.headline_block().splitlines()[2:] == [
        "| Sinks move. | ✓ **reproduced** | 2.00 [1.50, 2.50] positions | dlm | [01](notebooks/01_sink_traces.ipynb) |"
    ]


def test_the_first_page_shows_at_most_eight_and_only_claims_that_exist() -> None:
    assert len(markdown.HEADLINES) <= 8
    results = {result["number"]: result for result in markdown.load_results(markdown.PROFILE, root=config.ROOT)}
    known = {(number, claim["key"], claim["model"]) for number, result in results.items() for claim in result["claims"]}
    assert set(markdown.HEADLINES) <= known


def test_every_verdict_has_a_sign_of_its_own() -> None:
    from lib.report.results import VERDICTS

    assert set(markdown.SIGNS) == set(VERDICTS) and len(set(markdown.SIGNS.values())) == len(VERDICTS)


def test_the_models_are_read_from_their_folders(tmp_path: Path) -> None:
    recipes = {
        "zeta": ({"tokens": 3_400_000}, 2_500_000),
        "eta": ({"tokens": 3_400_000}, 2_500_000),
        "alpha": ({"trained_tokens": 12_300_000}, 12_000_000),
        "beta": ({"trained_tokens": 920_000, "base": "a wheel"}, 65_800_000),
    }
    for name, (recipe, parameters) in recipes.items():
        folder = tmp_path / "models" / "reference" / name
        folder.mkdir(parents=True)
        (folder / "recipe.json").write_text(json.dumps(recipe))
        (folder / "evaluation.json").write_text(json.dumps({"parameters": parameters}))
    assert markdown.models_block(root=tmp_path) == (
        "The embedded models: `alpha` (12.0 M parameters, 12 M training tokens); `beta` (65.8 M parameters, 0.92 M training "
        "tokens beyond those of the weights it began with); `eta`, `zeta` (2.5 M parameters, 3.4 M training tokens each)."
    )


def test_update_replaces_only_the_blocks_and_notices_staleness(pages: Path) -> None:
    notebook = f"notebooks/{NAME}.ipynb"
    stale = ["README.md: models", "README.md: headlines", "docs/verdicts.md: verdicts", f"{notebook}: found"]
    assert markdown.stale(pages) == stale
    assert markdown.update(pages) == ["README.md", "docs/verdicts.md", notebook]
    text = (pages / "docs" / "verdicts.md").read_text()
    assert text.startswith("# Title\n\n<!-- verdicts:begin -->\n| claim |")
    assert text.endswith("\n<!-- verdicts:end -->\n\nThe end.\n")
    assert "old" not in text and "old" not in (pages / "README.md").read_text()
    assert markdown.stale(pages) == [] == markdown.update(pages)
    assert (pages / "docs" / "verdicts.md").read_text() == text
    (pages / "docs" / "verdicts.md").write_text(text.replace("**reproduced**", "**not reproduced**"))
    assert markdown.stale(pages) == ["docs/verdicts.md: verdicts"]


def test_a_notebook_says_under_its_title_what_the_full_run_found(pages: Path) -> None:
    path = pages / "notebooks" / f"{NAME}.ipynb"
    before, hashed = json.loads(path.read_text()), provenance.notebook_source_hash(path)
    markdown.update(pages)
    after = json.loads(path.read_text())
    lines = "".join(after["cells"][0]["source"]).splitlines()
    assert lines[:4] == ["Note", f"# 01 · {TITLE}", "", "<!-- found:begin -->"] and lines[-1] == "<!-- found:end -->"
    assert lines[4].startswith(f"**What the full run found** (commit {provenance.commit()}; models: dlm (9 M); ")
    assert lines[6:8] == [
        "- ✓ **reproduced** on `dlm`: Sinks move, 2.00 [1.50, 2.50] positions.",
        "- – **not tested** on `smollm2`: Sinks move.",
    ]
    assert provenance.notebook_source_hash(path) == hashed, "what is written from results is no input of them"
    after["cells"][0]["source"] = before["cells"][0]["source"]
    assert after == before


def test_pages_say_which_models_of_a_run_were_replaced_since(
    monkeypatch: pytest.MonkeyPatch, pages: Path, tmp_path: Path
) -> None:
    """Results of weights that a folder no longer holds are shown as what they are; a run records the start of a fingerprint."""
    folder = tmp_path / "models" / "mine" / "dlm"
    folder.mkdir(parents=True)
    monkeypatch.setattr(markdown, "HEADLINES", (("01", "sinks-move", "dlm"),))
    monkeypatch.setattr(config, "ROOT", tmp_path)
    said = []
    for fingerprint in ("ab12cd34", "ab99cd34"):
        (folder / "evaluation.json").write_text(json.dumps({"fingerprint": fingerprint, "parameters": 1}))
        blocks = markdown.found_block(NAME), markdown.verdict_block(), markdown.headline_block()
        said.append(["replaced by others of the same name" in block for block in blocks])
        assert markdown.replaced(markdown.load_results("full")[0]) == ["dlm"] * (fingerprint == "ab99cd34")
    assert said == [[False] * 3, [True] * 3]
    assert markdown.found_block(NAME).startswith("**What the full run found** (commit ")
    assert "models: dlm (9 M), since replaced by others of the same name: dlm; rules" in markdown.found_block(NAME)
    assert markdown.headline_block().endswith("Of models since replaced by others of the same name: dlm (in 01).")


def test_every_notebook_is_stored_as_the_block_is_written() -> None:
    """Else an update would change bytes that it has nothing to do with."""
    for path in config.notebooks().values():
        text = path.read_text(encoding="utf-8")
        assert json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n" == text
        assert (f"notebooks/{path.name}", "found") in markdown._blocks(config.ROOT)  # pyright: ignore[reportPrivateUsage]


def test_results_may_lie_in_another_folder(pages: Path) -> None:
    assert markdown.verdict_block(root=pages) == markdown.verdict_block()


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_results_of_other_profiles_are_not_mixed_in(monkeypatch: pytest.MonkeyPatch, pages: Path, profile: str) -> None:
    before = markdown.verdict_block()
    run = begin(monkeypatch, pages, profile=profile)
    run.claim("sinks-move", **CLAIM)
    run.finish()
    assert markdown.verdict_block() == before


def test_without_results_the_blocks_say_so(tmp_path: Path) -> None:
    nothing = "No results yet: `./run_all.sh full` makes them."
    assert markdown.verdict_block(root=tmp_path) == nothing == markdown.headline_block(root=tmp_path)


def test_a_run_without_claims_still_has_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begin(monkeypatch, tmp_path, profile="full").finish()
    assert markdown.verdict_block().startswith("No claim has been tested yet.\n\n- [Notebook 01]")


def test_bars_and_line_ends_cannot_break_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path, profile="full")
    run.claim("sinks-move", **{**CLAIM, "statement": "P(a|b)\nis large."})
    run.finish()
    assert "| P(a\\|b) is large. |" in markdown.verdict_block()


BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, page("models") + page("models")])
def test_a_page_without_its_marks_is_refused(pages: Path, text: str) -> None:
    (pages / "README.md").write_text(text)
    with pytest.raises(InputError, match=r"README.md must hold <!-- models:begin -->"):
        markdown.update(pages)


def test_a_missing_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"README.md must be a readable file"):
        markdown.stale(tmp_path)

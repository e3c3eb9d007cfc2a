"""The committed notebooks: parts, parameters, length, and that what they show was computed from what is here."""

import ast
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from lib.core import config, provenance
from lib.report import markdown

ROOT = config.ROOT
NOTEBOOKS = config.notebooks()
# One word of each part's heading, in order. The title is the first cell.
PARTS = ("question", "parameters", "setup", "known answer", "experiment", "table", "figure", "claims", "differ")
LONGEST_CELL = 25
LONGEST_MEDIAN = 12
CHECKED, UNCHECKED = "nbval-check-output", "nbval-ignore-output"
TIMES = {"06_timing"}  # notebooks whose claims differ from run to run
KNOWN_TAGS = {"parameters", CHECKED, UNCHECKED, "nbval-skip", "raises-exception", "hide-input"}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=list(NOTEBOOKS))


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    found = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]
    return [cell | {"source": "".join(cell["source"]), "tags": set(cell["metadata"].get("tags", []))} for cell in found]


def code(path: Path) -> list[dict[str, Any]]:
    return cells(path, "code")


def committed_results() -> list[Path]:
    """Results of the profile that verdicts rest on; those of all others are outputs of a run, and git ignores them."""
    return sorted((ROOT / "results" / "full").glob("[0-9][0-9]_*.json"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
    assert list(NOTEBOOKS) == [f"{number:02d}" for number in range(1, len(NOTEBOOKS) + 1)]


@every_notebook
def test_parts_stand_in_order(path: Path) -> None:
    text = "\n".join(cell["source"] for cell in cells(path, "markdown"))
    assert text.startswith("# ")
    headings = [line.lstrip("# ").lower() for line in text.splitlines() if re.match(r"#{2,3} ", line)]
    position = 0
    for part in PARTS:
        following = [index for index, heading in enumerate(headings) if index >= position and part in heading]
        assert following, f"no heading with {part!r} after {headings[:position]}"
        position = following[0] + 1


@every_notebook
def test_parameters_are_exactly_three_with_the_defaults_of_quick(path: Path) -> None:
    tagged = [cell for cell in code(path) if "parameters" in cell["tags"]]
    assert len(tagged) == 1
    values = {}
    for node in ast.parse(tagged[0]["source"]).body:
        assert isinstance(node, ast.Assign | ast.AnnAssign)
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        values[ast.unparse(target)] = ast.literal_eval(node.value or ast.Constant(None))
    assert values == {"profile": "quick", "seed": 0, "overrides": {}}


@every_notebook
def test_cells_are_short(path: Path) -> None:
    lengths = [len(cell["source"].splitlines()) for cell in code(path)]
    assert max(lengths) <= LONGEST_CELL
    assert statistics.median(lengths) <= LONGEST_MEDIAN


@every_notebook
def test_every_cell_was_executed_in_order_and_without_error(path: Path) -> None:
    counts = [cell["execution_count"] for cell in code(path)]
    assert counts == list(range(1, len(counts) + 1)), "run python -m recipes.refresh_notebooks"
    errors = [output["ename"] for cell in code(path) for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors


@every_notebook
def test_checked_cells_have_output_and_tables_and_claims_are_checked(path: Path) -> None:
    checked = [cell for cell in code(path) if CHECKED in cell["tags"]]
    assert checked, "nbval would compare nothing"
    assert all(cell["outputs"] for cell in checked)
    claims = next(cell for cell in code(path) if "run.finish" in cell["source"])
    wanted = UNCHECKED if path.stem in TIMES else CHECKED
    assert wanted in claims["tags"], "the cell of claims is compared, unless they are about times"


@every_notebook
def test_cells_are_plain_and_leave_machinery_to_lib(path: Path) -> None:
    for cell in code(path):
        assert cell["tags"] <= KNOWN_TAGS, f"unknown tag among {cell['tags']}"
        assert not re.search(r"^\s*[%!]", cell["source"], flags=re.MULTILINE), "no magics"
        tree = ast.parse(cell["source"])
        assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)], "no class"
        long = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and len(node.body) > 8]
        assert not long, f"{long} belongs into lib"
        assert "sys.path" not in cell["source"]
        assert "trust_remote_code" not in cell["source"]


@every_notebook
def test_outputs_name_no_place_of_the_machine_that_made_them(path: Path) -> None:
    shown = json.dumps([cell["outputs"] for cell in code(path)])
    assert str(ROOT) not in shown
    assert str(Path.home()) + "/" not in shown


@every_notebook
def test_images_have_texts_and_no_dead_bar_stays(path: Path) -> None:
    for output in (output for cell in code(path) for output in cell["outputs"]):
        kinds = set(output.get("data", {}))
        images = {kind for kind in kinds if kind.startswith("image/")}
        assert all(output["metadata"].get(kind, {}).get("alt") for kind in images), "run python -m recipes.refresh_notebooks"
        assert not {kind for kind in kinds if "widget" in kind} and output.get("name") != "stderr"


@every_notebook
def test_it_begins_with_what_the_full_run_found_and_ends_with_what_its_own_did(path: Path) -> None:
    first, last = cells(path, "markdown")[0]["source"], code(path)[-1]
    assert "<!-- found:begin -->\n**What the full run found** (commit " in first
    said = ["".join(output["data"].get("text/markdown", "")) for output in last["outputs"] if "data" in output]
    assert any("**What this run found** (profile quick, seed 0;" in text for text in said), (
        "run python -m recipes.refresh_notebooks"
    )


@every_notebook
def test_metadata_is_stripped_and_the_kernel_is_the_usual_one(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content["metadata"]) == {"kernelspec", "language_info", "sinks"}
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert all(set(cell["metadata"]) <= {"tags"} for cell in content["cells"]), "run python -m recipes.refresh_notebooks"


@every_notebook
def test_outputs_are_those_of_the_last_code(path: Path) -> None:
    """What the notebook's own run took for its inputs, against what is here."""
    computed = json.loads(path.read_text(encoding="utf-8"))["metadata"]["sinks"]
    assert (computed["profile"], computed["seed"], computed["overrides"]) == ("quick", 0, {}), "the defaults are committed"
    now = provenance.fingerprint(path, config=config.to_dict(config.load("quick")))
    assert computed["fingerprint"] == now, "inputs changed: run python -m recipes.refresh_notebooks and commit the notebooks"


@every_notebook
def test_results_are_committed(path: Path) -> None:
    assert path.stem in {result.stem for result in committed_results()}


@pytest.mark.parametrize("path", committed_results(), ids=lambda path: path.stem)
def test_committed_results_are_of_the_defaults_and_say_of_which_commit(path: Path) -> None:
    """They take hours and may be older than the code; then they are those of the commit that they and README name."""
    result = json.loads(path.read_text(encoding="utf-8"))
    assert (result["seed"], result["overrides"]) == (0, {}), "the committed results are those of the defaults"
    assert re.fullmatch(r"[0-9a-f]{12}", result["commit"]), "commit the code first, then run ./run_all.sh full"


@pytest.mark.parametrize("path", committed_results(), ids=lambda path: path.stem)
def test_committed_outputs_are_whole(path: Path) -> None:
    for name, digest in json.loads(path.read_text(encoding="utf-8"))["outputs"].items():
        assert provenance.file_hash(ROOT / name) == digest, f"{name} is not the one that was computed"


def test_pages_show_the_present_verdicts() -> None:
    assert not markdown.stale(ROOT), "write them anew with lib.report.markdown.update"

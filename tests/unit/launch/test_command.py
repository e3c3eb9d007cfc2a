"""The launcher on a small project of its own: a copy of lib, two toy notebooks, no models."""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from lib.core import config, errors
from lib.core.environment import ROOT
from lib.launch import batch, execution
from lib.launch import command as launcher
from tests import tiny

REPORT = '''"""Stand-in for the report page."""
from lib.core import config, provenance
def build(profile):
    path = config.output_root() / "results" / profile / "report.html"
    provenance.write_text(path, "page")
    return path
'''
PARAMETERS = 'profile = "quick"\nseed = 0\noverrides = {}'
WRITES = """
import os, time
from lib.core import config, outputs
out = config.output_root()
files = outputs.begin(out, profile, "01_toy")
files.write(out / "figures" / profile / "01_curve.png", f"figure {seed}".encode())
if seed == 5:
    files.write(out / "results" / profile / "01_only_for_seed_5.csv", b"5")
for step in range(3):
    while (out / "wait").exists() and step == 1:
        time.sleep(0.02)
    files.write(out / "results" / profile / f"01_table{step}.csv", f"{seed} {step} {len(overrides)}".encode())
files.finish()
"""


def write_notebook(path: Path, *codes: str) -> None:
    tags = [{"tags": ["parameters"]}] + [{}] * len(codes)
    cells = [
        {"cell_type": "code", "source": code, "metadata": metadata, "outputs": [], "execution_count": None, "id": f"c{index}"}
        for index, (code, metadata) in enumerate(zip((PARAMETERS, *codes), tags, strict=True))
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def make_project(root: Path) -> Path:
    shutil.copytree(ROOT / "lib", root / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "lib" / "report" / "page.py").write_text(REPORT)
    for folder in ("configs", "notebooks", "data"):
        (root / folder).mkdir()
    for name in ("run_all.sh", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    settings = yaml.safe_load((ROOT / "configs" / "quick.yaml").read_text())
    settings["variance_analysis"]["answering_models"] = []
    for section in ("pruning_baselines", "sink_aware_pruning", "joint_quantization"):
        settings[section] |= {"models": [], "stronger_models": []}
    settings["timing"] |= {"models": [], "judge": ""}
    (root / "configs" / "quick.yaml").write_text(yaml.safe_dump(settings | {"models": {}}))
    write_notebook(root / "notebooks" / "01_toy.ipynb", WRITES)
    write_notebook(root / "notebooks" / "02_bad.ipynb", "x = 1", "raise ValueError('rule,\\n got x')")
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("launcher") / "a {folder} with spaces")


def variables(root: Path, **changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("SINKS_OUTPUT", "VIRTUAL_ENV", "CONDA_PREFIX")}
    return kept | {"SINKS_PYTHON": sys.executable, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"} | changes


def launch(root: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lib.launch.command", *words]
    return subprocess.run(command, cwd=root, env=variables(root, **changes), capture_output=True, text=True, check=False)


def contents(root: Path) -> dict[str, bytes]:
    """Every file that a run writes, without the executed copies and records, which hold times."""
    folders = (root / "figures", root / "results")
    return {str(path.relative_to(root)): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def wait_until(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_profiles_are_those_of_the_configuration() -> None:
    assert launcher.PROFILES == config.PROFILES


@pytest.mark.parametrize("words", [[], ["quick"], ["--notebooks", "01,02"], ["--notebooks", "2,1"]])
def test_no_argument_means_quick_and_all_notebooks(project: Path, words: Sequence[str]) -> None:
    chosen = launcher.parse(words, root=project)
    assert chosen.profile == "quick"
    assert list(chosen.notebooks) == ["01", "02"]
    assert (chosen.seed, chosen.overrides, chosen.fresh, chosen.list) == (None, {}, False, False)


def test_options_are_read(project: Path) -> None:
    chosen = launcher.parse(["paper", "--seed", "3", "--set", "a.b=1=2", "--set", "c=", "--fresh", "--list"], root=project)
    assert (chosen.profile, chosen.seed, chosen.overrides) == ("paper", 3, {"a.b": "1=2", "c": ""})
    assert chosen.fresh
    assert chosen.list


def test_words_of_the_grid_are_read(project: Path) -> None:
    chosen = launcher.parse(["paper", "--plan", "--limit", "5", "--jobs", "3", "--set", "grid.seeds=2"], root=project)
    assert (chosen.plan, chosen.grid_only, chosen.jobs, chosen.retry_failed, chosen.ray) == (True, False, 3, False, None)
    assert chosen.overrides == {"grid.seeds": "2", "grid.limit": 5}
    chosen = launcher.parse(["rehearsal", "--ray", "auto", "--gpus-per-cell", "0.5", "--grid-only"], root=project)
    assert (chosen.ray, chosen.gpus_per_cell, chosen.grid_only, chosen.limit) == ("auto", 0.5, True, None)
    chosen = launcher.parse(["paper", "--gpus-per-cell", "2"], root=project)
    assert (chosen.ray, chosen.gpus_per_cell) == (None, 2.0)
    assert launcher.parse(["paper", "--gpus-per-cell", "0.5"], root=project).gpus_per_cell == 0.5
    assert launcher.parse(["paper"], root=project).gpus_per_cell is None


@pytest.mark.parametrize(
    ("words", "computes"),
    [
        (["quick"], False),
        (["paper"], True),
        (["rehearsal", "--jobs", "2"], True),
        (["paper", "--plan"], False),
        (["paper", "--list"], False),
        (["paper", "--notebooks", "01"], False),
        (["paper", "--notebooks", "01", "--grid-only"], True),
    ],
)
def test_ray_is_needed_only_where_cells_are_computed(project: Path, words: Sequence[str], computes: bool) -> None:
    assert launcher._computes_grid(launcher.parse(words, root=project)) is computes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["quik"], "profile must be one of quick, full, laptop, paper, rehearsal, got 'quik': did you mean 'quick'?"),
        (["--notebooks", "09"], "--notebooks must name numbers among 01, 02, got '09'"),
        (["--notebooks", ""], "--notebooks must name numbers"),
        (["--seed", "-1"], "--seed must be a whole number from 0, got '-1'"),
        (["--seed", "one"], "--seed must be a whole number"),
        (["--seed"], "argument --seed: expected one argument"),
        (["--set", "prompts"], "--set must be KEY=VALUE, got 'prompts'"),
        (["--set", "seed=3"], "use ./run_all.sh PROFILE --seed N"),
        (["--plan", "--list"], "--list and --plan must not go together, got both"),
        (["--plan"], "--plan must go with a profile that has a grid, got quick: use one of laptop, paper, rehearsal"),
        (["full", "--gpus-per-cell", "1"], "--gpus-per-cell must go with a profile that has a grid, got full"),
        (["paper", "--limit", "0"], "--limit must be a whole number from 1, got '0'"),
        (["paper", "--jobs", "two"], "--jobs must be a whole number from 1, got 'two'"),
        (["paper", "--gpus-per-cell", "1.5"], "--gpus-per-cell must be a part of one or a whole number, got '1.5'"),
        (["paper", "--gpus-per-cell", "two"], "--gpus-per-cell must be a part of one or a whole number, got 'two'"),
        (
            ["paper", "--ray", "auto", "--gpus-per-cell", "-1"],
            "must be a part of one or a whole number, got '-1'",
        ),
        (["--frehs"], "unrecognized arguments: --frehs"),
        (["--set", "sink_traces.promts=4"], "did you mean 'prompts'?"),
        (["--set", "sink_traces.prompts=four"], "must be a whole number, got 'four'"),
        (["--set", "sink_traces.prompts=0"], "must be in [1, 1024], got 0"),
        (["--set", "models.dlm.source=models/nowhere"], "models/nowhere"),
        (["--set", "sink_traces.extra_models=[models/nowhere]"], "models/nowhere"),
    ],
)
def test_bad_input_gives_one_line_and_leaves_no_file(project: Path, words: Sequence[str], expected: str) -> None:
    before = sorted(project.rglob("*"))
    done = launch(project, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert sorted(project.rglob("*")) == before


def test_damaged_checkpoint_is_found_before_any_work(tmp_path: Path, project: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    done = launch(project, "--set", f"models.own.source={model}")
    assert done.returncode == 2
    assert "whole safetensors file" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_diffusion_model_without_a_mask_token_is_found_before_any_work(tmp_path: Path, project: Path) -> None:
    model = tiny.folder(tmp_path / "model", causal=False)
    tiny.words().save_pretrained(model)
    tiny.edit_config(model, mask_token_id=None)
    done = launch(project, "--notebooks", "01", "--set", f"sink_traces.extra_models=[{model}]")
    assert done.returncode == 2
    assert "a diffusion model must name its mask token" in done.stderr and done.stderr.count("\n") == 1


def test_unwritable_folder_is_found_before_any_work(tmp_path: Path, project: Path) -> None:
    (tmp_path / "figures").write_text("a file where a folder should be")
    done = launch(project, SINKS_OUTPUT=str(tmp_path))
    assert done.returncode == 2
    assert "must be writable, got a file at" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]


def test_folder_without_permission_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(errors.InputError, match="no permission to write in"):
        batch._check_writable(tmp_path / "figures" / "quick")
    assert list(tmp_path.iterdir()) == []


def test_help_and_list_answer_at_once_and_write_nothing(project: Path) -> None:
    before = sorted(project.rglob("*"))
    shown = launch(project, "--help")
    assert shown.returncode == 0
    for word in ("--notebooks", "--seed", "--set", "--fresh", "--list", "lab", "paper"):
        assert word in shown.stdout
    listed = launch(project, "--list")
    assert listed.returncode == 0
    assert [line.split() for line in listed.stdout.splitlines()] == [
        ["01", "toy", "would", "run", "not", "run", "yet"],
        ["02", "bad", "would", "run", "not", "run", "yet"],
    ]
    assert sorted(project.rglob("*")) == before


def test_run_then_skip_then_run_again_when_something_changed(project: Path, tmp_path: Path) -> None:
    place = {"SINKS_OUTPUT": str(tmp_path)}
    first = launch(project, "--notebooks", "01", **place)
    assert first.returncode == 0, first.stderr
    assert "01  toy" in first.stdout
    assert "wrote 5 files: 1 figures, 3 tables, executed copy runs/quick/01_toy.ipynb" in first.stdout
    assert "report: results/quick/report.html" in first.stdout
    assert "6 files written" in first.stdout
    written = contents(tmp_path)
    again = launch(project, "--notebooks", "01", **place)
    assert "up to date" in again.stdout
    assert "total" in again.stdout
    assert contents(tmp_path) == written

    def state(*words: str) -> str:
        return launch(project, "--notebooks", "01", "--list", *words, **place).stdout

    assert "inputs changed" in state("--seed", "1")
    assert "inputs changed" in state("--set", "sink_traces.prompts=3")
    (tmp_path / "results" / "quick" / "01_table1.csv").write_text("half")
    assert "results/quick/01_table1.csv was changed" in state()
    (tmp_path / "results" / "quick" / "01_table1.csv").unlink()
    assert "results/quick/01_table1.csv is missing" in state()
    (tmp_path / "results" / "quick" / "01_table1.csv").write_bytes(written["results/quick/01_table1.csv"])
    assert "up to date" in state()
    (tmp_path / "runs" / "quick" / "01_toy.ipynb").write_text("{")
    assert "missing or damaged" in state()


def test_fresh_runs_again_and_drops_what_other_settings_wrote(project: Path, tmp_path: Path) -> None:
    place = {"SINKS_OUTPUT": str(tmp_path)}
    assert launch(project, "--notebooks", "01", "--seed", "5", **place).returncode == 0
    assert "results/quick/01_only_for_seed_5.csv" in contents(tmp_path)
    foreign = [tmp_path / name for name in ("results/quick/02_other.csv", "results/quick/01_notes.txt", "figures/quick/01_x.png")]
    for path in foreign:
        path.write_text("not written by a run")
    assert launch(project, "--notebooks", "01", "--seed", "4", **place).returncode == 0
    assert "results/quick/01_only_for_seed_5.csv" not in contents(tmp_path)
    assert all(path.exists() for path in foreign)
    fresh = launch(project, "--notebooks", "01", "--seed", "4", "--fresh", **place)
    assert "wrote 5 files" in fresh.stdout


def test_kill_in_mid_run_and_repeat_gives_the_same_results(project: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(project, "--notebooks", "01", SINKS_OUTPUT=str(whole)).returncode == 0
    killed.mkdir()
    (killed / "wait").touch()
    command = [sys.executable, "-m", "lib.launch.command", "--notebooks", "01"]
    process = subprocess.Popen(command, cwd=project, env=variables(project, SINKS_OUTPUT=str(killed)), stdout=subprocess.DEVNULL)
    wait_until((killed / "results" / "quick" / "01_table0.csv").exists)
    assert "one run at a time" in launch(project, "--notebooks", "01", SINKS_OUTPUT=str(killed)).stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    (killed / "results" / "quick" / ".01_table1.123.partial.csv").write_text("ha")
    assert not (killed / "runs" / "quick" / "01_toy.json").exists()
    assert not (killed / "runs" / "quick" / "01_toy.ipynb").exists()
    # The kernel must be gone: it would write its next table as soon as the wait is over.
    time.sleep(1.5)
    (killed / "wait").unlink()
    time.sleep(0.3)
    assert not (killed / "results" / "quick" / "01_table1.csv").exists()
    again = launch(project, "--notebooks", "01", SINKS_OUTPUT=str(killed))
    assert again.returncode == 0, again.stderr
    assert contents(killed) == contents(whole)
    assert not list(killed.rglob("*partial*"))


def test_failure_names_notebook_cell_error_and_copy_and_keeps_the_rest(project: Path, tmp_path: Path) -> None:
    done = launch(project, SINKS_OUTPUT=str(tmp_path))
    assert done.returncode == 1
    assert "01  toy" in done.stdout
    assert done.stderr.count("\n") == 1
    copy = "runs/quick/02_bad.failed.ipynb"
    # Papermill put one cell in, so the third cell of the notebook is the fourth that ran.
    assert f"notebook 02 (bad) failed in cell 3 of 3 (In [4]) with ValueError: rule, got x: open {copy}" in done.stderr
    assert "ValueError" in (tmp_path / copy).read_text()
    assert not (tmp_path / "runs" / "quick" / "02_bad.json").exists()
    assert (tmp_path / "results" / "quick" / "01_table2.csv").exists()
    assert "up to date" in launch(project, "--list", SINKS_OUTPUT=str(tmp_path)).stdout


def test_library_update_makes_a_notebook_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = execution.Job("01", tmp_path / "01_toy.ipynb", "quick", 0, {}, "print", tmp_path)
    job.executed.parent.mkdir(parents=True)
    job.executed.write_text('{"cells": []}')
    execution._record(job, {}, 1.0)
    assert execution.why_run(job) == ""
    monkeypatch.setattr(execution.provenance, "versions", lambda: {"python": "4.0"})
    assert execution.why_run(job) == "other library versions"
    job.status.write_text("[")
    assert execution.why_run(job) == "not run yet"


def test_lab_opens_the_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: str, command: Sequence[str]) -> None:
        raise SystemExit(list(command))

    monkeypatch.setenv("SINKS_PYTHON", sys.executable)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(os, "execv", start)
    with pytest.raises(SystemExit) as started:
        launcher.main(["lab", "--no-browser"])
    assert started.value.args == (
        [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={ROOT / 'notebooks'}", "--no-browser"],
    )


def test_results_that_are_there_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "SINKS_PYTHON": sys.executable, "SINKS_OUTPUT": str(tmp_path)})
    shutil.copytree(ROOT / "results" / "full", tmp_path / "results" / "full")
    (tmp_path / "results" / "full" / "02_variance_analysis.json").write_text("{")
    (tmp_path / "results" / "full" / "03_pruning_baselines.json").unlink()
    assert launcher.main(["full", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commit = json.loads((ROOT / "results" / "full" / "01_sink_traces.json").read_text())["commit"]
    assert lines[0].endswith(f"would run    not run yet; results of commit {commit} are there")
    assert lines[1].endswith("would run    not run yet; damaged results are there")
    assert lines[2].endswith("would run    not run yet")


def test_report_is_built_of_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "SINKS_PYTHON": sys.executable, "SINKS_OUTPUT": str(tmp_path)})
    for folder in ("results", "figures"):
        shutil.copytree(ROOT / folder / "full", tmp_path / folder / "full", ignore=shutil.ignore_patterns("report.html"))
    before = sorted(tmp_path.rglob("*"))
    assert launcher.main(["report", "full"]) == 0
    page = tmp_path / "results" / "full" / "report.html"
    assert capsys.readouterr().out == f"report: {page}\n"
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "results" / "full").glob("0*.json"))]
    assert records and all(claim["statement"] in html.unescape(page.read_text()) for one in records for claim in one["claims"])
    assert sorted(tmp_path.rglob("*")) == sorted([*before, page])


def test_report_of_a_damaged_result_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "SINKS_PYTHON": sys.executable, "SINKS_OUTPUT": str(tmp_path)})
    (tmp_path / "results" / "quick").mkdir(parents=True)
    (tmp_path / "results" / "quick" / "01_sink_traces.json").write_text("{")
    assert launcher.main(["report"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    for words in (["report", "ful"], ["report", "full", "quick"]):
        assert launcher.main(words) == 2
        assert capsys.readouterr().err.startswith(
            "error: report must name one of quick, full, laptop, paper, rehearsal, got 'ful"
        )


def test_old_python_gets_one_line(project: Path, tmp_path: Path) -> None:
    for name in ("python3.11", "python3.12", "python3", "python"):
        (tmp_path / name).write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.8.18; fi\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "dirname").symlink_to(str(shutil.which("dirname")))
    script = ["/bin/bash", str(project / "run_all.sh")]
    done = subprocess.run(script, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == ("error: Python must be 3.11 or newer, got Python 3.8.18: install Python 3.11, or uv, and run again\n")


def test_script_passes_its_words_on(project: Path, tmp_path: Path) -> None:
    place = variables(project, SINKS_OUTPUT=str(tmp_path), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    place["VIRTUAL_ENV"] = str(Path(sys.executable).parent.parent)
    script = ["/bin/bash", str(project / "run_all.sh"), "--notebooks", "01", "--list"]
    done = subprocess.run(script, cwd=tmp_path, env=place, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:2] == ["01", "toy"]


@pytest.mark.parametrize("name", ["run_all.sh", "run_tests.sh", ".ci/run"])
def test_scripts_need_nothing_that_an_old_bash_lacks(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    subprocess.run(["/bin/bash", "-n", str(path)], check=True)
    text = path.read_text()
    for newer in ("declare -A", "mapfile", "readarray", "&>>", "|&", ",,}", "^^}", "curl", "jq "):
        assert newer not in text


def test_a_notebook_that_refuses_its_settings_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = tmp_path / "notebooks" / "01_refuses.ipynb"
    notebook.parent.mkdir()
    write_notebook(
        notebook, "from lib.core.errors import InputError\nraise InputError('prompts must be few, got many: lower them')"
    )
    job = execution.Job("01", notebook, "quick", 0, {}, "print", tmp_path)
    with pytest.raises(execution.NotebookError, match="InputError: prompts must be few") as caught:
        execution.finish(execution.begin(job))
    assert caught.value.is_input
    assert not execution.NotebookError("anything else").is_input

"""Runs with settings of one's own, and machines that are not as expected: the right thing starts, or a line says why not."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from lib.checkpoints import lookup
from lib.checkpoints.lookup import UnavailableError
from lib.commands import terminal
from lib.core import config, environment, variables
from lib.core.config import ModelSource
from lib.core.environment import ROOT
from lib.core.errors import InputError
from lib.grid import cells
from lib.launch import batch, execution
from lib.launch import command as launcher
from tests import tiny
from tests.unit.checkpoints import test_adapters
from tests.unit.launch.test_command import make_project, wait_until
from tests.unit.launch.test_command import variables as environ_of


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("own") / "project")


def scripted(project: Path, *words: str, link: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run run_all.sh itself, or a link to it, in the environment of the tests."""
    place = environ_of(project) | {"VIRTUAL_ENV": sys.prefix} | changes
    del place["SINKS_PYTHON"]
    script = ["/bin/bash", str(link or project / "run_all.sh"), *words]
    return subprocess.run(script, env=place, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("seed", "overrides", "is_custom"),
    [(None, {}, False), (0, {}, False), (1, {}, True), (None, {"sink_traces.prompts": "4"}, True)],
)
def test_only_a_profile_as_it_stands_writes_to_the_repository(
    seed: int | None, overrides: dict[str, str], is_custom: bool
) -> None:
    root = config.custom_root(config.load("quick", seed=seed, overrides=overrides), overrides=overrides)
    assert (root is not None) == is_custom
    if root is not None:
        assert root.parent == ROOT / "runs" and root.name.startswith("custom-") and len(root.name) == 15


def test_every_choice_of_settings_has_a_folder_of_its_own() -> None:
    chosen: list[tuple[str, int, dict[str, str]]] = [
        ("quick", 1, {}), ("quick", 2, {}), ("full", 1, {}), ("quick", 1, {"timing.models": "[]"}), ("quick", 1, {"seed": "1"}),
    ]  # fmt: skip
    roots = {config.custom_root(config.load(name, seed=seed), overrides=own) for name, seed, own in chosen}
    assert len(roots) == len(chosen)


def test_own_runs_go_below_runs_and_share_the_grids_cells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key != "SINKS_OUTPUT"})
    launcher._go_to_own_folder(launcher.parse(["rehearsal", "--limit", "3"]))
    own = config.output_root()
    assert own.parent == ROOT / "runs" and capsys.readouterr().out == ""  # nothing is said before the settings are checked
    launcher._say_where()
    assert capsys.readouterr().out == f"writes below {own}\n"
    assert cells.store_of(config.load("rehearsal")).folder == ROOT / "results" / "rehearsal" / "cells"
    monkeypatch.setattr(os, "environ", os.environ | {"SINKS_OUTPUT": "/elsewhere"})
    launcher._go_to_own_folder(launcher.parse(["quick", "--seed", "3"]))
    assert config.output_root() == Path("/elsewhere")


def test_outputs_are_read_from_where_they_were_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINKS_CWD", str(tmp_path))
    monkeypatch.setenv("SINKS_OUTPUT", "out")
    assert config.output_root() == tmp_path / "out"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SINKS_OUTPUT", "~/out")
    assert config.output_root() == tmp_path / "home" / "out"
    monkeypatch.setenv("SINKS_OUTPUT", "~nobody-of-this-name/out")
    with pytest.raises(InputError, match="~ must stand for a home folder, got '~nobody-of-this-name/out'"):
        config.output_root()


def test_a_named_model_that_cannot_be_had_is_said_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"sink_traces.extra_models": '["GSAI-ML/none@0f2787f"]'}
    with pytest.raises(UnavailableError, match="GSAI-ML/none@0f2787f must be cached or reachable, got: the hub is switched off"):
        batch._check_named(config.load("quick", overrides=named), config.load("quick"))
    batch._check_named(config.load("paper"), config.load("paper"))  # the profile's own are left out where they cannot be had


def test_a_checkpoint_of_the_hub_that_is_there_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(ROOT / "models" / "reference" / "dlm"))
    lookup.check_obtainable(ModelSource("a/b", "0f2787f"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))  # half of one
    with pytest.raises(UnavailableError, match="a/b@0f2787f must be cached"):
        lookup.check_obtainable(ModelSource("a/b", "0f2787f"))


def test_an_adapter_counts_with_its_base(tmp_path: Path) -> None:
    matrices = test_adapters.pair(test_adapters.Q, test_adapters.RANK, test_adapters.SHAPES[test_adapters.Q])
    folder = test_adapters.write(tmp_path / "lora", tiny.folder(tmp_path / "base"), matrices)
    settings = config.load("quick", overrides={"sink_traces.extra_models": [str(folder)]})
    named = config.notebooks()["01"], settings, config.to_dict(settings)
    before = batch._fingerprint(*named)
    tiny.folder(tmp_path / "base", seed=4)
    assert batch._fingerprint(*named) != before


def test_a_link_to_the_script_starts_the_project(project: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "first.sh").symlink_to(project / "run_all.sh")
    (tmp_path / "far" / "second.sh").symlink_to("../first.sh")
    done = scripted(project, "--list", link=tmp_path / "far" / "second.sh")
    assert (done.returncode, done.stderr, done.stdout.split()[:2]) == (0, "", ["01", "toy"])


def test_a_foreign_lib_on_the_path_is_not_ours(project: Path, tmp_path: Path) -> None:
    for name in ("lib", "sinks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('of another project')\n")
    done = scripted(project, "--list", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["01", "toy"])
    command = [sys.executable, "-c", "import sink_aware_pruning_command as s; raise SystemExit(s.main())", "compare", "a", "b"]
    place = environ_of(ROOT) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=place, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"got {tmp_path / 'a'}" in done.stderr and "of another project" not in done.stderr


def test_a_reader_that_leaves_is_no_failure_with_a_traceback(project: Path) -> None:
    words = f"'{sys.executable}' -m lib.launch.command --list"
    pipe = ["/bin/bash", "-c", f"{words} | (exec true); sleep 0; {words} 2>&1 >/dev/full | cat"]
    done = subprocess.run(pipe, cwd=project, env=environ_of(project), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr + done.stdout
    assert "the disk must have room" in done.stdout


def test_without_virtual_env_the_systems_own_python_is_no_environment(tmp_path: Path) -> None:
    """`${VIRTUAL_ENV}/bin/python` is /bin/python where the variable is not set."""
    text = (ROOT / "run_all.sh").read_text()
    loop = text[text.index("for candidate") : text.index("do\n", text.index("for candidate"))]
    show = f'set -u\n{loop}do\n[ -n "$candidate" ] && echo "$candidate"\ndone\ntrue'
    done = subprocess.run(["/bin/bash", "-c", show], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [".venv/bin/python", "python3.11", "python3.12", "python3", "python"]
    given = {"PATH": os.environ["PATH"], "VIRTUAL_ENV": "/v", "CONDA_PREFIX": "/c"}
    done = subprocess.run(["/bin/bash", "-c", show], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["/v/bin/python", "/c/bin/python"]


def test_the_locks_python_is_taken_where_a_newer_one_stands_in_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python3.11"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment.sys, "version_info", (3, 13, 0, "final", 0))
    assert environment._base("/usr/bin/python3.13") == str(python)
    python.write_text("#!/bin/sh\nexit 1\n")
    assert environment._base("/usr/bin/python3.13") == "/usr/bin/python3.13"


def test_a_foreign_kernel_does_not_come_first() -> None:
    own = os.path.join(sys.prefix, "share", "jupyter")
    assert variables.settings({"JUPYTER_PATH": f"/foreign:{own}"})["JUPYTER_PATH"] == f"{own}:/foreign"
    assert "JUPYTER_PATH" not in variables.settings({})


def test_the_kernel_that_starts_is_our_own_beside_a_foreign_one_of_its_name(tmp_path: Path) -> None:
    foreign = tmp_path / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(json.dumps({"argv": ["/another/python"], "display_name": "x", "language": "python"}))
    place = environ_of(ROOT) | {"JUPYTER_PATH": str(tmp_path)}
    code = "from jupyter_client.kernelspec import KernelSpecManager as K; print(K().get_kernel_spec('python3').argv[0])"
    found = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
        for env in (place, place | variables.settings(place))
    ]
    assert found[0] == "/another/python" != found[1] and "python" in found[1]


def test_nothing_needs_a_home(project: Path) -> None:
    place = {name: value for name, value in environ_of(project).items() if name != "HOME"}
    command = [sys.executable, "-m", "lib.launch.command", "--list"]
    done = subprocess.run(command, cwd=project, env=place, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.split()[:2]) == (0, "", ["01", "toy"])


def test_a_wheel_is_fetched_on_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from filelock import FileLock

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with FileLock(tmp_path / "x.lock"):
        pass


def test_report_help_needs_no_environment(project: Path) -> None:
    command = [sys.executable, "-S", "-m", "lib.launch.command", "report", "--help"]
    place = {name: value for name, value in environ_of(project).items() if name != "SINKS_PYTHON"}
    done = subprocess.run(command, cwd=project, env=place, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "PROFILE" in done.stdout


@pytest.mark.parametrize("words", [["--list"], ["--help"], ["report", "--help"], ["sinks", "--help"]])
def test_a_reader_that_left_before_the_first_word_is_told_by_the_exit_code(words: list[str], project: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lib.launch.command", *words]
    done = subprocess.run(
        command, cwd=project, env=environ_of(project), stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_texts_are_utf8_whatever_the_locale_says(project: Path) -> None:
    assert variables.settings({})["PYTHONUTF8"] == "1"
    odd = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    code = "from lib.commands import terminal; terminal.use_utf8(); terminal.say('\\u03a9 \\u2192 \\u2423')"
    done = subprocess.run([sys.executable, "-c", code], env=environ_of(ROOT) | odd, capture_output=True, check=True)
    assert done.stdout.decode("utf-8") == "Ω → ␣\n"
    for profile in config.PROFILES:
        read = f"from lib.core import config; config.load({profile!r})"
        subprocess.run([sys.executable, "-c", read], env=environ_of(ROOT) | odd, capture_output=True, check=True)


def test_a_disk_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    said: list[str] = []

    def refuse(code: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOSYS)
    with batch._only_run(tmp_path, say=said.append):
        assert said == [
            f"note: {tmp_path} is on a disk without locks (Function not implemented): start no second run that writes there"
        ]
    refuse(errno.EWOULDBLOCK)
    with pytest.raises(InputError, match="got a second one: wait"), batch._only_run(tmp_path, say=said.append):
        pass


def test_a_kernel_may_take_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import papermill

    given: dict[str, Any] = {}
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **options: given.update(options))
    order = {"notebook": str(tmp_path / "01_x.ipynb"), "copy": str(tmp_path / "c.ipynb"), "parameters": {}, "line": 0}
    assert execution._execute_here(order) == ""
    assert given["start_timeout"] >= 600


def test_a_full_disk_is_told_from_other_trouble() -> None:
    assert terminal.is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert terminal.is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not terminal.is_disk_full(OSError(errno.EACCES, "Permission denied"))


def heeding_interrupts() -> None:
    """Begin as at a terminal: a shell without job control has its background commands ignore interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_is_one_line(project: Path, tmp_path: Path) -> None:
    """The terminal sends the signal to the launcher and all its processes at once."""
    (tmp_path / "wait").touch()
    command = [sys.executable, "-m", "lib.launch.command", "--notebooks", "01"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=project, env=environ_of(project, SINKS_OUTPUT=str(tmp_path)), stdout=subprocess.DEVNULL, stderr=said,
            start_new_session=True, preexec_fn=heeding_interrupts,
        )  # fmt: skip
        wait_until((tmp_path / "results" / "quick" / "01_table0.csv").exists, seconds=240)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(240) == 130  # long on a busy machine
        said.seek(0)
        assert said.read() == "error: interrupted: what was finished stays, run again to go on\n"


def test_files_of_windows_come_with_line_ends_that_bash_reads() -> None:
    assert "* text=auto eol=lf" in (ROOT / ".gitattributes").read_text().splitlines()
    if shutil.which("git") and (ROOT / ".git").exists():
        shown = subprocess.run(["git", "check-attr", "eol", "run_all.sh"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == "run_all.sh: eol: lf"


def test_the_console_command_is_installed_under_a_name_nobody_else_has() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"sinks": "sink_aware_pruning_command:main"}
    assert project["tool"]["setuptools"]["py-modules"] == ["sink_aware_pruning_command"]
    assert json.dumps(project["tool"]["setuptools"]["package-dir"]) == '{"": "."}'

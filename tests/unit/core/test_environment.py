import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from lib.core import environment
from lib.core.environment import LOCK, ROOT

LAST_GROUP = "# Needed by the packages above"
DISTRIBUTION = {"yaml": "pyyaml", "PIL": "pillow", "reasoning_gym": "reasoning-gym", "huggingface_hub": "huggingface-hub"}
OURS = {"lib", "recipes", "tests", "benchmarks"}


CLUSTER = ROOT / environment.GROUPS["cluster"]


def lock_lines() -> list[str]:
    lines = [*LOCK.read_text().splitlines(), *CLUSTER.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_pins() -> dict[str, str]:
    direct = "\n".join(path.read_text().partition(LAST_GROUP)[0] for path in (LOCK, CLUSTER))
    return {line.partition("==")[0]: line for line in direct.splitlines() if line and not line.startswith("#")}


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone as far as the environment is concerned."""
    root = tmp_path / "clone"
    root.mkdir()
    for name in ("requirements.lock", "requirements-cluster.lock", "pyproject.toml"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    return root


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for uv that notes its words, makes a folder that looks like an environment, and fails while `offline` exists."""
    folder = tmp_path / "bin"
    script(
        folder / "uv",
        f'echo "$@" >> {folder}/words',
        'for last in "$@"; do :; done',
        f'if [ "$1" = venv ]; then mkdir -p "$last/bin"; ln -sf {sys.executable} "$last/bin/python"; exit 0; fi',
        f"if [ -e {folder}/offline ]; then cat {folder}/offline >&2; exit 1; fi",
    )
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_every_line_of_the_lock_is_an_exact_pin() -> None:
    for line in lock_lines():
        marker = r'( ; sys_platform == "\w+"( and platform_machine == "\w+")?)?'
        assert re.fullmatch(rf"[a-z0-9.-]+==[0-9][\w.]*{marker}(  +# .+)?", line), line
    names = [line.partition("==")[0] for line in lock_lines()]
    assert len(names) == len(set(names))
    assert "+" not in "".join(lock_lines()), "a local build cannot be installed elsewhere"


def test_every_direct_dependency_says_who_needs_it() -> None:
    for name, line in direct_pins().items():
        assert "  # " in line, f"{name} has no comment"


def test_conda_file_and_project_file_point_to_the_lock() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.lock", "-e ."]}]
    for line in (ROOT / "environment.yml").read_text().partition("dependencies:")[2].splitlines():
        assert not line.strip().startswith("- p") or line.strip() == "- pip:" or "  # " in line
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["dependencies", "optional-dependencies"]
    assert project["tool"]["setuptools"]["dynamic"] == {
        "dependencies": {"file": ["requirements.lock"]},
        "optional-dependencies": {name: {"file": [lock]} for name, lock in environment.GROUPS.items()},
    }
    assert "dependencies" not in project["project"]


def test_all_files_ask_for_the_same_python() -> None:
    oldest = ".".join(map(str, environment.OLDEST_PYTHON))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == f">={oldest}"
    assert project["tool"]["pyright"]["pythonVersion"] == oldest
    assert project["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"python={oldest}" in (ROOT / "environment.yml").read_text()
    assert str(environment.OLDEST_PYTHON) in (ROOT / "run_all.sh").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["check"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]


def test_caches_of_continuous_integration_are_named_after_files_that_exist() -> None:
    """The hash of no file is empty: its cache would be kept when what it depends on changes."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    patterns = [pattern for words in re.findall(r"hashFiles\((.*?)\)", workflow) for pattern in re.findall(r"'(.*?)'", words)]
    assert len(patterns) >= 3
    assert [pattern for pattern in patterns if not list(ROOT.glob(pattern))] == []


def test_everything_imported_is_pinned_as_direct() -> None:
    pinned = {normal(name) for name in direct_pins()}
    for path in (path for folder in OURS for path in (ROOT / folder).rglob("*.py")):
        for name in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), flags=re.MULTILINE):
            if name not in sys.stdlib_module_names | OURS and name != "__future__":
                assert normal(DISTRIBUTION.get(str(name), str(name))) in pinned, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_active_environment_that_satisfies_the_lock_is_used(clone: Path, tmp_path: Path, variable: str) -> None:
    python = script(tmp_path / "active" / "bin" / "python", "exit 0")
    assert environment.ensure(root=clone, environ={variable: str(tmp_path / "active")}) == python
    assert environment.ready(root=clone, environ={variable: str(tmp_path / "active")}) == python
    assert not (clone / ".venv").exists()


def test_active_environment_that_lacks_something_is_named_and_left_alone(
    clone: Path, tmp_path: Path, uv: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = 'if [ "$2" = pip ]; then echo "ERROR: No matching distribution found for torch==2.13.0" >&2; exit 1; fi'
    script(tmp_path / "active" / "bin" / "python", said)
    python = environment.ensure(root=clone, environ={"VIRTUAL_ENV": str(tmp_path / "active")})
    assert python == clone / ".venv" / "bin" / "python"
    told = [line for line in capfd.readouterr().err.splitlines() if "does not satisfy" in line]
    assert len(told) == 1
    assert "torch==2.13.0" in told[0]


def test_own_environment_is_made_once(clone: Path, uv: Path) -> None:
    assert environment.ready(root=clone, environ={}) is None
    python = environment.ensure(root=clone, environ={})
    words = (uv / "words").read_text()
    assert "venv" in words
    assert f"-r {clone}/requirements.lock" in words
    assert "--no-deps --no-build-isolation -e" in words
    assert environment.ensure(root=clone, environ={}) == environment.ready(root=clone, environ={}) == python
    assert (uv / "words").read_text() == words, "a second run starts at once"


def test_changed_lock_is_installed_again(clone: Path, uv: Path) -> None:
    environment.ensure(root=clone, environ={})
    with (clone / "requirements.lock").open("a") as lock:
        lock.write("new-package==1.0\n")
    before = (uv / "words").read_text()
    environment.ensure(root=clone, environ={})
    assert (uv / "words").read_text() != before


def test_group_is_added_once_to_our_own_environment(clone: Path, uv: Path) -> None:
    asked = {"SINKS_GROUPS": "cluster"}
    environment.ensure(root=clone, environ={})
    assert "requirements-cluster.lock" not in (uv / "words").read_text()
    python = environment.ensure(root=clone, environ=asked)
    words = (uv / "words").read_text()
    line = f"pip install --python {python} -r {clone}/requirements.lock -r {clone}/requirements-cluster.lock"
    assert words.count(line) == 1, "both in one command, so that a group cannot move the lock's pins"
    assert environment.ensure(root=clone, environ=asked) == environment.ensure(root=clone, environ={}) == python
    assert (uv / "words").read_text() == words, "neither run installs again"


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-cluster.lock"])
def test_changed_lock_of_a_group_or_below_it_is_installed_again(clone: Path, uv: Path, lock: str) -> None:
    environment.ensure(root=clone, environ={"SINKS_GROUPS": "cluster"})
    with (clone / lock).open("a") as handle:
        handle.write("new-package==1.0\n")
    (uv / "words").unlink()
    environment.ensure(root=clone, environ={"SINKS_GROUPS": "cluster"})
    assert f"-r {clone}/requirements.lock -r {clone}/requirements-cluster.lock" in (uv / "words").read_text()


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-cluster.lock"])
def test_changed_comment_of_a_lock_installs_nothing(clone: Path, uv: Path, lock: str) -> None:
    python = environment.ensure(root=clone, environ={"SINKS_GROUPS": "cluster"})
    (clone / lock).write_text("# another first line\n" + (clone / lock).read_text().replace("  # ", "  # now "))
    (uv / "words").unlink()
    assert environment.ensure(root=clone, environ={"SINKS_GROUPS": "cluster"}) == python
    assert environment.ready(root=clone, environ={}) == python
    assert not (uv / "words").exists()


def test_moved_repository_is_linked_again(clone: Path, uv: Path) -> None:
    environment.ensure(root=clone, environ={})
    moved = clone.rename(clone.with_name("moved"))
    assert environment.ready(root=moved, environ={}) is None
    environment.ensure(root=moved, environ={})
    assert f"-e {moved}\n" in (uv / "words").read_text()


def test_interrupted_installation_of_a_group_is_taken_up(clone: Path, uv: Path) -> None:
    environment.ensure(root=clone, environ={})
    (uv / "offline").write_text("error: dns error")
    with pytest.raises(environment.NoEnvironmentError, match=r"requirements-cluster\.lock must be installed once, got no conn"):
        environment.ensure(root=clone, environ={"SINKS_GROUPS": "cluster"})
    assert environment.ready(root=clone, environ={}), "what needs no group goes on"
    (uv / "offline").unlink()
    (uv / "words").unlink()
    environment.ensure(root=clone, environ={"SINKS_GROUPS": "cluster"})
    assert f"-r {clone}/requirements-cluster.lock" in (uv / "words").read_text()


def test_active_environment_without_a_group_is_told_how_to_get_it(clone: Path, tmp_path: Path) -> None:
    lines = 'case "$*" in *cluster*) echo "ERROR: No matching distribution found for ray==2.60.0" >&2; exit 1;; esac'
    python = script(tmp_path / "active" / "bin" / "python", lines)
    active = {"VIRTUAL_ENV": str(tmp_path / "active")}
    assert environment.ensure(root=clone, environ=active) == python
    expected = f"got it lacks ray==2.60.0: {python} -m pip install -r requirements-cluster.lock"
    with pytest.raises(environment.NoEnvironmentError, match=re.escape(expected)):
        environment.ensure(root=clone, environ=active | {"SINKS_GROUPS": "cluster"})
    assert not (clone / ".venv").exists()


def test_unknown_group_is_refused(clone: Path) -> None:
    with pytest.raises(environment.NoEnvironmentError, match=r"must hold names of cluster, got 'cluster gpu': leave it out"):
        environment.ensure(root=clone, environ={"SINKS_GROUPS": "cluster gpu"})


def test_own_environment_counts_as_own_when_it_is_active(clone: Path, uv: Path) -> None:
    environment.ensure(root=clone, environ={})
    (clone / ".venv" / environment.STAMP).unlink()
    before = (uv / "words").read_text()
    environment.ensure(root=clone, environ={"VIRTUAL_ENV": str(clone / ".venv")})
    assert (uv / "words").read_text() != before, "an interrupted installation is taken up"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("error: dns error: failed to lookup address", "got no connection to the package index: connect to a network"),
        ("WARNING: Retrying after connection broken\nERROR: No matching distribution", "got no connection to the package index"),
        ("ERROR: Ignored some\nERROR: No matching distribution for a==1", "got 'ERROR: No matching distribution for a==1': mend"),
    ],
)
def test_failed_installation_gives_one_clear_line_and_the_next_run_goes_on(
    clone: Path, uv: Path, said: str, expected: str
) -> None:
    (uv / "offline").write_text(said)
    with pytest.raises(environment.NoEnvironmentError, match=re.escape(expected)) as error:
        environment.ensure(root=clone, environ={})
    assert "\n" not in str(error.value)
    assert environment.ready(root=clone, environ={}) is None
    (uv / "offline").unlink()
    assert environment.ensure(root=clone, environ={}).exists()


def test_missing_venv_module_gives_one_clear_line(clone: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = script(tmp_path / "python", "echo 'ensurepip is not available' >&2; exit 1")
    monkeypatch.setattr(environment.shutil, "which", lambda _: None)
    monkeypatch.setattr(environment.sys, "_base_executable", str(failing), raising=False)
    with pytest.raises(environment.NoEnvironmentError, match="got 'ensurepip is not available': install its venv module"):
        environment.ensure(root=clone, environ={})
    assert not (clone / ".venv").exists()


def test_pip_tells_what_is_missing_by_version_and_system_and_takes_a_local_build(tmp_path: Path) -> None:
    """The real pip on this interpreter: it stands for every rule of versions and markers that we would else write ourselves."""
    lock = tmp_path / "lock"
    torch = version("torch").partition("+")[0]
    lock.write_text(f'# who\ntorch=={torch}  # a local build of it counts\nnope==1 ; sys_platform == "elsewhere"\n')
    assert environment._lacks(Path(sys.executable), lock) == ""
    lock.write_text(f"torch=={torch}\npytest==0.0.1\n")
    assert environment._lacks(Path(sys.executable), lock) == "it lacks pytest==0.0.1"


@pytest.mark.parametrize("kind", ["variable", "file"])
def test_wheels_that_pip_could_install_are_not_installed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters set a folder of wheels for all their users; what lies there is still missing here."""
    about = "nope-1.dist-info"
    with zipfile.ZipFile(tmp_path / "nope-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: nope\nVersion: 1\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    lock, settings = tmp_path / "lock", tmp_path / "pip.conf"
    lock.write_text("nope==1\n")
    settings.write_text(f"[global]\nfind-links = {tmp_path}\n")
    name, value = ("PIP_FIND_LINKS", tmp_path) if kind == "variable" else ("PIP_CONFIG_FILE", settings)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)  # would win over the file
    monkeypatch.setenv(name, str(value))
    assert environment._lacks(Path(sys.executable), lock) == "it lacks nope==1"


def test_exports_can_be_evaluated_by_a_shell() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"PYTHONPATH": "a b:it's"}
    command = [sys.executable, "-m", "lib.core.variables"]
    shown = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout
    asked = subprocess.run(
        ["sh", "-c", f'{shown}\nprintf "%s|%s" "$PYTHONPATH" "$SINKS_PYTHON"'], capture_output=True, text=True, check=True
    )
    assert asked.stdout == f"{ROOT}:a b:it's|{sys.executable}"

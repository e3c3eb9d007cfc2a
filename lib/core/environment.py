"""The Python environment of the two commands: use the active one when it satisfies the lock, else make `.venv`.

Only the standard library is imported, because this runs before anything is installed; pip, or uv, does the work.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
OLDEST_PYTHON = (3, 11)
NEW_ENOUGH = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
# Groups that only some runs need, by the name that stands in SINKS_GROUPS; each lock adds to requirements.lock.
GROUPS = {"cluster": "requirements-cluster.lock"}
STAMP = ".installed"
COMMAND = "command sinks"  # stands in the stamp too: an environment that is older than the command gets it
OFFLINE = re.compile(r"connection|resolve host|name resolution|network is unreachable|timed out|dns error", re.IGNORECASE)


class NoEnvironmentError(RuntimeError):
    """No usable environment: the message says the rule, what was got, and the remedy."""


def ready(*, root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Find an interpreter whose packages satisfy requirements.lock, without making anything.

    Args:
        root: the repository.
        environ: variables that tell which environment is active.

    Returns:
        Path of the interpreter: of the active environment, else of a complete `.venv`; None when neither will do.
    """
    lock = root / LOCK.name
    active = _active(root / ".venv", environ)
    return active if active and not _lacks(active, lock) else _complete(root, [lock])


def ensure(*, root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> Path:
    """Return an interpreter whose packages satisfy the locks, making `.venv` when the active environment does not.

    Args:
        root: the repository.
        environ: variables that tell which environment is active, and in SINKS_GROUPS which groups are needed besides the lock.

    Returns:
        Path of the interpreter.

    Raises:
        NoEnvironmentError: the environment cannot be made, mostly because there is no network, or the active one lacks a group.
    """
    asked = environ.get("SINKS_GROUPS", "").split()
    if not set(asked) <= set(GROUPS):
        raise NoEnvironmentError(f"SINKS_GROUPS must hold names of {', '.join(GROUPS)}, got {' '.join(asked)!r}: leave it out")
    first, *others = locks = [root / LOCK.name, *(root / GROUPS[name] for name in asked)]
    if active := _active(root / ".venv", environ):
        if not (lacks := _lacks(active, first)):
            _check_groups(active, others)
            return active
        _tell(f"the active environment {active.parent.parent} does not satisfy {LOCK.name} ({lacks}): using .venv instead")
    return _complete(root, locks) or _own_environment(root, locks)


def _check_groups(active: Path, locks: list[Path]) -> None:
    """Refuse an environment of the user's own that lacks a group, because nothing is installed into it."""
    for lock in locks:
        if lacks := _lacks(active, lock):
            remedy = f"{active} -m pip install -r {lock.name} -c {LOCK.name}, or deactivate it"
            raise NoEnvironmentError(
                f"the active environment {active.parent.parent} must satisfy {lock.name} too, got {lacks}: {remedy}"
            )


def _active(own: Path, environ: Mapping[str, str]) -> Path | None:
    """Return the interpreter of an activated environment that is not our own one."""
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        prefix = Path(environ[name]) if environ.get(name) else None
        if prefix and (prefix / "bin" / "python").exists():
            return None if prefix.resolve() == own.resolve() else prefix / "bin" / "python"
    return None


def _lacks(python: Path, lock: Path) -> str:
    """Let pip say what an interpreter lacks of a lock; the answer is empty when nothing, else one short phrase."""
    if not _runs(python, NEW_ENOUGH):
        return f"its Python is older than {'.'.join(map(str, OLDEST_PYTHON))}"
    # With no index, and none of the user's settings (a folder of wheels), nothing can be found but what is installed.
    command = [*_pip(python), "--isolated", "--dry-run", "--no-index", "--no-deps", "-r", str(lock)]
    environ = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
    answer = subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    missing = re.findall(r"[\w.-]+==[\w.+]+", answer.stderr)
    return "" if not answer.returncode else f"it lacks {missing[-1]}" if missing else _last_line(answer.stderr)


def _pip(python: Path, uv: str | None = None) -> list[str]:
    """Begin the command that installs into an environment."""
    if uv:
        return [uv, "pip", "install", "--python", str(python)]
    return [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]


def _wanted(root: Path, locks: list[Path]) -> set[str]:
    """List what the stamp of a complete `.venv` holds: the repository's place, to which the package is linked, and every pin."""
    lines = (line for lock in locks for line in lock.read_text(encoding="utf-8").splitlines())
    return {str(root), COMMAND, *(line.partition("#")[0].strip() for line in lines)} - {""}


def _complete(root: Path, locks: list[Path]) -> Path | None:
    """Return the interpreter of `.venv` when the installation of these locks was finished."""
    python, stamp = root / ".venv" / "bin" / "python", root / ".venv" / STAMP
    whole = stamp.exists() and _wanted(root, locks) <= set(stamp.read_text(encoding="utf-8").splitlines())
    return python if whole and _runs(python, NEW_ENOUGH) else None


def _own_environment(root: Path, locks: list[Path]) -> Path:
    """Make or complete `.venv`; the stamp is written last, so an interrupted installation is taken up again."""
    own, uv, names = root / ".venv", shutil.which("uv"), " and ".join(lock.name for lock in locks)
    python = own / "bin" / "python"
    # Models that lie in wheels are fetched by pip, so it has to be there even where uv installs.
    if not _runs(python, f"import pip; {NEW_ENOUGH}"):
        _tell("making .venv: once, some minutes and gigabytes")
        _make(own, uv)
    _tell(f"installing {names} into .venv (what an earlier try finished is kept)")
    _install([*_pip(python, uv), *(word for lock in locks for word in ("-r", str(lock)))], names)
    _install([*_pip(python, uv), "--quiet", "--no-deps", "--no-build-isolation", "-e", str(root)], names)
    partial = own / f"{STAMP}.partial"
    partial.write_text("\n".join(_wanted(root, locks)), encoding="utf-8")
    os.replace(partial, own / STAMP)
    return python


def _make(own: Path, uv: str | None) -> None:
    """Make an empty environment."""
    # When `.venv` itself runs this, it must not be made from itself.
    base = _base(getattr(sys, "_base_executable", None) or sys.executable)
    command = [uv, "venv", "--quiet", "--clear", "--seed", "--python", base] if uv else [base, "-m", "venv", "--clear"]
    result = subprocess.run([*command, str(own)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        shutil.rmtree(own, ignore_errors=True)
        raise NoEnvironmentError(
            f"Python must be able to make a virtual environment, got {_last_line(result.stdout)!r}: install its venv module "
            f"(Debian: python3-venv), or uv, or activate an environment that satisfies {LOCK.name}"
        )


def _base(own: str) -> str:
    """Return the interpreter to make an environment from: the Python of the lock, where a newer one stands in front of it."""
    wanted = f"python{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]}"
    found = shutil.which(wanted) if sys.version_info[:2] != OLDEST_PYTHON else None
    return found if found and _runs(Path(found), NEW_ENOUGH) else own


def _install(command: list[str], names: str) -> None:
    """Run the installer; a terminal sees its progress, and its complaints are kept for the one line of a failure."""
    quiet = [] if sys.stderr.isatty() or "--quiet" in command else ["--quiet"]
    result = subprocess.run([*command, *quiet], stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        got, remedy = "no connection to the package index", "connect to a network and run again (what was finished is kept)"
        if not OFFLINE.search(result.stderr):
            errors = [line for line in result.stderr.splitlines() if line.lower().startswith("error")]
            got, remedy = repr(_last_line("\n".join(errors) or result.stderr)), "mend that and run again"
        raise NoEnvironmentError(f"{names} must be installed once, got {got}: {remedy}, or activate an environment that has it")


def _runs(python: Path, code: str) -> bool:
    """Tell whether an interpreter starts and this code succeeds in it."""
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def _tell(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def main() -> int:
    """Print the exports of a ready environment for `eval` in a shell.

    Returns:
        Exit code: 0, or 2 when there is no usable environment.
    """
    try:
        python = str(ensure())
    except NoEnvironmentError as error:
        _tell(f"error: {error}")
        return 2
    return subprocess.run([python, "-m", "lib.core.variables"], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

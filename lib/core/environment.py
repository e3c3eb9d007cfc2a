"""The Python environment of the two commands: use the active one when it satisfies the lock, else make `.venv`.

Only the standard library is imported, because this runs before anything is installed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
OLDEST_PYTHON = (3, 11)
NEW_ENOUGH = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
# Groups that only some runs need, by the name that stands in SINKS_GROUPS; each lock adds to requirements.lock.
GROUPS = {"cluster": "requirements-cluster.lock"}
STAMP = ".installed"
PIN = re.compile(r"^([A-Za-z0-9._-]+==[^\s;#]+)(?:\s*;\s*sys_platform == \"(\w+)\")?")
OFFLINE = re.compile(r"connection|resolve host|name resolution|network is unreachable|timed out|dns error", re.IGNORECASE)
# glibc gives every large activation back to the kernel and faults it in again at the next step; with these values it keeps the
# memory. A training step on two cores went from 9.2 s to 2.0 s. Other allocators do not read them.
LINUX_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "34359738368",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
}


class NoEnvironmentError(RuntimeError):
    """No usable environment: the message says the rule, what was got, and the remedy."""


def read_pins(lock: Path = LOCK) -> list[str]:
    """Read the pins of a lock file that apply to this system.

    Args:
        lock: a file with one `name==version` a line, with comments and, where only one system needs it, a `sys_platform` marker.

    Returns:
        `name==version` of each.

    >>> "papermill==2.7.0" in read_pins()
    True
    """
    found = (PIN.match(line) for line in lock.read_text(encoding="utf-8").splitlines())
    return [pin[1] for pin in found if pin and pin[2] in (None, sys.platform)]


def missing_pins(lock: Path = LOCK) -> list[str]:
    """List the pins that this interpreter lacks or has in another version; `2.13.0+cpu` counts as `2.13.0`."""
    return [pin for pin in read_pins(lock) if not _has(*pin.split("=="))]


def physical_cores() -> int:
    """Count the physical cores that this process may use, at least 1.

    Two threads on one core slow matrix products down, so hyper-threads do not count; a container's share of processors does.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if sys.platform == "darwin":
        answer = subprocess.run(["sysctl", "-n", "hw.physicalcpu"], capture_output=True, text=True, check=False).stdout.strip()
        return int(answer) if answer.isdigit() else len(usable)
    return max(1, min(len({_core_of(cpu) for cpu in usable}), _processor_share()))


def settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that a run needs and the user has not set.

    Args:
        environ: the variables that are set already; they win, except that PYTHONPATH is put before what it holds.

    Returns:
        Value by name.
    """
    wanted = {"OMP_NUM_THREADS": str(physical_cores()), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # A kernel named python3 in the home folder may start another Python than the one in use.
    wanted["JUPYTER_PREFER_ENV_PATH"] = "1"
    # Warnings of torch's C++ parts, one of them at every measurement of memory, would stand between the lines of the launcher.
    wanted["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    if sys.platform.startswith("linux"):
        wanted |= LINUX_ALLOCATOR
    chosen = {name: value for name, value in wanted.items() if name not in environ}
    others = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(ROOT)]
    return chosen | {"PYTHONPATH": os.pathsep.join([str(ROOT), *others])}


def ready(*, root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Find an interpreter whose packages satisfy requirements.lock, without making anything.

    Args:
        root: the repository.
        environ: variables that tell which environment is active.

    Returns:
        Path of the interpreter: of the active environment, else of a complete `.venv`; None when neither will do.
    """
    locks = [root / LOCK.name]
    active = _active(root / ".venv", environ)
    return active if active and not _lacks(active, locks[0]) else _complete(root, locks)


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
    locks = [root / LOCK.name, *(root / name for name in _groups(environ))]
    if active := _active(root / ".venv", environ):
        lacks = _lacks(active, locks[0])
        if not lacks:
            _check_groups(active, locks[1:])
            return active
        _tell(f"the active environment {active.parent.parent} does not satisfy {LOCK.name} ({lacks}): using .venv instead")
    return _complete(root, locks) or _own_environment(root, locks)


def _groups(environ: Mapping[str, str]) -> list[str]:
    """Name the lock files of the groups that are asked for."""
    asked = environ.get("SINKS_GROUPS", "").split()
    if not set(asked) <= set(GROUPS):
        raise NoEnvironmentError(f"SINKS_GROUPS must hold names of {', '.join(GROUPS)}, got {' '.join(asked)!r}: leave it out")
    return [GROUPS[name] for name in asked]


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
    """Ask another interpreter what it lacks of a lock; the answer is empty when nothing, else one short phrase."""
    if not _runs(python, NEW_ENOUGH):
        return f"its Python is older than {'.'.join(map(str, OLDEST_PYTHON))}"
    command = [str(python), "-m", "lib.core.environment", "--missing", str(lock)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if answer.returncode:
        return "its packages cannot be listed"
    lacks = answer.stdout.split()
    return f"{len(lacks)} of its pins missing, such as {lacks[0]}" if lacks else ""


def _wanted(root: Path, locks: list[Path]) -> list[str]:
    """List what the stamp of a complete `.venv` holds: the repository's place, to which the package is linked, and every pin."""
    return [str(root), *(pin for lock in locks for pin in read_pins(lock))]


def _complete(root: Path, locks: list[Path]) -> Path | None:
    """Return the interpreter of `.venv` when the installation of these locks was finished."""
    python, stamp = root / ".venv" / "bin" / "python", root / ".venv" / STAMP
    whole = stamp.exists() and set(_wanted(root, locks)) <= set(stamp.read_text(encoding="utf-8").splitlines())
    return python if whole and _runs(python, NEW_ENOUGH) else None


def _own_environment(root: Path, locks: list[Path]) -> Path:
    """Make or complete `.venv`; the stamp is written last, so an interrupted installation is taken up again."""
    python, uv = root / ".venv" / "bin" / "python", shutil.which("uv")
    # Models that lie in wheels are fetched by pip, so it has to be there even where uv installs.
    if not _runs(python, f"import pip; {NEW_ENOUGH}"):
        _tell("making .venv: once, some minutes and gigabytes")
        _make(python.parent.parent, uv)
    installer = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install", "--no-input"]
    names = " and ".join(lock.name for lock in locks)
    _tell(f"installing {names} into .venv (what an earlier try finished is kept)")
    _install([*installer, *(word for lock in locks for word in ("-r", str(lock)))], names)
    _install([*installer, "--quiet", "--no-deps", "--no-build-isolation", "-e", str(root)], names)
    partial = root / ".venv" / f"{STAMP}.partial"
    partial.write_text("\n".join(_wanted(root, locks)), encoding="utf-8")
    os.replace(partial, root / ".venv" / STAMP)
    return python


def _make(own: Path, uv: str | None) -> None:
    """Make an empty environment."""
    # When `.venv` itself runs this, it must not be made from itself.
    base = getattr(sys, "_base_executable", None) or sys.executable
    command = [uv, "venv", "--quiet", "--clear", "--seed", "--python", base] if uv else [base, "-m", "venv", "--clear"]
    result = subprocess.run([*command, str(own)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        shutil.rmtree(own, ignore_errors=True)
        raise NoEnvironmentError(
            f"Python must be able to make a virtual environment, got {_last_line(result.stdout)!r}: install its venv module "
            f"(Debian: python3-venv), or uv, or activate an environment that satisfies {LOCK.name}"
        )


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


def _has(name: str, version: str) -> bool:
    try:
        return metadata.version(name).split("+")[0] == version
    except metadata.PackageNotFoundError:
        return False


def _core_of(cpu: int) -> str:
    """Name the core of a logical processor by all that share it; without that knowledge each is its own core."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _processor_share() -> int:
    """Return how many processors a container may use in full, or a large number without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if quota == "max" else max(1, int(quota) // int(period))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def _tell(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> int:
    """Print the exports of a ready environment for `eval` in a shell, or with `--missing LOCK` what this interpreter lacks of it.

    Args:
        arguments: words after the program's name.

    Returns:
        Exit code: 0, or 2 when there is no usable environment.
    """
    if arguments[:1] == ["--missing"]:
        sys.stdout.write("".join(f"{pin}\n" for pin in missing_pins(Path(arguments[1]))))
        return 0
    try:
        python = ensure()
    except NoEnvironmentError as error:
        _tell(f"error: {error}")
        return 2
    exports = settings() | {"SINKS_PYTHON": str(python)}
    sys.stdout.write("".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

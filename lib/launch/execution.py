"""Run one notebook headless in a process of its own, and tell whether its outputs are still those of its inputs."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lib.core import outputs, provenance

INJECTED = "injected-parameters"
MARKER = "papermill-error-cell-tag"
START_SECONDS = 900  # of a kernel: a cold network disk takes minutes to import the first package
REFUSALS = ("InputError", "UnavailableError")


class NotebookError(RuntimeError):
    """A notebook failed: the message names it, the cell, the error and the executed copy.

    Attributes:
        is_input: the notebook itself refused what it was given (an `InputError`), as opposed to breaking.
    """

    def __init__(self, message: str, *, is_input: bool = False) -> None:
        super().__init__(message)
        self.is_input = is_input


@dataclass(frozen=True)
class Job:
    """One notebook to run: where it lies, with what settings, and where its outputs go."""

    number: str
    notebook: Path
    profile: str
    seed: int
    overrides: Mapping[str, object]
    fingerprint: str
    output: Path = field(repr=False)

    @property
    def name(self) -> str:
        """Name without number and suffix."""
        return self.notebook.stem[3:]

    @property
    def executed(self) -> Path:
        """The executed copy."""
        return self.output / "runs" / self.profile / self.notebook.name

    @property
    def status(self) -> Path:
        """The record of the last complete run."""
        return self.executed.with_suffix(".json")


@dataclass(frozen=True)
class Outcome:
    """What a run wrote: names relative to the output folder, and the time it took in seconds."""

    files: tuple[str, ...]
    seconds: float


def read_status(job: Job) -> dict[str, Any]:
    """Read the record of the last complete run.

    Args:
        job: the notebook.

    Returns:
        The record, empty when there is none or it cannot be read.
    """
    try:
        status = json.loads(job.status.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def why_run(job: Job) -> str:
    """Tell why a notebook has to run.

    Args:
        job: the notebook.

    Returns:
        A phrase, empty when its inputs are unchanged and its outputs whole.
    """
    status = read_status(job)
    if not status:
        return "not run yet"
    if status.get("fingerprint") != job.fingerprint:
        return "inputs changed"
    if status.get("versions") != provenance.versions():
        return "other library versions"
    for name, digest in status.get("outputs", {}).items():
        path = job.output / name
        if not path.is_file():
            return f"{name} is missing"
        if provenance.file_hash(path) != digest:
            return f"{name} was changed"
    return "" if _is_notebook(job.executed) else f"{_relative(job.executed, job)} is missing or damaged"


@dataclass(frozen=True)
class Running:
    """A notebook that runs in a process of its own: its memory is given back, and a crash cannot take the launcher along.

    What it says goes to a file: nobody reads while it runs, and a full pipe would stop it for ever.
    """

    job: Job
    process: subprocess.Popen[bytes] = field(repr=False)
    said: IO[str] = field(repr=False)
    started: float
    line: int = 0

    @property
    def partial(self) -> Path:
        """The copy that is being executed."""
        return self.job.executed.with_suffix(".partial.ipynb")


def begin(job: Job, *, threads: int | None = None, line: int = 0) -> Running:
    """Start a notebook.

    Args:
        job: the notebook.
        threads: of its computations; as many as OMP_NUM_THREADS says when None.
        line: of the terminal that its progress bar takes, counted from the cursor.
    """
    started = time.monotonic()
    job.executed.parent.mkdir(parents=True, exist_ok=True)
    sweep(job)
    parameters = {"profile": job.profile, "seed": job.seed, "overrides": dict(job.overrides)}
    copy = job.executed.with_suffix(".partial.ipynb")
    order = {"notebook": str(job.notebook), "copy": str(copy), "parameters": parameters, "parent": os.getpid(), "line": line}
    command = [sys.executable, "-m", "lib.launch.execution", json.dumps(order)]
    environ = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed with the process)
    return Running(job, subprocess.Popen(command, stdout=said, env=environ), said, started, line)


def finish(running: Running, *, peak: int | None = None) -> Outcome:
    """Wait for a notebook and record what it wrote.

    Args:
        running: the notebook.
        peak: most bytes that it held, for the record.

    Returns:
        What it wrote.

    Raises:
        NotebookError: a cell failed or the process died; the copy executed so far is kept as `NN_name.failed.ipynb`.
    """
    job, failed = running.job, running.job.executed.with_suffix(".failed.ipynb")
    problem = _problem(running)
    if problem:
        where = "no executed copy was written"
        if running.partial.exists():
            os.replace(running.partial, failed)
            where = f"open {_relative(failed, job)}"
        message = f"notebook {job.number} ({job.name}) failed {problem}: {where}"
        raise NotebookError(message, is_input=any(f" with {name}: " in problem for name in REFUSALS))
    failed.unlink(missing_ok=True)
    os.replace(running.partial, job.executed)
    seconds = time.monotonic() - running.started
    files = outputs.read(job.output, job.profile, job.notebook.stem)
    _record(job, files, seconds, peak)
    return Outcome((*files, _relative(job.executed, job)), seconds)


def stop(running: Running) -> None:
    """End a notebook that is not wanted any more: after an interrupt, which it received too, it may end its kernel itself."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.process.wait(10)
    running.process.kill()
    running.process.wait()
    running.said.close()


def sweep(job: Job) -> None:
    """Remove what a killed run left of this notebook: temporary files that were not yet put in place.

    Args:
        job: the notebook.
    """
    for folder in ("figures", "results", "runs"):
        for pattern in (f".{job.number}_*.partial*", f"{job.number}_*.partial.ipynb"):
            for path in (job.output / folder / job.profile).glob(pattern):
                path.unlink(missing_ok=True)


def _record(job: Job, files: Mapping[str, str], seconds: float, peak: int | None = None) -> None:
    """Write the record that lets the next run skip this notebook; it comes last, when everything else is in place."""
    record = {
        "fingerprint": job.fingerprint,
        "notebook": job.notebook.name,
        "outputs": dict(files),
        "overrides": dict(job.overrides),
        "peak_bytes": peak,
        "seconds": round(seconds, 1),
        "seed": job.seed,
        "versions": provenance.versions(),
    }
    provenance.write_json(job.status, record)


def _problem(running: Running) -> str:
    """Wait for a notebook's process; return what went wrong, or nothing."""
    code = running.process.wait()
    with running.said as said:
        said.seek(0)
        lines = said.read().strip().splitlines()
    if code == 0:
        return ""
    if code < 0:
        return f"because its process was ended by signal {-code} (9 mostly means out of memory)"
    return lines[-1] if lines else f"with exit code {code} of its process"


def _execute_here(order: Mapping[str, Any]) -> str:
    """Run papermill in this process; return what went wrong, or nothing."""
    import logging

    import papermill
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    notebook, copy = Path(order["notebook"]), Path(order["copy"])
    try:
        papermill.execute_notebook(
            _literal(notebook),
            _literal(copy),
            parameters=order["parameters"],
            cwd=str(notebook.parent),
            start_timeout=START_SECONDS,
            # Else every start warns about unencrypted loopback, and some failures tell of an interrupt; errors are in the outputs
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            progress_bar=_bar(notebook.stem, order["line"]) if sys.stderr.isatty() else False,
        )
    except PapermillExecutionError as error:
        value = " ".join(str(error.evalue).split())
        return f"in {_position(notebook, copy, error.cell_index)} (In [{error.exec_count}]) with {error.ename}: {value}"
    except Exception as error:  # a dead kernel, an unknown kernel name, a damaged notebook
        return f"with {type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _bar(name: str, line: int) -> Any:
    """Describe the live bar over a notebook's cells (papermill takes tqdm's options); the finished notebook's line follows it."""
    return {"desc": name, "unit": "cell", "leave": False, "dynamic_ncols": True, "position": line}


def _position(notebook: Path, copy: Path, index: int) -> str:
    """Number a failed cell as in the notebook itself, from 1: papermill adds a cell for the parameters and two for the error."""
    cells = json.loads(copy.read_text(encoding="utf-8"))["cells"]
    tags = [set(cell["metadata"].get("tags", [])) for cell in cells]
    executed = [own for own in tags if MARKER not in own]
    added = sum(INJECTED in own for own in executed[:index])
    total = len(json.loads(notebook.read_text(encoding="utf-8"))["cells"])
    return f"cell {index + 1 - added} of {total}"


def _literal(path: Path) -> str:
    """Protect braces in a path: papermill fills parameters into it."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _is_notebook(path: Path) -> bool:
    """Tell whether a file is readable as a notebook; its outputs may be opened and saved again by the user."""
    try:
        return "cells" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _relative(path: Path, job: Job) -> str:
    return path.relative_to(job.output).as_posix()


def _follow_parent(parent: int) -> None:
    """End this process and its kernel when the launcher is gone: two runs must never write to the same place."""
    import psutil

    while os.getppid() == parent:
        time.sleep(0.2)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Run the notebook that the launcher ordered; the last line of stdout says what went wrong.

    Args:
        arguments: the order as JSON.

    Returns:
        Exit code: 0, 1 after a failure, 130 after an interrupt.
    """
    order = json.loads(arguments[0])
    threading.Thread(target=_follow_parent, args=(order["parent"],), daemon=True).start()
    try:
        problem = _execute_here(order)
    except KeyboardInterrupt:  # Ctrl-C reaches every process of the terminal; the launcher says it in one line
        return 130
    sys.stdout.write(f"{problem}\n")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The notebooks of one command: check what they need, run those that have to run, build the report."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lib.checkpoints import adapters, lookup
from lib.core import config, provenance
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.launch import execution, lanes
from lib.launch.execution import Job, NotebookError
from lib.launch.lanes import Peak
from lib.report import results

Say = Callable[[str], None]
SHOWS_GRID = config.ROOT / "lib" / "grid" / "tables.py"  # a notebook that reaches it shows the records of the grid


def prepare(
    profile: str, *, notebooks: Mapping[str, Path], seed: int | None = None, overrides: Mapping[str, object] | None = None
) -> list[Job]:
    """Check settings, models and folders, and describe the work.

    Args:
        profile: `quick`, `full` or `paper`.
        notebooks: notebook files by number.
        seed: replaces the profile's seed.
        overrides: dotted key to value.

    Returns:
        One job per notebook, in order.

    Raises:
        InputError: a setting, a model or a folder cannot be used.
    """
    loaded = config.load(profile, seed=seed, overrides=overrides)
    plain = config.to_dict(loaded)
    _check_models(loaded.models, plain)
    _check_named(loaded, config.load(profile))
    output = config.output_root()
    for folder in ("runs", "figures", "results"):
        _check_writable(output / folder / profile)
    return [
        Job(
            number=number,
            notebook=path,
            profile=profile,
            seed=loaded.seed,
            overrides=dict(overrides or {}),
            fingerprint=_fingerprint(path, loaded, plain),
            output=output,
        )
        for number, path in notebooks.items()
    ]


def run(jobs: Sequence[Job], *, say: Say, fresh: bool = False, at_once: int | None = None) -> None:
    """Run the jobs that have to run, one line each when it is finished, and build the report.

    Args:
        jobs: what `prepare` returned.
        say: takes each line.
        fresh: run also what is up to date.
        at_once: notebooks at one time; see `lanes.lanes_for` when None.

    Raises:
        NotebookError: a notebook or the report failed; what was finished stays.
        InputError: another run writes to the same folder.
    """
    started, written, peak, threads = time.monotonic(), 0, Peak(), lanes.threads_given()
    with _only_run(jobs[0].executed.parent, say=say):
        due = [job for job in jobs if fresh or execution.why_run(job)]
        together = sum(job.number not in lanes.ALONE for job in due)  # lanes that stay empty must not hold threads
        wanted = at_once or lanes.lanes_for(together, threads=threads, has_gpu=together > 1 and _has_gpu(jobs[0]))
        count = max(1, min(wanted, together))
        say(_header(jobs[0], at_once=count, threads=threads))
        for job in jobs:
            if job not in due:
                say(f"{_title(job)}{_skipped(job)}")
        for job, outcome in lanes.side_by_side(due, lanes=count, threads=threads, peak=peak):
            written += len(outcome.files)
            say(f"{_title(job)}{_duration(outcome.seconds):<13}{_wrote(outcome.files)}")
        say(f"report: {_build_report(jobs[0])}")
    peak.look()
    seconds, memory = _duration(time.monotonic() - started), f"{peak.bytes / 1e9:.2f} GB"
    say(f"total {seconds}, peak memory {memory} of all processes together, {written + 1} files written")


def show(jobs: Sequence[Job], *, say: Say) -> None:
    """Show each notebook and whether it would run.

    Args:
        jobs: what `prepare` returned.
        say: takes each line.
    """
    for job in jobs:
        reason = execution.why_run(job)
        say(f"{_title(job)}{f'would run    {reason}{_results_there(job)}' if reason else _skipped(job)}")


def _results_there(job: Job) -> str:
    """Say which results are there although a notebook would run: of earlier code, or come with the repository."""
    path = job.output / "results" / job.profile / f"{job.notebook.stem}.json"
    if not path.is_file():
        return ""
    try:
        return f"; results of commit {results.read_result(path)['commit']} are there"
    except InputError:
        return "; damaged results are there"


def _fingerprint(notebook: Path, settings: config.Config, plain: Mapping[str, object]) -> str:
    """Hash what decides a notebook's outputs, bases of adapters too; for one that shows the grid, also the grid's records."""
    own = provenance.fingerprint(notebook, config=plain)
    for folder in provenance.local_models(plain, root=config.ROOT):
        own += f" {lookup.fingerprint(folder)}" if adapters.is_adapter(folder) else ""
    if settings.grid is None or SHOWS_GRID not in provenance.modules_reached(notebook):
        return own
    from lib.grid import cells  # slow to import, and most profiles have no grid

    folder = cells.store_of(settings).folder
    records = [path for path in folder.glob("*.json") if not path.name.startswith(".")]
    return f"{own} {provenance.folder_hash(records, folder)}"


def _check_models(models: Mapping[str, ModelSource], plain: Mapping[str, object]) -> None:
    """Check that every checkpoint in the settings is named well, whole and complete, its mask token too, from headers only."""
    sections = [section for section in plain.values() if isinstance(section, Mapping)]
    extra = [lookup.parse(text) for section in sections for text in section.get("extra_models", ())]
    for source in (*models.values(), *extra):
        lookup.check(source)
        lookup.check_tokenizer(source)
        if lookup.is_local(source) and not lookup.local_path(source).is_relative_to(config.ROOT / "models"):
            from lib.models import loading  # slow to import, and the profiles' own models have a mask token

            loading.opened(lookup.local_path(source))


def _check_named(settings: config.Config, profile: config.Config) -> None:
    """Check that the models which the user named are here or can be fetched; the profile's own are left out when they cannot."""
    known = {(source.source, source.revision) for source in _all_models(profile)}
    for source in _all_models(settings):
        if (source.source, source.revision) not in known:
            lookup.check_obtainable(source)


def _all_models(settings: config.Config) -> list[ModelSource]:
    sections = [section for section in config.to_dict(settings).values() if isinstance(section, Mapping)]
    return [*settings.models.values(), *(lookup.parse(text) for section in sections for text in section.get("extra_models", ()))]


def _check_writable(folder: Path) -> None:
    """Check that files can be made in a folder that may not exist yet, without making anything."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        got = "no permission to write in" if nearest.is_dir() else "a file at"
        raise InputError(f"{folder} must be writable, got {got} {nearest}: mend that, or name another folder in SINKS_OUTPUT")


@contextlib.contextmanager
def _only_run(folder: Path, *, say: Say) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back when the process ends in whatever way.

    Some network disks (Lustre, by default) have no locks: there the user is asked to see to it.
    """
    import fcntl  # absent on Windows, where tests of other functions still run

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                say(f"note: {folder} is on a disk without locks ({error.strerror}): start no second run that writes there")
            else:
                rule = f"one run at a time must write to {folder}"
                raise InputError(f"{rule}, got a second one: wait for the first to end") from error
        yield


def _build_report(job: Job) -> str:
    """Build the page of all results; a damaged result file counts as a failure of the run."""
    from lib.report import page

    try:
        return _shown(Path(page.build(job.profile)), job.output)
    except InputError as error:
        raise NotebookError(f"the report was not built: {error}") from error


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _has_gpu(job: Job) -> bool:
    """Tell whether notebooks of a run compute on a GPU, whose memory two of them would share."""
    from lib.core import runtime  # has torch, which is slow to import

    return runtime.choose_device(config.load(job.profile, overrides=job.overrides)).device.type != "cpu"


def _header(job: Job, *, at_once: int, threads: int) -> str:
    found = provenance.versions()
    changed = "".join(f", {key}={value}" for key, value in job.overrides.items())
    share = f"{threads} threads" if at_once < 2 else f"{at_once} notebooks at one time, {threads} threads together"
    return f"profile {job.profile}, seed {job.seed}{changed}; {share}, Python {found['python']}, torch {found.get('torch', '?')}"


def _title(job: Job) -> str:
    return f"{job.number}  {job.name:<22} "


def _skipped(job: Job) -> str:
    status = execution.read_status(job)
    return f"up to date   skipped: {len(status['outputs'])} files of a run of {_duration(status['seconds'])} are whole"


def _wrote(files: Sequence[str]) -> str:
    figures = sum(name.endswith((".png", ".gif", ".svg")) for name in files)
    tables = sum(name.startswith("results/") and name.endswith(".csv") for name in files)
    return f"wrote {len(files)} files: {figures} figures, {tables} tables, executed copy {files[-1]}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"

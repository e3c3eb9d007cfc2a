"""The command line behind `./run_all.sh`: read it, enter the environment, hand over to `lib.launch.batch`.

At the top only the standard library is imported: a wrong word is answered before the environment is made.
"""

import argparse
import difflib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lib.commands import terminal
from lib.commands.words import Parser, UsageError
from lib.core import environment

PROFILES = ("quick", "full", "laptop", "paper", "rehearsal")
GRID_PROFILES = ("laptop", "paper", "rehearsal")
USAGE = """./run_all.sh [quick|full|laptop|paper|rehearsal] [options]   run the notebooks, then build the report
       ./run_all.sh report [PROFILE]              build the report of what is there, without running anything
       ./run_all.sh lab [JupyterLab's options]    open JupyterLab on notebooks/ in the same environment
       ./run_all.sh sinks COMMAND [options]       prune, quantize, trace, evaluate, ... a model of your own (sinks --help)
       ./run_all.sh --environment                 make the environment, print its variables for eval in a shell"""
EPILOG = """A notebook whose inputs are unchanged and whose outputs are whole is skipped. Executed copies go to runs/PROFILE/,
figures to figures/PROFILE/, tables and the report (report.html) to results/PROFILE/. Exit code: 0 done, 1 a notebook failed,
2 bad input."""


def parse(arguments: Sequence[str], *, root: Path = environment.ROOT) -> argparse.Namespace:
    """Read and check the command line as far as that needs no installed package.

    Args:
        arguments: the words after `./run_all.sh`.
        root: the repository, whose notebooks are known.

    Returns:
        `profile`, `notebooks` (paths by number), `seed`, `overrides`, `fresh`, `list`, and those of the grid.

    Raises:
        UsageError: a word that cannot be used.
    """
    parser = Parser(prog="./run_all.sh", usage=USAGE, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("profile", nargs="?", default="quick", help=f"{', '.join(PROFILES)}; see configs/")
    parser.add_argument("--notebooks", metavar="01,04", help="only these, without the grid; default: all that exist")
    parser.add_argument("--seed", metavar="N", help="seed of every random stream; default: the profile's")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="replace one setting; repeatable")
    parser.add_argument("--fresh", action="store_true", help="run also what is up to date")
    parser.add_argument("--list", action="store_true", help="show each notebook and whether it would run")
    parser.add_argument(
        "--jobs",
        metavar="N",
        help="notebooks at one time; default: 2 on a CPU with two cores, else 1 (of a grid: models)",
    )
    _add_grid(parser.add_argument_group("the experiment grid of the profiles laptop, paper and rehearsal"))
    chosen = parser.parse_args(arguments)
    if chosen.profile not in PROFILES:
        near = _nearest(chosen.profile, PROFILES)
        raise UsageError(f"profile must be one of {', '.join(PROFILES)}, got {chosen.profile!r}: {near}")
    if chosen.list and chosen.plan:
        raise UsageError("--list and --plan must not go together, got both: --list shows notebooks, --plan the grid")
    _check_grid(chosen)
    known = {path.name[:2]: path for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    chosen.notebooks_named = chosen.notebooks is not None
    chosen.notebooks = _select(chosen.notebooks, known)
    chosen.seed = _read_seed(chosen.seed)
    chosen.overrides = dict(_read_setting(text) for text in chosen.set)
    if chosen.limit is not None:
        chosen.overrides["grid.limit"] = chosen.limit
    return chosen


def _add_grid(group: argparse._ArgumentGroup) -> None:
    """Add the words that only profiles with a grid take."""
    group.add_argument("--plan", action="store_true", help="say what the grid would cost and what is there already; runs nothing")
    group.add_argument("--grid-only", action="store_true", help="compute the cells, leave the notebooks")
    group.add_argument("--limit", metavar="N", help="only the first N documents of each task; intervals get as wide as they must")
    group.add_argument("--retry-failed", action="store_true", help="compute failed cells again")
    group.add_argument("--ray", metavar="ADDRESS", help="use this Ray cluster: auto, or host:port; default: this machine")
    group.add_argument("--gpus-per-cell", metavar="X", help="GPUs of a model or a part of one; default 1, all for spread weights")


def _check_grid(chosen: argparse.Namespace) -> None:
    """Check the words of the grid."""
    given = [name for name in ("plan", "grid_only", "limit", "retry_failed", "ray", "gpus_per_cell") if getattr(chosen, name)]
    if given and chosen.profile not in GRID_PROFILES:
        flag = f"--{given[0].replace('_', '-')}"
        raise UsageError(
            f"{flag} must go with a profile that has a grid, got {chosen.profile}: use one of {', '.join(GRID_PROFILES)}"
        )
    for name in ("limit", "jobs"):
        text = getattr(chosen, name)
        if text is not None and not (text.isascii() and text.isdigit() and int(text) > 0):
            raise UsageError(f"--{name} must be a whole number from 1, got {text!r}: give one such as --{name} 4")
        setattr(chosen, name, None if text is None else int(text))
    if chosen.gpus_per_cell is not None:
        chosen.gpus_per_cell = _read_share(chosen.gpus_per_cell)


def _read_share(text: str) -> float:
    """Read how many GPUs a model gets; a part of one lets several share it."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1024 or (share > 1 and not share.is_integer()):
        raise UsageError(f"--gpus-per-cell must be a part of one or a whole number, got {text!r}: give one such as 0.5 or 2")
    return share


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command line.

    Args:
        arguments: the words after `./run_all.sh`; those of the process when None.

    Returns:
        Exit code: 0 done, 1 a notebook failed, 2 bad input, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    terminal.use_utf8()
    try:
        if words[:1] == ["sinks"]:
            return _sinks(words)
        if words == ["--environment"]:
            return environment.main()
        if words[:1] == ["lab"]:
            _lab(words)
        if words[:1] == ["report"]:
            return _report(words)
        chosen = parse(words)
        if chosen.list and not _inside() and environment.ready() is None:
            return _list_names(chosen)
        if _computes_grid(chosen):
            os.environ["SINKS_GROUPS"] = "cluster"  # of requirements-cluster.lock, which has Ray
        _enter(words)
        return _carry_out(chosen)
    except (UsageError, environment.NoEnvironmentError) as error:
        return terminal.complain(error, 2)
    except KeyboardInterrupt:
        return terminal.interrupted("what was finished stays, run again to go on")
    except BrokenPipeError:
        return terminal.reader_gone()
    except Exception as error:
        if not terminal.is_disk_full(error):
            raise
        return terminal.complain(f"the disk must have room for what is written, got {error}: free some and run again", 1)


def _carry_out(chosen: argparse.Namespace) -> int:
    """Do the work, inside the environment."""
    from lib.core.errors import InputError
    from lib.launch import batch
    from lib.launch.execution import NotebookError

    try:
        _go_to_own_folder(chosen)
        if chosen.profile == "rehearsal":
            _make_rehearsal()
        if chosen.plan or _computes_grid(chosen):
            if not chosen.plan:
                _say_where()
            _run_grid(chosen)
            if chosen.plan or chosen.grid_only:
                return 0
        jobs = batch.prepare(chosen.profile, notebooks=chosen.notebooks, seed=chosen.seed, overrides=chosen.overrides)
        if chosen.list:
            batch.show(jobs, say=terminal.say)
        else:
            if not _computes_grid(chosen):
                _say_where()
            at_once = None if chosen.profile in GRID_PROFILES else chosen.jobs  # there it counts models
            batch.run(jobs, say=terminal.say, fresh=chosen.fresh, at_once=at_once)
    except InputError as error:
        return terminal.complain(error, 2)
    except NotebookError as error:
        return terminal.complain(error, 2 if error.is_input else 1)
    return 0


def _go_to_own_folder(chosen: argparse.Namespace) -> None:
    """Let a run with settings of its own write below runs/, unless SINKS_OUTPUT says where; the grid's cells stay shared."""
    from lib.core import config

    settings = config.load(chosen.profile, seed=chosen.seed, overrides=chosen.overrides)
    own = None if os.environ.get("SINKS_OUTPUT") else config.custom_root(settings, overrides=chosen.overrides)
    if own is not None:
        os.environ |= {"SINKS_OUTPUT": str(own), "SINKS_CELLS": str(environment.ROOT)}


def _say_where() -> None:
    """Say where files go, when it is not the project."""
    from lib.core import config

    if config.output_root() != environment.ROOT:
        terminal.say(f"writes below {config.output_root()}")


def _sinks(words: Sequence[str]) -> int:
    """Run a command of `sinks`; a wrong word is answered before the environment is made."""
    from lib.commands import command

    try:
        command.parse(words[1:])
    except UsageError as error:
        return terminal.complain(error, 2)
    _enter(words)
    os.environ["SINKS_ENTERED"] = str(os.getpid())
    return command.main(words[1:])


def _report(words: Sequence[str]) -> int:
    """Build the report of a profile from the results that are there, without running anything."""
    parser = Parser(prog="./run_all.sh report", description="Build results/PROFILE/report.html without running anything.")
    parser.add_argument("profile", nargs="*", metavar="PROFILE", help=f"{', '.join(PROFILES)} (default quick)")
    if (asked := " ".join(parser.parse_args(words[1:]).profile) or "quick") not in PROFILES:
        raise UsageError(f"report must name one of {', '.join(PROFILES)}, got {asked!r}: {_nearest(asked, PROFILES)}")
    _enter(words)
    from lib.core.errors import InputError
    from lib.report import page

    try:
        terminal.say(f"report: {page.build(asked)}")
    except InputError as error:
        return terminal.complain(error, 2)
    return 0


def _make_rehearsal() -> None:
    """Write the tiny checkpoints and rows of the rehearsal, where they are not yet."""
    folder = environment.ROOT / ".cache" / "rehearsal"
    command = [sys.executable, "-m", "recipes.rehearsal", str(folder)]
    made = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, check=False)
    if made.returncode:
        said = (made.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(
            f"the rehearsal's checkpoints must be written to {folder}, got {said!r}: delete that folder and try again"
        )


def _computes_grid(chosen: argparse.Namespace) -> bool:
    """Tell whether cells are computed: not for a plan or a list, nor where notebooks alone are named."""
    only_notebooks = chosen.notebooks_named and not chosen.grid_only
    return chosen.profile in GRID_PROFILES and not (chosen.list or chosen.plan or only_notebooks)


def _run_grid(chosen: argparse.Namespace) -> None:
    """Plan or compute the grid."""
    from lib.core import config
    from lib.grid import run

    loaded = config.load(chosen.profile, seed=chosen.seed, overrides=chosen.overrides)
    engine = run.Engine(jobs=chosen.jobs, ray=chosen.ray, gpus_per_cell=chosen.gpus_per_cell, retry=chosen.retry_failed)
    if chosen.plan:
        run.show(loaded, engine, say=terminal.say)
    else:
        run.run(loaded, engine, say=terminal.say)


def _list_names(chosen: argparse.Namespace) -> int:
    """List the notebooks without making an environment for it."""
    for number, path in chosen.notebooks.items():
        terminal.say(f"{number}  {path.stem[3:]:<22} would run    no environment yet")
    return 0


def _inside() -> bool:
    """Tell whether this process already runs in the environment."""
    return os.environ.get("SINKS_PYTHON") == sys.executable or os.environ.get("SINKS_ENTERED") == str(os.getpid())


def _enter(words: Sequence[str]) -> None:
    """Go on in an environment that satisfies the lock, with the variables that a run needs."""
    os.environ.setdefault("SINKS_CWD", os.getcwd())  # relative paths start there, wherever notebooks run
    if _inside():
        from lib.core import variables

        os.environ.update(variables.settings())
        return
    python = str(environment.ensure())
    # The process keeps its number through exec: that tells the second pass that it is the second.
    os.environ |= {"SINKS_PYTHON": python, "SINKS_ENTERED": str(os.getpid()), "PYTHONUTF8": "1"}
    os.chdir(environment.ROOT)
    os.execv(python, [python, "-m", "lib.launch.command", *words])


def _lab(words: Sequence[str]) -> NoReturn:
    """Open JupyterLab on the notebooks; kernels inherit the variables of a run."""
    _enter(words)
    notebooks = environment.ROOT / "notebooks"
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={notebooks}", *words[1:]])


def _select(text: str | None, known: dict[str, Path]) -> dict[str, Path]:
    """Pick notebooks by number; every known one without a wish."""
    if not known:
        raise UsageError("notebooks/ must hold numbered notebooks, got none: clone the repository again")
    numbers = sorted({word.strip().zfill(2) for word in text.split(",")}) if text is not None else list(known)
    for number in numbers:
        if number not in known:
            raise UsageError(
                f"--notebooks must name numbers among {', '.join(known)}, got {number!r}: ./run_all.sh --list shows them"
            )
    return {number: known[number] for number in numbers}


def _read_seed(text: str | None) -> int | None:
    if text is not None and not (text.isascii() and text.isdigit()):
        raise UsageError(f"--seed must be a whole number from 0, got {text!r}: give one such as --seed 1")
    return None if text is None else int(text)


def _read_setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UsageError(f"--set must be KEY=VALUE, got {text!r}: write it like --set sink_traces.prompts=4")
    if key in ("profile", "seed"):
        raise UsageError(f"--set must name a setting below the run's own, got {key!r}: use ./run_all.sh PROFILE --seed N")
    return key, value


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "choose one of them"


if __name__ == "__main__":
    sys.exit(main())

"""The command line of `sinks`: read it, prepare the process, run one command. At the top, only the standard library."""

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from lib.commands import compare, decode, evaluate, export, prune, quantize, terminal, trace
from lib.commands.words import MODEL, Parser, UsageError
from lib.core.errors import InputError

COMMANDS: dict[str, ModuleType] = {
    "trace": trace,
    "prune": prune,
    "quantize": quantize,
    "export": export,
    "evaluate": evaluate,
    "decode": decode,
    "compare": compare,
}
EPILOG = f"""MODEL is {MODEL}. Relative paths start where the command was typed. Exit code: 0 done, 1 failed, 2 bad input,
130 interrupted. sinks COMMAND --help lists the options of one command."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the words of a command line.

    Args:
        words: those after `sinks`.

    Returns:
        The options of the command, `command` among them.

    Raises:
        UsageError: a word that cannot be used.
    """
    parser = Parser(prog="sinks", epilog=EPILOG, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add(commands.add_parser(name, help=summary, description=summary, epilog=module.EPILOG, allow_abbrev=False))
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Carry out one command line.

    Args:
        words: those after `sinks`; those of the process when None.

    Returns:
        Exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.
    """
    words = list(sys.argv[1:] if words is None else words)
    terminal.use_utf8()
    chosen = argparse.Namespace()  # for what goes wrong before the words are read
    try:
        chosen = parse(words)
        _enter(words)
        with terminal.bars_as_lines():
            COMMANDS[chosen.command].run(chosen)
    except (UsageError, InputError) as error:
        return terminal.complain(error, 2)
    except BrokenPipeError:
        return terminal.reader_gone()
    except KeyboardInterrupt as stop:
        return terminal.interrupted(str(stop) or "nothing that was written before is lost, run again to begin anew")
    except Exception as error:
        if terminal.is_disk_full(error):
            return terminal.complain(f"the disk must have room for what is written, got {error}: free some and run again", 1)
        if terminal.is_out_of_memory(error):
            return terminal.complain(f"the work must fit into memory, got {_first_line(error)}: {_smaller(chosen, error)}", 1)
        raise
    return 0


def _first_line(error: Exception) -> str:
    """Return what went wrong without the advice on allocators that torch adds."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _smaller(chosen: argparse.Namespace, error: Exception) -> str:
    """Say what takes less memory, of what this command has."""
    batch, length = getattr(chosen, "batch", 1), getattr(chosen, "length", None)
    ways = [f"--batch {batch // 2}"] if batch > 1 else []
    ways += ["a smaller --length"] if length else []
    ways += ["--dtype bfloat16"] if getattr(chosen, "dtype", "") != "bfloat16" else []
    ways += ["--device cpu"] if "cuda" in str(error).lower() else []
    return f"use {', '.join(ways)}" if ways else "close other programs, or take a smaller model"


def _enter(words: Sequence[str]) -> None:
    """Start once more with the variables of a run: threads and the allocator are settled when a process begins."""
    if os.environ.get("SINKS_ENTERED") == str(os.getpid()):
        return
    from lib.core import variables
    from lib.core.environment import ROOT

    os.environ |= variables.settings()
    os.environ |= {"SINKS_CWD": os.getcwd(), "SINKS_ENTERED": str(os.getpid())}
    # -P: a folder named lib where the command was typed is not ours
    os.execv(sys.executable, [sys.executable, "-P", str(ROOT / "sink_aware_pruning_command.py"), *words])


if __name__ == "__main__":
    sys.exit(main())

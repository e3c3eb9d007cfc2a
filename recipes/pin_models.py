"""Write the newest revisions of hub checkpoints into a profile: `python -m recipes.pin_models [--check] [FILE]`.

Only lines of the form `name: {source: OWNER/NAME, revision: ...}` change; comments and everything else stay. With `--check`
nothing is written: every revision is asked for, and those that are gone or behind are listed.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lib.core.config import ROOT
from lib.core.provenance import write_text

LINE = re.compile(r"(?P<head>\{source: (?P<source>[\w.-]+/[\w.-]+), revision: )(?P<revision>[\w.-]+)(?P<tail>\})")
Resolve = Callable[[str], str]


def newest(source: str) -> str:
    """Return the commit that the main branch of a hub repository stands at.

    Raises:
        OSError: no network, no such repository, or no access.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

    try:
        return str(HfApi().model_info(source).sha)
    except httpx.HTTPError as error:  # without a network these are no OSError
        raise OSError(str(error)) from error


def pinned(text: str, *, resolve: Resolve = newest) -> tuple[str, list[str]]:
    """Return a profile's text with the newest revisions, and a line for every hub checkpoint that it names.

    A checkpoint that cannot be asked for keeps its revision, and its line says why.

    >>> text, lines = pinned("a: {source: O/n, revision: null}  # why", resolve=lambda _: "f" * 40)
    >>> text == "a: {source: O/n, revision: " + "f" * 40 + "}  # why", lines
    (True, ['O/n: null -> ffffffffffffffffffffffffffffffffffffffff'])
    """
    said = []

    def replace(found: re.Match[str]) -> str:
        """Put the newest revision into one line, and note what became of it."""
        source, old = found["source"], found["revision"]
        try:
            new = resolve(source)
        except OSError as error:
            said.append(f"{source}: kept {old}, {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
            return found[0]
        said.append(f"{source}: {old} is the newest" if new == old else f"{source}: {old} -> {new}")
        return f"{found['head']}{new}{found['tail']}"

    return LINE.sub(replace, text), said


def main(arguments: Sequence[str] | None = None) -> int:
    """Pin or check the checkpoints of one profile."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pin_models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "configs" / "paper.yaml")
    parser.add_argument("--check", action="store_true", help="write nothing")
    chosen = parser.parse_args(arguments)
    old = chosen.file.read_text(encoding="utf-8")
    new, said = pinned(old)
    sys.stdout.write("".join(f"{line}\n" for line in said))
    if new != old and not chosen.check:
        write_text(chosen.file, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

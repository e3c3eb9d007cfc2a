"""Numbers between marks: `<!--=core.hours-->21.8<!--/-->` in a page is the value that `values.value("core.hours")` gives."""

import re
from collections.abc import Callable
from pathlib import Path

from lib.core.errors import InputError
from lib.core.provenance import write_text
from recipes.pages import values

MARK = re.compile(r"<!--=([\w.-]+)-->(.*?)<!--/-->", re.DOTALL)
ENDS = re.compile(r"<!--(?:=[^>]*|/)-->")


def pages(root: Path) -> list[Path]:
    """List the pages that may hold marks."""
    named = [root / "README.md", root / "CONTRIBUTING.md", root / "data" / "README.md"]
    return [*(path for path in named if path.exists()), *sorted((root / "docs").glob("*.md"))]


def written(text: str, *, value: Callable[[str], str] = values.value) -> str:
    """Return a page with its numbers as they are now.

    Args:
        text: of the page.
        value: gives a number by its name.

    Raises:
        InputError: a mark names nothing known, or has no end.

    >>> written("it takes <!--=x.y-->3<!--/--> hours", value={"x.y": "4"}.__getitem__)
    'it takes <!--=x.y-->4<!--/--> hours'
    """

    def put(mark: re.Match[str]) -> str:
        try:
            return f"<!--={mark[1]}-->{value(mark[1])}<!--/-->"
        except KeyError as error:
            raise InputError(f"a mark must name a number of recipes/pages/values.py, got {mark[1]!r}") from error

    if ENDS.search(MARK.sub("", text)):
        raise InputError(f"a mark must have a name and an end, got {ENDS.findall(MARK.sub('', text))[0]!r} alone")
    return MARK.sub(put, text)


def stale(root: Path) -> list[str]:
    """Return the pages, as paths below `root`, whose numbers are not those of now."""
    return [path.relative_to(root).as_posix() for path in pages(root) if written(text := path.read_text("utf-8")) != text]


def update(root: Path) -> list[str]:
    """Write the numbers of all pages anew; return the pages that changed, as paths below `root`."""
    changed = stale(root)
    for name in changed:
        write_text(root / name, written((root / name).read_text(encoding="utf-8")))
    return changed

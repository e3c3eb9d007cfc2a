"""README and docs as a reader meets them: short, every link alive, every command understood, no number that nobody made."""

import re
import shlex
from pathlib import Path

import pytest

from lib.core import config
from lib.launch import command
from recipes.pages import marks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
LINK = re.compile(r"\]\(([^)\s]+)\)")
GENERATED = re.compile(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", re.DOTALL)
NAMES_WITH_NUMBERS = re.compile(
    r"Python 3\.\d+( or 3\.\d+)?|SmolLM2-135M|LLaDA 2(\.1)?|LLaDA-1\.5|Qwen2\.5|Qwen3-0\.6B|Llama-3\.1-8B|WikiText-2"
    r"|CC BY-SA 4\.0|Apache-2\.0|SHA-256|exit code \d|\b0[1-6]\b"
)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors that a forge makes of a page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.is_relative_to(ROOT) and there.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{path.name} links to {target}"


def test_every_page_is_linked_from_the_first() -> None:
    linked = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= set(linked)


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def commands(text: str) -> list[str]:
    """The calls of the launcher in a page: lines of fenced blocks, and those in a sentence or table."""
    fenced = [line for block in FENCED.findall(text) for line in block.splitlines()]
    quoted = re.findall(r"`(\./run_all\.sh[^`]*)`", FENCED.sub("", text))
    return [line.partition("  #")[0].strip() for line in [*fenced, *quoted] if line.strip().startswith("./run_all.sh")]


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_every_call_of_the_launcher_is_understood(path: Path) -> None:
    for line in commands(path.read_text(encoding="utf-8")):
        words = shlex.split(line.replace("...", ""))[1:]
        if words[:1] in (["lab"], ["sinks"], ["report"]):
            continue
        chosen = command.parse(words)
        overrides = dict(command._read_setting(text) for text in chosen.set)
        config.load(chosen.profile, overrides=overrides)


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_a_page_says_no_number_that_was_not_generated(path: Path) -> None:
    text = FENCED.sub("", marks.MARK.sub("", GENERATED.sub("", path.read_text(encoding="utf-8"))))
    text = NAMES_WITH_NUMBERS.sub("", re.sub(r"\]\([^)]*\)|https?://\S+|arXiv \d+\.\d+|`[^`]*`", "", text))
    assert not re.findall(r"\b\d+(?:\.\d+)?\b", text)


def test_the_numbers_between_marks_are_those_of_now() -> None:
    assert marks.stale(ROOT) == [], "write them anew with python -m recipes.pages"

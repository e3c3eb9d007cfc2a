"""The table of families in docs/checkpoints.md is the registry's."""

from collections import Counter
from pathlib import Path

from lib.checkpoints.families import FAMILIES, Family
from tests.unit.models import test_every_family
from tests.unit.models.test_families import CASES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "checkpoints.md"
ATTENTION = {
    "full": "both ways",
    "block-causal": "by blocks of {length}, from {origin}",
    "context-causal": "causal, but the open block of {length} sees itself",
    "causal": "causal",
}
ORIGINS = {"start": "the first token", "prompt": "the prompt's end"}


def row(family: Family) -> str:
    """One line of the table."""
    attention = ATTENTION[family.attention].format(length=family.block_length, origin=ORIGINS[family.block_origin])
    known = [f"`{name}`" for name in (*family.architectures, *family.model_types)] or [f"the name, `{family.called}`"]
    releases = ", ".join(family.releases) or "your own"
    shift = "yes" if family.logit_shift and family.attention != "causal" else "no"
    return f"| {family.name} | {releases} | {', '.join(known)} | {family.network} | {attention} | {shift} | {family.state} |"


def test_the_table_of_families_is_the_registrys() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("<!-- families:begin -->\n")[2].partition("<!-- families:end -->")[0]
    expected = "\n".join(row(family) for family in FAMILIES.values())
    assert table.splitlines()[2:] == expected.splitlines(), f"put these lines into {PAGE.name}:\n{expected}"


def test_the_table_of_what_runs_is_of_the_releases_that_are_tested() -> None:
    """Its ticks are those of `test_every_family`, which takes every release through all of it."""
    tests = {name for name in vars(test_every_family) if name.startswith("test_")}
    assert tests == {"test_masses_and_bound", "test_pruned_exported_and_read_again", "test_text_and_fast_text"}
    table = PAGE.read_text(encoding="utf-8").partition("<!-- runs:begin -->\n")[2].partition("<!-- runs:end -->")[0]
    count = Counter(case.family for case in CASES.values())
    expected = "\n".join(f"| {family} | {count[family]} |{' ✓ |' * 7}" for family in FAMILIES if count[family])
    assert table.splitlines()[2:] == expected.splitlines(), f"put these lines into {PAGE.name}:\n{expected}"

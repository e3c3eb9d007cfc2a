"""The verdict table in README.md, generated from the result files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.core import provenance
from lib.core.errors import InputError
from lib.report.results import interval_text, load_results

BEGIN = "<!-- verdicts:begin -->"
END = "<!-- verdicts:end -->"
PROFILE = "full"  # the only profile with enough prompts, windows and calibrations for a verdict, and whose results git tracks
HEADER = ("claim", "source", "model", "estimate [95 % interval]", "n", "verdict")


def readme_block(*, root: Path | None = None) -> str:
    """Write the verdict table and one line a notebook, from the `full` results, with the commit that each notebook's are of.

    Args:
        root: folder that holds `results/`; the output folder when None.

    Returns:
        Markdown without the two marks; the same results give the same text.

    Raises:
        InputError: a result file is damaged.
    """
    results = load_results(PROFILE, root=root)
    if not results:
        return f"No results yet: `./run_all.sh {PROFILE}` makes them."
    rows = [_claim_row(claim) for result in results for claim in result["claims"]]
    table = _markdown_table(rows) if rows else "No claim has been tested yet."
    return table + "\n\n" + "\n".join(_notebook_line(result) for result in results)


def update_readme(path: Path, *, root: Path | None = None) -> bool:
    """Put the current block between the two marks of a README.

    Args:
        path: the README.
        root: folder that holds `results/`; the output folder when None.

    Returns:
        True when the file changed.

    Raises:
        InputError: the file lacks the marks, or a result file is damaged.
    """
    before, _, after = _parts(path)
    text = f"{before}{BEGIN}\n{readme_block(root=root)}\n{END}{after}"
    if text == path.read_text(encoding="utf-8"):
        return False
    provenance.write_text(path, text)
    return True


def is_current(path: Path, *, root: Path | None = None) -> bool:
    """Tell whether a README shows the current results.

    Args:
        path: the README.
        root: folder that holds `results/`; the output folder when None.

    Returns:
        False when `update_readme` would change it.

    Raises:
        InputError: as for `update_readme`.
    """
    return _parts(path)[1] == f"\n{readme_block(root=root)}\n"


def _parts(path: Path) -> tuple[str, str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path.name} must be a readable file, got {error.strerror}: restore it") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"{path.name} must hold {BEGIN} and {END} once each in this order, got something else: put them in")
    before, rest = text.split(BEGIN)
    block, after = rest.split(END)
    return before, block, after


def _claim_row(claim: dict[str, Any]) -> tuple[str, ...]:
    estimate = interval_text(claim["estimate"], claim["interval"])
    unit = f" {claim['unit']}" if claim["unit"] and claim["estimate"] is not None else ""
    verdict = f"**{claim['verdict']}**" + (f" ({claim['note']})" if claim["verdict"] == "not tested" else "")
    return claim["statement"], claim["source"], claim["model"], estimate + unit, str(claim["n"]), verdict


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _notebook_line(result: dict[str, Any]) -> str:
    name = result["notebook"]
    counts = ", ".join(
        f"{len(result[kind])} {kind if len(result[kind]) != 1 else kind[:-1]}" for kind in ("tables", "figures", "claims")
    )
    links = f"[numbers](results/{PROFILE}/{name}.json), [figures](figures/{PROFILE})"
    made = f"{PROFILE}, commit {result['commit']}: {counts}; {links}"
    return f"- [Notebook {result['number']}](notebooks/{name}.ipynb), {result['title']} ({made})"

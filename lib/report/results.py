"""Result files: what they must hold, reading them for the report page, the README and the launcher."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.core.config import output_root
from lib.core.errors import InputError
from lib.report.tables import significant

SCHEMA_VERSION = 1
NOT_BEYOND = "reproduced, not beyond the mask"
SIGNS = {
    "reproduced": "✓",
    NOT_BEYOND: "≈",
    "not reproduced": "✗",
    "inconclusive": "?",
    "not tested": "–",
}  # told apart without colour
VERDICTS = tuple(SIGNS)
DECIDED = ("reproduced", NOT_BEYOND, "not reproduced")  # these need numbers
MODEL_FIELDS = ("name", "source", "revision", "fingerprint", "parameters", "dtype", "kind", "family", "attention", "notes")
REQUIRED: dict[str, type] = {
    "notebook": str, "number": str, "title": str, "profile": str, "seed": int, "overrides": dict, "config": dict,
    "fingerprint": str, "commit": str, "models": list, "versions": dict, "device": str, "tables": list, "figures": list,
    "claims": list, "outputs": dict,
}  # fmt: skip
REQUIRED_ENTRIES = {
    "tables": ("name", "file", "caption", "columns", "text"),
    "figures": ("name", "kind", "file", "caption"),
    "claims": ("key", "statement", "rule", "model", "estimate", "interval", "n", "unit", "verdict", "source", "note"),
    "models": ("name",),
}


def load_results(profile: str, *, root: Path | None = None) -> list[dict[str, Any]]:
    """Read every result file of a profile.

    Args:
        profile: `quick`, `full` or `paper`.
        root: folder that holds `results/`; the output folder when None.

    Returns:
        One dict per notebook, in order of number; empty when nothing was run yet.

    Raises:
        InputError: a file is damaged, incomplete or of another version.
    """
    folder = (root or output_root()) / "results" / profile
    return [read_result(path) for path in sorted(folder.glob("[0-9][0-9]_*.json"))]


def read_result(path: Path) -> dict[str, Any]:
    """Read one result file and check that nothing a reader relies on is missing.

    Args:
        path: `results/<profile>/NN_name.json`.

    Returns:
        Its content.

    Raises:
        InputError: the file is damaged, incomplete or of another version.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(path, "readable JSON", " ".join(str(error).split())) from error
    if not isinstance(result, dict) or result.get("schema_version") != SCHEMA_VERSION:
        got = result.get("schema_version") if isinstance(result, dict) else type(result).__name__
        raise _broken(path, f"a record of schema version {SCHEMA_VERSION}", repr(got))
    for key, kind in REQUIRED.items():
        if not isinstance(result.get(key), kind):
            raise _broken(path, f"complete, with {key!r} as {kind.__name__}", type(result.get(key)).__name__)
    for key, names in REQUIRED_ENTRIES.items():
        for entry in result[key]:
            missing = [name for name in names if not isinstance(entry, dict) or name not in entry]
            if missing:
                raise _broken(path, f"complete, with {', '.join(missing)} in each of its {key}", "an entry without")
    for claim in result["claims"]:
        if claim["verdict"] not in VERDICTS:
            raise _broken(path, f"using a verdict among {', '.join(VERDICTS)}", repr(claim["verdict"]))
    return result


def known_outputs(path: Path) -> dict[str, str]:
    """Read which files an earlier result file, possibly of other code or damaged, says that its run wrote.

    Args:
        path: `results/<profile>/NN_name.json`, which may be missing.

    Returns:
        SHA-256 by name; empty when it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["outputs"]
        return {str(name): str(digest) for name, digest in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def notebook_title(path: Path) -> str:
    """Read the title of a notebook: the first heading of its first Markdown cell that has one.

    Args:
        path: a notebook file.

    Returns:
        The title without sign and number; the file's name when there is none.
    """
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("# "):
                    return re.sub(r"^[0-9]{2}\W+", "", line[2:].strip())
    return path.stem


def interval_text(estimate: float | None, interval: Sequence[float | None] | None) -> str:
    """Write an estimate with its interval for a table.

    Args:
        estimate: the number, or None when nothing was measured.
        interval: low and high end; None or an infinite end was not bounded by the data.

    Returns:
        Text such as `0.512 [0.430, 0.590]`.

    >>> interval_text(0.5, (0.25, float("inf"))), interval_text(None, None)
    ('0.500 [0.250, unbounded]', '-')
    """
    if estimate is None:
        return "-"
    if interval is None:
        return significant(estimate)
    low, high = ("unbounded" if end is None or end in (float("inf"), float("-inf")) else significant(end) for end in interval)
    return f"{significant(estimate)} [{low}, {high}]"


def count_verdicts(claims: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count claims by verdict.

    Args:
        claims: recorded claims.

    Returns:
        A count for each verdict, also when zero.
    """
    return {name: sum(claim["verdict"] == name for claim in claims) for name in VERDICTS}


def _broken(path: Path, rule: str, got: str) -> InputError:
    return InputError(f"{path} must be {rule}, got {got}: delete it and run the notebook again")

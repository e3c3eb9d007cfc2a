"""Result files: what they must hold, reading them for pages, README and launcher, and what a claim says and rests on."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lib.core.config import output_root
from lib.core.errors import InputError
from lib.report.tables import significant

SCHEMA_VERSION = 1
NOT_BEYOND, NO_EFFECT = "reproduced, not beyond the mask", "no effect of that size"
SIGNS = {
    "reproduced": "✓",
    NOT_BEYOND: "≈",
    "not reproduced": "✗",
    NO_EFFECT: "=",
    "inconclusive": "?",
    "not tested": "–",
}  # told apart without colour
VERDICTS = tuple(SIGNS)
DECIDED = ("reproduced", NOT_BEYOND, "not reproduced", NO_EFFECT)  # these need numbers
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

# By notebook: a pattern of claim keys, the table and the figure; the first that fits is taken. A model's figure bears its name.
EVIDENCE: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "01": (
        ("dlm-less-concentrated", "rates", "layers"),
        ("*", "rates", "position_by_step"),
    ),
    "02": (
        ("*-temporal-variance", "paper_quantities", "centroid_paths"),
        ("*-spatial-variance", "paper_quantities", "variance_by_layer"),
        ("heads-*", "overlap", "overlap_by_distance"),
        ("noise-*", "noise", "noise"),
        ("blocking-*", "blocking", "dose_response"),
    ),
    "03": (("*", "gains", "quality_curves"),),
    "04": (
        ("accuracy-*", "accuracy_pairs", "accuracy_pairs"),
        ("better-weights-*", "repairs_gains", "repairs"),
        ("recipe-gains", "shares", "shares"),
        ("gain-of-the-papers-size", "shares", "shares"),
        ("*-give-half", "shares", "shares"),
        ("sinks-beat-random", "shares", "shares"),
        ("due-to-the-sinks", "factorial_effects", "attribution"),
        ("keeping-sinks-*", "released", ""),
        ("*", "released", "gain_by_sparsity"),
    ),
    "05": (
        ("gptq-*", "rounding", "rounding"),
        ("half-and-*", "equal_bytes", "front"),
        ("prune-first", "orders", "interaction"),
        ("joint-sweep", "orders", "interaction"),
        ("errors-*", "interactions", "interaction"),
        ("sink-weights-*", "hessians", "by_noise"),
        ("solver-*", "allocations", "allocations"),
        ("*-bits", "baselines", "baselines"),
        ("awq-*", "rewritten", "rewritten"),
    ),
    "06": (
        ("digest-*", "models", "models"),
        ("structured-*", "models", "models"),
        ("*-accuracy*", "accuracy", "decoders"),
        ("cache*", "decoders", "decoders"),
        ("*-step", "late_steps", "late_steps"),
        ("speed-ups-*", "composition", "composition"),
        ("sinks-out-*", "sink_control", "sink_control"),
    ),
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


def claim_sentence(claim: Mapping[str, Any]) -> str:
    """Write a claim as one sentence in Markdown: verdict, model, statement, estimate with interval and unit.

    >>> numbers = {"estimate": 0.5, "interval": (0.4, 0.6), "unit": "share of steps"}
    >>> claim_sentence({"verdict": "reproduced", "model": "dlm", "statement": "Sinks move", **numbers})
    '✓ **reproduced** on `dlm`: Sinks move, 0.500 [0.400, 0.600] share of steps.'
    """
    said = f"{SIGNS[claim['verdict']]} **{claim['verdict']}** on `{claim['model']}`: {claim['statement'].rstrip('.')}"
    if claim["estimate"] is None:
        return f"{said}."
    return f"{said}, {interval_text(claim['estimate'], claim['interval'])} {claim['unit']}".rstrip() + "."


def evidence_of(result: Mapping[str, Any], claim: Mapping[str, Any]) -> dict[str, str]:
    """Name the table and the figure that a claim's numbers stand in.

    Args:
        result: the result file of a notebook.
        claim: one of its claims.

    Returns:
        `table` and `figure` by name, without what the result does not hold.
    """
    for pattern, table, figure in EVIDENCE.get(result["number"], ()):
        if fnmatchcase(claim["key"], pattern):
            found = {
                "table": _present(result["tables"], (table,)),
                "figure": _present(result["figures"], (f"{figure}_{claim['model']}", figure)),
            }
            return {kind: name for kind, name in found.items() if name}
    return {}


def in_words(model: Mapping[str, Any]) -> str:
    """Say what a model is: its name, its kind and its size, as far as a run recorded them.

    >>> in_words({"name": "dlm", "kind": "masked diffusion", "parameters": 8_917_248}), in_words({"name": "planted"})
    ('dlm (masked diffusion, 9 M)', 'planted')
    """
    count = model.get("parameters")
    size = None if not count else f"{count / 1e9:.0f} B" if count >= 999_500_000 else f"{count / 1e6:.{int(count < 999_500)}f} M"
    said = [str(part) for part in (model.get("kind"), size) if part]
    return f"{model['name']} ({', '.join(said)})" if said else str(model["name"])


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


def _present(entries: Iterable[Mapping[str, Any]], wanted: Iterable[str]) -> str:
    """Return the first wanted name that there is."""
    names = {entry["name"] for entry in entries}
    return next((name for name in wanted if name in names), "")

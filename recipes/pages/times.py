"""How long the notebooks took and what memory they held, kept in `times.json` because a run's own record is not tracked."""

import functools
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from lib.core import config
from lib.core.config import ROOT
from lib.core.errors import InputError
from lib.core.provenance import write_json

RECORD = ROOT / "docs" / "times.json"
PROFILES = ("quick", "full")
MINUTE, GIGABYTE = 60.0, 1e9
NOT_RECORDED = "not recorded"
# Of each profile its models, what stands for its times where nothing was run, and what it is for.
ROWS = {
    "quick": ("embedded family, SmolLM2-135M", "", "a first look; what CI validates"),
    "full": ("embedded family, SmolLM2-135M, `adapted` in 01 and 02", "", "verdicts"),
    "laptop": (
        "Qwen3-0.6B adapted to masked diffusion, and Qwen3-0.6B itself, from the hub",
        "not measured: gigabytes of weights",
        "real weights on a small GPU; `--plan` prices its grid",
    ),
    "paper": (
        "LLaDA-8B-Base; Llama-3.1-8B, Qwen2.5-7B and SmolLM2 beside it in 01 and 02",
        "not measured: a large GPU",
        "the paper's models",
    ),
}


def keep(profile: str, *, output: Path, record: Path = RECORD) -> list[str]:
    """Put the times of a run, as the launcher wrote them, into the record; those of notebooks that did not run stay.

    Args:
        profile: of the run.
        output: folder that holds its `runs/`.
        record: file that git tracks.

    Returns:
        Numbers of the notebooks.

    Raises:
        InputError: nothing ran there.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((output / "runs" / profile).glob("[0-9][0-9]_*.json")):
        status = json.loads(path.read_text(encoding="utf-8"))
        if "seconds" in status:
            found[path.name[:2]] = {"seconds": status["seconds"], "peak_bytes": status.get("peak_bytes")}
    if not found:
        raise InputError(f"{output / 'runs' / profile} must hold the record of a run, got none: run ./run_all.sh {profile}")
    known = _read(record)
    machine = this_machine()
    known.setdefault(profile, {}).update({number: {**line, "machine": machine} for number, line in found.items()})
    write_json(record, known)
    return sorted(found)


@functools.cache
def times() -> Mapping[str, str]:
    """The table of time and memory by profile and notebook, and the machines of each profile.

    No mark stands inside the table: a notebook that begins reads its time there.
    """
    known = _read(RECORD)
    numbers = list(config.notebooks())
    rows = [("profile", "models", *numbers, "for"), ("---",) * (len(numbers) + 3)]
    for profile, (models, instead, purpose) in ROWS.items():
        lines = known.get(profile, {})
        cells = [in_words(lines[number]) if number in lines else instead or NOT_RECORDED for number in numbers]
        rows.append((f"`{profile}`", models, *cells, purpose))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    machines = {
        f"{profile}.machine": "; ".join(dict.fromkeys(line["machine"] for line in known.get(profile, {}).values()))
        or NOT_RECORDED
        for profile in PROFILES
    }
    return {"table": f"\n{table}\n", **machines}


def this_machine() -> str:
    """Name the cores and the processor of this machine, such as `2 cores of AMD EPYC`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{psutil.cpu_count(logical=False)} cores of {named[0] if named else platform.processor()}"


def in_words(line: Mapping[str, Any]) -> str:
    """Write the time of a notebook and the most memory it held, where that is known.

    >>> in_words({"seconds": 71.3, "peak_bytes": 1.26e9}), in_words({"seconds": 2960.0, "peak_bytes": None})
    ('71 s, 1.3 GB', '49 min')
    """
    seconds, peak = line["seconds"], line["peak_bytes"]
    time = f"{seconds:.0f} s" if seconds < 2 * MINUTE else f"{seconds / MINUTE:.0f} min"
    return time if peak is None else f"{time}, {peak / GIGABYTE:.1f} GB"


def _read(record: Path) -> dict[str, Any]:
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}

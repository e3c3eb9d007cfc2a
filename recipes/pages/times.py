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
    """Time and memory by profile and notebook, such as `quick.01`, and the machines of a profile."""
    known, found = _read(RECORD), {}
    for profile in PROFILES:
        lines = known.get(profile, {})
        for number in config.notebooks():
            found[f"{profile}.{number}"] = in_words(lines[number]) if number in lines else NOT_RECORDED
        found[f"{profile}.machine"] = "; ".join(dict.fromkeys(line["machine"] for line in lines.values())) or NOT_RECORDED
    return found


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

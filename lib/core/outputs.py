"""The files that the runs of one notebook wrote, so that a later run removes its own leftovers and nothing else."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lib.core import provenance

KINDS = ("figures", "results")


@dataclass
class Outputs:
    """What runs of one notebook with one profile wrote, by name relative to `root`, with the SHA-256 of what was written.

    The manifest `runs/<profile>/NN_name.files.json` follows every write, so that also a killed run's files are known. What is not
    in it was written by somebody else and is never touched, and neither is a file whose content somebody changed.

    Attributes:
        root: the folder that holds `figures/`, `results/` and `runs/`.
        earlier: what earlier runs wrote.
        written: what this run wrote so far.
    """

    root: Path
    profile: str
    notebook: str
    earlier: dict[str, str]
    written: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path, data: bytes) -> None:
        """Write a file in one step and note it.

        Args:
            path: a file below `root`.
            data: its whole content.
        """
        provenance.write_bytes(path, data)
        self.written[path.relative_to(self.root).as_posix()] = hashlib.sha256(data).hexdigest()
        self._note(self.earlier | self.written)

    def finish(self) -> None:
        """Remove what earlier runs wrote and this one did not."""
        for name in self.earlier.keys() - self.written.keys():
            file = self.root / name
            if self._may_be_ours(file) and file.is_file() and provenance.file_hash(file) == self.earlier[name]:
                file.unlink()
        self._note(self.written)

    def _may_be_ours(self, file: Path) -> bool:
        """Tell whether a notebook of this number and profile can have written a file: a damaged manifest may name any."""
        return file.parent in [self.root / kind / self.profile for kind in KINDS] and file.name.startswith(self.notebook[:3])

    def _note(self, files: Mapping[str, str]) -> None:
        provenance.write_json(manifest(self.root, self.profile, self.notebook), files)


def begin(root: Path, profile: str, notebook: str, *, known: Mapping[str, str] | None = None) -> Outputs:
    """Begin a run's list of files.

    Args:
        root: the folder that holds `figures/`, `results/` and `runs/`.
        profile: the profile, whose name is part of every path.
        notebook: file name without ending, such as `01_sink_traces`.
        known: what another record says that earlier runs wrote.

    Returns:
        The list, with what earlier runs wrote.
    """
    return Outputs(root, profile, notebook, {**(known or {}), **read(root, profile, notebook)})


def read(root: Path, profile: str, notebook: str) -> dict[str, str]:
    """Read the manifest of a notebook.

    Args:
        root: the folder that holds `runs/`.
        profile: the profile.
        notebook: file name without ending.

    Returns:
        SHA-256 by name relative to `root`; empty when there is none or it is damaged.
    """
    try:
        found = json.loads(manifest(root, profile, notebook).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(digest, str) for digest in found.values()) else {}


def manifest(root: Path, profile: str, notebook: str) -> Path:
    """Return where the manifest of a notebook lies.

    Args:
        root: the folder that holds `runs/`.
        profile: the profile.
        notebook: file name without ending.
    """
    return root / "runs" / profile / f"{notebook}.files.json"

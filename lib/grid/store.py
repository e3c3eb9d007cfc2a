"""The store of a grid: one JSON file a cell, named by its settings, its code and its data; what is there is never run again."""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from lib.core.errors import InputError, require
from lib.core.provenance import PARTIAL, write_json

FORMAT = "cell of a pruning grid, version 1"
STATUSES = ("done", "failed", "not tested")
NAME = re.compile(r"[0-9a-f]{24}\.json")
OLD_SECONDS = 86400.0
FIELDS = {"settings": dict, "code": str, "data": str, "status": str, "result": dict | None, "reason": str}


@dataclass(frozen=True)
class Record:
    """What became of one cell. It holds no time, no host and no process, so two runs write the same bytes."""

    settings: dict[str, Any]
    code: str  # hashes of what computes it and of its data
    data: str
    status: Literal["done", "failed", "not tested"]
    result: dict[str, Any] | None = None  # when done
    reason: str = ""  # when not done


def cell_id(settings: Mapping[str, Any], *, code: str, data: str) -> str:
    """Name a cell by its settings, the code that computes it, and its data.

    Args:
        settings: plain JSON values; the order of the keys does not matter.
        code: hash of the code.
        data: hash of the data.

    Returns:
        24 hexadecimal digits of a SHA-256.

    Raises:
        InputError: a value does not come back from JSON as it was.

    >>> cell_id({"a": 1, "b": 2}, code="c", data="d") == cell_id({"b": 2, "a": 1}, code="c", data="d")
    True
    """
    cell = {"settings": dict(settings), "code": code, "data": data}
    try:
        text = json.dumps(cell, sort_keys=True, separators=(",", ":"), allow_nan=False)
        plain = json.loads(text) == cell
    except (TypeError, ValueError):
        text, plain = "", False
    require(plain, "settings of a cell must be plain JSON values", repr(settings), "use str, int, float, bool, None, list, dict")
    return sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Store:
    """A folder of records that many processes, on one machine or on several that share the folder, read and write."""

    folder: Path

    def read(self, cell: str) -> Record | None:
        """Read one record.

        Args:
            cell: what `cell_id` returned.

        Returns:
            The record, or None when the cell has none.

        Raises:
            InputError: the file is half written, foreign or renamed.
        """
        path = self.folder / f"{cell}.json"
        try:
            return _parse(path.read_bytes(), cell)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(f"{path} must be the record of its cell, got {error}: delete it and run again") from error

    def write(self, record: Record) -> str:
        """Write one record in one step.

        Args:
            record: the record.

        Returns:
            The cell's id.

        Raises:
            ValueError: the record is not whole, or its result is not plain JSON (NaN, say).
        """
        cell = cell_id(record.settings, code=record.code, data=record.data)
        _check(record)
        write_json(self.folder / f"{cell}.json", {"format": FORMAT, **asdict(record)})
        return cell

    def drop(self, cell: str) -> None:
        """Remove the record and the log of a cell, so that the cell is computed again.

        Args:
            cell: what `cell_id` returned.
        """
        (self.folder / f"{cell}.json").unlink(missing_ok=True)
        self.log(cell).unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        """Name the log of a cell that failed, or of a group; logs are for people and no part of the store's content.

        Args:
            name: id of the cell, or key of the group.

        Returns:
            Path of a text file that may not exist.
        """
        return self.folder / "logs" / f"{name}.txt"

    def ids(self) -> list[str]:
        """List the cells that have a record; files with other names, of whatever program, are not looked at.

        Returns:
            Sorted ids.
        """
        # A listing is asked of the server of a network file system, while the absence of one file is remembered for a time.
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(name.removesuffix(".json") for name in names if NAME.fullmatch(name))

    def missing(self, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Pick the cells that have no record.

        Args:
            cells: each with its `id`.

        Returns:
            Those without a record, in the order given.
        """
        finished = set(self.ids())
        return [cell for cell in cells if cell["id"] not in finished]

    def tidy(self) -> None:
        """Remove parts of records that killed processes left: of records that are finished by now, or a day old."""
        for left in self.folder.glob(f".*{PARTIAL}.json"):
            finished = (self.folder / f"{left.name[1:25]}.json").exists()
            with suppress(FileNotFoundError):  # another driver tidies, too
                if finished or time.time() - left.stat().st_mtime > OLD_SECONDS:
                    left.unlink()


def _parse(content: bytes, cell: str) -> Record:
    """Check that a file's content is a record, and the one of this cell."""
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise ValueError("half a file, or no JSON") from error
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT or fields.keys() != FIELDS.keys():
        raise ValueError("a file of another kind")
    if not all(isinstance(fields[name], kind) for name, kind in FIELDS.items()) or fields["status"] not in STATUSES:
        raise ValueError("fields of another kind")
    record = Record(**fields)
    _check(record)
    got = cell_id(record.settings, code=record.code, data=record.data)
    if got != cell:
        raise ValueError(f"the record of {got}")
    return record


def _check(record: Record) -> None:
    """Refuse a record whose status does not go with its other fields."""
    done = record.status == "done"
    if done != (record.result is not None) or done != (record.reason == ""):
        raise ValueError(f"status {record.status!r} with the result {record.result} and the reason {record.reason!r}")

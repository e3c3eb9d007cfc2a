"""The files of a checkpoint against each other and against known hashes: what its index names, and SHA-256."""

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from lib.checkpoints.files import INDEX, cache_folder, read_json, shard_of, weight_files
from lib.core.errors import InputError, require
from lib.core.provenance import file_hash, write_json, write_text

SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
SUMS = "SHA256SUMS"
SHA256 = re.compile(r"[0-9a-f]{64}")


def check(folder: Path) -> None:
    """Compare a checkpoint with its index and with its known hashes; a file that has not changed is read whole only once.

    What was hashed is remembered in `.cache/hashes/` by size and time of change, because hundreds of variants of one model begin
    with the same 16 GB.

    Args:
        folder: a checkpoint folder.

    Raises:
        InputError: as `check_index` and `check_hashes`.
    """
    check_index(folder)
    check_hashes(folder, remembered=True)


def check_index(folder: Path) -> None:
    """Compare the index of a checkpoint with the shards beside it; reads headers only. Without an index nothing is checked.

    Args:
        folder: a checkpoint folder.

    Raises:
        InputError: a shard that the index names is missing or one that it does not name is there, or a tensor is not, or not
            only, where the index says.
    """
    if not (folder / INDEX).exists():
        return
    where = shard_of(folder / INDEX)
    shards = {file.name: _tensor_names(file) for file in weight_files(folder)}
    others = sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name) and path.name not in shards)
    rule, remedy = f"the shards in {folder} must be those that {INDEX} names", "delete what is left of another download"
    require(not others, rule, f"{', '.join(others)} beside them", remedy)
    found = {(name, shard) for shard, names in shards.items() for name in names}
    for name, shard in sorted(found ^ set(where.items())):
        surplus = f"{name} in {shard}, too" if name in where else f"{name} in {shard} and not in the index"
        problem = surplus if (name, shard) in found else f"no {name} in {shard}"
        raise InputError(f"tensors must lie where {folder / INDEX} says, got {problem}: download the checkpoint again")


def known_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 by file name that somebody else vouches for.

    They come from a `SHA256SUMS` file in the folder (as `sha256sum` writes it), and from the hub's cache, where the link of a
    large file points to a blob whose name is its hash.

    Args:
        folder: a checkpoint folder.

    Raises:
        InputError: a line of SHA256SUMS is not a hash and a name, or the file it names is missing.
    """
    linked = {path.name: path.resolve().name for path in folder.glob("*.safetensors") if path.is_symlink()}
    known = {name: blob for name, blob in linked.items() if SHA256.fullmatch(blob)}
    if not (folder / SUMS).exists():
        return known
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        sha256, _, name = line.partition(" ")
        name = name.strip().removeprefix("*")
        rule = f"{folder / SUMS} must hold a SHA-256 and the name of a file beside it in each line"
        require(bool(SHA256.fullmatch(sha256)) and (folder / name).is_file(), rule, repr(line), "write it again with sha256sum")
        known[name] = sha256
    return known


def check_hashes(folder: Path, *, remembered: bool = False) -> int:
    """Compare files with their known hashes; reads them whole (16 GB take about half a minute).

    Args:
        folder: a checkpoint folder.
        remembered: do not read again what was hashed when it had this size and time of change.

    Returns:
        How many files had a known hash: 0 says that nothing was checked.

    Raises:
        InputError: a file is not what its hash says.
    """
    known = known_hashes(folder)
    for name, sha256 in sorted(known.items()):
        got = remembered_hash(folder / name) if remembered else file_hash(folder / name)
        if got != sha256:
            raise InputError(f"{folder / name} must have SHA-256 {sha256[:16]}..., got {got[:16]}...: download it again")
    return len(known)


def remembered_hash(file: Path) -> str:
    """Return the SHA-256 of a file, read again only when its size or time of change is not what it was.

    Args:
        file: any file.
    """
    file = file.resolve()  # links of the hub's cache, whose file is one for all of them
    record = cache_folder() / "hashes" / f"{hashlib.sha256(str(file).encode()).hexdigest()[:24]}.json"
    before = _state(file)
    with suppress(InputError):  # none, half of one, or somebody else's
        there = read_json(record)
        sha256 = there.pop("sha256", None)
        if there == before and isinstance(sha256, str) and SHA256.fullmatch(sha256):
            return sha256
    got = file_hash(file)
    if _state(file) == before:  # else it was changed while it was read
        with suppress(OSError):  # a folder that cannot be written costs time only
            write_json(record, {**before, "sha256": got})
    return got


def _state(file: Path) -> dict[str, str | int]:
    found = file.stat()
    return {"path": str(file), "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def write_hashes(folder: Path) -> Path:
    """Write SHA256SUMS for the configuration and the weights of a checkpoint, so that a copy can be checked.

    Args:
        folder: a checkpoint folder.

    Returns:
        The file; `sha256sum --check SHA256SUMS` reads it too.

    Raises:
        InputError: no weights, or a shard is missing.
    """
    files = sorted([folder / "config.json", *weight_files(folder)])
    write_text(folder / SUMS, "".join(f"{file_hash(file)}  {file.name}\n" for file in files))
    return folder / SUMS


def _tensor_names(file: Path) -> list[str]:
    """Read the names in the header of a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())

"""Files of a checkpoint folder: where a path leads, what can be read, and what the headers say. Never reads weights."""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from lib.core.config import ROOT, typed_path
from lib.core.errors import InputError, require

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SPARSE = "sparse.safetensors"  # not model.safetensors: transformers would load it and draw the missing weights at random
# Files that make a tokenizer, and all that decide which ids a text becomes, also through a chat template.
WHOLE, VOCABULARY, MERGES, PIECES = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"
TEXT_FILES = ("*token*", "vocab*", "merges.txt", "chat_template*", "additional_chat_templates/*")
SPECIALS = ("tokenizer_config.json", "special_tokens_map.json")  # either may name the mask token
LFS_POINTER = b"version https://git-lfs"
NO_PICKLE = "pickle files are never read"
# What other libraries keep weights in, none of which is read here.
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OTHERS = ("*.h5", "*.msgpack", "*.onnx", "*.npz")


def cache_folder() -> Path:
    """Return the folder for fetched and converted checkpoints, `.cache/` in the project."""
    return ROOT / ".cache"


def local_path(text: str) -> Path:
    """Return the path that a source means.

    A relative one starts where the command was typed, as in every other program and for every folder that is written here.
    What a profile names, such as `models/reference/dlm`, is in the repository, and found there when nothing else has its name.

    Args:
        text: absolute, relative, or from a home folder (`~`).

    Raises:
        InputError: no such home folder, a path that cannot be looked at, or a relative one that lies at both places.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"~ must stand for a home folder, got {text!r}: write the whole path") from error
    if path.is_absolute():
        return path
    typed, own = typed_path(path), ROOT / path
    if not exists(own) or own == typed:
        return typed
    is_one = not exists(typed) or typed.samefile(own)
    rule = f"a relative path must lie where the command was typed or in the repository, and {text} lies in both"
    require(is_one, rule, f"{typed} and {own}", "write the whole path of one of them")
    return own


def exists(path: Path) -> bool:
    """Tell whether a path leads somewhere.

    Raises:
        InputError: it cannot be looked at: no permission, too long a name.
    """
    try:
        return path.exists()
    except OSError as error:
        raise _unreadable(path, error) from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say in one line why a file or folder cannot be read.

    Raises:
        InputError: it cannot.
    """
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    shown = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
    remedies = {PermissionError: "change its permissions, or copy it where you may read", FileNotFoundError: "check the path"}
    remedy = remedies.get(type(error), "check the path and the disk")
    return InputError(f"{shown} must be readable, got {error.strerror or type(error).__name__}: {remedy}")


def listed(folder: Path) -> list[str]:
    """Return the names in a folder.

    Raises:
        InputError: it cannot be listed; `glob` would find nothing there, without a word.
    """
    with readable(folder):
        return sorted(os.listdir(folder))


def lacks_tokenizer(folder: Path) -> str | None:
    """Return what a folder lacks for a tokenizer, by names alone; None when the files are there.

    >>> lacks_tokenizer(ROOT / "models")
    'none of tokenizer.json, vocab.json with merges.txt, tokenizer.model'
    """
    names = set(listed(folder))
    if names & {WHOLE, PIECES} or names >= {VOCABULARY, MERGES}:
        return None
    if VOCABULARY in names:
        return f"{VOCABULARY} without {MERGES}"
    return f"none of {WHOLE}, {VOCABULARY} with {MERGES}, {PIECES}"


def vocabulary_size(folder: Path) -> int | None:
    """Count the tokens of a vocabulary in JSON; None where it has another form."""
    if exists(folder / WHOLE):
        model = read_json(folder / WHOLE).get("model")
        words = model.get("vocab") if isinstance(model, Mapping) else None
    else:
        words = read_json(folder / VOCABULARY) if exists(folder / VOCABULARY) else None
    return len(words) if isinstance(words, Mapping | list) else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, with or without a byte order mark.

    Raises:
        InputError: the file cannot be read, is not JSON, or not an object.
    """
    with readable(path):
        content = path.read_bytes()
    _check_no_pointer(path, content[:64])
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} must be readable JSON, got {reason}: mend it, or download it again if it came cut") from error
    require(isinstance(value, dict), f"{path} must hold an object", type(value).__name__, "restore it, or download it again")
    return value


def stated_mask_token(folder: Path) -> str | None:
    """Return the mask token that the settings of a tokenizer name."""
    found = (read_json(folder / name).get("mask_token") for name in SPECIALS if exists(folder / name))
    return next((said.get("content") if isinstance(said, dict) else said for said in found if said), None)


def names_of(folder: Path) -> list[str]:
    """Return what a checkpoint is called: its id where it lies in the hub's cache, its folder's name, and what it says itself.

    Args:
        folder: with config.json.
    """
    parts = [part.split("--", 2) for part in folder.absolute().parts if part.startswith("models--")]
    said = read_json(folder / "config.json").get("_name_or_path")
    return [*("/".join(part[1:]) for part in parts), folder.name, *([str(said)] if said else [])]


def shard_of(index: Path) -> dict[str, str]:
    """Read which shard each tensor lies in.

    Args:
        index: `model.safetensors.index.json`.

    Raises:
        InputError: an index that does not say it.
    """
    where = read_json(index).get("weight_map")
    says = isinstance(where, dict) and bool(where) and all(isinstance(name, str) for name in where.values())
    require(says, f"{index} must name the file of every tensor in weight_map", repr(where)[:80], "restore the index")
    return dict(cast(Mapping[str, str], where))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: the shards that its index names, or the single file.

    Raises:
        InputError: no safetensors file, a shard that the index names is missing, or a single file besides, which other loaders
            take instead.
    """
    if exists(folder / INDEX):
        names = sorted(set(shard_of(folder / INDEX).values()))
        one = SINGLE in names or not exists(folder / SINGLE)
        rule, remedy = f"{folder} must hold its weights once", "delete what is left of another save or download"
        require(one, rule, f"{SINGLE} beside {INDEX}, which names other files", remedy)
        foreign = [name for name in names if Path(name).name != name]
        require(not foreign, f"{folder / INDEX} must name files beside it", str(foreign[:1]), "restore the index")
        lost = [name for name in names if not exists(folder / name)]
        links = [name for name in lost if (folder / name).is_symlink()]
        require(not links, f"every shard in {folder / INDEX} must be there", f"links to nothing, {links}", _RESTORE_LINK)
        rule = f"every shard in {folder / INDEX} must be there"
        require(not lost, rule, f"none of {lost}", "fetch the shards that are missing")
        return [folder / name for name in names]
    for name in (SINGLE, SPARSE):
        if exists(folder / name):
            return [folder / name]
    raise _no_weights(folder)


_RESTORE_LINK = "copy the file that it should lead to, as cp -L does"


def _no_weights(folder: Path) -> InputError:
    """Say what lies where weights should."""
    names = listed(folder)
    rule = f"a checkpoint must hold {SINGLE}"
    if (folder / SINGLE).is_symlink():
        return InputError(f"{rule}, got a link to nothing, {os.readlink(folder / SINGLE)}, in {folder}: {_RESTORE_LINK}")
    pickles, others = ([name for name in names if any(Path(name).match(each) for each in kind)] for kind in (PICKLES, OTHERS))
    if pickles or others:
        found = (pickles or others)[0]
        how = "if you trust it, load it with transformers and save_pretrained(NEW) writes safetensors"
        return InputError(f"{rule}, got {found} alone in {folder}, and {NO_PICKLE}: {how}")
    loose = [name for name in names if name.endswith(".safetensors")]
    if loose:
        return InputError(f"{rule} or {INDEX}, got {loose[0]} without it in {folder}: copy the index, or rename a single file")
    return InputError(f"{rule}, got none in {folder}: copy the weights beside config.json; {NO_PICKLE}")


def check_safetensors(file: Path) -> dict[str, Any]:
    """Compare the size that a header promises with the size of the file; reads nothing but the header.

    Returns:
        The header's entry of each tensor, with `dtype` and `shape`, by name.

    Raises:
        InputError: no file, one that cannot be read, a pointer in its place, or a cut or foreign one.
    """
    require(not file.is_dir(), f"{file} must be a file", "a folder of that name", "give the folder that config.json lies in")
    with readable(file):
        state = file.stat()
    return _entries(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)  # a header is asked for by every check, and that of thousands of experts is long
def _entries(file: Path, size: int, mtime_ns: int) -> dict[str, Any]:
    remedy = "fetch it again"
    with readable(file), file.open("rb") as stream:
        head = stream.read(64)
        _check_no_pointer(file, head)
        length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else size + 1
        if length > size - 8:
            raise InputError(f"{file} must be a whole safetensors file, got a cut or foreign one ({size} bytes): {remedy}")
        stream.seek(8)
        header = _parsed(stream.read(length), file)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    require(expected == size, f"{file} must be {expected} bytes long as its header says", str(size), remedy)
    return entries


def _parsed(header: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(header)
    except ValueError as error:
        raise InputError(f"{file} must have a readable safetensors header, got damage: fetch it again") from error
    is_header = isinstance(value, Mapping) and all(isinstance(entry, Mapping) for entry in value.values())
    require(is_header, f"{file} must have a readable safetensors header", "another JSON", "fetch it again")
    return dict(value)


def _check_no_pointer(file: Path, head: bytes) -> None:
    """Refuse what git leaves in a file's place when its large files were not fetched."""
    rule, remedy = f"{file} must hold the file itself", "run `git lfs pull` in its folder"
    require(not head.startswith(LFS_POINTER), rule, "a pointer of Git LFS", remedy)

"""Which GGUF file a folder means, its parts, what it says before its weights, and whether that can be read. Reads no weights."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.checkpoints import files
from lib.core.errors import InputError, require

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
SIGNATURE = b"GGUF"
ARCHITECTURES = ("llama", "qwen2", "llada", "dream")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and how: its file, first byte, bytes, shape in the order of torch, and the number of its kind."""

    part: Path
    start: int
    size: int
    shape: tuple[int, ...]
    kind: int


@dataclass(frozen=True)
class Header:
    """What the parts of one GGUF say before their weights.

    Attributes:
        parts: the files, in order.
        values: the key-value fields of the first part; lists only as their length.
        tensors: where each lies, by name.
    """

    parts: tuple[Path, ...]
    values: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def architecture(self) -> str:
        """Name of the kind of network, as llama.cpp calls it."""
        return str(self.values["general.architecture"])

    def own(self, key: str, default: Any = None) -> Any:
        """Return a field of the architecture, `default` when it is not there."""
        return self.values.get(f"{self.architecture}.{key}", default)


def find(folder: Path) -> Path | None:
    """Return the GGUF file that a folder means (or the file itself), the first part of a divided one; None without any.

    Beside safetensors weights a GGUF is a copy for other programs, and not meant.

    Raises:
        InputError: several, or a folder that cannot be listed.
    """
    if folder.is_file():
        return _first_part(folder) if folder.suffix == ".gguf" else None
    if not folder.is_dir():
        return None
    names = files.listed(folder)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return None
    found = sorted({_first_part(folder / name) for name in names if name.endswith(".gguf")})
    rule, remedy = f"{folder} must hold one GGUF", f"name the file, such as {found[0] if found else ''}"
    require(len(found) < 2, rule, ", ".join(path.name for path in found), remedy)
    return found[0] if found else None


def parts_of(file: Path) -> tuple[Path, ...]:
    """Return the files of a GGUF, in order: itself, or those it is divided into.

    Raises:
        InputError: a part is missing.
    """
    named = PART.fullmatch(file.name)
    if named is None:
        return (file,)
    count = int(named["count"])
    parts = [file.with_name(f"{named['stem']}-{number:05d}-of-{named['count']}.gguf") for number in range(1, count + 1)]
    lost = [part.name for part in parts if not files.exists(part)]
    rule = f"a divided GGUF must have all {count} parts in {file.parent}"
    require(not lost, rule, f"no {', '.join(lost[:3])}", "fetch what is missing")
    return tuple(parts)


def _first_part(file: Path) -> Path:
    named = PART.fullmatch(file.name)
    return file if named is None else file.with_name(f"{named['stem']}-00001-of-{named['count']}.gguf")


def read(file: Path, *, lists: Sequence[str] = ()) -> Header:
    """Read what a GGUF says before its weights, and check that every part is whole and of an architecture that is read here.

    Args:
        file: the file, or its first part.
        lists: keys of lists that are read whole.

    Raises:
        InputError: no GGUF, a cut one, missing parts, or another kind of network.
    """
    parts = parts_of(file)
    found_parts = [_header_of(part, lists) for part in parts]
    values = found_parts[0][0]
    tensors = {name: place for _, places in found_parts for name, place in places.items()}
    count = values.get("split.tensors.count", len(tensors))
    require(count == len(tensors), f"{file.name} must hold {count} tensors as it says", str(len(tensors)), _whole(len(parts)))
    found = str(values["general.architecture"])
    rule = f"a GGUF must be of {', '.join(ARCHITECTURES)}"
    require(found in ARCHITECTURES, rule, f"{found} in {file}", "use the safetensors of the model, where its family is supported")
    return Header(parts, values, tensors)


def _whole(parts: int) -> str:
    return "fetch it again" if parts == 1 else "take all parts from one division"


def _header_of(part: Path, lists: Sequence[str]) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Return the fields and the tensors of one file."""
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    require(not part.is_dir(), f"{part} must be a file", "a folder of that name", "name the file")
    with files.readable(part), part.open("rb") as stream:
        head = stream.read(64)
    require(not head.startswith(files.LFS_POINTER), f"{part} must hold the file itself", "a pointer of Git LFS", "git lfs pull")
    rule, again = f"{part} must start with the GGUF signature", "give a GGUF file"
    require(head.startswith(SIGNATURE), rule, "something else", again)
    try:
        values, _ = read_gguf_metadata(str(part), tuple(lists))
        read = GgufHeader.from_file(str(part))
    except Exception as error:  # cut anywhere, of another version, or with a kind of tensor that nobody here knows
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise InputError(
            f"{part} must be a whole GGUF file, got {reason}: fetch it again, or take another quantization"
        ) from error
    places = {
        info.name: Stored(part, read.data_start + info.offset, info.nbytes, info.shape, info.ggml_type) for info in read.tensors
    }
    end = max((place.start + place.size for place in places.values()), default=0)
    size = part.stat().st_size
    require(size >= end, f"{part} must be a whole GGUF file of {end} bytes as its header says", f"{size} bytes", "fetch it again")
    return values, places

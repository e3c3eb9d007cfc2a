"""Where a number came from: hashes of its inputs, versions of what computed it, and writes that never leave half a file."""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from lib.core import python_code
from lib.core.config import typed_path

LIB = Path(__file__).resolve().parents[1]
VERSIONED = ("torch", "transformers", "numpy", "scipy", "tokenizers")
PARTIAL = ".partial"
DECIDING = ("lib", "configs", "data", "models", "notebooks")  # folders whose content decides what a notebook writes
# What they return counts by its values.
SETTINGS_MODULES = ("lib/core/config.py", "lib/core/sections.py", "lib/core/settings/grid.py")
# Text about data and weights changes no number, and neither do files that the system leaves behind.
IGNORED_SUFFIXES = frozenset({".md", ".pyc"})
GENERATED = re.compile(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", re.DOTALL)  # written from results, so no input of them


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Give a temporary path to write to, and put it in the place of `path` when the block ends without an error.

    A kill at any moment leaves either the old file or the new one, never half of one.

    Args:
        path: the file to write; its folder is made when missing.

    Yields:
        A hidden path in the same folder with the same suffix, so that writers which look at the suffix still work.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "table.csv"
    >>> with replacing(target) as partial:
    ...     _ = partial.write_text("a,b")
    >>> target.read_text(), [entry.name for entry in target.parent.iterdir()]
    ('a,b', ['table.csv'])
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{PARTIAL}{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file in one step.

    Args:
        path: the file to write; its folder is made when missing.
        data: the whole content.
    """
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file in one step, with `\\n` line ends on every system.

    Args:
        path: the file to write; its folder is made when missing.
        text: the whole content.
    """
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: object) -> None:
    """Write JSON with sorted keys in one step, so that equal values give equal files.

    Args:
        path: the file to write; its folder is made when missing.
        value: what `json` can hold; NaN is refused because other readers of JSON refuse it.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """Write JSON with sorted keys, as `write_json` does.

    Args:
        value: what `json` can hold.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def file_hash(path: Path | str) -> str:
    """Hash the content of one file.

    Args:
        path: a file that exists.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def files_below(folder: Path | str) -> list[Path]:
    """List the files below a folder that can change a number.

    Args:
        folder: a folder, or a single file, which then is its own list; missing gives an empty list.

    Returns:
        Sorted paths, without hidden files, caches and Markdown.
    """
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in IGNORED_SUFFIXES)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def folder_hash(paths: Iterable[Path], root: Path) -> str:
    """Hash names and contents of several files, whatever folder the clone lies in.

    Args:
        paths: files; the order does not matter.
        root: folder that the names are taken relative to.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        ValueError: a path is not below `root`.
    """
    # Not resolved: the files of a checkpoint in the hub's cache are links to another folder.
    names = {path.absolute().relative_to(root.absolute()).as_posix(): path for path in paths if "__pycache__" not in path.parts}
    return _digest([[name, file_hash(names[name])] for name in sorted(names)])


def code_hash(paths: Iterable[Path], root: Path) -> str:
    """Hash names and code of Python files, without those that read settings.

    What only people read there does not matter, see `python_code.code_only`.

    Args:
        paths: files; the order does not matter.
        root: folder that the names are taken relative to.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        ValueError: a path is not below `root`.
    """
    names = {path.resolve().relative_to(root.resolve()).as_posix(): path for path in paths}
    names = {name: path for name, path in names.items() if name not in SETTINGS_MODULES}
    return _digest([[name, python_code.code_only(names[name].read_text(encoding="utf-8"))] for name in sorted(names)])


def notebook_source_hash(path: Path | str) -> str:
    """Hash what a notebook does: cell types, sources and tags; outputs, execution counts and generated blocks do not matter.

    Args:
        path: a notebook file.

    Returns:
        SHA-256 in hexadecimal.
    """
    return _digest([[kind, GENERATED.sub("", source), tags] for kind, source, tags in _cells(Path(path))])


def modules_reached(notebook: Path | str, *, lib: Path = LIB) -> list[Path]:
    """List the modules of `lib` that a notebook imports, directly or through other modules.

    Work on another notebook's module then leaves this notebook's results valid.

    Args:
        notebook: a notebook file.
        lib: the folder of the package.

    Returns:
        Sorted paths of Python files, the package's `__init__.py` always among them.
    """
    code = "\n".join(source for kind, source, _ in _cells(Path(notebook)) if kind == "code")
    return python_code.modules_reached(code, lib)


def fingerprint(
    notebook: Path | str,
    *,
    config: Mapping[str, object],
    model_folders: Sequence[Path] | None = None,
    root: Path | None = None,
) -> str:
    """Hash everything that decides what a notebook writes.

    These are its cells, the code of the modules it reaches, the settings (without the sections that bear the name of another
    notebook), the files of `data/` that cells or modules name, and the files of each model. It is the same on every machine and
    in every folder.

    Args:
        notebook: a notebook file, named `NN_section.ipynb`.
        config: settings as plain values; seed and overrides are part of them.
        model_folders: local folders or files of the models in use, a missing one counts as missing; by default those that
            `config["models"]` names. A hub id or a wheel is known by its pinned revision, which `config` holds.
        root: the repository; by default the one that this module lies in.

    Returns:
        SHA-256 in hexadecimal.
    """
    notebook, root = Path(notebook), root or LIB.parent
    folders = local_models(config, root=root) if model_folders is None else model_folders
    modules = modules_reached(notebook, lib=root / "lib")
    others = {path.stem[3:] for path in notebook.parent.glob("[0-9][0-9]_*.ipynb")} - {notebook.stem[3:]}
    return _digest(
        {
            "notebook": notebook_source_hash(notebook),
            "lib": code_hash(
                [path for path in modules if path.relative_to(root / "lib").as_posix() not in SETTINGS_MODULES], root
            ),
            "config": {key: value for key, value in config.items() if key not in others},
            "data": folder_hash(data_named(notebook, modules, root=root), root),
            "models": [_model_hash(Path(folder)) for folder in folders],
        }
    )


def data_named(notebook: Path | str, modules: Iterable[Path], *, root: Path) -> list[Path]:
    """List the files of `data/` whose name, or the name of whose folder, a notebook's cells or its modules mention.

    Args:
        notebook: a notebook file.
        modules: the modules it reaches.
        root: the repository.

    Returns:
        Sorted paths.
    """
    code = [source for kind, source, _ in _cells(Path(notebook)) if kind == "code"]
    words = set(re.findall(r"\w+", "\n".join(code + [path.read_text(encoding="utf-8") for path in modules])))
    files = [path for path in files_below(root / "data") if path.name != "README.md"]
    return sorted(path for path in files if {path.stem, *path.relative_to(root / "data").parts[:-1]} & words)


def local_models(config: Mapping[str, object], *, root: Path) -> list[Path]:
    """List the model folders that the settings name, leaving out hub ids and wheels.

    Args:
        config: settings as plain values, with `models` as name to `{"source": ..., "revision": ...}`, and sections that may
            have a list `extra_models`.
        root: the repository; a relative source lies there or where the command was typed, see `files.local_path`.

    Returns:
        Folders or files that exist, in the order of the models' names, then the extra ones.
    """
    models = config.get("models")
    sources = [str(models[name]["source"]) for name in sorted(models)] if isinstance(models, Mapping) else []
    for _, section in sorted(config.items()):
        extra = section.get("extra_models", ()) if isinstance(section, Mapping) else ()
        sources += [str(source) for source in extra]
    places = [(root / Path(source).expanduser(), typed_path(source)) for source in sources]
    return [own if own.exists() else typed for own, typed in places if own.exists() or typed.exists()]


def versions() -> dict[str, str]:
    """Name the versions that can change a number.

    Returns:
        Version by name, Python first (its patch version changes no number); a package that is not installed is left out.
    """
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path | None = None) -> str:
    """Name the commit that the code is of.

    Args:
        root: the repository; by default the one that this module lies in.

    Returns:
        Its first twelve digits, with `+` behind them where what decides results was changed since; `unknown` outside of a clone.
    """
    root = (root or LIB.parent).resolve()
    git = ["git", "-C", str(root)]
    try:
        found = subprocess.run([*git, "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True, check=True)
        top, head = found.stdout.split("\n")[:2]
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *DECIDING], capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head[:12] + ("+" if changed else "") if Path(top).resolve() == root else "unknown"


def _digest(value: object) -> str:
    """Hash a plain value through its canonical JSON; what JSON lacks (a path, say) counts by its text."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _cells(path: Path) -> list[tuple[str, str, list[str]]]:
    """Read kind, source and tags of each cell; a source may be stored as one string or as lines."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"]), sorted(cell["metadata"].get("tags", []))) for cell in cells]


def _model_hash(folder: Path) -> str:
    """Hash a model's files under its folder's own name, so that the place of the folder does not matter."""
    files = files_below(folder)
    return folder_hash(files, folder.parent) if files else f"missing: {folder.name}"

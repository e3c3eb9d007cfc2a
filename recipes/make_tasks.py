"""Write the questions of `data/tasks/` from files that ship, without the network: `python -m recipes.make_tasks`.

Everything is chosen by SHA-256 of titles and questions, so that no library's random numbers can move a question.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.core.provenance import write_text
from lib.texts.articles import DATA, read_rows, shorten
from recipes.family import tasks as family

CHOICE_DOCUMENTS = 240
TEXT_CHARS = 150  # 300 gave the diffusion model the same accuracy for half as many tokens again
PUZZLES_PER_ANSWER = 25
PUZZLE_CHARS = 230  # about 55 tokens; longer ones are left out of the training too
PUZZLE_SEED = 1_000_001  # reasoning-gym seeds item i with seed + i: far from every training seed
PUZZLE_POOL = 1500
FAMILY_TASKS = (*family.MAKERS, "tiny_facts")
FAMILY_DOCUMENTS = 4000  # half a point shows when one document in forty differs between two models
# None of the names that training puzzles use, so that no puzzle is one that was trained on. Alice is obligatory there.
MEN = "Edward Frank George Henry Paul Peter Simon Victor".split()
WOMEN = "Anna Clara Emma Helen Julia Laura Rose Ruth Alice".split()
ANSWERS = "234567"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines, one row a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def text_hash(*parts: str) -> str:
    """Rank texts in an order that no run, machine or Python version changes."""
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def chosen(articles: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the first `CHOICE_DOCUMENTS` articles by hash of the title, in that order."""
    return sorted(articles, key=lambda row: text_hash(row["title"]))[:CHOICE_DOCUMENTS]


def description_rows(articles: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Ask which of four descriptions fits an article; the others belong to other articles, the right one's place goes round."""
    described = [row for row in articles if row["description"]]
    rows = []
    for number, row in enumerate(chosen(described)):
        others = [other for other in described if other["description"].lower() != row["description"].lower()]
        ranked = sorted(others, key=lambda other: text_hash(row["title"], other["title"]))
        choices = list(dict.fromkeys(other["description"] for other in ranked))[:3]
        choices.insert(number % 4, row["description"])
        text = shorten(row["extract"], TEXT_CHARS)
        rows.append({"title": row["title"], "text": text, "choices": choices, "label": number % 4})
    return rows


def topic_rows(articles: list[dict[str, str]]) -> list[dict[str, str]]:
    """Ask for the topic of a described article (`Uncategorized` is none); the task's YAML lists all of them."""
    asked = chosen([row for row in articles if row["description"] and row["topic"] != "Uncategorized"])
    return [{name: row[name] for name in ("title", "description", "topic")} for row in asked]


def puzzles() -> Iterator[dict[str, str]]:
    """Yield distinct family puzzles about people that training never mentions in a puzzle."""
    from reasoning_gym import create_dataset

    source = create_dataset("aiw", size=PUZZLE_POOL, seed=PUZZLE_SEED, male_names=MEN, female_names=WOMEN)
    seen = {""}
    for index in range(PUZZLE_POOL):
        item = source[index]
        question = item["question"].split(" Give the result")[0].strip()
        if question not in seen and "Alice" not in question and len(question) <= PUZZLE_CHARS:
            seen.add(question)
            yield {"question": question, "answer": str(item["answer"])}


def word_problem_rows() -> list[dict[str, str]]:
    """Return as many puzzles for each answer, so that always giving one answer is right in a sixth of them."""
    by_answer = {answer: [row for row in puzzles() if row["answer"] == answer] for answer in ANSWERS}
    rows = itertools.chain.from_iterable(found[:PUZZLES_PER_ANSWER] for found in by_answer.values())
    return sorted(rows, key=lambda row: text_hash(row["question"]))


def family_rows(task: str) -> list[dict[str, str]]:
    """Return the test's questions of a task of the embedded family, and their answers as lm_eval compares them: stripped."""
    documents = family.test_documents(task, FAMILY_DOCUMENTS)
    texts = [{side: "".join(text for text, is_answer in one if is_answer is side) for side in (False, True)} for one in documents]
    return [{"question": one[False], "answer": one[True].strip()} for one in texts]


def write_tasks(out: Path, *, articles: list[dict[str, str]]) -> None:
    """Write the questions of the local tasks into a folder (`tiny_sums` asks those of `sums_test.jsonl`)."""
    write_rows(out / "tiny_description.jsonl", description_rows(articles))
    write_rows(out / "tiny_topic.jsonl", topic_rows(articles))
    write_rows(out / "tiny_word_problems.jsonl", word_problem_rows())
    for task in FAMILY_TASKS:
        write_rows(out / f"{task}.jsonl", family_rows(task))


def main() -> None:
    """Write the questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DATA / "tasks", help="folder to write to (default data/tasks/)")
    write_tasks(parser.parse_args().out, articles=read_rows("articles_evaluation"))


if __name__ == "__main__":
    main()

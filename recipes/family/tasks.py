"""The questions of the family: each is a document of prompt and answer, made from a number, and held out by a hash.

A document is a list of pieces; a piece is text and whether it is answer. `tiny_add`, `tiny_sort` and `tiny_sudoku` have answers
that follow from the prompt, the answer of `tiny_recall` stands in the prompt, that of `tiny_facts` in the weights alone.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from recipes.corpus import percent_hash

Piece = tuple[str, bool]  # text, whether it is answer
Document = list[Piece]

SORTED_NUMBERS = 4
HIDDEN_CELLS = 9
MOST_STATEMENTS = 4
PEOPLE = 1000
ASKED_PEOPLE = 333  # whose facts training also asks for; the test asks for the others'
HELD_OUT_FROM = 95

FIRST = (
    "Ada Alan Anna Ben Boris Carla Clara David Diana Edgar Elsa Emil Fanny Felix Flora Georg Greta Hanna Hugo Ida "
    "Ivan Jacob Julia Karl Kurt Laura Leo Lina Lucas Maria Martin Nina Oscar Otto Paula Peter Rosa Simon Sofia Victor"
).split()
LAST = (
    "Abel Adler Bach Baker Berg Brand Brown Cole Cook Dahl Dean Ford Fox Frank Grant Gray Hall Hart Hill Hunt "
    "King Lang Lee Long Marsh Mills Moss Nash Park Penn Price Reed Rice Rose Shaw Stone Ward West Wolf Young"
).split()
VALUES = {
    "city": (
        "Rome Paris London Berlin Vienna Madrid Athens Cairo Moscow Dublin Lisbon Oslo Prague Warsaw Venice Boston Chicago Tokyo "
        "Delhi Sydney Geneva Milan Naples Munich Hamburg Bremen Dresden Lyon Toledo Seville"
    ).split(),
    "work": (
        "doctor lawyer teacher farmer painter writer singer actor soldier sailor baker tailor hunter miner banker judge nurse "
        "cook pilot driver poet priest builder dancer smith clerk guard guide editor engineer"
    ).split(),
    "pet": "dog cat horse bird fish goat sheep duck snake mouse rabbit turtle parrot frog lion monkey wolf bear fox cow".split(),
    "food": (
        "bread rice cheese butter soup meat sugar honey fruit milk corn wheat beans salt apples oranges lemons nuts eggs grapes"
    ).split(),
    "sport": "football tennis golf boxing chess hockey rugby running swimming rowing cricket racing".split(),
    "colour": "red blue green yellow black white brown grey orange purple pink gold".split(),
}
LIKED = tuple(itertools.chain(VALUES["pet"], VALUES["food"], VALUES["sport"], VALUES["colour"]))


def add(rng: random.Random) -> Document:
    """Add two three-digit numbers: `472+589=` `1061`, zeros in front where digits are missing."""
    left, right = rng.randrange(1000), rng.randrange(1000)
    return [(f"{left:03}+{right:03}=", False), (f"{left + right:04}", True)]


def sort(rng: random.Random) -> Document:
    """Sort two-digit numbers: `72 15 48 03 >` ` 03 15 48 72`."""
    numbers = [f"{rng.randrange(100):02}" for _ in range(SORTED_NUMBERS)]
    return [(" ".join(numbers) + " >", False), ("".join(f" {number}" for number in sorted(numbers)), True)]


@cache
def grids() -> tuple[str, ...]:
    """Return the 288 filled 4 x 4 grids, rows joined."""
    rows = ["".join(row) for row in itertools.permutations("1234")]

    def fits(grid: Sequence[str]) -> bool:
        """Tell whether no column and no box of the rows so far holds a digit twice."""
        columns = all(len(set(column)) == len(grid) for column in zip(*grid, strict=True))
        boxes = [
            {*grid[top][left : left + 2], *grid[top + 1][left : left + 2]}
            for top in range(0, len(grid) - 1, 2)
            for left in (0, 2)
        ]
        return columns and all(len(box) == 4 for box in boxes)

    found = [[row] for row in rows]
    for _ in range(3):
        found = [[*grid, row] for grid in found for row in rows if fits([*grid, row])]
    return tuple("".join(grid) for grid in found)


def relabelled(grid: str) -> str:
    """Return the grid with its digits renamed so that the first row reads 1234: the same for all copies of a grid."""
    return grid.translate(str.maketrans(grid[:4], "1234"))


def solutions(puzzle: str) -> list[str]:
    """Return the grids that agree with a puzzle in which 0 stands for a hidden cell."""
    given = [(cell, digit) for cell, digit in enumerate(puzzle) if digit != "0"]
    return [grid for grid in grids() if all(grid[cell] == digit for cell, digit in given)]


def in_rows(cells: str) -> str:
    """Write sixteen cells as four rows with slashes between them."""
    return "/".join(cells[start : start + 4] for start in range(0, 16, 4))


def sudoku(rng: random.Random) -> Document:
    """Fill a 4 x 4 grid with one solution: `2003/0010/1030/3021=` `2143/4312/1234/3421`."""
    grid = rng.choice(grids())
    while True:
        hidden = rng.sample(range(16), HIDDEN_CELLS)
        puzzle = "".join("0" if cell in hidden else digit for cell, digit in enumerate(grid))
        if len(solutions(puzzle)) == 1:
            return [(f"{in_rows(puzzle)}=", False), (in_rows(grid), True)]


def recall(rng: random.Random, *, statements: int | None = None, questions: int | None = None) -> Document:
    """Ask who likes what of two to four statements: `Ada likes rice. Ben likes golf. Who likes golf?` ` Ben`."""
    count = statements or rng.randint(2, MOST_STATEMENTS)
    people, things = rng.sample(FIRST, count), rng.sample(LIKED, count)
    pairs = list(zip(people, things, strict=True))
    told = " ".join(f"{name} likes {thing}." for name, thing in pairs)
    asked = rng.sample(pairs, questions or rng.randint(1, count))
    pieces: Document = [(told, False)]
    for name, thing in asked:
        pieces += [(f" Who likes {thing}?", False), (f" {name}", True)]
    return pieces


@cache
def people() -> tuple[tuple[str, dict[str, str]], ...]:
    """Return the invented people and their facts, in an order by hash; the first `ASKED_PEOPLE` are asked about in training."""
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"people|{name}".encode()).hexdigest())[:PEOPLE]
    return tuple((name, {key: _fact(name, key) for key in VALUES}) for name in ranked)


def _fact(name: str, key: str) -> str:
    digest = hashlib.sha256(f"fact|{name}|{key}".encode()).digest()
    return VALUES[key][int.from_bytes(digest[:4], "big") % len(VALUES[key])]


def biography(rng: random.Random, *, number: int) -> Document:
    """Tell the facts of one person in any order: `Ida Berg: city Oslo, pet cat, ...`; what is told of is answer."""
    name, facts = people()[number % PEOPLE]
    keys = rng.sample(list(facts), len(facts))
    pieces: Document = [(f"{name}:", False)]
    for position, key in enumerate(keys):
        pieces += [(f"{',' if position else ''} {key}", False), (f" {facts[key]}", True)]
    return pieces


def question(number: int, *, asked: bool) -> Document:
    """Ask for one fact: `Which pet has Ida Berg?` ` cat`, of the people whom training asks about, or of the others."""
    chosen = people()[:ASKED_PEOPLE] if asked else people()[ASKED_PEOPLE:]
    name, facts = chosen[number // len(VALUES) % len(chosen)]
    key = list(facts)[number % len(VALUES)]
    return [(f"Which {key} has {name}?", False), (f" {facts[key]}", True)]


def key_of(task: str, document: Document) -> str:
    """Return the text whose hash decides on which side of the split a document stands."""
    prompt, answer = document[0][0], document[1][0]
    if task == "tiny_sudoku":
        return relabelled(answer.replace("/", ""))
    if task == "tiny_sort":
        return answer  # every order of the same numbers
    return prompt


def is_held_out(task: str, document: Document) -> bool:
    """Tell whether a generated document may be asked in the test only.

    Two of the twelve grids are held out, with every copy of theirs that other digits make; of the rest one in twenty.
    """
    if task == "tiny_sudoku":
        return key_of(task, document) in held_out_grids()
    return percent_hash(f"{task}|{key_of(task, document)}") >= HELD_OUT_FROM


@cache
def held_out_grids() -> frozenset[str]:
    """Return two of the grids whose first row reads 1234, chosen by hash."""
    ranked = sorted({relabelled(grid) for grid in grids()}, key=lambda grid: hashlib.sha256(grid.encode()).hexdigest())
    return frozenset(ranked[:2])


MAKERS: dict[str, Callable[[random.Random], Document]] = {
    "tiny_add": add,
    "tiny_sort": sort,
    "tiny_sudoku": sudoku,
    "tiny_recall": recall,
}


def training_document(task: str, number: int, *, seed: int) -> Document:
    """Return the training document of this number; the same for every member, and never one of the test's."""
    rng = random.Random(f"train|{task}|{seed}|{number}")
    if task == "tiny_facts":
        return question(rng.randrange(ASKED_PEOPLE * len(VALUES)), asked=True)
    if task == "biographies":
        return biography(rng, number=number)
    while True:
        document = MAKERS[task](rng)
        if not is_held_out(task, document):
            return document


def test_documents(task: str, count: int) -> list[Document]:
    """Return distinct documents of the test: held out by hash; of `tiny_facts` the people whom training never asks about."""
    if task == "tiny_facts":
        total = (PEOPLE - ASKED_PEOPLE) * len(VALUES)
        order = sorted(range(total), key=lambda number: hashlib.sha256(f"test|{number}".encode()).hexdigest())
        return [question(number, asked=False) for number in order[:count]]
    return list(itertools.islice(_held_out(task), count))


def _held_out(task: str) -> Iterator[Document]:
    rng = random.Random(f"test|{task}")
    seen: set[str] = set()
    while True:
        document = recall(rng, statements=MOST_STATEMENTS, questions=1) if task == "tiny_recall" else MAKERS[task](rng)
        if is_held_out(task, document) and document[0][0] not in seen:
            seen.add(document[0][0])
            yield document


def topic_document(row: dict[str, str]) -> Document:
    """Ask for the topic of a described article, in the words of `tiny_topic`."""
    return [(f"Title: {row['title']}\nDescription: {row['description']}\nTopic:", False), (f" {row['topic']}", True)]


def description_document(row: dict[str, str], text: str) -> Document:
    """Ask for the description of an article, in the words of `tiny_description`."""
    return [(f"Title: {row['title']}\nText: {text}\nDescription:", False), (f" {row['description']}", True)]

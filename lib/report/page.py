"""One self-contained page with every verdict, table and figure of a profile, readable without a network."""

import base64
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import jinja2

from lib.core import config, provenance
from lib.core.errors import InputError
from lib.report import animation
from lib.report.markdown import counted, is_of_the_digest
from lib.report.results import MODEL_FIELDS, SIGNS, count_verdicts, evidence_of, in_words, interval_text, load_results
from lib.report.tables import NO_ROWS, significant

TEMPLATES = Path(__file__).resolve().parent / "templates"
MEDIA = {".png": "image/png", ".gif": "image/gif"}
MAX_ROWS = 60
MISSING = "–"  # where a table gives no value


def build(profile: str, *, root: Path | None = None) -> Path:
    """Write `results/<profile>/report.html` from the result files of a profile.

    Args:
        profile: `quick`, `full` or `paper`.
        root: folder that holds `results/` and `figures/`; the output folder when None.

    Returns:
        The page. With no results it says what is missing and how to get it.

    Raises:
        InputError: unknown profile, or a result file that is damaged or names a file that is not there.
    """
    if profile not in config.PROFILES:
        raise InputError(f"profile must be one of {', '.join(config.PROFILES)}, got {profile!r}: choose one of them")
    root = root or config.output_root()
    path = root / "results" / profile / "report.html"
    provenance.write_text(path, render(profile, root=root))
    return path


def render(profile: str, *, root: Path) -> str:
    """Make the text of the page.

    Args:
        profile: `quick`, `full` or `paper`.
        root: folder that holds `results/` and `figures/`.

    Returns:
        HTML that refers to no other file.

    Raises:
        InputError: as for `build`.
    """
    results = load_results(profile, root=root)
    notebooks = [_notebook_view(result, root) for result in results]
    claims = [claim for notebook in notebooks for claim in notebook["claims"]]
    done = {result["notebook"] for result in results}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("report.html.j2").render(
        profile=profile,
        notebooks=notebooks,
        claims=claims,
        counts=count_verdicts(claims),
        signs=SIGNS,
        kinds={"figure": "Figure", "animation": "Animation", "page": "To try"},
        tables=sum(len(notebook["tables"]) for notebook in notebooks),
        figures=sum(len(notebook["figures"]) for notebook in notebooks),
        no_rows=NO_ROWS,
        missing=[path.stem for path in config.notebooks().values() if path.stem not in done],
    )


def _notebook_view(result: dict[str, Any], root: Path) -> dict[str, Any]:
    """Add to a result what the page shows: texts of intervals, rows of tables, images as data."""
    return {
        **result,
        "claims": [_claim_view(claim, result) for claim in result["claims"]],
        "tables": [_table_view(table, root) for table in result["tables"]],
        "figures": [_figure_view(figure, root) for figure in result["figures"]],
        "models": [{**dict.fromkeys(MODEL_FIELDS), **model, "words": in_words(model)} for model in result["models"]],
        "settings": json.dumps(result["config"], indent=2, sort_keys=True, ensure_ascii=False),
    }


def _claim_view(claim: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Add the text of the interval, what is counted, whose claim it is, and where rule, table and figure stand on the page."""
    place, number = f"claim-{result['number']}-{claim['key']}-{claim['model']}", result["number"]
    links = {kind: f"n{number}-{kind}-{name}" for kind, name in evidence_of(result, claim).items()}
    return {
        **claim, "shown": interval_text(claim["estimate"], claim["interval"]), "counted": counted(claim, number), "links": links,
        "of_the_digest": is_of_the_digest(claim), "place": re.sub(r"[^a-z0-9]+", "-", place.lower()),
    }  # fmt: skip


def _figure_view(figure: dict[str, Any], root: Path) -> dict[str, Any]:
    """Add the picture as data, a still one of an animation, or the whole of an interactive page."""
    path = root / figure["file"]
    view = {"data": None, **figure}
    if figure["kind"] == "page":
        return {**view, "html": _read(path).decode()}
    still = animation.still(_read(path)) if figure["kind"] == "animation" else None
    return {**view, "src": _data_uri(path), "still": None if still is None else _as_uri(".png", still)}


def _table_view(table: dict[str, Any], root: Path) -> dict[str, Any]:
    """Read a table's file; long tables show their first rows and say where the others are."""
    header, *rows = list(csv.reader(io.StringIO(_read(root / table["file"]).decode(), newline=""))) or [[]]
    columns = [_column([row[i] for row in rows[:MAX_ROWS]], name in table["text"], table) for i, name in enumerate(header)]
    more = f" The first {MAX_ROWS} of {len(rows)} rows; all are in the file." if len(rows) > MAX_ROWS else ""
    return {
        **table,
        "header": header,
        "kinds": [kind for kind, _ in columns],
        "rows": list(zip(*(cells for _, cells in columns), strict=True)),
        "caption": table["caption"] + more,
    }


def _column(cells: list[str], is_text: bool, table: dict[str, Any]) -> tuple[str, list[str]]:
    """Return how a column is set, and its cells: rounded when a number has a fraction, words and whole numbers as they are."""
    cells = cells if is_text else [MISSING if cell == "NaN" else cell for cell in cells]
    numbers = [] if is_text else [cell for cell in cells if _is_number(cell)]
    is_number = bool(numbers) and len(numbers) + cells.count(MISSING) == len(cells)
    kind = "number" if is_number else "text" if max(map(len, cells), default=0) > 24 else ""
    if all(cell.lstrip("-").isdigit() for cell in numbers):
        return kind, cells
    return kind, [significant(float(cell), table.get("digits", 3)) if _is_number(cell) else cell for cell in cells]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _data_uri(path: Path) -> str:
    if path.suffix not in MEDIA:
        raise InputError(f"a figure must be a PNG or GIF file, got {path}: run its notebook again")
    return _as_uri(path.suffix, _read(path))


def _as_uri(suffix: str, data: bytes) -> str:
    return f"data:{MEDIA[suffix]};base64,{base64.b64encode(data).decode()}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} must exist, as a result file names it, got {error.strerror}: run its notebook again") from error

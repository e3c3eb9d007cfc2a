"""What nbval lets pass: numbers of SparseGPT and GPTQ, and nothing beside them."""

import re
from pathlib import Path

import pandas as pd
import pytest

from tests.notebooks import nbval_stderr

PATTERNS = re.findall(
    r"^regex: (.*)\nreplace: (.*)$", (Path(__file__).parent / "sanitize.cfg").read_text(encoding="utf-8"), flags=re.MULTILINE
)


def sanitized(table: pd.DataFrame, form: str) -> str:
    """Return what nbval compares of a table."""
    text = table.to_html() if form == "html" else table.to_string()
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text)
    return text


def table(sweep: str, loss: float, wanda: float) -> pd.DataFrame:
    """Make a table like those of the notebooks."""
    methods = ["dense", sweep, "Wanda"]
    return pd.DataFrame({"method": methods, "loss": ["3.4", f"{loss:g}", f"{wanda:g}"], "seeds": [1, 1, 1]})


@pytest.mark.parametrize("sweep", ["sink-aware (SparseGPT)", "GPTQ, noised text"])
@pytest.mark.parametrize("form", ["html", "text"])
def test_rows_of_sweeps_may_differ_and_no_others(form: str, sweep: str) -> None:
    seen = sanitized(table(sweep, 3.59331, 3.7), form)
    assert sanitized(table(sweep, 3.6, 3.7), form) == seen
    assert sanitized(table(sweep, 3.59331, 3.71), form) != seen
    assert sanitized(table(sweep, 3.59331, 3.7).drop(index=1), form) != seen, "the row itself must be there"


@pytest.mark.parametrize(("text", "same"), [("took 3.2 s", True), ("took 3.2 nats", False)])
def test_durations_may_differ_and_losses_may_not(text: str, same: bool) -> None:
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text)
    assert ("3.2" not in text) == same


HTML = (
    "<table><thead>\n<tr>\n<th>method</th><th>gain</th><th>n</th><th>p</th></tr></thead>"
    "<tbody><tr><td>Wanda</td><td>{}</td><td>{}</td><td>{}</td></tr></tbody></table>"
)

HOLM = HTML.replace("<th>n</th><th>p</th>", "<th>p (Holm)</th>").replace(
    "<td>{}</td><td>{}</td><td>{}</td>", "<td>{}</td><td>{}</td>"
)


def replaced(text: str) -> str:
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (HTML.format("0.0301", 8, "0.0469"), HTML.format("0.0305", 8, "0.203"), True),
        (HTML.format("0.0301", 8, "0.0469"), HTML.format("0.0341", 8, "0.0469"), False),
        (HOLM.format("0.0301", "0.562"), HOLM.format("0.0305", "0.750"), True),
        (HOLM.format("0.0301", "0.562"), HOLM.format("0.0341", "0.562"), False),
        (HTML.format("0.0301", 8, "0.0469"), HTML.format("0.0301", 9, "0.0469"), False),
        (HTML.format("0.0301", 8, "0.0469"), HTML.format("NaN", 8, "0.0469"), False),
        ("nelbo 3.59 | 4 windows", "nelbo 3.61 | 4 windows", True),
        ("nelbo 3.59 | 4 windows", "nelbo 3.79 | 4 windows", False),
        ("nelbo 3.59 | 4 windows", "nelbo 3.59 | 5 windows", False),
        ("gain -0.02, reproduced", "gain -0.02, not reproduced", False),
        ("gain 0.02", "gain -0.02", False),
        ("Holm-adjusted p 0.19; effect 0.05", "Holm-adjusted p 1; effect 0.05", True),
    ],
)
def test_another_processor_may_round_otherwise_and_no_more(first: str, second: str, same: bool) -> None:
    assert (nbval_stderr.Printed(first) == second) is same
    assert (nbval_stderr.Printed(first) != second) is not same
    # nbval compares what the replacements leave
    first, second = (replaced(text) for text in (first, second))
    assert (nbval_stderr.Printed(first) == second) is same

"""A plugin for nbval: outputs are compared as another processor may print them.

Stderr is left out: refreshed notebooks hold none, and bars of libraries differ from run to run. Numbers with a fraction may
differ a little, because processors add in other orders; words and whole numbers may not. A p-value counts how often random signs
do better, so that one rounding can move it by much: it must be there, whatever it is.
"""

import re
from typing import Any

import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

RELATIVE, ABSOLUTE = 0.03, 0.0015  # seen between an Intel and an AMD processor: 0.02 of a value, and 0.001 of small ones
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
P_COLUMNS = ("p", "p (Holm)", "p_holm")
P_IN_TEXT = re.compile(r"\bp \d[\d.e-]*")


class Printed(str):
    """A text that equals another one when they agree but for rounding."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and agree(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other


def agree(first: str, second: str) -> bool:
    """Tell whether two outputs have the same words and whole numbers, and nearly the same other numbers."""
    # The replacements of sanitize.cfg, which come before, write one _ for spaces: "p (Holm)" is "p_(Holm)" by then.
    spaced = [str(text).replace("_", " ") for text in (first, second)]
    parts = [NUMBER.split(P_IN_TEXT.sub("p P", without_p(text))) for text in spaced]
    if len(parts[0]) != len(parts[1]) or parts[0][::2] != parts[1][::2]:
        return False
    return all(_near(*pair) for pair in zip(parts[0][1::2], parts[1][1::2], strict=True))


def _near(first: str, second: str) -> bool:
    if first == second:
        return True
    if first.lstrip("-").isdigit() and second.lstrip("-").isdigit():
        return False
    one, other = float(first), float(second)
    return abs(one - other) <= ABSOLUTE + RELATIVE * max(abs(one), abs(other))


def without_p(html: str) -> str:
    """Put a letter into the p-value columns of a table; other text stays as it is."""
    names = re.findall(r"<th[^>]*>(.*?)</th>", html.partition("</thead>")[0])
    columns = [index for index, name in enumerate(names) if name in P_COLUMNS]

    def mark(row: re.Match[str]) -> str:
        cells = re.split(r"(<td[^>]*>.*?</td>)", row.group(0))
        for column in columns:
            if 2 * column + 1 < len(cells):
                cells[2 * column + 1] = "<td>P</td>"
        return "".join(cells)

    return re.sub(r"<tr[^>]*>.*?</tr>", mark, html, flags=re.DOTALL) if columns else html


def without_twins(outputs: Any) -> Any:
    """Leave the plain text of a table out where its HTML, which says the same, is compared."""
    for output in outputs:
        if "text/html" in output.get("data", {}):
            output["data"].pop("text/plain", None)
    return outputs


_sanitize, _compare = IPyNbCell.sanitize, IPyNbCell.compare_outputs


def sanitize(self: IPyNbCell, text: Any) -> Any:
    """Do what nbval does, and let numbers differ."""
    found = _sanitize(self, text)
    return Printed(found) if isinstance(found, str) else found


def compare_outputs(self: IPyNbCell, test: Any, ref: Any, skip_compare: Any = None) -> bool:
    """Do what nbval does, without what is there twice."""
    return _compare(self, without_twins(test), without_twins(ref), skip_compare)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave stderr out of the comparison of a notebook's outputs, and compare numbers with a tolerance."""
    if isinstance(collector, IPyNbFile):
        notebook: Any = collector  # nbval gives the tuple a fixed length
        notebook.skip_compare = (*notebook.skip_compare, "stderr")
        cell: Any = IPyNbCell
        cell.sanitize, cell.compare_outputs = sanitize, compare_outputs

"""Tables as text: three significant digits to read, six to keep, the same bytes from every run."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import PurePath
from typing import ClassVar

import pandas as pd

from lib.core.errors import InputError

STORED_DIGITS = 6
MOST_ROWS, FIRST_ROWS = 100, 30  # a longer table shows its first rows and names its file
NO_ROWS = "no rows: no model of this run has what the table compares"


class Table(pd.DataFrame):
    """A data frame that shows whole cells, its caption, and no row numbers; in words where it has no rows.

    All its rows show, up to `MOST_ROWS`; of a longer one the first, and the file that holds all.
    """

    _metadata: ClassVar[list[str]] = ["caption", "file"]
    caption = ""
    file = ""

    @property
    def _constructor(self) -> type["Table"]:
        return Table

    def __repr__(self) -> str:
        if not len(self):
            return NO_ROWS
        with pd.option_context("display.max_colwidth", None):
            return "\n".join([self._first.to_string(index=False, na_rep="NaN"), *self._rest])

    def _repr_html_(self) -> str:
        if not len(self):
            return f"<p>{NO_ROWS}</p>"
        with pd.option_context("display.max_colwidth", None):
            return "\n".join(
                [self._first.to_html(index=False, na_rep="NaN", border=0), *(f"<p>{line}</p>" for line in self._rest)]
            )

    @property
    def _first(self) -> pd.DataFrame:
        return self if len(self) <= MOST_ROWS else self.head(FIRST_ROWS)

    @property
    def _rest(self) -> list[str]:
        if len(self) <= MOST_ROWS:
            return []
        return [f"{FIRST_ROWS} of {len(self)} rows" + (f"; all of them: {self.file}" if self.file else "")]


def significant(value: float, digits: int = 3) -> str:
    """Write a number with a fixed count of significant digits, without an exponent from 0.0001 to a million.

    Args:
        value: any number; zero is written as 0.
        digits: how many digits to keep, at least 1.

    Returns:
        The number as text; NaN as `NaN`, infinities as `inf` and `-inf`.

    >>> significant(0.12345), significant(1234.5), significant(2), significant(1e-9)
    ('0.123', '1230', '2.00', '1.00e-09')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    text = f"{value:.{digits - 1}e}"
    exponent = int(text.split("e")[1])
    return f"{float(text):.{max(digits - 1 - exponent, 0)}f}" if -5 < exponent < 6 else text


def rounded(value: float, digits: int = STORED_DIGITS) -> float:
    """Round to significant digits, so that the last bits of a sum do not show in a stored file.

    Args:
        value: a finite number.
        digits: how many digits to keep.

    Returns:
        The nearest number with that many digits; never negative zero.

    >>> rounded(0.1 + 0.2), rounded(123456789.0)
    (0.3, 123457000.0)
    """
    return float(f"{value:.{digits}g}") + 0.0


def display_table(frame: pd.DataFrame, *, caption: str = "", digits: int = 3) -> Table:
    """Make the table to look at: numbers with a fraction become text with `digits` digits, all else stays as it is.

    Args:
        frame: the numbers; a named index becomes the first columns.
        caption: what the table shows.
        digits: significant digits.

    Returns:
        A table of the same shape. A missing value shows as `NaN`.

    >>> display_table(pd.DataFrame({"layer": [1, 2], "share": [0.5, 1 / 3]}))["share"].tolist()
    ['0.500', '0.333']
    """
    table = Table({name: _shown(column, digits) for name, column in flat(frame).items()})
    table.caption = caption
    return table


def csv_text(frame: pd.DataFrame) -> str:
    """Write a frame as CSV with six significant digits and `NaN` for what is missing.

    Args:
        frame: the numbers; a named index becomes the first columns.

    Returns:
        The text of the file, with `\\n` line ends.

    >>> csv_text(pd.DataFrame({"layer": [1], "share": [1 / 3]}))
    'layer,share\\n1,0.333333\\n'
    """
    table = flat(frame)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(zip(*(map(_stored, table[name]) for name in table.columns), strict=True))
    return buffer.getvalue()


def text_columns(frame: pd.DataFrame) -> list[str]:
    """Name the columns that hold words, so that a token such as `3.14` is never rounded like a number.

    Args:
        frame: the table as given.

    Returns:
        Names of the columns with at least one text and no number.

    >>> text_columns(pd.DataFrame({"token": ["3.14", "a"], "share": [0.5, 0.25]}))
    ['token']
    """
    kinds = {name: {isinstance(value, str) for value in column if not _missing(value)} for name, column in flat(frame).items()}
    return [str(name) for name, kind in kinds.items() if kind == {True}]


def flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame whose columns have one text name each and whose index is only a row number.

    Args:
        frame: any frame.

    Returns:
        The frame with its index (unless that is row numbers without a name) moved to columns.

    Raises:
        InputError: no columns, or two with the same name.
    """
    row_numbers = frame.index.names == [None] and pd.api.types.is_integer_dtype(frame.index)
    table = frame if row_numbers else frame.reset_index()
    names = [" ".join(map(str, name)).strip() if isinstance(name, tuple) else str(name) for name in table.columns]
    if not names or len(set(names)) < len(names):
        raise InputError(f"a table must have columns with different names, got {names}: rename them")
    return table.set_axis(names, axis="columns").reset_index(drop=True)


def plain(value: object) -> object:
    """Turn a value into what JSON can hold, floats rounded to six digits, NaN and infinities to null.

    Args:
        value: mappings, sequences, numbers (NumPy's too), text, paths, None.

    Returns:
        The same as dicts, lists, ints, floats, strings and None.

    Raises:
        InputError: a value of another type.

    >>> plain({"mean": 1 / 3, "range": (1, float("nan"))})
    {'mean': 0.333333, 'range': [1, None]}
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return rounded(float(value)) if math.isfinite(float(value)) else None
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    raise InputError(f"a recorded value must be a number, text, list or dict, got {type(value).__name__}: convert it first")


def _is_float(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, Integral)


def _missing(value: object) -> bool:
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, Real) and math.isnan(float(value)))


def _shown(column: pd.Series, digits: int) -> pd.Series:
    if pd.api.types.is_integer_dtype(column.dtype) and not column.hasnans:
        return column
    return pd.Series(list(_texts(column, digits)), dtype=object)


def _texts(column: Iterable[object], digits: int) -> Iterable[object]:
    for value in column:
        if _missing(value):
            yield "NaN"
        else:
            yield significant(float(value), digits) if _is_float(value) else value  # type: ignore[arg-type]


def _stored(value: object) -> object:
    if _missing(value):
        return "NaN"
    return f"{float(value) + 0.0:.{STORED_DIGITS}g}" if _is_float(value) else value  # type: ignore[arg-type]

"""The error of bad input, which the launcher answers with one line and exit code 2."""

import difflib
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """Something the user gave cannot be used: the message says the rule, what was got, and the remedy."""


def require(holds: bool, rule: str, got: str, remedy: str) -> None:
    """Raise `InputError` with its three clauses unless something holds.

    Args:
        holds: what must be true.
        rule: what is allowed.
        got: what was given.
        remedy: what to do.

    Raises:
        InputError: it does not hold.
    """
    if not holds:
        raise InputError(f"{rule}, got {got}: {remedy}")


def require_known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `InputError` for a name that there is not, with the nearest one that there is.

    Args:
        names: what was given.
        known: what there is.
        what: the names are, for the message.

    Raises:
        InputError: a name of nothing.

    >>> require_known(["AWQ"], ["as it is", "AWQ"], "a rewriting")
    """
    listed = list(known)
    for name in names:
        close = difflib.get_close_matches(name, listed, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "choose one of them"
        require(name in listed, f"{what} must be among {', '.join(listed)}", repr(name), remedy)


def refusal(check: Callable[[], object]) -> str | None:
    """Return the line of what a check refuses; None where it refuses nothing.

    >>> refusal(lambda: require(False, "a must be b", "c", "say b"))
    'a must be b, got c: say b'
    """
    try:
        check()
    except InputError as error:
        return str(error)
    return None

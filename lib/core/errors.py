"""The error of bad input, which the launcher answers with one line and exit code 2."""


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

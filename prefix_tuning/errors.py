"""What the user is told when something given is wrong; imports nothing, so that every module may raise it."""

from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong; the message is one line: what was wrong, what was expected, what is valid."""


def valid(kind: str, name: object, choices: Iterable) -> str:
    """Returns `name` if it is one of `choices`, else raises a `UserError` that lists them."""
    if name not in choices:
        raise UserError(f"unknown {kind} {name!r}; valid: {', '.join(sorted(map(str, choices)))}")
    return name

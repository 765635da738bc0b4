"""What the user is told when something given is wrong; imports nothing, so that every module may raise it."""

from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong; the message is one line: what was wrong, what was expected, what is valid."""


class OptionError(UserError):
    """A `UserError` that begins with an option's name; `registry.options_of` puts its section before it."""


def at_least_one(**numbers: int | None) -> None:
    """Raises `OptionError` for an option that counts something and is 0 or less; None is fine."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise OptionError(f"{name} is {number}; expected at least 1")


def valid(kind: str, name: object, choices: Iterable) -> str:
    """Returns `name` if it is one of `choices`, else raises a `UserError` that lists them."""
    if name not in choices:
        raise UserError(f"unknown {kind} {name!r}; valid: {', '.join(sorted(map(str, choices)))}")
    return name

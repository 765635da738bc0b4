"""Factories by name: a factory's keyword arguments are the schema of the config section that calls it."""

import contextlib
import inspect
import numbers
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prefix_tuning.errors import OptionError, UserError, valid

SEQUENCES = (tuple, Sequence)
NUMBERS = {int: numbers.Integral, float: numbers.Real}
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", types.NoneType: "None"}


def named(section: str, registry: dict[str, Callable], options: dict[str, Any], *arguments: Any) -> Any:
    """Calls the factory that options["name"] stands for in the registry, with the other options."""
    options = dict(options)
    factory = registry[valid(f"{section}.name", options.pop("name", None), registry)]
    return call(section, factory, options, *arguments)


def defaults(factory: Callable) -> dict[str, Any]:
    """What a section's options are that it leaves out, as far as they have a default."""
    parameters = inspect.signature(factory).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def call(section: str, factory: Callable, options: dict[str, Any], *arguments: Any) -> Any:
    """factory(*arguments, **options), whose signature is the section's schema; raises `UserError` naming valid keys."""
    with options_of(section):
        return checked(f"config section {section}", factory, options, *arguments)


@contextlib.contextmanager
def options_of(section: str) -> Iterator[None]:
    """Within it an `OptionError` is about this section, which its message then names as the command line does."""
    try:
        yield
    except OptionError as error:
        raise UserError(f"{section}.{error}") from error


def checked(where: str, factory: Callable, options: dict[str, Any], *arguments: Any) -> Any:
    """`call` for options that stand somewhere else."""
    parameters = list(inspect.signature(factory).parameters.values())[len(arguments) :]
    known = [p.name for p in parameters]
    for key in options:
        valid(f"key in {where}:", key, known)
    lacking = [p.name for p in parameters if p.default is p.empty and p.name not in options]
    if lacking:
        raise UserError(f"{where} lacks {', '.join(lacking)}")
    for p in parameters:
        if p.name in options and not fits(options[p.name], p.annotation):
            raise OptionError(f"{p.name} is {options[p.name]!r}; expected {in_words(p.annotation)}")
    return factory(*arguments, **options)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the kind that an annotation says; numbers may be NumPy's, and a list is a tuple in JSON."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in kind.__args__)
    if isinstance(kind, types.GenericAlias) and kind.__origin__ in SEQUENCES:
        return isinstance(value, list | tuple) and all(fits(one, kind.__args__[0]) for one in value)
    if kind in NUMBERS:
        return isinstance(value, NUMBERS[kind]) and not isinstance(value, bool)
    kind = getattr(kind, "__origin__", kind)
    return not isinstance(kind, type) or kind is inspect.Parameter.empty or isinstance(value, kind)


def in_words(kind: Any) -> str:
    """What an annotation says, in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join(in_words(one) for one in kind.__args__ if one in KINDS or not isinstance(one, type))
    if isinstance(kind, types.GenericAlias) and kind.__origin__ in SEQUENCES:
        return f"a tuple of {in_words(kind.__args__[0]).removeprefix('a ')}s"
    return KINDS.get(kind, "options by their names")

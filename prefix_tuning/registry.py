"""Factories by name: a factory's keyword arguments are the schema of the config section that calls it."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from prefix_tuning.errors import OptionError, UserError, valid


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
    try:
        return factory(*arguments, **options)
    except TypeError as error:  # a text where a number belongs
        raise UserError(f"{where}: {error}") from error

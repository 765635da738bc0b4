"""Small JSON files, written whole or not at all, with one-line errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefix_tuning.errors import UserError

ENCODING = "utf-8-sig"  # what some editors begin a file with is no part of it


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file; raises `UserError` if there is none, saying what was `expected`."""
    try:
        value = json.loads(path.read_text(ENCODING))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; expected {expected}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a JSON object; expected {expected}")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, less a last line that a kill has cut short."""
    lines = lines_of(path.read_text(ENCODING))
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}:{number} is not JSON") from None
    return rows


def read_text(path: str | Path) -> str:
    """The contents of a text file; raises `UserError` if it cannot be read."""
    try:
        return Path(path).read_text(ENCODING)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def lines_of(text: str) -> list[str]:
    """The lines of a file; what else Unicode counts as the end of a line may stand within one, as JSON has it."""
    return text.removesuffix("\n").split("\n") if text else []


def read_groups(path: str | Path) -> list[list[str]]:
    """Groups of lines parted by empty lines."""
    groups = [[]]
    for line in lines_of(read_text(path)):
        if line.strip():
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    return groups if groups[-1] else groups[:-1]


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    guarded(path.parent, lambda: replace(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n"))


def replace(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, "utf-8")
    scratch.replace(path)


def guarded(folder: Path, write: Callable) -> None:
    """Runs a write; raises `UserError` in one line if the disk is full or the folder may not be written."""
    try:
        write()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error

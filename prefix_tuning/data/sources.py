"""Where rows come from: a file of a folder, or a data set that `datasets` finds on the hub or in a folder."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from prefix_tuning.errors import UserError, valid

# split -> what hub data sets call it
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")  # NAME, OWNER/NAME, either with :CONFIG


class Row(NamedTuple):
    """One record, and where it stands, for messages."""

    where: str
    fields: dict[str, Any]


# split -> file name -> its reader; first choice first
Files = Mapping[str, Mapping[str, Callable[[Path], Iterator[Row]]]]


def rows(path: str, split: str, files: Files) -> Iterator[Row]:
    """Yields the rows of one split, from the folder's own files if it has any, else through `datasets`.

    Raises UserError for a path that is no data set, a split that is not there, and a split without rows.
    """
    valid("split", split, SPLITS)
    folder = Path(path)
    if folder.is_file():  # a file cannot say which split it is, and would serve as all three
        raise UserError(f"{path} is a file; expected the folder it lies in, or a hub name")
    if not folder.is_dir() and not HUB_NAME.fullmatch(path):
        raise UserError(
            f"no folder {path}, and that is no hub name (NAME or OWNER/NAME, then :CONFIG if it has several)"
        )
    found = {name: [folder / file for file in files[name] if (folder / file).is_file()] for name in SPLITS}
    if not any(found.values()):
        stream = _through_datasets(path, split)
    elif found[split]:
        path = str(file := found[split][0])
        stream = files[split][file.name](file)
    else:
        present = ", ".join(name for name in SPLITS if found[name])
        raise UserError(f"{path} has no {split} split ({' or '.join(files[split])}); present: {present}")
    row = None
    try:
        for row in stream:
            yield row
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if row is None:
        raise UserError(f"{path} is empty; expected rows of the {split} split")


def read_jsonl(file: Path) -> Iterator[Row]:
    """Yields the objects of a JSON-lines file; raises UserError naming the line that holds none."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number} is not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise UserError(f"{file}:{number} is not a JSON object: {line.strip()[:80]}")
            yield Row(f"{file}:{number}", fields)


def read_csv(file: Path) -> Iterator[Row]:
    """Yields the records of a CSV file with a header; raises UserError naming the line with cells too many or few."""
    with file.open(encoding="utf-8-sig", newline="") as lines:  # -sig: spreadsheets begin a file with a mark
        reader = csv.DictReader(lines)
        for fields in reader:
            where = f"{file}:{reader.line_num}"
            if None in fields or None in fields.values():
                raise UserError(f"{where} has not as many cells as the header: {', '.join(reader.fieldnames)}")
            yield Row(where, fields)


def string(row: Row, column: str) -> str:
    """The text in one column of a row; raises UserError if the column is missing or holds something else."""
    if column not in row.fields:
        raise UserError(f"{row.where}: no column {column!r}; present: {', '.join(row.fields)}")
    value = row.fields[column]
    if not isinstance(value, str):
        raise UserError(f"{row.where}: column {column!r} holds {value!r}; expected a string")
    return value


def _through_datasets(path: str, split: str) -> Iterator[Row]:
    name, _, config = (path, "", "") if Path(path).is_dir() else path.partition(":")
    try:
        present = datasets.get_dataset_split_names(name, config or None)
        known = next((alias for alias in SPLITS[split] if alias in present), None)
        loaded = known and datasets.load_dataset(name, config or None, split=known)
    except Exception as error:  # the hub, its client and Arrow fail in a dozen types that share no ancestor
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load {path!r} as a folder or as a hub's NAME or NAME:CONFIG: {reason}") from error
    if known is None:
        raise UserError(f"{path} has no {split} split; present: {', '.join(present)}")
    for number, fields in enumerate(loaded):
        yield Row(f"{path}, {known}, row {number}", fields)

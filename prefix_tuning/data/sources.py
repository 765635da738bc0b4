"""Where rows come from: a file of a folder, or a data set that `datasets` finds on the hub or in a folder."""

import csv
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub

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


def rows(path: str, split: str, files: Files, aliases: Mapping[str, Sequence[str]] = SPLITS) -> Iterator[Row]:
    """Yields the rows of one split, from the folder's own files if it has any, else through `datasets`.

    `aliases` are the split's names on the hub, first choice first.
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
        stream = _through_datasets(path, split, aliases)
    elif found[split]:
        path = str(file := found[split][0])
        stream = files[split][file.name](file)
    else:
        present = ", ".join(name for name in SPLITS if found[name])
        names = f" ({' or '.join(files[split])})" if files[split] else ""
        raise UserError(f"{path} has no {split} split{names}; present: {present}")
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
    with file.open(encoding="utf-8-sig") as lines:
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


def read_tsv(
    file: Path,
    *,
    columns: Sequence[str] | None = None,
    renamed: Mapping[str, str] | None = None,
    broken: bool = False,
) -> Iterator[Row]:
    """Yields the lines of a file of cells between tabs, in which quotation marks mean nothing; blank lines are none.

    `columns` are the names where the file has no header, told from one by naming none of them; `renamed` gives some
    columns other names.  Raises UserError naming the line with cells too many or few, unless the file is known to be
    `broken`: then a warning counts the lines left out.
    """
    header, left = None, 0
    for number, line in lines_of(file):
        cells = line.split("\t")
        if header is None:
            headed = columns is None or not set(columns).isdisjoint(cells)
            header = cells if headed else list(columns)
            names = [(renamed or {}).get(name, name) for name in header]
            if headed:
                continue
        if len(cells) == len(header):
            yield Row(f"{file}:{number}", dict(zip(names, cells, strict=True)))
        elif line and broken:
            left += 1
        elif line:
            raise UserError(f"{file}:{number} has {len(cells)} cells; expected {len(header)}: {', '.join(header)}")
    if left:
        warnings.warn(f"{file}: {left} broken lines are left out", stacklevel=2)


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the number, from 1, and the text of every line; only line feeds, perhaps after a return, end one."""
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            yield number, line.removesuffix("\n").removesuffix("\r")


def value(row: Row, column: str) -> Any:
    """What one column of a row holds; raises UserError if the row has no such column."""
    if column not in row.fields:
        raise UserError(f"{row.where}: no column {column!r}; present: {', '.join(row.fields)}")
    return row.fields[column]


def string(row: Row, column: str) -> str:
    """The text in one column of a row; raises UserError if the column is missing or holds something else."""
    if not isinstance(found := value(row, column), str):
        raise UserError(f"{row.where}: column {column!r} holds {found!r}; expected a string")
    return found


def strings(row: Row, column: str) -> list[str]:
    """The texts, at least one, in one column of a row; raises UserError as `string` does."""
    found = value(row, column)
    if not (isinstance(found, list) and found and all(isinstance(text, str) for text in found)):
        raise UserError(f"{row.where}: column {column!r} holds {found!r}; expected a list of strings")
    return found


def integer(row: Row, column: str, below: int) -> int:
    """The number from 0 to `below` - 1 in one column of a row; raises UserError as `string` does."""
    found = value(row, column)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < below:
        raise UserError(f"{row.where}: column {column!r} holds {found!r}; expected a number from 0 to {below - 1}")
    return found


def class_name(row: Row, column: str, names: Sequence[str]) -> str:
    """The class in one column of a row, given by its name, by True or False, or by its number in `names`.

    Raises UserError for anything else, and for a row without a class, as test sets of benchmarks have.
    """
    found = row.fields.get(column)
    if found in (None, "", -1, "-1"):
        raise UserError(f"{row.where} has no {column}: the benchmark keeps those of its test set; take another split")
    numbered = dict(enumerate(names)) | {str(number): name for number, name in enumerate(names)}
    numbered |= {name: name for name in names}
    found = str(found) if isinstance(found, bool) else found
    if not isinstance(found, int | str) or found not in numbered:
        raise UserError(f"{row.where}: {column} {found!r}; valid: {', '.join(names)}, or a number below {len(names)}")
    return numbered[found]


def with_config(path: str, collections: Sequence[str], config: str) -> str:
    """The path with `:config` behind it, if it is the hub's name of one of the `collections` and names none itself.

    Raises UserError if it names another.
    """
    name, _, given = path.partition(":")
    if name not in collections or Path(path).is_dir():
        return path
    if given not in ("", config):
        raise UserError(f"path {path!r} and task {config!r} are not the same; leave out {':' + given!r}")
    return f"{name}:{config}"


def _through_datasets(path: str, split: str, aliases: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    name, _, config = (path, "", "") if Path(path).is_dir() else path.partition(":")
    huggingface_hub.logging.set_verbosity_error()  # each attempt without a network would be told in several lines
    try:
        present = datasets.get_dataset_split_names(name, config or None)
        known = next((alias for alias in aliases[split] if alias in present), None)
        loaded = known and datasets.load_dataset(name, config or None, split=known)
    except Exception as error:  # the hub, its client and Arrow fail in a dozen types that share no ancestor
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load {path!r} as a folder or as a hub's NAME or NAME:CONFIG: {reason}") from error
    if known is None:
        raise UserError(f"{path} has no {split} split; present: {', '.join(present)}")
    for number, fields in enumerate(loaded):
        yield Row(f"{path}, {known}, row {number}", fields)

"""Your own rows: JSON-lines or CSV files in a folder, or a hub data set, whose columns say what kind of task it is."""

from collections.abc import Callable
from typing import Any

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError

FILES = {split: {f"{split}.jsonl": sources.read_jsonl, f"{split}.csv": sources.read_csv} for split in sources.SPLITS}


def read_pairs(row: sources.Row) -> list[dict[str, Any]]:
    """Texts to write: `source` and `target`, or a list `targets`, each of which makes a pair."""
    source = sources.string(row, "source")
    targets = sources.strings(row, "targets") if "targets" in row.fields else [sources.string(row, "target")]
    return [{"source": source, "target": target} for target in targets]


def read_class(row: sources.Row) -> list[dict[str, Any]]:
    """`source`, perhaps `source2`, and the name of a class in `label`."""
    return [_asked(row) | {"label": sources.string(row, "label")}]


def read_tags(row: sources.Row) -> list[dict[str, Any]]:
    """`words` and the tag of each in `tags`."""
    words, tags = sources.strings(row, "words"), sources.strings(row, "tags")
    if len(words) != len(tags):
        raise UserError(f"{row.where}: {len(words)} words, but {len(tags)} tags; expected a tag for each word")
    return [{"words": words, "tags": tags}]


def read_choice(row: sources.Row) -> list[dict[str, Any]]:
    """`source`, perhaps `source2`, the texts `choices`, and in `label` the number of the right one, from 0."""
    choices = sources.strings(row, "choices")
    return [_asked(row) | {"choices": choices, "label": sources.integer(row, "label", below=len(choices))}]


KINDS = {  # a column that tells the kind -> what reads a row of it; choices have a label, too
    "target": read_pairs,
    "targets": read_pairs,
    "words": read_tags,
    "tags": read_tags,
    "choices": read_choice,
    "label": read_class,
}
EXPECTED = "target, targets, label, words and tags, or choices and label"


def load(path: str, split: str) -> datasets.Dataset:
    """Rows of the one kind that the file's columns tell: `target(s)`, `label`, `words` and `tags`, or `choices`.

    Raises UserError for what cannot be read, naming file, line and column, and for a second kind.
    """
    made: list[dict[str, Any]] = []
    read = None
    for row in sources.rows(path, split, FILES):
        found = _kind(row)
        read = read or found
        if read is None:
            raise UserError(f"{row.where}: no column of an answer ({EXPECTED}); present: {', '.join(row.fields)}")
        if found not in (None, read):
            raise UserError(f"{row.where}: another kind of task than the rows before; present: {', '.join(row.fields)}")
        made += read(row)
        if made[-1].keys() != made[0].keys():
            raise UserError(f"{row.where}: only some rows have 'source2'; expected all or none")
    return datasets.Dataset.from_list(made)


def _kind(row: sources.Row) -> Callable[[sources.Row], list[dict[str, Any]]] | None:
    """What reads the row; None if it has no answer, which the reader of the rows before it says best."""
    found = [column for column in KINDS if column in row.fields]
    readers = {KINDS[column] for column in found if not (column == "label" and "choices" in found)}
    if len(readers) > 1:
        raise UserError(f"{row.where}: columns of several kinds of task, {', '.join(found)}; expected {EXPECTED}")
    return next(iter(readers), None)


def _asked(row: sources.Row) -> dict[str, str]:
    columns = ["source", "source2"] if "source2" in row.fields else ["source"]
    return {column: sources.string(row, column) for column in columns}

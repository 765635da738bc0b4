"""CoNLL-2003 (Tjong Kim Sang & De Meulder), named entities: columns of words and tags, or the hub."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError

TYPES = ("PER", "ORG", "LOC", "MISC")
LABELS = ("O", *(f"{mark}-{kind}" for kind in TYPES for mark in "BI"))  # in the order of the hub's numbers
TAG = re.compile(r"O|[BI]-\S+")


def read_sentences(file: Path) -> Iterator[sources.Row]:
    """Yields the sentences of a file with a word a line, its tag in the last column, and blank lines between.

    Lines that begin a document are left out.  Raises UserError naming a line without a tag.
    """
    words, tags, first = [], [], 0
    for number, line in [*sources.lines_of(file), (0, "")]:  # the last sentence may end with the file
        cells = line.split()
        if cells and cells[0] != "-DOCSTART-":
            if len(cells) == 1 or not TAG.fullmatch(cells[-1]):
                raise UserError(f"{file}:{number} is not `WORD ... TAG`, TAG being O, B-TYPE or I-TYPE: {line!r}")
            first = first or number
            words.append(cells[0])
            tags.append(cells[-1])
        elif words:
            yield sources.Row(f"{file}:{first}", {"tokens": words, "ner_tags": tags})
            words, tags, first = [], [], 0


FILES = {  # the shared task's names, then those of the copies
    "train": {"eng.train": read_sentences, "train.txt": read_sentences},
    "validation": {"eng.testa": read_sentences, "valid.txt": read_sentences, "dev.txt": read_sentences},
    "test": {"eng.testb": read_sentences, "test.txt": read_sentences},
}


def load(path: str, split: str) -> datasets.Dataset:
    """Rows of `words` and the tag of each in `tags`, every entity beginning with a B (IOB2), whatever the file does.

    Raises UserError for what cannot be read, naming file and line.
    """
    rows = []
    for row in sources.rows(path, split, FILES):
        words, tags = sources.strings(row, "tokens"), sources.value(row, "ner_tags")
        if not isinstance(tags, list) or len(tags) != len(words):
            raise UserError(f"{row.where}: column 'ner_tags' holds {tags!r}; expected a tag for each of {words}")
        names = [tag if isinstance(tag, str) else _numbered(tag, row.where) for tag in tags]
        rows.append({"words": words, "tags": iob2(names)})
    return datasets.Dataset.from_list(rows)


def iob2(tags: Sequence[str]) -> list[str]:
    """The tags with B on the first word of every entity; IOB1 has it only where one touches another of its type."""
    return [
        f"B-{tag[2:]}" if tag.startswith("I-") and before[2:] != tag[2:] else tag
        for before, tag in zip(["O", *tags], tags, strict=False)
    ]


def _numbered(tag: object, where: str) -> str:
    if not isinstance(tag, int) or not 0 <= tag < len(LABELS):
        raise UserError(f"{where}: tag {tag!r}; expected a number from 0 to {len(LABELS) - 1} or a tag's name")
    return LABELS[tag]

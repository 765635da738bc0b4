"""DART v1.1.1 (Nan et al., 2021), trees of triples to text: the release's JSON, or the hub (Yale-LILY/dart)."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError


def read_entries(file: Path) -> Iterator[sources.Row]:
    """Yields the entries of the release's JSON in the hub's columns; raises UserError if the file is another."""
    try:
        for number, entry in enumerate(json.loads(file.read_text(encoding="utf-8"))):
            texts = [annotation["text"] for annotation in entry["annotations"]]
            fields = {"tripleset": entry["tripleset"], "annotations": {"text": texts}}
            yield sources.Row(f"{file}, entry {number}", fields)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not DART's JSON ({type(error).__name__}: {error})") from error


FILES = {
    split: {f"dart-v1.1.1-full-{name}.json": read_entries}
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test"))
}


def load(path: str, split: str) -> datasets.Dataset:
    """Pairs of `source` (`S : p : O | S : p : O`) and `target`, one for each text, relations in lower case.

    Both are Li & Liang's choices.  Raises UserError for what cannot be read, naming the entry or row.
    """
    pairs = []
    for row in sources.rows(path, split, FILES):
        try:
            source = " | ".join(f"{s} : {p.lower()} : {o}" for s, p, o in row.fields["tripleset"])
            texts = row.fields["annotations"]["text"]
            pairs += [{"source": source, "target": target.strip()} for target in texts]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{row.where}: not DART's columns; present: {', '.join(row.fields)}") from error
    return datasets.Dataset.from_list(pairs)

"""WebNLG 2017 (Gardent et al.): RDF triples to text, as the challenge's JSON or from the hub."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError, valid

SEEN = {  # the categories of the training split; the test split has five more
    "Airport",
    "Astronaut",
    "Building",
    "City",
    "ComicsCharacter",
    "Food",
    "Monument",
    "SportsTeam",
    "University",
    "WrittenWork",
}
DOMAINS = ("all", "seen", "unseen")


def read_entries(file: Path) -> Iterator[sources.Row]:
    """Yields the entries of the challenge's JSON in the hub's columns; raises UserError if the file is another."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
        numbered = [pair for entry in entries for pair in entry.items()]
        for number, entry in numbered:
            triples = [
                " | ".join(t[key] for key in ("subject", "property", "object")) for t in entry["modifiedtripleset"]
            ]
            texts = entry["lexicalisations"]
            fields = {
                "category": entry["category"],
                "eid": number,
                "modified_triple_sets": {"mtriple_set": [triples]},
                "lex": {"comment": [t["comment"] for t in texts], "text": [t["lex"] for t in texts]},
            }
            yield sources.Row(f"{file}, entry {number}", fields)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not the WebNLG challenge's JSON ({type(error).__name__}: {error})") from error


FILES = {
    "train": {"train.json": read_entries},
    "validation": {"dev.json": read_entries},
    "test": {"test.json": read_entries},
}


def load(path: str, split: str, *, leading_separator: bool, only_good: bool, domain: str) -> datasets.Dataset:
    """Pairs of `source` (`S : P : O | S : P : O`) and `target`, with their `category`, `group` and number of `entry`.

    The group is "seen" where the category is one of the training split's, else "unseen"; the metric `webnlg` reads it.
    `leading_separator` puts ` | ` before the first triple too, as Li & Liang's training code does; `only_good` drops
    texts that the challenge marks otherwise; `domain` keeps all categories, those of the training split, or the rest.
    Raises UserError for what cannot be read, naming the entry or row, and if nothing is left.
    """
    valid("domain", domain, DOMAINS)
    pairs = []
    for where, fields in sources.rows(path, split, FILES):
        if fields.get("test_category") == "testdata_unseen_with_lex":
            continue  # the hub's test split says these twice: here, and among `testdata_with_lex`
        try:
            (triples,) = fields["modified_triple_sets"]["mtriple_set"]
            texts = list(zip(fields["lex"]["comment"], fields["lex"]["text"], strict=True))
            category, entry = fields["category"], fields["eid"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: not WebNLG's columns; present: {', '.join(fields)}") from error
        group = "seen" if category in SEEN else "unseen"
        if domain not in ("all", group):
            continue
        source = (" | " if leading_separator else "") + " | ".join(" : ".join(t.split(" | ", 2)) for t in triples)
        pairs += [
            {"source": source, "target": text, "category": category, "group": group, "entry": entry}
            for comment, text in texts
            if comment == "good" or not only_good
        ]
    if not pairs:
        raise UserError(f"{path}: the {split} split has no text left with domain={domain!r}, only_good={only_good}")
    return datasets.Dataset.from_list(pairs)

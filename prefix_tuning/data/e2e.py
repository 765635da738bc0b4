"""E2E NLG (Novikova et al., 2017), records to text: Li & Liang's files, the challenge's CSVs, or the hub."""

import re
from collections.abc import Iterator
from pathlib import Path

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError, valid

FIELDS = {  # the challenge's name -> the name in Li & Liang's files
    "name": "name",
    "eatType": "Type",
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}
RECORD = re.compile(r"([^\[\],]+)\[([^\]]*)\]")


def read_pairs(file: Path) -> Iterator[sources.Row]:
    """Yields `source` and `target` of a file with `record||text` a line; raises UserError naming a line without."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            source, bars, target = line.rstrip("\n").partition("||")
            if not (bars and source.strip() and target.strip()):
                raise UserError(f"{file}:{number} is not `record||text`: {line.strip()[:80]!r}")
            yield sources.Row(f"{file}:{number}", {"source": source, "target": target})


FILES = {
    "train": {"src1_train.txt": read_pairs, "trainset.csv": sources.read_csv},
    "validation": {"src1_valid.txt": read_pairs, "devset.csv": sources.read_csv},
    "test": {"src1_test.txt": read_pairs, "testset_w_refs.csv": sources.read_csv},
}
COLUMNS = (("mr", "ref"), ("meaning_representation", "human_reference"))  # the CSVs', the hub's


def load(path: str, split: str, *, strip: bool) -> datasets.Dataset:
    """Pairs of `source` (`name : Aromi | Type : pub`) and `target`; `strip` removes the blank that ends Li & Liang's.

    Their files are tokenised (`£ 20 - 25 .`), the challenge's texts are not: only the records are made alike.
    Raises UserError for what cannot be read, naming the line or row.
    """
    pairs = []
    for row in sources.rows(path, split, FILES):
        if "source" in row.fields:
            source, target = sources.string(row, "source"), sources.string(row, "target")
        else:
            record, text = next((names for names in COLUMNS if names[0] in row.fields), COLUMNS[0])
            source, target = _linearise(sources.string(row, record), row.where), sources.string(row, text)
        pairs.append({"source": source, "target": target.strip() if strip else target})
    return datasets.Dataset.from_list(pairs)


def _linearise(record: str, where: str) -> str:
    """`name[Aromi], eatType[pub]` as `name : Aromi | Type : pub`."""
    fields = [(name.strip(), value) for name, value in RECORD.findall(record)]
    if not fields or ", ".join(f"{name}[{value}]" for name, value in fields) != record.strip():
        raise UserError(f"{where}: {record!r} is not of the form `name[Aromi], eatType[pub]`")
    for name, _ in fields:
        valid(f"field in {where}:", name, FIELDS)
    return " | ".join(f"{FIELDS[name]} : {_spaced(value) if name == 'priceRange' else value}" for name, value in fields)


def _spaced(price: str) -> str:
    """`£20-25` as `£ 20 - 25`, the only values that Li & Liang's files spell differently."""
    return re.sub(r"\s*([£-])\s*", r" \1 ", price).strip()

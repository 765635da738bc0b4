"""XSum (Narayan et al., 2018), articles to a sentence: files of articles beside files of summaries, or the hub."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError


def read_lines(file: Path) -> Iterator[sources.Row]:
    """Yields an article a line with the summary on the same line of the file that ends in .target instead.

    Raises UserError if there is no such file, or one of another length.
    """
    beside = file.with_suffix(".target")
    if not beside.is_file():
        raise UserError(f"{file} has no {beside.name} beside it; expected the summaries there, a line each")
    missing = (0, None)
    for (number, article), (_, summary) in zip_longest(
        sources.lines_of(file), sources.lines_of(beside), fillvalue=missing
    ):
        if article is None or summary is None:
            raise UserError(f"{file} and {beside.name} differ in length; expected a summary for each article")
        yield sources.Row(f"{file}:{number}", {"document": article, "summary": summary})


FILES = {
    "train": {"train.source": read_lines},
    "validation": {"val.source": read_lines},
    "test": {"test.source": read_lines},
}


def load(path: str, split: str) -> datasets.Dataset:
    """Pairs of `source`, an article on one line, and `target`, its summary; the hub's articles have several lines.

    Raises UserError for what cannot be read, naming the file or row.
    """
    pairs = []
    for row in sources.rows(path, split, FILES):
        article, summary = sources.string(row, "document"), sources.string(row, "summary")
        pairs.append({"source": " ".join(article.splitlines()), "target": summary})
    return datasets.Dataset.from_list(pairs)

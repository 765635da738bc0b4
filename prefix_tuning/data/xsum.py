"""XSum (Narayan et al., 2018), articles to a sentence: files of articles beside files of summaries, or the hub."""

import re
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError, valid

ADDRESS = re.compile(r"\bbbc\.(?:co\.uk|com)(?::\d+)?/(news|sport)/([a-z]*)")  # .../news/uk-wales-38413986
TRAINED = ("world", "uk", "business")  # the topics that `within_news` trains on

# part -> whether it has an article of this section and topic, in the splits trained on and in the one tested on.
# Li & Liang (2021, section 6.4) name the topics but never published which articles they took: the benchmark's own
# splits are kept here, so that no test article is anybody's training article.
PARTS: dict[str, tuple[Callable[[str, str], bool], Callable[[str, str], bool]]] = {
    "news_to_sports": (lambda section, topic: section == "news", lambda section, topic: section == "sport"),
    "within_news": (
        lambda section, topic: section == "news" and topic in TRAINED,
        lambda section, topic: section == "news" and topic not in TRAINED,
    ),
}


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
    "train": {"train.source": read_lines, "train.jsonl": sources.read_jsonl},
    "validation": {"val.source": read_lines, "validation.jsonl": sources.read_jsonl},
    "test": {"test.source": read_lines, "test.jsonl": sources.read_jsonl},
}


def load(path: str, split: str, *, part: str | None = None, urls: str | None = None) -> datasets.Dataset:
    """Pairs of `source`, an article on one line, and `target`, its summary; the hub's articles have several lines.

    `part` keeps the articles of one of Li & Liang's extrapolations: `news_to_sports`, or `within_news` from world, UK
    and business to the other topics.  It needs the column `id` and `urls`, the benchmark's list of addresses
    (XSum-WebArxiveUrls-BBCids.txt).  Raises UserError for what cannot be read, naming the file or row, for an article
    that is not in the list, and if nothing is left.
    """
    if part is not None:
        valid("part", part, PARTS)
    if (part is None) != (urls is None):
        raise UserError(
            f"part={part!r} and urls={urls!r}; expected both or neither: the file urls says what each article is about"
        )
    topics = {} if urls is None else read_topics(Path(urls))
    pairs = []
    for row in sources.rows(path, split, FILES):
        article, summary = sources.string(row, "document"), sources.string(row, "summary")
        if part is not None:
            number = sources.string(row, "id")
            if number not in topics:
                raise UserError(f"{row.where}: {urls} has no address of article {number!r}")
            if not PARTS[part][split == "test"](*topics[number]):
                continue
        pairs.append({"source": " ".join(article.splitlines()), "target": summary})
    if not pairs:
        raise UserError(f"{path}: the {split} split has no article left with part={part!r}")
    return datasets.Dataset.from_list(pairs)


def read_topics(file: Path) -> dict[str, tuple[str, str]]:
    """Article number -> (`news` or `sport`, topic) of a file with `ADDRESS NUMBER` a line; ("", "") for other sections.

    Raises UserError for a file that is not there, and naming a line of another form.
    """
    if not file.is_file():
        raise UserError(f"urls={str(file)!r} is no file; expected the benchmark's XSum-WebArxiveUrls-BBCids.txt")
    topics = {}
    for number, line in sources.lines_of(file):
        match line.split():
            case [address, article] if article.isdecimal():
                found = ADDRESS.search(address)
                topics[article] = (found[1], found[2]) if found else ("", "")
            case _:
                raise UserError(f"{file}:{number} is not `ADDRESS NUMBER`: {line[:80]!r}")
    return topics

"""SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016 and 2018), answers in a text: the benchmark's JSON, or the hub."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError


def read_questions(file: Path) -> Iterator[sources.Row]:
    """Yields the questions of the benchmark's JSON in the hub's columns; raises UserError if the file is another."""
    try:
        articles = json.loads(file.read_text(encoding="utf-8"))["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        for context, asked in [(paragraph["context"], x) for paragraph in paragraphs for x in paragraph["qas"]]:
            answers = asked["answers"]
            columns = {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
            fields = {"question": asked["question"], "context": context, "answers": columns}
            yield sources.Row(f"{file}, question {asked['id']}", fields)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not SQuAD's JSON ({type(error).__name__}: {error})") from error


VERSIONS = ("v1.1", "v2.0")
FILES = {
    "train": {f"train-{version}.json": read_questions for version in VERSIONS},
    "validation": {f"dev-{version}.json": read_questions for version in VERSIONS},
    "test": {},  # kept by the benchmark
}


def load(path: str, split: str) -> datasets.Dataset:
    """Rows of the question `source`, its context `source2`, and the `answers` that begin at its characters `starts`.

    Questions without an answer, in version 2.0, have none of either.  Raises UserError for what cannot be read and for
    an answer that does not stand where it should, naming the question, and for a folder with both versions.
    """
    present = [file for files in FILES.values() for file in files if (Path(path) / file).is_file()]
    if len({file.partition("-")[2] for file in present}) > 1:
        raise UserError(f"{path} holds two versions, {', '.join(present)}; expected a folder with one")
    rows = []
    for row in sources.rows(path, split, FILES):
        question, context = sources.string(row, "question"), sources.string(row, "context")
        try:
            pairs = list(zip(row.fields["answers"]["text"], row.fields["answers"]["answer_start"], strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{row.where}: no answers with text and answer_start ({error})") from error
        for text, start in pairs:
            if not (isinstance(text, str) and isinstance(start, int) and context.startswith(text, start)):
                raise UserError(f"{row.where}: the context does not say {text!r} at character {start!r}")
        answers, starts = [text for text, _ in pairs], [start for _, start in pairs]
        rows.append({"source": question, "source2": context, "answers": answers, "starts": starts})
    return datasets.Dataset.from_list(rows)

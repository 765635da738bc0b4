"""SuperGLUE (Wang et al., 2019) without ReCoRD, as classes or choices: the benchmark's files, or the hub."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import punctuation
from typing import Any, NamedTuple

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError, valid

HUB = ("aps/super_glue", "super_glue")
TRUTH = ("False", "True")
QUESTIONS = {"cause": "What was the cause?", "effect": "What happened as a result?"}  # what COPA asks


class Task(NamedTuple):
    """How one of the tasks is written down."""

    folder: str  # in the benchmark's download
    texts: Callable[[sources.Row], dict[str, Any]]  # the columns of a row but for the label
    labels: Sequence[str] | None  # the classes, in the order of the hub's numbers; None: the label is a number


def pair(first: str, second: str) -> Callable[[sources.Row], dict[str, Any]]:
    """Reads two columns as `source` and `source2`."""
    return lambda row: {"source": sources.string(row, first), "source2": sources.string(row, second)}


def read_copa(row: sources.Row) -> dict[str, Any]:
    """A premise, what is asked about it, and two answers."""
    asked = valid(f"question in {row.where}:", sources.string(row, "question"), QUESTIONS)
    choices = [sources.string(row, column) for column in ("choice1", "choice2")]
    return {"source": sources.string(row, "premise"), "source2": QUESTIONS[asked], "choices": choices}


def read_multirc(row: sources.Row) -> dict[str, Any]:
    """A question before its paragraph, so that cutting never takes it, and one answer, in which no tab is left.

    The metric `multirc` takes for one question what stands before the last tab of source and answer.
    """
    question, paragraph, answer = (sources.string(row, column) for column in ("question", "paragraph", "answer"))
    return {"source": f"{question} {paragraph}", "source2": answer.replace("\t", " ")}


def read_wic(row: sources.Row) -> dict[str, Any]:
    """A word and a sentence with it, and another sentence."""
    word, first, second = (sources.string(row, column) for column in ("word", "sentence1", "sentence2"))
    return {"source": f"{word}: {first}", "source2": second}


def read_wsc(row: sources.Row) -> dict[str, Any]:
    """A text with the pronoun between asterisks, and whom it might mean.

    The benchmark counts words from 0 and is off by one now and then: the pronoun nearest to its number is taken.
    """
    words, pronoun = sources.string(row, "text").split(), sources.string(row, "span2_text")
    number = sources.integer(row, "span2_index", below=len(words))
    places = [i for i, word in enumerate(words) if _bare(word) == _bare(pronoun)]
    if not places:
        raise UserError(f"{row.where}: the text has no word {pronoun!r}; expected it near word {number}")
    place = min(places, key=lambda i: abs(i - number))
    words[place] = f"*{words[place]}*"
    return {"source": " ".join(words), "source2": sources.string(row, "span1_text")}


TASKS = {
    "boolq": Task("BoolQ", pair("question", "passage"), TRUTH),
    "cb": Task("CB", pair("premise", "hypothesis"), ("entailment", "contradiction", "neutral")),
    "copa": Task("COPA", read_copa, None),
    "multirc": Task("MultiRC", read_multirc, TRUTH),
    "rte": Task("RTE", pair("premise", "hypothesis"), ("entailment", "not_entailment")),
    "wic": Task("WiC", read_wic, TRUTH),
    "wsc": Task("WSC", read_wsc, TRUTH),
}


def read_lines(file: Path) -> Iterator[sources.Row]:
    """Yields the objects of one of the benchmark's files in the hub's columns, MultiRC's one answer a row.

    Raises UserError naming the line that is none of them.
    """
    for row in sources.read_jsonl(file):
        where, fields = row
        try:
            if isinstance(fields.get("passage"), dict):
                passage = fields["passage"]
                for question in passage["questions"]:
                    for answer in question["answers"]:
                        asked = {"paragraph": passage["text"], "question": question["question"]}
                        yield sources.Row(where, asked | {"answer": answer["text"], "label": answer.get("label")})
            else:
                yield sources.Row(where, fields | fields.get("target", {}))  # where WSC keeps its spans
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where} is no line of SuperGLUE ({type(error).__name__}: {error})") from error


FILES = {
    "train": {"train.jsonl": read_lines},
    "validation": {"val.jsonl": read_lines},
    "test": {"test.jsonl": read_lines},
}


# What a model that writes its answer reads of each task, the fields by their names, and for COPA what it writes.
WRITTEN = {
    "boolq": "passage: {source2} question: {source}",
    "cb": "hypothesis: {source2} premise: {source}",
    "copa": "choice1: {choices[0]} choice2: {choices[1]} premise: {source} question: {source2}",
    "rte": "hypothesis: {source2} premise: {source}",
    "wic": "sentence1: {sentence1} sentence2: {source2} word: {word}",
}
CHOICES = ("choice1", "choice2")


def written(task: str, row: dict[str, Any]) -> dict[str, str]:
    """A row as `source` and `target`, the name of the class or choice."""
    label = CHOICES[row["label"]] if task == "copa" else row["label"]
    word, _, sentence = row["source"].partition(": ") if task == "wic" else ("", "", "")
    return {"source": WRITTEN[task].format(**row, word=word, sentence1=sentence), "target": label}


def load(path: str, split: str, *, task: str, as_text: bool = False) -> datasets.Dataset:
    """Rows of `source`, `source2` and the class's name in `label`; for COPA, `choices` and the right one's number.

    With `as_text`, rows of `source` and `target` for a model that writes the class's name, as T5 does, without the
    task's name before (Lester et al. 2021, section 3); not for MultiRC and WSC.  `path` is a task's folder, the folder
    of all, or the hub's name.  Raises UserError for what cannot be read, naming file and line, and for a test split,
    whose labels are not public.
    """
    shape = TASKS[valid("task", task, TASKS)]
    if as_text:
        valid("task with as_text=True", task, WRITTEN)
    if (Path(path) / shape.folder).is_dir():
        path = str(Path(path) / shape.folder)
    rows = []
    for row in sources.rows(sources.with_config(path, HUB, task), split, FILES):
        if shape.labels is None:
            label = int(sources.class_name(row, "label", ("0", "1")))
        else:
            label = sources.class_name(row, "label", shape.labels)
        rows.append(shape.texts(row) | {"label": label})
    return datasets.Dataset.from_list([written(task, row) for row in rows] if as_text else rows)


def _bare(word: str) -> str:
    return word.strip(punctuation).lower()

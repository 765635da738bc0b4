"""GLUE (Wang et al., 2019), classes of sentences and of pairs: the benchmark's files, or the hub."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError, valid

HUB = ("nyu-mll/glue", "glue")
SOURCES = ("source", "source2")


class Task(NamedTuple):
    """How one of the tasks is written down."""

    folder: str  # in the benchmark's download
    texts: Sequence[str]  # the columns of the hub, and of the files unless renamed
    labels: Sequence[str]  # the classes, in the order of their numbers
    renamed: Mapping[str, str] = {}  # a file's column -> the hub's
    columns: Sequence[str] | None = None  # of files without a header


ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(
        "CoLA", ["sentence"], ["unacceptable", "acceptable"], columns=["source", "label", "annotation", "sentence"]
    ),
    "mnli": Task(
        "MNLI",
        ["premise", "hypothesis"],
        ["entailment", "neutral", "contradiction"],
        {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
    ),
    "mrpc": Task(
        "MRPC",
        ["sentence1", "sentence2"],
        ["not_equivalent", "equivalent"],
        {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
    ),
    "qnli": Task("QNLI", ["question", "sentence"], ENTAILMENT),
    "qqp": Task("QQP", ["question1", "question2"], ["not_duplicate", "duplicate"], {"is_duplicate": "label"}),
    "rte": Task("RTE", ["sentence1", "sentence2"], ENTAILMENT),
    # The benchmark's files have a header, the copies that papers ship often none.
    "sst2": Task("SST-2", ["sentence"], ["negative", "positive"], columns=["sentence", "label"]),
    "wnli": Task("WNLI", ["sentence1", "sentence2"], ENTAILMENT[::-1]),
}


def load(path: str, split: str, *, task: str, mismatched: bool = False) -> datasets.Dataset:
    """Rows of `source`, `source2` where the task has pairs, and the name of the class in `label`.

    `path` is a task's folder, the folder of all, or the hub's name; `mismatched` takes MNLI's validation split from the
    genres that are not trained on.  Raises UserError for what cannot be read, naming file and line, for a test split,
    whose labels are not public, and for STS-B, which is a regression.
    """
    if task == "stsb":
        raise UserError(f"task 'stsb' is a regression and has no classes; valid: {', '.join(TASKS)}")
    shape = TASKS[valid("task", task, TASKS)]
    if mismatched and task != "mnli":
        raise UserError(f"mismatched=True is about task 'mnli'; task {task!r} has one validation split")
    part = "" if task != "mnli" else "_mismatched" if mismatched else "_matched"
    reader = functools.partial(sources.read_tsv, columns=shape.columns, renamed=shape.renamed)
    files = {
        # A few questions of QQP hold a line break; everybody's counts are without them.
        "train": {"train.tsv": functools.partial(reader, broken=task == "qqp")},
        "validation": {f"dev{part}.tsv": reader},
        "test": {f"test{part}.tsv": reader},
    }
    aliases = sources.SPLITS | ({split: [split + part] for split in ("validation", "test")} if part else {})
    if (Path(path) / shape.folder).is_dir():
        path = str(Path(path) / shape.folder)
    rows = []
    for row in sources.rows(sources.with_config(path, HUB, task), split, files, aliases):
        texts = {name: sources.string(row, column) for name, column in zip(SOURCES, shape.texts, strict=False)}
        rows.append({**texts, "label": sources.class_name(row, "label", shape.labels)})
    return datasets.Dataset.from_list(rows)

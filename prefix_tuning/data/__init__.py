"""Data sets by name; a new one is a file with a `load` and a line in `DATASETS`.

Rows have the columns of one kind of task: `source` and `target` (writing), or those that `tasks.TASKS` read.
"""

import datasets
import numpy as np

from prefix_tuning.data import chat, conll2003, dart, e2e, glue, squad, superglue, text, webnlg, xsum
from prefix_tuning.errors import UserError

# (path, split, **options) -> a Dataset
DATASETS = {
    "chat": chat.load,
    "conll2003": conll2003.load,
    "dart": dart.load,
    "e2e": e2e.load,
    "glue": glue.load,
    "squad": squad.load,
    "superglue": superglue.load,
    "text": text.load,
    "webnlg": webnlg.load,
    "xsum": xsum.load,
}


def subsample(dataset: datasets.Dataset, size: int, seed: int) -> datasets.Dataset:
    """`size` rows drawn without replacement; with one seed, a smaller draw is the beginning of a larger one.

    Raises UserError unless 1 <= size <= len(dataset).
    """
    if not 1 <= size <= len(dataset):
        raise UserError(f"cannot draw {size} rows of {len(dataset)}; valid: 1 to {len(dataset)}")
    return dataset.select(np.random.default_rng(seed).permutation(len(dataset))[:size])


def group_references(dataset: datasets.Dataset) -> datasets.Dataset:
    """One row per distinct `source`, in order of appearance, its `target`s in the list `targets`, repeated ones too.

    Other columns keep the value of the first row of the group.
    """
    groups = {}
    for row in dataset:
        target = row.pop("target")
        groups.setdefault(row["source"], {**row, "targets": []})["targets"].append(target)
    return datasets.Dataset.from_list(list(groups.values()))

"""Data sets by name, as pairs of texts; a new one is a file with a `load` and a line in `DATASETS`."""

import datasets
import numpy as np

from prefix_tuning.data import chat, e2e, text, webnlg
from prefix_tuning.errors import UserError

# (path, split, **options) -> a Dataset with at least the columns `source` and `target`, one pair a row
DATASETS = {"e2e": e2e.load, "webnlg": webnlg.load, "text": text.load, "chat": chat.load}


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

"""Any pairs of texts: JSON-lines or CSV files in a folder, or a hub data set, with `source` and `target(s)`."""

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError

FILES = {split: {f"{split}.jsonl": sources.read_jsonl, f"{split}.csv": sources.read_csv} for split in sources.SPLITS}


def load(path: str, split: str) -> datasets.Dataset:
    """Pairs of `source` and `target`; where a row has a list `targets`, each of them makes a pair.

    Raises UserError for what cannot be read, naming file, line and column.
    """
    pairs = []
    for row in sources.rows(path, split, FILES):
        source = sources.string(row, "source")
        if "targets" not in row.fields:
            targets = [sources.string(row, "target")]
        else:
            targets = row.fields["targets"]
            if not (isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)):
                raise UserError(f"{row.where}: column 'targets' holds {targets!r}; expected a list of strings")
        pairs += [{"source": source, "target": target} for target in targets]
    return datasets.Dataset.from_list(pairs)

"""Scores of answers, written or chosen; nothing here imports JAX.

A metric is a function of (predictions, references, sources, groups): one text, the list of texts that would have been
right, the input that the prediction was made from, and the name of a group of records that has scores of its own.  It
returns named numbers, None standing for one that cannot be computed on this machine.  Only `slots` and `multirc` look
at the sources, and only `webnlg` at the groups.
"""

from collections.abc import Callable, Sequence

from prefix_tuning.metrics import classes, dart, e2e, entities, slots, squad, text, webnlg

METRICS: dict[str, Callable[..., dict[str, float | None]]] = {
    "accuracy": classes.accuracy,
    "bleu": text.bleu,
    "chrf": text.chrf,
    "dart": dart.dart,
    "e2e": e2e.e2e,
    "exact_match": text.exact_match,
    "f1": classes.f1,
    "mcc": classes.mcc,
    "multirc": classes.multirc,
    "rouge": text.rouge,
    "seqeval": entities.seqeval,
    "slots": slots.slots,
    "squad": squad.squad,
    "ter": text.ter,
    "webnlg": webnlg.webnlg,
}


def lower_is_better(name: str) -> bool:
    """Whether a score that a run is evaluated by gets better by falling."""
    return name in ("loss", "perplexity") or "ter" in name.split("_")


def score(
    names: Sequence[str],
    predictions: list[str],
    references: list[list[str]],
    sources: list[str] | None = None,
    groups: list[str] | None = None,
) -> dict[str, float | None]:
    """The scores of all named metrics in one dict; a `ValueError` where a name or a length is wrong."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; valid: {', '.join(sorted(METRICS))}")
    if not predictions:
        raise ValueError(f"nothing to score: 0 predictions, {len(references)} groups of references")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but {len(references)} groups of references")
    for column, values in (("sources", sources), ("groups", groups)):
        if values is not None and len(values) != len(predictions):
            raise ValueError(f"{len(predictions)} predictions, but {len(values)} {column}")
    if [] in references:
        raise ValueError(f"group {references.index([]) + 1} of {len(references)} has no reference")
    columns = (predictions, references, sources, groups)
    return {key: value for name in names for key, value in METRICS[name](*columns).items()}

"""Scores of tagged words by entity, 0 to 1, equal to the default of the package seqeval (and of conlleval)."""

from prefix_tuning.metrics.classes import only


def seqeval(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float]:
    """Precision, recall and F1 of entities, right only if first word, last word and type are; tags between spaces.

    A `ValueError` for a tag other than O, B-TYPE and I-TYPE, and where a row has not one reference of its length.
    """
    right = hits = found = 0
    for number, (prediction, reference) in enumerate(zip(predictions, only(references), strict=True), 1):
        ours, theirs = prediction.split(), reference.split()
        if len(ours) != len(theirs):
            raise ValueError(f"row {number}: {len(ours)} tags predicted for {len(theirs)} words")
        guessed, gold = entities(ours), entities(theirs)
        found, right, hits = found + len(guessed), right + len(gold), hits + len(guessed & gold)
    return {
        "entity_precision": hits / found if found else 0.0,
        "entity_recall": hits / right if right else 0.0,
        "entity_f1": 2 * hits / (found + right) if found + right else 0.0,
    }


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """(first, last + 1, type) of every entity; an I after O or after another type begins one, too."""
    made, start, kind = set(), 0, None  # kind: the type of the entity that the words from `start` on are of
    for i, tag in enumerate([*tags, "O"]):
        mark, dash, name = tag.partition("-")
        if tag != "O" and not (mark in ("B", "I") and dash and name):
            raise ValueError(f"tag {tag!r}; expected O, B-TYPE or I-TYPE")
        if kind is not None and (mark != "I" or name != kind):
            made.add((start, i, kind))
            kind = None
        if tag != "O" and kind is None:
            start, kind = i, name
    return made

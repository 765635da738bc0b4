"""How much of a data record its description mentions."""

import re

# How records are written, an example each; the first pattern that finds anything in a source is the one used.
# A group holds a value.
RECORDS = {
    "name[Blue Spice], food[French]": re.compile(r"\w[\w ]*\[([^\]]+)\]"),
    "Aarhus : leader : Jacob Bundsgaard | ...": re.compile(r"(?:^|\|)([^|]+?) : [^|:]+ : ([^|]+)"),
    "name : Blue Spice | food : French": re.compile(r"(?:^|[|\n])[^|:\n]+:([^|\n]+)"),
    "name = Blue Spice; food = French": re.compile(r"(?:^|[|;,\n])[^|;,=\n]+=([^|;,\n]+)"),
}


def values(source: str) -> list[str]:
    """The slot values of one record, in order; empty where no pattern of `RECORDS` applies."""
    found = ([value for match in pattern.finditer(source) for value in match.groups()] for pattern in RECORDS.values())
    return [value.strip() for value in next(filter(None, found), []) if value.strip()]


def slots(
    predictions: list[str], references: list[list[str]], sources: list[str] | None = None, *_: list[str] | None
) -> dict[str, float]:
    """The share of all slot values, 0 to 100, that their prediction repeats as whole words, whatever the case.

    A value that good text never repeats ("family friendly : yes") keeps even the references below 100.  A `ValueError`
    where there are no sources, or none of them holds a slot.
    """
    if sources is None:
        raise ValueError("the metric 'slots' needs the sources beside the predictions and references")
    repeated = [hit for source, text in zip(sources, predictions, strict=True) for hit in hits(text, source)]
    if not repeated:
        raise ValueError(f"no slot in any of {len(sources)} sources; a record reads like {' or '.join(RECORDS)}")
    return {"slot_accuracy": 100 * sum(repeated) / len(repeated)}


def hits(text: str, source: str) -> list[bool]:
    """Whether a text repeats each slot value of its record."""
    return [_mentions(text, value) for value in values(source)]


def _mentions(text: str, value: str) -> bool:
    phrase = r"\s+".join(map(re.escape, value.split()))
    return re.search(rf"(?<!\w){phrase}(?!\w)", text, re.IGNORECASE) is not None

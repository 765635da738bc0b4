"""The quick start's text: records of several domains, formatted and described in several ways, and the task on them.

Every name and value is made of random syllables, so a model can only copy it.  A word's checksum decides who may use
it: the pretraining text or one split of the task, never two of them.  The task's record format, `key[value], ...`,
is one that the pretraining text cannot contain.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

SYLLABLES = (
    "bal bek bor dan del dim dov fal fen fim gar gil gon hal hes hib jan jor kad kel kim kov lam les lin lum mar mel "
    "mip mok nal nev nim nor pal pes pil pov rak rem rin ros sal sen sim sov tal tem tib tor vak ven vil vos wan wel "
    "wim wor zan zel zik zol"
).split()
SPLITS = {"train": 400, "validation": 40, "test": 80}  # the task's splits and their numbers of records
OWNERS = (*SPLITS, *["pretraining"] * 9)  # of a word, by its checksum

# Domain -> key -> how a sentence words it, with a verb and without; the key and the value follow.
DOMAINS = {
    "restaurant": {
        "cuisine": ("cooks the best of", "famous for"),
        "area": ("stands in", "set in"),
        "chef": ("relies on", "led by"),
        "bridge": ("faces", "next to"),
        "owner": ("belongs to", "owned by"),
    },
    "film": {
        "director": ("was shot by", "directed by"),
        "star": ("gives the lead to", "carried by"),
        "studio": ("was made at", "produced at"),
        "city": ("takes us to", "set in"),
        "composer": ("owes its songs to", "with music by"),
    },
    "building": {
        "architect": ("was planned by", "designed by"),
        "street": ("stands on", "found on"),
        "stone": ("shows walls of", "built of"),
        "owner": ("belongs to", "owned by"),
        "style": ("follows", "inspired by"),
    },
    "scholar": {
        "town": ("was born in", "born in"),
        "city": ("lives in", "settled in"),
        "language": ("studies", "fluent in"),
        "teacher": ("learned from", "taught by"),
        "school": ("works for", "employed at"),
    },
    "device": {
        "factory": ("comes from", "made by"),
        "metal": ("consists of", "cast in"),
        "inventor": ("goes back to", "invented by"),
        "shop": ("is sold by", "on sale in"),
        "colour": ("comes in", "painted in"),
    },
    "voyage": {
        "harbour": ("departs from", "starting in"),
        "island": ("ends on", "bound for"),
        "ship": ("uses", "made on"),
        "captain": ("follows", "commanded by"),
        "sea": ("crosses", "leading over"),
    },
}


class Record(NamedTuple):
    """One thing of a domain: what it is called, and values of some of the domain's keys."""

    domain: str
    name: str
    values: dict[str, str]


def owner(word: str) -> str:
    """Says who may use a word: "pretraining" or a split of the task."""
    return OWNERS[zlib.crc32(word.encode()) % len(OWNERS)]


def draw_word(rng: Random, user: str) -> str:
    """Draws a word that belongs to `user`."""
    while True:
        word = "".join(rng.choices(SYLLABLES, k=rng.choice([2, 2, 3]))).capitalize()
        if owner(word) == user:
            return word


def draw_record(rng: Random, user: str, domain: str, number: int) -> Record:
    """Draws a record with `number` values beside its name, in a random order."""
    keys = rng.sample(sorted(DOMAINS[domain]), number)
    return Record(domain, draw_word(rng, user), {key: draw_word(rng, user) for key in keys})


# --- Formats: how a record is written down


def draw_format(rng: Random) -> Callable[[Record], str]:
    """Draws one of a few thousand ways to write a record; none has a bracket right after a word."""
    before, after = rng.choice(
        [*[("", "")] * 6, ("(", ")"), ("<", ">"), ("[", "]"), ("{", "}"), ("- ", ""), ("* ", "")]
    )
    left, right = rng.choice(
        [(mark, "") for mark in "=:~#/ "]
        + [("(", ")"), ("{", "}"), ("<", ">"), ("'", "'"), ('"', '"')]
        + [(": ", ""), (" = ", ""), (" is ", ""), ('="', '"'), (": [", "]")]
    )
    joint = rng.choice([", ", "; ", " | ", "\n", " & ", " / ", " + ", ". "])
    start, end = rng.choice([*[("", "")] * 3, ("{", "}"), ("(", ")"), ("[", "]"), ("<", ">"), ("* ", ""), ("", ".")])
    titled = rng.random() < 0.3

    def write(record: Record) -> str:
        pairs = {"name": record.name, **record.values}.items()
        body = joint.join(f"{before}{key}{left}{value}{right}{after}" for key, value in pairs)
        return (f"{record.domain}: " if titled else "") + start + body + end

    return write


def task_format(record: Record) -> str:
    """Writes a record as the task does; what `draw_format` draws cannot."""
    return ", ".join(f"{key}[{value}]" for key, value in {"name": record.name, **record.values}.items())


# --- Styles: how a record is described


def verbs(record: Record) -> list[str]:
    """The record's values as verb phrases."""
    return [f"{DOMAINS[record.domain][key][0]} {key} {value}" for key, value in record.values.items()]


def attributes(record: Record) -> list[str]:
    """The record's values as phrases without a verb."""
    return [f"{DOMAINS[record.domain][key][1]} {key} {value}" for key, value in record.values.items()]


def listed(parts: list[str]) -> str:
    """Joins parts as a sentence does: "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def plain(record: Record) -> str:
    """A sentence for each value."""
    return " ".join(
        [f"{record.name} is a {record.domain}.", *(f"The {record.domain} {verb}." for verb in verbs(record))]
    )


def guide(record: Record) -> str:
    """Two long sentences."""
    first, *rest = attributes(record)
    return f"Our {record.domain} of the week is {record.name}, {first}. We also found it {listed(rest)}."


def headline(record: Record) -> str:
    """Everything before the name."""
    text = listed(attributes(record))
    return f"{text[0].upper()}{text[1:]}: the {record.domain} {record.name}."


def dialogue(record: Record) -> str:
    """Questions and answers."""
    return " ".join(f"Which {key}? {value}." for key, value in {record.domain: record.name, **record.values}.items())


def rumour(record: Record) -> str:
    """Hearsay, two values at a time."""
    said = verbs(record)
    pairs = [listed(said[i : i + 2]) for i in range(0, len(said), 2)]
    return " ".join(f"They say that {record.name} {pair}." for pair in pairs) + f" What a {record.domain}!"


def advert(record: Record) -> str:
    """Exclamations."""
    return f"Discover {record.name}! " + " ".join(f"It {verb}!" for verb in verbs(record))


def letter(record: Record) -> str:
    """A letter to a friend."""
    heard = [f"that the {record.domain} {verb}" for verb in verbs(record)]
    return f"Dear friend, {record.name} is what I write about. I hear {listed(heard)}. Yours."


STYLES = (plain, guide, headline, dialogue, rumour, advert, letter)


# --- What the two stages read


def draw_document(rng: Random, user: str) -> str:
    """Draws a document of pretraining: a record written down and described, rewritten or both."""
    views = [draw_format(rng), *rng.sample(STYLES, rng.choice([1, 1, 2]))]
    if rng.random() < 0.3:
        views[1:] = [draw_format(rng)]
    if rng.random() < 0.1:
        rng.shuffle(views)
    record = draw_record(rng, user, rng.choice(sorted(DOMAINS)), rng.randint(2, 4) if len(views) < 3 else 2)
    return rng.choice(["\n", "\n\n", " => ", "\n---\n", "\nText: "]).join(view(record) for view in views)


def documents(seed: int, user: str = "pretraining") -> Iterator[str]:
    """Endless documents of pretraining, with words that belong to `user`."""
    rng = Random(seed)
    while True:
        yield draw_document(rng, user)


def task(split: str) -> Iterator[dict[str, str]]:
    """Endless examples of the task: restaurants in the task's format, and as the guide describes them."""
    rng = Random(f"quickstart {split}")
    while True:
        record = draw_record(rng, split, "restaurant", rng.randint(3, 4))
        yield {"source": task_format(record), "target": guide(record)}


def write_task(folder: str | Path) -> None:
    """Writes the task's splits as JSON lines."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, number in SPLITS.items():
        lines = [json.dumps(example) + "\n" for example in islice(task(split), number)]
        Path(folder, f"{split}.jsonl").write_text("".join(lines))

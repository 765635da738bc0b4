"""Does a prefix teach a fixed style from 300 instructions?  Pairs made here, a run, and a score that is computed.

    python -m experiments.style --workdir=runs/style [--config.model.name=FOLDER] [--output=FILE]

Every instruction asks for a few things of a kind, in many wordings; every answer is a numbered list of capitalised
words that ends by counting them.  The kinds in the test split are in no other.  An answer has the style's form if it
is such a list with as many things as were asked for, and follows it if they are all different; what they are is not
judged.
"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

from absl import flags

from prefix_tuning.files import read_lines

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "farm animals": "cow horse goat sheep pig hen duck donkey",
    "fruits": "apple pear plum cherry banana grape peach mango",
    "vegetables": "carrot onion leek potato cabbage spinach celery turnip",
    "colours": "red blue green yellow purple orange brown grey",
    "tools": "hammer saw drill wrench chisel pliers file plane",
    "musical instruments": "piano violin flute drum guitar trumpet harp cello",
    "trees": "oak birch pine maple willow ash beech cedar",
    "birds": "robin crow eagle owl swan sparrow heron finch",
    "sports": "tennis football rowing boxing golf hockey judo cricket",
    "kitchen items": "spoon fork knife pan kettle bowl plate whisk",
    "pieces of clothing": "shirt coat scarf hat glove sock skirt belt",
    "kinds of weather": "rain snow fog hail wind storm frost drizzle",
    "jobs": "baker nurse pilot teacher farmer tailor plumber judge",
    "vehicles": "car bus train tram bicycle truck ferry scooter",
    "insects": "ant bee wasp moth beetle fly cricket flea",
    "metals": "iron copper gold silver tin zinc lead nickel",
    "flowers": "rose tulip daisy lily poppy violet iris orchid",
    "drinks": "tea coffee water juice milk cider cocoa lemonade",
    "rooms of a house": "kitchen bathroom bedroom hall attic cellar study pantry",
    "school subjects": "history biology physics music art geography chemistry latin",
    "spices": "pepper cumin saffron ginger clove nutmeg paprika cinnamon",
    "sea animals": "whale shark squid seal crab dolphin octopus lobster",
    "family members": "mother father sister brother aunt uncle cousin grandmother",
    "parts of the body": "arm leg hand foot nose ear knee shoulder",
}
WORDINGS = (
    "Name {number} {kind}.",
    "Can you list {number} {kind}?",
    "I need {number} examples of {kind}.",
    "Give me {number} {kind}, please.",
    "What are {number} {kind}?",
    "Tell me {number} {kind} that come to your mind.",
    "Write down {number} {kind} for my notes.",
    "My teacher asked for {number} {kind}. Which would you pick?",
)
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
LINE = re.compile(r"(\d+)\. ([A-Z][a-z]+(?: [a-z]+)*)")
FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "where pairs and run go", flag_values=FLAGS)
flags.DEFINE_string("output", None, "where the table goes", flag_values=FLAGS)


def answer(things: list[str]) -> str:
    """The list in the one style there is."""
    lines = [f"{number}. {thing.capitalize()}" for number, thing in enumerate(things, 1)]
    return "\n".join([*lines, f"That makes {NUMBERS[len(things)]}."])


def listed(instruction: str, text: str) -> list[str] | None:
    """The things in an answer to this instruction, None unless it has the style's form and as many as are asked for."""
    *lines, last = text.split("\n")
    wanted = next(number for number, word in NUMBERS.items() if f" {word} " in f" {instruction} ")
    found = [LINE.fullmatch(line) for line in lines]
    if len(found) != wanted or not all(found) or last != f"That makes {NUMBERS[wanted]}.":
        return None
    numbered = [int(match[1]) for match in found] == list(range(1, wanted + 1))
    return [match[2].lower() for match in found] if numbered else None


def follows(instruction: str, text: str) -> bool:
    """Whether an answer has the style's form and names different things."""
    things = listed(instruction, text)
    return things is not None and len(set(things)) == len(things)


def pairs(kinds: list[str], size: int, rng: random.Random) -> list[dict[str, str]]:
    """Different instructions about these kinds of things, and their answers."""
    made: dict[str, str] = {}
    while len(made) < size:
        kind, number = rng.choice(kinds), rng.choice(list(NUMBERS))
        asked = rng.choice(WORDINGS).format(number=NUMBERS[number], kind=kind)
        made.setdefault(asked, answer(rng.sample(KINDS[kind].split(), number)))
    return [{"instruction": asked, "output": told} for asked, told in made.items()]


def write(folder: Path) -> None:
    """300 pairs to train on, 20 to validate and 60 to test with; always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, kinds = random.Random(0), list(KINDS)
    rng.shuffle(kinds)
    for split, own, size in (("train", kinds[:16], 300), ("validation", kinds[16:18], 20), ("test", kinds[18:], 60)):
        rows = "".join(json.dumps(pair) + "\n" for pair in pairs(own, size, rng))
        (folder / f"{split}.jsonl").write_text(rows)


def report(run: Path) -> str:
    """Before and after, as Markdown."""
    summary = json.loads((run / "summary.json").read_text())
    lines = ["| | in the style's form | and without repeats | ROUGE-L |", "|---|---|---|---|"]
    for name, file in (("before", "untuned"), ("after", f"test_{summary['steps']}")):
        rows = read_lines(run / "predictions" / f"{file}.jsonl")
        form = sum(listed(row["source"], row["prediction"]) is not None for row in rows)
        right = sum(follows(row["source"], row["prediction"]) for row in rows)
        scores = summary["untuned" if name == "before" else "tuned"]
        lines.append(f"| {name} | {form} of {len(rows)} | {right} of {len(rows)} | {scores['rougeL']:.1f} |")
    counts = summary["parameters"]
    shown = f"{counts['trained']:,} of {counts['frozen']:,} parameters, {summary['steps']} steps"
    return "\n".join([*lines, "", f"{shown}, {summary['seconds'] / 60:.1f} minutes of training"])


def main(arguments: list[str]) -> None:
    """Writes the pairs, trains, scores."""
    options = FLAGS(arguments, known_only=True)[1:]
    if not FLAGS.workdir:
        sys.exit("error: expected --workdir=DIR")
    root = Path(FLAGS.workdir).absolute()
    write(root / "data")
    config = f"--config={ROOT / 'configs' / 'style_smollm2.py'}"
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "train",
        config,
        f"--config.dataset.path={root / 'data'}",
        *options,
    ]
    done = subprocess.run([*command, f"--workdir={root / 'run'}"])
    if done.returncode:
        sys.exit(done.returncode)
    table = report(root / "run")
    print(table)
    if FLAGS.output:
        Path(FLAGS.output).write_text(table + "\n")


if __name__ == "__main__":
    main(sys.argv)

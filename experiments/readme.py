"""Writes results under experiments/results/ into the README, between the markers that carry their names.

    python -m experiments.readme

Each NAME.md there is the output of the command that it begins with; the README holds the shortest and links the others.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def filled(readme: str, results: dict[str, str]) -> str:
    """The README with every marked place holding its result; raises KeyError for a marker without one."""

    def fill(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{results[match[1]].strip()}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", fill, readme, flags=re.DOTALL)


def read_results() -> dict[str, str]:
    """Every experiments/results/NAME.md by name."""
    return {path.stem: path.read_text() for path in sorted((ROOT / "experiments" / "results").glob("*.md"))}


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(), read_results()))

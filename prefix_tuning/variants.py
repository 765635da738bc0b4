"""Several runs of one config that differ in a few sections, one after the other, and their table."""

from pathlib import Path
from typing import Any

from prefix_tuning.errors import UserError
from prefix_tuning.progress import aligned, say, shown
from prefix_tuning.setup import SECTIONS
from prefix_tuning.train import train


def train_variants(config: dict[str, Any], workdir: str | Path) -> str:
    """Trains each variant of config["compare"] in its own folder below `workdir`; returns the table of what came out.

    A variant is {section: options} that replace or join those of the config.  The same command again goes on.  Raises
    `UserError` for a variant without sections, and what `train` raises.
    """
    shared = {name: section for name, section in config.items() if name != "compare"}
    variants = config["compare"]
    for name, changes in variants.items():
        unknown = [section for section in changes if section not in SECTIONS]
        if unknown or not changes:
            raise UserError(f"config.compare.{name} changes {unknown or 'nothing'}; valid: {', '.join(SECTIONS)}")
    summaries = {}
    for name, changes in variants.items():
        say(f"---- {name}")
        summaries[name] = train(shared | changes, Path(workdir) / name)
    return table(summaries)


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """The metrics and the cost of every run, a line each, fewest trained parameters first."""
    summaries = dict(sorted(summaries.items(), key=lambda item: item[1]["parameters"]["trained"]))
    first = next(iter(summaries.values()))
    names = [name for name in first["tuned"] if name in first["untuned"]] or list(first["tuned"])
    head = ["", *names, "trained", "share", "stored kB", "minutes"]
    rows = [head, ["untuned", *(shown(first["untuned"].get(name)) for name in names), "0", "0%", "0", "0"]]
    for name, summary in summaries.items():
        counts = summary["parameters"]
        cost = [
            f"{counts['trained']:,}",
            f"{counts['trained'] / counts['frozen']:.3%}",
            f"{counts['stored'] * 4 / 1000:,.1f}",
            f"{summary['seconds'] / 60:.1f}",
        ]
        rows.append([name, *(shown(summary["tuned"][metric]) for metric in names), *cost])
    return "\n".join([*aligned(rows), f"{first['records']} records of the {first['split']} split"])

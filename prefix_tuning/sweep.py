"""What a config's `sweep(add)` lists, one run after the other, each in a process of its own."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import config_dict

from prefix_tuning.errors import UserError
from prefix_tuning.files import guarded, read_json, replace
from prefix_tuning.progress import say, shown
from prefix_tuning.record import WORKDIR


class Planned(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder below the sweep's
    file: str  # the config's
    arg: str  # the config's argument
    overrides: dict[str, Any]  # "section.key" -> value

    @property
    def flags(self) -> list[str]:
        """The config and the overrides as `run.py train` takes them."""
        config = f"--config={self.file}" + (f":{self.arg}" if self.arg else "")
        return [config, *(f"--config.{key}={value}" for key, value in self.overrides.items())]


def plan(
    sweep: Callable[[Callable], None],
    file: str,
    arg: str,
    get_config: Callable[[str | None], config_dict.ConfigDict],
) -> list[Planned]:
    """The runs of a config file that its `sweep(add)` lists by `add(name, {"section.key": value}, arg="method=lora")`.

    A run without an `arg` takes the sweep's own.  Raises `UserError`, before anything is run, for names that are no
    folders' or come twice, and for overrides that the config does not take.
    """
    planned: list[Planned] = []

    def add(name: str, overrides: dict[str, Any] | None = None, arg: str = arg) -> None:
        if not re.fullmatch(r"[\w.=,+-]+", name) or name in (".", ".."):
            raise UserError(
                f"the sweep's run {name!r} is no name of a folder; expected letters, digits, and . = , + - _"
            )
        if any(name == other.name for other in planned):
            raise UserError(f"the sweep has two runs called {name!r}")
        planned.append(Planned(name, file, arg, dict(overrides or {})))

    sweep(add)
    if not planned:
        raise UserError("the config's sweep(add) adds no run")
    for one in planned:
        config = get_config(one.arg or None).lock()
        try:
            config.update_from_flattened_dict(one.overrides)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the sweep's run {one.name!r}: {' '.join(str(error).split())}") from error
    return planned


def run_all(planned: list[Planned], command: Callable[[Planned], list[str]], root: Path) -> str:
    """Runs what is not finished below `root`, where each run's log.txt is; returns the table of all, also in sweep.md.

    One that fails does not stop the others.  Raises `UserError` in the end, naming those that failed, and
    `KeyboardInterrupt` where a run was stopped: the same command goes on in either case.
    """
    guarded(root, lambda: root.mkdir(parents=True, exist_ok=True))
    failed = []
    for number, one in enumerate(planned, start=1):
        folder = root / one.name
        if (folder / "summary.json").exists():
            continue
        say(f"run {number} of {len(planned)}: {one.name}")
        folder.mkdir(exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            code = subprocess.run([*command(one), f"--workdir={folder}"], stdout=log, stderr=log).returncode
        if code in (130, 143):  # stopped by Ctrl-C or SIGTERM, with its state saved
            raise KeyboardInterrupt
        if code:
            failed.append(one.name)
            say(f"  failed with exit code {code}: {last_line(folder / 'log.txt')}")
        text = table(planned, root)
        guarded(root, lambda text=text: replace(root / "sweep.md", text + "\n"))
        say("\n".join(f"  {line}" for line in text.splitlines()))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(planned)} runs failed: {', '.join(failed)}; see log.txt in their folders"
        )
    return table(planned, root)


def last_line(file: Path) -> str:
    """The last line of a log that says something."""
    return next((line for line in reversed(file.read_text(errors="replace").splitlines()) if line.strip()), "")


def table(planned: list[Planned], root: Path) -> str:
    """A Markdown line for each run: what differs, its scores and minutes once it is finished."""
    found = [
        read_json(root / one.name / "summary.json", WORKDIR) if (root / one.name / "summary.json").exists() else None
        for one in planned
    ]
    scores = list(dict.fromkeys(name for summary in found if summary for name in summary["tuned"]))
    rows = [["run", "settings", *scores, "trained", "minutes"]]
    rows.append(["---"] * len(rows[0]))
    for one, summary in zip(planned, found, strict=True):
        settings = ", ".join([*filter(None, [one.arg]), *(f"{k}={json.dumps(v)}" for k, v in one.overrides.items())])
        cells = [""] * (len(scores) + 2)
        if summary is not None:
            cells = [*(shown(summary["tuned"].get(name)) for name in scores), f"{summary['parameters']['trained']:,}"]
            cells.append(f"{summary['seconds'] / 60:.1f}")
        elif (root / one.name / "log.txt").exists():
            cells[0] = "not finished"
        rows.append([one.name, settings, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

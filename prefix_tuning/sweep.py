"""What a config's `sweep(add)` lists, each run in a process of its own, and the table of how far all of them are."""

import collections
import json
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.console
import rich.live
import rich.table
import rich.text
from ml_collections import config_dict

from prefix_tuning import launch
from prefix_tuning.errors import UserError
from prefix_tuning.files import guarded, replace
from prefix_tuning.progress import Interrupted, say, shown
from prefix_tuning.state import Alive, State, look

RESERVED = (".", "..", "slurm", "sweep.md", "report.html")  # names that a sweep's folder has for other things
# States, those that need eyes first, and their colours on a terminal.
COLOURS = {"failed": "red", "stopped": "yellow", "running": "cyan", "queued": "", "finished": "green", "waiting": "dim"}


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
        if not re.fullmatch(r"[\w.=,+-]+", name) or name in RESERVED:
            raise UserError(
                f"the sweep's run {name!r} is no name of a folder of its own; expected letters, digits, and . = , + - _"
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


class Board:
    """Shows how far all runs are: on a terminal a table, refreshed in place, elsewhere a line for each change."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.console = rich.console.Console(stderr=True, highlight=False)
        self.live = rich.live.Live(console=self.console, auto_refresh=False)

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        """Prints a line above the table."""
        if text:
            self.console.print(text, markup=False, soft_wrap=True)

    def show(self, rows: dict[str, State]) -> None:
        """Brings it up to date."""
        if self.console.is_terminal:
            self.live.update(picture(rows, self.console.height), refresh=True)
            return
        for number, (name, row) in enumerate(rows.items(), start=1):
            before = self.states.get(name, "waiting")
            if row.name != before:
                self.say(f"{name} ({number} of {len(rows)}): {told(row)}")
            self.states[name] = row.name


def finished(folder: Path) -> bool:
    """Whether a run has all its results."""
    return (folder / "summary.json").exists()


def group_of(name: str, together: Sequence[Sequence[str]]) -> Sequence[str]:
    """The runs that train together with this one, itself among them."""
    return next(group for group in together if name in group)


def run_all(
    planned: list[Planned],
    launcher: launch.Local | launch.Slurm,
    root: Path,
    together: Sequence[Sequence[str]] | None = None,
) -> str:
    """Runs what is not finished below `root`, where each run's log.txt is; returns the table of all, also in sweep.md.

    Those that train `together` are one job of the launcher's, by the name of the last of them that is left, which ends
    last and has the log.
    One that fails does not stop the others.  Raises `UserError` in the end, naming those without results, and
    `KeyboardInterrupt` or `Interrupted` where it was stopped: the same command goes on in either case.
    """
    guarded(root, lambda: root.mkdir(parents=True, exist_ok=True))
    names = [one.name for one in planned]
    together = [[name] for name in names] if together is None else together
    left = [[name for name in group if not finished(root / name)] for group in together]
    usual = {signal.SIGTERM: signal.signal(signal.SIGTERM, terminated)}
    if callable(signal.getsignal(signal.SIGINT)):
        usual[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)

    def look_at_all(alive: dict[str, Alive]) -> tuple[dict[str, State], str]:
        everyone = {name: state for job, state in alive.items() for name in group_of(job, together)}
        rows = {name: look(root / name, everyone.get(name)) for name in names}
        text = table(planned, rows)
        guarded(root, lambda: replace(root / "sweep.md", text + "\n"))
        return rows, text

    try:
        with Board() as board:
            board.say(launcher.submit([group[-1] for group in left if group]))
            while True:
                alive = launcher.poll()
                rows, text = look_at_all(alive)
                board.show(rows)
                if not alive:
                    break
                time.sleep(launcher.interval)
            missing = [name for name, row in rows.items() if row.name != "finished"]
            board.live.transient = not missing  # what went wrong stays on the terminal, the rest is printed at the end
    except (KeyboardInterrupt, Interrupted):
        said, alive = launcher.interrupt()
        look_at_all(alive)
        if said:
            say(said)
        raise
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} runs failed or were stopped: {', '.join(missing)}; see log.txt in their "
            "folders; the same command runs them again"
        )
    return text


def terminated(number: int, _: Any) -> None:
    """SIGTERM ends a sweep as Ctrl-C does."""
    raise Interrupted(128 + number)


def told(row: State) -> str:
    """A run's state in words, with its scores once it is finished."""
    note = row.note
    if row.summary is not None:
        note = ", ".join(f"{name} {shown(value)}" for name, value in row.summary["tuned"].items())
    return row.name + (f": {note}" if note else "")


def picture(rows: dict[str, State], height: int) -> rich.console.Group:
    """What a terminal of this height shows; runs that nothing happens to are left out first."""
    counts = collections.Counter(row.name for row in rows.values())
    lines = rich.table.Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(no_wrap=True, overflow="ellipsis")
    eventful = sorted(rows, key=lambda name: list(COLOURS).index(rows[name].name))[: max(3, height - 3)]
    for name, row in rows.items():
        if name in eventful:
            lines.add_row(name, rich.text.Text(told(row), style=COLOURS[row.name]))
    head = f"{len(rows)} runs: " + ", ".join(f"{counts[name]} {name}" for name in COLOURS if counts[name])
    left = len(rows) - len(eventful)
    return rich.console.Group(head, lines, *([f"and {left} more, see sweep.md"] if left else []))


def table(planned: list[Planned], rows: dict[str, State]) -> str:
    """A Markdown line for each run: what differs, how far it is, its scores and minutes once it is finished."""
    scores = list(dict.fromkeys(name for row in rows.values() if row.summary for name in row.summary["tuned"]))
    lines = [["run", "settings", "state", *scores, "trained", "minutes"]]
    lines.append(["---"] * len(lines[0]))
    for one in planned:
        row = rows[one.name]
        settings = ", ".join([*filter(None, [one.arg]), *(f"{k}={json.dumps(v)}" for k, v in one.overrides.items())])
        cells = [""] * (len(scores) + 2)
        if row.summary is not None:
            cells = [shown(row.summary["tuned"].get(name)) for name in scores]
            cells += [f"{row.summary['parameters']['trained']:,}", f"{row.summary['seconds'] / 60:.1f}"]
        state = row.name if row.summary else told(row)
        lines.append([one.name, *(text.replace("|", "\\|") for text in (settings, state)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""How far the run in a folder is, read from what it leaves there, without JAX."""

import json
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

from prefix_tuning.errors import UserError
from prefix_tuning.files import read_json

PROGRESS = re.compile(r"^step (\d+)/(\d+): (loss [^,]+),", re.MULTILINE)  # what a run says where it shows no bar
STOPPED = (130, 143, -signal.SIGTERM)  # exit codes of a run that Ctrl-C or SIGTERM has stopped, the last one early
SUMMARY = "what 'run.py train' writes at its end"
PARTS = {"untuned": dict, "tuned": dict, "parameters": dict, "seconds": float}  # of a summary that tables show
TAIL = 1 << 16  # bytes of a log that are read for what it says last


class Alive(NamedTuple):
    """A run that is not over, as its launcher sees it."""

    state: str  # waiting, queued or running
    note: str = ""


class State(NamedTuple):
    """How far a run is."""

    name: str  # waiting, queued, running, finished, failed or stopped
    note: str = ""
    summary: dict[str, Any] | None = None


def look(folder: Path, alive: Alive | None = None) -> State:
    """The state of a folder's run; without an `alive`, of one that nobody runs now."""
    if (folder / "summary.json").exists():
        try:
            summary = read_json(folder / "summary.json", SUMMARY)
        except UserError as error:
            return State("failed", str(error))
        if not all(isinstance(summary.get(key), kind) for key, kind in PARTS.items()):
            return State("failed", f"{folder / 'summary.json'} has no {', '.join(PARTS)}; expected {SUMMARY}")
        return State("finished", "", summary)
    log = tail(folder / "log.txt")
    step = reached(folder, log)
    if alive is not None:
        last = last_line(log) if alive.state == "running" and not step else step
        return State(alive.state, ", ".join(filter(None, [last, alive.note])))
    code = tail(folder / "exit_code").strip()
    if code and code not in map(str, STOPPED):
        return State("failed", f"exit code {code}: {last_line(log)}")
    return State("stopped", step or ("before its first steps" if folder.exists() else "before it began"))


def reached(folder: Path, log: str) -> str:
    """The last step that a run tells of, in its log or else in its metrics."""
    if said := PROGRESS.findall(log):
        return "step {}/{}, {}".format(*said[-1])
    try:
        return f"step {int(json.loads(last_line(tail(folder / 'metrics.jsonl')))['step'])}"
    except (ValueError, TypeError, KeyError):
        return ""


def tail(file: Path) -> str:
    """The end of a file, of one that cannot be read nothing."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, opened.seek(0, 2) - TAIL))
            return opened.read().decode(errors="replace")
    except OSError:
        return ""


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")

"""Two processes that take turns: each waits, does what it is told, and says how long that took and how much it held."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

READY = "ready"


class Worker:
    """A module in a process of its own, which `serve`s the actions that `ask` names."""

    def __init__(self, module: str, *arguments: str, environment: dict[str, str] | None = None):
        """Starts `python -m module arguments`, without waiting for it."""
        self.module, self.started = module, time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).resolve().parent.parent,
        )

    def ask(self, action: str, **values: Any) -> dict[str, Any]:
        """What an action answers, with its "seconds"; raises RuntimeError if the process ended instead."""
        print(json.dumps([action, values]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"{self.module} ended with exit code {code} instead of answering to {action!r}")
        return json.loads(line)

    def elapsed(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self.started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(actions: dict[str, Callable[..., dict[str, Any]]], answers: IO[str]) -> None:
    """Answers to a `Worker` until it closes."""
    for line in sys.stdin:
        action, values = json.loads(line)
        start = time.perf_counter()
        found = actions[action](**values)
        print(json.dumps({"seconds": time.perf_counter() - start, **found}), file=answers, flush=True)


def timed(seconds: list[float], function: Callable, *arguments: Any) -> Any:
    """What a function returns; how long it took goes to the end of `seconds`."""
    start = time.perf_counter()
    result = function(*arguments)
    seconds.append(time.perf_counter() - start)
    return result


def host_memory() -> dict[str, float]:
    """MiB that this process has held at most, and that it could still take; Linux only."""
    # Not getrusage's peak: there a process starts at what its parent held.
    status, machine = (Path(file).read_text() for file in ("/proc/self/status", "/proc/meminfo"))
    found = {"peak": re.search(r"VmHWM:\s*(\d+)", status), "free": re.search(r"MemAvailable:\s*(\d+)", machine)}
    return {name: int(match[1]) / 1024 for name, match in found.items()}

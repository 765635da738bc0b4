"""What the user sees while a run goes on, and how a run is asked to stop."""

import collections
import math
import os
import resource
import signal
import statistics
import sys
import threading
import time
from typing import Any

import jax
import optax
from tqdm import tqdm

from prefix_tuning import hosts
from prefix_tuning.errors import UserError
from prefix_tuning.record import Record
from prefix_tuning.train_step import Sums

RECENT = 100  # steps whose duration is remembered, so that one that compiled does not count


class Interrupted(Exception):
    """SIGTERM or Ctrl-C, raised where it is safe to stop."""


class Stop:
    """Notes the first SIGTERM or Ctrl-C for `check` to raise, on all hosts at once; a second one ends the process.

    A thread hears them, since Python calls a handler when the main thread is done with what it computes, compiling say;
    and the process ends without an exception, which is lost if the handler raises it in a callback of JAX's.  What was
    saved is whole: every file is renamed to its name when it is.
    """

    def __enter__(self) -> "Stop":
        self.number = None
        self.known = None  # the largest number that any host had when `check` was called last
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.usual = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        self.woken = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        signal.set_wakeup_fd(self.woken)
        for number, handler in self.usual.items():
            signal.signal(number, handler)
        os.close(self.writer)
        self.thread.join()
        os.close(self.reader)

    def note(self, number: int, _: Any) -> None:
        """The signal handler: what has come is known when the main thread asks, whatever the other one does."""
        self.number = self.number or number

    def listen(self) -> None:
        """Hears every signal at once."""
        heard = 0
        while byte := os.read(self.reader, 1):
            number = byte[0]
            if number not in self.usual:
                continue
            heard += 1
            name = signal.Signals(number).name
            if heard == 1:
                say(f"{name}: saving, then stopping (once more to stop at once)")
            else:
                hosts.say_at_death("")
                os.write(2, f"{name}: stopped at once; the same command goes on from what was saved\n".encode())
                os._exit(128 + number)

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come.

        On several hosts all must call it, and what has come to one of them raises on all, in the next call: by then
        the answer is there, and no device waits for it.
        """
        before, self.known = self.known, hosts.largest(self.number or 0)
        number = int((self.known if hosts.count() == 1 else before) or 0)
        if number:
            raise Interrupted(128 + number)


class Meter:
    """Reads each step's sums: stops a run that diverges, counts time, shows progress and writes train metrics."""

    def __init__(
        self,
        record: Record,
        schedule: optax.Schedule,
        *,
        total: int,
        log_every: int,
        first: int,
        notes: dict[str, Any] | None,
        quiet: bool = False,
    ):
        """Goes on after step `first` of `total`, from the `notes` of the run that was stopped there.

        A quiet one shows nothing; nor do those of other hosts than the first.
        """
        quiet = quiet or not hosts.primary()
        self.record, self.schedule, self.total, self.log_every = record, schedule, total, log_every
        self.seconds, self.window = (notes["seconds"], notes["window"]) if notes else (0.0, {})
        self.recent = collections.deque(notes["recent"] if notes else (), maxlen=RECENT)  # seconds of the last steps
        self.mark = None
        self.bar = tqdm(total=total, initial=first, unit="step", disable=quiet or None, dynamic_ncols=True)
        self.quiet = quiet

    def notes(self) -> dict[str, Any]:
        """What a resumed run needs to log as if it had never stopped."""
        return {"seconds": self.seconds, "window": self.window, "recent": list(self.recent)}

    def resume(self) -> None:
        """Starts the clock, unless it is running."""
        self.mark = self.mark or time.perf_counter()

    def cost(self, runs: int = 1) -> dict[str, float]:
        """One of so many runs' share in the seconds of training and of a median step among the last ones, and the
        process's peak memory in MiB."""
        return {
            "seconds": round(self.seconds / runs, 1),
            "seconds_per_step": round(statistics.median(self.recent) / runs, 4),
            "peak_memory_mb": peak_memory(),
        }

    def pause(self) -> None:
        """Stops the clock: what follows is not training."""
        self.mark = None

    def read(self, pending: tuple[int, Sums] | None) -> None:
        """Takes in a step's sums; raises `UserError` if its loss or gradient is not finite."""
        if pending is None:
            return
        step, sums = pending[0], {name: float(value) for name, value in jax.device_get(pending[1]).items()}
        norms = {name: sums.pop(name) for name in list(sums) if name.endswith("_norm")}
        if not math.isfinite(sums["loss"]) or not math.isfinite(norms["grad_norm"]):
            raise UserError(
                f"loss {sums['loss']}, gradient norm {norms['grad_norm']} at step {step}: not finite; the checkpoints "
                "before it are kept; try a lower optimizer.learning_rate, more optimizer.warmup_steps or a smaller "
                "optimizer.clip, with another workdir"
            )
        now = time.perf_counter()
        sums["seconds"], self.mark = now - self.mark, now
        self.seconds += sums["seconds"]
        self.recent.append(sums["seconds"])
        self.window = {name: self.window.get(name, 0.0) + value for name, value in sums.items()}
        self.bar.update(step - self.bar.n)
        if step % self.log_every == 0 or step == self.total:
            self.log(step, norms)

    def log(self, step: int, norms: dict[str, float]) -> None:
        """Writes the window's means and shows them."""
        window, self.window = self.window, {}  # sums over the steps since the last line
        loss = window["loss"] / window["count"]
        rates = {f"{unit}_per_second": window[unit] / window["seconds"] for unit in ("examples", "tokens")}
        rate = float(self.schedule(step - 1))
        values = {
            "loss": loss,
            "accuracy": window["correct"] / window["targets"],
            "learning_rate": rate,
            **norms,
            **rates,
        }
        self.record.metrics(step, {f"train/{name}": value for name, value in values.items()})
        line = f"loss {loss:.4f}, {rates['examples_per_second']:.1f} ex/s, {rates['tokens_per_second']:.0f} tok/s"
        self.bar.set_postfix_str(line)
        if self.bar.disable and not self.quiet:
            left = (self.total - step) * self.seconds / step
            # `state.PROGRESS` reads this.
            say(f"step {step}/{self.total}: {line}, {left / 60:.1f} min left")

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()


def peak_memory() -> int:
    """The most memory that this process has held, in MiB: an accelerator's where it says so, else the host's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] >> 20
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held >> (20 if sys.platform == "darwin" else 10)  # bytes there, KiB elsewhere


def share(counts: dict[str, int]) -> str:
    """How much of the model is trained."""
    part = counts["trained"] / counts["frozen"]
    return f"training {counts['trained']:,} parameters beside {counts['frozen']:,} frozen ({part:.3%})"


def shown(value: float | None) -> str:
    """A score for a table."""
    return "null" if value is None else f"{value:.4f}"


def aligned(rows: list[list[str]]) -> list[str]:
    """A line of text for each row: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{c:>{w}}" if i else f"{c:<{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells))
    return lines


def table(summary: dict[str, Any]) -> str:
    """The end of a run as text: untuned against tuned, what it took, where everything lies."""
    untuned, tuned = summary["untuned"], summary["tuned"]
    rows = [("", "untuned", "tuned")]
    rows += [(key, shown(untuned[key]) if key in untuned else "-", shown(tuned[key])) for key in tuned]
    width = max(len(row[0]) for row in rows)
    adapter = f", the adapter in {summary['adapter']}" if summary["adapter"] else ""
    lines = [f"{key:{width}}  {before:>9}  {after:>9}" for key, before, after in rows]
    lines += [
        f"{summary['records']} records of the {summary['split']} split",
        f"{share(summary['parameters'])}, {summary['steps']} steps in {summary['seconds'] / 60:.1f} minutes",
        f"everything is in {summary['workdir']}{adapter}",
    ]
    return "\n".join(lines)


def say(line: str) -> None:
    """Prints a line for the user beside a progress bar; of several hosts the first one does."""
    if hosts.primary():
        tqdm.write(line, file=sys.stderr)

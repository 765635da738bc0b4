"""Where the runs of a sweep run: here, one after the other, or in Slurm's queue, each as a task of a job array.

Both launchers have `submit(names)`, which takes on what is to run and returns what there is to say about it; `poll()`,
which says of every run that is not over whether it is waiting, queued or running; and `interrupt()`, which ends the
watching and returns what there is to say, and what is still not over.
"""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefix_tuning.errors import UserError, valid
from prefix_tuning.files import guarded, read_json, replace, write_json
from prefix_tuning.state import STOPPED, Alive

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ("local", "slurm")
TIMEOUTS = 20  # times that a run is requeued at its time limit before it counts as one that does not end
# What --slurm takes, in submitit's names, and what reads each value.
OPTIONS: dict[str, Callable[[str], Any]] = {
    "partition": str,
    "account": str,
    "qos": str,
    "constraint": str,
    "nodelist": str,
    "exclude": str,
    "gres": str,
    "nodes": int,
    "timeout_min": int,
    "mem_gb": float,
    "cpus_per_task": int,
    "gpus_per_node": int,
    "array_parallelism": int,
    "signal_delay_s": int,
}
DEFAULTS = {"timeout_min": 60}
# Those that submitit has for other schedulers too.
ALL_CLUSTERS = ("nodes", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")


class Process:
    """One command that writes to its folder's log.txt and leaves its exit code there.

    It holds a lock on the folder as long as it lives: a sweep that was killed leaves its run behind, and two must not
    train in one folder.  Of a run in several processes each has a number, and those beyond the first have files of
    their own.
    """

    def __init__(self, command: list[str], folder: Path, number: int = 0):
        self.command, self.folder = command, folder
        self.lock, self.log, self.code = (
            folder / (f"host_{number}_{name}" if number else name) for name in ("lock", "log.txt", "exit_code")
        )

    def start(self) -> bool:
        """Starts it, unless another process still holds the folder; whether it did."""
        guarded(self.folder, lambda: self.folder.mkdir(parents=True, exist_ok=True))
        with self.lock.open("w") as lock, self.log.open("a") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                pass  # a file system without locks
            self.code.unlink(missing_ok=True)
            # Its own session, so that Ctrl-C reaches this process alone, which then stops it.
            self.popen = subprocess.Popen(
                self.command, stdout=log, stderr=log, pass_fds=[lock.fileno()], start_new_session=True
            )
        return True

    def ended(self, code: int) -> None:
        """Notes how it ended."""
        guarded(self.folder, lambda: replace(self.code, f"{code}\n"))


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within it SIGINT and SIGTERM, where they have handlers, are only noted; the handlers are called at its end."""
    came: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = {number: handler for number, handler in usual.items() if callable(handler)}
    for number in usual:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


class Local:
    """Runs on this machine, one after the other."""

    interval = 0.5  # seconds between two looks

    def __init__(self, command: Callable[[str], list[str]], root: Path):
        self.command, self.root = command, root
        self.left: list[str] = []
        self.process: Process | None = None

    def submit(self, names: list[str]) -> str:
        """Takes on these runs."""
        self.left = list(names)
        return ""

    def poll(self) -> dict[str, Alive]:
        """The runs that are not over; raises `KeyboardInterrupt` if somebody else has stopped the one that runs."""
        if self.process is not None and (code := self.process.popen.poll()) is not None:
            self.process.ended(code)
            self.process = None
            self.left.pop(0)
            if code in STOPPED:
                raise KeyboardInterrupt
        while self.left and (self.root / self.left[0] / "summary.json").exists() and self.process is None:
            self.left.pop(0)  # which another sweep's process has finished meanwhile
        if self.left and self.process is None:
            process = Process(self.command(self.left[0]), self.root / self.left[0])
            with held_back():  # between a process's start and its note here, `interrupt` would not know of it
                self.process = process if process.start() else None
        note = "" if self.process else "in a process that another sweep began"
        return {name: Alive("waiting") if i else Alive("running", note) for i, name in enumerate(self.left)}

    def interrupt(self) -> tuple[str, dict[str, Alive]]:
        """Stops the run, which saves its state first; once more Ctrl-C kills it."""
        if self.process is None:
            return "", {}
        try:
            self.process.popen.terminate()
            self.process.ended(self.process.popen.wait())
        except BaseException:
            self.process.popen.kill()
            raise
        return "the run is stopped; the same command goes on", {}


class Task:
    """What a job of Slurm runs: one run of the sweep, so that it can be stopped and requeued at any time.

    Slurm sends its signals to every process of a job.  SIGTERM, before it cancels, preempts or requeues, thus reaches
    the run itself, which saves and stops.  SIGUSR2, before the time limit, would kill it and is kept from it: submitit
    takes it, calls `checkpoint`, and requeues the job.

    On several nodes each has such a task, whose processes join by what Slurm tells them (hosts.py).  The first one
    speaks for the job, and to stop its process stops all.
    """

    def __init__(self, command: list[str], folder: Path):
        self.command, self.folder = command, folder
        self.told = False  # by Slurm, to end

    def __call__(self) -> None:
        """Runs the command to its end; raises `RuntimeError` if it failed, so that the job counts as failed."""
        signal.signal(signal.SIGTERM, self.note)
        number = int(os.environ.get("SLURM_PROCID", "0"))
        self.process = Process(["sh", "-c", 'trap "" USR2; exec "$@"', "sh", *self.command], self.folder, number)
        while not self.process.start():
            time.sleep(5)
        code = self.process.popen.wait()
        while code in STOPPED and self.told:
            signal.pause()  # to end by itself now would keep a preempted job from being requeued
        self.process.ended(code)
        if code and not (number and code in STOPPED):  # which the first one may do to be requeued
            raise RuntimeError(f"exit code {code}; see {self.process.log}")

    def note(self, *_: Any) -> None:
        """The handler of SIGTERM."""
        self.told = True

    def checkpoint(self) -> Any:
        """Stops the run, and returns what to run when the job begins again: the same."""
        from submitit.helpers import DelayedSubmission

        popen = self.process.popen
        if popen.returncode is None:
            if not self.told:
                popen.terminate()
            # Not popen.wait: this is a signal's handler, and what it interrupted holds that lock.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Task(self.command, self.folder))


class Slurm:
    """Runs in Slurm's queue, through submitit; watching them may stop and begin again at any time."""

    interval = 5.0  # seconds between two looks at the queue

    def __init__(self, command: Callable[[str], list[str]], root: Path, options: dict[str, Any]):
        """Raises `UserError` where there is no Slurm."""
        missing = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]
        if missing:
            raise UserError(f"--launcher=slurm needs Slurm's commands, and {missing[0]} is not on this machine's PATH")
        self.command, self.root, self.options = command, root, options
        self.folder = (root / "slurm").resolve()
        if "%" in str(self.folder):
            raise UserError(f"--workdir={root}: Slurm reads a % in {self.folder} as its own; use another folder")
        self.jobs = read_jobs(root)
        self.alive: dict[str, Alive] = {}
        self.missed: dict[str, int] = {}

    def submit(self, names: list[str]) -> str:
        """Submits those that are not in the queue yet, as one job array."""
        self.alive = queued(self.jobs)
        new = [name for name in names if name not in self.alive]
        said = [f"{len(names) - len(new)} of {len(names)} runs are in Slurm's queue already"] * (new != names)
        if new:
            said.append(f"{len(new)} runs submitted as Slurm's job {self.sbatch(new)}")
            self.alive |= {name: Alive("queued") for name in new}
        return "; ".join(said)

    def sbatch(self, names: list[str]) -> str:
        """Submits runs and returns the job's number."""
        import submitit

        job = f"{re.sub(r'[^A-Za-z0-9.-]', '_', self.root.resolve().name)}-{uuid.uuid4().hex[:8]}"
        self.jobs = {old: runs for old, runs in self.jobs.items() if self.alive.keys() & set(runs)} | {job: names}
        guarded(self.root, lambda: self.folder.mkdir(parents=True, exist_ok=True))
        # Before sbatch: a crash in between then leaves a job's name without a job, not a job that nobody knows of.
        write_json(self.folder / "jobs.json", self.jobs)
        executor = submitit.AutoExecutor(self.folder, cluster="slurm", slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(
            name=job,
            **{key if key in ALL_CLUSTERS else f"slurm_{key}": value for key, value in self.options.items()},
            tasks_per_node=1,  # with all of a node's devices
            slurm_additional_parameters={"requeue": True},  # whatever the cluster's default
            slurm_setup=[f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"],
        )
        folders = {name: (self.root / name).resolve() for name in names}
        try:
            submitted = executor.submit_array([Task(self.command(name), folders[name]) for name in names])
        except Exception as error:  # submitit's own, with sbatch's words in the last line
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"Slurm takes no job: {lines[-1]}") from error
        return submitted[0].job_id.partition("_")[0]

    def poll(self) -> dict[str, Alive]:
        """The runs that are not over."""
        try:
            found = queued(self.jobs)
        except UserError as error:  # Slurm's controller is busy or away, which jobs survive
            self.alive = {name: alive._replace(note=str(error)) for name, alive in self.alive.items()}
            return self.alive
        for name in self.alive.keys() - found.keys():
            self.missed[name] = self.missed.get(name, 0) + 1
        self.missed = {name: count for name, count in self.missed.items() if name not in found}
        # One that is gone is given another look, by when a shared file system shows what it has written last.
        late = {name: alive for name, alive in self.alive.items() if self.missed.get(name) == 1}
        self.alive = {name: alive for name, alive in (late | found).items() if not self.finished(name)}
        return self.alive

    def finished(self, name: str) -> bool:
        """Whether a run has all its results."""
        return (self.root / name / "summary.json").exists()

    def interrupt(self) -> tuple[str, dict[str, Alive]]:
        """Leaves the jobs alone."""
        jobs = ",".join(job for job, names in self.jobs.items() if self.alive.keys() & set(names))
        said = f"the jobs go on; the same command watches them again, 'scancel --name={jobs}' cancels them"
        return said if jobs else "", self.alive


def make(launcher: str, slurm: str | None, command: Callable[[str], list[str]], root: Path) -> Local | Slurm:
    """The launcher of this name; raises `UserError` for options that it does not take, and where runs of a sweep that
    is to run here are in Slurm's queue."""
    valid("launcher", launcher, LAUNCHERS)
    if launcher == "slurm":
        return Slurm(command, root, parse(slurm or ""))
    if slurm is not None:
        raise UserError("--slurm is for --launcher=slurm")
    jobs = read_jobs(root)
    if jobs and shutil.which("squeue") and (alive := queued(jobs)):
        raise UserError(
            f"{len(alive)} runs of {root} are in Slurm's queue; use --launcher=slurm, or cancel them with "
            f"'scancel --name={','.join(jobs)}'"
        )
    return Local(command, root)


def parse(text: str) -> dict[str, Any]:
    """The options in "partition=gpu,timeout_min=60"; raises `UserError` for what is unknown or no value."""
    options = dict(DEFAULTS)
    for part in filter(None, re.split(r",(?=\w+=)", text)):  # a value may hold commas: nodelist=a,b
        key, equals, value = part.partition("=")
        valid("option of --slurm", key, OPTIONS)
        try:
            options[key] = OPTIONS[key](value)
        except ValueError:
            options[key] = 0
        if not equals or not value or (OPTIONS[key] is not str and not options[key] > 0):
            raise UserError(f"--slurm: {part!r} must be {key}={'TEXT' if OPTIONS[key] is str else 'a number above 0'}")
    return options


def read_jobs(root: Path) -> dict[str, list[str]]:
    """The names of a sweep's jobs so far, each with its runs in the array's order."""
    file = root / "slurm" / "jobs.json"
    return read_json(file, "the jobs that 'run.py sweep --launcher=slurm' has submitted") if file.exists() else {}


def queued(jobs: dict[str, list[str]]) -> dict[str, Alive]:
    """Which runs of these jobs Slurm's queue holds; raises `UserError` if squeue does not answer."""
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--array", f"--name={','.join(jobs)}", "--format=%j|%i|%T|%r"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"squeue does not answer: {' '.join(done.stderr.split())}")
    found = {}
    for line in done.stdout.splitlines():
        job, number, state, reason = line.strip().split("|")
        name = jobs[job][int(number.partition("_")[2] or 0)]
        running = state in ("RUNNING", "COMPLETING")
        note = f"job {number}" + (f", {reason}" if reason != "None" else "")  # Resources, Priority, BeginTime, ...
        found[name] = Alive("running" if running else "queued", note)
    return found

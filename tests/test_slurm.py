"""A sweep in a real Slurm: submitted, one run cancelled, one requeued, the watcher killed; then all is finished.

It needs Slurm on this machine, in a state to run jobs; tests/slurm_one_machine.sh starts one.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run

ROOT = Path(run.__file__).parent
CONFIG = """
from configs import quickstart


def sweep(add):
    for length in (2, 3, 4):
        add(f"length={length}", {"method.length": length, "optimizer.warmup_steps": 0})


get_config = quickstart.get_config
"""
SHORT = [
    "train.epochs=40",
    "train.examples=48",
    "train.batch_size=8",
    "train.log_every=2",
    "evaluation.metrics=()",
    "evaluation.examples=8",
]


def slurm(*command):
    """What one of Slurm's commands prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.fixture
def cluster():
    """Skips where Slurm does not run, or has nothing to run on."""
    if shutil.which("sbatch") is None:
        pytest.skip("there is no Slurm on this machine (Debian: tests/slurm_one_machine.sh)")
    done = subprocess.run(["sinfo", "--noheader", "--format=%t"], capture_output=True, text=True, check=False)
    if not {"idle", "mix"} & set(done.stdout.split()):
        pytest.skip(f"Slurm has no idle node here: {done.stdout or done.stderr}")


def wait(condition, what):
    """Until a condition holds, and then its value."""
    for _ in range(1200):
        if value := condition():
            return value
        time.sleep(0.5)
    raise AssertionError(f"{what} did not happen in ten minutes")


def test_a_sweep_survives_what_slurm_does_to_it(tmp_path, cluster):
    (tmp_path / "config.py").write_text(CONFIG)
    root = tmp_path / "runs"
    flags = [f"--config={tmp_path}/config.py", f"--workdir={root}", *(f"--config.{option}" for option in SHORT)]
    options = ["--launcher=slurm", "--slurm=timeout_min=30,cpus_per_task=1"]
    command = [sys.executable, str(ROOT / "run.py"), "sweep", *flags, *options]
    # One device, as on a node; and one thread, so that two jobs on two CPUs do not stand in each other's way.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false"}
    watcher = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        job = wait(lambda: slurm("squeue", "--noheader", "--array", "--format=%A %i %o").splitlines(), "a job")
        assert len(job) == 3
        number = job[0].split()[1].partition("_")[0]
        logs = [root / f"length={length}" / "log.txt" for length in (2, 3, 4)]
        begun = lambda log: log.exists() and "step 4/" in log.read_text()  # noqa: E731
        wait(lambda: any(map(begun, logs)), "a step")
        first = next(i for i, log in enumerate(logs) if begun(log))
        watcher.kill()
        assert "3 runs submitted as Slurm's job " + number in watcher.stderr.read()

        # ---- another one is cancelled before or while it runs, the first is requeued by the administrator
        slurm("scancel", f"{number}_2" if first != 2 else f"{number}_1")
        slurm("scontrol", "requeue", f"{number}_{first}")
        queue = lambda: slurm("squeue", "--noheader", "--array", f"--jobs={number}", "--format=%i %T").splitlines()  # noqa: E731
        wait(lambda: f"{number}_{first} PENDING" in queue() and len(queue()) == 2, "the job's return to the queue")
        assert "the same command goes on from there" in logs[first].read_text()
        slurm("scontrol", "update", f"jobid={number}_{first}", "starttime=now")  # it would wait for two minutes

        # ---- the same command submits the cancelled one alone, and watches all
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "2 of 3 runs are in Slurm's queue already; 1 runs submitted as Slurm's job " in done.stderr
    finally:
        watcher.kill()
        watcher.wait()
        watcher.stderr.close()
        if (root / "slurm" / "jobs.json").exists():
            slurm("scancel", *(f"--name={name}" for name in json.loads((root / "slurm" / "jobs.json").read_text())))
    assert done.stdout.count("| finished |") == 3
    assert "going on after step" in logs[first].read_text()
    for log in logs:
        lines = [json.loads(line) for line in (log.parent / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "train/loss" in line] == list(range(2, 241, 2))

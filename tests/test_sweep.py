"""Sweeps: all is checked before anything runs, what is done is not done again, one failure stops no other run."""

import gc
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import rich.console
from submitit.core.utils import DelayedSubmission

import run
from prefix_tuning import launch, state, sweep
from prefix_tuning.errors import UserError
from prefix_tuning.progress import Interrupted
from prefix_tuning.state import Alive, State

SWEEP = """
from configs import quickstart


def sweep(add):
    add("length=3", {"method.length": 3, "optimizer.warmup_steps": 0})
    add("lora", {"method.rank": 1, "optimizer.warmup_steps": 0}, arg="method=lora")


get_config = quickstart.get_config
"""
SHORT = ["train.epochs=1", "train.examples=24", "train.shapes=1", "train.batch_size=8", "text.max_source=12"]
SHORT += ["text.max_target=6", "evaluation.metrics=()", "evaluation.examples=8", "evaluation.batch_size=8"]


def test_a_sweep_runs_what_is_listed_and_goes_on(tmp_path, capsys, monkeypatch, commands_here):
    """One by one with the command line's overrides; a run that fails is named, and the same command runs it alone.

    The second time as a process; what fails, and what is beside it, in this one.
    """
    (tmp_path / "config.py").write_text(SWEEP)
    command = ["sweep", f"--config={tmp_path}/config.py", *(f"--config.{option}" for option in SHORT)]
    root = tmp_path / "runs"
    broken = root / "length=3"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("[]")  # which no run of this config wrote
    assert run.main([*command, f"--workdir={root}"]) == 1
    error = capsys.readouterr().err
    assert "error: 1 of 2 runs failed or were stopped: length=3; " in error
    assert re.search(r"^length=3 \(1 of 2\): failed: exit code 1: error: .* holds list, not a JSON object", error, re.M)
    done = (root / "lora" / "summary.json").stat().st_mtime_ns
    (broken / "config.json").unlink()
    monkeypatch.undo()
    assert run.main([*command, f"--workdir={root}"]) == 0
    out = capsys.readouterr().out
    assert done == (root / "lora" / "summary.json").stat().st_mtime_ns
    lines = out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| length=3", "| lora"]
    assert "| method=lora, method.rank=1, optimizer.warmup_steps=0 | finished |" in lines[3]
    log = (root / "lora" / "log.txt").read_text()
    assert state.PROGRESS.findall(log)[-1][:2] == ("3", "3")
    assert (root / "sweep.md").read_text() == out
    for name, trained in (("length=3", 3 * 2 * 2 * 128), ("lora", 4 * (128 + 128 + 128 + 64))):
        summary = json.loads((root / name / "summary.json").read_text())
        assert summary["records"] == 8
        assert summary["parameters"]["trained"] == trained
        assert f"{trained:,}" in out


def listed(*added):
    def lists(add):
        for one in added:
            add(*one[:2], **(one[2] if len(one) > 2 else {}))

    config = "configs/quickstart.py"
    return sweep.plan(lists, config, "quick", lambda arg: run.load_config(f"{config}:{arg or ''}"))


def test_runs_have_the_sweeps_argument_or_their_own():
    one, two = listed(("a", {"method.length": 3}), ("b", {}, {"arg": "method=lora"}))
    assert one == sweep.Planned("a", "configs/quickstart.py", "quick", {"method.length": 3})
    assert one.flags == ["--config=configs/quickstart.py:quick", "--config.method.length=3"]
    assert two.arg == "method=lora"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([], r"the config's sweep\(add\) adds no run"),
        ([("a/b", {})], "the sweep's run 'a/b' is no"),
        ([("..", {})], "the sweep's run '..' is no"),
        ([("a", {}), ("a", {"seed": 1})], "the sweep has two runs called 'a'"),
        ([("a", {"method.lenth": 1})], "the sweep's run 'a': .*lenth"),
        ([("a", {"method.length": "long"})], "the sweep's run 'a': .*length"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_runs(added, message):
    with pytest.raises(UserError, match=message):
        listed(*added)


def test_a_config_without_a_sweep(capsys, tmp_path):
    assert run.main(["sweep", "--config=configs/quickstart.py", f"--workdir={tmp_path}/w"]) == 1
    assert "configs/quickstart.py has no sweep(add), which lists the runs" in capsys.readouterr().err
    assert run.main(["sweep", f"--workdir={tmp_path}/w"]) == 1
    assert "sweep needs --config" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.name=/nowhere", "run 'length=3': model '/nowhere' is no folder, and no name on the hub"),
        ("evaluation.final_split=tset", "run 'length=3': unknown split 'tset'; valid: test, train, validation"),
    ],
)
def test_what_every_run_reads_is_looked_for_before_the_first_one(tmp_path, capsys, option, message):
    (tmp_path / "config.py").write_text(SWEEP)
    command = ["sweep", f"--config={tmp_path}/config.py", f"--config.{option}", f"--workdir={tmp_path}/w"]
    assert run.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_sweep_holds_no_accelerator(tmp_path):
    """Not while it looks for the model and the data either: its runs need all of it."""
    (tmp_path / "config.py").write_text(SWEEP)
    options = [f"--config={tmp_path}/config.py", "--config.dataset.path=/nowhere", f"--workdir={tmp_path}/w"]
    done = subprocess.run(
        [sys.executable, run.__file__, "sweep", *options],
        env=os.environ | {"JAX_PLATFORMS": "none", "PYTHONPATH": str(launch.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.startswith("error: run 'length=3': no folder /nowhere, and that is no hub name")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def python(code):
    """A launcher's command that runs this code, whatever the run's name."""
    return lambda name: [sys.executable, "-c", code]


def two():
    return [sweep.Planned(name, "config.py", "", {}) for name in ("one", "two")]


def test_a_stopped_run_stops_the_sweep(tmp_path):
    """With what is done kept; the next run is not begun."""
    with pytest.raises(KeyboardInterrupt):
        sweep.run_all(two(), launch.Local(python("import sys; sys.exit(130)"), tmp_path), tmp_path)
    assert not (tmp_path / "two").exists()
    assert state.look(tmp_path / "one") == State("stopped", "before its first steps")


STOPPABLE = """
import os, signal, sys, time
def stop(*_):
    print("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("step 3/9: loss 0.5000, 1.0 ex/s, 2 tok/s, 0.1 min left", flush=True)
"""


@pytest.fixture
def no_collection():
    """Garbage is kept: JAX and hypothesis are called at each collection, and what a signal's handler raises in such a
    call is lost."""
    gc.disable()
    yield
    gc.enable()


SIGNALS = pytest.mark.parametrize(("number", "error"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", Interrupted)])


@SIGNALS
def test_stopping_the_sweep_stops_its_run_cleanly(tmp_path, capfd, no_collection, number, error):
    code = STOPPABLE + f"os.kill(os.getppid(), signal.{number})\ntime.sleep(60)"
    usual = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        sweep.run_all(two(), launch.Local(python(code), tmp_path), tmp_path)
    assert (tmp_path / "one" / "log.txt").read_text().splitlines()[-1] == "saved"
    assert state.look(tmp_path / "one") == State("stopped", "step 3/9, loss 0.5000")
    assert "the run is stopped; the same command goes on" in capfd.readouterr().err
    assert "| one |  | stopped: step 3/9, loss 0.5000 |" in (tmp_path / "sweep.md").read_text()
    assert signal.getsignal(signal.SIGTERM) is usual


@SIGNALS
def test_a_run_that_is_just_starting_is_stopped_too(tmp_path, monkeypatch, no_collection, number, error):
    usual, begun = subprocess.Popen, []

    def popen(*arguments, **options):
        begun.append(usual(*arguments, **options))
        os.kill(os.getpid(), getattr(signal, number))
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    try:
        with pytest.raises(error):
            sweep.run_all(two(), launch.Local(python("import time; time.sleep(60)"), tmp_path), tmp_path)
        assert [process.returncode for process in begun] == [-signal.SIGTERM]
    finally:
        for process in begun:
            process.kill()
            process.wait()
    assert state.look(tmp_path / "one") == State("stopped", "before its first steps")


def test_a_run_that_a_killed_sweep_left_is_waited_for(tmp_path, monkeypatch):
    """It holds its folder; once it is finished, nothing is run again."""
    monkeypatch.setattr(launch.Local, "interval", 0.05)
    left = launch.Process([sys.executable, "-c", "input()"], tmp_path / "one")
    reader, writer = os.pipe()
    keep = os.dup(0)
    os.dup2(reader, 0)
    assert left.start()
    os.dup2(keep, 0)
    assert not launch.Process(["true"], tmp_path / "one").start()
    launcher = launch.Local(python("raise SystemExit(3)"), tmp_path)
    launcher.submit(["one"])
    assert launcher.poll() == {"one": Alive("running", "in a process that another sweep began")}
    summary = {"untuned": {}, "tuned": {"loss": 0.5}, "parameters": {"trained": 3}, "seconds": 6.0}
    (tmp_path / "one" / "summary.json").write_text(json.dumps(summary))
    os.write(writer, b"\n")
    left.popen.wait()
    assert launcher.poll() == {}
    assert not (tmp_path / "one" / "exit_code").exists()
    for descriptor in (reader, writer, keep):
        os.close(descriptor)


def test_plain_output_has_a_line_for_each_change(capsys):
    board = sweep.Board()
    rows = {"a": State("running", "step 1/9, loss 0.5000"), "b": State("waiting")}
    board.show(rows)
    board.show(rows | {"a": State("running", "step 2/9, loss 0.4000")})
    board.show(rows | {"a": State("failed", "exit code 1: error: [no] model")})
    assert capsys.readouterr().err.splitlines() == [
        "a (1 of 2): running: step 1/9, loss 0.5000",
        "a (1 of 2): failed: exit code 1: error: [no] model",
    ]


def test_the_live_table_shows_what_needs_eyes_where_there_is_no_room_for_all():
    rows = {f"run{i}": State("finished", "", {"tuned": {"loss": 0.25}}) for i in range(50)}
    rows |= {"run7": State("running", "step 1/9, loss 0.5000"), "run30": State("failed", "exit code 1: [oh] no")}
    console = rich.console.Console(width=60, height=8, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(sweep.picture(rows, 8))
    lines = [line.strip() for line in console.export_text().splitlines()]
    assert lines[0] == "50 runs: 1 failed, 1 running, 48 finished"
    assert "run7   running: step 1/9, loss 0.5000" in lines
    assert "run30  failed: exit code 1: [oh] no" in lines
    assert lines[-1] == "and 45 more, see sweep.md"
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--launcher=cloud"], "unknown launcher 'cloud'; valid: local, slurm"),
        (["--slurm=partition=gpu"], "--slurm is for --launcher=slurm"),
        (
            ["--launcher=slurm", "--slurm=partitoin=gpu"],
            "unknown option of --slurm 'partitoin'; valid: account, array_",
        ),
        (["--launcher=slurm", "--slurm=gpu"], "unknown option of --slurm 'gpu'; valid: account"),
        (["--launcher=slurm", "--slurm=timeout_min=soon"], "'timeout_min=soon' must be timeout_min=a number above 0"),
        (["--launcher=slurm", "--slurm=mem_gb=-1"], "'mem_gb=-1' must be mem_gb=a number above 0"),
        (["--launcher=slurm", "--slurm=partition="], "'partition=' must be partition=TEXT"),
        (["--launcher=slurm"], "--launcher=slurm needs Slurm's commands, and sbatch is not on this machine's PATH"),
    ],
)
def test_launcher_options_are_refused_before_anything_runs(tmp_path, capsys, monkeypatch, flags, message):
    (tmp_path / "config.py").write_text(SWEEP)
    monkeypatch.setenv("PATH", "")
    assert run.main(["sweep", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/w", *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_values_of_slurm_options_may_hold_commas():
    found = launch.parse("nodelist=a[1,2],gpus_per_node=2,mem_gb=1.5")
    assert found == {"timeout_min": 60, "nodelist": "a[1,2]", "gpus_per_node": 2, "mem_gb": 1.5}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Slurm's commands as scripts: sbatch keeps what it is given, squeue prints a file, or fails without one."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    programs = {
        "sbatch": f'cp "$1" {folder}/submitted; echo "Submitted batch job $(cat {folder}/next)"',
        "squeue": f'echo "$@" > {folder}/asked; cat {folder}/queue',
        "srun": "exit 1",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "next").write_text("7")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(launch.Slurm, "interval", 0.01)
    return folder


def test_slurm_gets_what_is_neither_finished_nor_in_its_queue(tmp_path, cluster):
    root, names = tmp_path / "my, runs", ["a", "b", "c"]
    options = launch.parse("partition=gpu,timeout_min=90,array_parallelism=2,mem_gb=3,gpus_per_node=1,nodes=2")
    command = lambda name: ["train", name]  # noqa: E731
    first = launch.Slurm(command, root, options)
    assert first.submit(names) == "3 runs submitted as Slurm's job 7"
    script = (cluster / "submitted").read_text()
    (job,) = launch.read_jobs(root)
    assert re.fullmatch(r"my__runs-[0-9a-f]{8}", job)
    wanted = ("array=0-2%2", "partition=gpu", "time=90", "mem=3GB", "gpus-per-node=1", "requeue", f"job-name={job}")
    for part in (*wanted, "nodes=2", "ntasks-per-node=1"):
        assert f"#SBATCH --{part}\n" in script
    assert f"export PYTHONPATH={launch.ROOT}" in script
    task = DelayedSubmission.load(root / "slurm" / "7_1_submitted.pkl").function
    assert (task.command, task.folder) == (["train", "b"], root.resolve() / "b")
    # ---- a finishes, b is requeued, c has failed and left the queue
    (root / "a").mkdir()
    summary = {"untuned": {}, "tuned": {"loss": 0.5}, "parameters": {"trained": 3}, "seconds": 6.0}
    (root / "a" / "summary.json").write_text(json.dumps(summary))
    (cluster / "queue").write_text(f"{job}|7_0|COMPLETING|None\n{job}|7_1|PENDING|BeginTime\n{job}|7_2|RUNNING|None\n")
    assert first.poll() == {"b": Alive("queued", "job 7_1, BeginTime"), "c": Alive("running", "job 7_2")}
    assert f"--name={job}" in (cluster / "asked").read_text()
    (cluster / "queue").write_text(f"{job}|7_1|PENDING|BeginTime\n")
    assert set(first.poll()) == {"b", "c"}  # files may come late
    assert set(first.poll()) == {"b"}
    # ---- the same command again
    (cluster / "next").write_text("8")
    second = launch.Slurm(command, root, options)
    assert second.submit(["b", "c"]) == "1 of 2 runs are in Slurm's queue already; 1 runs submitted as Slurm's job 8"
    assert "--array" not in (cluster / "submitted").read_text()
    assert DelayedSubmission.load(root / "slurm" / "8_submitted.pkl").function.command == ["train", "c"]
    old, new = launch.read_jobs(root)
    assert old == job
    assert f"'scancel --name={old},{new}' cancels them" in second.interrupt()[0]
    (cluster / "queue").write_text(f"{new}|8|RUNNING|None\n{old}|7_1|RUNNING|None\n")
    assert second.poll() == {"b": Alive("running", "job 7_1"), "c": Alive("running", "job 8")}
    # ---- here they are not run beside it
    with pytest.raises(UserError, match=r"2 runs of .* are in Slurm's queue; use --launcher=slurm, or"):
        launch.make("local", None, command, root)
    (cluster / "queue").unlink()  # the controller is away
    assert second.poll()["c"].state == "running"
    assert "squeue does not answer" in second.poll()["c"].note
    with pytest.raises(UserError, match="squeue does not answer"):
        launch.Slurm(command, root, options).submit(["b"])


def test_what_slurm_refuses_is_one_line(tmp_path, cluster):
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: gpu' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"Slurm takes no job: .*invalid partition: gpu"):
        launch.Slurm(lambda name: ["true"], tmp_path / "w", {}).submit(["a", "b"])
    with pytest.raises(UserError, match="reads a % in"):
        launch.Slurm(lambda name: ["true"], tmp_path / "50%", {})


def test_watching_slurm_ends_with_the_table(tmp_path, cluster, monkeypatch, capfd):
    """A run that is gone without results is named; Ctrl-C leaves all jobs alone and says how to cancel them."""
    (cluster / "queue").write_text("")
    with pytest.raises(UserError, match=r"2 of 2 runs failed or were stopped: one, two; see log\.txt"):
        sweep.run_all(two(), launch.Slurm(lambda name: ["true"], tmp_path / "w", {}), tmp_path / "w")
    assert "| two |  | stopped: before it began |" in (tmp_path / "w" / "sweep.md").read_text()
    monkeypatch.setattr(launch.Slurm, "poll", lambda self: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        sweep.run_all(two(), launch.Slurm(lambda name: ["true"], tmp_path / "w", {}), tmp_path / "w")
    assert "the jobs go on; the same command watches them again, 'scancel --name=w-" in capfd.readouterr().err


class Stopped(Exception):
    """Raised by a signal's handler in these tests, as submitit leaves by an exception."""


def handle(name, action):
    """Calls an action at a signal, then raises `Stopped`."""

    def handler(*_):
        action()
        raise Stopped

    signal.signal(name, handler)


@pytest.fixture
def handlers():
    """Restores what tests do to signals."""
    names = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    usual = {name: signal.getsignal(name) for name in names}
    yield
    for name, handler in usual.items():
        signal.signal(name, handler)


def test_a_task_before_its_time_limit_is_saved_and_comes_again(tmp_path, handlers):
    """SIGUSR2 reaches every process of a job and must not kill the run; `checkpoint` stops it as SIGTERM does."""
    code = STOPPABLE + "os.kill(os.getpid(), signal.SIGUSR2)\nos.kill(os.getppid(), signal.SIGUSR1)\ntime.sleep(60)"
    task, again = launch.Task([sys.executable, "-c", code], tmp_path / "a"), []
    handle(signal.SIGUSR1, lambda: again.append(task.checkpoint()))
    with pytest.raises(Stopped):
        task()
    assert task.process.popen.wait() == 143
    assert (tmp_path / "a" / "log.txt").read_text().splitlines()[-1] == "saved"
    assert (again[0].function.command, again[0].function.folder) == (task.command, task.folder)
    assert state.look(tmp_path / "a") == State("stopped", "step 3/9, loss 0.5000")


def test_a_task_that_slurm_ends_waits_for_it(tmp_path, handlers, monkeypatch):
    """Its run gets the same SIGTERM and stops; that the task ended by itself would end a job that is to be requeued."""
    code = STOPPABLE + "os.kill(os.getppid(), signal.SIGTERM)\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"
    task = launch.Task([sys.executable, "-c", code], tmp_path / "a")

    def pause():
        raise Stopped

    monkeypatch.setattr(signal, "pause", pause)
    with pytest.raises(Stopped):
        task()
    assert task.process.popen.poll() == 143
    assert not (tmp_path / "a" / "exit_code").exists()
    task.checkpoint()  # and where SIGUSR2 comes after all, there is nothing left to stop


def test_of_several_nodes_the_first_speaks_for_the_job(tmp_path, handlers, monkeypatch):
    """Where its process is stopped all are, and the others must not fail a job that is to be requeued."""
    monkeypatch.setenv("SLURM_PROCID", "1")
    code = "print(__import__('os').environ['SLURM_PROCID']); raise SystemExit({})"
    first = launch.Process(["sleep", "60"], tmp_path / "a")
    assert first.start()
    try:
        launch.Task([sys.executable, "-c", code.format(143)], tmp_path / "a")()
        with pytest.raises(RuntimeError, match=r"exit code 1; see .*host_1_log\.txt"):
            launch.Task([sys.executable, "-c", code.format(1)], tmp_path / "a")()
    finally:
        first.popen.kill()
        first.popen.wait()
    assert (tmp_path / "a" / "host_1_log.txt").read_text() == "1\n1\n"
    assert (tmp_path / "a" / "log.txt").read_text() == ""
    assert not (tmp_path / "a" / "exit_code").exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(RuntimeError, match="exit code 143"):
        launch.Task([sys.executable, "-c", code.format(143)], tmp_path / "a")()


def test_a_task_that_fails_makes_its_job_fail(tmp_path, handlers):
    task = launch.Task([sys.executable, "-c", "print('error: no model'); raise SystemExit(1)"], tmp_path / "a")
    with pytest.raises(RuntimeError, match=r"exit code 1; see .*log\.txt"):
        task()
    assert state.look(tmp_path / "a") == State("failed", "exit code 1: error: no model")
    task = launch.Task([sys.executable, "-c", ""], tmp_path / "a")
    task()
    assert (tmp_path / "a" / "exit_code").read_text() == "0\n"


def test_the_shipped_sweep_is_of_lengths():
    module = run.load_module("configs/e2e_smollm2.py")
    planned = sweep.plan(module.sweep, "configs/e2e_smollm2.py", "", module.get_config)
    assert [one.overrides["method.length"] for one in planned] == [1, 1, 5, 5, 10, 10, 20, 20, 40, 40]

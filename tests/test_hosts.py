"""Several processes on this machine: they train, one is killed, others go on, and all is as in one process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_run import folder, settings, untimed  # noqa: F401 (a fixture among them)

import run
from prefix_tuning import hosts, parallel
from prefix_tuning import train as loop
from prefix_tuning.data import pipeline
from prefix_tuning.errors import UserError
from prefix_tuning.files import read_lines

ROOT = Path(run.__file__).parent
TIMEOUT = 1200  # seconds, for a machine with much else to do
SHORT = {  # without dropout, which each device draws for itself, the number of devices does not matter
    "method.dropout": 0.0,
    "train.epochs": 2,
    "train.shapes": 1,
    "evaluation.metrics": ("exact_match",),
    "decode.max_new_tokens": 3,
}
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
NAMED = {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
RUNS = {"short": {"method.length": 2}, "long": {"method.length": 4, "seed": 5}}
SWEEP = """

def sweep(add):
    for name, overrides in {runs}.items():
        add(name, overrides)
"""
SELECT = {"evaluation.metrics": (), "train.eval_every": 3, "train.checkpoint_every": 3}


@pytest.mark.parametrize(
    ("given", "environment", "found"),
    [
        (None, {}, None),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a shell that salloc has opened
        (None, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # a run of a sweep
        (None, SLURM, (None, 0, 0)),
        (None, NAMED, ("here:1", 3, 2)),
        ("auto", {}, (None, 0, 0)),
        ("auto", NAMED, (None, 0, 0)),
        ("10.0.0.1:1234,4,3", SLURM, ("10.0.0.1:1234", 4, 3)),
        ("10.0.0.1:1234,1,0", {}, None),
    ],
)
def test_who_the_others_are(given, environment, found):
    assert hosts.asked(given, environment) == found


@pytest.mark.parametrize("given", ["", "yes", "here", "here:1", "here:1,2", "here:1,2,2", "here,2,0", "here:1,0,0"])
def test_other_words_are_refused(given):
    with pytest.raises(UserError, match=r"expected auto, or ADDRESS:PORT,COUNT,INDEX"):
        hosts.start(given, {})


def test_half_an_environment_is_refused():
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_ADDRESS and not JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        hosts.start(None, {"JAX_COORDINATOR_ADDRESS": "here:1"})


def test_where_jax_finds_nobody_it_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: 1 / 0)
    with pytest.raises(
        UserError, match=r"cannot join the processes at an address .*: division by zero; expected Slurm"
    ):
        hosts.start("auto", {})
    assert hosts.last_words is None
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("tasks", "restricted"),
    [("1(x2)", False), ("1,1(x3)", False), ("8(x2)", True), ("1(x2),2", True), ("", True)],
)
def test_a_task_that_has_its_node_alone_takes_all_devices(monkeypatch, tasks, restricted):
    """JAX takes a Slurm task's number on its node for that of its device."""
    told = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: told.update(options) or 1 / 0)
    with pytest.raises(UserError, match="division by zero"):
        hosts.start(None, SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks})
    assert told.get("local_device_ids") == (None if restricted else [])
    assert not hosts.alone_on_node({"SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "3"})


def test_a_single_process_starts_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    hosts.start(None, {})
    hosts.start("here:1,1,0", {})
    assert (hosts.count(), hosts.index(), hosts.primary(), hosts.last_words) == (1, 0, True, None)
    assert hosts.gather("x") == ["x"]
    hosts.leave(1)


def test_rows_that_do_not_split_name_the_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "device_count", lambda: 24)
    with pytest.raises(UserError, match=r"3 processes that have not been joined; start all with --hosts=auto"):
        parallel.Replicated().check_rows(24)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=r"16 rows .* 24 devices \(3 processes of 8\); expected a multiple of 24"):
        parallel.Replicated().check_rows(16)
    parallel.Replicated().check_rows(16, own=True)
    parallel.Replicated().check_rows(48, 2)


@pytest.mark.parametrize("kind", ["source", "types"])
def test_the_parts_of_a_batch_are_its_rows_in_order(kind):
    # One example in four rows: parts of filler alone have every field, too.
    example = pipeline.Example([5, 6], [1], [7], **{kind: [1, 2]})
    whole = pipeline.collate([[example], [], [], []], 3, 2)
    parts = [pipeline.collate([[example], [], [], []], 3, 2, pipeline.Part(i, 4)) for i in range(4)]
    assert {name: np.concatenate([part[name] for part in parts]).tolist() for name in whole} == {
        name: value.tolist() for name, value in whole.items()
    }


def finish(jobs, root, wait_for=""):
    """What tests/hosts_processes.py says of these jobs; one that is to be lost dies once there is such a path."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "hosts_processes.py"), json.dumps(jobs)],
        cwd=root,
        env=os.environ | {"XLA_FLAGS": " ".join(flags), "WAIT_FOR": wait_for},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return json.loads(out)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):  # noqa: F811
    """A folder in which two processes have trained until one was killed, and four have gone on.

    Beside it what one process made of the same, and two of several runs in one step; three have met.
    """
    root = tmp_path_factory.mktemp("hosts")
    alone = loop.train(
        settings(folder, **{key.replace(".", "__"): value for key, value in SHORT.items()}), root / "alone"
    )
    config = [f"--config={folder}/config.py", *(f"--config.{key}={value}" for key, value in SHORT.items())]
    workdir = f"--workdir={root}/w"
    files = [f"--input={folder}/data/test.jsonl", f"--output={root}/out.jsonl"]
    text = (folder / "config.py").read_text().replace("samples=1", 'samples=1, select="loss"')
    (root / "sweep.py").write_text(text + SWEEP.format(runs=RUNS))
    several = [f"--config={root}/sweep.py", *(f"--config.{key}={value}" for key, value in (SHORT | SELECT).items())]
    several += [f"--workdir={root}/several", f"--runs={','.join(RUNS)}"]
    jobs = [
        {"name": "meet", "count": 3, "devices": 1},
        {"name": "two", "count": 2, "devices": 1, "arguments": ["train", *config, workdir], "lose": 1},
        {"name": "more", "count": 4, "devices": 1, "arguments": ["train", *config, workdir]},
        {"name": "generate", "count": 2, "devices": 2, "arguments": ["generate", workdir, *files]},
        {
            "name": "nowhere",
            "count": 2,
            "devices": 1,
            "arguments": ["generate", workdir, files[0], "--output=no/where"],
        },
        {"name": "several", "count": 2, "devices": 2, "arguments": ["train", *several]},
    ]
    return root, alone, finish(jobs, root, wait_for=f"{root}/w/checkpoints/3")


def test_processes_meet_and_end_together(runs):
    root, _, ends = runs
    found = [json.loads((root / f"meet.{i}.out").read_text()) for i in range(3)]  # Gloo's own words are no result
    for index, one in enumerate(found):
        assert one["gathered"] == [{"own": i, "long": "x" * i * 1000} for i in range(3)]
        assert one["agreed"] == {"own": 0}
        assert one["refused"] == "it is wrong"
        assert one["same"].startswith("the 3 hosts differ in other: 0, 1, 2; expected")
        assert one["collected"] == {str(i): [-np.inf] * i for i in range(3)}
        assert one["shared"] == [[n, "abcdefghij"[n]] for n in range(index, 10, 3)]
        assert one["rounds"] == 4
        assert one["stopped"] == [8, 128 + signal.SIGTERM]
    said = [(root / f"meet.{i}.err").read_text().splitlines()[-1] for i in range(3)]
    assert ends["meet"][0][0] == -signal.SIGKILL
    assert said[0].startswith("error: process 0 of 3 was killed, or ended by JAX ")
    for code, line in zip(ends["meet"][0][1:], said[1:], strict=True):
        assert code != 0
        assert line.startswith("error: process ")
        assert line.endswith(f"; {hosts.AGAIN}")


def test_one_lost_ends_the_others_with_a_word(runs):
    root, _, ends = runs
    codes, seconds = ends["two"]
    assert codes[0] in (1, -signal.SIGABRT)  # as it meets a broken connection, or JAX's heartbeats miss the other
    assert codes[1] == -signal.SIGKILL
    assert seconds < 3 * hosts.HEARTBEAT
    last = (root / "two.0.err").read_text().splitlines()[-1]
    assert last.startswith("error: process 0 of 2 ")
    assert last.endswith("; the same command on all hosts goes on from the last checkpoint")


def test_more_processes_go_on_as_one_would(runs):
    root, alone, ends = runs
    assert ends["more"][0] == [0] * 4, (root / "more.0.err").read_text()
    first = (root / "more.0.err").read_text()
    assert "going on after step 3" in first
    lines, wanted = untimed(root / "w"), untimed(root / "alone")
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, one in zip(lines, wanted, strict=True):
        assert line == pytest.approx(one, rel=1e-5, abs=1e-6)
    for name in sorted(path.name for path in (root / "alone" / "predictions").iterdir()):
        assert read_lines(root / "w" / "predictions" / name) == read_lines(root / "alone" / "predictions" / name)
    ours, theirs = (
        safetensors.numpy.load_file(root / name / "adapter" / "adapter_model.safetensors") for name in ("w", "alone")
    )
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5)
    summary = json.loads((root / "w" / "summary.json").read_text())
    assert summary["tuned"] == pytest.approx(alone["tuned"], rel=1e-5)


def test_what_is_generated_is_one_file_in_order(runs):
    root, _, ends = runs
    assert ends["generate"][0] == [0, 0], (root / "generate.0.err").read_text()
    wanted = read_lines(next((root / "w" / "predictions").glob("test_*.jsonl")))
    found = read_lines(root / "out.jsonl")
    assert [row["source"] for row in found] == [row["source"] for row in wanted]
    assert [row["prediction"] for row in found] == [row["prediction"] for row in wanted]
    assert (root / "generate.0.out").read_text() == f"{len(found)} lines written to {root}/out.jsonl\n"
    assert (root / "generate.1.out").read_text() == ""


def test_what_cannot_be_written_ends_all(runs):
    root, _, ends = runs
    assert ends["nowhere"][0] == [1, 1]
    for index in range(2):
        last = (root / f"nowhere.{index}.err").read_text().splitlines()[-1]
        assert last == "error: cannot write no/where: its folder does not exist"


def test_the_first_process_speaks_for_all(runs):
    root, _, _ = runs
    assert "tuned" in (root / "more.0.out").read_text()
    assert (root / "more.1.out").read_text() == ""
    assert "step" not in (root / "more.1.err").read_text()
    assert json.loads((root / "w" / "environment.json").read_text())["hosts"] == 4


def test_two_processes_train_several_runs_in_one_step(folder, runs):  # noqa: F811
    """On two devices each: every device of a host has one of the runs, and every host half of each one's rows.

    Both keep their best state beside their checkpoints, in the same step.
    """
    root, _, ends = runs
    assert ends["several"][0] == [0, 0], (root / "several.0.err").read_text()
    made = SHORT | SELECT | {"evaluation.select": "loss"}
    configs = [
        settings(folder, **{key.replace(".", "__"): x for key, x in (made | own).items()}) for own in RUNS.values()
    ]
    summaries = loop.train_together(configs, [root / "one" / name for name in RUNS])
    for name, summary in zip(RUNS, summaries, strict=True):
        one, two = root / "one" / name, root / "several" / name
        lines, wanted = untimed(two), untimed(one)
        assert [line.keys() for line in lines] == [line.keys() for line in wanted]
        for line, other in zip(lines, wanted, strict=True):
            assert line == pytest.approx(other, rel=1e-4, abs=1e-6)
        ours, theirs = (
            safetensors.numpy.load_file(path / "adapter" / "adapter_model.safetensors") for path in (two, one)
        )
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-5)
        assert summary["population"] == 2
    assert not (root / "several.1.out").read_text()
    assert len(read_lines(root / "several" / "long" / "metrics.jsonl")) > 3

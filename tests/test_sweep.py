"""Sweeps: all is checked before anything runs, what is done is not done again, one failure stops no other run."""

import json
import sys

import pytest

import run
from prefix_tuning import sweep
from prefix_tuning.errors import UserError

SWEEP = """
from configs import quickstart


def sweep(add):
    for length in (2, 3):
        add(f"length={length}", {"method.length": length, "optimizer.warmup_steps": 0})
    add("lora", {"method.rank": 1, "optimizer.warmup_steps": 0}, arg="method=lora")


get_config = quickstart.get_config
"""
SHORT = ["train.epochs=1", "train.examples=48", "evaluation.metrics=()", "evaluation.examples=8"]


def test_a_sweep_runs_what_is_listed_and_goes_on(tmp_path, capsys):
    """One by one with the command line's overrides; a run that fails is named, and the same command runs it alone."""
    (tmp_path / "config.py").write_text(SWEEP)
    command = ["sweep", f"--config={tmp_path}/config.py", *(f"--config.{option}" for option in SHORT)]
    root = tmp_path / "runs"
    broken = root / "length=3"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("[]")  # which no run of this config wrote
    assert run.main([*command, f"--workdir={root}"]) == 1
    error = capsys.readouterr().err
    assert "error: 1 of 3 runs failed: length=3; " in error
    assert "holds list, not a JSON object" in error
    done = {name: (root / name / "summary.json").stat().st_mtime_ns for name in ("length=2", "lora")}
    (broken / "config.json").unlink()
    assert run.main([*command, f"--workdir={root}"]) == 0
    out = capsys.readouterr().out
    assert done == {name: (root / name / "summary.json").stat().st_mtime_ns for name in done}
    lines = out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| length=2", "| length=3", "| lora"]
    assert "| method=lora, method.rank=1, optimizer.warmup_steps=0 |" in lines[4]
    assert (root / "sweep.md").read_text() == out
    for name, trained in (("length=2", 2 * 2 * 2 * 128), ("length=3", 3 * 2 * 2 * 128)):
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


def test_a_stopped_run_stops_the_sweep(tmp_path):
    """With what is done kept; the next run is not begun."""
    planned = [sweep.Planned(name, "config.py", "", {}) for name in ("one", "two")]
    stopping = lambda one: [sys.executable, "-c", "import sys; sys.exit(130)"]  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        sweep.run_all(planned, stopping, tmp_path)
    assert not (tmp_path / "two").exists()
    assert "not finished" in sweep.table(planned, tmp_path)


def test_the_shipped_sweep_is_of_lengths():
    module = run.load_module("configs/e2e_smollm2.py")
    planned = sweep.plan(module.sweep, "configs/e2e_smollm2.py", "", module.get_config)
    assert [one.overrides["method.length"] for one in planned] == [1, 1, 5, 5, 10, 10, 20, 20, 40, 40]

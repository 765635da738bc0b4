"""Runs that train together in two processes are what they are in one."""

import numpy as np
import pytest
import safetensors.numpy
from test_hosts import SHORT, finish
from test_run import folder, settings, untimed  # noqa: F401 (a fixture among them)

from prefix_tuning import train as loop
from prefix_tuning.files import read_lines

RUNS = {"short": {"method.length": 2}, "long": {"method.length": 4, "seed": 5}}
SWEEP = """

def sweep(add):
    for name, overrides in {runs}.items():
        add(name, overrides)
"""
SELECT = {"evaluation.metrics": (), "train.eval_every": 3, "train.checkpoint_every": 3}


def test_two_processes_train_several_runs_in_one_step(folder, tmp_path):  # noqa: F811
    """On two devices each: every device of a host has one of the runs, and every host half of each one's rows.

    Both keep their best state beside their checkpoints, in the same step.
    """
    options = SHORT | SELECT
    text = (folder / "config.py").read_text().replace("samples=1", 'samples=1, select="loss"')
    (tmp_path / "config.py").write_text(text + SWEEP.format(runs=RUNS))
    flags = [f"--config={tmp_path}/config.py", *(f"--config.{key}={value}" for key, value in options.items())]
    train = ["train", *flags, f"--workdir={tmp_path}/two", f"--runs={','.join(RUNS)}"]
    codes, _ = finish([{"name": "two", "count": 2, "devices": 2, "arguments": train}], tmp_path)["two"]
    assert codes == [0, 0], (tmp_path / "two.0.err").read_text()
    made = options | {"evaluation.select": "loss"}
    configs = [
        settings(folder, **{key.replace(".", "__"): x for key, x in (made | own).items()}) for own in RUNS.values()
    ]
    summaries = loop.train_together(configs, [tmp_path / "one" / name for name in RUNS])
    for name, summary in zip(RUNS, summaries, strict=True):
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
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
    assert not (tmp_path / "two.1.out").read_text()
    assert len(read_lines(tmp_path / "two" / "long" / "metrics.jsonl")) > 3

"""Weights split over the devices of two processes: all is as in one, which may begin or finish what two have not."""

import json
import shutil
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_hosts import finish
from test_run import folder, untimed  # noqa: F401 (a fixture among them)

import run
from prefix_tuning import hosts, parallel
from prefix_tuning import train as loop
from prefix_tuning.data.pipeline import Part
from prefix_tuning.files import read_lines

SHORT = {"train.epochs": 2, "train.shapes": 1, "decode.max_new_tokens": 3}
TUNED = {"evaluation.metrics": (), "train.eval_every": 100}  # of fine-tuning, whose state is what is in shards
PREFIX = {"evaluation.metrics": ("exact_match",), "train.accumulate": 2, "method.dropout": 0.2, "train.keep": 3}


def flags(options):
    """Overrides as the command line takes them."""
    return [f"--config.{key}={value}" for key, value in options.items()]


def told(config, options):
    """The config of a file with overrides."""
    made = run.load_config(config)
    made.update_from_flattened_dict(options)
    return made.to_dict()


def begin(workdir, finished):
    """Makes the workdir of a finished run that was killed after its third step, and had decoded the untuned model."""
    shutil.copytree(finished, workdir)
    later = {"checkpoints": {"3"}, "predictions": {"untuned.jsonl"}, "adapter": set()}
    gone = [path for name, kept in later.items() for path in (workdir / name).iterdir() if path.name not in kept]
    for path in (*gone, workdir / "summary.json", workdir / "eval_test.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):  # noqa: F811
    """A folder with runs that one process has begun and two have finished, and the other way round; and one's own."""
    root = tmp_path_factory.mktemp("sharded_hosts")
    layout = 'seed=3, parallel="sharded", mesh=common.section(data=None, model=None),'
    text = (folder / "config.py").read_text()
    (root / "config.py").write_text(text.replace("seed=3,", layout))
    one, split, tune = f"{folder}/config.py", f"{root}/config.py", ":method=finetune"
    loop.train(told(split, SHORT | PREFIX | {"mesh.model": 2}), root / "prefix_alone")
    begin(root / "prefix", root / "prefix_alone")
    two = {"count": 2, "devices": 2}
    train = ["train", f"--config={split}", *flags(SHORT | PREFIX), "--config.mesh.model=2", f"--workdir={root}/prefix"]
    lost = ["train", f"--config={split}{tune}", *flags(SHORT | TUNED), f"--workdir={root}/tuned"]
    jobs = [
        {"name": "lost", **two, "arguments": lost, "lose": 1},
        {"name": "train", **two, "arguments": train},
        {"name": "eval", **two, "arguments": ["eval", f"--workdir={root}/prefix", "--split=test"]},
    ]
    ends = finish(jobs, root, wait_for=f"{root}/tuned/checkpoints/3")
    loop.train(told(split + tune, SHORT | TUNED | {"mesh.model": 2}), root / "tuned")
    loop.train(told(one + tune, SHORT | TUNED), root / "tuned_alone")
    return root, ends


def same(root, name):
    """Whether a run has measured what one process did."""
    lines, wanted = untimed(root / name), untimed(root / f"{name}_alone")
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, one in zip(lines, wanted, strict=True):
        assert line == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_one_process_finishes_what_two_have_lost(runs):
    root, ends = runs
    codes, seconds = ends["lost"]
    assert codes[1] < 0
    assert codes[0] != 0
    assert seconds < 3 * hosts.HEARTBEAT
    last = (root / "lost.0.err").read_text().splitlines()[-1]
    assert last.startswith("error: process 0 of 2 ")
    assert last.endswith(hosts.AGAIN)
    same(root, "tuned")


def test_two_processes_finish_what_one_has_begun(runs):
    """Each with half of the rows of every micro-batch, with dropout."""
    root, ends = runs
    assert ends["train"][0] == [0, 0], (root / "train.0.err").read_text()
    assert "going on after step 3" in (root / "train.0.err").read_text()
    same(root, "prefix")
    names = sorted(path.name for path in (root / "prefix_alone" / "predictions").iterdir())
    assert sorted([*names, "test.jsonl"]) == sorted(path.name for path in (root / "prefix" / "predictions").iterdir())
    for name in names:
        assert read_lines(root / "prefix" / "predictions" / name) == read_lines(
            root / "prefix_alone" / "predictions" / name
        )
    files = [root / name / "adapter" / "adapter_model.safetensors" for name in ("prefix", "prefix_alone")]
    metadata = [safetensors.safe_open(file, "numpy").metadata() for file in files]
    assert "base_model_fingerprint" in metadata[0]
    assert metadata[0] == metadata[1]
    ours, theirs = map(safetensors.numpy.load_file, files)
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-5)
    assert (root / "train.1.out").read_text() == ""


def test_two_processes_evaluate_what_is_in_shards(runs):
    root, ends = runs
    assert ends["eval"][0] == [0, 0], (root / "eval.0.err").read_text()
    scores = json.loads((root / "eval.0.out").read_text())
    assert scores == json.loads((root / "prefix" / "eval_test.json").read_text())
    assert scores["exact_match"] == json.loads((root / "prefix_alone" / "eval_test.json").read_text())["exact_match"]
    wanted = read_lines(root / "prefix_alone" / "predictions" / "test_8.jsonl")
    assert read_lines(root / "prefix" / "predictions" / "test.jsonl") == wanted
    assert (root / "eval.1.out").read_text() == ""


@pytest.mark.parametrize(
    ("devices", "model", "found"),
    [
        ((0, 0, 1, 1), 1, {0: Part(0, 2, 3), 1: Part(1, 2, 3)}),
        ((0, 0, 1, 1), 2, {0: Part(0, 2, 3), 1: Part(1, 2, 3)}),
        ((0, 0, 1, 1), 4, {0: Part(0, 1, 3), 1: Part(0, 1, 3)}),
        ((0, 1, 2, 3), 2, {0: Part(0, 2, 3), 1: Part(0, 2, 3), 2: Part(1, 2, 3), 3: Part(1, 2, 3)}),
        ((0, 0, 1, 1, 2, 2), 3, {0: Part(0, 2, 3), 1: Part(0, 1, 3), 2: Part(1, 2, 3)}),
    ],
)
def test_a_process_makes_the_rows_of_its_devices(monkeypatch, devices, model, found):
    layout = object.__new__(parallel.Sharded)
    fake = np.array([types.SimpleNamespace(process_index=number) for number in devices]).reshape(-1, model)
    layout.mesh = types.SimpleNamespace(devices=fake)
    for process, part in found.items():
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        assert layout.part(3) == part


def test_the_parts_of_blocks_are_those_of_each():
    rows = list(range(24))
    parts = [Part(index, 2, 3).of(rows) for index in range(2)]
    assert parts == [[0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19], [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]]
    assert Part(1, 2).of(rows) == rows[12:]

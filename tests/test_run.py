"""The command line and the loop, on a tiny model and data set that the tests write."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import absl.flags
import conftest
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers

import prefix_tuning
import run
from prefix_tuning import compiled, models, parallel, progress, setup, torchless
from prefix_tuning import train as loop
from prefix_tuning.errors import UserError
from prefix_tuning.files import read_json, read_lines
from prefix_tuning.models import loading
from prefix_tuning.types import Adaptation, Batch
from prefix_tuning.variants import train_variants

ROOT = Path(run.__file__).parent
CONFIG = """
from configs import common


def get_config(arg=None):
    settings = common.parse(arg)
    return common.section(
        seed=3,
        model=common.section(name="{folder}/model", dtype="float32"),
        dataset=common.section(name="text", path="{folder}/data"),
        text=common.section(prompt="{{source}}>", completion="{{target}}", max_source=None, max_target=None),
        method=common.method(
            settings["method"], prefix={{"length": 3, "init": "random", "text": None, "dropout": 0.2}}
        ),
        objective=common.section(name="lm", normalisation="token"),
        optimizer=common.section(name="adamw", learning_rate=0.05, schedule="linear", warmup_steps=2, clip=1.0),
        train=common.section(batch_size=8, epochs=3, examples=None, accumulate=1, packing=False, shapes=2, prefetch=2,
                             log_every=2, eval_every=4, checkpoint_every=3, keep=2),
        evaluation=common.section(metrics=("exact_match", "bleu"), batch_size=8, split="validation", final_split="test",
                                  examples=None, samples=1),
        decode=common.section(max_new_tokens=6, num_beams=1),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, a data folder and a config file."""
    folder = tmp_path_factory.mktemp("run")
    alphabet = {chr(c): c - 96 for c in range(97, 123)} | {"<eos>": 0, " ": 27, ">": 28}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(alphabet, unk_token=" "))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 29,
        "max_position_embeddings": 48,
        "eos_token_id": 0,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    model = models.build(config)
    loading.save_pretrained(folder / "model", model, loading.initialise(jax.random.key(1), model))
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    for split, size in (("train", 30), ("validation", 9), ("test", 10)):
        rows = []
        for _ in range(size):
            word = "".join(chr(97 + i) for i in rng.integers(0, 26, rng.integers(3, 9)))
            rows.append(json.dumps({"source": word, "target": word[:2]}))
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "config.py").write_text(CONFIG.format(folder=folder))
    return folder


def settings(folder, **overrides):
    """The config as the command line would read it, with dotted overrides."""
    config = run.load_config(str(folder / "config.py"))
    for key, value in overrides.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config.to_dict()


def untimed(workdir):
    """metrics.jsonl less what a clock writes."""
    lines = read_lines(Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith("_per_second")} for line in lines]


def results(workdir):
    """What must not depend on interruptions: metrics, predictions, and the adapter's bytes."""
    workdir = Path(workdir)
    predictions = {p.name: p.read_text() for p in sorted((workdir / "predictions").iterdir())}
    return untimed(workdir), predictions, (workdir / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    summary = loop.train(settings(folder), workdir)
    return workdir, summary


def test_a_run_leaves_what_the_contract_names(finished):
    workdir, summary = finished
    for name in ("config.json", "environment.json", "metrics.jsonl", "predictions", "checkpoints", "adapter"):
        assert (workdir / name).exists(), name
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "eval/exact_match" in line] == [4, 8]
    assert [line["step"] for line in lines if "test/exact_match" in line] == [12]
    assert lines[0]["train/learning_rate"] == pytest.approx(0.05 / 2)
    assert summary["parameters"] == {
        "trained": 3 * 2 * 2 * 16,
        "stored": 192,
        "frozen": summary["parameters"]["frozen"],
    }
    assert len(read_lines(workdir / "predictions" / "test_12.jsonl")) == summary["records"] == 10
    assert json.loads((workdir / "eval_test.json").read_text())["exact_match"] == summary["tuned"]["exact_match"]
    assert list((workdir / "tensorboard").iterdir())
    assert summary["tuned"]["loss"] > 0
    shown = progress.table(summary)
    assert "untuned" in shown
    assert str(workdir / "adapter") in shown


def test_training_lowers_the_loss(finished):
    losses = [line["train/loss"] for line in read_lines(finished[0] / "metrics.jsonl") if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.05


def test_the_published_adapter_gives_the_recorded_predictions(folder, finished):
    workdir, _ = finished
    model, frozen, tokenizer = prefix_tuning.load_model(str(folder / "model"))
    adaptation = prefix_tuning.load_adapter(str(workdir / "adapter"), model, frozen)
    rows = read_lines(workdir / "predictions" / "test_12.jsonl")
    prompts = [tokenizer(row["source"] + ">")["input_ids"] for row in rows]
    new = prefix_tuning.generate(model, frozen, adaptation, prompts, max_new_tokens=6)
    assert [tokenizer.decode(ids).strip() for ids in new] == [row["prediction"] for row in rows]


@pytest.mark.parametrize("scan", [True, False])
def test_layers_are_unrolled_on_request(folder, scan):
    config = settings(folder)
    config["model"]["scan"] = scan
    base = setup.make_base(config)
    layers = base.model.sites["decoder"].layers
    batch = Batch(*[jax.ShapeDtypeStruct((1, 4), np.int32)] * 7)
    read = jax.make_jaxpr(lambda frozen, batch: base.model.hidden(frozen, Adaptation(), batch))
    assert layers > 1
    assert f"unroll={1 if scan else layers}" in str(read(loading.abstract(base.model, "float32"), batch))


def test_unrolled_layers_are_not_rematerialised(folder):
    config = settings(folder)
    config["model"] |= {"scan": False, "remat": True}
    with pytest.raises(UserError, match=r"model\.remat=True saves nothing with model\.scan=False"):
        setup.make_base(config)


def test_cudnn_is_for_its_devices_types_and_sizes(folder, monkeypatch):
    config = settings(folder)
    config["model"]["attention"] = "cudnn"
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU of compute .* the device is cpu; expected 'plain'"):
        setup.make_base(config)
    assert parallel.here(config) == {"model": config["model"] | {"attention": "plain"}}
    monkeypatch.setattr(parallel, "has_cudnn", lambda: True)
    assert parallel.here(config) == {}
    with pytest.raises(UserError, match=r"needs model\.dtype='bfloat16' or 'float16', and it is 'float32'; expected"):
        setup.make_base(config)
    config["model"]["dtype"] = "bfloat16"
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", int)
    setup.make_base(config)
    long = {"method": config["method"] | {"init": "text", "text": "a b c d e " * 9, "length": 40}}  # read in float32
    setup.make_base(config | long)
    parts = {"prefix": {"length": 3}, "lora": {"rank": 2}}
    with pytest.raises(UserError, match=r"cannot attend with gated or placed slots; expected 'plain'"):
        setup.make_base(config | {"method": {"name": "compose", "parts": parts, "gates": True}})
    llama = read_json(folder / "model" / "config.json", "a model")
    gemma = llama | conftest.FAMILIES["gemma2"] | {"model_type": "gemma2", "head_dim": 8}
    wrong = (
        (llama | {"head_dim": 6}, "heads of .* 8 numbers, 128 at most, and they have 6"),
        (gemma, "attend with a cap"),
    )
    for other, message in wrong:
        model = models.build(other, attention="cudnn")
        with monkeypatch.context() as patch:
            patch.setattr(loading, "read_model", lambda *_, model=model, **options: model)
            with pytest.raises(UserError, match=message):
                setup.make_base(config)
    config["model"]["attention"] = "flash"
    with pytest.raises(UserError, match=r"unknown model\.attention 'flash'; valid: cudnn, plain"):
        setup.make_base(config)


def test_the_same_command_again_shows_the_result(folder, finished):
    workdir, summary = finished
    before = (workdir / "metrics.jsonl").read_text()
    assert loop.train(settings(folder), workdir) == summary
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("step", [1, 4, 7])
def test_stopped_and_resumed_equals_uninterrupted(folder, finished, tmp_path, monkeypatch, step):
    read = loop.Meter.read

    def stopping(self, pending):
        read(self, pending)
        if pending is not None and pending[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Meter, "read", stopping)
    with pytest.raises(loop.Interrupted) as stopped:
        loop.train(settings(folder), tmp_path / "w")
    assert stopped.value.args[0] == 128 + signal.SIGTERM
    assert not (tmp_path / "w" / "summary.json").exists()
    monkeypatch.setattr(loop.Meter, "read", read)
    loop.train(settings(folder), tmp_path / "w")
    assert results(tmp_path / "w") == results(finished[0])


BUSY = """
import hashlib, sys
from prefix_tuning.progress import Stop
with Stop():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # no handler of Python's is called before it returns
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_at_once_whatever_it_computes(first):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", BUSY], cwd=ROOT, **pipes) as process:
        watch = threading.Timer(60, process.kill)  # it would compute for an hour
        watch.start()
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(first)
            assert process.stderr.readline() == f"{first.name}: saving, then stopping (once more to stop at once)\n"
            process.send_signal(signal.SIGINT)
            told = process.communicate()[1]
        finally:
            watch.cancel()
            process.kill()
    assert told == "SIGINT: stopped at once; the same command goes on from what was saved\n"
    assert process.returncode == 130


LOST = """
import os, signal
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
Last()
"""


def test_ctrl_c_while_starting_is_not_lost(tmp_path):
    """Python prints and forgets what a handler raises in a destructor or a weak reference's callback."""
    (tmp_path / "config.py").write_text(LOST)
    command = [sys.executable, run.__file__, "train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/w"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_a_crash_between_checkpoints_loses_nothing(folder, finished, tmp_path, monkeypatch):
    read = loop.Meter.read

    def crashing(self, pending):
        read(self, pending)
        if pending is not None and pending[0] == 8:  # the newest checkpoint is that of step 6
            raise MemoryError

    monkeypatch.setattr(loop.Meter, "read", crashing)
    with pytest.raises(MemoryError):
        loop.train(settings(folder), tmp_path / "w")
    monkeypatch.setattr(loop.Meter, "read", read)
    loop.train(settings(folder), tmp_path / "w")
    assert results(tmp_path / "w") == results(finished[0])


def test_an_error_ends_the_process_whatever_still_waits(tmp_path):
    """As Orbax's threads do when a checkpoint could not be saved."""
    (tmp_path / "config.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait).start()\nget_config = lambda _: 1 / 0\n"
    )
    command = [sys.executable, str(ROOT / "run.py"), "train", f"--config={tmp_path}/config.py", "--workdir=w"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "division by zero" in done.stderr


def test_kill_9_and_the_same_command_again(folder, finished, tmp_path, capsys):
    command = [sys.executable, str(ROOT / "run.py"), "train", f"--config={folder}/config.py", f"--workdir={tmp_path}/w"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (tmp_path / "w" / "checkpoints" / "3").exists():  # orbax renames a checkpoint when it is whole
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert run.main(command[2:]) == 0
    assert "tuned" in capsys.readouterr().out
    assert results(tmp_path / "w") == results(finished[0])


def test_a_workdir_of_another_config_is_refused(folder, finished):
    before = (finished[0] / "config.json").read_text()
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.05 -> 0\.5"):
        loop.train(settings(folder, optimizer__learning_rate=0.5), finished[0])
    assert (finished[0] / "config.json").read_text() == before


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    with pytest.raises(UserError, match=r"step \d+: not finite.*optimizer\.learning_rate"):
        loop.train(settings(folder, optimizer__learning_rate=1e38, optimizer__clip=1e30), tmp_path / "w")
    kept = [int(p.name) for p in (tmp_path / "w" / "checkpoints").iterdir() if p.name.isdigit()]
    failed = len(read_lines(tmp_path / "w" / "metrics.jsonl"))
    assert all(step <= 2 * failed + 2 for step in kept)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method__length": 0}, "method.length must be at least 1, got 0"),
        ({"method__length": 40}, r"prefix or prompt \(40\) \+ longest source and target .* but the model has 48"),
        ({"decode__max_new_tokens": 45}, "but the model has 48"),
        ({"text__prompt": "{sauce}"}, "unknown field 'sauce'; valid: source, target"),
        (
            {"text__prompt": "hi{eos}"},
            r"text.prompt: the template 'hi\{eos\}' is the same .* in it: \{source\}, \{target",
        ),
        ({"text__completion": "hi"}, r"text.completion: the template 'hi' is the same for every row; expected a field"),
        (
            {"train__batch_size": 12},
            "^train.batch_size: a batch of 12 rows .* over 1 micro-batches and 8 devices",
        ),
        ({"evaluation__batch_size": 12}, "^evaluation.batch_size: a batch of 12 rows cannot be split"),
        ({"train__batch_size": 0}, "^train.batch_size is 0; expected at least 1$"),
        ({"train__epochs": 0}, "^train.epochs is 0; expected at least 1$"),
        ({"train__log_every": 0}, "^train.log_every is 0; expected at least 1$"),
        ({"train__checkpoint_every": 0}, "^train.checkpoint_every is 0; expected at least 1$"),
        ({"train__keep": 0}, "^train.keep is 0; expected at least 1$"),
        ({"evaluation__examples": 0}, "^evaluation.examples is 0; expected at least 1$"),
        ({"text__max_source": 0}, "^text.max_source is 0; expected at least 1$"),
        ({"text__max_target": 0}, "^text.max_target is 0; expected at least 1$"),
        ({"train__draw": "ten"}, "^train.draw is 'ten'; expected a whole number or None$"),
        ({"decode__early_stopping": 1}, "^decode.early_stopping is 1; expected True or False$"),
        ({"method__scale": "big"}, "^method.scale is 'big'; expected a number or None$"),
        ({"method__layers": (0, 1.5)}, r"^method.layers is \(0, 1.5\); expected a tuple of whole numbers or None$"),
        ({"train__population": True}, "^train.population is True; expected a whole number$"),
        ({"decode__length_penalty": "high"}, "^decode.length_penalty is 'high'; expected a number$"),
        ({"decode__banned": "a"}, "^decode.banned is 'a'; expected a tuple of texts$"),
        ({"train__examples": 31}, "cannot draw 31 rows of 30"),
        ({"evaluation__metrics": ("blue",)}, "unknown metric 'blue'; valid: .*bleu"),
        ({"model__name": "/nowhere"}, "'/nowhere' is no folder"),
        ({"dataset__path": "/nowhere"}, "/nowhere"),
        ({"optimizer__warmup_steps": 12}, "warmup_steps=12 .* below the 12 steps"),
        ({"objective__normalisation": "word"}, "unknown objective.normalisation 'word'; valid: sequence, token"),
        ({"decode__num_beams": 0}, "^decode.num_beams is 0; expected at least 1$"),
        ({"model__dtype": "float8"}, "unknown model.dtype 'float8'; valid: bfloat16"),
        (
            {"model__wieghts": "int8"},
            "unknown key in config section model: 'wieghts'; valid: attention, dtype",
        ),
        ({"text__virtual": 5}, "config section text has 'virtual', which is the model's; drop it"),
        ({"text__start": 5}, "config section text has 'start', which is the model's; drop it"),
        ({"decode__end_tokens": (5,)}, "config section decode has 'end_tokens', which is the tokenizer's; drop it"),
        ({"decode__pad_token": 5}, "config section decode has 'pad_token', which is the tokenizer's; drop it"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(folder, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as refused:
        loop.train(settings(folder, **overrides), tmp_path / "w")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "w").exists()


def test_a_key_that_no_factory_knows_is_refused(folder, tmp_path):
    config = settings(folder)
    config["method"]["lenght"] = 3
    with pytest.raises(UserError, match=r"config section method: 'lenght'; valid: .*length"):
        loop.train(config, tmp_path / "w")


def test_sections_that_are_not_there_are_named(folder):
    config = run.load_config(str(folder / "config.py")).to_dict()
    lacking = {name: section for name, section in config.items() if name != "train"}
    for changed, told in (
        (lacking, "lacking: train; expected seed, "),
        (config | {"trian": {}}, "unknown: trian; expected seed, "),
        (lacking | {"trian": {}, "a": 1}, "unknown: trian, a and lacking: train; expected seed, "),
    ):
        with pytest.raises(UserError, match=f"^config sections {told}"):
            setup.make_base(changed)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("method.length=ten", "config.method.length is 'ten'; expected a whole number"),
        ("train.examples=a few", "config.train.examples is 'a few'; expected a whole number"),
        ("optimizer.learning_rate=1e-2e", "config.optimizer.learning_rate is '1e-2e'; expected a number"),
        ("train.packing=maybe", "config.train.packing is 'maybe'; expected True or False"),
        ("method=lora", "config.method is a section; expected one of its options, --config.method.dropout=... say"),
    ],
)
def test_a_value_that_is_not_of_its_options_type(capsys, tmp_path, option, message):
    command = ["train", "--config=configs/quickstart.py", f"--config.{option}", f"--workdir={tmp_path}/w"]
    assert run.main(command) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def test_an_option_that_the_config_leaves_out_can_be_given():
    """Of the type that it is written in; those that the config has keep theirs."""
    given = {"decode.length_penalty": 0.9, "decode.normalise": "full", "objective.label_smoothing": 0.1}
    given |= {"decode.banned": (3, 4), "method.scale": 2.0}
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    flags[-1] = "--config.method.scale=2"
    config = run.parse(["train", "--config=configs/quickstart.py", "--workdir=w", *flags])[1]["config"]
    for path, value in given.items():
        section, key = path.split(".")
        assert config[section][key] == value
        assert type(config[section][key]) is type(value)
    run.parse(["sweep", "--config=configs/quickstart.py", "--workdir=w", flags[-1]])
    with pytest.raises(absl.flags.Error, match=r"unknown option config\.decode\.normalise"):
        run.parse(["sweep", "--config=configs/quickstart.py", "--workdir=w", flags[1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            "unknown command 'trian'; valid: train, eval, generate, score, export, sweep, report, table, import, ",
        ),
        (["train"], "train needs --config and --workdir"),
        (["train", "--config=nope.py", "--workdir=w"], "there is no config file nope.py; shipped: configs/"),
        (["train", "--config={config}:qick", "--workdir=w"], "unknown config argument 'qick'; valid: method, quick"),
        (["train", "--config={config}:method=prefx", "--workdir=w"], "unknown method 'prefx'; valid: prefix"),
        (
            ["train", "--config={config}", "--config.method.lenght=3", "--workdir=w"],
            "unknown key in config section method: 'lenght'; valid: ",
        ),
        (
            ["sweep", "--config={config}", "--config.method.lenght=3", "--workdir=w"],
            "unknown option config.method.lenght; the config has ",
        ),
        (["train", "--config={config}", "--config.trian.epochs=3", "--workdir=w"], "unknown option config.trian; the "),
        (
            ["train", "--config={config}", "--config.train.epochs.most=3", "--workdir=w"],
            "unknown option config.train.epochs.most; the config has nothing below it",
        ),
        (["train", "--config={config}", "--config.method.length=1.5", "--workdir=w"], "1.5"),
        (["train", "--config={config}", "--workdir=w", "--nope=1"], "nope"),
        (["eval", "--workdir={folder}/none"], "none has no config.json; expected a workdir made by"),
        (["generate", "--workdir=w", "--input={folder}/none", "--output=o"], "cannot read"),
        (["score", "--metrics=bleu", "--predictions=none", "--references=none"], "cannot read none"),
    ],
)
def test_errors_are_one_line_and_a_code(folder, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(config=folder / "config.py", folder=folder) for a in arguments]
    assert run.main(filled) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_eval_generate_and_export_restore_the_run(folder, finished, tmp_path, capsys):
    workdir, summary = finished
    assert run.main(["eval", f"--workdir={workdir}", "--split=test"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["step"] == 12
    assert scores["exact_match"] == summary["tuned"]["exact_match"]
    assert scores == json.loads((workdir / "eval_test.json").read_text())

    rows = read_lines(workdir / "predictions" / "test_12.jsonl")[::-1]
    given = [{"id": i, "source": row["source"]} for i, row in enumerate(rows)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, given)))
    files = [f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"]
    assert run.main(["generate", f"--workdir={workdir}", *files]) == 0
    want = [row | {"prediction": rows[i]["prediction"]} for i, row in enumerate(given)]
    assert read_lines(tmp_path / "out.jsonl") == want

    assert run.main(["export", f"--workdir={workdir}", "--format=peft", f"--output={tmp_path}/peft"]) == 0
    exported = (tmp_path / "peft" / "adapter_model.safetensors").read_bytes()
    assert exported == (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
    assert run.main(["export", f"--workdir={workdir}", "--format=kv", f"--output={tmp_path}/kv"]) == 0
    table = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"]
    key = safetensors.numpy.load_file(tmp_path / "kv" / "prefix.safetensors")["decoder.self.0.key"]
    np.testing.assert_array_equal(key.reshape(len(key), -1), table[:, : key[0].size])
    assert run.main(["export", f"--workdir={workdir}", "--format=onnx", f"--output={tmp_path}/onnx"]) == 1
    assert "unknown format 'onnx'; valid: kv, merged, peft" in capsys.readouterr().err
    assert run.main(["export", f"--workdir={workdir}", "--format=merged", f"--output={tmp_path}/merged"]) == 1
    assert "only LoRA, biases and fine-tuned weights can be merged" in capsys.readouterr().err


# --- Every method through the same commands


@pytest.mark.parametrize("method", ["infix", "lora+prefix", "ft_top2"])
def test_other_methods_train_evaluate_and_resume(folder, tmp_path, capsys, method):
    """Virtual tokens in the data, a composition, weights of the model's own: the paths that a prefix does not take."""
    common = ["--config.train.epochs=1", "--config.train.shapes=1", "--config.decode.max_new_tokens=3"]
    assert run.main(["train", f"--config={folder}/config.py:method={method}", *common, f"--workdir={tmp_path}/w"]) == 0
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["adapter"] is None  # PEFT cannot hold any of these
    assert summary["parameters"]["trained"] == summary["parameters"]["stored"]
    assert summary["seconds_per_step"] > 0
    assert summary["peak_memory_mb"] > 50
    capsys.readouterr()
    assert run.main(["eval", f"--workdir={tmp_path}/w", "--split=test"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert {key: scores[key] for key in ("exact_match", "sacrebleu")} == {
        key: summary["tuned"][key] for key in ("exact_match", "sacrebleu")
    }
    if method == "ft_top2":
        assert run.main(["export", f"--workdir={tmp_path}/w", "--format=merged", f"--output={tmp_path}/m"]) == 0
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")("abc>", add_special_tokens=False)[
            "input_ids"
        ]
        model, params, _ = prefix_tuning.load_model(tmp_path / "m")
        theirs = reference(torch.tensor([tokens])).logits[0].detach().numpy()
        np.testing.assert_allclose(prefix_tuning.logits(model, params, None, [tokens])[0], theirs, atol=1e-4)
        assert run.main(["export", f"--workdir={tmp_path}/w", "--format=kv", f"--output={tmp_path}/kv"]) == 1
        assert "has weights of its own" in capsys.readouterr().err
    if method == "infix":
        assert run.main(["inspect", f"--workdir={tmp_path}/w", "--examples=3"]) == 0
        out = capsys.readouterr().out
        assert "| virtual token | loss without |" in out
        assert "the first target is read off here" in out


def test_without_metrics_only_the_loss_is_computed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.evaluate, "rows", None)  # what decoding would call
    config = settings(folder, evaluation__metrics=(), train__epochs=1, train__shapes=1)
    summary = loop.train(config, tmp_path / "w")
    assert set(summary["tuned"]) == {"loss", "perplexity", "accuracy"}
    assert summary["untuned"] == {}
    assert list((tmp_path / "w" / "predictions").iterdir()) == []


def test_compare_trains_every_variant_and_prints_a_line_each(folder, tmp_path, capsys):
    config = settings(folder, train__epochs=1, train__shapes=1, decode__max_new_tokens=2)
    shorter = config["method"] | {"length": 2}
    config["compare"] = {"long": {"method": config["method"]}, "short": {"method": shorter}}
    text = train_variants(config, tmp_path)
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["untuned", "short", "long"]
    stored = {
        n: json.loads((tmp_path / n / "summary.json").read_text())["parameters"]["stored"] for n in ("long", "short")
    }
    assert stored["long"] * 2 == stored["short"] * 3
    assert f"{stored['long']:,}" in text
    assert train_variants(config, tmp_path) == text  # finished runs are not run again
    for changes in ({"short": {}}, {"short": {"methods": {}}}):
        with pytest.raises(UserError, match=r"config\.compare\.short changes .*; valid: seed, model"):
            train_variants(config | {"compare": changes}, tmp_path)


def test_a_workdir_that_is_older_than_an_option_goes_on(folder, finished, tmp_path, capsys):
    """Its config lacks the option's key, whose default is what was done before; anything else is another config."""
    config = f"--config={folder}/config.py"
    shutil.copytree(finished[0], tmp_path / "old")
    made = json.loads((tmp_path / "old" / "config.json").read_text())
    for section, key in (("train", "accumulate"), ("train", "keep"), ("model", "dtype"), ("method", "dropout")):
        del made[section][key]
    made["method"]["dropout"] = 0.2
    (tmp_path / "old" / "config.json").write_text(json.dumps(made))
    assert run.main(["train", config, f"--workdir={tmp_path}/old"]) == 0
    assert "is finished" in capsys.readouterr().err
    del made["method"]["dropout"]
    del made["decode"]["max_new_tokens"]
    made["objective"]["label_smoothing"] = 0.0  # which this config lacks
    (tmp_path / "old" / "config.json").write_text(json.dumps(made))
    assert run.main(["train", config, f"--workdir={tmp_path}/old"]) == 1
    told = capsys.readouterr().err
    assert (
        "was made with another config: decode.max_new_tokens: not there -> 6; method.dropout: 0.0 -> 0.2; use" in told
    )


def test_several_workdirs_are_exported_as_one(folder, finished, tmp_path, capsys):
    workdir = finished[0]
    model, frozen, _ = prefix_tuning.load_model(folder / "model")
    pair = f"--workdir={workdir},{workdir}"
    assert run.main(["export", pair, f"--output={tmp_path}/both"]) == 0
    one = prefix_tuning.load_adapter(workdir / "adapter", model, frozen).decoder.kv["self"]
    both = prefix_tuning.load_adapter(tmp_path / "both", model, frozen).decoder.kv["self"]
    np.testing.assert_array_equal(both.k, np.concatenate([one.k, one.k], axis=1))
    mixed = ["--combine=average", "--weights=0.25,0.5", f"--output={tmp_path}/mean"]
    assert run.main(["export", pair, *mixed]) == 0
    mean = prefix_tuning.load_adapter(tmp_path / "mean", model, frozen).decoder.kv["self"]
    np.testing.assert_allclose(mean.v, 0.75 * one.v, rtol=1e-6)
    capsys.readouterr()
    assert run.main(["export", pair, "--combine=average", "--weights=a,b", f"--output={tmp_path}/x"]) == 1
    assert "--weights='a,b' must be numbers" in capsys.readouterr().err
    assert run.main(["export", pair, "--combine=sum", f"--output={tmp_path}/x"]) == 1
    assert "valid: average, concatenate" in capsys.readouterr().err
    alone = [f"--workdir={workdir}", "--combine=average", f"--output={tmp_path}/x"]
    assert run.main(["export", *alone]) == 1
    assert "--combine and --weights are for several workdirs" in capsys.readouterr().err


def test_score_scores_any_two_files(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a b c d e\nf g\n")
    (tmp_path / "r.txt").write_text("x\na b c d e\n\nf h\n")
    arguments = ["--metrics=exact_match,rouge", f"--predictions={tmp_path}/p.txt", f"--references={tmp_path}/r.txt"]
    assert run.main(["score", *arguments]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["exact_match"] == 50.0
    assert scores["rouge1"] == pytest.approx(75.0)


def test_generate_refuses_an_empty_or_broken_file(finished, tmp_path, capsys):
    for text, message in (("", "is empty"), ("{}\n", ":1 has no text under 'source'"), ("[\n", ":1 is not JSON")):
        (tmp_path / "in.jsonl").write_text(text)
        files = [f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"]
        assert run.main(["generate", f"--workdir={finished[0]}", *files]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(UserError, match=r"cannot write a checkpoint to .*No space left on device"):
        loop.train(settings(folder), tmp_path / "w")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to workdir"):
        loop.train(settings(folder), tmp_path / "file" / "w")


def test_seeds_may_share_the_pairs_that_are_drawn(folder):
    """`train.draw` is the seed of the draw; without it every seed has pairs of its own."""

    def pairs(seed, draw):
        config = settings(folder, seed=seed, train__examples=8)
        config["train"]["draw"] = draw
        batch = next(iter(setup.make_run(config, setup.make_base(config)).data.batches(0)))
        return sorted(bytes(row[row > 0].astype(np.uint8)) for row in batch["tokens"])

    assert pairs(1, 5) == pairs(2, 5)
    assert pairs(1, None) != pairs(2, None)
    assert pairs(1, 2) == pairs(2, None)


def test_compiled_programs_are_kept_where_the_environment_says(monkeypatch):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": "/home/me/cache"})
    compiled.keep()
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert Path(folder).parent == Path("/home/me/cache/prefix_tuning")
    os.environ["XDG_CACHE_HOME"] = "/elsewhere"
    compiled.keep()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == folder  # what is set already goes first


def test_commands_do_without_torch_where_it_is_installed():
    """Which transformers would import for a tokenizer, and tensorboardX at once; who wants it still can."""
    program = f"""
import sys
from prefix_tuning import inspection, report, sweep, train
from prefix_tuning.models import loading
assert loading.load_tokenizer(loading.find_folder({str(ROOT / "configs/quickstart_assets/model")!r})) is not None
print("torch" in sys.modules)
import torch
"""
    environment = os.environ | {torchless.WITHOUT_TORCH: "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")

"""What a run hands on, and runs that start from it: the same numbers, the head included, and training that goes on."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
import transformers
from test_tasks import folder  # noqa: F401 (a fixture)

import run
from prefix_tuning import api, publish, setup, train
from prefix_tuning.errors import UserError

SHORT = [
    "optimizer.warmup_steps=0",
    "train.epochs=1",
    "text.max_source=12",
    "text.max_target=6",
    "train.examples=32",
    "train.batch_size=8",
    "train.shapes=1",
    "evaluation.metrics=()",
    "evaluation.examples=8",
    "evaluation.batch_size=8",
]
METHODS = {
    "prefix": ["method.length=3"],
    "prompt": ["method.length=3"],
    "lora": ["method.rank=2", "method.target_modules=('q','down')"],
}


def call(command, workdir, method, *options, **flags):
    named = dict(option.split("=", 1) for option in (*SHORT, *METHODS.get(method, ()), *options))
    given = [f"--config.{name}={value}" for name, value in named.items()]
    flags = [f"--{name}={value}" for name, value in flags.items()]
    return run.main(
        [command, f"--config=configs/quickstart.py:method={method}", *given, *flags, f"--workdir={workdir}"]
    )


def trained(workdir):
    *_, trainable, step = api.open_workdir(str(workdir))
    return jax.device_get(trainable), step


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """method -> the workdir of a run of it, trained once; nothing is written there again."""

    @functools.cache
    def made(method):
        workdir = tmp_path_factory.mktemp("published") / method
        assert call("train", workdir, method) == 0
        return workdir

    return made


@pytest.mark.parametrize("method", METHODS)
def test_a_run_starts_from_what_another_published(tmp_path, published, capsys, method):
    """Bit for bit, through the folder that PEFT reads, which also holds the tokenizer, the template and a card."""
    first, second = published(method), tmp_path / "second"
    adapter = first / "adapter"
    card = (adapter / "README.md").read_text()
    assert "base_model: configs/quickstart_assets/model" in card
    template = json.loads((adapter / "prompt_template.json").read_text())
    assert (template["prompt"], template["completion"]) == ("{source}\n", "{target}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.decode(tokenizer("name : a")["input_ids"]).strip() == "name : a"
    assert call("import", second, method, input=adapter) == 0
    (before, _), (after, step) = trained(first), trained(second)
    assert step == 0
    same(before, after)
    assert call("train", second, method) == 0
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    fresh = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    losses = [next(line["train/loss"] for line in own if "train/loss" in line) for own in (fresh, lines)]
    assert losses[1] < losses[0]
    capsys.readouterr()
    assert call("import", second, method, input=adapter) == 1
    assert "has checkpoints already; expected a new workdir" in capsys.readouterr().err


MLP = """
from configs import common, quickstart


def get_config(arg=None):
    config = quickstart.get_config(arg)
    prefix = {"length": 3, "reparametrisation": 4, "init": "random", "text": None}
    config.method = common.method("prefix", prefix=prefix)
    return config
"""


def test_a_run_starts_from_another_with_its_network(tmp_path):
    """Which no adapter keeps: the MLP of a prefix goes on in a run with other settings."""
    (tmp_path / "config.py").write_text(MLP)
    given = [f"--config={tmp_path}/config.py", *(f"--config.{option}" for option in SHORT)]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run.main(["train", *given, f"--workdir={first}"]) == 0
    slower = [*given, "--config.optimizer.learning_rate=1e-3", f"--workdir={second}"]
    assert run.main(["import", *slower, f"--input={first}"]) == 0
    same(trained(first)[0], trained(second)[0])
    assert run.main(["train", *slower]) == 0
    config = json.loads((first / "config.json").read_text())
    for method, message in (
        (config["method"] | {"length": 4}, "['decoder']['self']['slots'] (3, 128) instead of (4, 128)"),
        (config["method"] | {"reparametrisation": None}, "['decoder']['self']['down']['bias'] (4,) instead of None"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            api.import_adapter(config | {"method": method}, str(first), str(tmp_path / "third"))
    begin = functools.partial(publish.continued, trained(first)[0], "another")
    with pytest.raises(UserError, match="the run's base model has fingerprint another; this config's has"):
        publish.start_from(config, begin, tmp_path / "third")


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ({"name": "ptuning", "length": 3, "network": "mlp", "hidden": 4}, "P_TUNING"),
        ({"name": "prefix", "length": 3, "init": "text", "text": "name : area", "frozen_slots": 1}, "CARTRIDGE"),
        ({"name": "prefix", "length": 3}, "PREFIX_TUNING"),
    ],
)
def test_the_folder_says_how_it_was_made(tmp_path, method, kind):
    config = run.load_config("configs/quickstart.py").to_dict() | {"method": method}
    base = setup.make_base(config)
    frozen = setup.load_weights(base, config)
    bound = base.method.bind(frozen, base.method.init(jax.random.key(0), base.model, frozen))
    publish.save_adapter(tmp_path, base, config, frozen, *bound)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == kind
    assert written["num_virtual_tokens"] == 3
    assert written.get("num_frozen_tokens") == (1 if kind == "CARTRIDGE" else None)


def test_fine_tuned_weights_are_not_published_with_the_prefix_beside_them(tmp_path, capsys):
    config = run.load_config("configs/quickstart.py:method=prefix+finetune")
    config.update_from_flattened_dict({"method.parts.prefix.length": 3, "method.parts.finetune.top_layers": 1})
    config = config.to_dict()
    base = setup.make_base(config)
    frozen = setup.load_weights(base, config)
    begun = base.method.init(jax.random.key(0), base.model, frozen)
    assert train.export_adapter(base, config, frozen, begun, tmp_path / "adapter") is None
    assert "no adapter/ is written: PEFT's folder holds no fine-tuned weights" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def test_what_cannot_be_started_from(tmp_path, published, capsys):
    adapter = published("prefix") / "adapter"
    for method, options, message in (
        ("infix", [], "method 'infix' cannot start from an adapter: what made it"),
        ("ptuning", [], "method 'ptuning' cannot start from an adapter"),
        ("prefix", ["method.length=4"], "method.length=4 cannot start from slots of shape"),
        ("prefix", ["method.shift=False"], "the adaptation holds more than, or other than, what this method trains"),
        ("prompt", [], "the adaptation holds more than, or other than, what this method trains"),
        ("lora", [], "the adaptation holds more than, or other than, what this method trains"),
    ):
        capsys.readouterr()
        assert call("import", tmp_path / "other", method, *options, input=adapter) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "other" / "checkpoints").exists()
    lora = published("lora")
    for options, message in (
        (["method.rank=3"], "method.rank=3 with scale"),
        (["method.alpha=5.0"], "cannot start from rank 2 with scale"),
        (["method.target_modules=('q',)"], "method.target_modules stands for decoder/q, but the adaptation changes"),
    ):
        capsys.readouterr()
        assert call("import", tmp_path / "other", "lora", *options, input=lora / "adapter") == 1
        assert message in capsys.readouterr().err
    assert call("import", tmp_path / "other", "prefix", input=tmp_path) == 1
    assert "has no adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["classify"], indirect=True)
def test_a_task_head_goes_with_its_prefix(folder, capsys):  # noqa: F811
    """Written under PEFT's names, and read into a new run; without it the new run has a fresh one."""
    config, short = f"--config={folder}/config.py", ["--config.train.epochs=1", "--config.train.shapes=1"]
    first, second, third = (folder / name for name in ("first", "second", "third"))
    assert run.main(["train", config, *short, f"--workdir={first}"]) == 0
    adapter = json.loads((first / "summary.json").read_text())["adapter"]
    assert json.loads((first / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert run.main(["import", config, *short, f"--input={adapter}", f"--workdir={second}"]) == 0
    same(trained(first)[0], trained(second)[0])
    assert run.main(["export", f"--workdir={first}", f"--output={folder}/out"]) == 0
    for file in ("adapter_config.json", "prompt_template.json"):
        assert (folder / "out" / file).read_bytes() == (first / "adapter" / file).read_bytes()
    bare = shutil.copytree(first / "adapter", folder / "bare")
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(bare / "adapter_model.safetensors")
    kept = {key: x for key, x in tensors.items() if "classifier" not in key}
    assert len(kept) == len(tensors) - 2
    safetensors.numpy.save_file(kept, bare / "adapter_model.safetensors")
    assert run.main(["import", config, *short, f"--input={bare}", f"--workdir={third}"]) == 0
    fresh = trained(third)[0]
    same(fresh["method"], trained(first)[0]["method"])
    assert not fresh["head"]["bias"].any()
    assert run.main(["train", config, *short, f"--workdir={third}"]) == 0

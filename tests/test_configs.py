"""Every shipped config builds at its true size, as shapes only."""

from pathlib import Path

import jax
import numpy as np
import pytest

import run
from configs import common
from prefix_tuning import models, setup
from prefix_tuning.data import tasks
from prefix_tuning.heads import with_head
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.optimizer import make_optimizer
from prefix_tuning.registry import call, named
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import Batch, TrainState, count

ROOT = Path(run.__file__).parent
CONFIGS = sorted(path.stem for path in ROOT.glob("configs/*.py") if path.stem != "common")
# What the hub's config.json says of the models that configs name.
HUB = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "openai-community/gpt2-medium": {
        "model_type": "gpt2",
        "n_embd": 1024,
        "n_layer": 24,
        "n_head": 16,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
}
PARAMETERS = {"quickstart": None, "e2e_smollm2": 134_515_008, "e2e_gpt2_medium": 354_823_168}  # of the frozen model
STORED = {"e2e_smollm2": 10 * 30 * 2 * 192, "e2e_gpt2_medium": 245_760}  # facts of the prefix, see the paper's 0.1 %


class Words:
    """A tokenizer for initial texts, a token a character."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) % 97 for c in text]}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "arg", ["", *(f"quick,method={method}" for method in (*common.METHODS, *common.PRESETS, "prefix+lora"))]
)
def test_a_step_has_the_right_shapes_at_true_size(name, arg):
    config = run.load_config(f"{ROOT}/configs/{name}.py:{arg}").to_dict()
    where = config["model"]["name"]
    model = models.build(HUB[where] if where in HUB else loading.read_config(Path(setup.resolve(where))))
    if name in STORED:
        assert count(model.specs) == PARAMETERS[name]
    method = named("method", METHODS, config["method"], Words())
    objective = named("objective", OBJECTIVES, config["objective"], Words())
    if objective.head is not None:
        method = with_head(method, objective.head)
    tx, _ = call("optimizer", make_optimizer, config["optimizer"], 1000)
    step = make_train_step(model, method, objective, tx)
    frozen, trainable = setup.abstract_frozen(method, model), setup.abstract_trainable(method, model)
    setup.abstract_adaptation(method, model)
    stored = setup.parameter_counts(method, model)["stored"]
    if config["method"]["name"] == "prefix":
        assert stored == STORED.get(name, stored)
        assert stored <= 0.01 * count(model.specs)  # what the quick start promises, and every paper's prefix keeps
    state = TrainState(
        jax.ShapeDtypeStruct((), np.int32), trainable, jax.eval_shape(tx.init, trainable), jax.random.key(0)
    )
    A, B, T, N = 1, call("train", setup.Train, config["train"]).batch_size, 50, 20
    shapes = {"examples": (), "mask": (N,), "targets": (N,), "target_index": (N,)}
    fields = ("tokens", "positions", "segments", "target_index", "targets", "mask", "examples")
    batch = Batch(
        **{
            f: jax.ShapeDtypeStruct((A, B, *shapes.get(f, (T,))), np.float32 if f == "mask" else np.int32)
            for f in fields
        }
    )
    after, sums = jax.eval_shape(step, frozen, state, batch)
    shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shape(after.trainable) == shape(trainable)
    assert {x.dtype for x in jax.tree.leaves(trainable)} == {np.dtype(np.float32)}
    assert sums["loss"].shape == ()


def test_every_method_has_options_and_a_rate():
    assert set(common.METHODS) == set(METHODS) - {"compose"}
    for name in CONFIGS:
        rates = {
            method: run.load_config(f"{ROOT}/configs/{name}.py:method={method}").optimizer.learning_rate
            for method in (*common.METHODS, *common.PRESETS, "prefix+lora")
        }
        assert rates["prefix+lora"] == min(rates["prefix"], rates["lora"])


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("method=ia3", "unknown method 'ia3'; valid: prefix, infix"),
        ("method=prefix+ia3", "unknown method 'ia3'; valid: prefix, infix, .* several with"),
        ("method=lora+lora", "has one method twice"),
        ("quick=maybe", "config argument 'quick=maybe' is no bool"),
    ],
)
def test_wrong_arguments(arg, message):
    with pytest.raises(Exception, match=message):
        run.load_config(f"{ROOT}/configs/e2e_smollm2.py:{arg}")


def test_options_that_are_none_can_be_overridden():
    arguments = ["train", f"--config={ROOT}/configs/quickstart.py:method=prefix+adapter", "--workdir=w"]
    given = ["prefix.layers=(0, 2)", "prefix.shift=False", "prefix.scale=0.3", "adapter.form=parallel"]
    given += ["adapter.sublayer=attention", "prefix.reparametrisation=7"]
    _, values, _ = run.parse([*arguments, *(f"--config.method.parts.{option}" for option in given)])
    parts = values["config"]["method"]["parts"]
    assert parts["prefix"]["layers"] == (0, 2)
    assert parts["prefix"]["shift"] is False
    assert parts["prefix"]["reparametrisation"] == 7
    assert parts["adapter"]["sublayer"] == "attention"


def test_presets_are_what_they_are_called():
    mam = common.method("mam").to_dict()
    assert mam["name"] == "compose"
    assert mam["parts"]["prefix"]["length"] == 30
    assert (mam["parts"]["adapter"]["form"], mam["parts"]["adapter"]["bottleneck"]) == ("scaled_parallel", 512)
    assert mam["gates"] is False
    assert common.method("unipelt").to_dict()["gates"] is True
    assert common.method("bitfit").to_dict()["biases"] is True
    assert common.method("ft_top2").to_dict()["top_layers"] == 2


def test_compare_has_a_variant_for_each_of_four_methods():
    config = run.load_config(f"{ROOT}/configs/quickstart.py:compare,quick").to_dict()
    assert set(config["compare"]) == {"prompt", "prefix", "lora", "finetune"}
    for name, sections in config["compare"].items():
        alone = run.load_config(f"{ROOT}/configs/quickstart.py:quick,method={name}").to_dict()
        assert {key: value for key, value in config.items() if key != "compare"} | sections == alone


@pytest.mark.parametrize("name", CONFIGS)
def test_every_section_is_what_its_factory_takes(name):
    config = run.load_config(f"{ROOT}/configs/{name}.py").to_dict()
    chosen = {"decode"} if config["objective"]["name"] in tasks.TASKS else set()  # nothing is decoded
    assert set(config) == set(setup.SECTIONS) - chosen
    call("train", setup.Train, config["train"])
    call("evaluation", setup.Evaluation, config["evaluation"])

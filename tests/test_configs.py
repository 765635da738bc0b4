"""Every shipped config builds at its true size, as shapes only."""

from pathlib import Path

import jax
import numpy as np
import pytest

import run
from prefix_tuning import models, setup
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.optimizer import make_optimizer
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
}
PARAMETERS = {"quickstart": None, "e2e_smollm2": 134_515_008, "e2e_gpt2_medium": 354_823_168}  # of the frozen model
STORED = {"e2e_smollm2": 10 * 30 * 2 * 192, "e2e_gpt2_medium": 245_760}  # facts of the prefix, see the paper's 0.1 %


class Words:
    """A tokenizer for initial texts, a token a character."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) % 97 for c in text]}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("arg", ["", *(f"quick,method={method}" for method in METHODS)])
def test_a_step_has_the_right_shapes_at_true_size(name, arg):
    config = run.load_config(f"{ROOT}/configs/{name}.py:{arg}").to_dict()
    where = config["model"]["name"]
    model = models.build(HUB[where] if where in HUB else loading.read_config(Path(setup.resolve(where))))
    if name in STORED:
        assert count(model.specs) == PARAMETERS[name]
    method = setup.named("method", METHODS, config["method"], Words())
    tx, _ = setup.call("optimizer", make_optimizer, config["optimizer"], 1000)
    step = make_train_step(model, method, setup.named("objective", OBJECTIVES, config["objective"]), tx)
    frozen, trainable = loading.abstract(model), setup.abstract_trainable(method, model)
    stored = count(setup.abstract_adaptation(method, model).decoder)
    assert stored == STORED.get(name, stored)
    assert stored <= 0.01 * count(model.specs)  # what the quick start promises, and every paper's prefix keeps
    state = TrainState(
        jax.ShapeDtypeStruct((), np.int32), trainable, jax.eval_shape(tx.init, trainable), jax.random.key(0)
    )
    A, B, T, N = 1, setup.call("train", setup.Train, config["train"]).batch_size, 50, 20
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


@pytest.mark.parametrize("name", CONFIGS)
def test_every_section_is_what_its_factory_takes(name):
    config = run.load_config(f"{ROOT}/configs/{name}.py").to_dict()
    assert set(config) == set(setup.SECTIONS)
    setup.call("train", setup.Train, config["train"])
    setup.call("evaluation", setup.Evaluation, config["evaluation"])

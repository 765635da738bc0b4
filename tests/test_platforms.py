"""What is compiled can be lowered for GPUs and TPUs: nothing asks for an operation that only CPUs have."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import LLAMA, P, T

from prefix_tuning import decode, models, setup
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import Adaptation, Batch, TrainState

B, N = 2, 3
PARTS = {"prefix": {"length": P, "dropout": 0.1}, "lora": {"rank": 2}, "adapter": {"bottleneck": 2}}
BOTH = pytest.mark.parametrize("platform", ["cuda", "tpu"])


def shape(*sizes, dtype=np.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def lowered(platform, function, *shapes):
    """The program for a platform, whose every operation JAX has a rule for."""
    return function.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@BOTH
def test_a_training_step(platform):
    model = models.build(LLAMA | {"model_type": "llama"}, remat=True)
    method, tx = METHODS["compose"](None, parts=PARTS), optax.adamw(1e-3)
    frozen, trainable = setup.abstract_frozen(method, model), setup.abstract_trainable(method, model)
    state = jax.eval_shape(lambda x: TrainState(jnp.int32(0), x, tx.init(x), jax.random.key(0)), trainable)
    long = T * 60  # whose attention is taken in parts
    tokens, targets = [shape(1, B, long)] * 3, [shape(1, B, N)] * 2
    batch = Batch(*tokens, *targets, shape(1, B, N, dtype=np.float32), shape(1, B))
    step = make_train_step(model, method, OBJECTIVES["lm"](None), tx)
    assert "stablehlo.dot_general" in lowered(platform, jax.jit(step), frozen, state, batch)


@BOTH
@pytest.mark.parametrize("weights", loading.WEIGHTS)
def test_beam_search(platform, weights):
    """With layers that lie apart."""
    model = models.build(LLAMA | {"model_type": "llama"})
    frozen = loading.abstract(model, "bfloat16", weights)
    layers = model.sites["decoder"].layers
    one = jax.tree.map(lambda x: shape(1, *x.shape[1:], dtype=x.dtype), frozen["layers"])
    config = decode.DecodeConfig(max_new_tokens=N, end_tokens=(1,), pad_token=0, num_beams=3)
    given = frozen | {"layers": (one,) * layers}, Adaptation(), shape(B, T), shape(B)
    assert "stablehlo.while" in lowered(platform, decode.make_generate(model, config), *given)

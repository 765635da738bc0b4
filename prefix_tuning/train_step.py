"""The train step and the evaluation step: pure functions of arrays; no files, no config, no devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from prefix_tuning.types import Batch, Method, Model, Objective, Params, TrainState

Sums = dict[str, Array]
OBJECTIVE = 1 << 20  # folded into a step's key for what the objective draws, beyond all that methods fold in


def make_train_step(
    model: Model, method: Method, objective: Objective, tx: optax.GradientTransformation, *, axis: str | None = None
) -> Callable[[Params, TrainState, Batch], tuple[TrainState, Sums]]:
    """step(frozen, state, batch) -> (state, sums and norms), differentiating `state.trainable` and nothing else.

    Every leaf of the batch leads with a micro-batch axis, [A B ...]: gradients and counts are summed over it and over
    the devices of `axis`, and divided once, so neither uneven counts nor accumulation change the result.
    """

    def loss_fn(trainable, frozen, batch, key):
        params, adaptation = method.bind(frozen, trainable, key=key)
        own = jax.random.fold_in(key, OBJECTIVE)
        loss, count, metrics = objective.loss(model, params, adaptation, batch, own)
        return loss, {"loss": loss, "count": count, **metrics}

    def step(frozen, state, batch):
        key = jax.random.fold_in(state.key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))

        def micro(index, batch):
            return jax.grad(loss_fn, has_aux=True)(state.trainable, frozen, batch, jax.random.fold_in(key, index))

        def add(total, inputs):
            return jax.tree.map(jnp.add, total, micro(*inputs)), None

        first = jax.tree.map(lambda x: x[0], batch)
        if len(batch.mask) == 1:  # no sum, and so no second trace for its shapes and no loop to compile
            grads, sums = micro(0, first)
        else:
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(micro, 0, first))
            (grads, sums), _ = jax.lax.scan(add, zeros, (jnp.arange(len(batch.mask)), batch))
        if axis is not None:
            grads, sums = jax.lax.psum((grads, sums), axis)
        grads = jax.tree.map(lambda g: g / sums["count"], grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        norms = {"grad_norm": grads, "update_norm": updates, "param_norm": trainable}
        sums |= {name: optax.tree.norm(tree) for name, tree in norms.items()}
        return TrainState(state.step + 1, trainable, opt_state, state.key), sums

    return step


def make_eval_step(
    model: Model, method: Method, objective: Objective, *, axis: str | None = None
) -> Callable[[Params, Params, Batch], Sums]:
    """step(frozen, trainable, batch) -> sums over a batch whose leaves are [B ...]; no dropout."""

    def step(frozen, trainable, batch):
        params, adaptation = method.bind(frozen, trainable, key=None)
        loss, count, metrics = objective.loss(model, params, adaptation, batch)
        sums = {"loss": loss, "count": count, **metrics}
        return sums if axis is None else jax.lax.psum(sums, axis)

    return step

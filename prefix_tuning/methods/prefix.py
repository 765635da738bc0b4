"""Prefix tuning (Li & Liang 2021): every layer attends to P trained keys and values before the real ones."""

from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import optax
from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.types import KV, Adaptation, LayerHooks, Method, Model, Params

INITS = ("random", "vocabulary", "text")


class Reparametrisation(flax.linen.Module):
    """P embeddings and a tanh MLP that make the keys and values of all layers (eq. 3; the released code's shapes).

    The paper's footnote has embeddings of the MLP's width; its code has them of the model's width, and so has this.
    """

    length: int  # P
    embedding: int  # D
    width: int  # M
    out: tuple[int, ...]  # (L, 2, K, H), layer-major as in the released code

    @flax.linen.compact
    def __call__(self) -> Array:
        """Keys and values [P L 2 K H]."""
        slots = self.param("slots", flax.linen.initializers.normal(1.0), (self.length, self.embedding))
        hidden = jnp.tanh(self.dense(self.width, self.embedding, "down")(slots))
        return self.dense(self.out, self.width, "up")(hidden)

    @staticmethod
    def dense(features: int | tuple[int, ...], fan_in: int, name: str) -> flax.linen.Module:
        """A layer with torch.nn.Linear's defaults, which the released code trains from: U(+-1/sqrt(fan_in)) twice."""
        return flax.linen.DenseGeneral(
            features,
            kernel_init=flax.linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5),
            name=name,
        )


def make(
    tokenizer: Any,
    *,
    length: int | None,
    reparametrisation: int | None = None,
    init: str = "random",
    text: str | None = None,
    scale: float | None = None,
    fit_steps: int | None = None,
    fit_learning_rate: float | None = None,
    dropout: float = 0.0,
    shift: bool = True,
) -> Method:
    """A `Method` that trains a prefix of `length` slots; length=None takes as many as `text` has tokens.

    `reparametrisation` is the MLP's width M, None for free keys and values.  `init` is "random" (normal with deviation
    `scale`, 1 unless given; with the MLP its own fresh weights), "vocabulary" (the keys and values that the frozen
    model computes for random tokens) or "text" (for the first P tokens of `text`, repeated as often as needed); the MLP
    is fitted to them by `fit_steps` of Adam at `fit_learning_rate`, 500 and 1e-4 unless given, as in the released
    code's low-data recipe.  `dropout` is a probability on keys and values.  `shift` counts the prefix into the
    positions of real tokens.  Raises `UserError`, also for an option that would do nothing.
    """
    valid("init", init, INITS)
    if (text is not None) != (init == "text"):
        raise UserError(f"method.text goes with method.init='text' and nothing else; got init={init!r}, text={text!r}")
    if scale is not None and (init != "random" or reparametrisation is not None):
        raise UserError("method.scale goes with method.init='random' and method.reparametrisation=None; drop it")
    if (fit_steps, fit_learning_rate) != (None, None) and (init == "random" or reparametrisation is None):
        raise UserError(
            "method.fit_steps and method.fit_learning_rate go with method.reparametrisation and an init of 'text' or "
            "'vocabulary'; drop them"
        )
    scale = 1.0 if scale is None else scale
    fit_steps = 500 if fit_steps is None else fit_steps
    fit_learning_rate = 1e-4 if fit_learning_rate is None else fit_learning_rate
    if scale <= 0 or fit_steps < 0 or fit_learning_rate <= 0:
        raise UserError(
            "method needs scale > 0, fit_steps >= 0 and fit_learning_rate > 0; "
            f"got {scale}, {fit_steps}, {fit_learning_rate}"
        )
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"method.dropout must be in [0, 1), got {dropout}")
    ids = words(tokenizer, text) if text is not None else None
    if length is None:
        if ids is None:
            raise UserError("method.length=None takes the length of method.text, which is not given")
        length = len(ids)
    if length < 1:
        raise UserError(f"method.length must be at least 1, got {length}")
    if reparametrisation is not None and reparametrisation < 1:
        raise UserError(f"method.reparametrisation must be a width of at least 1 or None, got {reparametrisation}")

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        sites = model.sites["decoder"]
        out = (sites.layers, 2, *sites.kv["self"])
        start, fresh = jax.random.split(key)
        if ids is not None:
            target = computed(model, frozen, jnp.resize(jnp.asarray(ids), length))
        elif init == "vocabulary":
            target = computed(model, frozen, jax.random.randint(start, (length,), 0, model.vocabulary))
        else:
            target = None
        if reparametrisation is None:
            if target is None:
                target = scale * jax.random.normal(start, (length, *out))
            # Two buffers of their own, so that the step may donate them.
            return {"k": jnp.moveaxis(target[:, :, 0], 0, 1), "v": jnp.moveaxis(target[:, :, 1], 0, 1)}
        module = Reparametrisation(length, sites.width, reparametrisation, out)
        trainable = module.init(fresh)["params"]
        return trainable if target is None else fit(module, trainable, target, fit_steps, fit_learning_rate)

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        if reparametrisation is None:
            k, v = trainable["k"], trainable["v"]
        else:
            out = trainable["up"]["bias"].shape
            module = Reparametrisation(*trainable["slots"].shape, reparametrisation, out)
            k, v = jnp.transpose(module.apply({"params": trainable}), (2, 1, 0, 3, 4))  # [2 L P K H]
        if dropout and key is not None:
            keep = jax.random.bernoulli(key, 1 - dropout, (2, *k.shape)) / (1 - dropout)
            k, v = k * keep[0], v * keep[1]
        hooks = LayerHooks(kv={"self": KV(k, v)})
        return frozen, Adaptation(decoder=hooks, shift=jnp.int32(length) if shift else None)

    return Method(init_fn, bind)


def words(tokenizer: Any, text: str) -> list[int]:
    """The token ids of an initial text; raises `UserError` without a tokenizer or tokens."""
    if tokenizer is None:
        raise UserError("method.init='text' needs a tokenizer, and the model's folder has none")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"method.text={text!r} has no tokens")
    return ids


def computed(model: Model, frozen: Params, tokens: Array) -> Array:
    """The keys and values [P L 2 K H] that the frozen model itself computes for tokens [P] as context, in float32."""
    length = len(tokens)
    prefill = jax.jit(model.prefill, static_argnums=4)
    _, cache = prefill(frozen, Adaptation(), tokens[None], jnp.full(1, length, jnp.int32), length)
    return jnp.stack([cache.k[:, 0], cache.v[:, 0]], axis=1).transpose(2, 0, 1, 3, 4).astype(jnp.float32)


def fit(module: Reparametrisation, trainable: Params, target: Array, steps: int, learning_rate: float) -> Params:
    """The MLP after `steps` of Adam on the squared error to target [P L 2 K H]; the embeddings stay as drawn."""
    slots = {"slots": trainable["slots"]}
    network = {name: leaf for name, leaf in trainable.items() if name != "slots"}
    tx = optax.adam(learning_rate)

    def loss(network: Params) -> Array:
        return jnp.square(module.apply({"params": network | slots}) - target).mean()

    def step(_, carry):
        network, state = carry
        updates, state = tx.update(jax.grad(loss)(network), state)
        return optax.apply_updates(network, updates), state

    run = jax.jit(lambda network: jax.lax.fori_loop(0, steps, step, (network, tx.init(network)))[0])
    return run(network) | slots

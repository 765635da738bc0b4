"""Prefix-propagation (Li et al. 2023): P prompt rows that start at zero, and a trained addition before every layer."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError
from prefix_tuning.types import Adaptation, LayerHooks, Method, Model, Params


def make(tokenizer: Any, *, length: int, scale: float = 0.02) -> Method:
    """A `Method` that trains [L P D] additions to the hidden states of `length` rows before the input.

    They start normal with deviation `scale`.  The rows pass through the layers as tokens do; in a causal model they
    see each other and not the text, which comes after them.  Raises `UserError`.
    """
    del tokenizer
    if length < 1 or scale <= 0:
        raise UserError(f"method needs length >= 1 and scale > 0; got {length}, {scale}")

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        del frozen
        sites = model.sites[model.entry]
        return {model.entry: scale * jax.random.normal(key, (sites.layers, length, sites.width))}

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        del key  # nothing is drawn
        ((stack, added),) = trainable.items()
        hooks = {stack: LayerHooks(prompt=added)}
        return frozen, Adaptation(**hooks, prompt=jnp.zeros(added.shape[1:]), shift=jnp.int32(length))

    return Method(init_fn, bind)

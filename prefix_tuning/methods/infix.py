"""Infix tuning (Li & Liang 2021, section 7.3): trained slots between the source and the target."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError
from prefix_tuning.methods import rows
from prefix_tuning.methods.prefix import split
from prefix_tuning.methods.rows import Reparametrisation
from prefix_tuning.types import KV, Adaptation, LayerHooks, Method, Model, Params


def make(
    tokenizer: Any, *, length: int, reparametrisation: int | None = None, scale: float = 1.0, dropout: float = 0.0
) -> Method:
    """A `Method` that trains `length` virtual tokens after the prompt: their embeddings, and K/V added in every layer.

    Embeddings start normal with deviation `scale`; what is added starts at 0, or from an MLP of width
    `reparametrisation` with its own fresh weights.  As in the released code the source never sees the slots; unlike
    there a slot sees what is added to the slots before it.  Raises `UserError`.
    """
    del tokenizer
    if length < 1 or scale <= 0:
        raise UserError(f"method needs length >= 1 and scale > 0; got {length}, {scale}")
    rows.check_width(reparametrisation)
    rows.check_dropout(dropout)

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        del frozen
        sites = model.sites[model.entry]
        draw, fresh = jax.random.split(key)
        out = (sites.layers, 2, *sites.kv["self"])
        if reparametrisation is None:
            added = split(jnp.zeros((length, *out)))
        else:
            added = Reparametrisation(length, sites.width, reparametrisation, out).init(fresh)["params"]
        return {"rows": scale * jax.random.normal(draw, (length, sites.width)), "added": {model.entry: added}}

    def stored(frozen: Params, trainable: Params) -> Params:
        del frozen
        ((stack, added),) = trainable["added"].items()
        if reparametrisation is not None:
            added = split(Reparametrisation.of(added).apply({"params": added}))
        return {"rows": trainable["rows"], "added": {stack: added}}

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        made = stored(frozen, trainable)
        ((stack, added),) = made["added"].items()
        hooks = LayerHooks(rows={"self": KV(*rows.dropped(key, dropout, added["k"], added["v"]))})
        return frozen, Adaptation(**{stack: hooks}, rows=made["rows"])

    return Method(init_fn, bind, stored=stored, template=f"{{prompt}}{{rows:{length}}}")

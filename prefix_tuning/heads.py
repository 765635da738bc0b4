"""A task head beside a method: two trees that are trained together."""

from collections.abc import Callable

import jax
from jax import Array

from prefix_tuning.types import Adaptation, Method, Model, Params


def with_head(method: Method, head: Callable[[Array, Model], Params]) -> Method:
    """A `Method` that trains {"method": ..., "head": ...}; its `bind` puts the head beside the weights."""

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        own, fresh = jax.random.split(key)
        return {"method": method.init(own, model, frozen), "head": head(fresh, model)}

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        params, adaptation = method.bind(frozen, trainable["method"], key=key)
        return params | {"head": trainable["head"]}, adaptation

    def stored(frozen: Params, trainable: Params) -> Params:
        return {"method": method.stored(frozen, trainable["method"]), "head": trainable["head"]}

    return method._replace(init=init_fn, bind=bind, stored=stored, adopt=None)  # an adaptation has no head

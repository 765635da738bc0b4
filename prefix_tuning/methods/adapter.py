"""Bottleneck adapters: serial (Houlsby 2019, Pfeiffer 2021, Lin 2020, and others) and parallel (He et al. 2021)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.methods import rows
from prefix_tuning.nn import ACTIVATIONS
from prefix_tuning.types import Adaptation, Adapter, LayerHooks, Method, Model, Params


class Form(NamedTuple):
    """Where a kind of adapter sits and what it is made of."""

    sublayers: tuple[str, ...]
    parallel: bool = False
    norm: bool = False
    scale: float = 1.0


FORMS = {
    "houlsby": Form(("attention", "mlp")),
    "pfeiffer": Form(("mlp",)),
    "lin": Form(("block",), norm=True),
    "parallel": Form(("mlp",), parallel=True),
    "scaled_parallel": Form(("mlp",), parallel=True, scale=4.0),
}


def make(
    tokenizer: Any,
    *,
    form: str = "pfeiffer",
    bottleneck: int,
    activation: str = "relu",
    scale: float | None = None,
    sublayer: str | None = None,
) -> Method:
    """A `Method` that trains scale x up(activation(down(x))) of width `bottleneck`, biases included.

    `form` is "houlsby" (behind attention and MLP, before each is added to the residual), "pfeiffer" (behind the MLP),
    "lin" (behind the block, with a LayerNorm and a residual of its own: the adapter that Li & Liang compare with),
    "parallel" or "scaled_parallel" (beside the MLP, reading what it reads; `sublayer="attention"` moves it there, and
    `scale`, 4 unless given, goes with the latter).  `up` starts at 0: a fresh one is the base model exactly.  Raises
    `UserError`, also for an option that would do nothing.
    """
    del tokenizer
    kind = FORMS[valid("form", form, FORMS)]
    valid("activation", activation, ACTIVATIONS)
    if bottleneck < 1:
        raise UserError(f"method.bottleneck must be at least 1, got {bottleneck}")
    if scale is not None and (form != "scaled_parallel" or scale <= 0):
        raise UserError(
            f"method.scale must be above 0 and goes with method.form='scaled_parallel'; got {scale}, {form!r}"
        )
    if sublayer is not None:
        valid("sublayer", sublayer, ("attention", "mlp"))
        if not kind.parallel:
            raise UserError(f"method.sublayer goes with a parallel form; got {form!r}")
        kind = kind._replace(sublayers=(sublayer,))
    scale = kind.scale if scale is None else scale

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        del frozen
        tree: Params = {}
        for stack, sites in model.sites.items():
            L, D = sites.layers, sites.width
            for site in kind.sublayers:
                valid("sublayer", site, sites.adapters)
                own = jax.random.fold_in(jax.random.fold_in(key, len(tree)), len(tree.get(stack, {})))
                tree.setdefault(stack, {})[site] = {
                    "down": rows.uniform(own, (L, D, bottleneck), D),
                    "down_bias": jnp.zeros((L, bottleneck)),
                    "up": jnp.zeros((L, bottleneck, D)),
                    "up_bias": jnp.zeros((L, D)),
                }
                if kind.norm:
                    tree[stack][site]["norm"] = {"scale": jnp.ones((L, D)), "bias": jnp.zeros((L, D))}
        return tree

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        del key  # nothing is drawn
        shared = {"parallel": kind.parallel, "activation": activation, "scale": scale}
        hooks = {
            stack: LayerHooks(adapter={site: Adapter(**own, **shared) for site, own in sites.items()})
            for stack, sites in trainable.items()
        }
        return frozen, Adaptation(**hooks)

    return Method(init_fn, bind)

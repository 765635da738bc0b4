"""PrefixMemory (Prefix-Tuning+, Wang et al. 2025): a prefix moved out of the softmax, into a linear memory per head."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from prefix_tuning.attention import FEATURES
from prefix_tuning.errors import valid
from prefix_tuning.methods import rows
from prefix_tuning.types import Adaptation, LayerHooks, Memory, Method, Model, Params


def make(tokenizer: Any, *, feature: str = "elu") -> Method:
    """A `Method` that trains a matrix M [H H] per query head, added as feature(q) M to what the head attends to.

    `feature` is "elu" or "gelu".  It starts at 0, which is the base model exactly, and takes no softmax mass from the
    text, whatever their lengths.  Raises `UserError`.
    """
    del tokenizer
    valid("feature", feature, FEATURES)

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        del frozen

        def one(key: Array, stack: str, site: str) -> Array:
            sites = model.sites[stack]
            heads, size = sites.kv[site]
            return jnp.zeros((sites.layers, heads, sites.groups[site], size, size))

        return rows.at_sites({stack: sites.kv for stack, sites in model.sites.items()}, key, one)

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        del key  # nothing is drawn
        hooks = {
            stack: LayerHooks(memory={site: Memory(m, feature) for site, m in sites.items()})
            for stack, sites in trainable.items()
        }
        return frozen, Adaptation(**hooks)

    return Method(init_fn, bind)

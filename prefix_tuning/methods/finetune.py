"""Fine-tuning as a method: all weights, the top layers (FT-TOP2 of Li & Liang), or biases (Ben Zaken et al. 2022)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError
from prefix_tuning.types import STACKS, Adaptation, Below, LayerHooks, Method, Model, Params, depth

# What goes with the top layers; for GPT-2 wte and ln_f.
OUTSIDE = ("embedding", "unembedding", "norm", "encoder_norm", "pooler")
BUFFERS = ("logits_buffer",)  # no parameters to PyTorch either


def make(
    tokenizer: Any, *, top_layers: int | None = None, embedding: bool | None = None, biases: bool = False
) -> Method:
    """A `Method` that trains a float32 copy of the weights: all, those of each stack's `top_layers`, or the biases.

    With `top_layers`, `embedding` says whether the embedding, the unembedding and the last norm are trained too, as in
    one of the released code's two FT-TOP2 (the other trains 25,192,448 parameters of GPT-2 medium).  `biases` trains
    every bias that the model has, or, in a model without any, one per projection that starts at 0.
    Raises `UserError`, also for options that would do nothing.
    """
    del tokenizer
    if embedding is not None and top_layers is None:
        raise UserError(
            "method.embedding goes with method.top_layers: without it all weights or all biases are trained"
        )
    if biases and top_layers is not None:
        raise UserError("method.biases trains the biases of all layers; drop method.top_layers")
    if top_layers is not None and (top_layers < 0 or (top_layers == 0 and not embedding)):
        raise UserError(f"method.top_layers must be at least 1, or 0 with method.embedding=True; got {top_layers}")

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        del key  # it starts as the model is
        own = {name: frozen[name] for name in model.specs if name in frozen and name not in BUFFERS}
        if top_layers is not None:
            depths = {model.layers(stack): sites.layers for stack, sites in model.sites.items()}
            least = min(depths.values())
            if top_layers > least:
                raise UserError(f"method.top_layers={top_layers} is more than the model has; expected at most {least}")
            kept = {name: own[name] for name in OUTSIDE if embedding and name in own}
            top = {
                name: jax.tree.map(lambda x, depth=depth: x[depth - top_layers :], own[name])
                for name, depth in depths.items()
                if top_layers
            }
            own = kept | top
        if biases:
            own = only_biases(own) or new_biases(model)
        # A copy, also where the dtype is float32 already: a step donates what is trained.
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), own)

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        del key  # nothing is drawn
        if "hooks" in trainable:
            return frozen, Adaptation(**{k: LayerHooks(bias=bias) for k, bias in trainable["hooks"].items()})
        return replaced(frozen, trainable), Adaptation()

    return Method(init_fn, bind)


def only_biases(tree: Params) -> Params:
    """The leaves called "bias", where they are; {} for none."""
    kept = {}
    for name, node in tree.items():
        if isinstance(node, dict):
            inside = only_biases(node)
            kept |= {name: inside} if inside else {}
        elif name == "bias":
            kept[name] = node
    return kept


def new_biases(model: Model) -> Params:
    """A bias of 0 for every projection [L out...] of a model that has none."""
    hooks = {
        stack: {
            site: jnp.zeros((sites.layers, *projection.outer))
            for site, projection in sites.projections.items()
            if projection.part is None
        }
        for stack, sites in model.sites.items()
    }
    return {"hooks": hooks}


def replaced(frozen: Params, trainable: Params) -> Params:
    """The frozen tree with trained leaves in their places, in its dtype; fewer layers than it has are the top ones."""
    merged = dict(frozen)
    for name, new in trainable.items():
        old = frozen[name]
        if not isinstance(new, dict):
            merged[name] = new.astype(old.dtype)
        elif name in STACKS and (below := depth(old) - depth(new)):
            # Parts of the stack, so that nothing is differentiated in the layers below.
            top = jax.tree.map(lambda x, n=below: x[n:], old)
            merged[name] = Below(old, below), replaced(top, new)
        else:
            merged[name] = replaced(old, new)
    return merged

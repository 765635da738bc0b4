"""Going over the layers of a stack of weights: scanned over or unrolled, in one piece or in parts, or taken apart."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prefix_tuning.types import KV, Below, Compute, Layers, Model, Params, depth, parts

Written = tuple[tuple[Array, ...], tuple[Array, ...]]  # keys and values that decoding writes, by the parts of a stack


def over_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Layers, beside: Any, compute: Compute
) -> tuple[Any, Any]:
    """Scans `body(carry, (weights, beside)) -> (carry, kept)` over a stack; returns the last carry and kept [L ...].

    `layers` and `beside` lead with L.  A stack in parts is one scan after the other: what is trained in the last part
    alone is not differentiated in those below it.
    """
    body = jax.checkpoint(body, prevent_cse=False) if compute.remat else body
    stack, first, kept = parts(layers), 0, []
    for part in stack:
        count, (rows, weights_of) = depth(part), scanned(part)
        own = beside if len(stack) == 1 else layers_of(beside, first, count)

        def one(carry, inputs, weights_of=weights_of):
            return body(carry, (weights_of(inputs[0]), inputs[1]))

        carry, found = jax.lax.scan(one, carry, (rows, own), unroll=1 if compute.scan else count)
        kept.append(found)
        first += count
    return carry, kept[0] if len(kept) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *kept)


def step_over_layers(
    body: Callable[[Any, Any, KV, Array | None], tuple[Any, KV]], x: Any, layers: Layers, beside: Any, written: Written
) -> tuple[Any, Written]:
    """`over_layers` for a decoding step: `body(x, (weights, beside), cached, layer) -> (x, cached)`.

    `beside` is in the parts that the layers lie in.  `cached` is the part [L B K S H] of the cache that the layer lies
    in, and `layer` its number there: carried, not scanned over, so that XLA writes one slot in place instead of copying
    every layer.  A part of one layer has cached [B K S H] and no number.
    """
    found = []
    for part, own, k, v in zip(parts(layers), beside, *written, strict=True):
        rows, weights_of = scanned(part)

        def one(carry, inputs, weights_of=weights_of):
            number, row, own = inputs
            return body(carry[0], (weights_of(row), own), carry[1], number), None

        if depth(part) == 1:
            row, own = jax.tree.map(lambda leaf: leaf[0], (rows, own))
            x, cached = body(x, (weights_of(row), own), KV(k, v), None)
        else:
            (x, cached), _ = jax.lax.scan(one, (x, KV(k, v)), (jnp.arange(depth(part)), rows, own))
        found.append((cached.k, cached.v))
    return x, tuple(zip(*found, strict=True))


def scanned(part: Params | Below) -> tuple[Any, Callable[[Any], Params]]:
    """What to scan over for a part of a stack, and what makes a layer's weights of one row of it."""
    if not isinstance(part, Below):
        return part, lambda weights: weights
    at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return jnp.arange(part.depth), lambda number: jax.tree.map(lambda x: at(x, number), part.stack)


def in_parts(tree: Any, layers: Layers) -> tuple[Any, ...]:
    """A tree [L ...] in the parts that a stack of weights lies in."""
    depths = list(map(depth, parts(layers)))
    return tuple(layers_of(tree, sum(depths[:n]), count) for n, count in enumerate(depths))


def layers_of(tree: Any, first: int, count: int) -> Any:
    """So many layers of a tree [L ...]."""
    return jax.tree.map(lambda x: x[first : first + count], tree)


def apart(params: Params, model: Model) -> Params:
    """The weights with every layer of the stack that writes a part of its own; what is one stays where it is.

    A loop over steps then reads each layer where it is.  Out of a stack it would copy all of them at every step.  The
    layers are copies, but on CPU devices, where they are `views` of the stack.
    """
    name = model.layers("decoder")
    return params | {name: tuple(layer for part in parts(params[name]) for layer in single_layers(part))}


def single_layers(part: Params | Below) -> list[Params]:
    """The layers of a part [L ...], each [1 ...]."""
    count, stack = depth(part), part.stack if isinstance(part, Below) else part
    leaves, tree = jax.tree.flatten(stack)
    if len(leaves[0]) == 1:
        return [stack]
    if all(map(on_cpu, leaves)):
        layers = zip(*map(views, leaves), strict=True)
        return [jax.tree.unflatten(tree, layer) for layer in itertools.islice(layers, count)]
    return [layer_at(stack, number) for number in range(count)]


@jax.jit
def layer_at(part: Params, number: int) -> Params:
    """One layer [1 ...] of a part [L ...]; compiled once for all numbers."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1), part)


def on_cpu(x: Any) -> bool:
    """Whether an array lies on CPU devices."""
    return isinstance(x, Array) and all(device.platform == "cpu" for device in x.devices())


def views(x: Array) -> list[Array]:
    """The layers [1 ...] of an array [L ...] on CPU devices, which share its memory.

    One whose bytes are no multiple of 64 is copied, since XLA's arrays begin at those; as a rule only vectors are.
    """
    if not x.committed:
        host = np.asarray(x)
        return [jax.device_put(host[number : number + 1]) for number in range(len(host))]
    shards = [(np.asarray(shard.data), shard.device) for shard in x.addressable_shards]

    def layer(number: int) -> Array:
        own = [jax.device_put(host[number : number + 1], device) for host, device in shards]
        return jax.make_array_from_single_device_arrays((1, *x.shape[1:]), x.sharding, own)

    return [layer(number) for number in range(len(x))]

"""What the cache of a decoding loop holds, and how a step reads and writes it; `Cache` says how it is laid out."""

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.stacks import Written
from prefix_tuning.types import KV, Cache, Layers, depth, parts


def unwritten(layers: Layers, rows: int, slots: int, heads: tuple[int, int], dtype: jnp.dtype) -> Written:
    """Room for keys and values of heads (K, H), as `stacks.step_over_layers` wants it for this stack of weights."""
    depths = list(map(depth, parts(layers)))
    shape = rows, heads[0], slots, heads[1]
    k, v = (tuple(jnp.zeros(shape if L == 1 else (L, *shape), dtype) for L in depths) for _ in "kv")
    return k, v


def write(cached: KV, k: Array, v: Array, layer: Array | None, slot: Array) -> tuple[KV, KV]:
    """The cached keys and values with those of a token of each beam, [B W K H], and then the layer's [B N*W K H].

    For `cached` and `layer` see `stacks.step_over_layers`.
    """

    def put(old, new):
        first = (0, 0, slot * new.shape[1], 0)
        new = new.swapaxes(1, 2)
        if layer is None:
            return jax.lax.dynamic_update_slice(old, new, first)
        return jax.lax.dynamic_update_slice(old, new[None], (layer, *first))

    cached = KV(put(cached.k, k), put(cached.v, v))
    return cached, transposed(cached if layer is None else jax.tree.map(lambda x: x[layer], cached))


def transposed(kv: KV) -> KV:
    """Keys and values [... S K H] as a cache keeps them, [... K S H], or the other way round."""
    return jax.tree.map(lambda x: x.swapaxes(-2, -3), kv)


def stepped(cache: Cache, k: tuple[Array, ...], v: tuple[Array, ...]) -> Cache:
    """The cache after a step that wrote k and v."""
    slots = cache.ancestors.shape[-1]
    written = jnp.minimum(cache.written + 1, slots)  # a row that has ended may wait longer than it wrote
    return cache.replace(k=k, v=v, slot=(cache.slot + 1) % slots, written=written)


def ages(cache: Cache) -> Array:
    """How many steps ago each token [N*W] of a cache was written, 0 for those that this step writes."""
    _, beams, slots = cache.ancestors.shape
    return jnp.repeat((cache.slot - jnp.arange(slots)) % slots, beams)


def numbers(cache: Cache) -> Array:
    """The number of each token [B N*W] within what its row writes, this step's included; below 0 for none."""
    return cache.written[:, None] - ages(cache)


def continued(cache: Cache) -> Array:
    """Which tokens each beam continues, bool [B W N*W], the one that it writes in this step included."""
    rows, beams, slots = cache.ancestors.shape
    own = cache.ancestors[..., None] == jnp.arange(beams)
    return own.reshape(rows, beams, slots * beams) & (numbers(cache) >= 0)[:, None]

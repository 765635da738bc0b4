"""What every decoder-only family shares: the scan over layers, prefill and decoding, around a family's own layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning import nn
from prefix_tuning.types import KV, Adaptation, Batch, Cache, Model, Params, Sites


class Layer(NamedTuple):
    """A family's own arithmetic; `layer` is one layer's weights."""

    embed: Callable[[Params, Array, Array], Array]  # (params, tokens [B T], positions [B T]) -> [B T D]
    queries: Callable[..., tuple[Array, Array, Array]]  # (layer, x [B T D], positions) -> q [B T K G H], k, v [B T K H]
    combine: Callable[[Params, Array, Array], Array]  # (layer, x, attended [B T K G H]) -> [B T D]
    norm: Callable[[Params, Array], Array]  # (params, x [B T D]) -> [B T D]
    unembed: Callable[[Params, Array], Array]  # (params, hidden [... D]) -> float32 logits [... V]


def build(
    layer: Layer,
    *,
    config: dict[str, Any],
    sites: Sites,
    specs: Params,
    vocabulary: int,
    max_positions: int | None,
    scan: bool = True,
) -> Model:
    """Makes a `Model` of one stack of causal layers; scan=False unrolls them, for debugging and counting operations."""
    all_sites = {"decoder": sites}

    def over_layers(body: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
        return jax.lax.scan(body, carry, xs, unroll=1 if scan else sites.layers)

    def start(
        params: Params, adaptation: Adaptation, tokens: Array, positions: Array
    ) -> tuple[Array, Array, KV | None]:
        nn.check(adaptation, all_sites, rows=tokens.shape[0])
        positions = nn.shifted(positions, adaptation)
        prefix = (adaptation.decoder.kv or {}).get("self")
        return layer.embed(params, tokens, positions), positions, prefix

    def full(
        params, adaptation, tokens, positions, segments, *, keep: bool
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Hidden states [B T D] and, if `keep`, every layer's keys and values [L B T K H]."""
        x, positions, prefix = start(params, adaptation, tokens, positions)
        mask = nn.causal_mask(segments)

        def body(x, inputs):
            weights, prefix = inputs
            q, k, v = layer.queries(weights, x, positions)
            return layer.combine(weights, x, nn.attend(q, k, v, mask, prefix)), (k, v) if keep else None

        x, kv = over_layers(body, x, (params["layers"], prefix))
        return layer.norm(params, x), kv

    def hidden(params: Params, adaptation: Adaptation, batch: Batch) -> Array:
        return full(params, adaptation, batch.tokens, batch.positions, batch.segments, keep=False)[0]

    def prefill(
        params: Params, adaptation: Adaptation, tokens: Array, lengths: Array, slots: int
    ) -> tuple[Array, Cache]:
        rows, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        real = positions < lengths[:, None]
        x, (k, v) = full(params, adaptation, tokens, positions, real.astype(jnp.int32), keep=True)
        room = [(0, 0), (0, 0), (0, slots - length), (0, 0), (0, 0)]
        cache = Cache(
            k=jnp.pad(k, room),
            v=jnp.pad(v, room),
            valid=jnp.pad(real, room[1:3]),
            slot=jnp.int32(length),
            position=lengths,
        )
        return layer.unembed(params, x[jnp.arange(rows), lengths - 1]), cache

    def decode(params: Params, adaptation: Adaptation, cache: Cache, tokens: Array) -> tuple[Array, Cache]:
        x, positions, prefix = start(params, adaptation, tokens[:, None], cache.position[:, None])
        valid = cache.valid.at[:, cache.slot].set(True)

        # The cache is carried, not scanned over: XLA then writes the new slot in place instead of copying every layer.
        def body(carry, inputs):
            x, keys, values = carry
            index, weights, prefix = inputs
            q, k, v = layer.queries(weights, x, positions)
            keys = jax.lax.dynamic_update_slice(keys, k[None], (index, 0, cache.slot, 0, 0))
            values = jax.lax.dynamic_update_slice(values, v[None], (index, 0, cache.slot, 0, 0))
            attended = nn.attend(q, keys[index], values[index], valid[:, None], prefix)
            return (layer.combine(weights, x, attended), keys, values), None

        inputs = (jnp.arange(sites.layers), params["layers"], prefix)
        (x, k, v), _ = over_layers(body, (x, cache.k, cache.v), inputs)
        logits = layer.unembed(params, layer.norm(params, x)[:, 0])
        return logits, Cache(k=k, v=v, valid=valid, slot=cache.slot + 1, position=cache.position + 1)

    return Model(config, all_sites, specs, vocabulary, max_positions, hidden, layer.unembed, prefill, decode)

"""What every decoder-only family shares: the scan over layers, prefill and decoding, around a family's own layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning import nn
from prefix_tuning.types import KV, Adaptation, Batch, Cache, LayerHooks, Model, Params, Sites


class Layer(NamedTuple):
    """A family's own arithmetic; `layer` is one layer's weights and kinds, `hooks` what to do differently in it."""

    embed: Callable[[Params, Array], Array]  # (params, tokens [...]) -> [... D]
    place: Callable[[Params, Array, Array], Array]  # (params, embeddings [B T D], positions [B T]) -> [B T D]
    # (layer, hooks, x [B T D], positions [B T]) -> q [B T K G H], k, v [B T K H]
    queries: Callable[..., tuple[Array, Array, Array]]
    combine: Callable[..., Array]  # (layer, hooks, x, attended [B T K G H]) -> [B T D]
    norm: Callable[[Params, Array], Array]  # (params, x [B T D]) -> [B T D]
    unembed: Callable[[Params, Array], Array]  # (params, hidden [... D]) -> float32 logits [... V]


class Stream(NamedTuple):
    """Rows of tokens on their way through the layers."""

    x: Array  # [B T D]
    positions: Array  # [B T]
    index: Array | None = None  # [B T] which virtual token stands here, -1 for none


class Attended(NamedTuple):
    """What one layer's attention was between."""

    q: Array  # [B T K G H]
    kv: KV  # the tokens' own [B T K H]
    before: KV | None  # what the prompt became
    prefixes: list[KV]  # all slots before the first token, the prompt's last


def build(
    layer: Layer,
    *,
    config: dict[str, Any],
    sites: Sites,
    specs: Params,
    vocabulary: int,
    max_positions: int | None,
    how: nn.Attention = nn.PLAIN,
    kinds: Params | None = None,
    scan: bool = True,
    remat: bool = False,
) -> Model:
    """Makes a `Model` of one stack of causal layers; scan=False unrolls them, for debugging and counting operations.

    `kinds` are arrays that lead with L and are no weights: in what else than weights layers differ.  They are scanned
    over beside the weights and handed to `layer` among them.  A "window" [L] of n lets a token see itself and the n - 1
    real tokens before it; prefixes and prompts are seen whatever the window.
    """
    all_sites = {"decoder": sites}

    def over_layers(body: Callable, carry: Any, params: Params, *beside: Any) -> tuple[Any, Any]:
        def one(carry, inputs):
            weights, (kinds, *beside) = inputs
            return body(carry, (weights | kinds, *beside))

        return nn.over_layers(one, carry, params["layers"], (kinds or {}, *beside), scan=scan, remat=remat)

    def start(params: Params, adaptation: Adaptation, tokens: Array, positions: Array) -> Stream:
        """Tokens [B T] as embeddings at their positions; ids from V on are rows of the adaptation."""
        nn.check(adaptation, all_sites, rows=tokens.shape[0])
        positions = nn.shifted(positions, adaptation)
        x, index = nn.embedded(layer.embed, params, adaptation, tokens, vocabulary)
        return Stream(layer.place(params, x, positions), positions, index)

    def start_prompt(params: Params, adaptation: Adaptation, like: Array) -> Stream | None:
        """The prompt as a stream of its own, [1 P D] if all rows share it: it never sees what comes after it."""
        if adaptation.prompt is None:
            return None
        length, width = adaptation.prompt.shape[-2:]
        positions = nn.prompt_positions(adaptation)
        shared = (
            adaptation.prompt.ndim == 2
            and len(positions) == 1
            and not any(map(per_row, nn.slots_at(adaptation.decoder, "self")))
        )
        rows = 1 if shared else len(like)
        prompt = jnp.broadcast_to(adaptation.prompt.astype(like.dtype), (rows, length, width))
        positions = jnp.broadcast_to(positions, (rows, length))
        return Stream(layer.place(params, prompt, positions), positions)

    def one(
        weights: Params, hooks: LayerHooks, stream: Stream, mask: Array, before: KV | None, store: Callable
    ) -> tuple[Array, Attended]:
        """One layer: x after it and what was attended to; `store` says what becomes of the layer's keys and values."""
        hooks = nn.open_gates(hooks, stream.x)
        q, k, v = layer.queries(weights, hooks, stream.x, stream.positions)
        k, v = nn.add_rows(k, v, (hooks.rows or {}).get("self"), stream.index)
        attended = nn.attend_hooked(q, *store(k, v), mask, hooks, "self", before=before, how=how)
        seen = Attended(q, KV(k, v), before, nn.slots_at(hooks, "self", before))
        return layer.combine(weights, hooks, stream.x, attended), seen

    def prompt_layer(weights: Params, hooks: LayerHooks, prompt: Stream) -> tuple[Stream, KV]:
        """The prompt through one layer, and what the tokens after it see of it."""
        if hooks.prompt is not None:
            prompt = prompt._replace(x=prompt.x + hooks.prompt.astype(prompt.x.dtype))
        mask = nn.causal_mask(jnp.ones(prompt.positions.shape, jnp.int32))  # its rows are slots: no window parts them
        x, seen = one(weights, hooks, prompt, mask, None, as_they_are)
        return prompt._replace(x=x), jax.tree.map(lambda y: y[0] if len(y) == 1 else y, seen.kv)

    def full(params, adaptation, tokens, positions, segments, keep: Callable) -> tuple[Array, Any]:
        """Hidden states [B T D], and what `keep(attended, mask)` takes from each layer."""
        stream = start(params, adaptation, tokens, positions)
        prompt = start_prompt(params, adaptation, stream.x)
        causal = nn.causal_mask(segments)

        def body(carry, inputs):
            weights, hooks = inputs
            stream, prompt = carry
            before = None
            if prompt is not None:
                prompt, before = prompt_layer(weights, hooks, prompt)
            mask = nn.nearby(causal, positions, positions, weights.get("window"))
            x, attended = one(weights, hooks, stream, mask, before, as_they_are)
            return (stream._replace(x=x), prompt), keep(attended, mask)

        (stream, _), kept = over_layers(body, (stream, prompt), params, adaptation.decoder)
        return layer.norm(params, stream.x), kept

    def hidden(params: Params, adaptation: Adaptation, batch: Batch) -> Array:
        return full(params, adaptation, batch.tokens, batch.positions, batch.segments, lambda *_: None)[0]

    def prefill(
        params: Params, adaptation: Adaptation, tokens: Array, lengths: Array, slots: int
    ) -> tuple[Array, Cache]:
        rows, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        real = positions < lengths[:, None]
        segments = real.astype(jnp.int32)
        x, (kv, before) = full(params, adaptation, tokens, positions, segments, lambda seen, _: (seen.kv, seen.before))
        room = [(0, 0), (0, 0), (0, slots - length), (0, 0), (0, 0)]
        cache = Cache(
            k=jnp.pad(kv.k, room),
            v=jnp.pad(kv.v, room),
            valid=jnp.pad(real, room[1:3]),
            slot=jnp.int32(length),
            position=lengths,
            prompt=before,
        )
        return layer.unembed(params, x[jnp.arange(rows), lengths - 1]), cache

    def decode(params: Params, adaptation: Adaptation, cache: Cache, tokens: Array) -> tuple[Array, Cache]:
        stream = start(params, adaptation, tokens[:, None], cache.position[:, None])
        valid = cache.valid.at[:, cache.slot].set(True)
        positions = valid.cumsum(1) - 1  # of the real tokens in the slots; prompts of unequal length leave gaps

        # The cache is carried, not scanned over: XLA then writes the new slot in place instead of copying every layer.
        def body(carry, inputs):
            x, keys, values = carry
            weights, number, hooks, before = inputs

            def store(k, v):
                nonlocal keys, values
                keys, values = written(keys, k, number, cache.slot), written(values, v, number, cache.slot)
                return keys[number], values[number]

            mask = nn.nearby(valid[:, None], cache.position[:, None], positions, weights.get("window"))
            x, _ = one(weights, hooks, stream._replace(x=x), mask, before, store)
            return (x, keys, values), None

        beside = (jnp.arange(sites.layers), adaptation.decoder, cache.prompt)
        (x, k, v), _ = over_layers(body, (stream.x, cache.k, cache.v), params, *beside)
        logits = layer.unembed(params, layer.norm(params, x)[:, 0])
        return logits, cache.replace(k=k, v=v, valid=valid, slot=cache.slot + 1, position=cache.position + 1)

    def keys_values(params: Params, tokens: Array) -> dict[str, dict[str, KV]]:
        """What each layer computes for tokens [P], by stack and site, as [L P K H]."""
        length = len(tokens)
        cache = prefill(params, Adaptation(), tokens[None], jnp.full(1, length, jnp.int32), length)[1]
        return {"decoder": {"self": KV(cache.k[:, 0], cache.v[:, 0])}}

    def probe(params: Params, adaptation: Adaptation, batch: Batch) -> dict[str, dict[str, dict[str, Array]]]:
        """What attention does, by stack and site, with the slots before the first token, over a batch's real tokens.

        "mass" [L K G P] is the attention that each slot receives, "key_norm" and "value_norm" [L K P] are its norms,
        "token_key_norm" and "token_value_norm" [L K] the mean ones of real tokens.
        """
        real = (batch.segments > 0).astype(jnp.float32)

        def keep(seen: Attended, mask: Array) -> dict[str, Array]:
            return nn.slot_statistics(seen.q, seen.kv, seen.prefixes, mask, real, how)

        found = full(params, adaptation, batch.tokens, batch.positions, batch.segments, keep)[1]
        return {"decoder": {"self": found}}

    return Model(
        config=config,
        sites=all_sites,
        scan=scan,
        specs=specs,
        vocabulary=vocabulary,
        max_positions=max_positions,
        embed=layer.embed,
        hidden=hidden,
        unembed=layer.unembed,
        prefill=prefill,
        decode=decode,
        probe=probe,
        keys_values=keys_values,
    )


def as_they_are(k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values that nobody stores."""
    return k, v


def written(cached: Array, new: Array, layer: Array, slot: Array) -> Array:
    """Keys or values [L B S K H] with new ones [B 1 K H] in one slot of one layer."""
    return jax.lax.dynamic_update_slice(cached, new[None], (layer, 0, slot, 0, 0))


def per_row(kv: KV) -> bool:
    """Whether a prefix [L ...] differs from row to row."""
    return kv.k.ndim == 5 or (kv.mask is not None and kv.mask.ndim == 3)

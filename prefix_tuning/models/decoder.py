"""What every decoder-only family shares: the scan over layers, prefill and decoding, around a family's own layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning import caching, fit, nn, stacks
from prefix_tuning.attention import (
    PLAIN,
    Attention,
    attend_hooked,
    causal_mask,
    nearby,
    per_row,
    slot_statistics,
    slots_at,
)
from prefix_tuning.types import KV, Adaptation, Batch, Cache, Compute, LayerHooks, Model, Params, Sites


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
    compute: Compute,
    how: Attention = PLAIN,
    kinds: Params | None = None,
) -> Model:
    """Makes a `Model` of one stack of causal layers.

    `kinds` are arrays that lead with L and are no weights: in what else than weights layers differ.  They are scanned
    over beside the weights and handed to `layer` among them.  A "window" [L] of n lets a token see itself and the n - 1
    real tokens before it; prefixes and prompts are seen whatever the window.
    """
    all_sites, how = {"decoder": sites}, how._replace(kernel=compute.attention)

    def over_layers(body: Callable, carry: Any, params: Params, *beside: Any) -> tuple[Any, Any]:
        def one(carry, inputs):
            weights, (kinds, *beside) = inputs
            return body(carry, (weights | kinds, *beside))

        return stacks.over_layers(one, carry, params["layers"], (kinds or {}, *beside), compute)

    def step_over_layers(
        body: Callable, x: Array, params: Params, hooks: LayerHooks, cache: Cache
    ) -> tuple[Array, stacks.Written]:
        def one(x, inputs, cached, number):
            weights, ((kinds, hooks, prompt), read) = inputs
            return body(x, (weights | kinds, hooks, read, prompt), cached, number)

        beside = stacks.in_parts((kinds or {}, hooks, cache.prompt), params["layers"])
        beside = tuple(zip(beside, cache.read, strict=True))
        return stacks.step_over_layers(one, x, params["layers"], beside, (cache.k, cache.v))

    def start(params: Params, adaptation: Adaptation, tokens: Array, positions: Array) -> Stream:
        """Tokens [B T] as embeddings at their positions; ids from V on are rows of the adaptation."""
        fit.check(adaptation, all_sites, rows=tokens.shape[0])
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
            and not any(map(per_row, slots_at(adaptation.decoder, "self")))
        )
        rows = 1 if shared else len(like)
        prompt = jnp.broadcast_to(adaptation.prompt.astype(like.dtype), (rows, length, width))
        positions = jnp.broadcast_to(positions, (rows, length))
        return Stream(layer.place(params, prompt, positions), positions)

    def one(weights: Params, hooks: LayerHooks, stream: Stream, attention: Callable) -> tuple[Array, Any]:
        """One layer: x after it, and the second of what `attention(hooks, q, k, v) -> (attended, ...)` gives."""
        hooks = nn.open_gates(hooks, stream.x)
        q, k, v = layer.queries(weights, hooks, stream.x, stream.positions)
        k, v = nn.add_rows(k, v, (hooks.rows or {}).get("self"), stream.index)
        attended, seen = attention(hooks, q, k, v)
        return layer.combine(weights, hooks, stream.x, attended), seen

    def among(mask: Array, before: KV | None = None) -> Callable:
        """Attention of tokens to those before them where mask [B T T] allows, and to the slots that a prompt became."""

        def attention(hooks, q, k, v):
            attended = attend_hooked(q, k, v, mask, hooks, "self", before=[before], how=how, causal=True)
            return attended, Attended(q, KV(k, v), before, slots_at(hooks, "self", before))

        return attention

    def prompt_layer(weights: Params, hooks: LayerHooks, prompt: Stream) -> tuple[Stream, KV]:
        """The prompt through one layer, and what the tokens after it see of it."""
        if hooks.prompt is not None:
            prompt = prompt._replace(x=prompt.x + hooks.prompt.astype(prompt.x.dtype))
        mask = causal_mask(jnp.ones(prompt.positions.shape, jnp.int32))  # its rows are slots: no window parts them
        x, seen = one(weights, hooks, prompt, among(mask))
        return prompt._replace(x=x), jax.tree.map(lambda y: y[0] if len(y) == 1 else y, seen.kv)

    def full(params, adaptation, tokens, positions, segments, keep: Callable) -> tuple[Array, Any]:
        """Hidden states [B T D], and what `keep(attended, mask)` takes from each layer."""
        stream = start(params, adaptation, tokens, positions)
        prompt = start_prompt(params, adaptation, stream.x)
        causal = causal_mask(segments)

        def body(carry, inputs):
            weights, hooks = inputs
            stream, prompt = carry
            before = None
            if prompt is not None:
                prompt, before = prompt_layer(weights, hooks, prompt)
            mask = nearby(causal, positions, positions, weights.get("window"))
            x, attended = one(weights, hooks, stream, among(mask, before))
            return (stream._replace(x=x), prompt), keep(attended, mask)

        (stream, _), kept = over_layers(body, (stream, prompt), params, adaptation.decoder)
        return layer.norm(params, stream.x), kept

    def hidden(params: Params, adaptation: Adaptation, batch: Batch) -> Array:
        return full(params, adaptation, batch.tokens, batch.positions, batch.segments, lambda *_: None)[0]

    def prefill(params: Params, adaptation: Adaptation, tokens: Array, lengths: Array, new: int) -> tuple[Array, Cache]:
        rows, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        x, (kv, before) = full(params, adaptation, tokens, positions, segments, lambda seen, _: (seen.kv, seen.before))
        k, v = caching.unwritten(params["layers"], rows, new, sites.kv["self"], kv.k.dtype)
        read = stacks.in_parts(caching.transposed(kv), params["layers"])
        cache = Cache(
            k=k,
            v=v,
            ancestors=jnp.zeros((rows, 1, new), jnp.int32),
            slot=jnp.int32(0),
            written=jnp.zeros(rows, jnp.int32),
            position=lengths,
            read=read,
            prompt=before,
        )
        return nn.next_words(layer.unembed, params, x[jnp.arange(rows), lengths - 1]), cache

    def decode(params: Params, adaptation: Adaptation, cache: Cache, tokens: Array) -> tuple[Array, Cache]:
        position = jnp.broadcast_to((cache.position + cache.written)[:, None], tokens.shape)
        stream = start(params, adaptation, tokens, position)
        prompt, own = jnp.arange(cache.read[0].k.shape[-2])[None], caching.numbers(cache)
        real = (prompt < cache.position[:, None])[:, None]  # [B 1 S]
        so_far = caching.continued(cache)

        def body(x, inputs, cached, number):
            weights, hooks, read, before = inputs
            window = weights.get("window")
            read = caching.transposed(read).replace(mask=nearby(real, position, prompt, window))
            mask = nearby(so_far, position, cache.position[:, None] + own, window)

            def attention(hooks, q, k, v):
                now, text = caching.write(cached, k, v, number, cache.slot)
                attended = attend_hooked(q, text.k, text.v, mask, hooks, "self", before=[before, read], how=how)
                return attended, now

            return one(weights, hooks, stream._replace(x=x), attention)

        x, (k, v) = step_over_layers(body, stream.x, params, adaptation.decoder, cache)
        x = layer.norm(params, x)
        logits = nn.next_words(layer.unembed, params, x.reshape(-1, x.shape[-1]))
        return logits.reshape(*tokens.shape, -1), caching.stepped(cache, k, v)

    def keys_values(params: Params, tokens: Array) -> dict[str, dict[str, KV]]:
        """What each layer computes for tokens [P], by stack and site, as [L P K H]."""
        row, positions = tokens[None], jnp.arange(len(tokens))[None]
        kv = full(params, Adaptation(), row, positions, jnp.ones_like(row), lambda seen, _: seen.kv)[1]
        return {"decoder": {"self": KV(kv.k[:, 0], kv.v[:, 0])}}

    def probe(params: Params, adaptation: Adaptation, batch: Batch) -> dict[str, dict[str, dict[str, Array]]]:
        """What attention does, by stack and site, with the slots before the first token, over a batch's real tokens.

        "mass" [L K G P] is the attention that each slot receives, "key_norm" and "value_norm" [L K P] are its norms,
        "token_key_norm" and "token_value_norm" [L K] the mean ones of real tokens.
        """
        real = (batch.segments > 0).astype(jnp.float32)

        def keep(seen: Attended, mask: Array) -> dict[str, Array]:
            return slot_statistics(seen.q, seen.kv, seen.prefixes, mask, real, how)

        found = full(params, adaptation, batch.tokens, batch.positions, batch.segments, keep)[1]
        return {"decoder": {"self": found}}

    return Model(
        config=config,
        sites=all_sites,
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

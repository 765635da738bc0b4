"""What every encoder-decoder shares: a stack that reads the source, and one that writes with cross attention to it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning import caching, nn, stacks
from prefix_tuning.attention import PLAIN, Attention, attend_hooked, causal_mask, slot_statistics, slots_at, source_mask
from prefix_tuning.errors import UserError
from prefix_tuning.models import encoder
from prefix_tuning.positions import placed
from prefix_tuning.types import KV, Adaptation, Batch, Cache, Compute, LayerHooks, Model, Params, Projection, Sites


class Writer(NamedTuple):
    """A family's own arithmetic in the decoder; `layer` is a layer's weights, `hooks` what to do differently in it."""

    place: Callable[[Params, Array, Array], Array]  # (params, embeddings [B T D], positions [B T]) -> [B T D]
    # (layer, hooks, x [B T D]) -> q [B T K G H], k, v [B T K H] of self attention
    queries: Callable[..., tuple[Array, Array, Array]]
    combine: Callable[..., Array]  # (layer, hooks, x, attended [B T K G H]) -> [B T D] behind self attention
    cross_queries: Callable[..., Array]  # (layer, hooks, x [B T D]) -> q [B T K G H]
    # (layer, hooks, what was read [B S D]) -> k, v [B S K H]
    cross_keys: Callable[..., tuple[Array, Array]]
    cross_combine: Callable[..., Array]  # (layer, hooks, x, attended [B T K G H]) -> [B T D] behind cross attention
    mlp: Callable[..., Array]  # (layer, hooks, x [B T D]) -> [B T D] behind the whole layer
    norm: Callable[[Params, Array], Array]  # (params, x [B T D]) -> [B T D]
    unembed: Callable[[Params, Array], Array]  # (params, hidden [... D]) -> float32 logits [... V]


class Source(NamedTuple):
    """What cross attention reads in one layer."""

    kv: KV  # [B S K H]
    mask: Array  # bool [B T S]


# (params, stack, queries [T], keys [S]) -> [K G T S], what places in a row add to the scores of self attention
Bias = Callable[[Params, str, Array, Array], Array | None]


def build(
    reading: encoder.Layer,
    writing: Writer,
    *,
    config: dict[str, Any],
    sites: dict[str, Sites],
    specs: Params,
    vocabulary: int,
    max_positions: int | None,
    compute: Compute,
    how: Attention = PLAIN,
    bias: Bias = lambda *_: None,
) -> Model:
    """Makes a `Model` of an encoder and a decoder.

    Prompts and virtual tokens stand before and among what the encoder reads, and the decoder sees what became of them.
    Raises `UserError` for a config.json without a token that the decoder starts with.
    """
    if config.get("decoder_start_token_id") is None:
        raise UserError(f"config.json of a {config['model_type']} model lacks decoder_start_token_id")
    start, how = config["decoder_start_token_id"], how._replace(kernel=compute.attention)
    reader = encoder.Reader(reading, sites, vocabulary, "encoder_layers", how, compute)

    over_layers = functools.partial(stacks.over_layers, compute=compute)

    def read(
        params: Params, adaptation: Adaptation, tokens: Array, positions: Array, segments: Array, keep: Callable
    ) -> tuple[Array, Array, Any]:
        """What the encoder makes of a source [B S]: states [B P+S D], their segments, what is kept of each layer."""
        text = reader.start(params, adaptation, tokens, positions, segments, None)
        places = jnp.arange(text.x.shape[1])
        states, kept = reader.read(params, adaptation.encoder, text, keep, bias(params, "encoder", places, places))
        return states, text.segments, kept

    def placed_at(params: Params, kv: KV, queries: Array) -> KV:
        """Slots with what relative positions add to their scores, if they have positions: the first ones.

        Queries are [T] or [B T].
        """
        if not kv.placed:
            return kv
        slots = jnp.arange(kv.k.shape[-3])
        added = lambda queries: bias(params, "decoder", queries, slots)  # noqa: E731
        return kv.replace(bias=added(queries) if queries.ndim == 1 else jax.vmap(added)(queries))

    def offered(weights: Params, hooks: LayerHooks, states: Array) -> KV:
        """The keys and values of one layer's cross attention; gates of their changes are of what they are made of."""
        return KV(*writing.cross_keys(weights, nn.open_gates(hooks, states), states))

    def one(
        weights: Params,
        hooks: LayerHooks,
        x: Array,
        mask: Array,
        source: Source,
        store: Callable,
        added: Array | None,
        place: Callable[[KV], KV],
    ) -> tuple[Array, dict[str, tuple]]:
        """One layer: x after it, and by site the queries, keys and values, hooks and mask of its attention."""
        hooks = nn.open_gates(hooks, x)
        if "self" in (hooks.kv or {}):
            hooks = hooks.replace(kv=hooks.kv | {"self": place(hooks.kv["self"])})
        q, k, v = writing.queries(weights, hooks, x)
        kept, own = store(k, v)
        causal = own is kept  # and not a cache, whose slots are in no order
        attended = attend_hooked(q, own.k, own.v, mask, hooks, "self", how=how, bias=added, causal=causal)
        x = writing.combine(weights, hooks, x, attended)
        asked = writing.cross_queries(weights, hooks, x)
        found = attend_hooked(asked, source.kv.k, source.kv.v, source.mask, hooks, "cross", how=how)
        x = writing.cross_combine(weights, hooks, x, found)
        seen = {"self": (q, kept, hooks, mask), "cross": (asked, source.kv, hooks, source.mask)}
        return writing.mlp(weights, hooks, x), seen

    def full(params: Params, adaptation: Adaptation, batch: Batch, keep: Callable, keep_read: Callable) -> tuple:
        """Hidden states [B T D] of the decoder, and what is kept of each of its layers and of the encoder's."""
        if batch.source is None:
            raise UserError(f"a {config['model_type']} model writes what follows a source; this batch has none")
        source = (batch.source, batch.source_positions, batch.source_segments)
        states, segments, kept_read = read(params, adaptation, *source, keep_read)
        visible = source_mask(batch.segments, segments)
        causal = causal_mask(batch.segments)
        places, moved = jnp.arange(batch.tokens.shape[1]), placed(adaptation)
        added = bias(params, "decoder", places, places)
        place = functools.partial(placed_at, params, queries=moved + places)

        def body(x, inputs):
            weights, hooks = inputs
            heard = Source(offered(weights, hooks, states), visible)
            x, seen = one(weights, hooks, x, causal, heard, as_they_are, added, place)
            return x, keep(seen)

        x = writing.place(params, reading.embed(params, batch.tokens), batch.positions + moved)
        x, kept = over_layers(body, x, params["layers"], adaptation.decoder)
        return writing.norm(params, x), kept, kept_read

    def hidden(params: Params, adaptation: Adaptation, batch: Batch) -> Array:
        return full(params, adaptation, batch, lambda _: None, lambda *_: None)[0]

    def prefill(params: Params, adaptation: Adaptation, tokens: Array, lengths: Array, new: int) -> tuple[Array, Cache]:
        rows, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        states, segments, _ = read(params, adaptation, tokens, positions, segments, lambda *_: None)
        offer = lambda _, inputs: (None, caching.transposed(offered(*inputs, states)))  # noqa: E731
        _, cross = over_layers(offer, None, params["layers"], adaptation.decoder)
        cross = stacks.in_parts(cross, params["layers"])
        k, v = caching.unwritten(params["layers"], rows, new, sites["decoder"].kv["self"], states.dtype)
        none = jnp.zeros(rows, jnp.int32)
        cache = Cache(
            k=k,
            v=v,
            ancestors=jnp.zeros((rows, 1, new), jnp.int32),
            slot=jnp.int32(0),
            written=none,
            position=none,
            read=cross,
            source=segments > 0,
        )
        logits, cache = decode(params, adaptation, cache, jnp.full((rows, 1), start, jnp.int32))
        return logits[:, 0], cache

    def decode(params: Params, adaptation: Adaptation, cache: Cache, tokens: Array) -> tuple[Array, Cache]:
        mask, written = caching.continued(cache), cache.written[:, None]
        visible = jnp.broadcast_to(cache.source[:, None], (*tokens.shape, cache.source.shape[1]))
        # How long ago a token was written is the same in all rows, and all that a relative position says.
        added, moved = bias(params, "decoder", jnp.zeros(1, jnp.int32), -caching.ages(cache)), placed(adaptation)
        place = functools.partial(placed_at, params, queries=moved + written)

        def body(x, inputs, cached, number):
            weights, (hooks, cross) = inputs
            heard = Source(caching.transposed(cross), visible)
            store = functools.partial(caching.write, cached, layer=number, slot=cache.slot)
            x, seen = one(weights, hooks, x, mask, heard, store, added, place)
            return x, seen["self"][1]

        position = jnp.broadcast_to(moved + cache.position[:, None] + written, tokens.shape)
        x = writing.place(params, reading.embed(params, tokens), position)
        inputs = stacks.in_parts(adaptation.decoder, params["layers"])
        inputs = tuple(zip(inputs, cache.read, strict=True))
        x, (k, v) = stacks.step_over_layers(body, x, params["layers"], inputs, (cache.k, cache.v))
        x = writing.norm(params, x)
        logits = nn.next_words(writing.unembed, params, x.reshape(-1, x.shape[-1]))
        return logits.reshape(*tokens.shape, -1), caching.stepped(cache, k, v)

    def keys_values(params: Params, tokens: Array) -> dict[str, dict[str, KV]]:
        """What each layer computes for tokens [P] that are read and written, by stack and site, as [L P K H]."""
        row = jnp.asarray(tokens)[None]
        positions, ones = jnp.arange(row.shape[1])[None], jnp.ones_like(row)
        none = jnp.zeros((1, 0), jnp.int32)
        batch = Batch(
            tokens=row,
            positions=positions,
            segments=ones,
            target_index=none,
            targets=none,
            mask=none.astype(jnp.float32),
            examples=ones[:, 0],
            source=row,
            source_positions=positions,
            source_segments=ones,
        )
        keep = lambda seen: {site: kv for site, (_, kv, *_) in seen.items()}  # noqa: E731
        _, kept, kept_read = full(params, Adaptation(), batch, keep, lambda q, kv, *_: kv)
        found = {"encoder": {"self": kept_read}, "decoder": kept}
        return jax.tree.map(lambda x: x[:, 0], found)

    def probe(params: Params, adaptation: Adaptation, batch: Batch) -> dict[str, dict[str, dict[str, Array]]]:
        """What attention does with the slots, as in models/decoder.py; the rows of a prompt are tokens, not slots."""
        real = (batch.segments > 0).astype(jnp.float32)
        length = 0 if adaptation.prompt is None else adaptation.prompt.shape[-2]
        read = jnp.pad((batch.source_segments > 0).astype(jnp.float32), [(0, 0), (length, 0)])

        def added(stack: str, queries: Array) -> Array | None:
            places = jnp.arange(queries.shape[1])
            return bias(params, stack, places, places)

        def keep_read(q: Array, kv: KV, hooks: LayerHooks, mask: Array) -> dict[str, Array]:
            return slot_statistics(q, kv, slots_at(hooks, "self"), mask, read, how, added("encoder", q))

        def keep(seen: dict[str, tuple]) -> dict[str, dict[str, Array]]:
            found = {}
            for site, (q, kv, hooks, mask) in seen.items():
                more = (added("decoder", q), None) if site == "self" else (None, read)
                found[site] = slot_statistics(q, kv, slots_at(hooks, site), mask, real, how, *more)
            return found

        _, kept, kept_read = full(params, adaptation, batch, keep, keep_read)
        return {"encoder": {"self": kept_read}, "decoder": kept}

    return Model(
        config=config,
        sites=sites,
        specs=specs,
        vocabulary=vocabulary,
        max_positions=max_positions,
        embed=reading.embed,
        hidden=hidden,
        unembed=writing.unembed,
        prefill=prefill,
        decode=decode,
        probe=probe,
        keys_values=keys_values,
        start=start,
    )


def stack_sites(
    stack: str, *, layers: int, width: int, heads: tuple[int, int], mlp: int, into: tuple[str, ...] = ("up",)
) -> Sites:
    """What a stack offers whose attention has heads (K, H) and whose MLP is reached by the projections `into`."""
    kinds = ("self", "cross") if stack == "decoder" else ("self",)
    shapes = dict.fromkeys("qkv", ((width,), heads)) | {"o": (heads, (width,))}
    if stack == "decoder":
        shapes |= {f"cross_{name}": shape for name, shape in shapes.items()}
    shapes |= dict.fromkeys(into, ((width,), (mlp,))) | {"down": ((mlp,), (width,))}
    projections = {name: Projection(*shape, weight=name) for name, shape in shapes.items()}
    return Sites(layers, width, dict.fromkeys(kinds, heads), dict.fromkeys(kinds, 1), projections)


def cross_queries(layer: Params, hooks: LayerHooks, x: Array) -> Array:
    """The queries [B T K 1 H] of cross attention from x [B T D]."""
    return nn.project(x, layer["cross_q"], hooks, "cross_q")[:, :, :, None]


def cross_keys(layer: Params, hooks: LayerHooks, states: Array) -> tuple[Array, Array]:
    """The keys and values [B S K H] of cross attention from states [B S D]."""
    return tuple(nn.project(states, layer[name], hooks, name) for name in ("cross_k", "cross_v"))


def as_they_are(k: Array, v: Array) -> tuple[KV, KV]:
    """Keys and values that nobody stores."""
    kv = KV(k, v)
    return kv, kv

"""What every encoder-only family shares: the scan over bidirectional layers around a family's own layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning import nn
from prefix_tuning.errors import UserError
from prefix_tuning.types import KV, Adaptation, Batch, Model, Params, Sites


class Layer(NamedTuple):
    """A family's own arithmetic; `layer` is one layer's weights, `hooks` what to do differently in it."""

    embed: Callable[[Params, Array], Array]  # (params, tokens [...]) -> [... D]
    # (params, embeddings [B T D], positions [B T], types [B T]) -> [B T D]
    place: Callable[[Params, Array, Array, Array], Array]
    # (layer, hooks, x [B T D]) -> q [B T K G H], k, v [B T K H]
    queries: Callable[..., tuple[Array, Array, Array]]
    combine: Callable[..., Array]  # (layer, hooks, x, attended [B T K G H]) -> [B T D]
    pool: Callable[[Params, Array], Array]  # (params, hidden [... D] of the first token) -> [... D]
    unembed: Callable[[Params, Array], Array]  # (params, hidden [... D]) -> float32 logits [... V]


class Text(NamedTuple):
    """What the layers read: a prompt's rows, if any, then the tokens."""

    x: Array  # [B P+T D]
    mask: Array  # bool [B P+T P+T]
    index: Array | None  # [B P+T] which virtual token stands here, -1 for none
    rows: int  # P


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
    """Makes a `Model` of one stack of layers that see both ways within a segment; scan=False unrolls them.

    It reads and does not write: `prefill` and `decode` raise `UserError`.
    """
    all_sites = {"encoder": sites}

    def start(params: Params, adaptation: Adaptation, batch: Batch) -> Text:
        """Tokens [B T] behind the prompt's rows, which see the first segment and are seen by it."""
        nn.check(adaptation, all_sites, rows=len(batch.tokens))
        x, index = nn.embedded(layer.embed, params, adaptation, batch.tokens, vocabulary)
        positions, segments = nn.shifted(batch.positions, adaptation), batch.segments
        types = jnp.zeros_like(batch.tokens) if batch.types is None else batch.types
        if adaptation.prompt is None:
            return Text(layer.place(params, x, positions, types), nn.segment_mask(segments), index, 0)
        length, width = adaptation.prompt.shape[-2:]
        before = nn.prompt_positions(adaptation)
        shape = (len(x), length)
        wide = lambda front, back: jnp.concatenate([jnp.broadcast_to(front, shape), back], axis=1)  # noqa: E731
        prompt = jnp.broadcast_to(adaptation.prompt.astype(x.dtype), (*shape, width))
        x = layer.place(
            params, jnp.concatenate([prompt, x], axis=1), wide(before, positions), wide(jnp.int32(0), types)
        )
        index = None if index is None else wide(jnp.int32(-1), index)
        return Text(x, nn.segment_mask(wide(jnp.int32(1), segments)), index, length)

    def full(params: Params, adaptation: Adaptation, batch: Batch, keep: Callable) -> tuple[Array, Any]:
        """Hidden states [B T D] of the tokens, and what `keep(q, kv, prefixes, mask)` takes from each layer."""
        text = start(params, adaptation, batch)

        def body(x, inputs):
            weights, hooks = inputs
            if hooks.prompt is not None:
                x = x.at[:, : text.rows].add(hooks.prompt.astype(x.dtype))
            hooks = nn.open_gates(hooks, x)
            prefixes = [hooks.kv["self"]] if hooks.kv else []
            q, k, v = layer.queries(weights, hooks, x)
            k, v = nn.add_rows(k, v, (hooks.rows or {}).get("self"), text.index)
            attended = nn.recall(nn.attend(q, k, v, text.mask, prefixes), q, hooks, "self")
            return layer.combine(weights, hooks, x, attended), keep(q, KV(k, v), prefixes, text.mask)

        inputs = (params["layers"], adaptation.encoder)
        x, kept = jax.lax.scan(body, text.x, inputs, unroll=1 if scan else sites.layers)
        return x[:, text.rows :], kept

    def hidden(params: Params, adaptation: Adaptation, batch: Batch) -> Array:
        return full(params, adaptation, batch, lambda *_: None)[0]

    def keys_values(params: Params, tokens: Array) -> dict[str, dict[str, KV]]:
        """What each layer computes for tokens [P], by stack and site, as [L P K H]."""
        row = jnp.asarray(tokens)[None]
        ones = jnp.ones_like(row)
        batch = Batch(row, jnp.arange(row.shape[1])[None], ones, ones, ones, ones.astype(jnp.float32), ones[:, 0])
        kv = full(params, Adaptation(), batch, lambda q, kv, *_: kv)[1]
        return {"encoder": {"self": KV(kv.k[:, 0], kv.v[:, 0])}}

    def probe(params: Params, adaptation: Adaptation, batch: Batch) -> dict[str, Array]:
        """What attention does with the slots, as in models/decoder.py; rows of a prompt are tokens here, not slots."""
        real = (batch.segments > 0).astype(jnp.float32)

        def keep(q: Array, kv: KV, prefixes: list[KV], mask: Array) -> dict[str, Array]:
            before = mask.shape[1] - real.shape[1]
            return nn.slot_statistics(q, kv, prefixes, mask, jnp.pad(real, [(0, 0), (before, 0)]))

        return full(params, adaptation, batch, keep)[1]

    def no_text(*_: Any) -> Any:
        raise UserError(f"a {config['model_type']} model reads text and does not write it; expected a decoder")

    return Model(
        config=config,
        sites=all_sites,
        specs=specs,
        vocabulary=vocabulary,
        max_positions=max_positions,
        embed=layer.embed,
        hidden=hidden,
        unembed=layer.unembed,
        prefill=no_text,
        decode=no_text,
        probe=probe,
        pool=layer.pool,
        keys_values=keys_values,
    )

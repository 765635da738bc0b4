"""What every family that reads both ways shares: the scan over bidirectional layers around a family's own layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from prefix_tuning import fit, nn, stacks
from prefix_tuning.attention import PLAIN, Attention, attend_hooked, segment_mask, slot_statistics, slots_at
from prefix_tuning.errors import UserError
from prefix_tuning.types import KV, Adaptation, Batch, Compute, LayerHooks, Model, Params, Sites


class Layer(NamedTuple):
    """A family's own arithmetic; `layer` is one layer's weights, `hooks` what to do differently in it."""

    embed: Callable[[Params, Array], Array]  # (params, tokens [...]) -> [... D]
    # (params, embeddings [B T D], positions [B T], types [B T]) -> [B T D]
    place: Callable[[Params, Array, Array, Array], Array]
    # (layer, hooks, x [B T D]) -> q [B T K G H], k, v [B T K H]
    queries: Callable[..., tuple[Array, Array, Array]]
    combine: Callable[..., Array]  # (layer, hooks, x, attended [B T K G H]) -> [B T D]
    norm: Callable[[Params, Array], Array] = lambda params, x: x  # (params, x [B T D]) -> [B T D], behind all layers


class Text(NamedTuple):
    """What the layers read: a prompt's rows, if any, then the tokens."""

    x: Array  # [B P+T D]
    segments: Array  # [B P+T]; a prompt's rows are of the first segment
    index: Array | None  # [B P+T] which virtual token stands here, -1 for none
    rows: int  # P


class Reader(NamedTuple):
    """One stack of layers that see both ways within a segment."""

    layer: Layer
    sites: dict[str, Sites]  # of the whole model
    vocabulary: int  # V
    layers: str  # the name of its layers among the weights
    how: Attention
    compute: Compute

    def start(
        self,
        params: Params,
        adaptation: Adaptation,
        tokens: Array,
        positions: Array,
        segments: Array,
        types: Array | None,
    ) -> Text:
        """Tokens [B T] behind the prompt's rows, which see the first segment and are seen by it."""
        fit.check(adaptation, self.sites, rows=len(tokens))
        x, index = nn.embedded(self.layer.embed, params, adaptation, tokens, self.vocabulary)
        positions = nn.shifted(positions, adaptation)
        types = jnp.zeros_like(tokens) if types is None else types
        if adaptation.prompt is None:
            return Text(self.layer.place(params, x, positions, types), segments, index, 0)
        length, width = adaptation.prompt.shape[-2:]
        before = nn.prompt_positions(adaptation)
        shape = (len(x), length)
        wide = lambda front, back: jnp.concatenate([jnp.broadcast_to(front, shape), back], axis=1)  # noqa: E731
        prompt = jnp.broadcast_to(adaptation.prompt.astype(x.dtype), (*shape, width))
        x = jnp.concatenate([prompt, x], axis=1)
        x = self.layer.place(params, x, wide(before, positions), wide(jnp.int32(0), types))
        index = None if index is None else wide(jnp.int32(-1), index)
        return Text(x, wide(jnp.int32(1), segments), index, length)

    def read(
        self, params: Params, hooks: LayerHooks, text: Text, keep: Callable, bias: Array | None = None
    ) -> tuple[Array, Any]:
        """Hidden states [B P+T D] of a text, and what `keep(q, kv, hooks, mask)` takes from each layer.

        `bias` [K G P+T P+T] is added to the scores between tokens.
        """
        mask = segment_mask(text.segments)

        def body(x, inputs):
            weights, own = inputs
            if own.prompt is not None:
                x = x.at[:, : text.rows].add(own.prompt.astype(x.dtype))
            own = nn.open_gates(own, x)
            q, k, v = self.layer.queries(weights, own, x)
            k, v = nn.add_rows(k, v, (own.rows or {}).get("self"), text.index)
            attended = attend_hooked(q, k, v, mask, own, "self", how=self.how, bias=bias)
            return self.layer.combine(weights, own, x, attended), keep(q, KV(k, v), own, mask)

        x, kept = stacks.over_layers(body, text.x, params[self.layers], hooks, self.compute)
        return self.layer.norm(params, x), kept


def build(
    layer: Layer,
    *,
    pool: Callable[[Params, Array], Array],
    unembed: Callable[[Params, Array], Array],
    config: dict[str, Any],
    sites: Sites,
    specs: Params,
    vocabulary: int,
    max_positions: int | None,
    compute: Compute,
) -> Model:
    """Makes a `Model` of one stack of layers that see both ways within a segment.

    `pool` and `unembed` are those of `Model`.  It reads and does not write: `prefill` and `decode` raise `UserError`.
    """
    how = PLAIN._replace(kernel=compute.attention)
    reader = Reader(layer, {"encoder": sites}, vocabulary, "layers", how, compute)

    def full(params: Params, adaptation: Adaptation, batch: Batch, keep: Callable) -> tuple[Array, Any]:
        """Hidden states [B T D] of the tokens, and what is kept of each layer."""
        text = reader.start(params, adaptation, batch.tokens, batch.positions, batch.segments, batch.types)
        x, kept = reader.read(params, adaptation.encoder, text, keep)
        return x[:, text.rows :], kept

    def hidden(params: Params, adaptation: Adaptation, batch: Batch) -> Array:
        return full(params, adaptation, batch, lambda *_: None)[0]

    def keys_values(params: Params, tokens: Array) -> dict[str, dict[str, KV]]:
        """What each layer computes for tokens [P], by stack and site, as [L P K H]."""
        row = jnp.asarray(tokens)[None]
        text = reader.start(
            params, Adaptation(), row, jnp.arange(row.shape[1])[None], jnp.ones_like(row), jnp.zeros_like(row)
        )
        kv = reader.read(params, LayerHooks(), text, lambda q, kv, *_: kv)[1]
        return {"encoder": {"self": KV(kv.k[:, 0], kv.v[:, 0])}}

    def probe(params: Params, adaptation: Adaptation, batch: Batch) -> dict[str, dict[str, dict[str, Array]]]:
        """What attention does with the slots, as in models/decoder.py; rows of a prompt are tokens here, not slots."""
        real = (batch.segments > 0).astype(jnp.float32)

        def keep(q: Array, kv: KV, hooks: LayerHooks, mask: Array) -> dict[str, Array]:
            before = mask.shape[1] - real.shape[1]
            return slot_statistics(q, kv, slots_at(hooks, "self"), mask, jnp.pad(real, [(0, 0), (before, 0)]))

        return {"encoder": {"self": full(params, adaptation, batch, keep)[1]}}

    def no_text(*_: Any) -> Any:
        raise UserError(f"a {config['model_type']} model reads text and does not write it; expected a decoder")

    return Model(
        config=config,
        sites=reader.sites,
        specs=specs,
        vocabulary=vocabulary,
        max_positions=max_positions,
        embed=layer.embed,
        hidden=hidden,
        unembed=unembed,
        prefill=no_text,
        decode=no_text,
        probe=probe,
        pool=pool,
        keys_values=keys_values,
    )

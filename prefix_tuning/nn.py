"""The functions every family is made of; the only place that knows what an `Adaptation` does inside a layer."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.types import (
    KV,
    Adaptation,
    Below,
    Cache,
    LayerHooks,
    Layers,
    Model,
    Params,
    Quantised,
    Sites,
    depth,
    parts,
)

ACTIVATIONS = {
    # Computed again for its derivative: cheaper than keeping what autodiff wants, three arrays as wide as the MLP.
    "gelu": jax.checkpoint(lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

QUERIES = 128  # of a row that attention takes at once where there is much to score
PARTS = 16  # that a row's queries are taken in at most, since each is compiled
SCORES = 8 * QUERIES**2  # of a row and head that are kept for the backward pass
DATA = "data"  # the axis of a mesh that rows are spread over
Written = tuple[tuple[Array, ...], tuple[Array, ...]]  # keys and values, as `unwritten` makes them
FEATURES = {"elu": jax.nn.elu, "gelu": ACTIVATIONS["gelu"]}  # of queries, for `Memory`


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalises the last axis of x [... D] in float32 and returns it in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return (y * scale + bias).astype(x.dtype)


# Computed again for its derivative: it keeps its input, and no array between.  For `layer_norm` that would round slopes
# through saturated attention otherwise with another number of rows (tests/test_adaptation.py).
@jax.checkpoint
def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Divides the last axis of x [... D] by its root mean square, in float32, and returns it in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return scale * y.astype(x.dtype)


def gate(activation: Callable[[Array], Array], gates: Array, x: Array) -> Array:
    """activation(gates) x, of which only the two factors are kept for the derivative."""
    return jax.checkpoint(lambda gates, x: activation(gates) * x)(gates, x)


def project(x: Array, weights: Params, hooks: LayerHooks, site: str, axes: int = 1) -> Array:
    """Contracts the last `axes` axes of x [B T in...] with the first of the kernel's, [in... out...], as hooked."""
    kernel = weights["kernel"]
    if isinstance(kernel, Quantised):
        y = (jnp.tensordot(x, floats(kernel.values, x), axes) * kernel.scale).astype(x.dtype)
    else:
        y = jnp.tensordot(x, kernel, axes)
    if "bias" in weights:
        y = y + weights["bias"]
    return change(y, x, hooks, site, axes)


def floats(values: Array, x: Array) -> Array:
    """8-bit values of a weight in x's dtype, which XLA cannot make before it has x [...].

    Out of a loop over steps it would take the conversion, and hold every layer as floats; barriers are gone by then.
    """
    # Of x over several devices not one number, which would have to be sent to all, but a sum that each has a part in.
    some = x.sum() if DATA in jax.sharding.get_abstract_mesh().auto_axes else x.ravel()[0]
    never = (some != some) & (some < jnp.inf)  # not a number, and yet below one; XLA does not know
    return (values + never.astype(values.dtype)).astype(x.dtype)


def lookup(table: Array | Quantised, tokens: Array) -> Array:
    """The rows [... D] of a table [V D] of embeddings."""
    if isinstance(table, Quantised):
        return (table.values[tokens] * table.scale[tokens][..., None]).astype(table.dtype)
    return table[tokens]


def vocabulary_scores(hidden: Array, table: Array | Quantised) -> Array:
    """The float32 products [... V] of hidden states [... D] with each row of a table [V D]."""
    if isinstance(table, Quantised):
        return vocabulary_scores(hidden, floats(table.values, hidden)) * table.scale
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def change(y: Array, x: Array, hooks: LayerHooks, site: str, axes: int = 1) -> Array:
    """A projection's output y [B T out...] with what hooks at site make of its input x [B T in...]."""
    delta, bias = (hooks.delta or {}).get(site), (hooks.bias or {}).get(site)
    if delta is not None:
        if delta.keys is not None:
            keep = jax.random.bernoulli(delta.keys, 1 - delta.dropout, x.shape)
            x = jnp.where(keep, x / (1 - delta.dropout), 0).astype(x.dtype)
        low = jnp.tensordot(x, delta.a.astype(x.dtype), axes)
        y = y + gated(delta.scale * jnp.tensordot(low, delta.b.astype(x.dtype), 1), hooks, "delta")
    return y if bias is None else y + bias.astype(y.dtype)


def adapt(y: Array, read: Array, hooks: LayerHooks, site: str) -> Array:
    """A sublayer's output y [B T D] with its bottleneck adapter; a parallel one reads what the sublayer reads."""
    adapter = (hooks.adapter or {}).get(site)
    if adapter is None:
        return y
    x = read if adapter.parallel else y
    if adapter.norm is not None:
        x = layer_norm(x, **adapter.norm, epsilon=1e-5)
    low = x @ adapter.down.astype(x.dtype) + adapter.down_bias.astype(x.dtype)
    up = ACTIVATIONS[adapter.activation](low) @ adapter.up.astype(x.dtype) + adapter.up_bias.astype(x.dtype)
    return y + gated(adapter.scale * up, hooks, "adapter")


def open_gates(hooks: LayerHooks, x: Array) -> LayerHooks:
    """The hooks of one layer with the value [B T] of each gate, from that layer's input x [B T D]."""
    if hooks.gate is None:
        return hooks
    values = {kind: jax.nn.sigmoid(x.astype(jnp.float32) @ gate.w + gate.b) for kind, gate in hooks.gate.items()}
    kv = hooks.kv
    if "kv" in values:
        kv = {site: own.replace(share=values["kv"]) for site, own in kv.items()}
    return hooks.replace(gate=values, kv=kv)


def gated(change: Array, hooks: LayerHooks, kind: str) -> Array:
    """change [B T ...], times the gate of this kind if there is one."""
    value = (hooks.gate or {}).get(kind)
    if value is None:
        return change
    return change * value.reshape(*value.shape, *[1] * (change.ndim - 2)).astype(change.dtype)


def rotary_frequencies(config: dict[str, Any], head_size: int) -> Array:
    """Radians per position [H/2] by RoPE (Su et al. 2021, eq. 15) under the scaling that config.json asks for.

    Raises `UserError` for a scaling other than default, linear and llama3.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = valid("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default", "linear", "llama3"))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    frequencies = theta ** -(jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "llama3":
        # Wavelengths beyond the original context are stretched by the factor, short ones kept, those between blended.
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequencies * (kept + (1 - kept) / rope["factor"])
    return frequencies


def rotate(x: Array, positions: Array, frequencies: Array) -> Array:
    """Turns each pair (i, i + H/2) of x [B T ... H] by positions [B T] x frequencies [H/2] radians, in float32.

    Of fewer frequencies, R/2, only the first R numbers are turned, in pairs (i, i + R/2).
    """
    size = 2 * frequencies.shape[-1]
    if size < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :size], positions, frequencies), x[..., size:]], axis=-1)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B T H/2]
    angles = jnp.expand_dims(angles, range(2, x.ndim - 1))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def segment_mask(segments: Array) -> Array:
    """Who may see whom, bool [B T T], from segments [B T]: everything within the segment."""
    return segments[:, :, None] == segments[:, None, :]


def source_mask(segments: Array, source: Array) -> Array:
    """Who may see whom, bool [B T S], from segments [B T] and those of a source [B S]: everything of the same number.

    Padding sees all: its softmax would be over nothing where the source has no padding.
    """
    return (segments[:, :, None] == source[:, None, :]) | (segments == 0)[:, :, None]


def causal_mask(segments: Array) -> Array:
    """Who may see whom, bool [B T T], from segments [B T]: earlier tokens and itself, within the segment."""
    t = jnp.arange(segments.shape[1])
    return segment_mask(segments) & (t[:, None] >= t[None, :])


def embedded(
    embed: Callable[[Params, Array], Array], params: Params, adaptation: Adaptation, tokens: Array, vocabulary: int
) -> tuple[Array, Array | None]:
    """Embeddings [B T D] of tokens [B T], and which virtual token stands where [B T] (-1 none; None without any).

    Ids from `vocabulary` on are rows of the adaptation.
    """
    if adaptation.rows is None:
        return spread(embed(params, tokens)), None
    index = jnp.maximum(tokens - vocabulary, -1)
    x = spread(embed(params, jnp.minimum(tokens, vocabulary - 1)))
    rows = adaptation.rows[jnp.maximum(index, 0)].astype(x.dtype)
    return jnp.where((index >= 0)[..., None], rows, x), index


def spread(x: Array) -> Array:
    """x [B ...] with its rows over the mesh's data axis, where XLA partitions a computation; elsewhere as it is.

    Without a word XLA may split activations as weights are, over their width, and then hold all rows on each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if DATA not in mesh.auto_axes or len(x) % mesh.shape[DATA]:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(DATA))


def row_groups(rows: int) -> int:
    """Over how many devices `spread` spreads the rows of a batch; 1 where it leaves them as they are."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if DATA not in mesh.auto_axes or rows % mesh.shape[DATA] else mesh.shape[DATA]


def prompt_positions(adaptation: Adaptation) -> Array:
    """Positions [1 P] or [B P] of a prompt: it ends where the real tokens begin, behind a prefix if there is one."""
    length = adaptation.prompt.shape[-2]
    end = jnp.int32(length) if adaptation.shift is None else adaptation.shift
    return end.reshape(-1, 1) - length + jnp.arange(length)


def nearby(mask: Array, queries: Array, keys: Array, window: Array | None) -> Array:
    """The mask [B T S] without keys at positions [B S] that lie `window` or more before the queries' [B T].

    It bounds which real tokens are seen.  Slots before them (prefixes, prompts) have no place in the mask: what was
    trained stays visible however long the row, or it would end to work after the first `window` tokens.
    """
    return mask if window is None else mask & (queries[:, :, None] - keys[:, None, :] < window)


def over_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Layers, beside: Any, *, scan: bool, remat: bool
) -> tuple[Any, Any]:
    """Scans `body(carry, (weights, beside)) -> (carry, kept)` over a stack; returns the last carry and kept [L ...].

    `layers` and `beside` lead with L.  A stack in parts is one scan after the other: what is trained in the last part
    alone is not differentiated in those below it.  scan=False unrolls the layers; remat keeps only their inputs for the
    backward pass, which computes the rest again.
    """
    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    stack, first, kept = parts(layers), 0, []
    for part in stack:
        count, (rows, weights_of) = depth(part), scanned(part)
        own = beside if len(stack) == 1 else layers_of(beside, first, count)

        def one(carry, inputs, weights_of=weights_of):
            return body(carry, (weights_of(inputs[0]), inputs[1]))

        carry, found = jax.lax.scan(one, carry, (rows, own), unroll=1 if scan else count)
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


def unwritten(layers: Layers, rows: int, slots: int, heads: tuple[int, int], dtype: jnp.dtype) -> Written:
    """Room for keys and values of heads (K, H), as `step_over_layers` wants it for this stack of weights."""
    depths = list(map(depth, parts(layers)))
    shape = rows, heads[0], slots, heads[1]
    k, v = (tuple(jnp.zeros(shape if L == 1 else (L, *shape), dtype) for L in depths) for _ in "kv")
    return k, v


def write(cached: KV, k: Array, v: Array, layer: Array | None, slot: Array) -> tuple[KV, KV]:
    """The cached keys and values with those of a token of each beam, [B W K H], and then the layer's [B N*W K H].

    For `cached` and `layer` see `step_over_layers`.
    """

    def put(old, new):
        first = (0, 0, slot * new.shape[1], 0)
        new = new.swapaxes(1, 2)
        if layer is None:
            return jax.lax.dynamic_update_slice(old, new, first)
        return jax.lax.dynamic_update_slice(old, new[None], (layer, *first))

    cached = KV(put(cached.k, k), put(cached.v, v))
    return cached, slots_last(cached if layer is None else jax.tree.map(lambda x: x[layer], cached))


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


def stepped(cache: Cache, k: tuple[Array, ...], v: tuple[Array, ...]) -> Cache:
    """The cache after a step that wrote k and v."""
    slots = cache.ancestors.shape[-1]
    written = jnp.minimum(cache.written + 1, slots)  # a row that has ended may wait longer than it wrote
    return cache.replace(k=k, v=v, slot=(cache.slot + 1) % slots, written=written)


def next_words(unembed: Callable[[Params, Array], Array], params: Params, hidden: Array) -> Array:
    """The logits [R V] of hidden states [R D] at a decoding step.

    Of at least 8 rows, the last repeated: XLA's product for 2 to 7 rows is far slower on CPUs.
    """
    rows = len(hidden)
    if not 1 < rows < 8:
        return unembed(params, hidden)
    return unembed(params, hidden[jnp.minimum(jnp.arange(8), rows - 1)])[:rows]


def slots_last(kv: KV) -> KV:
    """Keys and values [... S K H] as a cache keeps them, [... K S H], or the other way round."""
    return jax.tree.map(lambda x: x.swapaxes(-2, -3), kv)


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


class Attention(NamedTuple):
    """How a family turns queries and keys into scores."""

    scale: float | None = None  # what queries are multiplied by; None is H ** -0.5
    softcap: float | None = None  # c: scores become c tanh(score / c) before the mask (Gemma 2)


PLAIN = Attention()


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    prefixes: Sequence[KV] = (),
    *,
    how: Attention = PLAIN,
    bias: Array | None = None,
    causal: bool = False,
) -> Array:
    """Attention of q [B T K G H] over k, v [B S K H] where mask [B T S] allows, and over every slot of the prefixes.

    More scores than `SCORES` are made for a part of the queries at a time, and once more by the backward pass; `causal`
    says that the mask hides keys [B T K H] after a query, so that no part reads beyond its last.
    A shared prefix [P K H] is never repeated over the batch: its scores and the real ones are arrays of their own under
    one softmax (He et al. 2021, eq. 5 is the same identity).  One with a `gate` has its own softmax and is added
    (Zhang et al. 2023, eq. 5-8); a `share` scales keys and values (UniPELT, Mao et al. 2022).  `bias` [K G T S] is
    added to the real scores; slots have no place among the tokens, and so none.  The softmax is
    float32; the result [B T K G H] has q's dtype.  Raises `UserError` for `causal` with unequal numbers of both.
    """
    if causal and k.shape[1] != q.shape[1]:
        raise UserError(f"causal attention of {q.shape[1]} queries over {k.shape[1]} keys; expected as many of both")
    at_once = functools.partial(attend_at_once, how=how)
    keys = k.shape[1] + sum(prefix.k.shape[-3] for prefix in prefixes)
    if q.shape[1] * keys <= SCORES:
        return at_once(q, k, v, mask, prefixes, bias)

    def part(start: int, stop: int, q, k, v, mask, prefixes, bias):  # cuts within, so that nothing cut is kept
        here, seen = slice(start, stop), slice(stop if causal else None)
        bias = None if bias is None else bias[..., here, seen]
        prefixes = [at_queries(prefix, here) for prefix in prefixes]
        return at_once(q[:, here], k[:, seen], v[:, seen], mask[:, here, seen], prefixes, bias)

    inputs = q, k, v, mask, list(prefixes), bias
    out = [jax.checkpoint(functools.partial(part, *ends))(*inputs) for ends in query_parts(q.shape[1])]
    return jnp.concatenate(out, axis=1)


def query_parts(queries: int) -> list[tuple[int, int]]:
    """Where the parts begin and end that so many queries are taken in, as equal as can be."""
    count = min(-(-queries // QUERIES), PARTS)
    ends = [queries * n // count for n in range(count + 1)]
    return list(itertools.pairwise(ends))


def at_queries(prefix: KV, here: slice) -> KV:
    """A prefix as some of the queries have it."""
    mask, share, bias = prefix.mask, prefix.share, prefix.bias
    return prefix.replace(
        mask=mask[:, here] if mask is not None and mask.ndim == 3 else mask,
        share=None if share is None else share[:, here],
        bias=None if bias is None else bias[..., here, :],
    )


def attend_at_once(
    q: Array, k: Array, v: Array, mask: Array, prefixes: Sequence[KV], bias: Array | None, how: Attention
) -> Array:
    """`attend` with the scores of all its queries."""
    q = scaled(q, how)
    beside = [slot_scores(q, prefix, how) for prefix in prefixes if prefix.gate is None]
    weights, total = exponentials([token_scores(q, k, mask, how, bias), *beside])
    late = v.dtype == jnp.float32  # in lower precision the weights are rounded, and so divided before
    weights = weights if late else [weight / total for weight in weights]
    out = token_values(weights[0], v)
    for prefix, weight in zip((p for p in prefixes if p.gate is None), weights[1:], strict=True):
        out = out + slot_values(weight, prefix, v.dtype)
    # Divided here, where it is smaller than the scores, and by an einsum, whose derivative is a product: XLA is slow at
    # sums over short axes on a CPU.
    if late:
        out = jnp.einsum("btkgh,btkg->btkgh", out, jnp.moveaxis(1 / total[..., 0], 3, 1))
    for prefix in prefixes:
        if prefix.gate is not None:
            own = slot_values(own_softmax(q, prefix, how), prefix, v.dtype)
            out = out + prefix.gate[..., None].astype(v.dtype) * own
    return out


def attend_hooked(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    hooks: LayerHooks,
    site: str,
    *,
    before: Sequence[KV | None] = (),
    how: Attention = PLAIN,
    bias: Array | None = None,
    causal: bool = False,
) -> Array:
    """`attend` with what one layer's hooks have at an attention site; `before` are further slots, as a prompt's."""
    attended = attend(q, k, v, mask, slots_at(hooks, site, *before), how=how, bias=bias, causal=causal)
    return recall(attended, q, hooks, site)


def slots_at(hooks: LayerHooks, site: str, *before: KV | None) -> list[KV]:
    """All slots at an attention site before the tokens: the prefix if there is one, then what else there is."""
    return [kv for kv in ((hooks.kv or {}).get(site), *before) if kv is not None]


def per_row(kv: KV) -> bool:
    """Whether a prefix [L ...] differs from row to row."""
    return kv.k.ndim == 5 or (kv.mask is not None and kv.mask.ndim == 3)


def scaled(q: Array, how: Attention) -> Array:
    """Queries [... H] as scores are made of them."""
    return q * (q.shape[-1] ** -0.5 if how.scale is None else how.scale)


def capped(scores: Array, cap: float | None) -> Array:
    """Scores or logits, squeezed into (-cap, cap) where the family does so (Gemma 2)."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def token_scores(q: Array, k: Array, mask: Array, how: Attention, bias: Array | None = None) -> Array:
    """float32 scores [B K G T S] of scaled queries and keys as `attend` has them; -inf outside mask [B T S]."""
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = capped(scores, how.softcap)
    return jnp.where(mask[:, None, None], scores if bias is None else scores + bias, -jnp.inf)


def token_values(weights: Array, v: Array) -> Array:
    """The values [B T K G H] that weights [B K G T S] make of v [B S K H]."""
    return jnp.moveaxis(jnp.einsum("bkgts,bskh->bkgth", weights.astype(v.dtype), v), 3, 1)


def slot_scores(q: Array, prefix: KV, how: Attention) -> Array:
    """float32 scores [B K G T P] of scaled queries q [B T K G H]; -inf at slots that do not exist."""
    slots = "bpkh" if prefix.k.ndim == 4 else "pkh"
    scores = jnp.einsum(f"btkgh,{slots}->bkgtp", q, prefix.k.astype(q.dtype), preferred_element_type=jnp.float32)
    if prefix.share is not None:
        scores = scores * prefix.share[:, None, None, :, None]
    scores = capped(scores, how.softcap)
    if prefix.bias is not None:
        scores = scores + prefix.bias
    if prefix.mask is None:
        return scores
    by_rank = {1: lambda mask: mask, 2: lambda mask: mask[:, None, None, None], 3: lambda mask: mask[:, None, None]}
    return jnp.where(by_rank[prefix.mask.ndim](prefix.mask), scores, -jnp.inf)


def slot_values(weights: Array, prefix: KV, dtype: jnp.dtype) -> Array:
    """The values [B T K G H] that weights [B K G T P] make of a prefix."""
    slots = "bpkh" if prefix.v.ndim == 4 else "pkh"
    out = jnp.einsum(f"bkgtp,{slots}->btkgh", weights.astype(dtype), prefix.v.astype(dtype))
    return out if prefix.share is None else out * prefix.share[:, :, None, None, None].astype(dtype)


def shared_softmax(parts: Sequence[Array]) -> list[Array]:
    """The softmax over the last axes of several score arrays together; at least one score must be finite."""
    weights, total = exponentials(parts)
    return [part / total for part in weights]


def exponentials(parts: Sequence[Array]) -> tuple[list[Array], Array]:
    """Of several score arrays [... S] the softmax over their last axes together, as numerators and denominator [... 1].

    At least one score must be finite.
    """
    top = functools.reduce(jnp.maximum, (part.max(-1, keepdims=True) for part in parts))
    top = jax.lax.stop_gradient(top)  # it cancels
    weights = [jnp.exp(part - top) for part in parts]
    return weights, sum(part.sum(-1, keepdims=True) for part in weights)


def own_softmax(q: Array, prefix: KV, how: Attention) -> Array:
    """The softmax [B K G T P] over the slots of a prefix alone; zeros where it has none."""
    scores = slot_scores(q, prefix, how)
    if prefix.mask is None:
        return jax.nn.softmax(scores, axis=-1)
    some = jnp.isfinite(scores).any(-1, keepdims=True)
    return jnp.where(some, jax.nn.softmax(jnp.where(some, scores, 0.0), axis=-1), 0.0)


def slot_statistics(
    q: Array,
    kv: KV,
    prefixes: Sequence[KV],
    mask: Array,
    real: Array,
    how: Attention = PLAIN,
    bias: Array | None = None,
    keys: Array | None = None,
) -> dict[str, Array]:
    """The attention [K G P] that slots get from the real [B T] queries on average, and norms [K P], of tokens' [K].

    `keys` [B S] says which keys are real, where they are not the queries' own.
    """
    q = scaled(q, how)
    beside = [slot_scores(q, prefix, how) for prefix in prefixes if prefix.gate is None]
    shared = shared_softmax([token_scores(q, kv.k, mask, how, bias), *beside])[1:]
    weights = []
    for prefix in prefixes:
        if prefix.gate is None:
            weights.append(shared.pop(0))
        else:
            weights.append(prefix.gate[:, :, None, None] * own_softmax(q, prefix, how))
    mean = real / real.sum()
    keys = real if keys is None else keys

    def norms(x):  # [P K H] or [B P K H] -> [K P]
        x = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
        return (x if x.ndim == 2 else x.mean(0)).T

    def token_norm(x):  # [B S K H] -> [K]
        return jnp.einsum("bsk,bs->k", jnp.linalg.norm(x.astype(jnp.float32), axis=-1), keys / keys.sum())

    def by_slot(parts, shape):
        return jnp.concatenate([jnp.zeros((*shape, 0)), *parts], axis=-1)  # also where there is no slot at all

    heads = q.shape[2:4]  # K, G
    return {
        "mass": by_slot([jnp.einsum("bkgtp,bt->kgp", w, mean) for w in weights], heads),
        "key_norm": by_slot([norms(prefix.k) for prefix in prefixes], heads[:1]),
        "value_norm": by_slot([norms(prefix.v) for prefix in prefixes], heads[:1]),
        "token_key_norm": token_norm(kv.k),
        "token_value_norm": token_norm(kv.v),
    }


def recall(attended: Array, q: Array, hooks: LayerHooks, site: str) -> Array:
    """attended [B T K G H] plus feature(q) m (Wang et al. 2025: a prefix that takes no softmax mass)."""
    memory = (hooks.memory or {}).get(site)
    if memory is None:
        return attended
    features = FEATURES[memory.feature](q)
    return attended + jnp.einsum("btkgh,kghi->btkgi", features, memory.m.astype(q.dtype))


def add_rows(k: Array, v: Array, rows: KV | None, index: Array | None) -> tuple[Array, Array]:
    """Keys and values [B T K H] with rows [R K H] added where index [B T] names one (-1 names none)."""
    if rows is None or index is None:
        return k, v
    here, index = (index >= 0)[..., None, None], jnp.maximum(index, 0)
    return k + jnp.where(here, rows.k[index], 0).astype(k.dtype), v + jnp.where(here, rows.v[index], 0).astype(v.dtype)


def shifted(positions: Array, adaptation: Adaptation) -> Array:
    """The positions [B T] that real tokens take beside this adaptation."""
    return positions if adaptation.shift is None else positions + adaptation.shift.reshape(-1, 1)


def taken(adaptation: Adaptation, model: Model) -> int:
    """How many positions an adaptation takes from the tokens that are read first; its slots stand for its shift."""
    if adaptation.shift is None:
        return 0
    prompt = 0 if adaptation.prompt is None else adaptation.prompt.shape[-2]
    if model.is_encoder_decoder:
        return prompt  # where prefixes move nothing
    slots = [kv.k.shape[-3] for hooks in (adaptation.decoder, adaptation.encoder) for kv in (hooks.kv or {}).values()]
    return max(slots, default=0) + prompt


def check(adaptation: Adaptation, sites: dict[str, Sites], rows: int) -> None:
    """Raises `UserError` if the adaptation names a site, or has a shape, that this model does not offer for `rows`."""
    entry = "encoder" if "encoder" in sites else "decoder"
    width = sites[entry].width
    if adaptation.prompt is not None:
        fits("prompt", adaptation.prompt, ("P", width), (rows, "P", width))
    if adaptation.rows is not None:
        fits("rows", adaptation.rows, ("R", width))
    if adaptation.shift is not None:
        fits("shift", adaptation.shift, (), (rows,))
    for stack in ("decoder", "encoder"):
        hooks = getattr(adaptation, stack)
        if stack in sites:
            check_stack(stack, hooks, sites[stack], rows)
        elif jax.tree.leaves(hooks):
            raise UserError(f"this model has no {stack} to adapt; valid: {', '.join(sites)}")
    for name in ("prompt", "rows"):
        given, added = getattr(adaptation, name), jax.tree.leaves(getattr(getattr(adaptation, entry), name))
        if added and (given is None or any(x.shape[1] != given.shape[-2] for x in added)):
            got = "none" if given is None else str(given.shape)
            raise UserError(f"{entry}.{name} of shape {added[0].shape} adds to the rows of {name}, which has {got}")
        if entry == "encoder" and jax.tree.leaves(getattr(adaptation.decoder, name)):
            raise UserError(f"decoder.{name} has nothing to add to, as the encoder reads them; valid: encoder.{name}")


def check_stack(stack: str, hooks: LayerHooks, sites: Sites, rows: int) -> None:
    """`check` for one stack of layers."""
    L, D = sites.layers, sites.width
    for site, kv in (hooks.kv or {}).items():
        heads = sites.kv[valid(f"attention site of the {stack}", site, sites.kv)]
        where = f"{stack}/{site}"
        fits(f"prefix k at {where}", kv.k, (L, "P", *heads), (L, rows, "P", *heads))
        fits(f"prefix v at {where}", kv.v, kv.k.shape)
        if kv.share is not None or kv.bias is not None:
            raise UserError(f"prefix share and bias at {where} are made inside a layer; expected None")
        if kv.placed and (site != "self" or "cross" not in sites.kv):
            raise UserError(f"placed slots at {where}: they are for an encoder-decoder's decoder/self only")
        if kv.mask is not None:
            P = kv.k.shape[-3]
            fits(f"prefix mask at {where}", kv.mask, (L, P), (L, rows, P))
        if kv.gate is not None:
            fits(f"prefix gate at {where}", kv.gate, (L, heads[0], sites.groups[site]))
    for site, memory in (hooks.memory or {}).items():
        heads, size = sites.kv[valid(f"attention site of the {stack}", site, sites.kv)]
        valid("feature", memory.feature, FEATURES)
        fits(f"memory at {stack}/{site}", memory.m, (L, heads, sites.groups[site], size, size))
    for site, kv in (hooks.rows or {}).items():
        heads = sites.kv[valid(f"attention site of the {stack}", site, sites.kv)]
        for name, x in (("k", kv.k), ("v", kv.v)):
            fits(f"rows {name} at {stack}/{site}", x, (L, "R", *heads))
        if (kv.mask, kv.gate, kv.share) != (None, None, None):
            raise UserError(f"rows at {stack}/{site} have a mask, gate or share, which is for prefixes; valid: k, v")
    for site, delta in (hooks.delta or {}).items():
        shape = sites.projections[valid(f"projection of the {stack}", site, sites.projections)]
        fits(f"delta a at {stack}/{site}", delta.a, (L, *shape.inner, "R"))
        fits(f"delta b at {stack}/{site}", delta.b, (L, delta.a.shape[-1], *shape.outer))
        if delta.keys is not None:
            fits(f"delta keys at {stack}/{site}", delta.keys, (L,))
    for site, bias in (hooks.bias or {}).items():
        shape = sites.projections[valid(f"projection of the {stack}", site, sites.projections)]
        fits(f"bias at {stack}/{site}", bias, (L, *shape.outer))
    for site, adapter in (hooks.adapter or {}).items():
        valid(f"sublayer of the {stack}", site, sites.adapters)
        valid("activation", adapter.activation, ACTIVATIONS)
        fits(f"adapter down at {stack}/{site}", adapter.down, (L, D, "M"))
        M = adapter.down.shape[-1]
        fits(f"adapter up at {stack}/{site}", adapter.up, (L, M, D))
        fits(f"adapter down_bias at {stack}/{site}", adapter.down_bias, (L, M))
        fits(f"adapter up_bias at {stack}/{site}", adapter.up_bias, (L, D))
        for name, x in (adapter.norm or {}).items():
            fits(f"adapter norm {name} at {stack}/{site}", x, (L, D))
        if adapter.parallel and site == "block":
            raise UserError(f"an adapter at {stack}/block has nothing to be parallel to; valid: attention, mlp")
    for kind, gate in (hooks.gate or {}).items():
        if not getattr(hooks, valid("gate", kind, ("kv", "delta", "adapter"))):
            raise UserError(f"a gate for {kind} of the {stack} has nothing to gate")
        fits(f"gate {kind} of the {stack}", gate.w, (L, D))
        fits(f"gate {kind}'s bias of the {stack}", gate.b, (L,))
    if hooks.prompt is not None:
        fits(f"prompt hook of the {stack}", hooks.prompt, (L, "P", D))


def fits(name: str, x: Array, *shapes: tuple[int | str, ...]) -> None:
    """Raises `UserError` unless x has one of these shapes, in which a letter stands for any size."""
    for wanted in shapes:
        sizes = zip(wanted, x.shape, strict=False)
        if x.ndim == len(wanted) and all(isinstance(want, str) or want == size for want, size in sizes):
            return
    listed = " or ".join(f"[{' '.join(map(str, wanted))}]" for wanted in shapes)
    raise UserError(f"{name} has shape {x.shape}; expected {listed}")

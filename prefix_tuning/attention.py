"""Attention, where a prefix meets the real keys and values, and all else that an `Adaptation` does there."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError
from prefix_tuning.nn import ACTIVATIONS, capped
from prefix_tuning.types import KV, LayerHooks

QUERIES = 128  # of a row that attention takes at once where there is much to score
PARTS = 16  # that a row's queries are taken in at most, since each is compiled
SCORES = 8 * QUERIES**2  # of a row and head that are kept for the backward pass
FEW = 16  # queries that no kernel is asked for: those of a decoding step, one a beam
FEATURES = {"elu": jax.nn.elu, "gelu": ACTIVATIONS["gelu"]}  # of queries, for `Memory`


class Attention(NamedTuple):
    """How a family turns queries and keys into scores."""

    scale: float | None = None  # what queries are multiplied by; None is H ** -0.5
    softcap: float | None = None  # c: scores become c tanh(score / c) before the mask (Gemma 2)
    kernel: str = "plain"  # `Compute.attention`


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
    float32; the result [B T K G H] has q's dtype.  Raises `UserError` for `causal` with unequal numbers of both, and
    for what the kernel that `how` names cannot do.
    """
    if causal and k.shape[1] != q.shape[1]:
        raise UserError(f"causal attention of {q.shape[1]} queries over {k.shape[1]} keys; expected as many of both")
    # Shapes alone are found in float32, which cuDNN lacks and `setup.check_cudnn` refuses.
    if how.kernel != "plain" and q.shape[1] > FEW and (how.kernel, q.dtype) != ("cudnn", jnp.float32):
        return attend_fused(q, k, v, mask, prefixes, bias, how)
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
    return add_gated(out, q, prefixes, how)


def add_gated(out: Array, q: Array, prefixes: Sequence[KV], how: Attention) -> Array:
    """Attention [B T K G H] of scaled queries with what they read of gated prefixes, each under its own softmax."""
    for prefix in prefixes:
        if prefix.gate is not None:
            own = slot_values(own_softmax(q, prefix, how), prefix, out.dtype)
            out = out + prefix.gate[..., None].astype(out.dtype) * own
    return out


def attend_fused(
    q: Array, k: Array, v: Array, mask: Array, prefixes: Sequence[KV], bias: Array | None, how: Attention
) -> Array:
    """`attend` by a kernel that keeps no scores (FlashAttention, Dao et al. 2022); slots are keys before the others.

    Raises `UserError` for a cap, a bias or a share, which it has no place for.
    """
    shared = [prefix for prefix in prefixes if prefix.gate is None]
    slots_change = any(prefix.share is not None or prefix.bias is not None for prefix in shared)
    for name, given in (("a cap", how.softcap), ("a bias", bias), ("gated or placed slots", slots_change or None)):
        if given is not None:
            raise UserError(f"model.attention={how.kernel!r} cannot attend with {name}; expected 'plain'")
    rows, queries, heads, groups, size = q.shape

    def repeated(x: Array) -> Array:  # [P K H] or [B P K H] -> [B P K H]
        return jnp.broadcast_to(x.astype(q.dtype), (rows, *x.shape[-3:]))

    k = jnp.concatenate([*(repeated(prefix.k) for prefix in shared), k], axis=1)
    v = jnp.concatenate([*(repeated(prefix.v) for prefix in shared), v], axis=1)
    mask = jnp.concatenate([*(visible_slots(prefix, rows, queries) for prefix in shared), mask], axis=2)
    # cuDNN differentiates even numbers alone; what is added is hidden, and what it reads is cut off.
    more, beyond = queries % 2, k.shape[1] % 2
    k, v = (jnp.pad(x, [(0, 0), (0, beyond), (0, 0), (0, 0)]) for x in (k, v))
    mask = jnp.pad(mask, [(0, 0), (0, more), (0, beyond)])
    asked = jnp.pad(q, [(0, 0), (0, more), (0, 0), (0, 0), (0, 0)]).reshape(rows, queries + more, heads * groups, size)
    scale = size**-0.5 if how.scale is None else how.scale
    out = jax.nn.dot_product_attention(asked, k, v, mask=mask[:, None], scale=scale, implementation=how.kernel)
    out = out[:, :queries].reshape(q.shape)
    return add_gated(out, scaled(q, how), prefixes, how)


def visible_slots(prefix: KV, rows: int, queries: int) -> Array:
    """Which slots of a prefix each query sees, bool [B T P]."""
    mask = jnp.ones(prefix.k.shape[-3], bool) if prefix.mask is None else prefix.mask.astype(bool)
    return jnp.broadcast_to(mask[:, None] if mask.ndim == 2 else mask, (rows, queries, mask.shape[-1]))


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


def recall(attended: Array, q: Array, hooks: LayerHooks, site: str) -> Array:
    """attended [B T K G H] plus feature(q) m (Wang et al. 2025: a prefix that takes no softmax mass)."""
    memory = (hooks.memory or {}).get(site)
    if memory is None:
        return attended
    features = FEATURES[memory.feature](q)
    return attended + jnp.einsum("btkgh,kghi->btkgi", features, memory.m.astype(q.dtype))


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


def nearby(mask: Array, queries: Array, keys: Array, window: Array | None) -> Array:
    """The mask [B T S] without keys at positions [B S] that lie `window` or more before the queries' [B T].

    It bounds which real tokens are seen.  Slots before them (prefixes, prompts) have no place in the mask: what was
    trained stays visible however long the row, or it would end to work after the first `window` tokens.
    """
    return mask if window is None else mask & (queries[:, :, None] - keys[:, None, :] < window)


def scaled(q: Array, how: Attention) -> Array:
    """Queries [... H] as scores are made of them."""
    return q * (q.shape[-1] ** -0.5 if how.scale is None else how.scale)


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

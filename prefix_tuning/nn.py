"""The layers that every family is made of, and what an `Adaptation` does in them; for attention see attention.py."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import valid
from prefix_tuning.sharding import DATA, gathered, spread
from prefix_tuning.types import KV, Adaptation, LayerHooks, Params, Quantised

ACTIVATIONS = {
    # Computed again for its derivative: cheaper than keeping what autodiff wants, three arrays as wide as the MLP.
    "gelu": jax.checkpoint(lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def project(x: Array, weights: Params, hooks: LayerHooks, site: str, axes: int = 1) -> Array:
    """Contracts the last `axes` axes of x [B T in...] with the first of the kernel's, [in... out...], as hooked."""
    kernel = weights["kernel"]
    if isinstance(kernel, Quantised):
        y = product_in_8_bits(x, kernel, tuple(range(axes)), x.dtype)
    else:
        y = jnp.tensordot(x, kernel, axes)
    if "bias" in weights:
        y = y + weights["bias"]
    return change(y, x, hooks, site, axes)


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


def glu(activation: Callable[[Array], Array], gates: Array, x: Array) -> Array:
    """A gated linear unit, activation(gates) x, of which only the two factors are kept for the derivative."""
    return jax.checkpoint(lambda gates, x: activation(gates) * x)(gates, x)


def lookup(table: Array | Quantised, tokens: Array) -> Array:
    """The rows [... D] of a table [V D] of embeddings."""
    if isinstance(table, Quantised):
        return (table.values[tokens] * table.scale[tokens][..., None]).astype(table.dtype)
    return table[tokens]


def vocabulary_scores(hidden: Array, table: Array | Quantised) -> Array:
    """The float32 products [... V] of hidden states [... D] with each row of a table [V D]."""
    if isinstance(table, Quantised):
        return product_in_8_bits(hidden, table, (1,), jnp.float32)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def next_words(unembed: Callable[[Params, Array], Array], params: Params, hidden: Array) -> Array:
    """The logits [R V] of hidden states [R D] at a decoding step.

    Of at least 8 rows, the last repeated: XLA's product for 2 to 7 rows is far slower on CPUs.
    """
    rows = len(hidden)
    if not 1 < rows < 8:
        return unembed(params, hidden)
    return unembed(params, hidden[jnp.minimum(jnp.arange(8), rows - 1)])[:rows]


def capped(scores: Array, cap: float | None) -> Array:
    """Scores or logits, squeezed into (-cap, cap) where the family does so (Gemma 2)."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product_in_8_bits(x: Array, weight: Quantised, axes: tuple[int, ...], dtype: Any) -> Array:
    """x [... in...] times a frozen weight whose `axes` are in..., [... out...] in dtype.

    The backward pass makes the weight's floats again: kept, they would be the whole model in floats.
    """
    own = tuple(range(x.ndim - len(axes), x.ndim))
    y = jnp.tensordot(x, floats(weight, x), (own, axes), preferred_element_type=dtype)
    return (y * weight.scale).astype(dtype)


def keep_8_bits(
    x: Array, weight: Quantised, axes: tuple[int, ...], dtype: Any
) -> tuple[Array, tuple[Quantised, Array]]:
    """The product, and what its backward pass needs: the weight, and x's dtype."""
    return product_in_8_bits(x, weight, axes, dtype), (weight, jnp.zeros(0, x.dtype))


def back_in_8_bits(
    axes: tuple[int, ...], dtype: Any, kept: tuple[Quantised, Array], slope: Array
) -> tuple[Array, Quantised | None]:
    """The slopes [... in...] of the product's x, for those [... out...] of its result."""
    weight, like = kept
    scaled = (slope * weight.scale).astype(dtype)
    rest = tuple(axis for axis in range(weight.values.ndim) if axis not in axes)
    own = tuple(range(scaled.ndim - len(rest), scaled.ndim))
    return jnp.tensordot(scaled, floats(weight, scaled), (own, rest)).astype(like.dtype), None


product_in_8_bits.defvjp(keep_8_bits, back_in_8_bits)


def floats(weight: Quantised, x: Array) -> Array:
    """A weight's 8-bit values in x's dtype, which XLA cannot make before it has x [...].

    Out of a loop over steps it would take the conversion, and hold every layer as floats; barriers are gone by then.
    """
    # Of x over several devices not one number, which would have to be sent to all, but a sum that each has a part in.
    some = x.sum() if DATA in jax.sharding.get_abstract_mesh().auto_axes else x.ravel()[0]
    never = (some != some) & (some < jnp.inf)  # not a number, and yet below one; XLA does not know
    values = gathered(weight.values, weight.axes)
    return (values + never.astype(values.dtype)).astype(x.dtype)


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


def add_rows(k: Array, v: Array, rows: KV | None, index: Array | None) -> tuple[Array, Array]:
    """Keys and values [B T K H] with rows [R K H] added where index [B T] names one (-1 names none)."""
    if rows is None or index is None:
        return k, v
    here, index = (index >= 0)[..., None, None], jnp.maximum(index, 0)
    return k + jnp.where(here, rows.k[index], 0).astype(k.dtype), v + jnp.where(here, rows.v[index], 0).astype(v.dtype)


def prompt_positions(adaptation: Adaptation) -> Array:
    """Positions [1 P] or [B P] of a prompt: it ends where the real tokens begin, behind a prefix if there is one."""
    length = adaptation.prompt.shape[-2]
    end = jnp.int32(length) if adaptation.shift is None else adaptation.shift
    return end.reshape(-1, 1) - length + jnp.arange(length)


def shifted(positions: Array, adaptation: Adaptation) -> Array:
    """The positions [B T] that real tokens take beside this adaptation."""
    return positions if adaptation.shift is None else positions + adaptation.shift.reshape(-1, 1)


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

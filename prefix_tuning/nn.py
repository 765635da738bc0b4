"""The functions every family is made of; the only place that knows what an `Adaptation` does inside a layer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.types import KV, Adaptation, Sites

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalises the last axis of x [... D] in float32 and returns it in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return (y * scale + bias).astype(x.dtype)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Divides the last axis of x [... D] by its root mean square, in float32, and returns it in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return scale * y.astype(x.dtype)


def project(x: Array, kernel: Array, bias: Array | None = None, axes: int = 1) -> Array:
    """Contracts the last `axes` axes of x [... in] with the first of kernel [in out...]."""
    y = jnp.tensordot(x, kernel, axes)
    return y if bias is None else y + bias


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
    """Turns each pair (i, i + H/2) of x [B T ... H] by positions [B T] x frequencies [H/2] radians, in float32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B T H/2]
    angles = jnp.expand_dims(angles, range(2, x.ndim - 1))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_mask(segments: Array) -> Array:
    """Who may see whom, bool [B T T], from segments [B T]: earlier tokens and itself, within the segment."""
    t = jnp.arange(segments.shape[1])
    return (segments[:, :, None] == segments[:, None, :]) & (t[:, None] >= t[None, :])


def attend(q: Array, k: Array, v: Array, mask: Array, prefix: KV | None = None) -> Array:
    """Attention of q [B T K G H] over k, v [B S K H] where mask [B T S] allows, and over the whole prefix.

    A shared prefix [P K H] is never repeated over the batch: its scores and the real ones are two arrays under one
    softmax (He et al. 2021, eq. 5 is the same identity).  The softmax is float32; the result [B T K G H] has q's dtype.
    """
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    if prefix is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v)
    slots = "bpkh" if prefix.k.ndim == 4 else "pkh"
    prefix_k, prefix_v = prefix.k.astype(k.dtype), prefix.v.astype(v.dtype)
    prefix_scores = jnp.einsum(f"btkgh,{slots}->bkgtp", q, prefix_k, preferred_element_type=jnp.float32)
    top = jnp.maximum(scores.max(-1, keepdims=True), prefix_scores.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)  # it cancels
    weights, prefix_weights = jnp.exp(scores - top), jnp.exp(prefix_scores - top)
    total = weights.sum(-1, keepdims=True) + prefix_weights.sum(-1, keepdims=True)
    seen = jnp.einsum("bkgts,bskh->btkgh", (weights / total).astype(v.dtype), v)
    return seen + jnp.einsum(f"bkgtp,{slots}->btkgh", (prefix_weights / total).astype(v.dtype), prefix_v)


def shifted(positions: Array, adaptation: Adaptation) -> Array:
    """The positions [B T] that real tokens take beside this adaptation."""
    return positions if adaptation.shift is None else positions + adaptation.shift.reshape(-1, 1)


def check(adaptation: Adaptation, sites: dict[str, Sites], rows: int) -> None:
    """Raises `UserError` if the adaptation names a site, or has a shape, that this model does not offer."""
    for stack in ("decoder",):
        hooks = getattr(adaptation, stack)
        for site, kv in (hooks.kv or {}).items():
            valid(f"attention site of the {stack}", site, sites[stack].kv)
            want = (sites[stack].layers, *sites[stack].kv[site])
            for name, x in (("k", kv.k), ("v", kv.v)):
                got = (x.shape[0], *x.shape[-2:])
                if x.ndim not in (4, 5) or got != want or x.shape != kv.k.shape or (x.ndim == 5 and x.shape[1] != rows):
                    raise UserError(
                        f"prefix {name} at {stack}/{site} has shape {x.shape}; expected [L P K H] or [L B P K H] "
                        f"with L={want[0]}, K={want[1]}, H={want[2]}, B={rows}, and k shaped as v"
                    )

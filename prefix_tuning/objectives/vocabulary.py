"""Cross-entropy over a whole vocabulary: logits exist for some targets at a time, and none wait for a backward pass.

The forward pass computes the slopes as well, which are as large as hidden states and not as logits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal

from prefix_tuning import sharding
from prefix_tuning.types import STACKS, Batch, Model, Params

Unembed = Callable[[Params, Array], Array]
# Rows with logits at a time on each device.  Fewer read all weights more often; with more, on a CPU, more of the last
# chunk is empty.
CPU_ROWS = 96
ROWS = 2048


class Sums(NamedTuple):
    """Over real targets, float32 []: what is minimised, and two that are only looked at."""

    loss: Array
    nll: Array
    correct: Array


def cross_entropy(model: Model, params: Params, hidden: Array, batch: Batch, smoothing: float = 0.0) -> Sums:
    """Sums over the real targets of a batch, from their hidden states [B N D].

    `smoothing` is the weight of the mean over the vocabulary in `loss`; `nll` is without.
    """
    outside = {name: leaf for name, leaf in params.items() if name not in STACKS}  # all that `unembed` may read
    groups = sharding.row_groups(len(hidden))
    hidden = jnp.where(batch.mask[..., None] > 0, hidden, 0)  # whatever stands there, it can become no NaN
    x = sharding.spread(hidden.reshape(groups, -1, hidden.shape[-1]))
    targets, mask = (y.reshape(groups, -1) for y in (batch.targets, batch.mask))
    found = summed(model.unembed, smoothing, outside, x, targets, mask)
    return Sums(found.loss, *jax.lax.stop_gradient(found[1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(unembed: Unembed, smoothing: float, params: Params, x: Array, targets: Array, mask: Array) -> Sums:
    """`Sums` of hidden states x [Q R D], targets and mask [Q R]; only `loss` can be differentiated."""

    def some(x: Array, targets: Array, mask: Array) -> tuple[Sums, None]:
        return measured(unembed(params, x), targets, mask, smoothing)[0], None

    return in_chunks(some, x, targets, mask)[0]


def forward(unembed: Unembed, smoothing: float, *arguments: Any) -> tuple[Sums, Any]:
    """`summed`, and its slopes by hidden states and by the parameters that are trained, None for the others."""
    params, x, targets, mask = jax.tree.map(lambda leaf: leaf.value, arguments, is_leaf=primal)
    trained = jax.tree.map(lambda leaf: leaf.value if leaf.perturbed else None, arguments[0], is_leaf=primal)

    def some(x: Array, targets: Array, mask: Array) -> tuple[Sums, tuple[Params, Array]]:
        def logits(trained: Params, x: Array) -> Array:
            own = jax.tree.map(lambda new, old: old if new is None else new, trained, params, is_leaf=absent)
            return unembed(own, x)

        found, pull = jax.vjp(logits, trained, x)
        sums, slopes = measured(found, targets, mask, smoothing)
        return sums, pull(slopes)

    sums, (slopes, by_x) = in_chunks(some, x, targets, mask)
    return sums, (jax.tree.map(lambda slope, leaf: slope.astype(leaf.dtype), slopes, trained), by_x)


def backward(unembed: Unembed, smoothing: float, slopes: Any, by: Sums) -> tuple[Params, Array, None, None]:
    """The slopes, as often as `loss` counts."""
    del unembed, smoothing
    return *jax.tree.map(lambda slope: slope * by.loss.astype(slope.dtype), slopes), None, None


summed.defvjp(forward, backward, symbolic_zeros=True)


def primal(leaf: Any) -> bool:
    """Whether this is an argument together with whether it is differentiated."""
    return isinstance(leaf, CustomVJPPrimal)


def absent(leaf: Any) -> bool:
    """Whether a tree has nothing here."""
    return leaf is None


def measured(logits: Array, targets: Array, mask: Array, smoothing: float) -> tuple[Sums, Array]:
    """`Sums` of float32 logits [... V] for targets [...], and the slopes of `loss` [... V]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    normaliser = (jnp.log(total) + top)[..., 0]
    nll = ((normaliser - chosen) * mask).sum()
    correct = ((logits.argmax(-1) == targets) * mask).sum()
    # A comparison, which XLA makes in passing, where the derivative of reading `chosen` would be a scatter.
    wanted = (jnp.arange(logits.shape[-1]) == targets[..., None]).astype(jnp.float32)
    loss = nll
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * ((normaliser - logits.mean(-1)) * mask).sum()
        wanted = (1 - smoothing) * wanted + smoothing / logits.shape[-1]
    return Sums(loss, nll, correct), (weights / total - wanted) * mask[..., None]


def in_chunks(some: Callable, x: Array, targets: Array, mask: Array) -> tuple[Sums, Any]:
    """The sum of `some(x, targets, mask) -> (sums, slopes)` over chunks of the R rows [Q R ...].

    Slopes are None or (by parameters, by x); those by x are not summed but put together.  Rows that are masked come
    last, and chunks of nothing else are left out.
    """
    rows = x.shape[1]
    size = CPU_ROWS if jax.default_backend() == "cpu" else ROWS
    if rows <= size:
        return some(x, targets, mask)
    mask = jnp.pad(mask, ((0, 0), (0, -rows % size)))
    order = jnp.argsort(mask == 0, axis=1, stable=True)
    there = jnp.minimum(order, rows - 1)
    taken = [jnp.take_along_axis(x, there[..., None], axis=1), jnp.take_along_axis(targets, there, axis=1)]
    taken.append(jnp.take_along_axis(mask, order, axis=1))

    def cut(start: Array) -> list[Array]:
        return [jax.lax.dynamic_slice_in_dim(y, start, size, axis=1) for y in taken]

    def add(number: Array, total: Any) -> Any:
        (sums, slopes), (total_sums, total_slopes) = some(*cut(number * size)), total
        total_sums = jax.tree.map(jnp.add, total_sums, sums)
        if slopes is None:
            return total_sums, None
        by_params, by_x = total_slopes
        by_x = jax.lax.dynamic_update_slice_in_dim(by_x, slopes[1], number * size, axis=1)
        return total_sums, (jax.tree.map(jnp.add, by_params, slopes[0]), by_x)

    sums, slopes = jax.eval_shape(some, *cut(0))
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (sums, slopes))
    if slopes is not None:
        total = total[0], (total[1][0], jnp.zeros_like(taken[0]))
    chunks = -(-(mask > 0).sum(1).max() // size)
    sums, slopes = jax.lax.fori_loop(0, chunks, add, total)
    if slopes is not None:
        back = jnp.argsort(order, axis=1)[:, :rows]
        slopes = slopes[0], jnp.take_along_axis(slopes[1], back[..., None], axis=1)
    return sums, slopes

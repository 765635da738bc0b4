"""What several objectives are made of: hidden states at targets, cross-entropy as sums, a linear head."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError
from prefix_tuning.types import Adaptation, Batch, Model, Params


def hidden_at_targets(model: Model, params: Params, adaptation: Adaptation, batch: Batch) -> Array:
    """The hidden states [B N D] that targets are read off."""
    hidden = model.hidden(params, adaptation, batch)  # [B T D]
    return jnp.take_along_axis(hidden, batch.target_index[..., None], axis=1)


def mean_of_text(model: Model, params: Params, adaptation: Adaptation, batch: Batch) -> Array:
    """The mean hidden states [B N D] of the texts that targets are in, over their tokens without virtual ones."""
    hidden = model.hidden(params, adaptation, batch)  # [B T D]
    own = jnp.take_along_axis(batch.segments, batch.target_index, axis=1)  # [B N]
    inside = (batch.segments[:, None] == own[..., None]) & (batch.tokens < model.vocabulary)[:, None]
    weights = inside / jnp.maximum(inside.sum(-1, keepdims=True), 1)
    return jnp.einsum("bnt,btd->bnd", weights.astype(hidden.dtype), hidden)


def cross_entropy(logits: Array, batch: Batch) -> dict[str, Array]:
    """Sums over the real targets of a batch, from float32 logits [B N C]: "nll" in nats, "correct", and counts."""
    chosen = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    nll = ((jax.nn.logsumexp(logits, axis=-1) - chosen) * batch.mask).sum()
    correct = ((logits.argmax(-1) == batch.targets) * batch.mask).sum()
    return {"nll": nll, "correct": correct, "targets": batch.mask.sum(), **counts(batch)}


def counts(batch: Batch) -> dict[str, Array]:
    """How many tokens and examples a batch holds, as float32."""
    return {
        "tokens": (batch.segments > 0).sum().astype(jnp.float32),
        "examples": batch.examples.sum().astype(jnp.float32),
    }


def pooled(model: Model, params: Params, hidden: Array) -> Array:
    """Hidden states [... D] as a head for whole texts reads them: through the model's own pooler, if it has one."""
    return hidden if model.pool is None else model.pool(params, hidden)


def fresh_head(key: Array, model: Model, outputs: int, *, bias: bool = True) -> Params:
    """A linear head [D C], normal with the deviation that the model's own weights were drawn with, biases 0 if any."""
    width = model.sites[model.entry].width
    deviation = model.config.get("initializer_range", 0.02)
    kernel = {"kernel": deviation * jax.random.normal(key, (width, outputs))}
    return kernel | ({"bias": jnp.zeros(outputs)} if bias else {})


def check_dropout(dropout: float) -> None:
    """Raises `UserError` for a probability that would drop everything, or is none."""
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"objective.dropout must be in [0, 1), got {dropout}")


def dropped(hidden: Array, dropout: float, key: Array | None) -> Array:
    """Hidden states [... D] with some numbers dropped and the others scaled up; as they are without a key."""
    if key is None or not dropout:
        return hidden
    return jnp.where(jax.random.bernoulli(key, 1 - dropout, hidden.shape), hidden / (1 - dropout), 0)


def linear(head: Params, hidden: Array) -> Array:
    """float32 [... C] from hidden states [... D]."""
    scores = hidden.astype(jnp.float32) @ head["kernel"]
    return scores + head["bias"] if "bias" in head else scores


def check_labels(labels: Sequence[str]) -> list[str]:
    """The names of the classes; raises `UserError` unless they are two or more different texts."""
    if isinstance(labels, str) or len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(f"objective.labels={labels!r} must be a tuple of at least two different names of classes")
    return list(labels)

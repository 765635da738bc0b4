"""Extractive question answering: where in the second text of a pair the answer starts and ends (Devlin et al. 2019)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.objectives import scores
from prefix_tuning.types import Adaptation, Batch, Model, Objective, Params


def make(tokenizer: Any, *, dropout: float = 0.0) -> Objective:
    """An `Objective` whose two targets are positions, of the first and the last token of the answer.

    Tokens of the second text can be chosen, and the first token of all, which stands for no answer.  `dropout` is a
    probability on what the head reads.  Raises `UserError`.
    """
    del tokenizer
    scores.check_dropout(dropout)

    def predict(model: Model, params: Params, adaptation: Adaptation, batch: Batch, key: Array | None = None) -> Array:
        """Scores [B T 2] of starts and ends, -inf where neither can be."""
        hidden = model.hidden(params, adaptation, batch)
        score = scores.linear(params["head"], scores.dropped(hidden, dropout, key))
        first = jnp.arange(score.shape[1]) == 0
        allowed = (batch.segments > 0) & ((batch.types == 1) | first)
        return jnp.where(allowed[..., None] | first[:, None], score, -jnp.inf)

    def loss(
        model: Model, params: Params, adaptation: Adaptation, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Array, dict]:
        log_probability = jax.nn.log_softmax(predict(model, params, adaptation, batch, key), axis=1)
        found = jnp.take_along_axis(log_probability, batch.target_index[:, None], axis=1)[:, 0]  # [B 2]
        both = (log_probability.argmax(1) == batch.target_index).all(-1) & (batch.examples > 0)
        targets = batch.mask.sum()
        sums = {"correct": 2 * both.sum().astype(jnp.float32), "targets": targets}
        return -jnp.where(batch.mask > 0, found, 0.0).sum(), targets, sums | scores.counts(batch)

    def head(key: Array, model: Model) -> Params:
        return scores.fresh_head(key, model, 2)

    return Objective(loss, head, predict)

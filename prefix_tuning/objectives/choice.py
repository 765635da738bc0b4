"""Choosing among several texts: each is scored by a linear head, and the scores of one question share a softmax."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.objectives import scores
from prefix_tuning.types import Adaptation, Batch, Model, Objective, Params


def make(tokenizer: Any, *, dropout: float = 0.0) -> Objective:
    """An `Objective` for rows that hold the choices of one question as segments, whose targets are 1 where right.

    `dropout` is a probability on what the head reads.  Raises `UserError`.
    """
    del tokenizer
    scores.check_dropout(dropout)

    def predict(model: Model, params: Params, adaptation: Adaptation, batch: Batch, key: Array | None = None) -> Array:
        """Scores [B N] of the choices, -inf where there is none."""
        hidden = scores.hidden_at_targets(model, params, adaptation, batch)
        read = scores.dropped(scores.pooled(model, params, hidden), dropout, key)
        score = scores.linear(params["head"], read)[..., 0]
        return jnp.where(batch.mask > 0, score, -jnp.inf)

    def loss(
        model: Model, params: Params, adaptation: Adaptation, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Array, dict]:
        score, real = predict(model, params, adaptation, batch, key), batch.examples > 0
        score = jnp.where(real[:, None], score, 0.0)  # a row that only fills the batch has no choice to be -inf
        right = batch.targets.argmax(-1)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(score), right[:, None], axis=-1)[:, 0]
        correct = (score.argmax(-1) == right) & real
        sums = {"correct": correct.sum().astype(jnp.float32), "targets": real.sum().astype(jnp.float32)}
        return jnp.where(real, nll, 0.0).sum(), sums["targets"], sums | scores.counts(batch)

    def head(key: Array, model: Model) -> Params:
        return scores.fresh_head(key, model, 1)

    return Objective(loss, head, predict)

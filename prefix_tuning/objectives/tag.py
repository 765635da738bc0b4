"""Classifying every word of a text with a linear head on its first token."""

from collections.abc import Sequence
from typing import Any

from jax import Array

from prefix_tuning.objectives import scores
from prefix_tuning.types import Adaptation, Batch, Model, Objective, Params


def make(tokenizer: Any, *, labels: Sequence[str], dropout: float = 0.0) -> Objective:
    """An `Objective` that predicts one of `labels`, such as "O" and "B-PER", for each word.

    `dropout` is a probability on what the head reads.  Raises `UserError`.
    """
    del tokenizer
    labels = scores.check_labels(labels)
    scores.check_dropout(dropout)

    def predict(model: Model, params: Params, adaptation: Adaptation, batch: Batch, key: Array | None = None) -> Array:
        hidden = scores.hidden_at_targets(model, params, adaptation, batch)
        return scores.linear(params["head"], scores.dropped(hidden, dropout, key))

    def loss(
        model: Model, params: Params, adaptation: Adaptation, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Array, dict]:
        sums = scores.cross_entropy(predict(model, params, adaptation, batch, key), batch)
        return sums.pop("nll"), sums["targets"], sums

    def head(key: Array, model: Model) -> Params:
        return scores.fresh_head(key, model, len(labels))

    return Objective(loss, head, predict)

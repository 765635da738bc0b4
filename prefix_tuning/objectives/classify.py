"""Classifying whole texts, with a linear head or by words of the vocabulary (Schick & Schuetze 2021's verbaliser)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.objectives import scores
from prefix_tuning.types import Adaptation, Batch, Model, Objective, Params

POOLINGS = ("token", "mean")


def make(
    tokenizer: Any,
    *,
    labels: Sequence[str],
    words: Sequence[str] | None = None,
    pooling: str = "token",
    dropout: float = 0.0,
) -> Objective:
    """An `Objective` that predicts one of `labels` from the hidden state of one token, or their mean.

    The token is the first of an encoder, the last of a decoder, or the one that the template calls {mask}.  With
    `words`, one for each label and one token each, the classes are scored by the model's own logits of those tokens;
    otherwise a linear head is trained beside the method, behind the model's pooler if it has one.  `pooling="mean"`
    reads the mean over the tokens of the text instead, which models of whole sentences were trained with (Reimers &
    Gurevych 2019), without a pooler.  `dropout` is a probability on what the head reads.  Raises `UserError`.
    """
    labels = scores.check_labels(labels)
    valid("objective.pooling", pooling, POOLINGS)
    scores.check_dropout(dropout)
    if words is not None and (pooling != "token" or dropout):
        raise UserError("objective.words are predicted at one token without a head; drop objective.pooling and dropout")
    ids = None if words is None else jnp.asarray(one_token_each(tokenizer, words, labels))

    def predict(model: Model, params: Params, adaptation: Adaptation, batch: Batch, key: Array | None = None) -> Array:
        if pooling == "mean":
            return scored(params, scores.mean_of_text(model, params, adaptation, batch), key)
        hidden = scores.hidden_at_targets(model, params, adaptation, batch)
        if ids is not None:
            return model.unembed(params, hidden)[..., ids]
        return scored(params, scores.pooled(model, params, hidden), key)

    def scored(params: Params, hidden: Array, key: Array | None) -> Array:
        return scores.linear(params["head"], scores.dropped(hidden, dropout, key))

    def loss(
        model: Model, params: Params, adaptation: Adaptation, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Array, dict]:
        sums = scores.cross_entropy(predict(model, params, adaptation, batch, key), batch)
        return sums.pop("nll"), sums["targets"], sums

    def head(key: Array, model: Model) -> Params:
        # transformers' own heads have no bias on what a decoder has read.
        return scores.fresh_head(key, model, len(labels), bias=model.entry == "encoder")

    return Objective(loss, head if words is None else None, predict)


def one_token_each(tokenizer: Any, words: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The token of each word; raises `UserError` for a word of several, and unless there is one for each label."""
    if isinstance(words, str) or len(words) != len(labels):
        raise UserError(f"objective.words={words!r} must be a tuple with a word for each of {', '.join(labels)}")
    ids = []
    for word in words:
        tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1:
            raise UserError(f"objective.words: {word!r} is {len(tokens)} tokens; expected words of one token")
        ids += tokens
    if len(set(ids)) < len(ids):
        raise UserError(f"objective.words={words!r} are not all different tokens")
    return ids

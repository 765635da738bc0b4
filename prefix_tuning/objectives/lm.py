"""Next-token loss on target tokens, the end token included."""

from typing import Any

from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.objectives import scores, vocabulary
from prefix_tuning.types import Adaptation, Batch, Model, Objective, Params

NORMALISATIONS = ("token", "sequence")


def make(tokenizer: Any, *, normalisation: str = "token", label_smoothing: float = 0.0) -> Objective:
    """An `Objective` that divides the summed loss by target tokens, or by examples as the paper's released code does.

    "sequence" sums over an example's tokens and averages over examples (its objective_mode 1, for prefix tuning only).
    `label_smoothing` is the weight e of a mean over the vocabulary: -(1 - e) log p(target) - e/V sum_v log p(v), which
    only training minimises: without a key the loss is the plain one.  Raises `UserError`.
    """
    del tokenizer
    valid("objective.normalisation", normalisation, NORMALISATIONS)
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"objective.label_smoothing must be in [0, 1), got {label_smoothing}")

    def loss(
        model: Model, params: Params, adaptation: Adaptation, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Array, dict]:
        hidden = scores.hidden_at_targets(model, params, adaptation, batch)
        smoothing = 0.0 if key is None else label_smoothing
        summed, nll, correct = vocabulary.cross_entropy(model, params, hidden, batch, smoothing)
        sums = {"nll": nll, "correct": correct, "targets": batch.mask.sum(), **scores.counts(batch)}
        return summed, sums["targets" if normalisation == "token" else "examples"], sums

    return Objective(loss)

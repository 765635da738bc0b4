"""Next-token loss on target tokens, the end token included; logits exist at those positions only."""

from typing import Any

import jax
from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.objectives import scores
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
        logits = model.unembed(params, scores.hidden_at_targets(model, params, adaptation, batch))  # float32 [B N V]
        sums = scores.cross_entropy(logits, batch)
        summed = sums["nll"]
        if label_smoothing and key is not None:
            uniform = ((jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)) * batch.mask).sum()
            summed = (1 - label_smoothing) * summed + label_smoothing * uniform
        return summed, sums["targets" if normalisation == "token" else "examples"], sums

    return Objective(loss)

"""Next-token loss on target tokens, the end token included; logits exist at those positions only."""

from typing import Any

from jax import Array

from prefix_tuning.errors import valid
from prefix_tuning.objectives import scores
from prefix_tuning.types import Adaptation, Batch, Model, Objective, Params

NORMALISATIONS = ("token", "sequence")


def make(tokenizer: Any, *, normalisation: str = "token") -> Objective:
    """An `Objective` that divides the summed loss by target tokens, or by examples as the paper's released code does.

    "sequence" sums over an example's tokens and averages over examples (its objective_mode 1, for prefix tuning only).
    """
    del tokenizer
    valid("objective.normalisation", normalisation, NORMALISATIONS)

    def loss(
        model: Model, params: Params, adaptation: Adaptation, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Array, dict]:
        del key  # nothing is drawn
        logits = model.unembed(params, scores.hidden_at_targets(model, params, adaptation, batch))  # float32 [B N V]
        sums = scores.cross_entropy(logits, batch)
        return sums["nll"], sums["targets" if normalisation == "token" else "examples"], sums

    return Objective(loss)

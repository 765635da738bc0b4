"""Next-token loss on target tokens, the end token included; logits exist at those positions only."""

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import valid
from prefix_tuning.types import Adaptation, Batch, Model, Objective, Params

NORMALISATIONS = ("token", "sequence")


def make(*, normalisation: str = "token") -> Objective:
    """An `Objective` that divides the summed loss by target tokens, or by examples as the paper's released code does.

    "sequence" sums over an example's tokens and averages over examples (its objective_mode 1, for prefix tuning only).
    """
    valid("objective.normalisation", normalisation, NORMALISATIONS)

    def objective(
        model: Model, params: Params, adaptation: Adaptation, batch: Batch
    ) -> tuple[Array, Array, dict[str, Array]]:
        hidden = model.hidden(params, adaptation, batch)  # [B T D]
        hidden = jnp.take_along_axis(hidden, batch.target_index[..., None], axis=1)  # [B N D]
        logits = model.unembed(params, hidden)  # float32 [B N V]
        chosen = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        loss = ((jax.nn.logsumexp(logits, axis=-1) - chosen) * batch.mask).sum()
        correct = ((logits.argmax(-1) == batch.targets) * batch.mask).sum()
        targets, examples = batch.mask.sum(), batch.examples.sum().astype(jnp.float32)
        tokens = (batch.segments > 0).sum().astype(jnp.float32)
        count = targets if normalisation == "token" else examples
        return (
            loss,
            count,
            {"nll": loss, "correct": correct, "targets": targets, "tokens": tokens, "examples": examples},
        )

    return objective

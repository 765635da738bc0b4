"""P-tuning (Liu et al. 2021): trained rows made by a small network, anywhere in a template around the input."""

from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.methods import rows
from prefix_tuning.template import ROWS, pieces
from prefix_tuning.types import Adaptation, Method, Model, Params

NETWORKS = ("lstm", "mlp")


class PromptEncoder(flax.linen.Module):
    """P embeddings, a bidirectional LSTM of two layers and an MLP (the authors' LAMA code), or the MLP alone."""

    length: int  # P
    width: int  # D
    hidden: int  # M, in each direction of the LSTM
    lstm: bool

    @flax.linen.compact
    def __call__(self) -> Array:
        """Rows [P D]."""
        x = self.param("slots", flax.linen.initializers.normal(1.0), (self.length, self.width))
        if self.lstm:
            for number in range(2):
                cells = [
                    flax.linen.OptimizedLSTMCell(self.hidden, name=f"{way}_{number}") for way in ("forward", "backward")
                ]
                directions = [
                    flax.linen.RNN(cells[0]),
                    flax.linen.RNN(cells[1], reverse=True, keep_order=True),
                ]
                x = jnp.concatenate([direction(x) for direction in directions], axis=-1)
        x = jax.nn.relu(rows.dense(x.shape[-1] if self.lstm else self.hidden, x.shape[-1], "down")(x))
        return rows.dense(self.width, x.shape[-1], "up")(x)


def make(
    tokenizer: Any,
    *,
    length: int,
    network: str = "lstm",
    hidden: int | None = None,
    template: str | None = None,
) -> Method:
    """A `Method` that trains a network that makes `length` rows; only the rows are published.

    `network` is "lstm" or "mlp", `hidden` its width, half the model's (in each direction) or the model's unless given.
    `template` says where rows stand: "{rows:3}{prompt}{rows:2}", with "{prompt}" for text.prompt or, to place rows
    within it, text with "{source}"; the default is all of them before the input.  Raises `UserError` for a template
    whose rows are not `length`.
    """
    del tokenizer
    valid("network", network, NETWORKS)
    if length < 1:
        raise UserError(f"method.length must be at least 1, got {length}")
    if hidden is not None and hidden < 1:
        raise UserError(f"method.hidden must be at least 1 or None, got {hidden}")
    template = f"{{rows:{length}}}{{prompt}}" if template is None else template
    counts = [piece for piece in pieces(template) if isinstance(piece, int)]
    if sum(counts) != length or 0 in counts:
        raise UserError(f"method.template={template!r} has {sum(counts)} rows in {counts}; expected {length}")
    if ("{prompt}" in template) == ("{source}" in template):
        raise UserError(f"method.template={template!r} must hold either {{prompt}} or {{source}}")
    # Rows before everything are a prompt, which all examples share; the others are virtual tokens among the real ones.
    leading = ROWS.match(template)
    first = int(leading[1]) if leading else 0
    rest = template[leading.end() :] if leading else template

    def module(width: int) -> PromptEncoder:
        lstm = network == "lstm"
        return PromptEncoder(length, width, hidden or (max(width // 2, 1) if lstm else width), lstm)

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        del frozen
        return module(model.sites[model.entry].width).init(key)["params"]

    def stored(frozen: Params, trainable: Params) -> Params:
        del frozen
        return {"rows": module(trainable["slots"].shape[1]).apply({"params": trainable})}

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        del key  # nothing is drawn
        made = stored(frozen, trainable)["rows"]
        before = {"prompt": made[:first], "shift": jnp.int32(first)} if first else {}
        among = {"rows": made[first:]} if first < length else {}
        return frozen, Adaptation(**before, **among)

    return Method(init_fn, bind, stored=stored, template=rest)

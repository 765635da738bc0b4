"""Prompt tuning (Lester et al. 2021): P trained embeddings before the embedded input, and nothing in the layers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.methods import rows
from prefix_tuning.methods.rows import Reparametrisation
from prefix_tuning.types import Adaptation, Method, Model, Params

INITS = ("random", "vocabulary", "text", "labels")


def make(
    tokenizer: Any,
    *,
    length: int | None,
    init: str = "vocabulary",
    text: str | None = None,
    labels: Sequence[str] | None = None,
    scale: float | None = None,
    population: int | None = None,
    reparametrisation: int | None = None,
) -> Method:
    """A `Method` that trains `length` rows; length=None takes as many as `text` has tokens.

    `init` is "random" (uniform within +-`scale`, 0.5 unless given), "vocabulary" (embeddings of the `population` most
    frequent tokens, 5000 unless given), "text" (those of `text`, repeated as often as needed) or "labels" (the mean
    over the tokens of each class label, the other rows from the vocabulary), as in section 3.2 of the paper.
    `reparametrisation` makes the rows with an MLP of that width, from its own fresh weights: with it this is the
    embedding-only ablation of Li & Liang (2021, section 7.2).  Raises `UserError`, also for an option that would do
    nothing.
    """
    valid("init", init, INITS)
    if isinstance(labels, str):
        raise UserError(f"method.labels={labels!r} must be a tuple of texts, one for each class")
    for name, value, wanted in (("text", text, "text"), ("labels", labels, "labels")):
        if (value is not None) != (init == wanted):
            raise UserError(f"method.{name} goes with method.init={wanted!r} and nothing else; got init={init!r}")
    if scale is not None and (init != "random" or reparametrisation is not None):
        raise UserError("method.scale goes with method.init='random' and method.reparametrisation=None; drop it")
    if population is not None and init not in ("vocabulary", "labels"):
        raise UserError("method.population goes with an init of 'vocabulary' or 'labels'; drop it")
    if reparametrisation is not None and init != "random":
        raise UserError(f"method.reparametrisation starts from fresh weights; expected init='random', got {init!r}")
    rows.check_width(reparametrisation)
    scale = 0.5 if scale is None else scale
    population = 5000 if population is None else population
    if scale <= 0 or population < 1:
        raise UserError(f"method needs scale > 0 and population >= 1; got {scale}, {population}")
    ids = None if text is None else rows.words(tokenizer, text)
    names = None if labels is None else [rows.words(tokenizer, label, "method.labels") for label in labels]
    length = rows.as_long_as(length, ids)
    if names is not None and not 1 <= len(names) <= length:
        raise UserError(f"method.labels are {len(names)}; expected at least 1 and at most method.length={length}")

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        width = model.sites[model.entry].width

        def embedded(tokens: Array) -> Array:
            return model.embed(frozen, tokens).astype(jnp.float32)

        if reparametrisation is not None:
            return Reparametrisation(length, width, reparametrisation, (width,)).init(key)["params"]
        if init == "random":
            return {"rows": jax.random.uniform(key, (length, width), jnp.float32, -scale, scale)}
        if init == "text":
            return {"rows": embedded(jnp.resize(jnp.asarray(ids), length))}
        common = rows.frequent(tokenizer, model, population)
        start = embedded(jax.random.choice(key, common, (length,), replace=len(common) < length))
        if names is not None:
            means = jnp.stack([embedded(jnp.asarray(label)).mean(0) for label in names])
            start = jnp.concatenate([means, start[len(names) :]])
        return {"rows": start}

    def stored(frozen: Params, trainable: Params) -> Params:
        del frozen
        if reparametrisation is None:
            return trainable
        return {"rows": Reparametrisation.of(trainable).apply({"params": trainable})}

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        del key  # nothing is drawn
        return frozen, Adaptation(prompt=stored(frozen, trainable)["rows"], shift=jnp.int32(length))

    def adopt(model: Model, frozen: Params, adaptation: Adaptation) -> Params:
        del model, frozen
        rows.only(adaptation, prompt=adaptation.prompt, shift=adaptation.shift)
        if adaptation.prompt is None or adaptation.prompt.shape[0] != length or adaptation.prompt.ndim != 2:
            told = None if adaptation.prompt is None else adaptation.prompt.shape
            raise UserError(f"method.length={length} cannot start from a prompt of shape {told}; expected [{length} D]")
        return {"rows": jnp.array(adaptation.prompt, jnp.float32)}

    return Method(init_fn, bind, stored=stored, adopt=None if reparametrisation else adopt)

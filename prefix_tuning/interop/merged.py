"""A trained change of weights as a whole model in Hugging Face layout, so that nothing of ours is needed to run it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from prefix_tuning import models
from prefix_tuning.errors import UserError
from prefix_tuning.files import guarded
from prefix_tuning.interop import peft
from prefix_tuning.models import loading
from prefix_tuning.types import Adaptation, Delta, LayerHooks, Model, Params, Projection, joined


def merge(model: Model, params: Params, adaptation: Adaptation) -> tuple[Model, Params]:
    """The model and weights that compute without an adaptation what these compute with it.

    Low-rank deltas and biases can be merged; raises `UserError` for all else, which is no change of weights.  A family
    whose projections have no bias gets them from its config.json, if that can say so.
    """
    only = {stack: getattr(adaptation, stack) for stack in ("decoder", "encoder")}
    mergeable = Adaptation(**{stack: LayerHooks(delta=own.delta, bias=own.bias) for stack, own in only.items()})
    if jax.tree.structure(adaptation) != jax.tree.structure(mergeable):
        raise UserError(
            "only LoRA, biases and fine-tuned weights can be merged into a model; prefixes, prompts, memories and "
            "adapters add something that its config.json cannot express; valid formats for a prefix: peft, kv"
        )
    for stack in model.sites:
        model, params = merge_stack(model, params, stack, only[stack])
    return model, params


def merge_stack(model: Model, params: Params, stack: str, hooks: LayerHooks) -> tuple[Model, Params]:
    """`merge` for one stack of layers."""
    own = model.layers(stack)
    # New dicts, so that nothing is written into the tree that was given.
    layers = jax.tree.map(lambda x: x, jax.device_get(joined(params[own])))
    if hooks.bias and not all("bias" in layers[site] for site in hooks.bias):
        flags = getattr(models.MODELS[model.config["model_type"]], "BIASED", None)
        if flags is None:
            raise UserError(f"a {model.config['model_type']} model has no bias where this adaptation adds one")
        model = models.build(model.config | flags)
        for name, specs in model.specs[own].items():
            if isinstance(specs, dict) and "kernel" in specs and "bias" in specs:
                kernel = layers[name]["kernel"]
                layers[name].setdefault("bias", np.zeros(specs["bias"].shape, kernel.dtype))
    projections = model.sites[stack].projections
    for site, delta in (hooks.delta or {}).items():
        projection = projections[site]
        weights = layers[projection.weight]
        weights["kernel"] = added(weights["kernel"], low_rank(delta, projection), projection)
    for site, bias in (hooks.bias or {}).items():
        weights = layers[projections[site].weight]
        weights["bias"] = (weights["bias"] + np.asarray(bias)).astype(weights["bias"].dtype)
    return model, params | {own: layers}


def low_rank(delta: Delta, projection: Projection) -> np.ndarray:
    """What a delta adds to its kernel, float32 [L in... out...]."""
    a, b = (np.asarray(x, np.float32) for x in (delta.a, delta.b))
    change = delta.scale * (a.reshape(len(a), -1, a.shape[-1]) @ b.reshape(*b.shape[:2], -1))
    return change.reshape(len(a), *projection.inner, *projection.outer)


def added(kernel: Any, change: np.ndarray, projection: Projection) -> np.ndarray:
    """The kernel [L in... out...], or one part of a fused one, plus a change of it, in its own dtype."""
    whole = np.array(kernel, np.float32)
    if projection.part is None:
        return (whole + change).astype(kernel.dtype)
    where = (slice(None),) * (1 + len(projection.inner)) + (projection.part,)
    whole[where] += change
    return whole.astype(kernel.dtype)


def save(
    folder: str | Path,
    model: Model,
    params: Params,
    adaptation: Adaptation,
    tokenizer: Any,
    objective: dict[str, Any] | None = None,
) -> None:
    """Writes the merged model and its tokenizer as transformers reads them.

    With a head in `params`, `objective` is the config section that it was trained for, and what is written is for
    transformers' class for that task.  Raises `UserError` for what cannot be.
    """
    model, params = merge(model, params, adaptation)
    dtype = next(name for name, kind in loading.DTYPES.items() if params["embedding"].dtype == kind)
    tensors: dict[str, np.ndarray] = {}
    if "head" in params:
        head, labels = peft.head_of(objective, model), objective.get("labels")
        tensors = {f"{head.module}.{part}": x for part, x in peft.head_tensors(head, params["head"]).items()}
        # Which of transformers' classes reads it is the reader's choice, who knows the task.
        config = {key: value for key, value in model.config.items() if key != "architectures"}
        if labels is not None:
            config |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        model = model._replace(config=config)
    guarded(Path(folder), lambda: loading.save_pretrained(folder, model, params, dtype, tensors))
    if tokenizer is not None:
        guarded(Path(folder), lambda: tokenizer.save_pretrained(folder))

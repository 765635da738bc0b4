"""A trained prefix as PEFT's folder: adapter_config.json and adapter_model.safetensors, in both directions."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from prefix_tuning.errors import UserError
from prefix_tuning.files import read_json, replace
from prefix_tuning.models import loading
from prefix_tuning.types import KV, Adaptation, LayerHooks, Model

CONFIG, WEIGHTS, KEY = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def save_adapter(folder: str | Path, adaptation: Adaptation, model: Model, base: str = "") -> None:
    """Writes a prefix [L P K H] as PEFT stores it, [P, L*2*K*H] float32 with keys before values in each layer.

    `base` names the frozen model.  Raises `UserError` for what PEFT's prefix tuning cannot express.
    """
    folder = Path(folder)
    check_decoder(model)
    kv = (adaptation.decoder.kv or {}).get("self")
    if kv is None or kv.k.ndim != 4:
        raise UserError("PEFT's prefix tuning holds one shared prefix of keys and values; this adaptation has none")
    alone = Adaptation(LayerHooks(kv={"self": KV(kv.k, kv.v)}), adaptation.shift)
    if jax.tree.structure(adaptation) != jax.tree.structure(alone):
        raise UserError(
            "PEFT's prefix tuning holds keys and values in every layer and nothing else; this adaptation also has "
            "gates, layers without a prefix, or what another method trained"
        )
    if adaptation.shift is None:
        raise UserError(
            "PEFT counts a prefix into the positions of real tokens; one trained with shift=False would differ"
        )
    sites = model.sites["decoder"]
    heads, head_size = sites.kv["self"]
    table = np.stack([np.asarray(kv.k, np.float32), np.asarray(kv.v, np.float32)], axis=1)  # [L 2 P K H]
    table = table.transpose(2, 0, 1, 3, 4).reshape(table.shape[2], -1)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "encoder_hidden_size": heads * head_size,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": heads,
        "num_layers": sites.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(table),
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,  # what the reparametrisation made is here, the network itself is folded away
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": heads * head_size,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file({KEY: np.ascontiguousarray(table)}, folder / WEIGHTS, metadata={"format": "pt"})
        replace(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write the adapter to {folder}: {error}") from error


def check_decoder(model: Model) -> None:
    """Raises `UserError` for a model whose prefixes PEFT's layout for decoders cannot hold."""
    if list(model.sites) != ["decoder"]:
        raise UserError(
            "PEFT's folder is written and read for prefixes of decoders; this model has the stacks "
            f"{', '.join(model.sites)}"
        )


def load_adapter(folder: str | Path, model: Model) -> Adaptation:
    """The prefix in a PEFT folder; raises `UserError` if it is another method's or does not fit the model."""
    folder = Path(folder)
    config = read_json(folder / CONFIG, "a folder in PEFT's layout")
    if config.get("peft_type") != "PREFIX_TUNING":
        raise UserError(f"{folder / CONFIG} holds peft_type {config.get('peft_type')!r}; expected 'PREFIX_TUNING'")
    check_decoder(model)
    sites = model.sites["decoder"]
    shape = (sites.layers, 2, *sites.kv["self"])
    for key, tensor in loading.read(folder / WEIGHTS):
        rows = tensor.get_shape()
        if key == KEY and len(rows) == 2 and rows[1] == math.prod(shape) and rows[0] > 0:
            table = np.asarray(tensor[:], np.float32).reshape(rows[0], *shape)
            k, v = jnp.asarray(table.transpose(2, 1, 0, 3, 4))
            return Adaptation(decoder=LayerHooks(kv={"self": KV(k, v)}), shift=jnp.int32(rows[0]))
        raise UserError(
            f"{folder / WEIGHTS} holds {key} {rows}; expected {KEY} [P, {math.prod(shape)}] for this model's "
            f"{shape[0]} layers of 2 x {shape[2]} heads x {shape[3]}"
        )
    raise UserError(f"{folder / WEIGHTS} holds no tensor; expected {KEY}")

"""Gemma 2 and the text model of Gemma 3 (Gemma Team 2024, 2025): Llama with norms around each sublayer, and windows."""

from typing import Any

import jax.numpy as jnp

from prefix_tuning import nn
from prefix_tuning.attention import Attention
from prefix_tuning.errors import UserError, valid
from prefix_tuning.models import llama
from prefix_tuning.types import Compute, Model, Params

IGNORED = llama.IGNORED


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` for what Llama refuses, and for attention
    to later tokens."""
    kind = config["model_type"]
    third = kind == "gemma3_text"
    if config.get("use_bidirectional_attention"):
        raise UserError(f"{kind} with use_bidirectional_attention=true is not supported; expected false")
    cap = config.get("attn_logit_softcapping") if third else config["attn_logit_softcapping"]
    if third and cap is not None:
        raise UserError(f"gemma3_text with attn_logit_softcapping={cap} is not supported; expected null")
    pattern = config.get("sliding_window_pattern", 6) if third else 2  # every so many layers, one that sees all
    types = llama.layer_types(config, lambda layer: (layer + 1) % pattern != 0)
    kinds = llama.windows(types, config["sliding_window"])
    if third:
        kinds |= frequencies(config, types)
    variant = llama.Variant(
        biased=llama.attention_biases(config),
        head_norms=third,
        post_norms=True,
        centred=True,
        activation="hidden_activation",
        usual_activation="gelu_pytorch_tanh",
        tied=True,
        embedding_scale=config["hidden_size"] ** 0.5,
        logit_cap=config.get("final_logit_softcapping") if third else config["final_logit_softcapping"],
        attention=Attention(config["query_pre_attn_scalar"] ** -0.5, cap),
        kinds=kinds,
    )
    return llama.build_variant(config, variant, compute)


def frequencies(config: dict[str, Any], types: list[str]) -> Params:
    """The kind "frequencies" [L H/2] of Gemma 3, which turns slower where a layer sees everything."""
    size = llama.head_shape(config)[2]
    given = config.get("rope_parameters") or {llama.FULL: config.get("rope_scaling")}
    usual = {llama.FULL: config.get("rope_theta", 1e6), llama.SLIDING: config.get("rope_local_base_freq", 1e4)}
    for kind in given:
        valid("entry of rope_parameters", kind, usual)
    ropes = {kind: {"rope_theta": theta} | (given.get(kind) or {}) for kind, theta in usual.items()}
    tables = {kind: nn.rotary_frequencies({"rope_parameters": rope}, size) for kind, rope in ropes.items()}
    return {"frequencies": jnp.stack([tables[kind] for kind in types])}

"""BART (Lewis et al. 2020): learned positions, LayerNorm behind each sublayer, one embedding for all."""

from typing import Any

import jax.numpy as jnp

from prefix_tuning import nn
from prefix_tuning.errors import UserError, valid
from prefix_tuning.models import encoder, seq2seq
from prefix_tuning.types import Compute, Model, Params, Spec

OFFSET = 2  # rows of a position table before that of position 0
# What is tied to the one embedding, and buffers and heads that other files carry.
IGNORED = (
    r"(model\.)?(encoder|decoder)\.(embed_tokens\.weight|version)",
    r"lm_head\.weight",
    r"classification_head\..*",
    r"qa_outputs\..*",
)


def weights(config: dict[str, Any]) -> Params:
    """A `Spec` for every weight; what is added to logits is a buffer there, zeros unless a file says otherwise."""
    D, V, C = (config[name] for name in ("d_model", "vocab_size", "max_position_embeddings"))

    def stack(name):
        L, K, F = (config[f"{name}_{entry}"] for entry in ("layers", "attention_heads", "ffn_dim"))
        heads, source = (K, D // K), f"model.{name}.layers.{{layer}}"
        into, out = ("width", "kv_heads", "head"), ("kv_heads", "head", "width")

        def norm(their):
            axes = ("layers", "width")
            return {
                "scale": Spec((L, D), axes, "ones", f"{source}.{their}.weight"),
                "bias": Spec((L, D), axes, "zeros", f"{source}.{their}.bias"),
            }

        def linear(their, inner, outer, axes):
            n, shape = len(inner), (L, *inner, *outer)
            return {
                "kernel": Spec(shape, ("layers", *axes), "normal", f"{source}.{their}.weight", n, transposed=True),
                "bias": Spec((L, *outer), ("layers", *axes[n:]), "zeros", f"{source}.{their}.bias", 0),
            }

        def attention(their, prefix):
            made = {f"{prefix}{x}": linear(f"{their}.{x}_proj", (D,), heads, into) for x in "qkv"}
            return made | {f"{prefix}o": linear(f"{their}.out_proj", heads, (D,), out)}

        layers = attention("self_attn", "") | {"attention_norm": norm("self_attn_layer_norm")}
        if name == "decoder":
            layers |= attention("encoder_attn", "cross_") | {"cross_norm": norm("encoder_attn_layer_norm")}
        return layers | {
            "up": linear("fc1", (D,), (F,), ("width", "mlp")),
            "down": linear("fc2", (F,), (D,), ("mlp", "width")),
            "mlp_norm": norm("final_layer_norm"),
        }

    def outside(name):
        source, table = f"model.{name}.layernorm_embedding", f"model.{name}.embed_positions.weight"
        return {
            "positions": Spec((C + OFFSET, D), ("positions", "width"), "normal", table),
            "embedding_norm": {
                "scale": Spec((D,), ("width",), "ones", f"{source}.weight"),
                "bias": Spec((D,), ("width",), "zeros", f"{source}.bias"),
            },
        }

    buffer = Spec((1, V), (None, "vocabulary"), "zeros", "final_logits_bias", optional=True)
    return {
        "embedding": Spec((V, D), ("vocabulary", "width"), "normal", "model.shared.weight"),
        **{f"encoder_{name}": specs for name, specs in outside("encoder").items()},
        "encoder_layers": stack("encoder"),
        **outside("decoder"),
        "layers": stack("decoder"),
        "logits_buffer": buffer,
    }


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` for a variant whose arithmetic differs."""
    if not config.get("tie_word_embeddings", True):
        raise UserError("bart with tie_word_embeddings=false is not supported; expected true")
    if config.get("is_decoder"):
        raise UserError("bart with is_decoder=true is not supported; expected false")
    name = valid("activation_function", config.get("activation_function", "gelu"), nn.ACTIVATIONS)
    activation = nn.ACTIVATIONS[name]
    scale = config["d_model"] ** 0.5 if config.get("scale_embedding") else 1.0
    epsilon = 1e-5

    def embed(params, tokens):
        return nn.lookup(params["embedding"], tokens) * jnp.asarray(scale, params["embedding"].dtype)

    def place(params, embeddings, positions, prefix=""):
        x = embeddings + params[f"{prefix}positions"][positions + OFFSET]
        return nn.layer_norm(x, **params[f"{prefix}embedding_norm"], epsilon=epsilon)

    def read_place(params, embeddings, positions, types):
        del types  # BART knows none
        return place(params, embeddings, positions, "encoder_")

    def queries(layer, hooks, x):
        q, k, v = (nn.project(x, layer[name], hooks, name) for name in "qkv")
        return q[:, :, :, None], k, v

    def combine(layer, hooks, x, attended):
        attention = nn.project(attended[:, :, :, 0], layer["o"], hooks, "o", axes=2)
        return nn.layer_norm(x + nn.adapt(attention, x, hooks, "attention"), **layer["attention_norm"], epsilon=epsilon)

    def cross_combine(layer, hooks, x, attended):
        attention = nn.project(attended[:, :, :, 0], layer["cross_o"], hooks, "cross_o", axes=2)
        return nn.layer_norm(x + attention, **layer["cross_norm"], epsilon=epsilon)

    def mlp(layer, hooks, x):
        up = activation(nn.project(x, layer["up"], hooks, "up"))
        down = nn.adapt(nn.project(up, layer["down"], hooks, "down"), x, hooks, "mlp")
        x = nn.layer_norm(x + down, **layer["mlp_norm"], epsilon=epsilon)
        return nn.adapt(x, x, hooks, "block")

    def read_combine(layer, hooks, x, attended):
        return mlp(layer, hooks, combine(layer, hooks, x, attended))

    def unembed(params, hidden):
        logits = nn.vocabulary_scores(hidden, params["embedding"])
        return logits + params["logits_buffer"][0] if "logits_buffer" in params else logits

    def sites(stack):
        layers, K, F = (config[f"{stack}_{entry}"] for entry in ("layers", "attention_heads", "ffn_dim"))
        heads = (K, config["d_model"] // K)
        return seq2seq.stack_sites(stack, layers=layers, width=config["d_model"], heads=heads, mlp=F)

    return seq2seq.build(
        encoder.Layer(embed, read_place, queries, read_combine),
        seq2seq.Writer(
            place,
            queries,
            combine,
            seq2seq.cross_queries,
            seq2seq.cross_keys,
            cross_combine,
            mlp,
            lambda params, x: x,
            unembed,
        ),
        config=config,
        sites={stack: sites(stack) for stack in ("encoder", "decoder")},
        specs=weights(config),
        vocabulary=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        compute=compute,
    )

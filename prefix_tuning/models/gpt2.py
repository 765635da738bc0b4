"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each block, tied unembedding."""

from typing import Any

import jax.numpy as jnp

from prefix_tuning import nn
from prefix_tuning.errors import UserError, valid
from prefix_tuning.models import decoder
from prefix_tuning.types import Model, Params, Sites, Spec

# Causal masks that older files carry as buffers, and the unembedding, which is the embedding.
IGNORED = (r".*\.attn\.(bias|masked_bias)", r"lm_head\.weight")


def weights(config: dict[str, Any]) -> Params:
    """A `Spec` for every weight that config.json asks for; Conv1D kernels are stored [in, out], as they are here."""
    L, D, V, C = (config[k] for k in ("n_layer", "n_embd", "vocab_size", "n_positions"))
    K, F = config["n_head"], config.get("n_inner") or 4 * D
    H = D // K

    def norm(name):
        source = f"transformer.h.{{layer}}.{name}"
        axes = ("layers", "width")
        return {
            "scale": Spec((L, D), axes, "ones", f"{source}.weight"),
            "bias": Spec((L, D), axes, "zeros", f"{source}.bias"),
        }

    def linear(name, inner, outer, axes):
        source = f"transformer.h.{{layer}}.{name}"
        n = len(inner)
        return {
            "kernel": Spec((L, *inner, *outer), ("layers", *axes), "normal", f"{source}.weight", n),
            "bias": Spec((L, *outer), ("layers", *axes[n:]), "zeros", f"{source}.bias", 0),
        }

    return {
        "embedding": Spec((V, D), ("vocabulary", "width"), "normal", "transformer.wte.weight"),
        "positions": Spec((C, D), ("positions", "width"), "normal", "transformer.wpe.weight"),
        "layers": {
            "attention_norm": norm("ln_1"),
            "qkv": linear("attn.c_attn", (D,), (3, K, H), ("width", None, "kv_heads", "head")),
            "o": linear("attn.c_proj", (K, H), (D,), ("kv_heads", "head", "width")),
            "mlp_norm": norm("ln_2"),
            "up": linear("mlp.c_fc", (D,), (F,), ("width", "mlp")),
            "down": linear("mlp.c_proj", (F,), (D,), ("mlp", "width")),
        },
        "norm": {
            "scale": Spec((D,), ("width",), "ones", "transformer.ln_f.weight"),
            "bias": Spec((D,), ("width",), "zeros", "transformer.ln_f.bias"),
        },
    }


def build(config: dict[str, Any], *, scan: bool = True) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` for a variant whose arithmetic differs."""
    for flag, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("tie_word_embeddings", True),
    ):
        if config.get(flag, usual) is not usual:
            raise UserError(f"gpt2 with {flag}={config[flag]} is not supported; expected {usual}")
    if config.get("add_cross_attention"):
        raise UserError("gpt2 with add_cross_attention=true is not supported; expected false")
    K, H = config["n_head"], config["n_embd"] // config["n_head"]
    activation = nn.ACTIVATIONS[
        valid("activation_function", config.get("activation_function", "gelu_new"), nn.ACTIVATIONS)
    ]
    epsilon = config.get("layer_norm_epsilon", 1e-5)

    def embed(params, tokens, positions):
        return params["embedding"][tokens] + params["positions"][positions]

    def queries(layer, x, positions):
        del positions  # they are in the embedding
        qkv = nn.project(nn.layer_norm(x, **layer["attention_norm"], epsilon=epsilon), **layer["qkv"])  # [B T 3 K H]
        return qkv[:, :, 0, :, None], qkv[:, :, 1], qkv[:, :, 2]

    def combine(layer, x, attended):
        x = x + nn.project(attended[:, :, :, 0], **layer["o"], axes=2)
        y = nn.layer_norm(x, **layer["mlp_norm"], epsilon=epsilon)
        return x + nn.project(activation(nn.project(y, **layer["up"])), **layer["down"])

    def norm(params, x):
        return nn.layer_norm(x, **params["norm"], epsilon=epsilon)

    def unembed(params, hidden):
        return jnp.einsum("...d,vd->...v", hidden, params["embedding"], preferred_element_type=jnp.float32)

    return decoder.build(
        decoder.Layer(embed, queries, combine, norm, unembed),
        config=config,
        sites=Sites(config["n_layer"], config["n_embd"], {"self": (K, H)}),
        specs=weights(config),
        vocabulary=config["vocab_size"],
        max_positions=config["n_positions"],
        scan=scan,
    )

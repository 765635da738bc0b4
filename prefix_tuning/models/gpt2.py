"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each block, tied unembedding."""

from typing import Any

from prefix_tuning import nn
from prefix_tuning.errors import UserError, valid
from prefix_tuning.models import decoder
from prefix_tuning.types import Compute, Model, Params, Projection, Sites, Spec

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


def projections(config: dict[str, Any]) -> dict[str, Projection]:
    """The linear maps of a layer that can be changed: the fused "qkv", or one of its three parts."""
    D, K, F = config["n_embd"], config["n_head"], config.get("n_inner") or 4 * config["n_embd"]
    heads = (K, D // K)
    return {
        "qkv": Projection((D,), (3, *heads), "qkv"),
        "q": Projection((D,), heads, "qkv", part=0),
        "k": Projection((D,), heads, "qkv", part=1),
        "v": Projection((D,), heads, "qkv", part=2),
        "o": Projection(heads, (D,), "o"),
        "up": Projection((D,), (F,), "up"),
        "down": Projection((F,), (D,), "down"),
    }


def build(config: dict[str, Any], compute: Compute) -> Model:
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

    def embed(params, tokens):
        return nn.lookup(params["embedding"], tokens)

    def place(params, embeddings, positions):
        return embeddings + params["positions"][positions]

    def queries(layer, hooks, x, positions):
        del positions  # they are in the embedding
        x = nn.layer_norm(x, **layer["attention_norm"], epsilon=epsilon)
        qkv = nn.project(x, layer["qkv"], hooks, "qkv")  # [B T 3 K H]
        q, k, v = (nn.change(qkv[:, :, part], x, hooks, name) for part, name in enumerate("qkv"))
        return q[:, :, :, None], k, v

    def combine(layer, hooks, x, attended):
        read = nn.layer_norm(x, **layer["attention_norm"], epsilon=epsilon)
        attention = nn.project(attended[:, :, :, 0], layer["o"], hooks, "o", axes=2)
        x = x + nn.adapt(attention, read, hooks, "attention")
        read = nn.layer_norm(x, **layer["mlp_norm"], epsilon=epsilon)
        up = activation(nn.project(read, layer["up"], hooks, "up"))
        x = x + nn.adapt(nn.project(up, layer["down"], hooks, "down"), read, hooks, "mlp")
        return nn.adapt(x, x, hooks, "block")

    def norm(params, x):
        return nn.layer_norm(x, **params["norm"], epsilon=epsilon)

    def unembed(params, hidden):
        return nn.vocabulary_scores(hidden, params["embedding"])

    return decoder.build(
        decoder.Layer(embed, place, queries, combine, norm, unembed),
        config=config,
        sites=Sites(config["n_layer"], config["n_embd"], {"self": (K, H)}, {"self": 1}, projections(config)),
        specs=weights(config),
        vocabulary=config["vocab_size"],
        max_positions=config["n_positions"],
        compute=compute,
    )

"""The Llama family (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from typing import Any

import jax.numpy as jnp

from prefix_tuning import nn
from prefix_tuning.errors import valid
from prefix_tuning.models import decoder
from prefix_tuning.types import Model, Params, Projection, Sites, Spec

BIASED = {"attention_bias": True, "mlp_bias": True}  # the config.json of a model whose every projection has a bias
IGNORED = (r".*\.rotary_emb\.inv_freq",)  # a buffer that older files carry


def weights(config: dict[str, Any]) -> Params:
    """A `Spec` for every weight that config.json asks for."""
    L, D, V, F = (config[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"))
    K, G, H = head_shape(config)

    def norm(name):
        return Spec((L, D), ("layers", "width"), "ones", f"model.layers.{{layer}}.{name}.weight")

    def linear(name, inner, outer, axes, biased):
        source, n = f"model.layers.{{layer}}.{name}", len(inner)
        tree = {
            "kernel": Spec((L, *inner, *outer), ("layers", *axes), "normal", f"{source}.weight", n, transposed=True)
        }
        if biased:
            tree["bias"] = Spec((L, *outer), ("layers", *axes[n:]), "zeros", f"{source}.bias", 0)
        return tree

    attention, mlp = config.get("attention_bias", False), config.get("mlp_bias", False)
    tree = {
        "embedding": Spec((V, D), ("vocabulary", "width"), "normal", "model.embed_tokens.weight"),
        "layers": {
            "attention_norm": norm("input_layernorm"),
            "q": linear("self_attn.q_proj", (D,), (K, G, H), ("width", "kv_heads", "groups", "head"), attention),
            "k": linear("self_attn.k_proj", (D,), (K, H), ("width", "kv_heads", "head"), attention),
            "v": linear("self_attn.v_proj", (D,), (K, H), ("width", "kv_heads", "head"), attention),
            "o": linear("self_attn.o_proj", (K, G, H), (D,), ("kv_heads", "groups", "head", "width"), attention),
            "mlp_norm": norm("post_attention_layernorm"),
            "gate": linear("mlp.gate_proj", (D,), (F,), ("width", "mlp"), mlp),
            "up": linear("mlp.up_proj", (D,), (F,), ("width", "mlp"), mlp),
            "down": linear("mlp.down_proj", (F,), (D,), ("mlp", "width"), mlp),
        },
        "norm": Spec((D,), ("width",), "ones", "model.norm.weight"),
    }
    if not config.get("tie_word_embeddings", False):
        tree["unembedding"] = Spec((V, D), ("vocabulary", "width"), "normal", "lm_head.weight")
    return tree


def head_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """(K, G, H): key/value heads, query heads per key/value head, head size."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return kv_heads, heads // kv_heads, config.get("head_dim") or config["hidden_size"] // heads


def projections(config: dict[str, Any]) -> dict[str, Projection]:
    """The linear maps of a layer that can be changed."""
    K, G, H = head_shape(config)
    width, mlp = (config["hidden_size"],), (config["intermediate_size"],)
    shapes = {
        "q": (width, (K, G, H)),
        "k": (width, (K, H)),
        "v": (width, (K, H)),
        "o": ((K, G, H), width),
        "gate": (width, mlp),
        "up": (width, mlp),
        "down": (mlp, width),
    }
    return {name: Projection(*shape, weight=name) for name, shape in shapes.items()}


def build(config: dict[str, Any], *, scan: bool = True) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` for an unknown activation or rotary scaling."""
    K, G, H = head_shape(config)
    frequencies = nn.rotary_frequencies(config, H)
    activation = nn.ACTIVATIONS[valid("hidden_act", config.get("hidden_act", "silu"), nn.ACTIVATIONS)]
    epsilon = config.get("rms_norm_eps", 1e-6)

    def embed(params, tokens):
        return params["embedding"][tokens]

    def place(params, embeddings, positions):
        del params, positions  # keys and queries are turned instead
        return embeddings

    def queries(layer, hooks, x, positions):
        x = nn.rms_norm(x, layer["attention_norm"], epsilon)
        q, k, v = (nn.project(x, layer[name], hooks, name) for name in ("q", "k", "v"))
        return nn.rotate(q, positions, frequencies), nn.rotate(k, positions, frequencies), v

    def combine(layer, hooks, x, attended):
        read = nn.rms_norm(x, layer["attention_norm"], epsilon)
        attention = nn.project(attended, layer["o"], hooks, "o", axes=3)
        x = x + nn.adapt(attention, read, hooks, "attention")
        read = nn.rms_norm(x, layer["mlp_norm"], epsilon)
        gate, up = (nn.project(read, layer[name], hooks, name) for name in ("gate", "up"))
        mlp = nn.project(activation(gate) * up, layer["down"], hooks, "down")
        x = x + nn.adapt(mlp, read, hooks, "mlp")
        return nn.adapt(x, x, hooks, "block")

    def norm(params, x):
        return nn.rms_norm(x, params["norm"], epsilon)

    def unembed(params, hidden):
        table = params.get("unembedding", params["embedding"])
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    return decoder.build(
        decoder.Layer(embed, place, queries, combine, norm, unembed),
        config=config,
        sites=Sites(
            config["num_hidden_layers"], config["hidden_size"], {"self": (K, H)}, {"self": G}, projections(config)
        ),
        specs=weights(config),
        vocabulary=config["vocab_size"],
        max_positions=config.get("max_position_embeddings"),
        scan=scan,
    )

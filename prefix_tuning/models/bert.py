"""BERT (Devlin et al. 2019), LayerNorm after each sublayer, and what all families that are like it share."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from prefix_tuning import nn
from prefix_tuning.errors import UserError, valid
from prefix_tuning.models import encoder
from prefix_tuning.types import Compute, LayerHooks, Model, Params, Projection, Sites, Spec


class Names(NamedTuple):
    """Where a family's file keeps what all of them have."""

    embeddings: str
    layer: str  # with "{layer}"
    q: str
    k: str
    v: str
    o: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str
    types: bool = True  # whether there are embeddings of token types
    pooler: str | None = None
    # the head that predicts masked tokens: a projection, its LayerNorm, and the bias of the tied unembedding
    masked: tuple[str, str, str] | None = None


BERT = Names(
    embeddings="bert.embeddings",
    layer="bert.encoder.layer.{layer}",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
    pooler="bert.pooler.dense",
    masked=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
)
# A buffer, what is tied to the embedding, and heads of other tasks than predicting masked tokens.
IGNORED = (
    r".*embeddings\.position_ids",
    r"cls\.predictions\.decoder\.(weight|bias)",
    r"cls\.seq_relationship\..*",
    r"classifier\..*",
    r"qa_outputs\..*",
)


def weights(config: dict[str, Any], names: Names) -> Params:
    """A `Spec` for every weight; the pooler and the head for masked tokens are left out where a file has none."""
    L, D, V, F, C, K = (
        config[name]
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "vocab_size",
            "intermediate_size",
            "max_position_embeddings",
            "num_attention_heads",
        )
    )
    heads = (K, D // K)

    def norm(source, layered=True, optional=False):
        shape, axes = ((L, D), ("layers", "width")) if layered else ((D,), ("width",))
        return {
            "scale": Spec(shape, axes, "ones", f"{source}.weight", optional=optional),
            "bias": Spec(shape, axes, "zeros", f"{source}.bias", optional=optional),
        }

    def linear(name, inner, outer, axes):
        source, n = f"{names.layer}.{name}", len(inner)
        return {
            "kernel": Spec((L, *inner, *outer), ("layers", *axes), "normal", f"{source}.weight", n, transposed=True),
            "bias": Spec((L, *outer), ("layers", *axes[n:]), "zeros", f"{source}.bias", 0),
        }

    def dense(source):
        axes = ("width", "width_out")
        return {
            "kernel": Spec((D, D), axes, "normal", f"{source}.weight", 1, transposed=True, optional=True),
            "bias": Spec((D,), axes[1:], "zeros", f"{source}.bias", optional=True),
        }

    into, out = ("width", "kv_heads", "head"), ("kv_heads", "head", "width")
    tree = {
        "embedding": Spec((V, D), ("vocabulary", "width"), "normal", f"{names.embeddings}.word_embeddings.weight"),
        "positions": Spec((C, D), ("positions", "width"), "normal", f"{names.embeddings}.position_embeddings.weight"),
        "embedding_norm": norm(f"{names.embeddings}.LayerNorm", layered=False),
        "layers": {
            **{name: linear(getattr(names, name), (D,), heads, into) for name in "qkv"},
            "o": linear(names.o, heads, (D,), out),
            "attention_norm": norm(f"{names.layer}.{names.attention_norm}"),
            "up": linear(names.up, (D,), (F,), ("width", "mlp")),
            "down": linear(names.down, (F,), (D,), ("mlp", "width")),
            "mlp_norm": norm(f"{names.layer}.{names.mlp_norm}"),
        },
    }
    if names.types:
        count, source = config["type_vocab_size"], f"{names.embeddings}.token_type_embeddings.weight"
        tree["types"] = Spec((count, D), (None, "width"), "normal", source)
    if names.pooler is not None:
        tree["pooler"] = dense(names.pooler)
    if names.masked is not None:
        projection, normalised, bias = names.masked
        tree["masked"] = {
            "dense": dense(projection),
            "norm": norm(normalised, layered=False, optional=True),
            "bias": Spec((V,), ("vocabulary",), "zeros", bias, optional=True),
        }
    return tree


def projections(config: dict[str, Any]) -> dict[str, Projection]:
    """The linear maps of a layer that can be changed."""
    D, K = config["hidden_size"], config["num_attention_heads"]
    width, heads, mlp = (D,), (K, D // K), (config["intermediate_size"],)
    shapes = dict.fromkeys("qkv", (width, heads)) | {"o": (heads, width), "up": (width, mlp), "down": (mlp, width)}
    return {name: Projection(*shape, weight=name) for name, shape in shapes.items()}


def build(config: dict[str, Any], compute: Compute, *, names: Names = BERT, first_position: int = 0) -> Model:
    """A `Model` from the contents of config.json; `first_position` is the row of the position table for position 0.

    Raises `UserError` for an unknown activation and for a variant whose arithmetic differs.
    """
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise UserError(
            f"{config['model_type']} with position_embedding_type={kind!r} is not supported; valid: absolute"
        )
    if config.get("is_decoder"):
        raise UserError(f"{config['model_type']} with is_decoder=true is not supported; expected false")
    K, H = config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"]
    activation = nn.ACTIVATIONS[valid("hidden_act", config.get("hidden_act", "gelu"), nn.ACTIVATIONS)]
    epsilon = config.get("layer_norm_eps", 1e-12)

    def embed(params, tokens):
        return nn.lookup(params["embedding"], tokens)

    def place(params, embeddings, positions, types):
        x = embeddings + params["positions"][positions + first_position]
        if names.types:
            x = x + params["types"][jnp.minimum(types, len(params["types"]) - 1)]  # RoBERTa has one type for both texts
        return nn.layer_norm(x, **params["embedding_norm"], epsilon=epsilon)

    def queries(layer, hooks, x):
        q, k, v = (nn.project(x, layer[name], hooks, name) for name in "qkv")
        return q[:, :, :, None], k, v

    def combine(layer, hooks, x, attended):
        attention = nn.project(attended[:, :, :, 0], layer["o"], hooks, "o", axes=2)
        x = nn.layer_norm(x + nn.adapt(attention, x, hooks, "attention"), **layer["attention_norm"], epsilon=epsilon)
        up = activation(nn.project(x, layer["up"], hooks, "up"))
        mlp = nn.adapt(nn.project(up, layer["down"], hooks, "down"), x, hooks, "mlp")
        x = nn.layer_norm(x + mlp, **layer["mlp_norm"], epsilon=epsilon)
        return nn.adapt(x, x, hooks, "block")

    def pool(params, hidden):
        if "pooler" not in params:
            return hidden
        return jnp.tanh(nn.project(hidden, params["pooler"], LayerHooks(), "pooler"))

    def unembed(params, hidden):
        if "masked" not in params:
            raise UserError(f"this {config['model_type']} model has no head that predicts masked tokens")
        head = params["masked"]
        x = activation(nn.project(hidden, head["dense"], LayerHooks(), "masked"))
        x = nn.layer_norm(x, **head["norm"], epsilon=epsilon)
        return nn.vocabulary_scores(x, params["embedding"]) + head["bias"]

    return encoder.build(
        encoder.Layer(embed, place, queries, combine),
        pool=pool,
        unembed=unembed,
        config=config,
        sites=Sites(
            config["num_hidden_layers"], config["hidden_size"], {"self": (K, H)}, {"self": 1}, projections(config)
        ),
        specs=weights(config, names),
        vocabulary=config["vocab_size"],
        max_positions=config["max_position_embeddings"] - first_position,
        compute=compute,
    )

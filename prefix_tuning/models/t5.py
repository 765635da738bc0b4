"""T5 (Raffel et al. 2020), its 1.1 and Flan versions and mT5: relative positions, unscaled scores, RMSNorm before all.

1.0 has a ReLU MLP and scales what it unembeds with the embedding; 1.1 has a gated MLP and an unembedding of its own.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from prefix_tuning import nn
from prefix_tuning.attention import Attention
from prefix_tuning.errors import UserError, valid
from prefix_tuning.models import encoder, seq2seq
from prefix_tuning.types import Compute, Model, Params, Spec

# What is tied to the one embedding, and a table that old files carry and nothing reads.
IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"lm_head\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)


def depth(config: dict[str, Any], stack: str) -> int:
    """How many layers a stack has."""
    layers = config["num_layers"]
    return layers if stack == "encoder" else config.get("num_decoder_layers") or layers


def is_gated(config: dict[str, Any]) -> bool:
    """Whether the MLP has a gate."""
    return config.get("feed_forward_proj", "relu").startswith("gated-")


def scales(config: dict[str, Any]) -> bool:
    """Whether what is unembedded is scaled first, as in 1.0 and never in mT5.

    transformers 5 writes it down; before, untied embeddings told the versions apart, and tied ones were always scaled.
    """
    return config["model_type"] == "t5" and config.get(
        "scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False
    )


def weights(config: dict[str, Any]) -> Params:
    """A `Spec` for every weight; 1.1's unembedding may be the embedding, and so missing, in files of transformers 5."""
    D, V, K, H, F = (config[name] for name in ("d_model", "vocab_size", "num_heads", "d_kv", "d_ff"))
    buckets = config.get("relative_attention_num_buckets", 32)

    def stack(name):
        L, into, out = depth(config, name), ("width", "kv_heads", "head"), ("kv_heads", "head", "width")
        source = f"{name}.block.{{layer}}.layer"

        def norm(number):
            return {"scale": Spec((L, D), ("layers", "width"), "ones", f"{source}.{number}.layer_norm.weight")}

        def linear(their, inner, outer, axes):
            shape = (L, *inner, *outer)
            names = ("layers", *axes)
            return {"kernel": Spec(shape, names, "normal", f"{source}.{their}.weight", len(inner), transposed=True)}

        def attention(their, prefix):
            made = {f"{prefix}{x}": linear(f"{their}.{x}", (D,), (K, H), into) for x in "qkv"}
            return made | {f"{prefix}o": linear(f"{their}.o", (K, H), (D,), out)}

        layers = attention("0.SelfAttention", "") | {"attention_norm": norm(0)}
        last = 1
        if name == "decoder":
            layers |= attention("1.EncDecAttention", "cross_") | {"cross_norm": norm(1)}
            last = 2
        names = {"gate": "wi_0", "up": "wi_1"} if is_gated(config) else {"up": "wi"}
        for own, their in names.items():
            layers[own] = linear(f"{last}.DenseReluDense.{their}", (D,), (F,), ("width", "mlp"))
        layers["down"] = linear(f"{last}.DenseReluDense.wo", (F,), (D,), ("mlp", "width"))
        return layers | {"mlp_norm": norm(last)}

    def outside(name):
        table = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return {
            "distances": Spec((buckets, K), (None, "kv_heads"), "normal", table),
            "norm": {"scale": Spec((D,), ("width",), "ones", f"{name}.final_layer_norm.weight")},
        }

    tree = {
        "embedding": Spec((V, D), ("vocabulary", "width"), "normal", "shared.weight"),
        **{f"encoder_{name}": specs for name, specs in outside("encoder").items()},
        "encoder_layers": stack("encoder"),
        **outside("decoder"),
        "layers": stack("decoder"),
    }
    if not scales(config):
        optional = config.get("tie_word_embeddings", True)
        tree["unembedding"] = Spec((V, D), ("vocabulary", "width"), "normal", "lm_head.weight", optional=optional)
    return tree


def bucket(distance: Array, *, both_ways: bool, buckets: int, farthest: int) -> Array:
    """The bucket of each distance, key minus query, in tokens (Raffel et al. 2020, section 2.1).

    The first half of the buckets of a direction hold one distance each, the others wider and wider ranges up to
    `farthest`.  With one direction only, what comes after the query shares the bucket of distance 0.
    """
    first = 0
    if both_ways:
        buckets //= 2
        first = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    share = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(farthest / exact)
    wide = jnp.minimum(exact + (share * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return first + jnp.where(distance < exact, distance, wide)


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` for an unknown activation and for a decoder."""
    if config.get("is_decoder"):
        raise UserError(f"{config['model_type']} with is_decoder=true is not supported; expected false")
    gated = is_gated(config)
    name = config.get("feed_forward_proj", "relu").removeprefix("gated-")
    # Their gated "gelu" always was the tanh approximation.
    name = "gelu_new" if gated and name == "gelu" else name
    activation = nn.ACTIVATIONS[valid("feed_forward_proj", name, nn.ACTIVATIONS)]
    epsilon = config.get("layer_norm_epsilon", 1e-6)
    sizes = {
        "buckets": config.get("relative_attention_num_buckets", 32),
        "farthest": config.get("relative_attention_max_distance", 128),
    }

    def embed(params, tokens):
        return nn.lookup(params["embedding"], tokens)

    def bias(params, stack, queries, keys):
        reads = stack == "encoder"
        table = params["encoder_distances" if reads else "distances"]  # [buckets K]
        found = bucket(keys[None] - queries[:, None], both_ways=reads, **sizes)
        return jnp.moveaxis(table[found].astype(jnp.float32), -1, 0)[:, None]  # [K 1 T S]

    def normed(layer, name, x):
        return nn.rms_norm(x, layer[name]["scale"], epsilon)

    def queries(layer, hooks, x):
        x = normed(layer, "attention_norm", x)
        q, k, v = (nn.project(x, layer[name], hooks, name) for name in "qkv")
        return q[:, :, :, None], k, v

    def combine(layer, hooks, x, attended):
        attention = nn.project(attended[:, :, :, 0], layer["o"], hooks, "o", axes=2)
        return x + nn.adapt(attention, normed(layer, "attention_norm", x), hooks, "attention")

    def cross_queries(layer, hooks, x):
        return seq2seq.cross_queries(layer, hooks, normed(layer, "cross_norm", x))

    def cross_combine(layer, hooks, x, attended):
        return x + nn.project(attended[:, :, :, 0], layer["cross_o"], hooks, "cross_o", axes=2)

    def mlp(layer, hooks, x):
        read = normed(layer, "mlp_norm", x)
        up = nn.project(read, layer["up"], hooks, "up")
        up = nn.glu(activation, nn.project(read, layer["gate"], hooks, "gate"), up) if gated else activation(up)
        x = x + nn.adapt(nn.project(up, layer["down"], hooks, "down"), read, hooks, "mlp")
        return nn.adapt(x, x, hooks, "block")

    def unembed(params, hidden):
        table = params.get("unembedding", params["embedding"])
        if scales(config):
            hidden = hidden * jnp.asarray(config["d_model"] ** -0.5, hidden.dtype)
        return nn.vocabulary_scores(hidden, table)

    def sites(stack):
        return seq2seq.stack_sites(
            stack,
            layers=depth(config, stack),
            width=config["d_model"],
            heads=(config["num_heads"], config["d_kv"]),
            mlp=config["d_ff"],
            into=("gate", "up") if gated else ("up",),
        )

    return seq2seq.build(
        encoder.Layer(
            embed,
            lambda params, embeddings, positions, types: embeddings,
            queries,
            lambda layer, hooks, x, attended: mlp(layer, hooks, combine(layer, hooks, x, attended)),
            lambda params, x: normed(params, "encoder_norm", x),
        ),
        seq2seq.Writer(
            lambda params, embeddings, positions: embeddings,
            queries,
            combine,
            cross_queries,
            seq2seq.cross_keys,
            cross_combine,
            mlp,
            lambda params, x: normed(params, "norm", x),
            unembed,
        ),
        config=config,
        sites={stack: sites(stack) for stack in ("encoder", "decoder")},
        specs=weights(config),
        vocabulary=config["vocab_size"],
        max_positions=None,
        how=Attention(scale=1.0),
        bias=bias,
        compute=compute,
    )

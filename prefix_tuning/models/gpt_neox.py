"""GPT-NeoX and Pythia (Black et al. 2022): attention and MLP read the same x, and part of each head is turned."""

from typing import Any

from prefix_tuning import nn
from prefix_tuning.errors import valid
from prefix_tuning.models import decoder
from prefix_tuning.types import Compute, Model, Params, Projection, Sites, Spec

# Causal masks and frequencies that older files carry as buffers.
IGNORED = (r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)


def weights(config: dict[str, Any]) -> Params:
    """A `Spec` for every weight that config.json asks for."""
    L, D, V, F = (config[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"))
    K = config["num_attention_heads"]
    H, biased = D // K, config.get("attention_bias", True)

    def norm(source, *layers):
        shape, axes = (*layers, D), (*["layers"] * len(layers), "width")
        return {
            "scale": Spec(shape, axes, "ones", f"gpt_neox.{source}.weight"),
            "bias": Spec(shape, axes, "zeros", f"gpt_neox.{source}.bias"),
        }

    def linear(name, inner, outer, axes, biased=True, part=None):
        source, n = f"gpt_neox.layers.{{layer}}.{name}", len(inner)
        shape = (L, *inner, *outer)
        tree = {"kernel": Spec(shape, ("layers", *axes), "normal", f"{source}.weight", n, transposed=True, part=part)}
        if biased:
            tree["bias"] = Spec((L, *outer), ("layers", *axes[n:]), "zeros", f"{source}.bias", 0, part=part)
        return tree

    def third(n):
        # The file has q, k and v of the first head, then of the second, and so on.
        axes = ("width", "kv_heads", "head")
        return linear("attention.query_key_value", (D,), (K, H), axes, biased, (n * H, 3 * H, K))

    tree = {
        "embedding": Spec((V, D), ("vocabulary", "width"), "normal", "gpt_neox.embed_in.weight"),
        "layers": {
            "attention_norm": norm("layers.{layer}.input_layernorm", L),
            **{name: third(n) for n, name in enumerate("qkv")},
            "o": linear("attention.dense", (K, H), (D,), ("kv_heads", "head", "width"), biased),
            "mlp_norm": norm("layers.{layer}.post_attention_layernorm", L),
            "up": linear("mlp.dense_h_to_4h", (D,), (F,), ("width", "mlp")),
            "down": linear("mlp.dense_4h_to_h", (F,), (D,), ("mlp", "width")),
        },
        "norm": norm("final_layer_norm"),
    }
    if not config.get("tie_word_embeddings", False):
        tree["unembedding"] = Spec((V, D), ("vocabulary", "width"), "normal", "embed_out.weight")
    return tree


def projections(config: dict[str, Any]) -> dict[str, Projection]:
    """The linear maps of a layer that can be changed."""
    D, K, F = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    heads = (K, D // K)
    shapes = dict.fromkeys("qkv", ((D,), heads))
    shapes |= {"o": (heads, (D,)), "up": ((D,), (F,)), "down": ((F,), (D,))}
    return {name: Projection(*shape, weight=name) for name, shape in shapes.items()}


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` for an unknown activation or rotary scaling."""
    K, H = config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    theta = {"rope_theta": config.get("rotary_emb_base", 10000.0)}
    frequencies = nn.rotary_frequencies({"rope_parameters": theta | rope}, int(H * share))
    activation = nn.ACTIVATIONS[valid("hidden_act", config.get("hidden_act", "gelu"), nn.ACTIVATIONS)]
    epsilon = config.get("layer_norm_eps", 1e-5)
    parallel = config.get("use_parallel_residual", True)

    def embed(params, tokens):
        return nn.lookup(params["embedding"], tokens)

    def place(params, embeddings, positions):
        del params, positions  # keys and queries are turned instead
        return embeddings

    def queries(layer, hooks, x, positions):
        x = nn.layer_norm(x, **layer["attention_norm"], epsilon=epsilon)
        q, k, v = (nn.project(x, layer[name], hooks, name) for name in "qkv")
        return nn.rotate(q, positions, frequencies)[:, :, :, None], nn.rotate(k, positions, frequencies), v

    def combine(layer, hooks, x, attended):
        read = nn.layer_norm(x, **layer["attention_norm"], epsilon=epsilon)
        attention = nn.project(attended[:, :, :, 0], layer["o"], hooks, "o", axes=2)
        after = x + nn.adapt(attention, read, hooks, "attention")
        read = nn.layer_norm(x if parallel else after, **layer["mlp_norm"], epsilon=epsilon)
        up = activation(nn.project(read, layer["up"], hooks, "up"))
        x = after + nn.adapt(nn.project(up, layer["down"], hooks, "down"), read, hooks, "mlp")
        return nn.adapt(x, x, hooks, "block")

    def norm(params, x):
        return nn.layer_norm(x, **params["norm"], epsilon=epsilon)

    def unembed(params, hidden):
        return nn.vocabulary_scores(hidden, params.get("unembedding", params["embedding"]))

    return decoder.build(
        decoder.Layer(embed, place, queries, combine, norm, unembed),
        config=config,
        sites=Sites(
            config["num_hidden_layers"], config["hidden_size"], {"self": (K, H)}, {"self": 1}, projections(config)
        ),
        specs=weights(config),
        vocabulary=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        compute=compute,
    )

"""The Llama family (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, gated MLP.

Its relatives are modules of their own, which say in a `Variant` what they do differently.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from prefix_tuning import nn
from prefix_tuning.attention import PLAIN, Attention
from prefix_tuning.errors import UserError, valid
from prefix_tuning.models import decoder
from prefix_tuning.types import Compute, Model, Params, Projection, Sites, Spec

BIASED = {"attention_bias": True, "mlp_bias": True}  # the config.json of a model whose every projection has a bias
IGNORED = (r".*\.rotary_emb\.inv_freq",)  # a buffer that older files carry
FULL, SLIDING = "full_attention", "sliding_attention"


class Variant(NamedTuple):
    """What tells a relative from Llama; the defaults are Llama's."""

    biased: tuple[str, ...] = ()  # the projections that have a bias
    fused: bool = False  # files hold q, k and v as one matrix, gate and up as another (Phi-3)
    head_norms: bool = False  # queries and keys are normalised in each head, before they are turned (Qwen3)
    post_norms: bool = False  # what a sublayer adds is normalised once more (Gemma 2)
    centred: bool = False  # norms multiply by 1 + scale, in float32 (Gemma)
    activation: str = "hidden_act"  # the entry of config.json that names it
    usual_activation: str = "silu"
    tied: bool = False  # whether the unembedding is the embedding, where config.json does not say
    embedding_scale: float | None = None  # what embeddings are multiplied by, rounded to their dtype
    logit_cap: float | None = None  # c: logits become c tanh(logit / c)
    attention: Attention = PLAIN
    rotary_share: float = 1.0  # of each head's H numbers, how much is turned
    kinds: Params | None = None  # as in `decoder.build`; "frequencies" [L H/2] where they differ from layer to layer


def weights(config: dict[str, Any], variant: Variant) -> Params:
    """A `Spec` for every weight that config.json asks for."""
    L, D, V, F = (config[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"))
    K, G, H = head_shape(config)
    scales = "zeros" if variant.centred else "ones"
    queries, keys = K * G * H, K * H
    qkv = queries + 2 * keys
    # Where a fused file keeps a projection: the matrix, and which `part` of it this one is.
    fused = {
        "q": ("self_attn.qkv_proj", (0, qkv, 1)),
        "k": ("self_attn.qkv_proj", (queries, qkv, 1)),
        "v": ("self_attn.qkv_proj", (queries + keys, qkv, 1)),
        "gate": ("mlp.gate_up_proj", (0, 2 * F, 1)),
        "up": ("mlp.gate_up_proj", (F, 2 * F, 1)),
    }

    def norm(name, size=(D,), axes=("width",)):
        return Spec((L, *size), ("layers", *axes), scales, f"model.layers.{{layer}}.{name}.weight")

    def linear(site, name, inner, outer, axes):
        name, part = fused[site] if variant.fused and site in fused else (name, None)
        source, n = f"model.layers.{{layer}}.{name}", len(inner)
        shape, axes = (L, *inner, *outer), ("layers", *axes)
        tree = {"kernel": Spec(shape, axes, "normal", f"{source}.weight", n, transposed=True, part=part)}
        if site in variant.biased:
            tree["bias"] = Spec((L, *outer), ("layers", *axes[1 + n :]), "zeros", f"{source}.bias", 0, part=part)
        return tree

    layers = {
        "attention_norm": norm("input_layernorm"),
        "q": linear("q", "self_attn.q_proj", (D,), (K, G, H), ("width", "kv_heads", "groups", "head")),
        "k": linear("k", "self_attn.k_proj", (D,), (K, H), ("width", "kv_heads", "head")),
        "v": linear("v", "self_attn.v_proj", (D,), (K, H), ("width", "kv_heads", "head")),
        "o": linear("o", "self_attn.o_proj", (K, G, H), (D,), ("kv_heads", "groups", "head", "width")),
        "mlp_norm": norm("pre_feedforward_layernorm" if variant.post_norms else "post_attention_layernorm"),
        "gate": linear("gate", "mlp.gate_proj", (D,), (F,), ("width", "mlp")),
        "up": linear("up", "mlp.up_proj", (D,), (F,), ("width", "mlp")),
        "down": linear("down", "mlp.down_proj", (F,), (D,), ("mlp", "width")),
    }
    if variant.post_norms:
        layers["attention_post_norm"] = norm("post_attention_layernorm")
        layers["mlp_post_norm"] = norm("post_feedforward_layernorm")
    if variant.head_norms:
        layers["q_norm"] = norm("self_attn.q_norm", (H,), ("head",))
        layers["k_norm"] = norm("self_attn.k_norm", (H,), ("head",))
    tree = {
        "embedding": Spec((V, D), ("vocabulary", "width"), "normal", "model.embed_tokens.weight"),
        "layers": layers,
        "norm": Spec((D,), ("width",), scales, "model.norm.weight"),
    }
    if not config.get("tie_word_embeddings", variant.tied):
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


def attention_biases(config: dict[str, Any]) -> tuple[str, ...]:
    """The projections that `attention_bias` gives a bias to."""
    return ("q", "k", "v", "o") if config.get("attention_bias") else ()


def layer_types(config: dict[str, Any], slides: Callable[[int], bool]) -> list[str]:
    """`FULL` or `SLIDING` for each layer: what config.json lists or, where it lists nothing, `slides(layer)`."""
    L = config["num_hidden_layers"]
    types = config.get("layer_types") or [SLIDING if slides(layer) else FULL for layer in range(L)]
    if len(types) != L:
        raise UserError(f"layer_types of config.json has {len(types)} entries; expected one for each of {L} layers")
    return [valid("entry of layer_types", kind, (FULL, SLIDING)) for kind in types]


def windows(types: list[str], window: int | None) -> Params:
    """The kind "window" [L], or none if no layer slides; raises `UserError` for one that slides without a window."""
    if SLIDING not in types:
        return {}
    if not isinstance(window, int) or window < 1:
        raise UserError(f"config.json has layers of {SLIDING} and sliding_window {window!r}; expected at least 1")
    unbounded = np.iinfo(np.int32).max
    return {"window": np.array([window if kind == SLIDING else unbounded for kind in types], np.int32)}


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` for an unknown activation or rotary scaling."""
    mlp = ("gate", "up", "down") if config.get("mlp_bias") else ()
    return build_variant(config, Variant(biased=(*attention_biases(config), *mlp)), compute)


def build_variant(config: dict[str, Any], variant: Variant, compute: Compute) -> Model:
    """`build` for a relative."""
    K, G, H = head_shape(config)
    kinds = variant.kinds or {}
    shared = None if "frequencies" in kinds else nn.rotary_frequencies(config, int(H * variant.rotary_share))
    named = config.get(variant.activation, variant.usual_activation)
    activation = nn.ACTIVATIONS[valid(variant.activation, named, nn.ACTIVATIONS)]
    epsilon = config.get("rms_norm_eps", 1e-6)

    def normalise(x, scale):
        if variant.centred:
            return nn.rms_norm(x.astype(jnp.float32), 1 + scale.astype(jnp.float32), epsilon).astype(x.dtype)
        return nn.rms_norm(x, scale, epsilon)

    def embed(params, tokens):
        x = nn.lookup(params["embedding"], tokens)
        return x if variant.embedding_scale is None else x * jnp.asarray(variant.embedding_scale, x.dtype)

    def place(params, embeddings, positions):
        del params, positions  # keys and queries are turned instead
        return embeddings

    def queries(layer, hooks, x, positions):
        x = normalise(x, layer["attention_norm"])
        q, k, v = (nn.project(x, layer[name], hooks, name) for name in ("q", "k", "v"))
        if variant.head_norms:
            q, k = normalise(q, layer["q_norm"]), normalise(k, layer["k_norm"])
        frequencies = layer.get("frequencies", shared)
        return nn.rotate(q, positions, frequencies), nn.rotate(k, positions, frequencies), v

    def add(layer, hooks, x, y, read, site):
        """x plus what a sublayer makes of `read`; an adapter is behind the norm that a family has here, so that, as
        in those that have none, what it gives is what the residual stream gets."""
        if variant.post_norms:
            y = normalise(y, layer[f"{site}_post_norm"])
        return x + nn.adapt(y, read, hooks, site)

    def combine(layer, hooks, x, attended):
        read = normalise(x, layer["attention_norm"])
        x = add(layer, hooks, x, nn.project(attended, layer["o"], hooks, "o", axes=3), read, "attention")
        read = normalise(x, layer["mlp_norm"])
        gate, up = (nn.project(read, layer[name], hooks, name) for name in ("gate", "up"))
        x = add(layer, hooks, x, nn.project(nn.glu(activation, gate, up), layer["down"], hooks, "down"), read, "mlp")
        return nn.adapt(x, x, hooks, "block")

    def norm(params, x):
        return normalise(x, params["norm"])

    def unembed(params, hidden):
        table = params.get("unembedding", params["embedding"])
        return nn.capped(nn.vocabulary_scores(hidden, table), variant.logit_cap)

    return decoder.build(
        decoder.Layer(embed, place, queries, combine, norm, unembed),
        config=config,
        sites=Sites(
            config["num_hidden_layers"], config["hidden_size"], {"self": (K, H)}, {"self": G}, projections(config)
        ),
        specs=weights(config, variant),
        vocabulary=config["vocab_size"],
        max_positions=config.get("max_position_embeddings"),
        how=variant.attention,
        kinds=kinds,
        compute=compute,
    )

"""Attention to tokens and to slots, shared or not, masked or gated, against loops; at once and in parts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import LLAMA, B, K, L, P, T

from prefix_tuning import attention, models
from prefix_tuning.errors import UserError
from prefix_tuning.models import loading
from prefix_tuning.types import KV, Adaptation, Batch, LayerHooks, Memory

G, H = 4, 6


@jax.jit
def attend(q, k, v, mask, prefixes=(), share=None):
    return attention.attend(q, k, v, mask, [prefix.replace(share=share) for prefix in prefixes])


def written_out(q, k, v, mask, prefixes, share):
    """Every query head by itself; masked slots are taken out, and a gated prefix has a softmax of its own."""
    out = np.zeros(q.shape)
    for b, t, j, g in np.ndindex(*q.shape[:4]):
        query, scale = torch.tensor(q[b, t, j, g]), 1.0 if share is None else share[b, t]

        def slots(prefix, b=b, j=j, query=query, scale=scale):
            keys, values = (torch.tensor((x[b] if x.ndim == 4 else x)[:, j]) for x in (prefix.k, prefix.v))
            if prefix.mask is not None:
                there = torch.tensor(prefix.mask[b] if prefix.mask.ndim == 2 else prefix.mask)
                keys, values = keys[there], values[there]
            return scale * keys @ query / len(query) ** 0.5, scale * values

        parts = [(torch.tensor(k[b, mask[b, t], j]) @ query / len(query) ** 0.5, torch.tensor(v[b, mask[b, t], j]))]
        parts += [slots(prefix) for prefix in prefixes if prefix.gate is None]
        scores, values = (torch.cat(x) for x in zip(*parts, strict=True))
        out[b, t, j, g] = torch.softmax(scores, 0) @ values
        for prefix in prefixes:
            if prefix.gate is not None:
                scores, values = slots(prefix)
                out[b, t, j, g] += prefix.gate[j, g] * (torch.softmax(scores, 0) @ values).numpy()
    return out


# --- A prefix


def one_prefix(seed, slots=9):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, K, G, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, slots, K, H)).astype(np.float32)
    mask = rng.random((B, T, slots)) < 0.6
    mask[:, :, 0] = True  # every query sees something
    prefix_k, prefix_v = rng.normal(size=(2, B, P, K, H)).astype(np.float32)
    return q, k, v, mask, prefix_k, prefix_v


@pytest.mark.parametrize("kind", ["none", "shared", "per row"])
def test_attention_is_what_the_loops_say(kind):
    q, k, v, mask, prefix_k, prefix_v = one_prefix(0)
    every = {"none": (), "shared": (KV(prefix_k[0], prefix_v[0]),), "per row": (KV(prefix_k, prefix_v),)}
    prefixes = every[kind]
    out = attend(q, k, v, mask, prefixes)
    assert out.shape == (B, T, K, G, H)
    np.testing.assert_allclose(out, written_out(q, k, v, mask, prefixes, None), atol=2e-6)


def test_prefix_is_a_gate():
    """He et al. 2021, eq. 5: (1 - gate) attention without prefix + gate attention to the prefix alone."""
    q, k, v, mask, prefix_k, prefix_v = one_prefix(1)
    both = attend(q, k, v, mask, (KV(prefix_k, prefix_v),))
    without = attend(q, k, v, mask)
    alone = attend(q, prefix_k, prefix_v, np.ones((B, T, P), bool))
    scale = np.sqrt(H)
    mass = np.exp(np.einsum("btkgh,bpkh->btkgp", q, prefix_k) / scale).sum(-1)
    seen = np.exp(np.einsum("btkgh,bskh->btkgs", q, k) / scale)
    gate = (mass / (mass + (seen * mask[:, :, None, None]).sum(-1)))[..., None]
    assert 0 < gate.min() < 0.2
    assert 0.8 < gate.max() < 1
    np.testing.assert_allclose(both, (1 - gate) * without + gate * alone, atol=2e-6)


def test_attention_of_a_prefix_that_takes_all_or_nothing():
    q, k, v, mask, prefix_k, prefix_v = one_prefix(2)
    rows = np.abs(q[:, :, :, :1]) + 1
    far = np.full_like(prefix_k, -1e3)
    np.testing.assert_allclose(attend(rows, k, v, mask, (KV(far, prefix_v),)), attend(rows, k, v, mask), atol=1e-6)
    every = np.ones((B, T, P), bool)
    np.testing.assert_allclose(
        attend(rows, k, v, mask, (KV(-far, prefix_v),)), attend(rows, -far, prefix_v, every), atol=1e-6
    )


def test_half_precision_attends_to_large_values():
    q, k, v, mask, prefix_k, prefix_v = (np.ones_like(x, np.float16) for x in one_prefix(3))
    large = 3e4 * v  # two of them are more than float16 holds
    out = attend(q, k, large, mask > 0, (KV(prefix_k, 3e4 * prefix_v),))
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, np.full(q.shape, 3e4), rtol=1e-3)


# --- Slots of every kind


def attention_inputs(seed, heads=3, size=6, rows=4):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    k, v = draw(2, rows, 8, K, size)
    mask = rng.random((rows, T, 8)) < 0.6
    mask[:, :, 0] = True
    there = rng.random((5, rows, P)) < 0.6
    there[:, :, 1], there[0, 0] = True, False  # no slot at all in one row
    prefixes = (
        KV(*draw(2, rows, P, K, size), mask=there[0]),
        KV(*draw(2, P, K, size), mask=there[1, 0]),
        KV(*draw(2, P, K, size), gate=draw(K, heads)),
        KV(*draw(2, P + 1, K, size)),
        KV(*draw(2, P, K, size), mask=there[2]),
        KV(*draw(2, rows, P, K, size), mask=there[3], gate=draw(K, heads)),
    )
    return draw(rows, T, K, heads, size), k, v, mask, prefixes, rng.uniform(size=(rows, T)).astype(np.float32)


@pytest.mark.parametrize("shared", [True, False], ids=["share", "no share"])
def test_attention_to_slots_with_masks_and_gates_is_what_the_loops_say(shared):
    *inputs, share = attention_inputs(0)
    share = share if shared else None
    np.testing.assert_allclose(attend(*inputs, share), written_out(*inputs, share), atol=3e-6)


def test_share_of_one_is_no_share_and_of_zero_counts_slots():
    q, k, v, mask, prefixes, share = attention_inputs(1)
    ours = attend(q, k, v, mask, prefixes, np.ones_like(share))
    np.testing.assert_allclose(ours, attend(q, k, v, mask, prefixes), atol=1e-6)
    # At 0 a slot still takes the softmax mass of a score of 0, and gives nothing.
    nothing = jax.tree.map(np.zeros_like, prefixes[3])
    ours = attend(q, k, v, mask, prefixes[3:4], np.zeros_like(share))
    np.testing.assert_allclose(ours, attend(q, k, v, mask, (nothing,)), atol=1e-6)


def test_gated_prefix_is_added_to_attention_without_it():
    q, k, v, mask, prefixes, _ = attention_inputs(2)
    prefix = prefixes[2]
    ours = attend(q, k, v, mask, (prefix,))
    repeated = [np.repeat(x[None], len(q), axis=0) for x in (prefix.k, prefix.v)]
    alone = attend(q, *repeated, np.ones((*q.shape[:2], P), bool))
    np.testing.assert_allclose(ours, attend(q, k, v, mask) + prefix.gate[..., None] * alone, atol=3e-6)
    np.testing.assert_array_equal(
        attend(q, k, v, mask, (prefix.replace(gate=0 * prefix.gate),)), attend(q, k, v, mask, ())
    )


def test_gated_prefix_of_masked_slots_adds_nothing():
    q, k, v, mask, prefixes, _ = attention_inputs(2)
    none = prefixes[2].replace(mask=np.zeros(P, bool))
    np.testing.assert_allclose(attend(q, k, v, mask, (none,)), attend(q, k, v, mask), atol=1e-6)


def test_masked_slots_have_no_slope():
    q, k, v, mask, prefixes, share = attention_inputs(3)
    prefix = prefixes[0]

    @jax.jit
    @jax.grad
    def slopes(kv):
        return jnp.square(attention.attend(q, k, v, mask, [KV(*kv, mask=prefix.mask, share=share)])).sum()

    for slope in slopes((prefix.k, prefix.v)):
        assert np.isfinite(slope).all()
        np.testing.assert_array_equal((np.abs(slope) > 0).all((2, 3)), prefix.mask)


def test_queries_in_parts_attend_as_all_at_once(monkeypatch):
    """Values and slopes; with masks, shares and biases of each query, and gates."""
    q, k, v, mask, prefixes, share = attention_inputs(4)
    rng = np.random.default_rng(5)
    k, v, mask = k[:, :T], v[:, :T], np.tril(mask[:, :, :T]) | np.eye(T, dtype=bool)
    heads = q.shape[2:4]
    each = prefixes[1].replace(mask=rng.random((len(q), T, P)) < 0.6, bias=rng.normal(size=(*heads, T, P)))
    prefixes = [prefix.replace(share=share) for prefix in (*prefixes, each)]
    bias, weights = rng.normal(size=(*heads, T, T)), rng.normal(size=q.shape)
    floats, rest = with_slopes(prefixes)

    def found(queries, causal):
        monkeypatch.setattr(attention, "QUERIES", queries)
        monkeypatch.setattr(attention, "SCORES", 0 if queries < T else attention.SCORES)

        def weighed(q, k, v, floats, bias):
            prefixes = jax.tree.map(lambda x, y: y if x is None else x, floats, rest, is_leaf=lambda x: x is None)
            return (weights * attention.attend(q, k, v, mask, prefixes, bias=bias, causal=causal)).sum()

        compiled = jax.jit(jax.value_and_grad(weighed, range(5))).lower(q, k, v, floats, bias).compile()
        return compiled(q, k, v, floats, bias), compiled.cost_analysis()["flops"]

    (at_once, _), (parts, all_keys), (causal, some_keys) = found(T, False), found(3, False), found(3, True)
    for other in (parts, causal):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), other, at_once)
    assert some_keys < all_keys


def test_a_kernel_attends_as_the_plain_way_does(monkeypatch):
    """Values and slopes, with slots of every kind, an odd number of queries and keys, and a scale."""
    monkeypatch.setattr(attention, "FEW", T - 1)
    q, k, v, mask, prefixes, _ = attention_inputs(6)
    k, v, mask = k[:, :T], v[:, :T], mask[:, :, :T]
    each = prefixes[1].replace(mask=np.random.default_rng(7).random((len(q), T, P)) < 0.6)
    prefixes, weights = (*prefixes, each), np.random.default_rng(8).normal(size=q.shape)
    assert T % 2 == 1 == (T + sum(prefix.k.shape[-3] for prefix in prefixes if prefix.gate is None)) % 2
    floats, rest = with_slopes(prefixes)

    def found(kernel):
        how = attention.Attention(scale=0.3, kernel=kernel)

        def weighed(q, k, v, floats):
            prefixes = jax.tree.map(lambda x, y: y if x is None else x, floats, rest, is_leaf=lambda x: x is None)
            out = attention.attend(q, k, v, mask, prefixes, how=how)
            return (weights * out).sum(), out

        return jax.jit(jax.value_and_grad(weighed, range(4), has_aux=True))(q, k, v, floats)

    kernel, used = jax.nn.dot_product_attention, []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *xs, **how: used.append(how) or kernel(*xs, **how))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found("xla"), found("plain"))
    assert [how["implementation"] for how in used] == ["xla"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"how": attention.Attention(softcap=2.0, kernel="cudnn")}, "a cap"),
        ({"bias": np.zeros((K, 3, T, 8), np.float32)}, "a bias"),
        ({"prefixes": [KV(*np.zeros((2, P, K, 6), np.float32), share=np.ones((4, T)))]}, "gated or placed slots"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(monkeypatch, wrong, told):
    monkeypatch.setattr(attention, "FEW", T - 1)
    q, k, v, mask, *_ = attention_inputs(0)
    q, how = q.astype(jnp.bfloat16), attention.Attention(kernel="cudnn")
    with pytest.raises(UserError, match=f"model.attention='cudnn' cannot attend with {told}; expected 'plain'"):
        attention.attend(q, k, v, mask, **{"how": how} | wrong)


def test_cudnn_takes_what_a_training_step_gives_it(monkeypatch):
    """Of a GPU that is not here: JAX checks shapes and types when it lowers to cuDNN's operations."""
    known = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(known, "check_cudnn_version", lambda: 91000)
    model = models.build(LLAMA | {"model_type": "llama", "head_dim": 8}, attention="cudnn")
    frozen = loading.abstract(model, "bfloat16")
    batch = Batch(*[jax.ShapeDtypeStruct((2, 33), np.int32)] * 3, *[None] * 4)
    kv = KV(*[jax.ShapeDtypeStruct((L, P, K, 8), np.float32)] * 2)

    def loss(kv, frozen, batch):
        return model.hidden(frozen, Adaptation(decoder=LayerHooks(kv={"self": kv})), batch).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss)).trace(kv, frozen, batch).lower(lowering_platforms=("cuda",)).as_text()
    assert {"ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward"} == set(re.findall(r"__cudnn\$fmha(\w+)", text))


def test_parts_hold_all_queries_and_are_not_too_many():
    assert attention.query_parts(attention.QUERIES) == [(0, attention.QUERIES)]
    for queries in (attention.QUERIES + 1, 10 * attention.QUERIES, 1000 * attention.QUERIES):
        parts = attention.query_parts(queries)
        assert [t for part in parts for t in range(*part)] == list(range(queries))
        assert len(parts) == min(-(-queries // attention.QUERIES), attention.PARTS)


def test_causal_attention_has_a_key_for_each_query():
    q, k, v, mask, *_ = attention_inputs(0)
    with pytest.raises(UserError, match=f"causal attention of {T} queries over {k.shape[1]} keys; expected as many"):
        attention.attend(q, k, v, mask, causal=True)


@pytest.mark.parametrize("feature", ["elu", "gelu"])
def test_memory_is_what_the_loops_say(feature):
    rng = np.random.default_rng(0)
    attended, q = rng.normal(size=(2, 2, T, K, 4, 6)).astype(np.float32)
    m = rng.normal(size=(K, 4, 6, 6)).astype(np.float32)
    expected = attended.copy()
    features = getattr(torch.nn.functional, feature)(torch.tensor(q)).numpy()
    for b, t, j, g in np.ndindex(*q.shape[:4]):
        expected[b, t, j, g] += features[b, t, j, g] @ m[j, g]
    ours = attention.recall(attended, q, LayerHooks(memory={"self": Memory(m, feature)}), "self")
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_array_equal(attention.recall(attended, q, LayerHooks(), "self"), attended)


def with_slopes(tree):
    """The leaves of a tree that have slopes, and the others, each with None in place of the rest."""
    real = jax.tree.map(lambda x: np.issubdtype(x.dtype, np.floating), tree)
    floats = jax.tree.map(lambda x, own: x if own else None, tree, real)
    return floats, jax.tree.map(lambda x, own: None if own else x, tree, real)

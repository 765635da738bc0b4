"""What an `Adaptation` does inside a model: a prefix is context, nothing is nothing, what does not fit is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import (
    B,
    K,
    P,
    T,
    V,
    batch_logits,
    close,
    one_a_row,
    packed,
    random_prefix,
    random_rows,
    reference_logits,
)

import prefix_tuning
from prefix_tuning import attention, models, nn
from prefix_tuning.errors import UserError
from prefix_tuning.types import KV, Adaptation, Delta, LayerHooks

BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


def prefix_of(model, frozen, tokens, shift=True):
    """The keys and values that the model itself computes for tokens, as a prefix."""
    hooks = LayerHooks(kv=jax.jit(model.keys_values)(frozen, np.array(tokens))["decoder"])
    return Adaptation(hooks, jnp.int32(len(tokens)) if shift else None)


def examples(seed):
    return [(row, [1]) for row in random_rows(seed)]


def per_row(adaptations):
    """The prefixes of several adaptations, one for each row of a batch."""
    kv = [adaptation.decoder.kv["self"] for adaptation in adaptations]
    stacked = KV(np.stack([x.k for x in kv], 1), np.stack([x.v for x in kv], 1))
    return Adaptation(LayerHooks(kv={"self": stacked}), adaptations[0].shift)


@BOTH
def test_prefix_of_real_tokens_is_those_tokens(twin, family):
    reference, _, model, frozen = twin(family)
    text, rows = [3, 1, 4, 1, 5], random_rows(5)
    assert len(text) == P
    ours = prefix_tuning.logits(model, frozen, prefix_of(model, frozen, text), rows)
    close(ours, [logits[P:] for logits in reference_logits(reference, [text + row for row in rows])])
    # and the positions matter for it
    other = prefix_tuning.logits(model, frozen, prefix_of(model, frozen, text, shift=False), rows)
    assert np.abs(other[0] - ours[0]).max() > 0.01


@BOTH
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no shift"])
def test_random_prefix_is_a_cache_of_transformers(twin, family, shift):
    reference, _, model, frozen = twin(family)
    adaptation, rows = random_prefix(model, 2, shift=shift), random_rows(5)
    ours = prefix_tuning.logits(model, frozen, adaptation, rows)
    close(ours, reference_logits(reference, rows, adaptation))
    close(ours, reference_logits(reference, rows, adaptation, left=True))
    assert np.abs(ours[0] - prefix_tuning.logits(model, frozen, None, rows)[0]).max() > 0.01


@BOTH
def test_empty_adaptation_is_the_model_bit_for_bit(twin, family, monkeypatch):
    _, _, model, frozen = twin(family)
    batch = one_a_row(examples(5))
    ours = batch_logits(model, frozen, Adaptation(), batch)

    def plain(q, k, v, mask, prefixes, *, how, bias, causal):
        assert not prefixes
        assert causal
        assert how == attention.PLAIN
        assert bias is None
        scores = jnp.einsum("btkgh,bskh->bkgts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        values = jnp.moveaxis(jnp.einsum("bkgts,bskh->bkgth", weights, v), 3, 1)
        return values * jnp.moveaxis(1 / weights.sum(-1, keepdims=True), 3, 1)

    monkeypatch.setattr(attention, "attend", plain)
    monkeypatch.setattr(nn, "shifted", lambda positions, adaptation: positions)
    monkeypatch.setattr(attention, "recall", lambda x, *_: x)
    for hook in ("open_gates", "change", "adapt"):
        monkeypatch.setattr(nn, hook, lambda x, *_: x)
    monkeypatch.setattr(nn, "add_rows", lambda k, v, *_: (k, v))
    bare = models.build(model.config)  # its functions are new, and so is what is compiled for them
    np.testing.assert_array_equal(ours, batch_logits(bare, frozen, Adaptation(), batch))


@BOTH
def test_shared_prefix_is_a_prefix_per_row(twin, family):
    _, _, model, frozen = twin(family)
    each, batch = [random_prefix(model, seed) for seed in range(B)], one_a_row(examples(6))
    shared = [batch_logits(model, frozen, adaptation, batch)[b] for b, adaptation in enumerate(each)]
    close([*batch_logits(model, frozen, per_row(each), batch)], shared, 2e-6)
    close(
        [*batch_logits(model, frozen, per_row(each[:1] * B), batch)],
        [*batch_logits(model, frozen, each[0], batch)],
        2e-6,
    )


@BOTH
def test_shift_per_row(twin, family):
    _, _, model, frozen = twin(family)
    adaptation, batch = random_prefix(model, 0), one_a_row(examples(6))
    shifts = np.arange(B, dtype=np.int32)
    rows = batch_logits(model, frozen, adaptation.replace(shift=shifts), batch)
    for shift in (0, P):
        alone = batch_logits(model, frozen, adaptation.replace(shift=np.int32(shift)), batch)
        close([rows[shift]], [alone[shift]], 2e-6)
    close([rows[0]], [batch_logits(model, frozen, adaptation.replace(shift=None), batch)[0]], 2e-6)


@BOTH
def test_packed_segments_see_the_prefix_and_not_each_other(twin, family):
    _, _, model, frozen = twin(family)
    adaptation = random_prefix(model, 3)
    one, two, three = random_rows(7, lengths=(4, 2, 6))

    def run(first):
        logits = batch_logits(model, frozen, adaptation, packed([[(first, [1]), (two, [2])], [(three, [1])]], 8, 2))
        return [logits[0, :4], logits[0, 4:6], logits[1, :6]]

    close(run(one), prefix_tuning.logits(model, frozen, adaptation, [one, two, three]), 2e-6)
    before, after = run(one), run([(token + 1) % V for token in one])
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(before[0] - after[0]).max() > 0.01
    assert np.abs(before[1] - prefix_tuning.logits(model, frozen, None, [two])[0]).max() > 0.01


@BOTH
def test_rows_of_padding_make_no_nan(twin, family):
    _, _, model, frozen = twin(family)
    row = random_rows(8, lengths=(4,))[0]
    with_filler = packed([[(row, [1, 2])], []], length=T, targets=3)
    alone = packed([[(row, [1, 2])]], length=T, targets=3)

    @jax.jit
    def gradient(adaptation, batch):
        def loss(kv):
            hooks = LayerHooks(kv={"self": kv})
            hidden = model.hidden(frozen, adaptation.replace(decoder=hooks), batch)
            # the padded row is weighted by 0, as in a masked loss: 0 x NaN would still be NaN
            hidden = jnp.take_along_axis(hidden, batch.target_index[..., None], axis=1)
            return (jax.nn.logsumexp(model.unembed(frozen, hidden), -1) * batch.mask).sum()

        return jax.value_and_grad(loss)(adaptation.decoder.kv["self"])

    for scale in (1.0, 1e4):  # the scores of the second are beyond what exp can hold
        adaptation = jax.tree.map(lambda x, s=scale: x * s if x.ndim else x, random_prefix(model, 4))
        value, slopes = gradient(adaptation, with_filler)
        wanted, slopes_alone = gradient(adaptation, alone)
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
        assert np.isfinite(batch_logits(model, frozen, adaptation, with_filler)).all()
        largest = max(np.abs(x).max() for x in jax.tree.leaves(slopes_alone))
        for name in ("k", "v"):
            one, other = getattr(slopes, name), getattr(slopes_alone, name)
            assert np.isfinite(one).all()
            # At the second scale slopes are what is left of far larger numbers that cancel, the keys' more than any.
            noise = 1e-6 if scale == 1 else {"k": 1e-2, "v": 1e-4}[name]
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=noise * largest)
            assert scale > 1 or np.abs(other).max() > 0


def changed(adaptation, change):
    return adaptation.replace(decoder=LayerHooks(kv={"self": jax.tree.map(change, adaptation.decoder.kv["self"])}))


@BOTH
@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda x: x[:-1], r"\(2, 5, 2, H\)"),
        (lambda x: np.repeat(x, 2, axis=2), r"\(3, 5, 4, H\)"),
        (lambda x: x[..., :-1], r"\(3, 5, 2, h\)"),
        (lambda x: np.swapaxes(x, 1, 2), r"\(3, 2, 5, H\)"),
        (lambda x: x[:, :, 0], r"\(3, 5, H\)"),
        (lambda x: np.stack([x] * 3, axis=1), r"\(3, 3, 5, 2, H\)"),
    ],
    ids=["layers", "heads", "head size", "axes", "rank", "rows"],
)
def test_shapes_that_do_not_fit_raise(twin, family, change, got):
    model = twin(family).model
    H = model.sites["decoder"].kv["self"][1]
    batch = one_a_row(examples(5))
    got = got.replace("H", str(H)).replace("h", str(H - 1))
    wanted = rf"expected \[3 P 2 {H}\] or \[3 8 P 2 {H}\]"
    with pytest.raises(UserError, match=rf"prefix k at decoder/self has shape {got}; {wanted}"):
        jax.eval_shape(model.hidden, twin(family).frozen, changed(random_prefix(model, 0), change), batch)


@BOTH
def test_unknown_sites_and_unequal_pairs_raise(twin, family):
    _, _, model, frozen = twin(family)
    kv, tokens = random_prefix(model, 0).decoder.kv["self"], np.ones((2, 3), int)
    prefill = (np.array([3, 2]), 4)
    for given, message in (
        ({"cross": kv}, "unknown attention site of the decoder 'cross'; valid: self"),
        ({"self": kv, "encoder": kv}, "unknown attention site of the decoder 'encoder'; valid: self"),
        ({"self": KV(kv.k, kv.v[:, 1:])}, r"prefix v at decoder/self has shape \(3, 4, 2, .\); expected \[3 5 2 .\]"),
    ):
        adaptation = Adaptation(LayerHooks(kv=given))
        with pytest.raises(UserError, match=message):
            prefix_tuning.logits(model, frozen, adaptation, [[1, 2]])
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda a: model.prefill(frozen, a, tokens, *prefill), adaptation)
        cache = jax.eval_shape(lambda: model.prefill(frozen, Adaptation(), tokens, *prefill))[1]
        with pytest.raises(UserError, match=message):
            jax.eval_shape(model.decode, frozen, adaptation, cache, np.ones((2, 1), int))


def test_parts_that_would_do_nothing_raise(twin):
    _, _, model, frozen = twin("llama")
    kv = random_prefix(model, 0).decoder.kv["self"]
    row = {"self": KV(kv.k[:, :1], kv.v[:, :1], mask=jnp.ones((len(kv.k), 1), bool))}
    width = model.sites["decoder"].width
    a, b = jnp.ones((len(kv.k), width, 2)), jnp.ones((len(kv.k), 2, *kv.k.shape[2:]))
    for hooks, message in (
        (
            LayerHooks(kv={"self": kv.replace(share=jnp.ones((1, 2)))}),
            "share and bias at decoder/self are made inside",
        ),
        (LayerHooks(rows=row), "rows at decoder/self have a mask, gate or share"),
        (LayerHooks(delta={"k": Delta(a, b, keys=jnp.ones(2))}), r"delta keys at decoder/k has shape \(2,\); .* \[3\]"),
    ):
        with pytest.raises(UserError, match=message):
            prefix_tuning.logits(model, frozen, Adaptation(hooks, rows=jnp.ones((1, width))), [[1, 2]])


# --- Attention itself

G, H = 4, 6
attend = jax.jit(attention.attend)


def written_out(q, k, v, mask, prefix_k, prefix_v):
    """The rule: query head (j, g) weighs the values of head j, those of the whole prefix and those the mask allows."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for j in range(q.shape[2]):
                for g in range(q.shape[3]):
                    weighted, total = np.zeros(q.shape[4]), 0.0
                    for p in range(prefix_k.shape[1]):
                        weight = np.exp(q[b, t, j, g] @ prefix_k[b, p, j] / np.sqrt(q.shape[4]))
                        weighted, total = weighted + weight * prefix_v[b, p, j], total + weight
                    for s in range(k.shape[1]):
                        if mask[b, t, s]:
                            weight = np.exp(q[b, t, j, g] @ k[b, s, j] / np.sqrt(q.shape[4]))
                            weighted, total = weighted + weight * v[b, s, j], total + weight
                    out[b, t, j, g] = weighted / total
    return out


def attention_inputs(seed, slots=9):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, K, G, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, slots, K, H)).astype(np.float32)
    mask = rng.random((B, T, slots)) < 0.6
    mask[:, :, 0] = True  # every query sees something
    prefix_k, prefix_v = rng.normal(size=(2, B, P, K, H)).astype(np.float32)
    return q, k, v, mask, prefix_k, prefix_v


@pytest.mark.parametrize("kind", ["none", "shared", "per row"])
def test_attention_is_what_the_loops_say(kind):
    q, k, v, mask, prefix_k, prefix_v = attention_inputs(0)
    if kind == "none":
        prefixes, prefix_k, prefix_v = (), prefix_k[:, :0], prefix_v[:, :0]
    elif kind == "shared":
        prefixes, repeated = (KV(prefix_k[0], prefix_v[0]),), (B, 1, 1, 1)
        prefix_k, prefix_v = np.tile(prefix_k[:1], repeated), np.tile(prefix_v[:1], repeated)
    else:
        prefixes = (KV(prefix_k, prefix_v),)
    out = attend(q, k, v, mask, prefixes)
    assert out.shape == (B, T, K, G, H)
    np.testing.assert_allclose(out, written_out(q, k, v, mask, prefix_k, prefix_v), atol=2e-6)


def test_prefix_is_a_gate():
    """He et al. 2021, eq. 5: (1 - gate) attention without prefix + gate attention to the prefix alone."""
    q, k, v, mask, prefix_k, prefix_v = attention_inputs(1)
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
    q, k, v, mask, prefix_k, prefix_v = attention_inputs(2)
    rows = np.abs(q[:, :, :, :1]) + 1
    far = np.full_like(prefix_k, -1e3)
    np.testing.assert_allclose(attend(rows, k, v, mask, (KV(far, prefix_v),)), attend(rows, k, v, mask), atol=1e-6)
    every = np.ones((B, T, P), bool)
    np.testing.assert_allclose(
        attend(rows, k, v, mask, (KV(-far, prefix_v),)), attend(rows, -far, prefix_v, every), atol=1e-6
    )


def test_half_precision_attends_to_large_values():
    q, k, v, mask, prefix_k, prefix_v = (np.ones_like(x, np.float16) for x in attention_inputs(3))
    large = 3e4 * v  # two of them are more than float16 holds
    out = attend(q, k, large, mask > 0, (KV(prefix_k, 3e4 * prefix_v),))
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, np.full(q.shape, 3e4), rtol=1e-3)


def test_gelu_keeps_nothing_but_its_input_for_its_derivative():
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    y, backward = jax.vjp(nn.ACTIVATIONS["gelu"], x)
    (kept,) = jax.tree.leaves(backward)
    np.testing.assert_array_equal(kept, x)
    np.testing.assert_allclose(y, torch.nn.functional.gelu(torch.tensor(x)), atol=1e-6)
    given = torch.tensor(x, requires_grad=True)
    torch.nn.functional.gelu(given).sum().backward()
    np.testing.assert_allclose(backward(np.ones_like(x))[0], given.grad, atol=1e-6)

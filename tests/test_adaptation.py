"""What an `Adaptation` does inside a model: a prefix is context, and nothing is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    B,
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
from prefix_tuning.types import KV, Adaptation, LayerHooks

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

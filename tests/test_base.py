"""Fingerprints of frozen models."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prefix_tuning
from prefix_tuning.errors import UserError
from prefix_tuning.interop import base
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_a_fingerprint_is_of_the_weights_whatever_their_precision(twin, family):
    _, folder, model, frozen = twin(family)
    number = base.fingerprint(model, frozen)
    assert len(number) == 32
    low = prefix_tuning.load_model(str(folder), dtype="bfloat16")[1]
    assert base.fingerprint(model, low) == base.fingerprint(model, jax.device_get(low)) == number
    assert base.fingerprint(model, prefix_tuning.load_model(str(folder), dtype="float16")[1]) is None
    beside = METHODS["prefix"](None, length=3, layers=(0,)).prepare(jax.random.key(0), model, frozen)
    assert base.fingerprint(model, beside | {"head": {"bias": jnp.ones(3)}}) == number


def test_a_fingerprint_is_what_files_already_carry(twin):
    """Numbers at even distances in each flat weight, by numpy: what it hashes must never change."""
    _, _, model, frozen = twin("llama")
    found = hashlib.sha256()
    for path, leaf in sorted(loading.flatten(frozen).items()):
        flat = np.asarray(leaf).ravel()
        found.update(f"{'/'.join(path)} {leaf.shape}".encode())
        found.update(
            flat[np.linspace(0, flat.size - 1, min(256, flat.size)).astype(int)].astype(jnp.bfloat16).tobytes()
        )
    assert base.fingerprint(model, frozen) == found.hexdigest()[:32]


def test_every_weight_and_shape_counts(twin):
    _, _, model, frozen = twin("gpt2")
    number = base.fingerprint(model, frozen)
    leaves, tree = jax.tree.flatten(frozen)
    for i, leaf in enumerate(leaves):
        for place in ((0,) * leaf.ndim, (-1,) * leaf.ndim):
            changed = [*leaves[:i], leaf.at[place].add(1.0), *leaves[i + 1 :]]
            assert base.fingerprint(model, jax.tree.unflatten(tree, changed)) != number
    turned = frozen | {"embedding": frozen["embedding"].reshape(-1, 2)}
    assert base.fingerprint(model, turned) != number


def test_another_base_is_refused_by_what_differs(twin):
    _, _, model, frozen = twin("gpt2")
    written = base.identity(model, frozen)
    base.check(written, model, frozen, "file")
    base.check({}, model, frozen, "file")
    base.check(written, model, None, "file")
    other = frozen | {"embedding": frozen["embedding"] + 1}
    with pytest.raises(UserError, match=r"file belongs to a base model of fingerprint \w{32}; this one has"):
        base.check(written, model, other, "file")
    _, _, llama, weights = twin("llama")
    with pytest.raises(UserError, match="file belongs to a base model of type gpt2; this one has type llama"):
        base.check(written, llama, weights, "file")

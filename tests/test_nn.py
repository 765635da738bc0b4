"""The layers and hooks that need no model to be tested."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from adaptations import ROWS, R
from conftest import K, T, close

from prefix_tuning import nn
from prefix_tuning.types import KV, Delta, LayerHooks


def test_gelu_keeps_nothing_but_its_input_for_its_derivative():
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    y, backward = jax.vjp(nn.ACTIVATIONS["gelu"], x)
    (kept,) = jax.tree.leaves(backward)
    np.testing.assert_array_equal(kept, x)
    np.testing.assert_allclose(y, torch.nn.functional.gelu(torch.tensor(x)), atol=1e-6)
    given = torch.tensor(x, requires_grad=True)
    torch.nn.functional.gelu(given).sum().backward()
    np.testing.assert_allclose(backward(np.ones_like(x))[0], given.grad, atol=1e-6)


def test_dropout_is_on_what_the_low_rank_change_reads():
    rng, rate, size = np.random.default_rng(0), 0.25, 6
    x = rng.uniform(1, 2, (len(ROWS), T, 2, size)).astype(np.float32)  # two axes are contracted
    y = rng.normal(size=(len(ROWS), T, 2 * size)).astype(np.float32)
    eye = np.eye(2 * size, dtype=np.float32)
    delta = Delta(eye.reshape(2, size, -1), 3 * eye, scale=0.5, dropout=rate)

    @jax.jit
    def dropped(keys):
        return nn.change(y, x, LayerHooks(delta={"o": delta.replace(keys=keys)}), "o", axes=2) - y

    whole = 1.5 * x.reshape(y.shape)
    np.testing.assert_allclose(dropped(None), whole, atol=1e-5)
    one, other = (dropped(jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(one, dropped(jax.random.key(0)))
    assert (np.abs(one - other) > 0.1).any((0, 1)).all()
    # each number is gone, or larger by what the others lack
    kept = np.abs(one) > 0.1
    np.testing.assert_allclose(one, np.where(kept, whole / (1 - rate), 0), atol=1e-5)
    many = jax.vmap(dropped)(jax.random.split(jax.random.key(2), 4000))
    np.testing.assert_allclose(many.mean(0), whole, atol=0.15)
    assert abs((np.abs(many) > 0.1).mean() - (1 - rate)) < 2e-3


def test_rows_are_added_where_an_index_names_them():
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 3, T, K, 6)).astype(np.float32)
    rows = KV(*rng.normal(size=(2, R, K, 6)).astype(np.float32))
    index = rng.integers(-1, R, (3, T))
    wanted = [x.copy() for x in (k, v)]
    for b, t in np.ndindex(*index.shape):
        if index[b, t] >= 0:
            wanted[0][b, t] += rows.k[index[b, t]]
            wanted[1][b, t] += rows.v[index[b, t]]
    close(nn.add_rows(k, v, jax.tree.map(jnp.asarray, rows), index), wanted, 1e-6)
    for given in ((None, index), (rows, None)):
        assert nn.add_rows(k, v, *given) == (k, v)

"""Cross-entropy whose logits exist for some rows at a time: the plain formula's value and gradients, and never more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from prefix_tuning import parallel
from prefix_tuning.models import llama
from prefix_tuning.objectives import vocabulary
from prefix_tuning.types import Batch

B, N, D, V = 8, 5, 6, 13
TARGETS = (5, 0, 2, 1, 3, 5, 4, 1)  # real ones of each row: 21 of 40
CAP = 3.0


class Capped:
    """A model with all that unembeddings have: a table, a bias, scaled hidden states, capped logits."""

    @staticmethod
    def unembed(params, hidden):
        logits = jnp.einsum("...d,vd->...v", hidden / 2, params["embedding"], preferred_element_type=jnp.float32)
        return CAP * jnp.tanh((logits + params["bias"].astype(jnp.float32)) / CAP)


def setting(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    mask = (np.arange(N) < np.array(TARGETS)[:, None]).astype(np.float32)
    zeros = jnp.zeros((B, N), jnp.int32)
    batch = Batch(zeros, zeros, zeros, zeros, jnp.asarray(rng.integers(0, V, (B, N))), jnp.asarray(mask), zeros[:, 0])
    params = {"embedding": rng.normal(size=(V, D)), "bias": rng.normal(size=V), "norm": np.ones(D)}
    hidden = 2 * rng.normal(size=(B, N, D))
    return *jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, hidden)), batch


def plain(params, hidden, batch, smoothing):
    """The formula of objectives/lm.py, all logits at once."""
    log_p = jax.nn.log_softmax(Capped.unembed(params, hidden))
    nll = -(jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0] * batch.mask).sum()
    loss = (1 - smoothing) * nll - smoothing * (log_p.mean(-1) * batch.mask).sum()
    return loss, (nll, ((log_p.argmax(-1) == batch.targets) * batch.mask).sum())


def ours(params, hidden, batch, smoothing):
    found = vocabulary.cross_entropy(Capped, params, hidden, batch, smoothing)
    return found.loss, (found.nll, found.correct)


def agree(one, other, tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.fixture(params=[4, 16, 40])
def rows(request, monkeypatch):
    """How many rows have logits at a time: of 40, so that all, most or few chunks are needed, or there is but one."""
    for name in ("CPU_ROWS", "ROWS"):
        monkeypatch.setattr(vocabulary, name, request.param)
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_values_and_gradients_are_the_plain_formulas(rows, smoothing, dtype, tolerance):
    params, hidden, batch = setting(dtype)

    def both(function):
        def scaled(params, hidden):
            loss, rest = function(params, hidden, batch, smoothing)
            return 1.5 * loss, rest

        return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(params, hidden)

    (found, slopes), (expected, wanted) = both(ours), both(plain)
    agree(found, expected, 1e-6)
    agree(slopes, wanted, tolerance)
    assert 0 < found[1][1] < sum(TARGETS)
    assert not np.asarray(slopes[1])[np.asarray(batch.mask) == 0].any()
    assert np.asarray(slopes[0]["embedding"]).any()
    alone = ours(params, hidden, batch, smoothing)  # undifferentiated, as in an evaluation
    agree((1.5 * alone[0], alone[1]), expected, 1e-6)


def test_only_what_is_trained_gets_slopes(rows):
    params, hidden, batch = setting()
    frozen = {name: params[name] for name in ("embedding", "norm")}

    def slopes(function):
        def loss(trained, hidden):
            return function(frozen | trained, hidden, batch, 0.0)[0]

        return jax.grad(loss, argnums=(0, 1))({"bias": params["bias"]}, hidden)

    agree(slopes(ours), slopes(plain), 1e-6)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda h: ours(params, h, batch, 0.0)[0]))(hidden))
    assert f"f32[{V},{D}] = dot_general" not in jaxpr
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda p: ours(p, hidden, batch, 0.0)[0]))(params))
    assert f"f32[{V},{D}] = dot_general" in jaxpr  # so the watch works


def test_no_logits_wait_for_the_backward_pass(rows):
    params, hidden, batch = setting()

    def kept(function):
        return jax.eval_shape(lambda h: jax.vjp(lambda h: function(params, h, batch, 0.0)[0], h)[1], hidden)

    assert any(leaf.shape[-1:] == (V,) for leaf in jax.tree.leaves(kept(plain)))
    assert not any(leaf.shape[-1:] == (V,) for leaf in jax.tree.leaves(kept(ours)))


def test_chunks_without_targets_are_left_out(rows):
    params, hidden, batch = setting()
    calls = []

    class Counting:
        @staticmethod
        def unembed(params, hidden):
            jax.debug.callback(lambda: calls.append(hidden.shape))
            return Capped.unembed(params, hidden)

    jax.block_until_ready(jax.jit(vocabulary.cross_entropy, static_argnums=0)(Counting, params, hidden, batch))
    jax.effects_barrier()
    assert calls == [(1, rows, D)] * {4: 6, 16: 2, 40: 1}[rows]


def test_what_stands_where_no_target_is_becomes_no_nan(rows):
    params, hidden, batch = setting()
    masked = batch.mask[..., None] == 0
    clean = jax.grad(lambda h: ours(params, h, batch, 0.0)[0])(hidden)
    for filler in (jnp.nan, jnp.inf):
        dirty = jnp.where(masked, filler, hidden)
        value, slopes = jax.value_and_grad(lambda h: ours(params, h, batch, 0.0)[0])(dirty)
        assert np.isfinite(value)
        np.testing.assert_array_equal(slopes, clean)
    nothing = batch.replace(mask=jnp.zeros_like(batch.mask))
    value, slopes = jax.value_and_grad(lambda h: ours(params, h, nothing, 0.0)[0])(hidden)
    assert value == 0
    assert not slopes.any()


def test_runs_that_train_together_each_have_their_own(rows):
    """Under vmap, with hidden states and masks of their own: as many chunks as the longest needs."""
    params, hidden, batch = setting()
    hiddens = jnp.stack([hidden, hidden[::-1]])
    masks = jnp.stack([batch.mask, batch.mask.at[:, 1:].set(0)])

    def slopes(function, hidden, mask):
        return jax.value_and_grad(lambda h: function(params, h, batch.replace(mask=mask), 0.0)[0])(hidden)

    found = jax.vmap(lambda h, m: slopes(ours, h, m))(hiddens, masks)
    apart = [slopes(plain, *one) for one in zip(hiddens, masks, strict=True)]
    agree(found, jax.tree.map(lambda *xs: jnp.stack(xs), *apart), 1e-6)


@pytest.mark.parametrize("sizes", [{"data": 4, "model": 1}, {"data": 2, "model": 4}], ids=str)
def test_rows_stay_on_their_devices(rows, sizes):
    """Under parallel=sharded: every device loops over its own rows, and only sums leave it."""
    if sizes["data"] * sizes["model"] != jax.device_count():
        sizes = sizes | {"data": jax.device_count() // sizes["model"]}
    params, hidden, batch = setting()
    config = {"hidden_size": D, "vocab_size": V, "num_attention_heads": 1, "num_hidden_layers": 1}
    layout = parallel.make(llama.weights(config | {"intermediate_size": 2}, llama.Variant()), "sharded", sizes)
    spread = NamedSharding(layout.mesh, PartitionSpec("data"))

    def slopes(params, hidden, batch):
        return jax.grad(lambda p, h: ours(p, h, batch, 0.0)[0], argnums=(0, 1))(params, hidden)

    placed = layout.place(params), *jax.device_put((hidden, batch), spread)
    compiled = jax.jit(layout.told(slopes), out_shardings=(layout.on(PartitionSpec()), spread)).lower(*placed).compile()
    wanted = jax.grad(lambda p, h: plain(p, h, batch, 0.0)[0], argnums=(0, 1))(params, hidden)
    agree(compiled(*placed), wanted, 1e-6)

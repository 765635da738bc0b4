"""Every method in every variant on both families: what it trains, what it leaves alone, and where it starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import L, P, T, close, one_a_row, random_rows

import prefix_tuning
from prefix_tuning import models, parallel, setup
from prefix_tuning.errors import UserError
from prefix_tuning.methods import METHODS, prefix
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import Adaptation, Batch, TrainState, count

M = 9  # the width of the MLP
TEXT = {"init": "text", "text": "dabec"}
VARIANTS = {
    "prefix": {
        "random": {"length": P},
        "vocabulary": {"length": P, "init": "vocabulary"},
        "text": {"length": P, **TEXT},
        "mlp": {"length": P, "reparametrisation": M},
        "mlp text": {"length": P, "reparametrisation": M, **TEXT, "fit_steps": 20, "fit_learning_rate": 1e-2},
        "dropout": {"length": P, "dropout": 0.4},
        "no shift": {"length": P, "shift": False},
    },
}
CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]
EVERY = pytest.mark.parametrize(
    ("family", "name", "variant"),
    [(family, *case) for family in ("gpt2", "llama") for case in CASES],
    ids=lambda value: value.replace(" ", "_"),
)
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


def test_no_method_is_left_out():
    assert set(VARIANTS) == set(METHODS)


def tokenizer(text, add_special_tokens):
    """Token 0 for a, 1 for b, ..."""
    assert not add_special_tokens
    return {"input_ids": [ord(letter) - ord("a") for letter in text]}


@pytest.fixture(scope="module")
def started(twin):
    """(family, name, variant) -> twin, method, and its trainable parameters from key 3, made once."""

    @functools.cache
    def start(family, name, variant):
        made = twin(family)
        method = METHODS[name](tokenizer, **VARIANTS[name][variant])
        return made, method, method.init(jax.random.key(3), made.model, made.frozen)

    return start


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_every_method_is_here():
    assert VARIANTS.keys() == METHODS.keys()


@EVERY
def test_init_is_float32_and_a_function_of_the_key(started, family, name, variant):
    (_, _, model, frozen), method, trainable = started(family, name, variant)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert same(trainable, method.init(jax.random.key(3), model, frozen))
    if "text" in variant and "mlp" not in variant:
        return  # the text says it all
    assert not same(trainable, method.init(jax.random.key(4), model, frozen))


@EVERY
def test_bind_leaves_frozen_alone_and_draws_only_from_its_key(started, family, name, variant):
    (_, _, model, frozen), method, trainable = started(family, name, variant)
    leaves = jax.tree.leaves(frozen)
    params, adaptation = method.bind(frozen, trainable)
    assert all(one is other for one, other in zip(jax.tree.leaves(params), leaves, strict=True))
    assert same(adaptation, method.bind(frozen, trainable, key=None)[1])
    one, other, again = (method.bind(frozen, trainable, key=jax.random.key(i))[1] for i in (0, 1, 0))
    assert same(one, again)
    drawn = VARIANTS[name][variant].get("dropout", 0) > 0
    assert same(one, other) != drawn
    assert same(one, adaptation) != drawn
    assert (adaptation.shift is None) == (variant == "no shift")
    if name == "prefix":
        kv = adaptation.decoder.kv["self"]
        assert kv.k.shape == kv.v.shape == (L, P, *model.sites["decoder"].kv["self"])
        assert adaptation.shift is None or adaptation.shift == P
        assert not np.allclose(kv.k, kv.v)


@EVERY
def test_only_trainable_moves(started, family, name, variant):
    (_, _, model, frozen), method, trainable = started(family, name, variant)
    before, first = jax.device_get((frozen, trainable))
    frozen = parallel.place(frozen)
    buffers = [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(frozen) for shard in x.addressable_shards]
    tx = optax.adam(1e-2)
    state = TrainState(jnp.int32(0), trainable, tx.init(trainable), jax.random.key(0))
    step = parallel.train_step(make_train_step(model, method, OBJECTIVES["lm"](), tx, axis=parallel.AXIS))
    batch = one_a_row([(row, [1, 2]) for row in random_rows(0)], length=T + 1)
    batch = parallel.split_batch({field: getattr(batch, field) for field in Batch.__dataclass_fields__})
    state, sums = step(frozen, parallel.place(jax.tree.map(jnp.copy, state)), batch)
    moved = jax.tree.map(lambda one, other: np.any(one != other), first, jax.device_get(state.trainable))
    assert all(jax.tree.leaves(moved)), moved
    assert sums["grad_norm"] > 0
    assert sums["count"] == 16
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))
    after = [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(frozen) for shard in x.addressable_shards]
    assert after == buffers
    assert same(before, jax.device_get(frozen))
    # nothing as large as a frozen weight is carried along
    assert count(state.trainable) == count(trainable)
    assert count(state.opt_state) == 2 * count(trainable) + 1


# --- Prefix tuning: where it starts


@BOTH
def test_text_starts_as_that_text_in_context(started, family):
    (_, _, model, frozen), method, trainable = started(family, "prefix", "text")
    rows = random_rows(5)
    ours = prefix_tuning.logits(model, frozen, method.bind(frozen, trainable)[1], rows)
    whole = prefix_tuning.logits(model, frozen, None, [[3, 0, 1, 4, 2, *row] for row in rows])
    close(ours, [logits[P:] for logits in whole], 5e-6)


def test_text_is_cut_repeated_or_sets_the_length(twin):
    _, _, model, frozen = twin("llama")
    made = {}
    for length in (None, 3, 7):
        method = prefix.make(tokenizer, length=length, **TEXT)
        made[length] = method.init(jax.random.key(0), model, frozen)["v"]
        assert made[length].shape[1] == method.bind(frozen, {"k": made[length], "v": made[length]})[1].shift
    assert made[None].shape[1] == P
    np.testing.assert_allclose(made[3], made[None][:, :3], atol=1e-6)
    repeated = prefix.make(tokenizer, length=None, init="text", text="dabecda")
    np.testing.assert_array_equal(made[7], repeated.init(jax.random.key(0), model, frozen)["v"])


def test_vocabulary_starts_as_tokens_of_the_model(started):
    (_, _, model, frozen), _, trainable = started("gpt2", "prefix", "vocabulary")
    # The first layer's keys and values are a function of token and position alone.
    every = [prefix.computed(model, frozen, jnp.full(P, token)) for token in range(model.vocabulary)]
    for slot in range(P):
        errors = [np.abs(x[slot, 0, 1] - trainable["v"][0, slot]).max() for x in every]
        assert min(errors) < 1e-6 < sorted(errors)[1]


@BOTH
def test_random_has_the_scale_that_is_asked_for(twin, family):
    _, _, model, frozen = twin(family)
    trainable = prefix.make(None, length=50, scale=0.25).init(jax.random.key(0), model, frozen)
    for x in trainable.values():
        assert abs(x.mean()) < 0.02
        assert abs(x.std() - 0.25) < 0.02
    assert abs(np.corrcoef(np.ravel(trainable["k"]), np.ravel(trainable["v"]))[0, 1]) < 0.1


def test_mlp_starts_as_the_released_code_does(twin):
    """Embeddings N(0, 1); weights and biases of both layers U(+-1/sqrt(fan in)), torch's defaults for Linear."""
    _, _, model, frozen = twin("llama")
    width, D = 40, model.sites["decoder"].width
    method = prefix.make(None, length=60, reparametrisation=width)
    trainable = jax.jit(lambda key: method.init(key, model, frozen))(jax.random.key(0))
    assert {name: jax.tree.map(jnp.shape, leaf) for name, leaf in trainable.items()} == {
        "slots": (60, D),
        "down": {"kernel": (D, width), "bias": (width,)},
        "up": {"kernel": (width, L, 2, 2, 6), "bias": (L, 2, 2, 6)},
    }
    assert abs(trainable["slots"].mean()) < 0.1
    assert abs(trainable["slots"].std() - 1) < 0.1
    assert np.abs(trainable["slots"]).max() > 2.5  # which a truncated normal would not reach
    for layer, fan_in in (("down", D), ("up", width)):
        bound = fan_in**-0.5
        for kind, x in trainable[layer].items():
            assert 0.9 * bound < np.abs(x).max() <= bound, (layer, kind)
            assert abs(x.std() / (bound / 3**0.5) - 1) < 0.2, (layer, kind)
            assert abs(x.mean()) < 0.2 * bound, (layer, kind)


def test_mlp_computes_equation_3(started):
    (_, _, _, frozen), method, trainable = started("llama", "prefix", "mlp")
    adaptation = method.bind(frozen, trainable)[1]
    slots, down, up = (jax.device_get(trainable)[name] for name in ("slots", "down", "up"))
    hidden = np.tanh(slots @ down["kernel"] + down["bias"])
    table = hidden @ up["kernel"].reshape(M, -1) + up["bias"].reshape(-1)
    layered = table.reshape(P, 2 * L, 2, 6)  # the released code's order: layer 0 keys, layer 0 values, layer 1 keys ...
    for layer in range(L):
        np.testing.assert_allclose(adaptation.decoder.kv["self"].k[layer], layered[:, 2 * layer], atol=1e-6)
        np.testing.assert_allclose(adaptation.decoder.kv["self"].v[layer], layered[:, 2 * layer + 1], atol=1e-6)


@BOTH
def test_mlp_is_fitted_to_the_text(started, family):
    (_, _, model, frozen), method, fitted = started(family, "prefix", "mlp text")
    fresh = started(family, "prefix", "mlp")[2]  # from the same key
    text = started(family, "prefix", "text")
    target = text[1].bind(frozen, text[2])[1].decoder.kv["self"]

    def error(trainable):
        made = method.bind(frozen, trainable)[1].decoder.kv["self"]
        return sum(np.square(a - b).mean() for a, b in ((made.k, target.k), (made.v, target.v)))

    assert error(fitted) < 0.8 * error(fresh)
    np.testing.assert_array_equal(fitted["slots"], fresh["slots"])
    for layer in ("down", "up"):
        for kind in ("kernel", "bias"):
            assert np.abs(fitted[layer][kind] - fresh[layer][kind]).max() > 1e-3
    none = prefix.make(tokenizer, length=P, reparametrisation=M, **TEXT, fit_steps=0)
    assert same(none.init(jax.random.key(3), model, frozen), fresh)


def test_dropout_keeps_the_mean_and_zeroes_its_share(twin):
    frozen = twin("llama").frozen
    method = prefix.make(None, length=200, dropout=0.25)
    trainable = {name: jnp.ones((L, 200, 2, 6)) for name in ("k", "v")}
    kv = method.bind(frozen, trainable, key=jax.random.key(0))[1].decoder.kv["self"]
    for x in (kv.k, kv.v):
        np.testing.assert_allclose(np.unique(x), [0, 4 / 3], rtol=1e-6)
        assert abs((np.asarray(x) == 0).mean() - 0.25) < 0.02
    assert (np.asarray(kv.k) != np.asarray(kv.v)).mean() > 0.3  # drawn apart


# --- Counts, from shapes alone

SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20)}
# Derived from the paper: stored after training, trained through the MLP of width 512.
COUNTS = [
    ("small", 5, 92_160, 9_853_184),
    ("small", 10, 184_320, 9_857_024),
    ("medium", 1, 49_152, 25_740_800),
    ("medium", 5, 245_760, 25_744_896),
    ("medium", 10, 491_520, 25_750_016),
    ("medium", 20, 983_040, 25_760_256),
    ("medium", 40, 1_966_080, 25_780_736),
    ("large", 5, 460_800, 47_940_352),
    ("large", 10, 921_600, 47_946_752),
]


@pytest.mark.parametrize(("size", "length", "stored", "trained"), COUNTS)
def test_parameter_counts_are_the_papers(size, length, stored, trained):
    layers, width, heads = SIZES[size]
    config = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads}
    model = models.build(config | {"vocab_size": 50257, "n_positions": 1024})
    assert count(model.specs) == {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080}[size]
    for reparametrisation, wanted in ((512, trained), (None, stored)):
        method = prefix.make(None, length=length, reparametrisation=reparametrisation)
        shapes = jax.eval_shape(lambda frozen: method.init(jax.random.key(0), model, frozen), loading.abstract(model))  # noqa: B023
        base = setup.Base(model, None, None, method, None, length)
        assert setup.parameter_counts(base, shapes) == {
            "trained": wanted,
            "stored": stored,
            "frozen": count(model.specs),
        }
        adaptation = setup.abstract_adaptation(method, model)
        assert isinstance(adaptation, Adaptation)
        assert setup.prefix_length(adaptation) == length


# --- Options that cannot work


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 0}, "method.length must be at least 1, got 0"),
        ({"length": -3}, "method.length must be at least 1, got -3"),
        ({"length": None}, "method.length=None takes the length of method.text, which is not given"),
        ({"length": P, "dropout": 1.0}, r"method.dropout must be in \[0, 1\), got 1.0"),
        ({"length": P, "dropout": -0.1}, r"method.dropout must be in \[0, 1\), got -0.1"),
        ({"length": P, "init": "zeros"}, "unknown init 'zeros'; valid: random, text, vocabulary"),
        ({"length": P, "scale": 2.0, **TEXT}, "method.scale goes with"),
        ({"length": P, "scale": 2.0, "reparametrisation": M}, "method.scale goes with"),
        ({"length": P, "scale": 0.0}, "scale > 0"),
        ({"length": P, "fit_steps": 3, **TEXT}, "method.fit_steps and method.fit_learning_rate go with"),
        ({"length": P, "fit_learning_rate": 0.1, "reparametrisation": M}, "method.fit_learning_rate go with"),
        ({"length": P, "fit_steps": -1, "reparametrisation": M, **TEXT}, "fit_steps >= 0"),
        ({"length": P, "text": "abc"}, "method.text goes with method.init='text' and nothing else"),
        ({"length": P, "init": "vocabulary", "text": "abc"}, "method.text goes with method.init='text'"),
        ({"length": P, "init": "text"}, "method.text goes with method.init='text'"),
        ({"length": P, "init": "text", "text": ""}, "method.text='' has no tokens"),
        ({"length": P, "reparametrisation": 0}, "method.reparametrisation must be a width of at least 1 or None"),
    ],
)
def test_impossible_options_raise(given, message):
    with pytest.raises(UserError, match=message):
        prefix.make(tokenizer, **given)


def test_text_without_a_tokenizer_raises():
    with pytest.raises(UserError, match="needs a tokenizer, and the model's folder has none"):
        prefix.make(None, length=P, **TEXT)


def test_config_section_of_a_method():
    options = {"name": "prefix", "length": P, "lenght": 4}
    with pytest.raises(UserError, match="unknown key in config section method: 'lenght'; valid: dropout, fit_"):
        setup.named("method", METHODS, options, None)
    with pytest.raises(UserError, match=r"unknown method\.name 'lora'; valid: prefix"):
        setup.named("method", METHODS, {"name": "lora"}, None)
    with pytest.raises(UserError, match="config section method lacks length"):
        setup.named("method", METHODS, {"name": "prefix"}, None)

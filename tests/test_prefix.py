"""Prefix tuning: where it starts, its options, its parameters, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import K, L, P, close, letters, random_rows

import prefix_tuning
from prefix_tuning import models, positions, setup
from prefix_tuning.errors import UserError
from prefix_tuning.methods import METHODS, prefix, rows
from prefix_tuning.registry import named
from prefix_tuning.types import Adaptation, count

M = 9  # the width of the MLP
TEXT = {"init": "text", "text": "dabec"}
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


@pytest.fixture(scope="module")
def started(twin):
    """(family, options) -> twin, method, and its trainable parameters from key 3."""

    def start(family, **options):
        made = twin(family)
        method = prefix.make(letters, **{"length": P} | options)
        frozen = method.prepare(jax.random.key(3), made.model, made.frozen)
        return made._replace(frozen=frozen), method, method.init(jax.random.key(3), made.model, frozen)

    return start


def of(trainable):
    """The parameters at the only attention site there is."""
    return trainable["decoder"]["self"]


# --- Where it starts


@BOTH
def test_text_starts_as_that_text_in_context(started, family):
    (_, _, model, frozen), method, trainable = started(family, **TEXT)
    given = random_rows(5)
    ours = prefix_tuning.logits(model, frozen, method.bind(frozen, trainable)[1], given)
    whole = prefix_tuning.logits(model, frozen, None, [[3, 0, 1, 4, 2, *row] for row in given])
    close(ours, [logits[P:] for logits in whole], 5e-6)


def test_text_is_cut_repeated_or_sets_the_length(twin):
    _, _, model, frozen = twin("llama")
    made = {}
    for length in (None, 3, 7):
        method = prefix.make(letters, length=length, **TEXT)
        made[length] = of(method.init(jax.random.key(0), model, frozen))["v"]
        assert (
            made[length].shape[1]
            == method.bind(frozen, {"decoder": {"self": {"k": made[length], "v": made[length]}}})[1].shift
        )
    assert made[None].shape[1] == P
    np.testing.assert_allclose(made[3], made[None][:, :3], atol=1e-6)
    repeated = prefix.make(letters, length=None, init="text", text="dabecda")
    np.testing.assert_array_equal(made[7], of(repeated.init(jax.random.key(0), model, frozen))["v"])


def test_vocabulary_starts_as_tokens_of_the_model(started):
    (_, _, model, frozen), _, trainable = started("gpt2", init="vocabulary")
    # The first layer's keys and values are a function of token and position alone.
    every = [of(rows.computed(model, frozen, jnp.full(P, token))) for token in range(model.vocabulary)]
    for slot in range(P):
        errors = [np.abs(x[slot, 0, 1] - of(trainable)["v"][0, slot]).max() for x in every]
        assert min(errors) < 1e-6 < sorted(errors)[1]


@BOTH
def test_random_has_the_scale_that_is_asked_for(twin, family):
    _, _, model, frozen = twin(family)
    trainable = of(prefix.make(None, length=50, scale=0.25).init(jax.random.key(0), model, frozen))
    for x in trainable.values():
        assert abs(x.mean()) < 0.02
        assert abs(x.std() - 0.25) < 0.02
    assert abs(np.corrcoef(np.ravel(trainable["k"]), np.ravel(trainable["v"]))[0, 1]) < 0.1


def test_mlp_starts_as_the_released_code_does(twin):
    """Embeddings N(0, 1); weights and biases of both layers U(+-1/sqrt(fan in)), torch's defaults for Linear."""
    _, _, model, frozen = twin("llama")
    width, D = 40, model.sites["decoder"].width
    method = prefix.make(None, length=60, reparametrisation=width)
    trainable = of(jax.jit(lambda key: method.init(key, model, frozen))(jax.random.key(0)))
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
    (_, _, _, frozen), method, trainable = started("llama", reparametrisation=M)
    adaptation = method.bind(frozen, trainable)[1]
    slots, down, up = (jax.device_get(of(trainable))[name] for name in ("slots", "down", "up"))
    hidden = np.tanh(slots @ down["kernel"] + down["bias"])
    table = hidden @ up["kernel"].reshape(M, -1) + up["bias"].reshape(-1)
    layered = table.reshape(P, 2 * L, 2, 6)  # the released code's order: layer 0 keys, layer 0 values, layer 1 keys ...
    for layer in range(L):
        np.testing.assert_allclose(adaptation.decoder.kv["self"].k[layer], layered[:, 2 * layer], atol=1e-6)
        np.testing.assert_allclose(adaptation.decoder.kv["self"].v[layer], layered[:, 2 * layer + 1], atol=1e-6)


@BOTH
def test_mlp_is_fitted_to_the_text(started, family):
    (_, _, model, frozen), method, fitted = started(
        family, reparametrisation=M, **TEXT, fit_steps=20, fit_learning_rate=1e-2
    )
    fresh = started(family, reparametrisation=M)[2]  # from the same key
    text = started(family, **TEXT)
    target = text[1].bind(frozen, text[2])[1].decoder.kv["self"]

    def error(trainable):
        made = method.bind(frozen, trainable)[1].decoder.kv["self"]
        return sum(np.square(a - b).mean() for a, b in ((made.k, target.k), (made.v, target.v)))

    assert error(fitted) < 0.8 * error(fresh)
    fitted, fresh_ = of(fitted), of(fresh)
    np.testing.assert_array_equal(fitted["slots"], fresh_["slots"])
    for layer in ("down", "up"):
        for kind in ("kernel", "bias"):
            assert np.abs(fitted[layer][kind] - fresh_[layer][kind]).max() > 1e-3
    none = prefix.make(letters, length=P, reparametrisation=M, **TEXT, fit_steps=0)
    for one, other in zip(*map(jax.tree.leaves, (none.init(jax.random.key(3), model, frozen), fresh)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_dropout_keeps_the_mean_and_zeroes_its_share(twin):
    frozen = twin("llama").frozen
    method = prefix.make(None, length=200, dropout=0.25)
    trainable = {"decoder": {"self": {name: jnp.ones((L, 200, 2, 6)) for name in ("k", "v")}}}
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
        assert setup.parameter_counts(method, model) == {
            "trained": wanted,
            "stored": stored,
            "frozen": count(model.specs),
        }
        adaptation = setup.abstract_adaptation(method, model)
        assert isinstance(adaptation, Adaptation)
        assert positions.taken(adaptation, model).read == length


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
        ({"length": P, "text": "abc"}, "goes with method.init='text' and nothing else"),
        ({"length": P, "init": "vocabulary", "text": "abc"}, "goes with method.init='text'"),
        ({"length": P, "init": "text"}, "goes with method.init='text'"),
        ({"length": P, "init": "text", "text": ""}, "method.text='' has no tokens"),
        ({"length": P, "reparametrisation": 0}, "method.reparametrisation must be a width of at least 1 or None"),
    ],
)
def test_impossible_options_raise(given, message):
    with pytest.raises(UserError, match=message):
        prefix.make(letters, **given)


def test_text_without_a_tokenizer_raises():
    with pytest.raises(UserError, match="needs a tokenizer, and the model's folder has none"):
        prefix.make(None, length=P, **TEXT)


def test_config_section_of_a_method():
    options = {"name": "prefix", "length": P, "lenght": 4}
    with pytest.raises(UserError, match="unknown key in config section method: 'lenght'; valid: dropout, fit_"):
        named("method", METHODS, options, None)
    with pytest.raises(UserError, match=r"unknown method\.name 'ia3'; valid: adapter, compose, finetune, infix, lora"):
        named("method", METHODS, {"name": "ia3"}, None)
    with pytest.raises(UserError, match="config section method lacks length"):
        named("method", METHODS, {"name": "prefix"}, None)


# --- Some layers, frozen slots, gates, long texts


@BOTH
def test_only_the_chosen_layers_have_a_prefix(started, family):
    (_, _, model, frozen), method, trainable = started(family, layers=(2, 0))
    assert of(trainable)["k"].shape[0] == 2
    kv = method.bind(frozen, trainable)[1].decoder.kv["self"]
    assert np.asarray(kv.mask).tolist() == [[True] * P, [False] * P, [True] * P]
    np.testing.assert_array_equal(kv.k[np.array([0, 2])], of(trainable)["k"])
    ours = prefix_tuning.logits(model, frozen, method.bind(frozen, trainable)[1], random_rows(5))
    # Slots that no query can reach are slots that are not there: keys far away take no mass.
    far = kv.replace(k=np.where(np.arange(L)[:, None, None, None] == 1, 0, kv.k), mask=None)
    with_them = Adaptation(prefix_tuning.types.LayerHooks(kv={"self": far}), jnp.int32(P))
    assert np.abs(ours[0] - prefix_tuning.logits(model, frozen, with_them, random_rows(5))[0]).max() > 1e-3
    assert setup.parameter_counts(method, model)["stored"] == 2 * P * 2 * K * model.sites["decoder"].kv["self"][1]


@pytest.mark.parametrize("layers", [(0, 3), (1, 1), (-1,), ()])
def test_layers_that_are_not_there(twin, layers):
    model = twin("llama").model
    with pytest.raises(UserError, match="must be different layers among 0 to 2"):
        setup.abstract_adaptation(prefix.make(None, length=P, layers=layers), model)


@BOTH
@pytest.mark.parametrize("reparametrisation", [None, M])
def test_frozen_slots_are_the_texts_and_never_trained(started, family, reparametrisation):
    options = {} if reparametrisation is None else {"reparametrisation": M, "fit_steps": 3}
    (_, _, model, frozen), method, trainable = started(family, **TEXT, frozen_slots=2, **options)
    text = started(family, **TEXT)
    whole = text[1].bind(text[0].frozen, text[2])[1].decoder.kv["self"]
    kv = method.bind(frozen, trainable)[1].decoder.kv["self"]
    assert kv.k.shape == whole.k.shape
    np.testing.assert_array_equal(kv.k[:, :2], whole.k[:, :2])
    np.testing.assert_array_equal(kv.v[:, :2], whole.v[:, :2])
    if reparametrisation is None:
        assert of(trainable)["k"].shape[1] == P - 2
        np.testing.assert_array_equal(kv.v[:, 2:], of(trainable)["v"])
    moved = method.bind(frozen, jax.tree.map(lambda x: x + 1, trainable))[1].decoder.kv["self"]
    np.testing.assert_array_equal(moved.k[:, :2], whole.k[:, :2])
    counts = setup.parameter_counts(method, model)
    assert counts["stored"] == count((whole.k, whole.v))
    if reparametrisation is None:
        assert counts["trained"] * P == counts["stored"] * (P - 2)


@BOTH
def test_gates_start_as_the_base_model_bit_for_bit(started, family):
    (_, _, model, frozen), method, trainable = started(family, gates=True)
    given = random_rows(5)
    bare = prefix_tuning.logits(model, frozen, None, given)
    fresh = prefix_tuning.logits(model, frozen, method.bind(frozen, trainable)[1], given)
    for one, other in zip(fresh, bare, strict=True):
        np.testing.assert_array_equal(one, other)
    # Keys and values of zero are not: they take their share of the softmax.
    nothing = Adaptation(
        prefix_tuning.types.LayerHooks(kv={"self": prefix_tuning.types.KV(*np.zeros((2, L, P, K, 1)))})
    )
    nothing = jax.tree.map(
        lambda x: np.zeros((*x.shape[:-1], model.sites["decoder"].kv["self"][1]), np.float32), nothing
    )
    assert np.abs(prefix_tuning.logits(model, frozen, nothing, given)[0] - bare[0]).max() > 1e-3
    opened = {"decoder": {"self": of(trainable) | {"gate": jnp.ones_like(of(trainable)["gate"])}}}
    kv = method.bind(frozen, opened)[1].decoder.kv["self"]
    np.testing.assert_allclose(kv.gate, np.tanh(1.0), rtol=1e-6)
    assert np.abs(prefix_tuning.logits(model, frozen, method.bind(frozen, opened)[1], given)[0] - bare[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "shifted"),
    [({}, True), ({"gates": True}, False), ({"gates": True, "shift": True}, True), ({"shift": False}, False)],
)
def test_shift_is_told_or_follows_from_the_gates(started, options, shifted):
    (_, _, _, frozen), method, trainable = started("llama", **options)
    assert (method.bind(frozen, trainable)[1].shift is not None) == shifted


def test_gates_and_layers_go_together(started):
    (_, _, model, frozen), method, trainable = started("llama", gates=True, layers=(1, 2))
    opened = {"decoder": {"self": of(trainable) | {"gate": jnp.ones_like(of(trainable)["gate"])}}}
    adaptation = method.bind(frozen, opened)[1]
    assert np.asarray(adaptation.decoder.kv["self"].gate[0] == 0).all()
    assert all(np.isfinite(x).all() for x in prefix_tuning.logits(model, frozen, adaptation, random_rows(5)))


def test_text_file_is_its_text(tmp_path, started):
    (tmp_path / "corpus.txt").write_text("dabecdabecda")
    _, _, trainable = started("llama", init="text", text_file=str(tmp_path / "corpus.txt"))
    wanted = started("llama", **TEXT)[2]
    np.testing.assert_array_equal(of(trainable)["k"], of(wanted)["k"])
    with pytest.raises(UserError, match=r"cannot read .*nowhere.txt"):
        prefix.make(letters, length=P, init="text", text_file=str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frozen_slots": 1}, "method.frozen_slots are slots of a text"),
        ({"frozen_slots": P, **TEXT}, "must be at least 0 and below method.length=5, got 5"),
        ({"text_file": "x.txt"}, "method.text or method.text_file goes with method.init='text'"),
        ({"text_file": "x.txt", **TEXT}, "method.text or method.text_file goes with method.init='text'"),
    ],
)
def test_more_impossible_options_raise(given, message):
    with pytest.raises(UserError, match=message):
        prefix.make(letters, **{"length": P} | given)

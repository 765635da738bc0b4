"""Every method in every variant on both families under the same contracts: what it trains, what it leaves alone, where
it starts, and that it is the same on one device and on eight, before and after it was saved, and traced once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from conftest import FAMILIES, B, L, P, T, V, letters, one_a_row, random_rows

import prefix_tuning
from prefix_tuning import fit, models, parallel, setup, template
from prefix_tuning.checkpoint import Checkpoints
from prefix_tuning.methods import METHODS
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.registry import named
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import Batch, Objective, TrainState, count

M = 9  # the width of small networks and bottlenecks
TEXT = {"init": "text", "text": "dabec"}
FIT = {"fit_steps": 20, "fit_learning_rate": 1e-2}
EVERYTHING = {
    "prefix": {"length": P},
    "lora": {"rank": 2, "target_modules": ("q", "down")},
    "adapter": {"bottleneck": M},
}
VARIANTS = {
    "prefix": {
        "random": {"length": P},
        "vocabulary": {"length": P, "init": "vocabulary"},
        "text": {"length": P, **TEXT},
        "mlp": {"length": P, "reparametrisation": M},
        "mlp text": {"length": P, "reparametrisation": M, **TEXT, **FIT},
        "dropout": {"length": P, "dropout": 0.4},
        "no shift": {"length": P, "shift": False},
        "layers": {"length": P, "layers": (0, 2)},
        "frozen slots": {"length": P, **TEXT, "frozen_slots": 2},
        "gates": {"length": P, "gates": True},
    },
    "infix": {
        "direct": {"length": P},
        "mlp": {"length": P, "reparametrisation": M},
        "dropout": {"length": P, "reparametrisation": M, "dropout": 0.4},
    },
    "prompt": {
        "random": {"length": P, "init": "random"},
        "vocabulary": {"length": P, "population": 6},
        "text": {"length": P, **TEXT},
        "labels": {"length": P, "init": "labels", "labels": ("da", "bec")},
        "mlp": {"length": P, "init": "random", "reparametrisation": M},
    },
    "ptuning": {
        "lstm": {"length": P},
        "mlp": {"length": P, "network": "mlp", "hidden": M},
        "within": {"length": P, "network": "mlp", "template": "{rows:2}{prompt}{rows:3}"},
        "after": {"length": P, "network": "mlp", "template": "{prompt}{rows:5}"},
    },
    "memory": {"elu": {}, "gelu": {"feature": "gelu"}},
    "propagation": {"plain": {"length": P}},
    "lora": {
        "plain": {"rank": 2},
        "all": {"rank": 2, "target_modules": ("all-linear",), "alpha": 5.0, "rslora": True},
        "dropout": {"rank": 2, "dropout": 0.4},
    },
    "adapter": {
        "houlsby": {"form": "houlsby", "bottleneck": M},
        "pfeiffer": {"form": "pfeiffer", "bottleneck": M, "activation": "gelu"},
        "lin": {"form": "lin", "bottleneck": M},
        "parallel": {"form": "parallel", "bottleneck": M, "sublayer": "attention"},
        "scaled": {"form": "scaled_parallel", "bottleneck": M, "scale": 3.0},
    },
    "finetune": {
        "all": {},
        "top": {"top_layers": 2},
        "top and embedding": {"top_layers": 1, "embedding": True},
        "biases": {"biases": True},
    },
    "compose": {
        "three": {"parts": EVERYTHING},
        "unipelt": {"parts": EVERYTHING, "gates": True},
        "prompts": {"parts": {"prefix": {"length": 3}, "prompt": {"length": P, **TEXT}, "infix": {"length": 2}}},
        "with biases": {"parts": {"finetune": {"biases": True}, "memory": {}, "propagation": {"length": P}}},
    },
}
# Those that start as the base model exactly; what the others start with takes part in attention.
IDENTITY = {
    ("prefix", "gates"),
    *((name, variant) for name in ("memory", "lora", "adapter", "finetune") for variant in VARIANTS[name]),
}
# What starts in one way only, whatever the key.
KEYLESS = {
    ("prefix", "text"),
    ("prefix", "frozen slots"),
    ("prompt", "text"),
    ("memory", "elu"),
    ("memory", "gelu"),
    *(("finetune", variant) for variant in VARIANTS["finetune"]),
}
# Those that train something of another shape than the variants before them do: a step is compiled for each.
FORMS = {
    "prefix": ("random", "mlp", "dropout", "layers", "frozen slots", "gates"),
    "infix": ("mlp", "dropout"),
    "prompt": ("text", "mlp"),
    "ptuning": ("lstm", "within"),
    "memory": ("gelu",),
    "propagation": ("plain",),
    "lora": ("all", "dropout"),
    "adapter": ("houlsby", "lin", "scaled"),
    "finetune": ("all", "top and embedding", "biases"),
    "compose": ("unipelt", "prompts", "with biases"),
}
CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]
# gpt2 takes the first variant and the last form of each method, llama all of them.
EVERY = pytest.mark.parametrize(
    ("family", "name", "variant"),
    [("llama", *case) for case in CASES]
    + [
        ("gpt2", name, variant)
        for name, forms in FORMS.items()
        for variant in dict.fromkeys((next(iter(VARIANTS[name])), forms[-1]))
    ],
    ids=lambda value: value.replace(" ", "_"),
)
# What does not depend on the family is looked at on one.
ONCE = pytest.mark.parametrize(
    ("family", "name", "variant"), [("llama", *case) for case in CASES], ids=lambda value: value.replace(" ", "_")
)
# What takes long to compile, a step or a search, has several forms in it, each at sites of its own.
TOGETHER = {
    "first": {
        "prefix": "random",
        "infix": "mlp",
        "prompt": "text",
        "memory": "gelu",
        "lora": "all",
        "adapter": "houlsby",
        "finetune": "all",
    },
    "second": {
        "prefix": "mlp",
        "prompt": "mlp",
        "ptuning": "lstm",
        "adapter": "lin",
        "finetune": "top and embedding",
    },
    "third": {"prefix": "layers", "ptuning": "within", "finetune": "biases"},
    "fourth": {"prefix": "frozen slots", "adapter": "scaled"},
    "fifth": {"prefix": "gates", "propagation": "plain"},
    "dropout": {"prefix": "dropout", "infix": "dropout", "lora": "dropout"},
    "gated": {"compose": "unipelt"},
    "prompts": {"compose": "prompts"},
    # Of each method the last, for those that meet what is gpt2's own: positions that are added to embeddings, fused
    # projections and their biases.  The others' hooks are in code that both share.
    "last": {
        "prefix": "gates",
        "prompt": "mlp",
        "ptuning": "within",
        "memory": "gelu",
        "adapter": "scaled",
        "finetune": "biases",
    },
    "last dropout": {"infix": "dropout", "lora": "dropout", "propagation": "plain"},
}
LLAMA = [("llama", variant) for variant in TOGETHER if "last" not in variant]
STEPS = pytest.mark.parametrize(
    ("family", "variant"),
    [*LLAMA, ("gpt2", "last"), ("gpt2", "last dropout")],
    ids=lambda value: value.replace(" ", "_"),
)
FORMED = pytest.mark.parametrize(("family", "variant"), LLAMA, ids=lambda value: value.replace(" ", "_"))


def test_no_method_is_left_out():
    """Of those of `compose`, what is "with biases" is in others."""
    assert set(VARIANTS) == set(FORMS) == set(METHODS)
    assert all(set(forms) <= set(VARIANTS[name]) for name, forms in FORMS.items())
    stepped = {case for _, variant in LLAMA for case in TOGETHER[variant].items()}
    forms = {(name, variant) for name, forms in FORMS.items() for variant in forms}
    assert stepped == forms - {("compose", "with biases")}


@pytest.fixture(scope="module")
def started(twin):
    """(family, name, variant) -> twin with what is kept beside the weights, method, trainable from key 3, made once."""

    @functools.cache
    def start(family, name, variant):
        made = twin(family)
        method = named("method", METHODS, {"name": name} | VARIANTS[name][variant], letters)
        return begun(made, method)

    return start


@pytest.fixture(scope="module")
def begun_together(twin):
    """(family, those of `TOGETHER`) -> the same for one method of them all."""

    @functools.cache
    def start(family, variant):
        parts = {name: VARIANTS[name][own] for name, own in TOGETHER[variant].items()}
        ((name, options),) = parts.items() if len(parts) == 1 else [("compose", {"parts": parts})]
        return begun(twin(family), named("method", METHODS, {"name": name} | options, letters))

    return start


def begun(made, method):
    made = made._replace(frozen=method.prepare(jax.random.key(3), made.model, made.frozen))
    return made, method, method.init(jax.random.key(3), made.model, made.frozen)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_binds_on_every_family(family, name):
    model = models.build(transformers.AutoConfig.for_model(family, **FAMILIES[family]).to_dict())
    # P-tuning's LSTM, which takes long to trace, knows nothing of the family.
    variant = "within" if name == "ptuning" and family != "llama" else next(iter(VARIANTS[name]))
    method = named("method", METHODS, {"name": name} | VARIANTS[name][variant], letters)
    setup.abstract_adaptation(method, model)  # checks its shapes
    batch = Batch(**jax.tree.map(jnp.asarray, a_batch(method)))
    frozen, trainable = setup.abstract_frozen(method, model), setup.abstract_trainable(method, model)
    run = lambda frozen, trainable: model.hidden(*method.bind(frozen, trainable), batch)  # noqa: E731
    assert jax.eval_shape(run, frozen, trainable).shape == (*batch.tokens.shape, model.sites["decoder"].width)


def prompted(method, row):
    """A row of tokens with the virtual tokens where the method's template has them."""
    tokens, used = [], V
    for piece in template.pieces(method.template.replace("{prompt}", "x")):
        tokens += list(row) if piece == "x" else range(used, used + piece)
        used += 0 if piece == "x" else piece
    return tokens


def a_batch(method, seed=0):
    rows = [prompted(method, row) for row in random_rows(seed)]
    batch = one_a_row([(row, [1, 2]) for row in rows], length=T + P + 1)
    return {field: getattr(batch, field) for field in Batch.__dataclass_fields__}


def perturbed(trainable, seed=0):
    """Every parameter moved, so that nothing is an identity any more."""
    leaves, tree = jax.tree.flatten(trainable)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    plain = [
        [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x) for x in leaves]
        for leaves in map(jax.tree.leaves, (one, other))
    ]
    return all(np.array_equal(a, b) for a, b in zip(*plain, strict=True))


@ONCE
def test_init_is_float32_and_a_function_of_the_key(started, family, name, variant):
    (_, _, model, frozen), method, trainable = started(family, name, variant)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert same(trainable, method.init(jax.random.key(3), model, frozen))
    other = method.init(jax.random.key(4), model, frozen)
    assert same(trainable, other) == ((name, variant) in KEYLESS)
    assert setup.parameter_counts(method, model)["trained"] == count(trainable)


@EVERY
def test_fresh_is_the_base_model_or_is_declared_not_to_be(started, family, name, variant):
    (_, _, model, frozen), method, trainable = started(family, name, variant)
    rows = random_rows(5)
    bare = prefix_tuning.logits(model, frozen, None, rows)
    given = [prompted(method, row) for row in rows]
    ours = prefix_tuning.logits(model, *method.bind(frozen, trainable), given)
    identical = given == rows and all(np.array_equal(one, other) for one, other in zip(ours, bare, strict=True))
    assert identical == ((name, variant) in IDENTITY)
    moved = prefix_tuning.logits(model, *method.bind(frozen, perturbed(trainable)), given)
    assert max(np.abs(one[-1] - other[-1]).max() for one, other in zip(moved, ours, strict=True)) > 1e-3


@ONCE
def test_bind_leaves_frozen_alone_and_draws_only_from_its_key(started, family, name, variant):
    (_, _, model, frozen), method, trainable = started(family, name, variant)
    trainable = perturbed(trainable)
    params, adaptation = method.bind(frozen, trainable)
    fit.check(adaptation, model.sites, rows=1)
    if name != "finetune" and "biases" not in variant:
        assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(frozen), strict=True))
    assert same((params, adaptation), method.bind(frozen, trainable, key=None))
    if VARIANTS[name][variant].get("dropout", 0) == 0:  # a model is told of no other key than what `bind` makes of it
        assert same((params, adaptation), method.bind(frozen, trainable, key=jax.random.key(0)))
        return
    batch = a_batch(method)
    tokens, lengths = batch["tokens"], (batch["segments"] > 0).sum(1)
    hidden = jax.jit(lambda key: model.prefill(*method.bind(frozen, trainable, key=key), tokens, lengths, 13)[0])
    one, other, again = (np.asarray(hidden(jax.random.key(i))) for i in (0, 1, 0))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@ONCE
def test_stored_is_all_that_is_needed(started, family, name, variant):
    (_, _, model, frozen), method, trainable = started(family, name, variant)
    counts = setup.parameter_counts(method, model)
    assert counts["frozen"] == count(model.specs)
    assert counts["stored"] == count(jax.eval_shape(method.stored, frozen, trainable))
    networks = "reparametrisation" in VARIANTS[name][variant] or name == "ptuning"
    if networks:
        assert counts["stored"] < counts["trained"]
    elif (name, variant) != ("prefix", "frozen slots"):
        assert counts["stored"] == counts["trained"]


@STEPS
def test_a_step_moves_only_what_is_trained_and_is_the_same_on_eight_devices(begun_together, family, variant):
    (_, _, model, frozen), method, trainable = begun_together(family, variant)
    before = jax.device_get(frozen)
    frozen = parallel.place(frozen)
    buffers = [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(frozen) for shard in x.addressable_shards]
    start = perturbed(trainable)  # where nothing is zero, so that everything has a gradient
    tx = optax.sgd(1.0)  # its update is the gradient
    batch = a_batch(method)
    batch["mask"][3] = 0.0  # an uneven share for one of the devices

    def fresh():
        own = jax.tree.map(lambda x: jnp.array(x, copy=True), start)
        return TrainState(jnp.int32(0), own, tx.init(own), jax.random.key(0))

    traces = []

    def objective(*arguments):
        traces.append(1)
        return OBJECTIVES["lm"](None).loss(*arguments)

    def body(axis=None):
        return make_train_step(model, method, Objective(objective), tx, axis=axis)

    step = parallel.train_step(body(parallel.AXIS))
    state, sums = step(frozen, parallel.place(fresh()), parallel.split_batch(batch))
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != np.asarray(b)), start, jax.device_get(state.trainable))
    # The embeddings of tokens that no example holds, and heads that a mask silences, are all that may rest.
    assert all(jax.tree.leaves(moved)), moved
    assert sums["count"] == 2 * B - 2
    traced = len(traces)
    state, _ = step(frozen, state, parallel.split_batch(a_batch(method, seed=1)))
    assert len(traces) == traced > 0
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))
    after = [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(frozen) for shard in x.addressable_shards]
    assert after == buffers
    assert same(before, jax.device_get(frozen))
    assert count(state.trainable) == count(trainable)  # nothing as large as a frozen weight is carried along

    if "dropout" not in variant:  # every device draws its own
        one = jax.tree.map(lambda x: x[None], Batch(**batch))
        alone, alone_sums = jax.jit(body())(before, fresh(), one)
        first, _ = step(frozen, parallel.place(fresh()), parallel.split_batch(batch))
        np.testing.assert_allclose(sums["loss"], alone_sums["loss"], rtol=1e-5)
        origins, wanted = jax.tree.leaves(start), jax.tree.leaves(alone.trainable)
        for (path, ours), theirs, origin in zip(
            jax.tree_util.tree_leaves_with_path(first.trainable), wanted, origins, strict=True
        ):
            gradient = np.abs(np.asarray(theirs) - np.asarray(origin)).max()
            tolerance = 2e-5 * max(1.0, gradient)
            np.testing.assert_allclose(ours, theirs, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@FORMED
def test_saved_is_loaded(begun_together, tmp_path, family, variant):
    (_, _, model, _), method, trainable = begun_together(family, variant)
    trainable = perturbed(trainable)
    tx = optax.adam(1e-3)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(TrainState(jnp.int32(7), trainable, tx.init(trainable), jax.random.key(0)))
    checkpoints.wait()
    restored, step = checkpoints.restore_trainable(setup.abstract_trainable(method, model))
    checkpoints.close()
    assert step == 7
    assert same(trainable, restored)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(trainable)]


@ONCE
def test_weights_in_bfloat16_stay_so(started, family, name, variant):
    """Everything trained is float32 and everything computed has the weights' dtype, or a scan would not trace."""
    (_, _, model, frozen), method, trainable = started(family, name, variant)

    def half(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype)

    low = jax.tree.map(half, frozen)
    shapes = jax.eval_shape(lambda key, frozen: method.init(key, model, frozen), jax.random.key(0), low)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    batch = Batch(**a_batch(method))
    hidden = jax.eval_shape(lambda f, t: model.hidden(*method.bind(f, t, key=jax.random.key(0)), batch), low, trainable)
    assert hidden.dtype == jnp.bfloat16
    cache = jax.eval_shape(
        lambda f, t: model.prefill(*method.bind(f, t), batch.tokens, batch.examples, batch.tokens.shape[1])[1],
        low,
        trainable,
    )
    assert {x.dtype for x in jax.tree.leaves((cache.k, cache.v, cache.read))} == {jnp.dtype("bfloat16")}


@FORMED
def test_decoding_is_the_full_forward(begun_together, family, variant):
    """What beam and greedy search read from the cache is what a forward pass over the whole row says."""
    (_, _, model, frozen), method, trainable = begun_together(family, variant)
    params, adaptation = method.bind(frozen, perturbed(trainable))
    # In all as many rows and tokens as above, for which the full pass is compiled already.
    rows = [prompted(method, row) for row in random_rows(5, lengths=(T - L, 1) * (B // 2))]
    new = prefix_tuning.generate(model, params, adaptation, rows, max_new_tokens=L, end_tokens=())
    whole = prefix_tuning.logits(model, params, adaptation, [r + n for r, n in zip(rows, new, strict=True)])
    for row, tokens, logits in zip(rows, new, whole, strict=True):
        assert logits[len(row) - 1 : -1].argmax(-1).tolist() == tokens

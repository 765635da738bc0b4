"""Matrices in 8 bits: what is lost, that nothing else is, and who is told that it cannot be had."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import one_a_row, random_prefix, random_rows

import run
from prefix_tuning import api, decode, nn, parallel, setup
from prefix_tuning.errors import UserError
from prefix_tuning.interop import base
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import Batch, LayerHooks, Quantised, TrainState


def is_quantised(leaf):
    return isinstance(leaf, Quantised)


def whole(leaf, path, spec):
    """A weight as floats again: its scale stretched over the axes that share it."""
    if not is_quantised(leaf):
        return leaf
    scale = np.expand_dims(np.asarray(leaf.scale), loading.contracted(path, spec))
    return jnp.asarray(np.asarray(leaf.values, np.float32) * scale).astype(leaf.dtype)


def both(twin, family, dtype="float32", **options):
    """(model, its weights in 8 bits, the same as floats)."""
    _, folder, model, _ = twin(family, **options)
    small = loading.load_weights(folder, model, dtype, lambda _: None, weights="int8")
    flat, specs = loading.flatten(small), dict(loading.paths(model.specs))
    return model, small, loading.unflatten({path: whole(leaf, path, specs[path]) for path, leaf in flat.items()})


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5"])
def test_each_channel_loses_half_a_step_of_its_own_at_most(twin, family):
    _, folder, model, frozen = twin(family)
    small = loading.flatten(loading.load_weights(folder, model, "float32", weights="int8"))
    quantised = 0
    for path, spec in loading.paths(model.specs):
        leaf, exact, shared = small[path], np.asarray(loading.flatten(frozen)[path]), loading.contracted(path, spec)
        assert is_quantised(leaf) == (path[-1] in ("kernel", "embedding", "unembedding")), path
        if not is_quantised(leaf):
            np.testing.assert_array_equal(leaf, exact)
            continue
        quantised += 1
        largest = np.abs(exact).max(shared)
        np.testing.assert_allclose(leaf.scale, largest / 127, rtol=1e-6)
        np.testing.assert_array_equal(np.abs(leaf.values).max(shared), 127)  # the largest number itself is kept
        assert (np.abs(whole(leaf, path, spec) - exact) <= np.expand_dims(0.50001 * leaf.scale, shared)).all(), path
    assert quantised >= 5


def test_a_channel_of_zeros_stays_zero():
    x = np.zeros((3, 4), np.float32)
    x[:, 1] = 1, -2, 0.5
    values, scale = loading.quantise(x, (0,))
    np.testing.assert_allclose(values * scale, x, atol=scale[1] / 2)
    assert np.isfinite(scale).all()
    assert not values[:, 0].any()


# One for each arithmetic: the others differ in names and norms.
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "bert", "bart", "t5"])
def test_every_family_computes_what_its_dequantised_weights_do(twin, family):
    model, small, exact = both(twin, family)
    rows = random_rows(0, lengths=(5, 3))
    options = {"sources": rows} if model.is_encoder_decoder else {}
    if model.writes or "masked" in exact:
        found = [api.logits(model, weights, None, rows, **options) for weights in (small, exact)]
    else:
        batch = Batch(**{k: x for k, x in one_a_row([([1, 2, 3], [4])]).__dict__.items() if x is not None})
        found = [jax.jit(model.hidden)(w, setup.Adaptation(), batch) for w in (small, exact)]
    for ours, wanted in zip(*found, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_in_bfloat16_activations_stay_in_it(twin):
    model, small, exact = both(twin, "llama", "bfloat16")
    assert small["norm"].dtype == jnp.bfloat16
    assert model.embed(small, jnp.array([1, 2])).dtype == jnp.bfloat16
    found = [api.logits(model, weights, None, [[1, 2, 3]])[0] for weights in (small, exact)]
    np.testing.assert_allclose(*found, rtol=0, atol=0.03 * np.abs(found[1]).max())


@pytest.mark.parametrize("scan", [True, False])
def test_a_prefix_learns_the_same_beside_them(twin, scan):
    """Three steps of the real step under pmap; the frozen tree is the same afterwards."""
    _, small, exact = both(twin, "llama")
    model = loading.read_model(twin("llama").folder, scan=scan)
    method, objective, tx = METHODS["prefix"](None, length=3), OBJECTIVES["lm"](None), optax.sgd(0.1)
    pairs = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])] * 4
    found, programs = [], []
    for weights in (small, exact):
        trainable = method.init(jax.random.key(1), model, weights)
        step = parallel.train_step(make_train_step(model, method, objective, tx, axis=parallel.AXIS))
        state = parallel.place(TrainState(jnp.int32(0), trainable, tx.init(trainable), jax.random.key(0)))
        frozen, batch = parallel.place(weights), parallel.split_batch(vars(one_a_row(pairs)) | {})
        step = step.lower(frozen, state, batch).compile()
        programs.append(step.as_text())
        for _ in range(2):
            state, sums = step(frozen, state, batch)
        found.append(jax.device_get((state.trainable, sums["grad_norm"])))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    for ours, wanted in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)
    assert found[0][1] > 0
    # Nor are there floats of all layers, which the backward pass would keep, and which would be the whole model.
    kernels = [spec.shape for path, spec in loading.paths(model.specs) if path[-1] == "kernel"]
    names = [f"f32[{','.join(map(str, shape))}]" for shape in kernels]
    assert [[name in program for name in names] for program in programs] == [[False] * len(names), [True] * len(names)]


@pytest.mark.apart
@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_reads_them_and_equals_the_full_pass(twin, beams):
    model, small, exact = both(twin, "llama")
    prefix = random_prefix(model, 0)
    ready = decode.ready(small, model)
    assert [layer["q"]["kernel"].values.shape[0] for layer in ready["layers"]] == [1] * model.sites["decoder"].layers
    options = {"max_new_tokens": 5, "end_tokens": (), "num_beams": beams}
    rows = random_rows(1, lengths=(4, 2))
    texts = api.generate(model, small, prefix, rows, **options)
    assert texts == api.generate(model, exact, prefix, rows, **options)
    if beams == 1:
        for row, new in zip(rows, texts, strict=True):
            logits = api.logits(model, small, prefix, [row + new[:-1]])[0]
            assert logits[len(row) - 1 :].argmax(-1).tolist() == new


@pytest.mark.apart
def test_no_loop_makes_floats_of_all_of_them(twin):
    """XLA would convert all layers before the first step, and hold them as floats for all of them."""
    model, small, _ = both(twin, "llama", hidden_size=64, intermediate_size=640, vocab_size=512)
    config = decode.DecodeConfig(max_new_tokens=4, end_tokens=(), pad_token=0)
    arguments = decode.ready(small, model), setup.Adaptation(), jnp.ones((2, 4), jnp.int32), jnp.array([4, 3])
    compiled = decode.make_generate(model, config).lower(*arguments).compile()
    layer = sum(x.size for x in jax.tree.leaves(small["layers"])) // model.sites["decoder"].layers
    largest = max(layer, small["embedding"].values.size)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2 * largest


def test_weights_are_read_a_layer_at_a_time(twin, monkeypatch):
    """No more floats at once than one tensor's, and in the end a quarter of the bytes."""
    _, folder, model, frozen = twin("llama")
    asked, usual = [], loading.read_shard
    monkeypatch.setattr(loading, "ROWS", 4)

    def read(spec, tensors, dtype, index):
        asked.append(usual(spec, tensors, dtype, index))
        return asked[-1]

    monkeypatch.setattr(loading, "read_shard", read)
    small = loading.load_weights(folder, model, "float32", parallel.Replicated().where, weights="int8")
    kernels = [spec for path, spec in loading.paths(model.specs) if path[-1] == "kernel"]
    assert max(x.size for x in asked) == max(np.prod(spec.shape[1:]) for spec in kernels)
    shapes = loading.abstract(model, weights="int8")
    same = jax.tree.map(lambda x, like: (x.shape, x.dtype) == (like.shape, like.dtype), small, shapes)
    assert all(jax.tree.leaves(same))
    assert parallel.Replicated().held(shapes) == sum(x.nbytes for x in jax.tree.leaves(small))
    assert base.fingerprint(model, small) is None  # as in float16: an adapter's is not compared
    assert base.fingerprint(model, frozen) is not None


@functools.cache
def quickstart(argument=""):
    return run.load_config(f"configs/quickstart.py:{argument}").to_dict()


def changed(argument="", **changes):
    config = quickstart(argument)
    return config | {"model": config["model"] | {"weights": "int8"}} | changes


def test_a_config_asks_for_them():
    made = setup.make_base(changed())
    weights = setup.load_weights(made, changed())
    assert is_quantised(weights["layers"]["q"]["kernel"])
    assert is_quantised(weights["embedding"])
    limit = parallel.Replicated().held(loading.abstract(made.model, weights="int8"))
    assert limit < parallel.Replicated().held(loading.abstract(made.model)) / 3


@pytest.mark.parametrize("argument", ["method=lora", "method=prompt", "method=bitfit", "method=adapter"])
def test_methods_that_add_to_the_model_take_them(argument):
    setup.make_base(changed(argument))


@pytest.mark.parametrize(
    ("argument", "changes", "message"),
    [
        ("method=finetune", {}, r"method 'finetune' trains weights that model\.weights='int8' freezes .*embedding"),
        ("method=ft_top2", {}, r"trains weights that model\.weights='int8' freezes in 8 bits \(layers/"),
        ("", {"model": {"weights": "int4"}}, r"unknown model\.weights 'int4'; valid: full, int8"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(argument, changes, message, monkeypatch):
    monkeypatch.setattr(loading, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    config = changed(argument)
    changes = {key: config[key] | x if isinstance(x, dict) else x for key, x in changes.items()}
    with pytest.raises(UserError, match=message):
        setup.make_base(config | changes)


def test_no_merged_model_is_made_of_them(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {"weights": "int8"}}')
    with pytest.raises(
        UserError, match=r"model\.weights='int8', which no merged model can be made of; valid: kv, peft"
    ):
        api.export_workdir([str(tmp_path)], "merged", str(tmp_path / "out"))


def test_products_are_the_written_ones():
    x, values = jnp.ones((2, 3), jnp.float32), jnp.array([[1, -2], [3, 4], [-5, 127]], jnp.int8)
    kernel = Quantised(values, jnp.array([0.5, 0.25]), ("width", "mlp"))
    y = nn.project(x[None], {"kernel": kernel, "bias": jnp.array([1.0, 2.0])}, LayerHooks(), "q")
    np.testing.assert_allclose(y[0], [[-0.5 + 1, 32.25 + 2]] * 2)

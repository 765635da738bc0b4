"""Weights split over a mesh of devices: every family and method as on one device, and loaded shard by shard."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from conftest import ENCODERS, FAMILIES, SEQ2SEQ, L, P, interrupt, letters

import prefix_tuning
import run
from prefix_tuning import checkpoint, heads, models, parallel, setup, sharding
from prefix_tuning import train as loop
from prefix_tuning.checkpoint import Checkpoints
from prefix_tuning.data import pipeline
from prefix_tuning.decode import DecodeConfig, make_generate, ready
from prefix_tuning.errors import UserError
from prefix_tuning.files import read_lines
from prefix_tuning.interop.base import fingerprint
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.stream import make_stream
from prefix_tuning.train_step import make_eval_step, make_train_step
from prefix_tuning.types import Batch, Spec, TrainState

DATA, MODEL, V = 2, 4, 20
GPT2 = {"n_embd": 16, "n_head": 4, "n_inner": 12, "vocab_size": V}
LLAMA = {"num_key_value_heads": 4, "intermediate_size": 12, "vocab_size": V}
BERT = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 12, "vocab_size": V}
T5 = {"d_model": 16, "num_heads": 4, "d_ff": 12, "vocab_size": V}
# As the other tests have them, but in sizes that the mesh divides.
SIZES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"), LLAMA),
    **dict.fromkeys(("bert", "roberta"), BERT),
    **dict.fromkeys(("t5", "mt5"), T5),
    "gpt2": GPT2,
    "gpt_neox": {"hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 12, "vocab_size": V},
    "electra": BERT | {"embedding_size": 16},
    "distilbert": {"dim": 16, "n_heads": 4, "hidden_dim": 12, "vocab_size": V},
    "bart": {
        "d_model": 16,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 12,
        "decoder_ffn_dim": 28,
        "vocab_size": V,
    },
}
# What is trained of a prefix lies whole on every device, what is trained of the weights as they do.
WEIGHTS = {"finetune": {}, "prefix": {"length": P}}
# Every method, several in a step, since a step takes long to compile.
STEPS = [
    (
        "llama",
        {
            "prefix": {"length": P, "reparametrisation": 9, "dropout": 0.4},
            "lora": {"rank": 2, "target_modules": ("all-linear",), "dropout": 0.4},
            "adapter": {"form": "houlsby", "bottleneck": 9},
            "memory": {},
            "prompt": {"length": 3, "population": 6},
            "infix": {"length": P},
            "finetune": {"top_layers": 2, "embedding": True},
        },
    ),
    ("llama", {"ptuning": {"length": P, "template": "{prompt}{rows:5}"}, "propagation": {"length": 3}}),
    *((family, WEIGHTS) for family in ("gpt2", "t5", "bert")),
]


@pytest.fixture(scope="module")
def made():
    """(family, further entries of config.json) -> model and weights on the host, every one drawn."""

    @functools.cache
    def make(family, **options):
        own = (FAMILIES | ENCODERS | SEQ2SEQ)[family] | SIZES[family] | options
        config = transformers.AutoConfig.for_model(family, **own)
        model = models.build(json.loads(config.to_json_string(use_diff=False)))
        rng = np.random.default_rng(0)

        def draw(spec):
            return (rng.normal(size=spec.shape, scale=0.3) + (spec.init == "ones")).astype(np.float32)

        return model, jax.tree.map(draw, model.specs, is_leaf=lambda x: isinstance(x, Spec))

    return make


def batch_for(model, virtual=()):
    """Eight rows of unequal lengths, with unequal numbers of targets."""
    rng = np.random.default_rng(1)
    sources = [[*rng.integers(0, V, 1 + i % 4).tolist(), *virtual] for i in range(8)]
    targets = [rng.integers(0, V, 1 + i % 3).tolist() for i in range(8)]
    if not model.writes:
        rows = [pipeline.Example(source, [0], [i % 3]) for i, source in enumerate(sources)]
        return pipeline.collate([[row] for row in rows], 10, 1)
    pairs = [pipeline.Tokens(*pair) for pair in zip(sources, targets, strict=True)]
    if model.is_encoder_decoder:
        pairs = [pair.after(model.start) for pair in pairs]
    return pipeline.collate([[pair] for pair in pairs], 12, 3)


def test_no_family_or_method_is_left_out():
    assert set(SIZES) == set(models.MODELS)
    assert {"compose"} | {name for _, parts in STEPS for name in parts} == set(METHODS)


AXES = {"layers", "width", "width_out", "kv_heads", "groups", "head", "mlp", "vocabulary", "positions", None}


@pytest.mark.parametrize("family", SIZES)
def test_every_axis_has_a_name_that_is_known(made, family):
    """A rule for a name that no weight has, or a weight's for which there is none, would split nothing."""
    specs = [spec for _, spec in loading.paths(made(family)[0].specs)]
    assert {axis for spec in specs for axis in spec.axes} <= AXES
    assert all(len(spec.axes) == len(spec.shape) for spec in specs)
    assert {axis for wanted in sharding.RULES.values() for axis in wanted} <= AXES


# --- The same result


@pytest.mark.parametrize(("family", "parts"), STEPS)
def test_a_step_is_that_of_one_device(made, family, parts):
    model, host = made(family)
    method, objective = METHODS["compose"](letters, parts=parts), OBJECTIVES["lm"](None)
    if not model.writes:
        objective = OBJECTIVES["classify"](None, labels=("yes", "no", "maybe"))
        method = heads.with_head(method, objective.head)
    tx = optax.sgd(1.0)  # its update is the gradient
    body = make_train_step(model, method, objective, tx)
    batch = batch_for(model, range(V, V + P) if "rows" in method.template else ())
    frozen = method.prepare(jax.random.key(0), model, host)
    trainable = method.init(jax.random.key(1), model, frozen)
    before = jax.tree.map(np.array, trainable)  # placing a state may share its buffers, and a step takes them away
    state = TrainState(jnp.int32(0), trainable, tx.init(trainable), jax.random.key(2))
    one, sums = jax.jit(body)(frozen, state, Batch(**{n: x.reshape(2, 4, *x.shape[1:]) for n, x in batch.items()}))
    layout = parallel.Sharded(model.specs, DATA, MODEL)
    placed = layout.place(state)
    where = jax.tree.map(lambda x: x.sharding, placed)
    step = layout.train_step(body, placed)
    eight, own = step(layout.place(frozen), placed, layout.split_batch(batch, accumulate=2))
    assert jax.tree.map(lambda x: x.sharding, eight) == where
    for key, value in sums.items():
        np.testing.assert_allclose(own[key], value, rtol=2e-5, err_msg=key)
    trees = before, *jax.device_get((one.trainable, eight.trainable))
    for old, new, ours in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(ours, new, rtol=0, atol=1e-5 * max(1.0, np.abs(new - old).max()))
    assert own["update_norm"] > 1e-2


@pytest.mark.parametrize("family", sorted(set(SIZES) - {family for family, _ in STEPS}))
def test_an_evaluation_is_that_of_one_device(made, family):
    model, host = made(family)
    method, objective = METHODS["prefix"](None, length=P), OBJECTIVES["lm"](None)
    if not model.writes:
        objective = OBJECTIVES["classify"](None, labels=("yes", "no", "maybe"))
        method = heads.with_head(method, objective.head)
    trainable = jax.jit(lambda key: method.init(key, model, host))(jax.random.key(1))
    body, batch = make_eval_step(model, method, objective), batch_for(model)
    sums = jax.jit(body)(host, trainable, Batch(**batch))
    layout = parallel.Sharded(model.specs, DATA, MODEL)
    own = layout.eval_step(body)(*layout.place((host, trainable)), layout.split_eval_batch(batch))
    assert sums["count"] == own["count"] > 7
    for key, value in sums.items():
        np.testing.assert_allclose(own[key], value, rtol=2e-5, err_msg=key)


@pytest.mark.apart
@pytest.mark.parametrize(("family", "beams"), [("llama", 1), ("gpt2", 3), ("bart", 2)])
def test_text_is_that_of_one_device(made, family, beams):
    model, host = made(family)
    method = METHODS["prefix"](None, length=P)
    trainable = method.init(jax.random.key(1), model, host)
    tokens = np.random.default_rng(2).integers(0, V, (4, 6)).astype(np.int32)
    lengths = np.array([6, 1, 4, 3], np.int32)
    config = DecodeConfig(max_new_tokens=5, end_tokens=(2,), pad_token=0, num_beams=beams)
    one = make_generate(model, config)(*method.bind(host, trainable), tokens, lengths)
    layout = parallel.Sharded(model.specs, DATA, MODEL)
    params, adaptation = method.bind(*layout.place((host, trainable)))
    parts = [np.arange(first, first + 2) for first in (0, 2)]
    chunks = [(part, tokens[part], lengths[part]) for part in parts]
    write = make_stream(model, config, layout)
    for weights in (params, ready(params, model)):
        for written, part in zip(write(weights, adaptation, chunks, jax.random.key(0)), parts, strict=True):
            assert written.ids.tolist() == part.tolist()
            for ours, wanted in zip(written[1:], one, strict=True):
                np.testing.assert_array_equal(ours, wanted[part])


def test_a_notebook_reads_and_writes_on_shards(made, tmp_path):
    """As on one device, an adapter's fingerprint included, which is that of the weights and not of where they lie."""
    model, host = made("llama")
    loading.save_pretrained(tmp_path, model, host)
    prefix = METHODS["prefix"](None, length=P)
    _, adaptation = prefix.bind(host, prefix.init(jax.random.key(1), model, host))
    rows, found = [[5, 7, 9, 2], [4]], {}
    for kind, mesh in (("replicated", None), ("sharded", {"model": MODEL})):
        model, frozen, _ = prefix_tuning.load_model(tmp_path, parallel=kind, mesh=mesh)
        prefix_tuning.save_adapter(tmp_path / kind, adaptation, model, frozen)
        loaded = prefix_tuning.load_adapter(tmp_path / "replicated", model, frozen)
        read = prefix_tuning.logits(model, frozen, loaded, rows)
        found[kind] = read, prefix_tuning.generate(model, frozen, loaded, rows, max_new_tokens=4, end_tokens=())
    assert {shard.data.shape for shard in frozen["layers"]["q"]["kernel"].addressable_shards} == {(L, 8, 1, 2, 6)}
    with parallel.told_of(frozen):  # which `sharding.spread` asks for
        assert dict(jax.sharding.get_abstract_mesh().shape) == {"data": DATA, "model": MODEL}
    for ours, wanted in zip(found["sharded"][0], found["replicated"][0], strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)
    assert found["sharded"][1] == found["replicated"][1]


def test_matrices_in_8_bits_are_split_too(made, tmp_path):
    """A step's gradients, logits and text are those of the same numbers on one device, and a device holds its part."""
    model, host = made("llama")
    loading.save_pretrained(tmp_path, model, host)
    method, objective, tx = METHODS["prefix"](None, length=P), OBJECTIVES["lm"](None), optax.sgd(1.0)
    body, batch, found = make_train_step(model, method, objective, tx), batch_for(model), {}
    for kind, mesh in (("replicated", None), ("sharded", {"model": MODEL})):
        _, frozen, _ = prefix_tuning.load_model(tmp_path, weights="int8", parallel=kind, mesh=mesh)
        trainable = method.init(jax.random.key(1), model, host)
        _, adaptation = method.bind(frozen, trainable)
        rows = [[5, 7, 9, 2], [4]]
        read = prefix_tuning.logits(model, frozen, adaptation, rows)
        text = prefix_tuning.generate(model, frozen, adaptation, rows, max_new_tokens=4, end_tokens=())
        state = TrainState(jnp.int32(0), trainable, tx.init(trainable), jax.random.key(2))
        if mesh is None:
            state, sums = jax.jit(body)(frozen, state, Batch(**{n: x[None] for n, x in batch.items()}))
        else:
            layout = parallel.Sharded(model.specs, DATA, MODEL)
            state = layout.place(state)
            given = frozen, state, layout.split_batch(batch)
            step = layout.train_step(body, state).lower(*given).compile()
            state, sums = step(*given)
        found[kind] = read, text, jax.device_get((state.trainable, sums["loss"]))
    for ours, wanted in zip(*map(jax.tree.leaves, (found["sharded"], found["replicated"])), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=1e-5)
    kernel = frozen["layers"]["q"]["kernel"]
    assert {shard.data.shape for shard in kernel.values.addressable_shards} == {(L, 8, 1, 2, 6)}
    held = {sum(x.addressable_data(n).nbytes for x in jax.tree.leaves(frozen)) for n in range(8)}
    assert held == {layout.held(loading.abstract(model, weights="int8"))}
    # Forward and backward a device asks the others for a layer's matrices as they are, in 8 bits.
    sent = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", step.as_text())
    for path, spec in loading.paths(model.specs):
        if path[-1] != "kernel":
            continue
        split = sharding.partition(spec.axes, spec.shape, {"data": DATA, "model": MODEL})
        whole = [str(n // MODEL if axis == "model" else n) for n, axis in zip(spec.shape[1:], split[1:], strict=True)]
        kinds = [kind for kind, sizes in sent if sizes.split(",")[-len(whole) :] == whole]
        assert set(kinds) == {"s8"}, path
        assert len(kinds) >= 2, path
    again = layout.place(frozen)  # as `train` places what it has loaded
    assert all(
        jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), again, frozen))
    )


def test_a_notebook_is_told_what_does_not_fit(made, tmp_path, monkeypatch):
    loading.save_pretrained(tmp_path, *made("llama"))
    with pytest.raises(UserError, match=r"mesh\.model=3 cannot be on 8 devices"):
        prefix_tuning.load_model(tmp_path, parallel="sharded", mesh={"model": 3})
    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(parallel, "memory_limit", lambda: 10_000)
    with pytest.raises(
        UserError, match=r"weights .* GiB are .* GiB on each device, .*; expected parallel=sharded, with"
    ):
        prefix_tuning.load_model(tmp_path)


# --- In shards


@pytest.mark.parametrize("family", SIZES)
def test_weights_are_read_into_shards(made, family, tmp_path, monkeypatch):
    """Each shard once, and no byte beyond: no tensor of a split weight is ever whole."""
    model, host = made(family)
    loading.save_pretrained(tmp_path, model, host)
    asked = []
    monkeypatch.setattr(loading, "read_folder", lambda folder: watched(folder, asked))
    layout = parallel.Sharded(model.specs, DATA, MODEL)
    loaded = loading.load_weights(tmp_path, model, "float32", layout.where)
    split = 0
    for path, spec in loading.paths(model.specs):
        array, whole = loading.flatten(loaded)[path], loading.flatten(host)[path]
        shape = layout.where(spec).shard_shape(spec.shape)
        assert {shard.data.shape for shard in array.addressable_shards} == {shape}
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
        split += shape != spec.shape
    assert split >= len(loading.paths(model.specs)) // 3
    assert sum(asked) == 4 * sum(x.size for x in jax.tree.leaves(host))
    largest = max(spec.shape[-1] * spec.shape[0] for spec in jax.tree.leaves(model.specs, is_leaf=is_spec))
    assert max(asked) <= 4 * largest
    assert fingerprint(model, loaded) == fingerprint(model, host)


def test_replicated_weights_are_held_once(made, tmp_path):
    """All eight devices of this host share what was read, and placing it again copies nothing."""
    model, host = made("llama")
    loading.save_pretrained(tmp_path, model, host)
    layout = parallel.Replicated()
    loaded = loading.load_weights(tmp_path, model, "float32", layout.where)
    placed = layout.place(loaded)
    for array, again, whole in zip(*map(jax.tree.leaves, (loaded, placed, host)), strict=True):
        assert len(array.addressable_shards) == 8
        pointers = [shard.data.unsafe_buffer_pointer() for x in (array, again) for shard in x.addressable_shards]
        assert len(set(pointers)) == 1
        np.testing.assert_array_equal(array, whole)


def is_spec(leaf):
    return isinstance(leaf, Spec)


def watched(folder, asked):
    """`loading.read_folder`, noting the bytes of everything that is read."""

    class Watched:
        def __init__(self, tensor):
            self.tensor, self.get_shape = tensor, tensor.get_shape

        def __getitem__(self, index):
            asked.append(self.tensor[index].nbytes)
            return self.tensor[index]

    for file in sorted(folder.glob("*.safetensors")):
        for key, tensor in loading.read(file):
            yield key, Watched(tensor)


def test_what_does_not_divide_stays_whole():
    sizes = {"data": 2, "model": 4}
    axes = ("layers", "width", "kv_heads", "groups", "head")
    assert sharding.partition(axes, (3, 16, 8, 3, 6), sizes) == jax.P(None, "data", "model", None, None)
    assert sharding.partition(axes, (3, 16, 9, 4, 6), sizes) == jax.P(None, "data", None, "model", None)
    assert sharding.partition(axes, (3, 9, 9, 1, 6), sizes) == jax.P(None, None, None, None, None)
    assert sharding.partition(("layers", "width"), (3, 16), sizes) == jax.P(None, None)  # a vector per layer
    assert sharding.partition(("vocabulary", "width"), (21, 16), sizes) == jax.P(None, "data")


def test_a_device_holds_its_part_alone(made):
    """Weights, gradients and moments of fine-tuning, and activations: of eight devices none has what one would have."""
    wide = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 256, "head_dim": 16}
    model, host = made("llama", **wide)
    method, objective, tx = METHODS["finetune"](None), OBJECTIVES["lm"](None), optax.adam(1e-3)
    body = make_train_step(model, method, objective, tx)
    trainable = method.init(jax.random.key(1), model, host)
    state = TrainState(jnp.int32(0), trainable, tx.init(trainable), jax.random.key(2))
    rows = {field: np.repeat(x, 4, axis=0) for field, x in batch_for(model).items()}
    one = jax.jit(body).lower(host, state, Batch(**{field: x[None] for field, x in rows.items()})).compile()
    whole = one.memory_analysis()
    layout = parallel.Sharded(model.specs, 8, 1)
    spread = layout.train_step(body, state).lower(*layout.place((host, state)), layout.split_batch(rows)).compile()
    own = spread.memory_analysis()
    assert layout.held(state) < 1.02 * parallel.Replicated().held(state) / 8
    # The frozen weights are no argument of what replaces all of them.
    assert layout.held(state) <= own.argument_size_in_bytes < whole.argument_size_in_bytes / 7
    assert own.output_size_in_bytes < whole.output_size_in_bytes / 7
    assert own.temp_size_in_bytes < whole.temp_size_in_bytes / 3  # which has one layer's weights whole, and no more


def test_a_state_goes_from_layout_to_layout(made, tmp_path, monkeypatch):
    """What one layout saved, every other one goes on from, bit for bit, from shards to shards past every host."""
    model, host = made("llama")
    method, tx = METHODS["finetune"](None), optax.adam(1e-3)

    def state(weights):
        trainable = method.init(jax.random.key(1), model, weights)
        return TrainState(jnp.int32(4), trainable, tx.init(trainable), jax.random.key(2))

    def to_host(x, read=jax.device_get):
        assert not checkpoint.in_shards(x)
        return read(x)

    shapes = jax.eval_shape(state, host)
    layouts = [parallel.Replicated(), parallel.Sharded(model.specs, 8, 1), parallel.Sharded(model.specs, 2, 4)]
    first = layouts[1].place(state(layouts[1].place(host)))
    sums = {checkpoint.checksum(first.trainable)}
    for number, layout in enumerate((layouts[2], layouts[0], layouts[1])):
        checkpoints = Checkpoints(tmp_path / str(number))
        with monkeypatch.context() as patch:
            patch.setattr(jax, "device_get", to_host)
            checkpoints.save(first)
            checkpoints.wait()
            found, _ = checkpoints.restore(layout.like(shapes))
        checkpoints.close()
        again = layout.place(found)
        for old, new in zip(*map(jax.tree.leaves, (first.replace(key=0), again.replace(key=0))), strict=True):
            np.testing.assert_array_equal(old, new)
        first = again
        kernel = found.opt_state[0].mu["layers"]["q"]["kernel"]
        split = {0: (L, 8, 1, 2, 6), 1: (L, 16, 4, 2, 6), 2: (L, 2, 4, 2, 6)}[number]
        parts = [kernel] if number == 1 else [shard.data for shard in kernel.addressable_shards]
        assert {part.shape for part in parts} == {split}
        assert isinstance(kernel, np.ndarray) == (number == 1)
        sums.add(checkpoint.checksum(found.trainable))
    assert len(sums) == 1


# --- What the user is told

SHORT = {
    "train.examples": 32,
    "train.epochs": 1,
    "train.batch_size": 8,
    "train.shapes": 1,
    "train.log_every": 1,
    "evaluation.batch_size": 8,
    "evaluation.examples": 8,
    "evaluation.final_split": "validation",
    "evaluation.untuned": False,
    "decode.max_new_tokens": 4,
    "method.length": 3,
    "optimizer.warmup_steps": 0,
}


def configured(**layout):
    config = run.load_config("configs/quickstart.py:quick")
    config.update_from_flattened_dict(SHORT | layout)
    return config.to_dict()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"parallel": "split"}, "unknown parallel 'split'; valid: replicated, sharded"),
        ({"mesh.model": 2}, "goes with parallel=sharded"),
        (
            {"parallel": "sharded", "mesh.model": 3},
            "mesh.model=3 cannot be on 8 devices; valid, .* 8 x 1, 4 x 2, 2 x 4",
        ),
        ({"parallel": "sharded", "mesh.data": 4, "mesh.model": 4}, "mesh.data=4 and mesh.model=4 cannot be on 8"),
        ({"parallel": "sharded", "mesh.data": 0}, "mesh.data=0 cannot be on 8 devices"),
        ({"parallel": "sharded", "mesh.data": -8, "mesh.model": -1}, "cannot be on 8 devices"),
    ],
)
def test_a_layout_that_cannot_be_is_one_line(layout, message):
    with pytest.raises(UserError, match=message):
        setup.make_base(configured(**layout))


def test_an_unknown_mesh_axis_is_one_line():
    config = configured(parallel="sharded") | {"mesh": {"pipe": 2}}
    with pytest.raises(UserError, match="section mesh: 'pipe'; valid: data, model"):
        setup.make_base(config)


def test_sizes_that_are_not_given_take_the_rest():
    assert parallel.mesh_sizes(8) == parallel.mesh_sizes(8, data=8) == parallel.mesh_sizes(8, model=1) == (8, 1)
    assert parallel.mesh_sizes(8, data=2) == parallel.mesh_sizes(8, model=4) == (2, 4)
    assert parallel.here({"mesh": {"data": 3, "model": 1}}) == {"mesh": {}}
    assert parallel.here({"mesh": {"data": 4, "model": 2}}) == parallel.here({}) == {}


def test_rows_are_split_over_the_data_axis_alone(tmp_path):
    with pytest.raises(UserError, match="a batch of 12 rows cannot be split over 1 micro-batches and 8 devices"):
        loop.train(configured(parallel="sharded", **{"train.batch_size": 12}), tmp_path)
    setup.make_base(configured(parallel="sharded", **{"mesh.model": 2})).layout.check_rows(12)


def test_a_model_that_does_not_fit_is_told_its_sizes(monkeypatch, tmp_path):
    """2.67 MiB of weights; three times as much again in fine-tuning, where a prefix adds next to nothing."""
    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(parallel, "memory_limit", lambda: 2_000_000)
    with pytest.raises(UserError) as caught:
        loop.train(configured(), tmp_path)
    told = str(caught.value)
    assert "weights 0.0026 GiB + trained parameters" in told
    assert (
        "on each device, which can hold 0.00186 GiB; expected parallel=sharded, with mesh.data=8, mesh.model=1" in told
    )
    monkeypatch.setattr(parallel, "memory_limit", lambda: 100_000)
    for layout in ({}, {"parallel": "sharded"}):
        with pytest.raises(UserError, match="on each of the 8 devices here; expected more devices"):
            loop.train(configured(**layout), tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(parallel, "memory_limit", lambda: 2_000_000)
    base = setup.make_base(configured(parallel="sharded"))
    setup.check_memory(base, configured(parallel="sharded"))


# --- The commands


def told(workdir):
    """What a run measured and wrote, less what a clock says."""
    lines = [{k: v for k, v in line.items() if "per_second" not in k} for line in read_lines(workdir / "metrics.jsonl")]
    rows = read_lines(next((workdir / "predictions").glob("validation_*.jsonl")))
    return lines, [row["prediction"] for row in rows]


def test_the_commands_on_shards_do_what_they_do_replicated(tmp_path, monkeypatch, capsys):
    """Also stopped on one mesh and resumed on another, and for a workdir that is older than layouts."""
    flags = [f"--config.{key}={value}" for key, value in SHORT.items()]
    train = ["train", "--config=configs/quickstart.py:quick", *flags]
    assert run.main([*train, f"--workdir={tmp_path}/one"]) == 0
    sharded = [*train, f"--workdir={tmp_path}/eight", "--config.parallel=sharded"]
    interrupt(monkeypatch, 3)  # before the third step
    assert run.main([*sharded, "--config.mesh.model=2"]) == 143
    monkeypatch.undo()
    assert (tmp_path / "eight" / "checkpoints").is_dir()
    assert not (tmp_path / "eight" / "summary.json").exists()
    assert run.main([*sharded, "--config.mesh.model=4"]) == 0
    (lines, answers), (own, ours) = told(tmp_path / "one"), told(tmp_path / "eight")
    assert answers == ours
    assert [line.keys() for line in lines] == [line.keys() for line in own]
    for line, other in zip(lines, own, strict=True):
        for key, value in line.items():
            np.testing.assert_allclose(other[key], value, rtol=1e-4, err_msg=key)
    kept = json.loads((tmp_path / "eight" / "config.json").read_text())
    assert (kept["parallel"], kept["mesh"]["model"]) == ("sharded", 4)
    old = json.loads((tmp_path / "one" / "config.json").read_text())
    del old["parallel"], old["mesh"]
    (tmp_path / "one" / "config.json").write_text(json.dumps(old))
    assert run.main([*train, f"--workdir={tmp_path}/one"]) == 0
    workdir = f"--workdir={tmp_path}/eight"
    records = read_lines(next((tmp_path / "one" / "predictions").glob("validation_*.jsonl")))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"source": row["source"]}) + "\n" for row in records))
    assert run.main(["generate", workdir, f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"]) == 0
    assert [row["prediction"] for row in read_lines(tmp_path / "out.jsonl")] == answers
    assert run.main(["eval", workdir, "--split=validation"]) == 0
    scores = [json.loads((tmp_path / name / "eval_validation.json").read_text()) for name in ("one", "eight")]
    assert {key: scores[0][key] for key in scores[1]} == scores[1]
    assert run.main(["inspect", workdir, "--examples=2"]) == 0
    for kind in ("peft", "kv"):
        assert run.main(["export", workdir, f"--format={kind}", f"--output={tmp_path}/{kind}"]) == 0
    adapters = [dict(loading.read(tmp_path / name / "adapter_model.safetensors")) for name in ("one/adapter", "peft")]
    assert adapters[0].keys() == adapters[1].keys()
    for key, tensor in adapters[0].items():
        np.testing.assert_allclose(adapters[1][key][:], tensor[:], rtol=0, atol=1e-3)
    assert (tmp_path / "kv" / "prefix.safetensors").stat().st_size > 1000

"""One train step: the same result however a batch is laid out, split, packed or accumulated; and what it may touch."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conftest import B, L, P, T, one_a_row, packed, random_rows

import prefix_tuning
from prefix_tuning import models, parallel
from prefix_tuning.errors import UserError
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.optimizer import make_optimizer
from prefix_tuning.train_step import make_eval_step, make_train_step
from prefix_tuning.types import Adaptation, Batch, Method, Objective, TrainState

FIELDS = tuple(Batch.__dataclass_fields__)
SGD = optax.sgd(1.0)  # its update is the gradient


def fields(batch):
    return {name: getattr(batch, name) for name in FIELDS}


def uneven(seed=0, rows=B):
    """Pairs whose targets have 1 to 6 tokens: as many on no two of the first devices."""
    prompts = random_rows(seed, lengths=(3, 1, 4, 2, 6, 5, 1, 2)[:rows])
    targets = random_rows(seed + 1, lengths=(1, 6, 2, 5, 1, 3, 4, 2)[:rows])
    return list(zip(prompts, targets, strict=True))


@pytest.fixture(scope="module")
def setting(twin):
    """model, frozen, method, and trainable parameters."""
    _, _, model, frozen = twin("llama")
    method = METHODS["prefix"](None, length=P)
    return model, frozen, method, method.init(jax.random.key(0), model, frozen)


@pytest.fixture(scope="module")
def one_step(setting):
    """(batch, devices, accumulate, normalisation) -> (gradients, sums) of a first step, compiled once per shape."""
    model, frozen, method, trainable = setting
    compiled = {}
    placed = parallel.place(frozen)

    def run(batch, devices=1, accumulate=1, normalisation="token"):
        if (devices, normalisation) not in compiled:
            objective = OBJECTIVES["lm"](None, normalisation=normalisation)
            axis = None if devices == 1 else parallel.AXIS
            step = make_train_step(model, method, objective, SGD, axis=axis)
            compiled[devices, normalisation] = jax.jit(step) if devices == 1 else parallel.train_step(step)
        step = compiled[devices, normalisation]
        state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, trainable), SGD.init(trainable), jax.random.key(1))
        if devices == 1:
            batch = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
            after, sums = step(frozen, state, batch)
        else:
            after, sums = step(placed, parallel.place(state), parallel.split_batch(fields(batch), accumulate))
        return jax.tree.map(lambda new, old: np.asarray(old) - new, *jax.device_get((after.trainable, trainable))), sums

    return run


def agree(one, other, tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.linalg.norm(b) > 1e-3
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


# --- The same result


def test_devices_agree_with_one_device(one_step):
    batch = one_a_row(uneven(), length=11, targets=6)
    assert len(set(batch.mask.sum(1)[:3])) == 3
    (one, sums), (eight, sums_of_eight) = one_step(batch), one_step(batch, devices=8)
    agree(eight, one, 3e-6)
    assert sums.keys() == sums_of_eight.keys()
    for name in sums:
        np.testing.assert_allclose(sums[name], sums_of_eight[name], rtol=3e-6, err_msg=name)
    assert sums["count"] == sums["targets"] == 24


def test_accumulation_agrees_with_a_large_batch(one_step):
    batch = one_a_row(uneven(), length=11, targets=6)
    (one, sums), (four, sums_of_four) = one_step(batch), one_step(batch, accumulate=4)
    agree(four, one, 3e-6)
    for name in sums:
        np.testing.assert_allclose(sums[name], sums_of_four[name], rtol=3e-6, err_msg=name)


def test_accumulation_on_devices_agrees(one_step):
    pairs = uneven() + uneven(5)
    batch = one_a_row(pairs, length=11, targets=6)
    agree(one_step(batch, devices=8, accumulate=2)[0], one_step(batch)[0], 3e-6)


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_packed_agrees_with_unpacked(one_step, normalisation):
    pairs = uneven()
    loose = one_a_row(pairs, length=11, targets=6)
    dense = packed([pairs[:3], pairs[3:5], [], pairs[5:]], length=20, targets=11)
    one, sums = one_step(loose, normalisation=normalisation)
    other, sums_of_packed = one_step(dense, normalisation=normalisation)
    agree(other, one, 3e-6)
    assert sums["count"] == sums_of_packed["count"] == (24 if normalisation == "token" else 8)
    np.testing.assert_allclose(sums["loss"], sums_of_packed["loss"], rtol=3e-6)


def test_masked_is_removed(one_step):
    pairs = uneven()
    batch = one_a_row(pairs, length=11, targets=6)
    mask = batch.mask.copy()
    mask[1, 4:] = mask[3] = 0  # the last targets of one example, and all those of another
    masked = batch.replace(mask=mask, targets=np.where(mask > 0, batch.targets, 12))
    shorter = [(prompt, target[:4] if b == 1 else target) for b, (prompt, target) in enumerate(pairs) if b != 3]
    removed = packed([[pair] for pair in shorter] + [[]], length=11, targets=6)
    one, sums = one_step(masked)
    other, sums_of_removed = one_step(removed)
    agree(one, other, 3e-6)
    assert sums["count"] == sums_of_removed["count"] == 17
    np.testing.assert_allclose(sums["loss"], sums_of_removed["loss"], rtol=3e-6)
    agree_not = one_step(batch)[0]
    one, agree_not = (tree["decoder"]["self"]["k"] for tree in (one, agree_not))
    assert np.linalg.norm(agree_not - one) > 1e-2 * np.linalg.norm(one)


# --- The right result


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_loss_by_hand(setting, one_step, normalisation):
    model, frozen, method, trainable = setting
    pairs = uneven()
    batch = one_a_row(pairs, length=11, targets=6)
    adaptation = method.bind(frozen, trainable)[1]
    loss, correct = 0.0, 0
    logits = prefix_tuning.logits(model, frozen, adaptation, [prompt + target[:-1] for prompt, target in pairs])
    for (prompt, target), rows in zip(pairs, logits, strict=True):
        for n, token in enumerate(target):
            row = rows[len(prompt) - 1 + n].astype(np.float64)
            loss += np.log(np.exp(row).sum()) - row[token]
            correct += row.argmax() == token
    sums = one_step(batch, normalisation=normalisation)[1]
    wanted = {"loss": loss, "nll": loss, "correct": correct, "targets": 24, "examples": 8}
    wanted["tokens"] = sum(len(prompt) + len(target) - 1 for prompt, target in pairs)
    wanted["count"] = {"token": 24, "sequence": 8}[normalisation]
    assert 0 < correct < 24
    for name, value in wanted.items():
        np.testing.assert_allclose(sums[name], value, rtol=2e-6, err_msg=name)


def test_normalisation_divides_by_tokens_or_by_examples(setting, one_step):
    model, frozen, _, trainable = setting
    batch = one_a_row(uneven(), length=11, targets=6)
    token, sums = one_step(batch)
    sequence, sums_of_sequence = one_step(batch, normalisation="sequence")
    agree(sequence, jax.tree.map(lambda g: g * 24 / 8, token), 3e-6)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(token)))
    np.testing.assert_allclose([sums["grad_norm"], sums["update_norm"]], norm, rtol=1e-5)
    np.testing.assert_allclose(sums_of_sequence["grad_norm"], 3 * norm, rtol=1e-5)
    left = jax.tree.map(lambda old, g: np.asarray(old) - g, trainable, token)
    total = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(left)))
    np.testing.assert_allclose(sums["param_norm"], total, rtol=1e-5)

    # and the gradient is the loss's: a small step along it, compared with the loss before and after
    objective = OBJECTIVES["lm"](None)
    evaluate = jax.jit(make_eval_step(model, METHODS["prefix"](None, length=P), objective))
    around = []
    for sign in (1, -1):
        nudged = jax.tree.map(lambda x, g: x + sign * 1e-2 * g / norm, trainable, token)  # noqa: B023
        out = evaluate(frozen, nudged, batch)
        around.append(float(out["loss"] / out["count"]))
    np.testing.assert_allclose((around[0] - around[1]) / 2e-2, norm, rtol=1e-2)


def test_unknown_normalisation():
    with pytest.raises(UserError, match=r"unknown objective\.normalisation 'mean'; valid: sequence, token"):
        OBJECTIVES["lm"](None, normalisation="mean")


def test_evaluation_sums_over_devices_without_dropout(setting):
    model, frozen, _, trainable = setting
    method = METHODS["prefix"](None, length=P, dropout=0.5)
    batch = one_a_row(uneven(), length=11, targets=6)
    step = make_eval_step(model, method, OBJECTIVES["lm"](None), axis=parallel.AXIS)
    spread = parallel.split_batch(fields(batch))
    spread = jax.tree.map(lambda x: x[:, 0], spread)
    sums = parallel.eval_step(step)(parallel.place(frozen), parallel.place(trainable), spread)
    plain = make_eval_step(model, METHODS["prefix"](None, length=P), OBJECTIVES["lm"](None))
    for name, value in jax.jit(plain)(frozen, trainable, batch).items():
        np.testing.assert_allclose(sums[name], value, rtol=3e-6, err_msg=name)


# --- Many steps


@pytest.fixture(scope="module")
def trained(setting):
    """The states and sums of eight devices over 25 steps on one batch, and how often the objective was traced."""
    model, frozen, method, trainable = setting
    traces = []

    def counting(*arguments):
        traces.append(arguments[3].tokens.shape)
        return OBJECTIVES["lm"](None).loss(*arguments)

    tx, _ = make_optimizer(100, learning_rate=0.1, schedule="constant")
    step = parallel.train_step(make_train_step(model, method, Objective(counting), tx, axis=parallel.AXIS))
    first = parallel.place(
        TrainState(jnp.int32(0), jax.tree.map(jnp.copy, trainable), tx.init(trainable), jax.random.key(1))
    )
    placed, state, history, seen = parallel.place(frozen), first, [], []
    batch = parallel.split_batch(fields(one_a_row(uneven(), length=11, targets=6)))
    for _ in range(25):
        state, sums = step(placed, state, batch)
        history.append(float(sums["loss"] / sums["count"]))
        seen.append(len(traces))
    longer = parallel.split_batch(fields(one_a_row(uneven(), length=12, targets=6)))
    for _ in range(2):
        state, sums = step(placed, state, longer)
        seen.append(len(traces))
    return first, placed, state, history, seen


def test_loss_falls_on_a_fixed_batch(trained):
    history = trained[3]
    assert history[-1] < 0.5 * history[0]
    assert history[-1] < min(history[:10])


def test_state_is_the_same_on_every_device(trained):
    state = trained[2]
    assert state.step == 27
    for leaf in jax.tree.leaves(state.replace(key=jax.random.key_data(state.key))):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 8
        assert all(shard.shape == leaf.shape for shard in shards)
        assert all(np.array_equal(shards[0], shard) for shard in shards[1:])


def test_one_trace_per_shape(trained):
    seen = trained[4]
    assert seen[0] > 0
    assert seen[:25] == [seen[0]] * 25
    assert seen[25] > seen[24]
    assert seen[26] == seen[25]


def test_state_is_donated_and_frozen_is_not(trained, setting):
    first, placed, state, _, _ = trained
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first.trainable, first.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((placed, state, setting[1])))


def test_key_is_never_advanced(trained):
    np.testing.assert_array_equal(jax.random.key_data(trained[2].key), jax.random.key_data(jax.random.key(1)))


def test_only_trainable_is_differentiated(setting):
    """An identity around the frozen weights whose backward pass reports that it runs."""
    model, frozen, method, trainable = setting
    calls = []

    @jax.custom_vjp
    def watched(params):
        return params

    watched.defvjp(lambda params: (params, None), lambda _, slopes: (calls.append(1) or slopes,))
    watching = Method(method.init, lambda frozen, t, *, key=None: (watched(frozen), method.bind(frozen, t)[1]))
    step = make_train_step(model, watching, OBJECTIVES["lm"](None), SGD)
    state = TrainState(jnp.int32(0), trainable, SGD.init(trainable), jax.random.key(1))
    batch = jax.tree.map(lambda x: x[None], one_a_row(uneven()[:3]))
    shapes = jax.eval_shape(step, frozen, state, batch)[0]
    assert not calls
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    tuned = Method(method.init, lambda _, t, *, key=None: (watched(t), Adaptation()))
    state = TrainState(jnp.int32(0), frozen, SGD.init(frozen), jax.random.key(1))
    jax.eval_shape(make_train_step(model, tuned, OBJECTIVES["lm"](None), SGD), {}, state, batch)
    assert calls  # so the watch works


def test_a_step_costs_little_more_than_two_forward_passes():
    """What is frozen is not differentiated: only what it computes is, which costs as much as computing it."""
    shape = {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 128, "vocab_size": 64}
    model = models.build({"model_type": "gpt2"} | shape, scan=False)  # whose operations can be counted
    frozen, method = loading.initialise(jax.random.key(0), model), METHODS["prefix"](None, length=P)
    trainable, objective = method.init(jax.random.key(1), model, frozen), OBJECTIVES["lm"](None)
    batch = one_a_row([([1] * 30, [2] * 30)] * 4)
    state = TrainState(jnp.int32(0), trainable, SGD.init(trainable), jax.random.key(2))

    def operations(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    step = make_train_step(model, method, objective, SGD)
    whole = operations(step, frozen, state, jax.tree.map(lambda x: x[None], batch))
    forward = operations(make_eval_step(model, method, objective), frozen, trainable, batch)
    assert 1.5 * forward < whole < 2.2 * forward


def test_dropout_differs_on_every_device_micro_batch_and_step(setting):
    model, frozen, _, _ = setting
    devices, accumulate = 8, 2
    method = METHODS["prefix"](None, length=P, dropout=0.5)
    ones = {"decoder": {"self": {name: jnp.ones((L, P, 2, 6)) for name in ("k", "v")}}}

    def reporting(model, params, adaptation, batch, key=None):
        kv = adaptation.decoder.kv["self"]
        drawn = jnp.stack([kv.k, kv.v]).ravel()
        which = jnp.arange(devices * accumulate) == batch.tokens[0, 0]
        return drawn.sum(), jnp.float32(1), {"drawn": which[:, None] * drawn}

    rate = optax.sgd(0.0)
    step = parallel.train_step(make_train_step(model, method, Objective(reporting), rate, axis=parallel.AXIS))
    batch = fields(one_a_row([([number], [1]) for number in range(devices * accumulate)], length=T))
    batch = parallel.split_batch(batch, accumulate)
    placed, patterns = parallel.place(frozen), []
    state = parallel.place(TrainState(jnp.int32(0), ones, rate.init(ones), jax.random.key(1)))
    for _ in range(2):
        state, sums = step(placed, state, batch)
        patterns += list(np.asarray(sums["drawn"]))
    assert len(patterns) == 32
    for one, other in itertools.combinations(patterns, 2):
        assert 0.2 < (one != other).mean() < 0.8  # half of them, were they independent
    assert all(set(pattern) == {0.0, 2.0} for pattern in patterns)


@pytest.mark.parametrize(("rows", "accumulate"), [(12, 1), (8, 2), (8, 0), (0, 1), (24, 2)])
def test_batches_that_cannot_be_split(rows, accumulate):
    with pytest.raises(UserError, match=f"a batch of {rows} rows cannot be split over {accumulate} micro-batches"):
        parallel.Replicated().check_rows(rows, accumulate)
    parallel.Replicated().check_rows(16, 2)


def test_rows_keep_their_order_when_split():
    batch = fields(one_a_row([([number % 13], [number]) for number in range(16)], length=T))
    split = parallel.split_batch(batch, 2)
    assert split.tokens.shape == (8, 2, 1, T)
    assert split.targets.ravel().tolist() == list(range(16))


# --- The optimizer


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0, {0: 0.1, 1: 0.09, 5: 0.05, 9: 0.01, 10: 0.0}),
        ("linear", 2, {0: 0.0, 1: 0.05, 2: 0.1, 6: 0.05, 10: 0.0}),
        ("cosine", 0, {0: 0.1, 5: 0.05, 10: 0.0}),
        ("cosine", 6, {0: 0.0, 3: 0.05, 6: 0.1, 8: 0.05, 10: 0.0}),
        ("constant", 0, {0: 0.1, 5: 0.1, 9: 0.1}),
        ("constant", 4, {0: 0.0, 1: 0.025, 4: 0.1, 9: 0.1}),
    ],
)
def test_learning_rates(schedule, warmup, expected):
    tx, rate = make_optimizer(10, name="sgd", learning_rate=0.1, schedule=schedule, warmup_steps=warmup, clip=None)
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, atol=1e-7)
    # and they are the ones that are used
    state, used = tx.init(np.float32(0)), []
    for _ in range(10):
        update, state = tx.update(np.float32(1), state, np.float32(0))
        used.append(-float(update))
    within = [step for step in expected if step < 10]
    np.testing.assert_allclose([used[step] for step in within], [expected[step] for step in within], atol=1e-7)


def first_update(gradient, value=0.0, **options):
    tx, _ = make_optimizer(10, schedule="constant", **options)
    params = jnp.full(2, value)
    return np.asarray(tx.update(jnp.array(gradient), tx.init(params), params)[0])


def test_clipping_and_decay():
    plain = {"name": "sgd", "learning_rate": 1.0}
    np.testing.assert_allclose(first_update([3.0, 4.0], **plain), [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(first_update([3.0, 4.0], **plain, clip=10.0), [-3, -4], rtol=1e-6)
    np.testing.assert_allclose(first_update([3.0, 4.0], **plain, clip=None), [-3, -4], rtol=1e-6)
    np.testing.assert_allclose(first_update([0.3, 0.4], 2.0, **plain, weight_decay=0.1), [-0.5, -0.6], rtol=1e-6)
    # Adam's first step is the learning rate, whatever the gradient; decay is apart from it
    np.testing.assert_allclose(first_update([0.3, -0.01], learning_rate=0.1), [-0.1, 0.1], rtol=1e-4)
    np.testing.assert_allclose(
        first_update([0.3, -0.01], 2.0, learning_rate=0.1, weight_decay=0.5), [-0.2, 0.0], atol=1e-5
    )
    assert (first_update([0.3, -0.01], name="adafactor", learning_rate=0.1) * [-1, 1] > 0).all()


def test_defaults_are_the_released_codes():
    """AdamW with beta 0.9 and 0.999, epsilon 1e-8, no decay, clipping at 1, and linear to 0."""
    gradients = [np.array([0.3, -0.2]), np.array([0.1, 0.4]), np.array([3.0, 4.0])]
    tx, _ = make_optimizer(4, learning_rate=0.1)
    x = params = np.array([1.0, -1.0])
    state, m, v = tx.init(jnp.array(params)), 0.0, 0.0
    for step, g in enumerate(gradients):
        update, state = tx.update(jnp.array(g), state, jnp.array(params))
        params = params + np.asarray(update)
        g = g / max(1.0, np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        rate = [0.1, 0.075, 0.05][step]
        x = x - rate * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        np.testing.assert_allclose(params, x, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "lion"}, r"unknown optimizer\.name 'lion'; valid: adafactor, adafactor_unscaled, adamw, sgd"),
        ({"schedule": "step"}, r"unknown optimizer\.schedule 'step'; valid: constant, cosine, linear"),
        ({"warmup_steps": 10}, "warmup_steps=10 must be at least 0 and below the 10 steps of the run"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"weight_decay": -0.1}, "weight_decay >= 0"),
        ({"clip": 0.0}, "clip > 0 or None"),
    ],
)
def test_impossible_options_raise(given, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(10, **{"learning_rate": 0.1} | given)


def test_label_smoothing_is_torchs_while_training():
    """Padding not counted; without a key it is the plain loss, which evaluations compare."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    targets, mask = np.array([[1, 4, 0], [6, 2, 2]]), np.array([[1, 1, 0], [1, 1, 1]], np.float32)
    model = SimpleNamespace(hidden=lambda *_: jnp.asarray(logits), unembed=lambda _, hidden: hidden)
    zeros = jnp.zeros((2, 3), jnp.int32)
    batch = Batch(zeros, zeros, zeros, jnp.tile(jnp.arange(3), (2, 1)), *map(jnp.asarray, (targets, mask)), jnp.ones(2))
    for smoothing in (0.0, 0.3):
        objective = OBJECTIVES["lm"](None, label_smoothing=smoothing)
        for key, expected in ((jax.random.key(0), smoothing), (None, 0.0)):
            summed, count, sums = objective.loss(model, {}, Adaptation(), batch, key)
            kept = torch.tensor(logits)[torch.tensor(mask) > 0], torch.tensor(targets)[torch.tensor(mask) > 0]
            theirs, plain = (
                torch.nn.functional.cross_entropy(*kept, reduction="sum", label_smoothing=e) for e in (expected, 0.0)
            )
            np.testing.assert_allclose(summed, theirs, rtol=1e-5)
            np.testing.assert_allclose(sums["nll"], plain, rtol=1e-5)
            assert count == 5
    with pytest.raises(UserError, match=r"objective.label_smoothing must be in \[0, 1\), got 1.0"):
        OBJECTIVES["lm"](None, label_smoothing=1.0)


def test_unscaled_adafactor_steps_as_far_however_large_the_parameter_is():
    for name, same in (("adafactor_unscaled", True), ("adafactor", False)):
        tx, _ = make_optimizer(10, name=name, learning_rate=0.3, schedule="constant", clip=None)
        small, large = ({"rows": jnp.full((4,), size)} for size in (1.0, 50.0))
        steps = [tx.update(jax.tree.map(jnp.ones_like, x), tx.init(x), x)[0]["rows"] for x in (small, large)]
        assert np.allclose(*steps) == same

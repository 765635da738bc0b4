"""What a step costs is counted from shapes; what is counted must be what is compiled."""

import contextlib
import json
import subprocess

import jax
import jax.numpy as jnp
import pytest

from experiments import growth
from prefix_tuning import models, parallel, setup
from prefix_tuning.models import loading
from prefix_tuning.objectives import vocabulary
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import TrainState

SIZES = {"vocab_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True}
TINY = growth.llama(3, 32, 4, 48, **SIZES)
PREFIX = growth.made("prefix", {"length": 5, "init": "random"})


@pytest.mark.parametrize("name", ["prefix", "finetune"])
def test_weights_and_state_are_what_a_compiled_step_takes(name):
    model = models.build(TINY)
    method = PREFIX if name == "prefix" else growth.made("finetune", {})
    batch = growth.rows(2, 12)
    found = growth.cost(model, method, batch)
    frozen, trainable = setup.abstract_frozen(method, model, "bfloat16"), setup.abstract_trainable(method, model)
    key = jax.eval_shape(lambda: jax.random.key(0))
    opt_state = jax.eval_shape(growth.TX.init, trainable)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, opt_state, key)
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)
    step = jax.jit(make_train_step(model, method, growth.OBJECTIVE, growth.TX), keep_unused=True)
    taken = step.lower(frozen, state, micro).compile().memory_analysis().argument_size_in_bytes
    beside = growth.size(micro) + 4 + 8  # the number of the step, and a key
    assert found.weights + found.state + beside == taken
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert found.state == 3 * 4 * trained + 4  # float32: it, and Adam's two moments, and Adam's own count


def test_what_is_kept_grows_with_rows_and_layers_and_less_if_layers_are_rematerialised():
    def kept(rows, layers, **how):
        model = models.build(TINY | {"num_hidden_layers": layers}, **how)
        return growth.cost(model, PREFIX, growth.rows(rows, 12)).kept

    assert kept(4, 3) == pytest.approx(2 * kept(2, 3), rel=0.01)
    layer = kept(2, 4) - kept(2, 3)
    assert layer == pytest.approx(kept(2, 5) - kept(2, 4), rel=0.01)
    assert layer > 2 * 12 * 48 * 2 * 2  # the MLP's two factors alone
    saved = kept(2, 4, remat=True) - kept(2, 3, remat=True)
    assert 2 * 12 * 32 * 2 <= saved < layer / 3  # a layer's input, in bfloat16, and little else


def test_a_gated_mlp_keeps_its_two_factors_and_a_norm_its_input():
    def kept(width=32, mlp=48):
        model = models.build(TINY | {"num_hidden_layers": 4, "hidden_size": width, "intermediate_size": mlp})
        return growth.cost(model, PREFIX, growth.rows(2, 12)).kept

    tokens, layers, bfloat16 = 2 * 12, 4, 2
    assert kept(mlp=64) - kept(mlp=48) == 2 * 16 * layers * tokens * bfloat16
    # What either norm reads, queries, what attention gives, and keys and values, which are half as wide.
    assert kept(width=64) - kept(width=32) < 6 * 32 * layers * tokens * bfloat16


def test_shards_are_those_of_the_layout():
    specs = models.build(TINY).specs
    layout = parallel.make(specs, "sharded", {"data": 8, "model": 1})
    assert growth.held(specs, 8) == layout.held(loading.abstract(models.build(TINY), "bfloat16"))
    assert growth.held(specs, 8) < growth.held(specs, 1) / 6


def test_as_many_rows_fit_as_leave_room_for_the_rest():
    row = growth.Cost(weights=2 * 10**6, state=100, kept=1000)
    weights = growth.held(models.build(TINY).specs, 1)
    memory = (weights + 100 + 5500) / (1 - growth.RESERVE)
    assert growth.largest(TINY, row, 1, memory) == 5
    assert growth.largest(TINY, row, 1, weights) == 0


def test_operations_are_counted_over_all_layers_and_prefixes():
    point = growth.Point(batch=1, length=16, layers=2)
    one, more = growth.operations(point), growth.operations(point._replace(layers=4))
    assert more > one
    assert growth.operations(point._replace(population=3)) == 3 * one
    assert 1.5 < one / growth.operations(point, forward=True) <= 2.2


def test_each_device_has_its_rows_and_its_share_of_the_weights():
    point = growth.Point(batch=4, length=16, layers=2)
    alone, half = growth.at(point), growth.at(point._replace(devices=2))
    assert half.kept == growth.at(point._replace(batch=2)).kept
    assert half.state == alone.state
    assert 0.5 < half.weights / alone.weights < 0.51  # norms are whole on each
    assert growth.operations(point._replace(devices=2)) == growth.operations(point._replace(batch=2))


def test_a_step_is_measured_on_one_device():
    with pytest.raises(SystemExit, match="error: a step is measured on one device, not on 2"):
        growth.run(growth.Point(devices=2), "float32", TINY)


def test_what_is_measured_is_a_step_of_the_sizes_that_are_counted():
    given, counted = growth.real_rows(2, 12), growth.rows(2, 12)
    like = lambda batch: jax.tree.map(lambda x: (x.shape, x.dtype), batch)  # noqa: E731
    assert like(given) == like(counted)
    found = growth.run(growth.Point(prefix=3, batch=2, length=12, layers=2, population=2), "float32", TINY)
    assert found["seconds"] > 0
    assert found["peak"] > 1  # MiB


def test_every_size_is_measured_in_a_process_of_its_own(monkeypatch, capsys):
    started = []

    def answer(command, **_):
        started.append(growth.Point(**json.loads(command[3])))
        assert command[4] == "bfloat16"
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps({"seconds": 0.5, "peak": 2000.0}))

    monkeypatch.setattr(growth.subprocess, "run", answer)
    growth.main(["--measure", "--dtype=bfloat16"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) - 2 == len(started) == len({*started}) + 4  # the common point is one of each
    assert "| population | 5 | 0.5 | 10,240 | 2,000 |" in lines
    with pytest.raises(SystemExit, match="error: unknown --mesure; valid: --measure"):
        growth.main(["--mesure"])


def test_operations_do_not_depend_on_how_many_targets_have_logits_at_a_time(monkeypatch):
    monkeypatch.setattr(growth, "SMALL", TINY)
    point = growth.Point(batch=4, length=16, layers=1)
    whole = growth.operations(point)
    monkeypatch.setattr(vocabulary, "CPU_ROWS", 8)
    assert growth.operations(point) == whole
    monkeypatch.setattr(growth.mock.patch, "multiple", lambda *_, **__: contextlib.nullcontext())
    assert growth.operations(point) < whole

"""Runs that train together are the runs that they would be alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run
from prefix_tuning import population, setup
from prefix_tuning.errors import UserError
from prefix_tuning.train import restore_together, train, train_together

SHORT = {
    "train.examples": 40,
    "train.epochs": 1,
    "train.batch_size": 16,
    "train.log_every": 1,
    "evaluation.examples": 8,
    "evaluation.batch_size": 8,
    "evaluation.metrics": (),
    "optimizer.warmup_steps": 1,
}


def configured(overrides, method="prefix"):
    config = run.load_config(f"configs/quickstart.py:method={method}")
    config.update_from_flattened_dict(SHORT | overrides)
    return config.to_dict()


@pytest.fixture(scope="module")
def weights():
    config = configured({})
    return setup.read_weights(setup.make_base(config), config)


def made(configs):
    bases = [setup.make_base(config) for config in configs]
    runs = [setup.make_run(*one) for one in zip(configs, bases, strict=True)]
    population.check(configs, bases, runs)
    return configs, bases, runs


def stepped(engine, states=None, steps=3):
    """The states after some steps, and each step's sums."""
    engine.start(engine.fresh() if states is None else states)
    sums = [engine.read(engine.advance(batch)) for batch, _ in zip(engine.batches(0), range(steps), strict=False)]
    return jax.device_get([state.trainable for state in engine.states()]), sums


def same_as_alone(configs, weights, tolerance=2e-5):
    configs, bases, runs = made(configs)
    together, sums = stepped(population.Population(configs, bases, runs, weights))
    for number, one in enumerate(zip(configs, bases, runs, strict=True)):
        (alone,), own = stepped(population.Single(*one, weights))
        assert jax.tree.structure(alone) == jax.tree.structure(together[number])
        for ours, theirs in zip(jax.tree.leaves(together[number]), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)
        for ours, theirs in zip(sums, own, strict=True):
            for name, value in theirs[0].items():
                np.testing.assert_allclose(ours[number][name], value, rtol=1e-4, err_msg=name)
    return together


def test_lengths_and_rates_on_the_same_batches(weights):
    same_as_alone(
        [configured({"method.length": n, "optimizer.learning_rate": rate}) for n, rate in ((2, 1e-3), (5, 4e-3))], weights
    )

"""Runs that train together are the runs that they would be alone."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import run
from prefix_tuning import parallel, population, setup
from prefix_tuning import train as loop
from prefix_tuning.errors import UserError
from prefix_tuning.files import read_lines
from prefix_tuning.progress import Interrupted, Stop

SHORT = {
    "text.max_source": 12,
    "text.max_target": 6,
    "train.examples": 20,
    "train.epochs": 1,
    "train.batch_size": 8,
    "train.shapes": 1,
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


def stepped(engine, states=None, steps=2):
    """The states after some steps, and each step's sums."""
    engine.start(engine.fresh() if states is None else states)
    sums = [engine.read(engine.advance(batch)) for batch, _ in zip(engine.batches(0), range(steps), strict=False)]
    return jax.device_get([state.trainable for state in engine.states()]), sums


def same_as_alone(configs, weights, tolerance=2e-5, compared=slice(None)):
    configs, bases, runs = made(configs)
    together, sums = stepped(population.Population(configs, bases, runs, weights))
    for number, one in list(enumerate(zip(configs, bases, runs, strict=True)))[compared]:
        (alone,), own = stepped(population.Single(*one, weights))
        assert jax.tree.structure(alone) == jax.tree.structure(together[number])
        for ours, theirs in zip(jax.tree.leaves(together[number]), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)
        for ours, theirs in zip(sums, own, strict=True):
            for name, value in theirs[0].items():
                np.testing.assert_allclose(ours[number][name], value, rtol=1e-4, err_msg=name)
    return together


def prefixes(*lengths, **options):
    """Configs that differ in length alone."""
    return [configured({"method.length": length} | options) for length in lengths]


@pytest.fixture(scope="module")
def eight(weights):
    """Lengths 1 to 8 at rates of their own, and what trains them."""
    configs = prefixes(*range(1, 9))
    for number, config in enumerate(configs):
        config["optimizer"]["learning_rate"] *= 1 + number
    runs = made(configs)
    return *runs, population.Population(*runs, weights)


@pytest.mark.parametrize(("layout", "count", "held"), [("replicated", 8, 1), ("replicated", 3, 3), ("sharded", 8, 8)])
def test_what_every_run_trains_counts_against_a_devices_memory(monkeypatch, tmp_path, layout, count, held):
    """The largest prefix as often as a device holds it: of 8 runs on 8 devices each has one, of 3 all have rows."""
    configs = prefixes(*range(100, 100 + count), parallel=layout)
    base = setup.make_base(configs[-1])
    state = 3 * 4 * setup.parameter_counts(base.method, base.model)["trained"]  # and two moments of AdamW
    weights = base.layout.held(setup.abstract_frozen(base.method, base.model))
    monkeypatch.setattr(parallel, "memory_limit", lambda: weights + held * state)  # less AdamW's count
    with pytest.raises(
        UserError, match=f"trained parameters of {held} of {count} runs .* on each device, which can hold"
    ):
        loop.train_together(configs, [tmp_path / str(n) for n in range(count)])
    monkeypatch.setattr(parallel, "memory_limit", lambda: weights + held * (state + 100))
    monkeypatch.setattr(setup, "read_weights", lambda *_: pytest.fail("it fits"))
    with pytest.raises(pytest.fail.Exception, match="it fits"):
        loop.train_together(configs, [tmp_path / str(n) for n in range(count)])
    assert not list(tmp_path.iterdir())


def test_seeds_and_starts_on_batches_of_their_own(weights):
    """With an MLP, whose table is as long as the prefix, and batches of other lengths; their rows are spread.

    The first of three, whose start and seed are the usual ones, is only beside the others.
    """
    options = {"method.reparametrisation": 6, "train.shapes": 2, "text.max_source": None}
    configs = prefixes(2, 4, **options) + prefixes(3, **options, seed=1)
    for config in configs:
        del config["method"]["scale"]
    configs[1]["method"] |= {"init": "text", "text": "Our restaurant of the week", "fit_steps": 3}
    same_as_alone(configs, weights, compared=slice(1, None))


def test_weights_in_shards_are_shared_too(weights):
    """With rows and micro-batches split by a mesh, and batches of each run's own."""
    options = {"train.accumulate": 2, "train.batch_size": 16, "train.examples": 40}
    configs = prefixes(2, 4, **options) + prefixes(3, **options, seed=1)
    _, bases, runs = made(configs)
    split = [config | {"parallel": "sharded", "mesh": {"data": 4, "model": 2}} for config in configs]
    one, sums = stepped(population.Population(configs, bases, runs, weights))
    made_split = made(split)
    engine = population.Population(*made_split, setup.read_weights(made_split[1][0], split[0]))
    own, shares = stepped(engine)
    kernel = engine.frozen["layers"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    for ours, theirs in zip(jax.tree.leaves(own), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
    for ours, theirs in zip(jax.tree.leaves(shares), jax.tree.leaves(sums), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    bound = engine.method.bind(*engine.bound(1, engine.states()[1].trainable))[1]
    assert bound.decoder.kv["self"].k.shape[1] == 4


def test_what_a_method_keeps_beside_the_weights_is_each_runs_own(weights):
    """The layers with a prefix, and slots that stay the keys and values of the text's first tokens."""
    options = {"method.frozen_slots": 1, "method.init": "text", "method.text": "Text: a restaurant"}
    one, other = prefixes(3, 4, **options)
    for config in (one, other):
        del config["method"]["scale"]
    other["method"]["text"] = "Our restaurant of the week"
    for config in (one, other):
        config["method"]["layers"] = (1,)
    same_as_alone([one, other], weights)


def test_what_is_drawn_is_drawn_as_it_would_be_alone(weights):
    # Without Adam, which makes a step of any gradient, however near to nothing.
    options = {"method.dropout": 0.3, "method.rank": 2, "optimizer.name": "sgd", "optimizer.learning_rate": 0.5}
    configs = [configured(options, "lora") for _ in range(2)]
    configs[1]["optimizer"]["learning_rate"] *= 2
    same_as_alone(configs, weights)


def test_as_many_as_devices_are_spread_over_them(eight, weights):
    configs, bases, runs, engine = eight
    together, _ = stepped(engine)
    for leaf in jax.tree.leaves((engine.state.trainable, engine.state.opt_state)):
        assert len({str(shard.index) for shard in leaf.addressable_shards}) == 8  # no two hold the same run
    (alone,), _ = stepped(population.Single(configs[6], bases[6], runs[6], weights))
    for ours, theirs in zip(jax.tree.leaves(together[6]), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


def test_slots_that_a_shorter_prefix_lacks_do_nothing(eight):
    """Whatever stands there, the step is the same, and nothing moves it."""
    *_, engine = eight
    engine.start(engine.fresh())
    batch = next(iter(engine.batches(0)))
    expected = engine.read(engine.advance(batch))
    after = jax.device_get(engine.state.trainable["decoder"]["self"])
    for leaf in after.values():  # [runs L P K H]
        assert not leaf[1, :, 2:].any()
        assert np.abs(leaf[7, :, 2:]).min() > 0
    engine.start(engine.fresh())
    huge = jax.tree.map(lambda x: x.at[1, :, 2:].set(100.0), engine.state.trainable)
    engine.state = engine.state.replace(trainable=jax.device_put(huge, engine.sharding))
    found = engine.read(engine.advance(batch))
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6)
    for leaf in jax.tree.leaves(jax.device_get(engine.state.trainable)):
        np.testing.assert_array_equal(leaf[1, :, 2:], np.full_like(leaf[1, :, 2:], 100.0))


def test_who_can_train_together():
    """In the order of the first of each group."""
    lora = [configured({"method.rank": rank}, "lora") for rank in (1, 2)]
    configs = [*prefixes(2, 3), lora[0], *prefixes(4, 5), lora[1], configured({"seed": 3, "method.rank": 1}, "lora")]
    assert population.groups(configs, 3) == [[0, 1, 3], [2, 6], [4], [5]]
    assert population.groups(configs, 1) == [[number] for number in range(7)]
    seeds = [configured({"method.length": length, "seed": seed}) for length in (2, 3) for seed in (0, 1)]
    assert population.groups(seeds, 2) == [[0, 2], [1, 3]]  # those that read the same batches
    # Masks that are drawn, and factors, depend on shapes.
    dropped = [configured({"seed": seed}) | {"objective": {"name": "lm", "dropout": 0.1}} for seed in (0, 1)]
    assert population.groups(dropped, 2) == [[0], [1]]
    assert population.groups(prefixes(2, 3, **{"method.dropout": 0.1}), 2) == [[0], [1]]
    for name in ("adafactor", "adafactor_unscaled"):
        assert population.groups(prefixes(2, 3, **{"optimizer.name": name}), 2) == [[0], [1]]
    both = [configured({"method.parts.prefix.length": length}, "prefix+lora") for length in (2, 3)]
    assert population.groups(both, 2) == [[0, 1]]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([{}, {"train.batch_size": 16}], r"differ in train.batch_size; valid: method.fit_learning_rate, .*seed"),
        ([{}, {"method.dropout": 0.1}], "differ in method.dropout; valid: "),
    ],
)
def test_runs_that_cannot_train_together(configs, message):
    with pytest.raises(UserError, match=message):
        made([configured(config | {"train.examples": 200}) for config in configs])


def test_rows_that_are_packed_may_make_other_numbers_of_steps():
    configs, bases, runs = made(
        [configured({"train.packing": True, "train.examples": 60, "seed": seed}) for seed in (0, 1)]
    )
    data = runs[1].data
    runs[1] = runs[1]._replace(data=data._replace(total_steps=data.total_steps + 1))
    with pytest.raises(UserError, match=r"take \[\d, \d\] steps; drop train.packing"):
        population.check(configs, bases, runs)


def test_cudnn_attends_for_one_run_alone():
    configs = prefixes(1, 2, **{"model.attention": "cudnn"})
    with pytest.raises(UserError, match=r"cannot attend by cuDNN's kernel; expected model\.attention='plain'"):
        population.check(configs, [], [])


def test_prompts_of_other_lengths_cannot():
    texts = ("ab cd", "a longer text of more tokens")
    options = {"method.length": None, "method.init": "text"}
    with pytest.raises(UserError, match="parameters of other shapes; only prefixes may, in length"):
        made([configured(options | {"method.text": text}, "prompt") for text in texts])


SWEEP = """
from configs import quickstart


def sweep(add):
    for length in (2, 5):
        add(f"length={length}", {"method.length": length})
    add("broken", {"method.length": 3, "optimizer.learning_rate": float("inf")})


get_config = quickstart.get_config
"""


def files(workdir):
    """All but those whose names are drawn."""
    found = [path.relative_to(workdir) for path in workdir.rglob("*")]
    return sorted(str(path) for path in found if path.parts[0] not in ("tensorboard", "checkpoints"))


def test_each_leaves_the_workdir_that_it_would_leave_alone(tmp_path, monkeypatch, capsys, commands_here):
    """Stopped and gone on with from the last step that all had saved; one that diverges ends none of the others."""
    (tmp_path / "config.py").write_text(SWEEP)
    options = [f"--config.{key}={value}" for key, value in SHORT.items()]
    options += ["--config.train.checkpoint_every=1", "--config.train.keep=9", "--config.train.epochs=2"]
    options += ["--config.optimizer.clip=1000.0"]
    command = ["train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/together", *options]
    calls = iter(range(100))

    def stop(self):
        if next(calls) == 4:
            raise Interrupted(130)

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", stop)
        assert run.main([*command, "--runs=length=2,length=5,broken"]) == 130
    root = tmp_path / "together"
    saved = [{int(path.name) for path in (root / name / "checkpoints").iterdir()} for name in ("length=5", "broken")]
    assert saved == [{1, 2, 3, 4}, {1}]  # the one that diverges in its second step does not save it
    assert run.main(["sweep", *command[1:], "--config.train.population=3"]) == 1
    assert "error: 1 of 3 runs failed or were stopped: broken; " in capsys.readouterr().err
    log = (root / "broken" / "log.txt").read_text()  # the last of those that train together has it
    assert "going on after step 1" in log
    assert "broken: loss" in log
    assert "error: 1 of 3 runs failed; " in log
    # The shorter one, whose slots are a part of what they share; a step of every length is compared above.
    alone = tmp_path / "alone"
    assert run.main([*command[:2], f"--workdir={alone}", *options, "--config.method.length=2"]) == 0
    assert files(root / "length=5") == files(root / "length=2")
    steps = [[(x["step"], *x) for x in read_lines(root / name / "metrics.jsonl")] for name in ("length=2", "length=5")]
    assert steps[0] == steps[1]
    ours, theirs = (
        {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
        for folder in (root / "length=2", alone)
    )
    assert ours["config.json"] == theirs["config.json"]
    assert files(root / "length=2") == files(alone)
    for key, value in theirs["summary.json"]["tuned"].items():
        np.testing.assert_allclose(ours["summary.json"]["tuned"][key], value, rtol=1e-4)
    assert ours["summary.json"]["population"] == 3
    assert ours["summary.json"]["parameters"] == theirs["summary.json"]["parameters"]
    lines = [read_lines(folder / "metrics.jsonl") for folder in (root / "length=2", alone)]
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    for one, other in zip(*lines, strict=True):
        for key in one.keys() & {"step", "train/loss", "train/learning_rate", "eval/loss"}:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-4)
    pair = [
        safetensors.numpy.load_file(f / "adapter" / "adapter_model.safetensors") for f in (root / "length=2", alone)
    ]
    for key, value in pair[1].items():
        np.testing.assert_allclose(pair[0][key], value, atol=1e-4)
    assert run.main([*command, "--runs=length=5,length=2"]) == 0  # finished: only told again
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--runs=length=2,lenth"],
            "--runs: 'lenth' does not begin with a run; valid: length=2; length=5",
        ),
        (["--runs=length=2,length=2"], "--runs='length=2,length=2' names no run, or one twice"),
        (["--config.train.population=3"], "train.population=3 is how many runs of a sweep train at once; expected 1"),
    ],
)
def test_what_cannot_be_run_together_is_said_first(tmp_path, capsys, options, message):
    (tmp_path / "config.py").write_text(SWEEP)
    assert run.main(["train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/w", *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_names_of_runs_may_have_commas():
    planned = run.listed("configs/e2e_smollm2.py")
    names = ("length=10,seed=1", "length=1,seed=0")
    assert tuple(run.named(",".join(names), [one.name for one in planned])) == names

"""The checkpoint that a score chooses is the one that comes out; training ends when none that is better comes."""

import json

import numpy as np
import pytest

import run
from prefix_tuning import api, evaluate, metrics, setup, train
from prefix_tuning.checkpoint import Checkpoints
from prefix_tuning.errors import UserError
from prefix_tuning.progress import Interrupted, Stop

SHORT = {
    "text.max_source": 12,
    "text.max_target": 6,
    "train.batch_size": 8,
    "train.examples": 48,
    "train.epochs": 1,
    "train.shapes": 1,
    "train.log_every": 1,
    "train.eval_every": 1,
    "train.checkpoint_every": 2,
    "evaluation.examples": 8,
    "evaluation.batch_size": 8,
    "evaluation.metrics": (),
    "evaluation.final_split": "validation",
    "evaluation.select": "loss",
    "optimizer.warmup_steps": 1,
}  # six steps


def configured(**overrides):
    config = run.load_config("configs/quickstart.py")
    config.train.draw = None
    config.update_from_flattened_dict(SHORT | {key.replace("_", ".", 1): value for key, value in overrides.items()})
    return config.to_dict()


@pytest.fixture
def losses(monkeypatch):
    """What the evaluations find, one after the other; those that are left were not made."""
    left = []
    monkeypatch.setattr(evaluate, "mean_loss", lambda *_, **__: {"loss": left.pop(0), "accuracy": 0.5})
    return left


def trainable(workdir, folder, step):
    """What the newest checkpoint holds, which is of this step."""
    base = setup.make_base(json.loads((workdir / "config.json").read_text()))
    checkpoints = Checkpoints(workdir / folder, 9)
    found = checkpoints.restore_trainable(setup.abstract_trainable(base.method, base.model))
    checkpoints.close()
    assert found[1] == step
    return found[0]["decoder"]["self"]["k"]


def test_the_best_one_comes_out(tmp_path, losses):
    losses += [5.0, 3.0, 4.0, 3.0, 3.5, 6.0]  # of two that are equal, the first
    summary = train.train(configured(), tmp_path)
    assert not losses
    assert summary["tuned"]["loss"] == 3.0
    assert (summary["selected"], summary["steps"]) == ({"step": 2, "by": "loss"}, 6)
    assert json.loads((tmp_path / "eval_validation.json").read_text())["step"] == 2
    best, last = trainable(tmp_path, "best", 2), trainable(tmp_path, "checkpoints", 6)
    assert np.abs(best - last).max() > 1e-4
    _, _, _, opened, step = api.open_workdir(str(tmp_path))
    assert step == 2
    np.testing.assert_array_equal(opened["decoder"]["self"]["k"], best)


def test_it_is_scored_on_the_final_split(tmp_path, losses):
    losses += [5.0, 3.0, 4.0, 3.0, 3.5, 6.0, 7.0]
    summary = train.train(configured(evaluation_final_split="test"), tmp_path)
    assert not losses
    assert (summary["tuned"]["loss"], summary["selected"]["step"]) == (7.0, 2)


def test_patience_ends_a_run_also_one_that_was_stopped(tmp_path, losses, monkeypatch):
    losses += [5.0, 3.0, 4.0, 4.5, 9.9]
    calls = iter(range(100))

    def stop(self):
        if next(calls) == 3:
            raise Interrupted(130)

    monkeypatch.setattr(Stop, "check", stop)
    with pytest.raises(Interrupted):
        train.train(configured(evaluation_patience=1), tmp_path)
    monkeypatch.setattr(Stop, "check", lambda self: None)
    assert losses == [4.5, 9.9]
    summary = train.train(configured(evaluation_patience=1), tmp_path)
    assert losses == [9.9]
    assert (summary["tuned"]["loss"], summary["selected"]["step"], summary["steps"]) == (3.0, 2, 4)
    trainable(tmp_path, "checkpoints", 4)


def test_epochs_can_be_counted_instead_of_steps(tmp_path, losses):
    losses += [5.0, 3.0, 4.0]
    config = configured(train_eval_every=None, train_eval_epochs=1, train_epochs=3, train_examples=16)
    summary = train.train(config, tmp_path)
    assert not losses
    assert summary["selected"]["step"] == 4
    assert summary["steps"] == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"evaluation_select": "bleu"}, "unknown evaluation.select 'bleu'; valid: accuracy, loss, perplexity"),
        (
            {"evaluation_select": "blue", "evaluation_metrics": ("bleu",)},
            "unknown evaluation.select 'blue'; valid: accuracy, loss, perplexity, sacrebleu",
        ),
        ({"train_eval_every": None}, "evaluation.select needs evaluations to choose among: set train.eval_every or"),
        ({"train_eval_epochs": 1}, "train.eval_every and train.eval_epochs both say when to evaluate"),
        ({"train_eval_every": 0}, "train.eval_every must be at least 1 or None, got 0"),
        (
            {"train_examples": None, "train_draw": 3},
            "train.draw=3 is the seed that draws train.examples, which is None",
        ),
        ({"evaluation_patience": -1}, "evaluation.patience must be at least 0 or None, got -1"),
        ({"evaluation_select": None, "evaluation_patience": 2}, "evaluation.patience waits for a better"),
    ],
)
def test_what_cannot_be_selected_is_said_first(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train.train(configured(**overrides), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_an_evaluation_can_be_smaller(tmp_path, monkeypatch):
    """The loss on a few pairs of the records that are decoded, and nothing about the untuned model."""
    monkeypatch.setattr(evaluate, "make_writer", lambda *_, **__: lambda *given: ["a"] * len(given[2]))
    own = {"evaluation_pairs": 3, "evaluation_untuned": False, "evaluation_metrics": ("bleu",)}
    config = configured(train_eval_every=None, evaluation_select=None, **own)
    made = setup.make_run(config, setup.make_base(config))
    assert (len(made.split.records), len(made.split.pairs)) == (8, 3)
    summary = train.train(config, tmp_path)
    assert (summary["records"], summary["untuned"]) == (8, {})
    assert "sacrebleu" in summary["tuned"]
    assert not (tmp_path / "predictions" / "untuned.jsonl").exists()


def test_a_score_that_this_machine_cannot_compute_is_no_choice(tmp_path, losses, monkeypatch):
    losses += [1.0]
    monkeypatch.setitem(metrics.METRICS, "java", lambda *_: {"meteor": None})
    monkeypatch.setattr(evaluate, "make_writer", lambda *_, **__: lambda *given: ["a"] * len(given[2]))
    with pytest.raises(UserError, match=r"evaluation.select='meteor' is null on this machine"):
        train.train(configured(evaluation_metrics=("java",), evaluation_select="meteor"), tmp_path)


def test_lower_is_better_where_errors_are_counted():
    names = ("loss", "perplexity", "ter", "ter_seen", "dart_ter", "meteor_all", "bleu", "accuracy", "meteor")
    assert [name for name in names if metrics.lower_is_better(name)] == [
        "loss",
        "perplexity",
        "ter",
        "ter_seen",
        "dart_ter",
    ]

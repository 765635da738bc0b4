"""Trained changes of weights as whole models: merged = unmerged, here and in transformers."""

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import close, letters, random_prefix, random_rows, reference_logits

import prefix_tuning
from prefix_tuning import heads
from prefix_tuning.data import pipeline
from prefix_tuning.errors import UserError
from prefix_tuning.interop import merged
from prefix_tuning.methods import METHODS
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.registry import named
from prefix_tuning.types import Adaptation, Batch

CASES = {
    "lora": {"rank": 2, "alpha": 3.0},
    "lora all": {"rank": 2, "alpha": 3.0, "rslora": True, "target_modules": ("all-linear",)},
    "finetune": {},
    "finetune top": {"top_layers": 1, "embedding": True},
    "finetune biases": {"biases": True},
    "compose": {"parts": {"lora": {"rank": 2, "target_modules": ("q", "v", "down")}, "finetune": {"biases": True}}},
}


def bound(model, frozen, name):
    method = named("method", METHODS, {"name": name.split()[0]} | CASES[name], letters)
    leaves, tree = jax.tree.flatten(method.init(jax.random.key(0), model, frozen))
    rng = np.random.default_rng(0)
    trained = jax.tree.unflatten(tree, [x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])
    return method.bind(frozen, trained)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, name) for name in CASES for family in ("gpt2", "llama")),
        ("phi3", "lora all"),
        ("gpt_neox", "compose"),
        ("qwen2", "compose"),
    ],
    ids=lambda name: name.replace(" ", "_"),
)
def test_merged_is_unmerged(twin, tmp_path, family, name):
    _, _, model, frozen = twin(family)
    params, adaptation = bound(model, frozen, name)
    rows = random_rows(5)
    wanted = prefix_tuning.logits(model, params, adaptation, rows)
    assert np.abs(wanted[0] - prefix_tuning.logits(model, frozen, None, rows)[0]).max() > 0.01
    whole, weights = merged.merge(model, params, adaptation)
    close(prefix_tuning.logits(whole, weights, None, rows), wanted, 2e-5)
    merged.save(tmp_path / "whole", model, params, adaptation, None)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    close(reference_logits(reference, rows), wanted)
    again, loaded, _ = prefix_tuning.load_model(tmp_path / "whole")
    close(prefix_tuning.logits(again, loaded, None, rows), wanted, 2e-5)


def test_merging_keeps_the_dtype(twin, tmp_path):
    model, frozen, _ = prefix_tuning.load_model(twin("llama").folder, dtype="bfloat16")
    params, adaptation = bound(model, frozen, "lora")
    _, weights = merged.merge(model, params, adaptation)
    assert {str(x.dtype) for x in jax.tree.leaves(weights)} == {"bfloat16"}
    merged.save(tmp_path / "whole", model, params, adaptation, None)
    assert prefix_tuning.load_model(tmp_path / "whole", dtype="bfloat16")[0].config["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["prefix", "prompt", "adapter", "memory"])
def test_what_is_no_change_of_weights_is_refused(twin, name):
    _, _, model, frozen = twin("llama")
    options = {"prefix": {"length": 2}, "prompt": {"length": 2}, "adapter": {"bottleneck": 2}, "memory": {}}[name]
    method = named("method", METHODS, {"name": name} | options, letters)
    adaptation = method.bind(frozen, method.init(jax.random.key(0), model, frozen))[1]
    with pytest.raises(UserError, match="only LoRA, biases and fine-tuned weights can be merged"):
        merged.merge(model, frozen, adaptation)


def test_a_prefix_beside_lora_is_refused_too(twin):
    _, _, model, frozen = twin("llama")
    lora = bound(model, frozen, "lora")[1]
    both = Adaptation(random_prefix(model, 0).decoder.replace(delta=lora.decoder.delta))
    with pytest.raises(UserError, match="can be merged"):
        merged.merge(model, frozen, both)


@pytest.mark.parametrize(
    ("family", "kind", "method"),
    [
        ("bert", "classify", {"name": "finetune"}),
        ("bert", "tag", {"name": "lora", "rank": 2}),
        ("roberta", "span", {"name": "finetune", "biases": True}),
        ("llama", "classify", {"name": "lora", "rank": 2}),
    ],
)
def test_a_head_is_merged_into_transformers_class_for_the_task(twin, tmp_path, family, kind, method):
    _, _, model, frozen = twin(family)
    labels = {} if kind == "span" else {"labels": ("no", "yes", "both")}
    objective = OBJECTIVES[kind](None, **labels)
    whole = heads.with_head(named("method", METHODS, method, letters), objective.head)
    leaves, tree = jax.tree.flatten(whole.init(jax.random.key(0), model, frozen))
    rng = np.random.default_rng(0)
    moved = jax.tree.unflatten(tree, [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])
    params, adaptation = whole.bind(frozen, moved)
    merged.save(tmp_path, model, params, adaptation, None, {"name": kind, **labels})
    auto = {
        "classify": transformers.AutoModelForSequenceClassification,
        "tag": transformers.AutoModelForTokenClassification,
        "span": transformers.AutoModelForQuestionAnswering,
    }[kind]
    reference, report = auto.from_pretrained(tmp_path, pad_token_id=1, output_loading_info=True)
    assert not report["missing_keys"]
    row = [5, 7, 3, 9]
    index = {"classify": [3 if model.writes else 0], "tag": [0, 1, 2, 3], "span": [0, 0]}[kind]
    example = pipeline.Example(row, index, [0] * len(index), types=[0] + [1] * 3 if kind == "span" else None)
    batch = Batch(**pipeline.collate([[example]], 4, len(index)))
    if kind == "span":  # RoBERTa has one type
        batch = batch.replace(types=np.ones((1, 4), np.int32))
    found = np.asarray(objective.predict(model, params, adaptation, batch))[0]
    with torch.no_grad():
        out = reference.eval()(torch.tensor([row]))
    wanted = torch.stack([out.start_logits[0], out.end_logits[0]], -1) if kind == "span" else out.logits[0]
    np.testing.assert_allclose(found, wanted.numpy().reshape(found.shape), atol=1e-4)
    assert np.std(found) > 0.01
    if labels:
        assert list(reference.config.id2label.values()) == list(labels["labels"])

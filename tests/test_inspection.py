"""What `inspect` says of slots whose worth is known beforehand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import L, P, close, interrupt, letters, one_a_row, random_prefix, random_rows

import prefix_tuning
import run
from prefix_tuning import inspection
from prefix_tuning.methods import METHODS, compose
from prefix_tuning.registry import named
from prefix_tuning.types import Adaptation, LayerHooks

BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


def bound(model, frozen, name, **options):
    method = named("method", METHODS, {"name": name} | options, letters)
    return method.bind(frozen, method.init(jax.random.key(0), model, frozen))[1]


@BOTH
def test_a_folded_prompt_is_the_prompt(twin, family):
    _, _, model, frozen = twin(family)
    rows = random_rows(5)
    prompt = bound(model, frozen, "prompt", length=P, init="random")
    beside = random_prefix(model, 0, length=2)
    both = beside.replace(prompt=prompt.prompt, shift=jnp.int32(P + 2))
    for adaptation in (prompt, both, bound(model, frozen, "propagation", length=3)):
        folded = compose.fold(model, frozen, adaptation)
        assert folded.prompt is None
        close(
            prefix_tuning.logits(model, frozen, folded, rows),
            prefix_tuning.logits(model, frozen, adaptation, rows),
            5e-6,
        )


@BOTH
def test_a_removed_slot_is_one_that_was_never_there(twin, family):
    _, _, model, frozen = twin(family)
    adaptation, rows = random_prefix(model, 1), random_rows(5)
    kept = [0, 1, 3, 4]
    kv = jax.tree.map(lambda x: x[:, np.array(kept)], adaptation.decoder.kv)
    without = Adaptation(LayerHooks(kv=kv), adaptation.shift)
    ours = prefix_tuning.logits(model, frozen, inspection.remove(adaptation, "decoder", "self", 2), rows)
    close(ours, prefix_tuning.logits(model, frozen, without, rows), 5e-6)


def test_a_slot_that_nobody_attends_to_is_idle(twin):
    _, _, model, frozen = twin("gpt2")
    adaptation = random_prefix(model, 1, shift=False)
    kv = adaptation.decoder.kv["self"]
    mask = np.ones((L, P), bool)
    mask[:, 3] = False
    silent = adaptation.replace(decoder=LayerHooks(kv={"self": kv.replace(mask=jnp.asarray(mask))}))
    batch = one_a_row([(row, [1, 2]) for row in random_rows(5)])
    found = inspection.attention(model, frozen, silent, [batch, batch])["decoder.self"]
    mass = np.asarray(found["mass"])
    assert mass.shape == (L, 2, P)
    assert (mass[..., 3] == 0).all()
    assert (np.delete(mass, 3, axis=-1) > 0).all()
    assert (mass.sum(-1) < 1).all()
    np.testing.assert_allclose(
        np.asarray(found["key_norm"])[:, 0], np.linalg.norm(kv.k[:, 0], axis=-1).mean(-1), rtol=1e-5
    )
    assert inspection.verdict(2.0, 2.0001) == "idle"
    assert inspection.verdict(2.0, 2.1) == "works"
    assert inspection.verdict(2.0, 1.9) == "harms"


def test_nearest_words_of_real_embeddings_are_those_words(twin):
    _, _, model, frozen = twin("llama")
    near = inspection.nearest(model, frozen, 3.0 * model.embed(frozen, jnp.array([4, 9])))
    assert near[:, 0].tolist() == [4, 9]
    assert near.shape == (2, inspection.WORDS)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A prompt of three rows, barely trained, and a LoRA that took no step, on what the repository ships."""
    folders = {}
    for method, option in (("prompt", "length=3"), ("lora", "rank=1")):
        folders[method] = tmp_path_factory.mktemp(method)
        config = f"--config=configs/quickstart.py:quick,method={method}"
        short = [
            "--config.train.epochs=1",
            "--config.train.examples=96",
            "--config.train.batch_size=8",
            "--config.evaluation.metrics=()",
        ]
        short += ["--config.train.shapes=1", f"--config.method.{option}", f"--workdir={folders[method]}"]
        with pytest.MonkeyPatch.context() as patch:
            if method == "lora":
                interrupt(patch, 1)
            assert run.main(["train", config, *short]) == (143 if method == "lora" else 0)
    return folders


def test_command_writes_tables_and_a_picture(shipped, capsys):
    folder = shipped["prompt"]
    capsys.readouterr()
    assert run.main(["inspect", f"--workdir={folder}", "--examples=8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith((folder / "inspect.md").read_text())
    assert (folder / "inspect.png").read_bytes()[1:4] == b"PNG"
    found = json.loads((folder / "inspect.json").read_text())
    seen = found["attention"]["decoder.self"]
    assert len(found["words"]) == len(seen["without"]) == 3
    assert all(len(words) == inspection.WORDS for words in found["words"])
    for slot in range(3):
        assert f"| {slot} | {np.asarray(seen['mass'])[..., slot].mean():.2%} |" in out
    assert f"loss {found['loss']:.4f} on 8 pairs of the validation split" in out
    assert any(repr(found["words"][2][0]) in line for line in out.splitlines() if line.startswith("| 2 |"))


def test_nothing_to_inspect_is_one_line(shipped, capsys):
    capsys.readouterr()
    assert run.main(["inspect", f"--workdir={shipped['lora']}"]) == 1
    assert "holds 'lora', which has no slots to inspect" in capsys.readouterr().err
    assert run.main(["inspect", f"--workdir={shipped['prompt']}", "--examples=none"]) == 1
    assert "--examples='none' must be a number" in capsys.readouterr().err

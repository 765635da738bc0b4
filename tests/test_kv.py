"""Plain keys and values: what is written is what attention reads, here and in transformers, and nothing else passes."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import L, P, V, close, letters, random_prefix, random_rows

import prefix_tuning
from experiments import kv_in_transformers
from prefix_tuning.errors import UserError
from prefix_tuning.interop import kv
from prefix_tuning.methods import METHODS
from prefix_tuning.registry import named
from prefix_tuning.types import KV, Adaptation, LayerHooks

FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "bart", "t5"])
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


def bound(model, frozen, name, **options):
    method = named("method", METHODS, {"name": name} | options, letters)
    return method.bind(frozen, method.init(jax.random.key(0), model, frozen))[1]


def slots_everywhere(model, *, shift=None, masked=()):
    """Random keys and values at every attention, with (layer, slot) or a whole layer of each left out."""
    rng, hooks = np.random.default_rng(4), {}
    for stack, own in model.sites.items():
        mask = np.ones((own.layers, P), bool)
        for place in masked:
            mask[place] = False
        kept = {}
        for site, heads in own.kv.items():
            k, v = mask[:, :, None, None] * rng.normal(size=(2, own.layers, P, *heads)).astype(np.float32)
            kept[site] = KV(k, v, mask if masked else None)
        hooks[stack] = LayerHooks(kv=kept)
    return Adaptation(**hooks, shift=shift)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def header(file):
    with safetensors.safe_open(file, "numpy") as tensors:
        return tensors.metadata()


@FAMILIES
@pytest.mark.parametrize("masked", [(), (1,), ((0, 2), 1)], ids=["whole", "a layer less", "and a slot less"])
def test_round_trip_is_bit_identical(twin, tmp_path, family, masked):
    _, _, model, frozen = twin(family)
    shift = None if model.is_encoder_decoder else np.int32(P)
    adaptation = slots_everywhere(model, shift=shift, masked=masked)
    kv.save(tmp_path / "new" / "folder", adaptation, model, frozen)
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "prefix.safetensors"):
        same(kv.load(path, model, frozen), adaptation)
        assert kv.recognise(path)


@BOTH
def test_the_file_is_what_its_description_says(twin, tmp_path, family):
    _, _, model, frozen = twin(family)
    adaptation = random_prefix(model, 3)
    kv.save(tmp_path, adaptation, model, frozen)
    own, tensors = adaptation.decoder.kv["self"], safetensors.numpy.load_file(tmp_path / "prefix.safetensors")
    assert tensors.keys() == {f"decoder.self.{i}.{part}" for i in range(L) for part in ("key", "value")}
    np.testing.assert_array_equal(tensors["decoder.self.1.value"], own.v[1])
    told = header(tmp_path / "prefix.safetensors")
    assert json.loads(told.pop("sites")) == {
        "decoder.self": {"shape": [P, *own.k.shape[2:]], "layers": [0, 1, 2], "masked": False}
    }
    assert len(told.pop("base_model_fingerprint")) == 32
    assert told == {
        "format": "prefix_tuning.kv",
        "version": "1",
        "dtype": "float32",
        "first_position": "5",
        "base_model_type": family,
    }


@BOTH
@pytest.mark.parametrize("kind", ["prefix", "prefix without shift", "prompt"])
def test_transformers_generates_the_same_text(twin, tmp_path, family, kind):
    """The example, on prompts of unequal lengths: a wrong position, mask or turn of the keys changes the text."""
    reference, _, model, frozen = twin(family)
    if kind == "prompt":
        adaptation = bound(model, frozen, "prompt", length=4, init="random", scale=2.0)
    else:
        adaptation = random_prefix(model, 2, shift=kind == "prefix")
    kv.save(tmp_path, adaptation, model, frozen)
    rows, options = random_rows(6, lengths=(4, 1, 7)), {"max_new_tokens": 9, "min_new_tokens": 9}
    for beams in (1, 2):
        ours = prefix_tuning.generate(model, frozen, adaptation, rows, end_tokens=(V - 1,), num_beams=beams, **options)
        theirs = kv_in_transformers.generate(
            reference,
            tmp_path / "prefix.safetensors",
            rows,
            pad=0,
            eos_token_id=V - 1,
            do_sample=False,
            num_beams=beams,
            **options,
        )
        assert theirs.tolist() == ours
        assert len({tuple(row) for row in ours}) > 1
        assert ours != prefix_tuning.generate(
            model, frozen, None, rows, end_tokens=(V - 1,), num_beams=beams, **options
        )


@BOTH
@pytest.mark.parametrize("name", ["prompt", "propagation", "prefix and prompt"])
def test_a_prompt_is_written_as_what_it_becomes(twin, tmp_path, family, name):
    _, _, model, frozen = twin(family)
    if name == "prefix and prompt":
        prompt = bound(model, frozen, "prompt", length=3, init="random").prompt
        adaptation = random_prefix(model, 0, length=2).replace(prompt=prompt, shift=jnp.int32(5))
    else:
        adaptation = bound(model, frozen, name, length=3)
    kv.save(tmp_path, adaptation, model, frozen)
    loaded, rows = kv.load(tmp_path, model, frozen), random_rows(5)
    assert loaded.prompt is None
    assert loaded.shift == adaptation.shift
    wanted = prefix_tuning.logits(model, frozen, adaptation, rows)
    close(prefix_tuning.logits(model, frozen, loaded, rows), wanted, 5e-6)


def test_a_prefix_of_bfloat16_stays_one(twin, tmp_path):
    _, _, model, frozen = twin("llama")
    exact = random_prefix(model, 0)
    half = exact.replace(decoder=jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), exact.decoder))
    kv.save(tmp_path, half, model, frozen)
    assert header(tmp_path / "prefix.safetensors")["dtype"] == "bfloat16"
    same(kv.load(tmp_path, model, frozen), half)


# --- What is refused


@pytest.mark.parametrize(
    ("adaptation", "message"),
    [
        (lambda m, f: Adaptation(), "this adaptation has neither"),
        (lambda m, f: slots_everywhere(m, masked=(0, 1, 2)), "this adaptation has neither"),
        (lambda m, f: bound(m, f, "lora", rank=2), "this adaptation has neither"),
        (lambda m, f: bound(m, f, "prefix", length=2, gates=True), "also has gates"),
        (lambda m, f: random_prefix(m, 0).replace(encoder=LayerHooks(bias={})), "what another method trained"),
        (
            lambda m, f: random_prefix(m, 0).replace(
                decoder=bound(m, f, "lora", rank=2).decoder.replace(kv=random_prefix(m, 0).decoder.kv)
            ),
            "what another method trained",
        ),
        (lambda m, f: random_prefix(m, 0).replace(rows=np.zeros((2, 16))), "tokens of its own among the real ones"),
        (lambda m, f: random_prefix(m, 0, rows=2), "some for each row"),
        (lambda m, f: random_prefix(m, 0).replace(shift=np.array([1, 2])), "some for each row"),
        (lambda m, f: Adaptation(prompt=np.zeros((2, P, 16), np.float32)), "some for each row"),
    ],
)
def test_what_keys_and_values_cannot_express_is_refused(twin, tmp_path, adaptation, message):
    _, _, model, frozen = twin("llama")
    with pytest.raises(UserError, match=message):
        kv.save(tmp_path / "refused", adaptation(model, frozen), model, frozen)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_prompt_in_an_encoder_is_refused(twin, tmp_path, family):
    _, _, model, frozen = twin(family)
    with pytest.raises(UserError, match="rows of a prompt in an encoder change with the text"):
        kv.save(tmp_path, bound(model, frozen, "prompt", length=3), model, frozen)


def test_another_base_is_refused(twin, tmp_path):
    _, _, model, frozen = twin("llama")
    kv.save(tmp_path, random_prefix(model, 0), model, frozen)
    with pytest.raises(UserError, match="belongs to a base model of fingerprint"):
        kv.load(tmp_path, model, frozen | {"embedding": frozen["embedding"] + 1})
    _, _, other, weights = twin("gpt2")
    with pytest.raises(UserError, match="belongs to a base model of type llama; this one has type gpt2"):
        kv.load(tmp_path, other, weights)


def test_a_base_of_other_sizes_is_refused(twin, tmp_path):
    """Also where nothing tells the weights apart, as in float16."""
    _, _, small, _ = twin("llama")
    for options, message in (
        ({"head_dim": 4}, r"holds decoder.self.0.key \[5, 2, 4\] F32; expected \[5, 2, 6\]"),
        ({"num_hidden_layers": 4}, r"holds decoder.self.3.key .*no such tensor for this model"),
    ):
        _, _, model, _ = twin("llama", **options)
        kv.save(tmp_path, random_prefix(model, 0), model, {})
        with pytest.raises(UserError, match=message):
            kv.load(tmp_path, small, None)


def rewritten(folder, target, change):
    """The file of a folder with its tensors and metadata changed in place."""
    tensors, told = safetensors.numpy.load_file(folder / "prefix.safetensors"), header(folder / "prefix.safetensors")
    change(tensors, told)
    safetensors.numpy.save_file(tensors, target, told)
    return target


def sites(told, **change):
    own = json.loads(told["sites"])
    own["decoder.self"] |= change
    told["sites"] = json.dumps(own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(version="2"), "has version '2'; expected '1'"),
        (lambda t, m: m.update(format="pt"), "has format 'pt'; expected 'prefix_tuning.kv'"),
        (lambda t, m: m.clear(), "has format None"),
        (lambda t, m: m.pop("sites"), "damaged metadata"),
        (lambda t, m: m.update(sites="[]"), "damaged metadata"),
        (lambda t, m: m.update(sites="{}"), "damaged metadata"),
        (lambda t, m: m.update(sites='{"decoder.self": {"shape": []}}'), "damaged metadata"),
        (lambda t, m: m.update(first_position="six"), "damaged metadata"),
        (lambda t, m: m.update(first_position="6"), "damaged metadata"),
        (lambda t, m: m.update(first_position="-1"), "damaged metadata"),
        (lambda t, m: sites(m, shape=[0, 2, 6]), "damaged metadata"),
        (lambda t, m: sites(m, shape=[10**12, 2, 6]), r"\[5, 2, 6\] F32; expected \[1000000000000, 2, 6\]"),
        (lambda t, m: sites(m, layers=[]), "expected no such tensor"),
        (lambda t, m: (t.clear(), sites(m, layers=[], shape=[10**12, 2, 6])), "lacks keys and values"),
        (lambda t, m: m.update(sites=m["sites"].replace("self", "cross")), "'decoder.cross'; valid: decoder.self"),
        (lambda t, m: t.pop("decoder.self.1.value"), "lacks decoder.self.1.value"),
        (lambda t, m: sites(m, masked=True), r"lacks decoder.self.0.mask, decoder.self.1.mask"),
        (lambda t, m: t.update({"more": np.zeros(3)}), "holds more .*no such tensor"),
        (lambda t, m: t.update({"decoder.self.1.key": np.zeros((1, 2, 6), np.float32)}), r"\[1, 2, 6\] F32; expected"),
        (lambda t, m: t.update({"decoder.self.1.key": np.zeros((5, 2, 6), np.int32)}), "I32; expected .*F32 or BF16"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(twin, tmp_path, change, message):
    _, _, model, frozen = twin("llama")
    kv.save(tmp_path, random_prefix(model, 0), model, frozen)
    file = rewritten(tmp_path, tmp_path / "other.safetensors", change)
    with pytest.raises(UserError, match=message) as caught:
        kv.load(file, model, frozen)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_what_is_no_whole_file_is_refused(twin, tmp_path):
    _, _, model, frozen = twin("llama")
    kv.save(tmp_path, random_prefix(model, 0), model, frozen)
    content = (tmp_path / "prefix.safetensors").read_bytes()
    absurd = json.dumps({"decoder.self.0.key": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for number, given in enumerate((b"", content[:200], content[:-4], struct.pack("<Q", len(absurd)) + absurd)):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(given)
        assert not kv.recognise(file)
        with pytest.raises(UserError, match="is not a readable safetensors file"):
            kv.load(file, model, frozen)
    for missing in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert not kv.recognise(missing)
        with pytest.raises(UserError, match="is not a readable safetensors file"):
            kv.load(missing, model, frozen)


def test_an_unwritable_folder_is_refused(twin, tmp_path):
    _, _, model, frozen = twin("llama")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the prefix to"):
        kv.save(tmp_path / "file", random_prefix(model, 0), model, frozen)

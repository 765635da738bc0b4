"""The frozen models: transformers' logits, layouts of tokens that must not matter, and what the loader refuses."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import (
    FAMILIES,
    FULL,
    SLIDING,
    F,
    L,
    P,
    T,
    V,
    batch_logits,
    close,
    one_a_row,
    packed,
    random_prefix,
    random_reference,
    random_rows,
    reference_logits,
)

import prefix_tuning
from prefix_tuning import attention, models, nn
from prefix_tuning.errors import UserError
from prefix_tuning.models import loading
from prefix_tuning.types import KV, Adaptation, Adapter, LayerHooks, count

MODELS = Path(os.environ.get("PREFIX_TUNING_MODELS", Path(__file__).parents[2] / "models"))
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 60,  # puts one of the three frequencies in each of the three bands
}
PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.7}  # 4 of the 6 numbers of a head
WINDOWS = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}
VARIANTS = {
    "gpt2": ("gpt2", {}),
    "gpt2 of usual width": ("gpt2", {"n_inner": None, "activation_function": "gelu", "layer_norm_epsilon": 0.1}),
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 0.1, "hidden_act": "gelu_pytorch_tanh"}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama of usual heads": ("llama", {"head_dim": None, "num_key_value_heads": 8}),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox one after the other": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "mistral": ("mistral", {}),
    "mistral without a window": ("mistral", {"sliding_window": None, "head_dim": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {**WINDOWS, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 with windows": ("qwen3", {**WINDOWS, "attention_bias": True, "layer_types": [FULL, SLIDING, FULL]}),
    "phi3": ("phi3", {}),
    "phi3 partly turned": ("phi3", {"sliding_window": None, "rope_parameters": PARTIAL}),
    "gemma2": ("gemma2", {}),
    "gemma2 of usual layers": ("gemma2", {"layer_types": None, "attn_logit_softcapping": None, "attention_bias": True}),
    "gemma3_text": ("gemma3_text", {}),
    "gemma3_text capped": ("gemma3_text", {"final_logit_softcapping": 3.0, "tie_word_embeddings": False}),
}

# The families whose layers differ in code, and not only in their weights.
LAYERS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3_text")


def edited(folder, target, tensors=None, **entries):
    """A copy of a model's folder with other entries in config.json (None removes) and other tensors."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text()) | entries
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if tensors is not None:
        safetensors.numpy.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def stored(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def load(folder, dtype="float32"):
    model = models.build(loading.read_config(folder))
    return model, loading.load_weights(folder, model, dtype)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- Logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(twin, variant):
    family, options = VARIANTS[variant]
    reference, _, model, frozen = twin(family, **options)
    rows = random_rows(1)
    ours = prefix_tuning.logits(model, frozen, None, rows)
    assert [x.shape for x in ours] == [(len(row), V) for row in rows]
    assert {x.dtype for x in ours} == {np.dtype("float32")}
    close(ours, reference_logits(reference, rows))
    close(ours, reference_logits(reference, rows, left=True))
    # transformers' own implementation of the layers and not only of the attention
    assert count(model.specs) == sum(weight.numel() for weight in reference.parameters())


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 31.0},
        {"rope_theta": 31.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
        {"rope_theta": 31.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    ],
    ids=["default", "linear", "llama3"],
)
def test_rotary_entries_of_older_configs(twin, tmp_path, old):
    folder = edited(twin("llama").folder, tmp_path / "old", rope_parameters=None, **old)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = nn.rotary_frequencies(loading.read_config(folder), 6)
    np.testing.assert_allclose(ours, reference.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert not np.allclose(ours, twin("llama").reference.model.rotary_emb.inv_freq.numpy())
    model, frozen = load(folder)
    close(prefix_tuning.logits(model, frozen, None, [[3, 1, 4, 1, 5]]), reference_logits(reference, [[3, 1, 4, 1, 5]]))


@pytest.mark.parametrize(
    ("family", "older"),
    [
        ("gemma2", {"rope_theta": 31.0}),
        ("gemma3_text", {"sliding_window_pattern": 2, "rope_theta": 31.0, "rope_local_base_freq": 5.0}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("qwen2", WINDOWS),
        ("phi3", {"partial_rotary_factor": 0.7}),
        ("gpt_neox", {"rotary_pct": 0.4, "rotary_emb_base": 31.0}),
    ],
    ids=str,
)
def test_older_configs_of_relatives(twin, tmp_path, family, older):
    folder = edited(twin(family).folder, tmp_path / "old", rope_parameters=None, layer_types=None, **older)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ours = prefix_tuning.logits(*load(folder), None, [[3, 1, 4, 1, 5]])
    close(ours, reference_logits(reference, [[3, 1, 4, 1, 5]]))
    assert np.abs(ours[0] - reference_logits(twin(family).reference, [[3, 1, 4, 1, 5]])[0]).max() > 0.01


def test_llama3_scaling_has_a_frequency_in_each_band():
    scaled = nn.rotary_frequencies({"rope_parameters": LLAMA3}, 6)
    plain = nn.rotary_frequencies({"rope_theta": 100.0}, 6)
    shares = np.asarray(scaled / plain)
    assert shares[0] == 1.0
    assert 1 / 8 < shares[1] < 1
    np.testing.assert_allclose(shares[2], 1 / 8, rtol=1e-6)


@pytest.mark.parametrize("family", LAYERS)
def test_packed_is_unpacked(twin, family):
    _, _, model, frozen = twin(family)
    rows, chosen = random_rows(2), (2, 3, 6, 5)  # all rows are read below, for which the full pass is compiled already
    one, two, three, four = (rows[b] for b in chosen)
    assert [len(rows[b]) for b in chosen] == [4, 2, 5, 3]
    batch = packed([[(one, [1]), (two, [2])], [(three, [3]), (four, [4])]], length=9, targets=2)
    logits = batch_logits(model, frozen, Adaptation(), batch)
    ours = [logits[0, :4], logits[0, 4:6], logits[1, :5], logits[1, 5:8]]
    wanted = prefix_tuning.logits(model, frozen, None, rows)
    close(ours, [wanted[b] for b in chosen], 2e-6)


@pytest.mark.parametrize("family", LAYERS)
def test_padding_and_later_tokens_do_not_matter(twin, family):
    _, _, model, frozen = twin(family)
    rows = random_rows(1)
    batch = one_a_row([(row, [1]) for row in rows], length=T)
    before = batch_logits(model, frozen, Adaptation(), batch)
    real = np.arange(T) < np.array([min(len(row), 4) for row in rows])[:, None]
    noise = np.random.default_rng(0).integers(0, V, batch.tokens.shape)
    after = batch_logits(model, frozen, Adaptation(), batch.replace(tokens=np.where(real, batch.tokens, noise)))
    np.testing.assert_array_equal(before[real], after[real])
    assert not np.allclose(before, after)


@pytest.mark.parametrize("family", LAYERS)
def test_scan_is_loop(twin, family):
    _, _, model, frozen = twin(family)
    loop = models.build(model.config, scan=False)
    adaptation, batch = random_prefix(model, 0), one_a_row([(row, [1]) for row in random_rows(3)])
    np.testing.assert_allclose(
        batch_logits(loop, frozen, adaptation, batch), batch_logits(model, frozen, adaptation, batch), atol=2e-6
    )
    text = str(jax.make_jaxpr(loop.hidden)(frozen, adaptation, batch))
    assert f"unroll={L}" in text or "scan" not in text


@pytest.mark.parametrize("how", ["layers rematerialised", "attention in parts"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_what_is_computed_again_gives_the_same_gradients_in_less_memory(monkeypatch, family, how):
    config = {"model_type": family, "vocab_size": V} | {
        "gpt2": {"n_embd": 12, "n_head": 2, "n_layer": 6, "n_positions": 64},
        "llama": {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": F}
        | {"num_hidden_layers": 6, "max_position_embeddings": 64},
        "bert": {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 6, "intermediate_size": F}
        | {"max_position_embeddings": 64, "type_vocab_size": 2},
    }[family]
    kept, again = (models.build(config, remat=remat) for remat in (False, how == "layers rematerialised"))
    frozen = loading.initialise(jax.random.key(0), kept)
    kv = KV(*np.random.default_rng(0).normal(size=(2, 6, P, 2, 6)).astype(np.float32))
    batch = one_a_row([([1] * 40, [2] * 8)] * 4)
    found = {}
    for name, model in (("kept", kept), ("again", again)):

        def loss(kv, frozen, batch, model=model):
            adaptation = Adaptation(**{model.entry: LayerHooks(kv={"self": kv})})
            return jnp.square(model.hidden(frozen, adaptation, batch)).sum()

        if name == "again" and how == "attention in parts":
            monkeypatch.setattr(attention, "QUERIES", 12)
            monkeypatch.setattr(attention, "SCORES", 0)
        gradient = jax.jit(jax.grad(loss)).lower(kv, frozen, batch).compile()
        found[name] = gradient(kv, frozen, batch), gradient.memory_analysis().temp_size_in_bytes
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found["again"][0], found["kept"][0]
    )
    assert found["again"][1] < 0.75 * found["kept"][1]


@pytest.mark.parametrize(("family", "prefixed"), [*((family, True) for family in LAYERS), ("llama", False)])
def test_cache_is_no_cache(twin, family, prefixed):
    _, _, model, frozen = twin(family)
    adaptation = random_prefix(model, 1) if prefixed else Adaptation()
    rows, prompts = random_rows(4, lengths=(7, 5, 6)), (3, 1, 2)
    whole = prefix_tuning.logits(model, frozen, adaptation, rows)
    tokens = np.array([row[:n] + [0] * (3 - n) for row, n in zip(rows, prompts, strict=True)])
    prefill, decode = jax.jit(model.prefill, static_argnums=4), jax.jit(model.decode)
    logits, cache = prefill(frozen, adaptation, tokens, np.array(prompts), 4)
    # Gemma's hidden states are large with weights as random as these: rounding alone is 7e-6 on some processors.
    tolerance = 2e-5 if family.startswith("gemma") else 5e-6
    for step in range(5):
        close([*np.asarray(logits)], [x[n - 1 + step] for x, n in zip(whole, prompts, strict=True)], tolerance)
        if step < 4:
            fed = np.array([row[n + step] for row, n in zip(rows, prompts, strict=True)])
            logits, cache = decode(frozen, adaptation, cache, fed[:, None])
            logits = logits[:, 0]
    assert (cache.position + cache.written).tolist() == [7, 5, 6]


@pytest.mark.parametrize("family", LAYERS)
def test_bfloat16_is_near(twin, tmp_path, family):
    _, folder, model, frozen = twin(family)
    rows = random_rows(1)
    whole = prefix_tuning.logits(model, frozen, None, rows)
    _, half = load(folder, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    rough = prefix_tuning.logits(model, half, None, rows)
    assert {x.dtype for x in rough} == {np.dtype("float32")}
    reference = random_reference(family).to(torch.bfloat16)
    with torch.no_grad():
        theirs = [reference(torch.tensor([row])).logits[0].float().numpy() for row in rows]
    error, usual = (max(np.abs(a - b).max() for a, b in zip(whole, x, strict=True)) for x in (rough, theirs))
    # Gemma's are large with weights as random as these, in transformers too.
    assert 1e-4 < error < min(1.5 * usual, 0.1 * max(np.abs(x).max() for x in whole))

    reference.save_pretrained(tmp_path)  # and from a file that holds bfloat16
    same(load(tmp_path, "bfloat16")[1], half)
    same(load(tmp_path, "float32")[1], jax.tree.map(lambda x: x.astype(np.float32), half))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_what_an_adapter_gives_reaches_the_residual_stream_as_it_is(twin, family, site):
    # Each adds its bias and nothing else, so behind the attention and behind the MLP is the same as behind the block.
    _, _, model, frozen = twin(family, num_hidden_layers=1, layer_types=[FULL] if family == "gemma2" else None)
    added = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
    adapter = Adapter(np.zeros((1, 16, 2)), np.zeros((1, 2)), np.zeros((1, 2, 16)), added)
    if site == "attention":  # what the MLP reads must not change
        frozen = frozen | {"layers": frozen["layers"] | {"down": {"kernel": 0 * frozen["layers"]["down"]["kernel"]}}}
    ours, wanted = (
        prefix_tuning.logits(model, frozen, Adaptation(LayerHooks(adapter={where: adapter})), random_rows(1))
        for where in (site, "block")
    )
    close(ours, wanted)
    assert np.abs(ours[0] - prefix_tuning.logits(model, frozen, None, random_rows(1))[0]).max() > 0.01


def test_fresh_weights_are_as_the_specs_say(twin):
    model = twin("llama", attention_bias=True, mlp_bias=True).model
    fresh = jax.jit(lambda key: loading.initialise(key, model))(jax.random.key(1))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, loading.abstract(model))
    assert (fresh["norm"] == 1).all()
    assert not fresh["layers"]["q"]["bias"].any()
    assert 0.018 < fresh["layers"]["q"]["kernel"].std() < 0.022
    assert not np.allclose(fresh["layers"]["k"]["kernel"], fresh["layers"]["v"]["kernel"])


def test_generated_rows_end_before_the_end_token_that_is_asked_for(twin):
    _, _, model, frozen = twin("llama")
    free = prefix_tuning.generate(model, frozen, None, [[1, 2, 3]], max_new_tokens=6, end_tokens=(), pad_token=0)[0]
    assert len(free) == 6
    end = free[3]
    ours = prefix_tuning.generate(
        model, frozen, None, [[1, 2, 3]], max_new_tokens=6, end_tokens=(end,), pad_token=V - 1
    )
    assert ours == [free[: free.index(end)]]


# --- Folders that are read


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_several_files(twin, tmp_path, family):
    _, folder, _, frozen = twin(family)
    tensors = stored(folder)
    target = edited(folder, tmp_path / "several")
    (target / "model.safetensors").unlink()
    for part in range(3):
        some = {name: tensors[name] for name in sorted(tensors)[part::3]}
        safetensors.numpy.save_file(some, target / f"model-{part + 1:05}-of-00003.safetensors")
    same(load(target)[1], jax.tree.map(np.asarray, frozen))


def test_gpt2_as_the_hub_has_it(twin, tmp_path):
    _, folder, _, frozen = twin("gpt2")
    tensors = {name.removeprefix("transformer."): x for name, x in stored(folder).items()}
    assert "h.0.attn.c_attn.weight" in tensors
    for layer in range(L):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.float32))
        tensors[f"h.{layer}.attn.masked_bias"] = np.float32([-1e4])
    target = edited(folder, tmp_path / "hub", tensors)
    same(load(target)[1], jax.tree.map(np.asarray, frozen))


@pytest.mark.parametrize("variant", ["llama tied", "llama with biases", *FAMILIES])
def test_saved_as_transformers_saves(twin, tmp_path, variant):
    family, options = VARIANTS[variant]
    reference, folder, model, frozen = twin(family, **options)
    loading.save_pretrained(tmp_path / "ours", model, frozen)
    same(load(tmp_path / "ours")[1], jax.tree.map(np.asarray, frozen))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    weights = reference.state_dict()
    assert theirs.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in theirs.state_dict().items())
    kept = stored(tmp_path / "ours")
    assert kept.keys() == stored(folder).keys()


# --- Folders that are refused


def test_missing_unexpected_and_misshapen_are_listed(twin, tmp_path):
    folder = twin("llama").folder
    tensors = stored(folder)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        del tensors[name]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((F, 16), np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    down = "model.layers.2.mlp.down_proj.weight"
    tensors[down] = np.ascontiguousarray(tensors[down].T)
    with pytest.raises(UserError) as raised:
        load(edited(folder, tmp_path / "strict", tensors))
    message = str(raised.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "2 unexpected: model.layers.0.self_attn.q_proj.bias, model.layers.3.mlp.up_proj.weight" in message
    assert f"2 misshapen: lm_head.weight [12, 16] instead of [13, 16], {down} [11, 16] instead of [16, 11]" in message
    assert "\n" not in message


def test_gpt2_reports_missing_layers(twin, tmp_path):
    folder = twin("gpt2").folder
    with pytest.raises(UserError, match=r"12 missing: transformer\.h\.3\.attn\.c_attn\.bias.*\.\.\."):
        load(edited(folder, tmp_path / "deeper", n_layer=4))
    with pytest.raises(UserError, match=r"12 unexpected: transformer\.h\.2\."):
        load(edited(folder, tmp_path / "shallower", n_layer=2))


def test_pickled_weights_are_refused(twin, tmp_path):
    target = edited(twin("gpt2").folder, tmp_path / "pickled")
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors; pickled weights \(pytorch_model\.bin\) are refused"):
        load(target)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"auto_map": {"AutoModel": "m.py"}}, r"remote code \(auto_map\), which is refused; supported: gpt2, "),
        ({"model_type": "mamba"}, f"unknown model_type 'mamba'; valid: {', '.join(sorted(models.MODELS))}"),
        ({"model_type": None}, "unknown model_type None; valid: "),
        ({"vocab_size": None}, "config.json of a llama model lacks 'vocab_size'"),
        ({"hidden_act": "quick_gelu"}, "unknown hidden_act 'quick_gelu'; valid: gelu, gelu_new"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "unknown rope_type 'yarn'; valid: default, linear"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "unknown rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'original_max_position_embeddings'"),
    ],
)
def test_configs_of_llama_that_are_refused(twin, tmp_path, entries, message):
    with pytest.raises(UserError, match=message):
        load(edited(twin("llama").folder, tmp_path / "refused", **entries))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"activation_function": "swish"}, "unknown activation_function 'swish'; valid: gelu, gelu_new"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported; expected True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_positions": None}, "config.json of a gpt2 model lacks 'n_positions'"),
    ],
)
def test_configs_of_gpt2_that_are_refused(twin, tmp_path, entries, message):
    with pytest.raises(UserError, match=message):
        load(edited(twin("gpt2").folder, tmp_path / "refused", **entries))


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        ("mistral", {"sliding_window": 0}, "layers of sliding_attention and sliding_window 0; expected at least 1"),
        ("mistral", {"layer_types": [FULL] * L}, "mistral with layer_types is not supported"),
        ("qwen2", {"layer_types": [SLIDING] * L}, "layers of sliding_attention and sliding_window None"),
        ("qwen3", {"layer_types": [FULL]}, "layer_types of config.json has 1 entries; expected one for each of 3"),
        ("qwen3", {"layer_types": ["linear_attention"] * L}, "unknown entry of layer_types 'linear_attention'; valid"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "unknown rope_type 'longrope'; valid: default"),
        ("gemma2", {"use_bidirectional_attention": True}, "gemma2 with use_bidirectional_attention=true"),
        ("gemma2", {"query_pre_attn_scalar": None}, "config.json of a gemma2 model lacks 'query_pre_attn_scalar'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "gemma3_text with attn_logit_softcapping=50.0 is not"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 9.0}}, "unknown entry of rope_parameters 'rope_theta'"),
    ],
)
def test_configs_of_relatives_that_are_refused(twin, tmp_path, family, entries, message):
    with pytest.raises(UserError, match=message):
        load(edited(twin(family).folder, tmp_path / "refused", **entries))


@pytest.mark.parametrize("text", ['{"model_type": "gpt2",', "", "\xff\xfe", "[]", '"gpt2"', "null"])
def test_config_that_is_no_json_object(twin, tmp_path, text):
    target = edited(twin("gpt2").folder, tmp_path / "broken")
    (target / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        load(target)


def test_folder_without_config(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json; expected a folder in Hugging Face layout"):
        prefix_tuning.load_model(str(tmp_path))
    with pytest.raises(UserError, match="is no folder, and no name on the hub"):
        prefix_tuning.load_model(str(tmp_path / "nothing"))


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_truncated_weights(twin, tmp_path, keep):
    target = edited(twin("gpt2").folder, tmp_path / "cut")
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is not a readable safetensors file"):
        load(target)


def test_unknown_dtype(twin):
    with pytest.raises(UserError, match="unknown dtype 'int8'; valid: bfloat16, float16, float32"):
        load(twin("gpt2").folder, "int8")


# --- Real weights

# Records 100, 900, 2500 and 4000 of the validation split of E2E, as the prefix-tuning authors released it.
RECORDS = (
    "name : Alimentum | area : riverside | family friendly : yes | near : Burger King\n",
    "name : Cocum | Type : coffee shop | food : English | price : high | customer rating : 1 out of 5 | "
    "family friendly : no\n",
    "name : The Eagle | Type : coffee shop | food : Chinese | price : cheap | customer rating : 5 out of 5 | "
    "area : riverside | family friendly : yes | near : Burger King\n",
    "name : The Wrestlers | customer rating : 5 out of 5 | family friendly : yes\n",
)


def test_smollm2_equals_transformers():
    folder = MODELS / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no weights at {folder}; PREFIX_TUNING_MODELS may name the folder that has SmolLM2-135M-Instruct")
    model, frozen, tokenizer = prefix_tuning.load_model(str(folder))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = tokenizer(list(RECORDS)).input_ids
    ours = prefix_tuning.logits(model, frozen, None, rows)
    alone = [prefix_tuning.logits(model, frozen, None, [row])[0] for row in rows]
    theirs = [reference_logits(reference, [row])[0] for row in rows]
    for name, one, other in (
        ("padded", ours, reference_logits(reference, rows)),
        ("padded on the left there", ours, reference_logits(reference, rows, left=True)),
        ("without padding", alone, theirs),
    ):
        difference = max(np.abs(a - b).max() for a, b in zip(one, other, strict=True))
        print(f"SmolLM2, {name}: the largest difference of a logit is {difference:.1e}")
        assert difference < 2e-3
    assert np.abs(ours[0]).max() > 10

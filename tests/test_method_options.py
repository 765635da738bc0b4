"""What the options of each method beside prefix tuning do, and what each refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import L, P, V, close, letters, random_rows

import prefix_tuning
from prefix_tuning import setup
from prefix_tuning.errors import UserError
from prefix_tuning.methods import METHODS, compose, finetune, lora, prompt, ptuning
from prefix_tuning.registry import named
from prefix_tuning.types import Adaptation, Batch, count, joined

BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])
KEY = jax.random.key(0)


def make(name, **options):
    return named("method", METHODS, {"name": name} | options, letters)


# --- Prompt tuning


@BOTH
def test_prompt_of_a_text_is_that_text_in_context(twin, family):
    _, _, model, frozen = twin(family)
    method = make("prompt", length=None, init="text", text="dabec")
    trainable = method.init(KEY, model, frozen)
    rows = random_rows(5)
    ours = prefix_tuning.logits(model, *method.bind(frozen, trainable), rows)
    whole = prefix_tuning.logits(model, frozen, None, [[3, 0, 1, 4, 2, *row] for row in rows])
    close(ours, [logits[P:] for logits in whole], 5e-6)


def test_prompt_starts_where_it_is_told(twin):
    _, _, model, frozen = twin("llama")
    table = np.asarray(frozen["embedding"])
    start = lambda **options: np.asarray(make("prompt", **options).init(KEY, model, frozen)["rows"])  # noqa: E731
    uniform = start(length=200, init="random", scale=0.3)
    assert 0.28 < np.abs(uniform).max() <= 0.3
    assert abs(uniform.std() - 0.3 / 3**0.5) < 0.01
    assert 0.48 < np.abs(start(length=200, init="random")).max() <= 0.5
    # four rows of the first four tokens: all of them, since none comes twice while there are others
    few = start(length=4, population=4)
    assert sorted(int(np.abs(table - row).sum(1).argmin()) for row in few) == [0, 1, 2, 3]
    np.testing.assert_allclose(np.sort(few, axis=0), np.sort(table[:4], axis=0))
    labels = start(length=P, init="labels", labels=("da", "bec"), population=2)
    np.testing.assert_allclose(labels[0], table[[3, 0]].mean(0), rtol=1e-6)
    np.testing.assert_allclose(labels[1], table[[1, 4, 2]].mean(0), rtol=1e-6)
    for row in labels[2:]:
        assert np.abs(table[:2] - row).sum(1).min() == 0
    repeated = start(length=7, init="text", text="dab")
    np.testing.assert_array_equal(repeated, table[[3, 0, 1, 3, 0, 1, 3]])


def test_vocabulary_leaves_special_tokens_out(twin):
    _, _, model, _ = twin("llama")

    class Special:
        all_special_ids = (0, 2)

    assert prompt.rows.frequent(Special(), model, 3).tolist() == [1, 3, 4]
    assert len(prompt.rows.frequent(letters, model, 99)) == V


def test_embedding_only_prompt_is_the_papers_mlp(twin):
    """EMB-P of Li & Liang: embeddings of width D, a tanh MLP of width M, back to D; only the rows are kept."""
    _, _, model, frozen = twin("gpt2")
    method = make("prompt", length=P, init="random", reparametrisation=9)
    trainable = method.init(KEY, model, frozen)
    slots, down, up = (jax.device_get(trainable)[name] for name in ("slots", "down", "up"))
    rows = np.tanh(slots @ down["kernel"] + down["bias"]) @ up["kernel"] + up["bias"]
    np.testing.assert_allclose(method.bind(frozen, trainable)[1].prompt, rows, atol=1e-6)
    assert setup.parameter_counts(method, model)["stored"] == P * 10


# --- P-tuning


def test_lstm_is_torchs(twin):
    """Two bidirectional layers and an MLP, as in the authors' LAMA code; gates against torch.nn.LSTM."""
    import torch

    _, _, model, frozen = twin("llama")
    D, M = model.sites["decoder"].width, 5
    method = make("ptuning", length=P, hidden=M)
    trainable = jax.device_get(method.init(KEY, model, frozen))
    reference = torch.nn.LSTM(D, M, num_layers=2, bidirectional=True)
    with torch.no_grad():
        for layer in range(2):
            for name, suffix in (("forward", ""), ("backward", "_reverse")):
                cell = trainable[f"{name}_{layer}"]
                weight = np.concatenate([cell[f"i{g}"]["kernel"].T for g in "ifgo"])
                hidden = np.concatenate([cell[f"h{g}"]["kernel"].T for g in "ifgo"])
                bias = np.concatenate([cell[f"h{g}"]["bias"] for g in "ifgo"])
                for kind, value in (("weight_ih", weight), ("weight_hh", hidden), ("bias_ih", bias)):
                    getattr(reference, f"{kind}_l{layer}{suffix}").copy_(torch.tensor(value))
                getattr(reference, f"bias_hh_l{layer}{suffix}").zero_()
        x = reference(torch.tensor(trainable["slots"])[:, None])[0][:, 0].numpy()
    hidden = np.maximum(x @ trainable["down"]["kernel"] + trainable["down"]["bias"], 0)
    rows = hidden @ trainable["up"]["kernel"] + trainable["up"]["bias"]
    np.testing.assert_allclose(method.bind(frozen, trainable)[1].prompt, rows, atol=1e-5)


def test_rows_go_where_the_template_has_them(twin):
    _, _, model, frozen = twin("gpt2")
    method = make("ptuning", length=P, network="mlp", template="{rows:2}{prompt}{rows:3}")
    assert method.template == "{prompt}{rows:3}"
    trainable = method.init(KEY, model, frozen)
    rows = method.stored(frozen, trainable)["rows"]
    adaptation = method.bind(frozen, trainable)[1]
    np.testing.assert_array_equal(adaptation.prompt, rows[:2])
    np.testing.assert_array_equal(adaptation.rows, rows[2:])
    assert int(adaptation.shift) == 2
    assert make("ptuning", length=P).template == "{prompt}"
    assert make("ptuning", length=P, template="{source} is{rows:5}").template == "{source} is{rows:5}"
    mlp = make("ptuning", length=P, network="mlp", hidden=3).init(KEY, model, frozen)
    assert mlp["down"]["kernel"].shape == (10, 3)
    assert make("ptuning", length=P).init(KEY, model, frozen)["down"]["kernel"].shape == (10, 10)  # two of D/2


# --- Infix, propagation, memory


def test_scales_and_features_are_those_that_are_asked_for(twin):
    _, _, model, frozen = twin("llama")
    for name, leaf in (("infix", "rows"), ("propagation", "decoder")):
        for scale in (0.3, 2.0):
            start = make(name, length=60, scale=scale).init(KEY, model, frozen)[leaf]
            assert abs(np.std(start) / scale - 1) < 0.1
            assert abs(np.mean(start)) < 0.1 * scale
    for feature in ("elu", "gelu"):
        method = make("memory", feature=feature)
        memory = method.bind(frozen, method.init(KEY, model, frozen))[1].decoder.memory["self"]
        assert memory.feature == feature
        assert memory.m.shape == (L, 2, 4, 6, 6)


def test_infix_slots_are_behind_the_prompt_and_get_keys_and_values(twin):
    _, _, model, frozen = twin("gpt2")
    method = make("infix", length=P)
    trainable = method.init(KEY, model, frozen)
    assert method.template == "{prompt}{rows:5}"
    added = trainable["added"]["decoder"]
    assert not np.any(added["k"])
    added["v"] = added["v"] + 1
    row = [1, 2, 3, *range(V, V + P), 4]
    before = prefix_tuning.logits(model, *method.bind(frozen, method.init(KEY, model, frozen)), [row])[0]
    after = prefix_tuning.logits(model, *method.bind(frozen, trainable), [row])[0]
    np.testing.assert_array_equal(before[:3], after[:3])  # the source never sees the slots
    assert np.abs(before[3:] - after[3:]).max() > 1e-3
    mlp = make("infix", length=P, reparametrisation=9)
    start = mlp.init(KEY, model, frozen)
    slots, down, up = (jax.device_get(start["added"]["decoder"])[name] for name in ("slots", "down", "up"))
    table = np.tanh(slots @ down["kernel"] + down["bias"]) @ up["kernel"].reshape(9, -1) + up["bias"].reshape(-1)
    added = mlp.bind(frozen, start)[1].decoder.rows["self"]
    np.testing.assert_allclose(added.v[1], table.reshape(P, L, 2, 2, 5)[:, 1, 1], atol=1e-6)


# --- LoRA


@BOTH
def test_targets_by_our_name_theirs_and_patterns(twin, family):
    model = twin(family).model
    sites = lambda *patterns: [site for _, site in lora.targets(model, patterns)]  # noqa: E731
    assert sites("q", "v") == ["q", "v"]
    if family == "llama":
        assert sites("q_proj") == ["q"]
        assert sites("*_proj") == sites("all-linear") == ["q", "k", "v", "o", "gate", "up", "down"]
        assert sites("[kv]", "q") == ["k", "v", "q"]
    else:
        assert sites("c_attn") == ["qkv"]
        assert sites("c_proj") == ["o", "down"]
        assert sites("*") == sites("all-linear") == ["qkv", "o", "up", "down"]  # a part only by its own name
    with pytest.raises(UserError, match=r"'w_proj' names nothing here; valid: .*o.*, all-linear"):
        lora.targets(model, ("q", "w_proj"))


def test_scale_is_alpha_over_rank_or_its_root(twin):
    _, _, model, frozen = twin("llama")
    for options, scale in (({}, 1.0), ({"alpha": 12.0}, 3.0), ({"alpha": 12.0, "rslora": True}, 6.0)):
        method = make("lora", rank=4, **options)
        delta = method.bind(frozen, method.init(KEY, model, frozen))[1].decoder.delta
        assert {site: d.scale for site, d in delta.items()} == {"q": scale, "v": scale}
        bound = model.sites["decoder"].width ** -0.5
        assert 0.8 * bound < np.abs(delta["q"].a).max() <= bound
        assert (np.asarray(delta["q"].b) == 0).all()


def test_lora_dropout_draws_for_every_site_and_layer(twin):
    _, _, model, frozen = twin("llama")
    method = make("lora", rank=2, dropout=0.3)
    trainable = method.init(KEY, model, frozen)
    delta = method.bind(frozen, trainable, key=KEY)[1].decoder.delta
    keys = np.concatenate([jax.random.key_data(d.keys) for d in delta.values()])
    assert len({tuple(key) for key in keys.tolist()}) == 2 * L
    assert method.bind(frozen, trainable)[1].decoder.delta["q"].keys is None


# --- Adapters


def test_forms_of_adapters(twin):
    _, _, model, frozen = twin("gpt2")
    for options, sites, scale, parallel, norm in (
        ({"form": "houlsby"}, ["attention", "mlp"], 1.0, False, False),
        ({}, ["mlp"], 1.0, False, False),
        ({"form": "lin"}, ["block"], 1.0, False, True),
        ({"form": "parallel"}, ["mlp"], 1.0, True, False),
        ({"form": "scaled_parallel"}, ["mlp"], 4.0, True, False),
        ({"form": "scaled_parallel", "scale": 2.5, "sublayer": "attention"}, ["attention"], 2.5, True, False),
    ):
        method = make("adapter", bottleneck=3, activation="gelu_new", **options)
        adapters = method.bind(frozen, method.init(KEY, model, frozen))[1].decoder.adapter
        assert list(adapters) == sites
        for adapter in adapters.values():
            assert (adapter.scale, adapter.parallel, adapter.norm is not None) == (scale, parallel, norm)
            assert adapter.activation == "gelu_new"
            assert adapter.down.shape == (L, 10, 3)
            assert (np.asarray(adapter.up) == 0).all()
            assert 0.7 * 10**-0.5 < np.abs(adapter.down).max() <= 10**-0.5


# --- Fine-tuning


def test_top_layers_are_the_last_ones(twin):
    _, _, model, frozen = twin("gpt2")
    method = make("finetune", top_layers=2)
    trainable = method.init(KEY, model, frozen)
    assert set(trainable) == {"layers"}
    moved = jax.tree.map(lambda x: x + 1, trainable)
    params = method.bind(frozen, moved)[0]
    old, new = frozen["layers"]["o"]["kernel"], joined(params["layers"])["o"]["kernel"]
    np.testing.assert_array_equal(new[:1], old[:1])
    np.testing.assert_allclose(new[1:], old[1:] + 1)
    np.testing.assert_array_equal(params["embedding"], frozen["embedding"])
    with_embedding = make("finetune", top_layers=2, embedding=True).init(KEY, model, frozen)
    assert set(with_embedding) == {"layers", "embedding", "norm"}
    assert set(make("finetune", top_layers=0, embedding=True).init(KEY, model, frozen)) == {"embedding", "norm"}
    assert set(make("finetune").init(KEY, model, frozen)) == set(frozen)


def test_layers_below_the_top_ones_are_not_differentiated(twin):
    _, _, model, frozen = twin("gpt2")
    batch = Batch(*(jnp.ones((1, 4), jnp.int32) for _ in range(7)))
    loops, cuts = {}, {}
    for name, options in (("top", {"top_layers": 1}), ("all", {})):
        method = make("finetune", **options)
        loss = lambda own, m=method: model.hidden(*m.bind(frozen, own), batch).sum()  # noqa: E731
        traced = jax.make_jaxpr(jax.grad(loss))(method.init(KEY, model, frozen))
        loops[name] = [eqn.params["length"] for eqn in traced.eqns if eqn.primitive.name == "scan"]
        cuts[name] = {eqn.outvars[0].aval.shape[0] for eqn in traced.eqns if eqn.primitive.name == "slice"}
    assert loops == {"top": [L - 1, 1, 1], "all": [L, L]}  # forwards, and backwards over what is trained
    assert L - 1 not in cuts["top"]  # which XLA would copy: all weights that are not trained, at every step


def test_biases_are_those_that_are_there_or_new_ones(twin):
    _, _, model, frozen = twin("gpt2")
    method = make("finetune", biases=True)
    trainable = method.init(KEY, model, frozen)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trainable)}
    assert names == {"bias"}
    assert count(trainable) == L * (3 * 10 + 10 + 11 + 10 + 2 * 10) + 10  # projections, two norms; the last norm
    _, _, model, frozen = twin("llama")
    params, adaptation = method.bind(frozen, method.init(KEY, model, frozen))
    assert params is frozen
    assert set(adaptation.decoder.bias) == {"q", "k", "v", "o", "gate", "up", "down"}


def test_finetuning_keeps_the_dtype_of_the_weights(twin):
    folder = twin("llama").folder
    model, frozen, _ = prefix_tuning.load_model(folder, dtype="bfloat16")
    method = make("finetune", top_layers=1)
    trainable = method.init(KEY, model, frozen)
    params = method.bind(frozen, trainable)[0]
    assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves((params, frozen))} == {jnp.dtype("bfloat16")}
    assert not set(map(id, jax.tree.leaves(trainable))) & set(map(id, jax.tree.leaves(frozen)))


# --- Several at once


@BOTH
def test_a_composition_does_what_its_parts_do(twin, family):
    """Prefix and LoRA: the prefix beside weights that LoRA has changed."""
    _, _, model, frozen = twin(family)
    parts = {"prefix": {"length": P}, "lora": {"rank": 2, "target_modules": ("q", "down")}}
    method = make("compose", parts=parts)
    trainable = jax.tree.map(lambda x: x + 0.1, method.init(KEY, model, frozen))
    whole = method.bind(frozen, trainable)[1]
    alone = {name: make(name, **options).bind(frozen, trainable[name])[1] for name, options in parts.items()}
    np.testing.assert_array_equal(whole.decoder.kv["self"].k, alone["prefix"].decoder.kv["self"].k)
    np.testing.assert_array_equal(whole.decoder.delta["q"].b, alone["lora"].decoder.delta["q"].b)
    assert int(whole.shift) == P
    by_hand = Adaptation(alone["prefix"].decoder.replace(delta=alone["lora"].decoder.delta), alone["prefix"].shift)
    rows = random_rows(5)
    close(prefix_tuning.logits(model, frozen, whole, rows), prefix_tuning.logits(model, frozen, by_hand, rows), 1e-6)


def test_unipelt_gates_are_there_for_what_is_gated(twin):
    _, _, model, frozen = twin("llama")
    parts = {"prefix": {"length": P}, "lora": {"rank": 2}, "memory": {}}
    method = make("compose", parts=parts, gates=True)
    trainable = method.init(KEY, model, frozen)
    assert set(trainable["gates"]["decoder"]) == {"kv", "delta"}
    rows = random_rows(5)
    halves = prefix_tuning.logits(model, *method.bind(frozen, trainable), rows)
    shut = jax.tree.map(lambda x: x, trainable)
    for gate in shut["gates"]["decoder"].values():
        gate["b"] = jnp.full(L, 40.0)  # wide open
    opened = prefix_tuning.logits(model, *method.bind(frozen, shut), rows)
    ungated = make("compose", parts=parts)
    wanted = prefix_tuning.logits(model, *ungated.bind(frozen, {k: v for k, v in shut.items() if k != "gates"}), rows)
    close(opened, wanted, 1e-4)
    assert np.abs(halves[0] - opened[0]).max() > 1e-3


def prefixes(model, frozen, *lengths, shift=True):
    made = [make("prefix", length=length, shift=shift) for length in lengths]
    return [m.bind(frozen, m.init(jax.random.key(i), model, frozen))[1] for i, m in enumerate(made)]


def test_trained_prefixes_one_behind_the_other(twin):
    _, _, model, frozen = twin("llama")
    one, other = prefixes(model, frozen, 2, P)
    both = prefix_tuning.combine_adapters([one, other])
    np.testing.assert_array_equal(both.decoder.kv["self"].k[:, :2], one.decoder.kv["self"].k)
    np.testing.assert_array_equal(both.decoder.kv["self"].v[:, 2:], other.decoder.kv["self"].v)
    assert int(both.shift) == P + 2
    masked = make("prefix", length=2, layers=(1,))
    frozen_too = masked.prepare(KEY, model, frozen)
    third = masked.bind(frozen_too, masked.init(KEY, model, frozen_too))[1]
    mask = prefix_tuning.combine_adapters([one, third]).decoder.kv["self"].mask
    assert np.asarray(mask).tolist() == [[True, True, False, False], [True] * 4, [True, True, False, False]]


def test_trained_prefixes_averaged(twin):
    _, _, model, frozen = twin("llama")
    one, other = prefixes(model, frozen, P, P)
    mean = prefix_tuning.combine_adapters([one, other], "average")
    a, b, m = (x.decoder.kv["self"].k for x in (one, other, mean))
    np.testing.assert_allclose(m, (a + b) / 2, rtol=1e-6)
    assert int(mean.shift) == P
    moved = prefix_tuning.combine_adapters([one, other], "average", [1.5, -0.5]).decoder.kv["self"].k
    np.testing.assert_allclose(moved, 1.5 * a - 0.5 * b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "arguments", "message"),
    [
        ((), (), "no adaptation to combine"),
        ((P, 2), ("average",), "only equal ones can be averaged"),
        ((P, P), ("average", [1.0]), "1 weights for 2 adaptations"),
        ((P, P), ("concatenate", [1.0, 2.0]), "weights go with 'average'"),
        ((P, P), ("sum",), "unknown way to combine 'sum'; valid: average, concatenate"),
    ],
)
def test_what_cannot_be_combined(twin, lengths, arguments, message):
    _, _, model, frozen = twin("llama")
    with pytest.raises(UserError, match=message):
        prefix_tuning.combine_adapters(prefixes(model, frozen, *lengths), *arguments)


def test_what_has_no_mean(twin):
    _, _, model, frozen = twin("llama")
    lora = make("lora", rank=2)
    deltas = [lora.bind(frozen, lora.init(KEY, model, frozen))[1]] * 2
    with pytest.raises(UserError, match="low-rank deltas and adapters cannot be averaged, being products"):
        prefix_tuning.combine_adapters(deltas, "average")
    (one, other), length = prefixes(model, frozen, P, P), jnp.int32(P + 1)
    with pytest.raises(UserError, match="different masks or shifts; only equal ones can be averaged"):
        prefix_tuning.combine_adapters([one, other.replace(shift=length)], "average")


def test_two_that_change_one_thing_cannot_be_joined(twin):
    _, _, model, frozen = twin("llama")
    bound = lambda name, **o: (m := make(name, **o)).bind(frozen, m.init(KEY, model, frozen))[1]  # noqa: E731
    with pytest.raises(UserError, match="two adaptations change delta at q; expected at most one"):
        compose.join([bound("lora", rank=2), bound("lora", rank=3)])
    with pytest.raises(UserError, match="a softmax of its own and cannot be concatenated"):
        compose.join([bound("prefix", length=2), bound("prefix", length=2, gates=True)])
    after = bound("ptuning", length=2, network="mlp", template="{prompt}{rows:2}")
    with pytest.raises(UserError, match="two adaptations have virtual tokens"):
        compose.join([after, after])


# --- Options that cannot work


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("prompt", {"length": 0}, "method.length must be at least 1"),
        ("prompt", {"length": None}, "takes the length of method.text"),
        ("prompt", {"length": P, "init": "zeros"}, "unknown init 'zeros'; valid: labels, random, text, vocabulary"),
        ("prompt", {"length": P, "text": "ab"}, "method.text goes with method.init='text'"),
        ("prompt", {"length": P, "init": "labels"}, "method.labels goes with method.init='labels'"),
        ("prompt", {"length": 1, "init": "labels", "labels": ("a", "b")}, "at most method.length=1"),
        ("prompt", {"length": P, "scale": 0.1}, "method.scale goes with"),
        ("prompt", {"length": P, "init": "random", "population": 3}, "method.population goes with"),
        ("prompt", {"length": P, "population": 0}, "population >= 1"),
        ("prompt", {"length": P, "reparametrisation": 3}, "starts from fresh weights; expected init='random'"),
        ("prompt", {"length": P, "init": "random", "reparametrisation": 0}, "a width of at least 1"),
        ("ptuning", {"length": 0}, "method.length must be at least 1"),
        ("ptuning", {"length": P, "network": "gru"}, "unknown network 'gru'; valid: lstm, mlp"),
        ("ptuning", {"length": P, "hidden": 0}, "method.hidden must be"),
        ("ptuning", {"length": P, "template": "{rows:2}{prompt}"}, "has 2 rows in .*; expected 5"),
        ("ptuning", {"length": P, "template": "{rows:5}"}, "must hold either {prompt} or {source}"),
        ("ptuning", {"length": P, "template": "{rows:5}{prompt}{source}"}, "must hold either {prompt} or {source}"),
        ("ptuning", {"length": P, "template": "{rows:0}{prompt}{rows:5}"}, "expected 5"),
        ("infix", {"length": 0}, "length >= 1 and scale > 0"),
        ("infix", {"length": P, "reparametrisation": 0}, "a width of at least 1"),
        ("infix", {"length": P, "dropout": 1.0}, "method.dropout must be in"),
        ("memory", {"feature": "relu"}, "unknown feature 'relu'; valid: elu, gelu"),
        ("propagation", {"length": 0}, "length >= 1 and scale > 0"),
        ("propagation", {"length": P, "scale": 0.0}, "length >= 1 and scale > 0"),
        ("lora", {"rank": 0}, "method.rank must be at least 1"),
        ("lora", {"rank": 2, "alpha": 0.0}, "method.alpha must be above 0"),
        ("lora", {"rank": 2, "dropout": 1.0}, "method.dropout must be in"),
        ("lora", {"rank": 2, "target_modules": ()}, "must be a tuple of at least one name"),
        ("lora", {"rank": 2, "target_modules": "q"}, "^method.target_modules is .q.; expected a tuple of texts"),
        ("adapter", {"bottleneck": 0}, "method.bottleneck must be at least 1"),
        ("adapter", {"bottleneck": 2, "form": "serial"}, "unknown form 'serial'; valid: houlsby, lin, parallel"),
        ("adapter", {"bottleneck": 2, "activation": "tanh"}, "unknown activation 'tanh'; valid: gelu"),
        ("adapter", {"bottleneck": 2, "scale": 2.0}, "goes with method.form='scaled_parallel'"),
        ("adapter", {"bottleneck": 2, "sublayer": "mlp"}, "method.sublayer goes with a parallel form"),
        ("adapter", {"bottleneck": 2, "form": "parallel", "sublayer": "block"}, "unknown sublayer 'block'"),
        ("finetune", {"embedding": True}, "method.embedding goes with method.top_layers"),
        ("finetune", {"biases": True, "top_layers": 1}, "drop method.top_layers"),
        ("finetune", {"top_layers": 0}, "must be at least 1, or 0 with method.embedding=True"),
        ("compose", {"parts": {"lora": {"rank": 2}}}, "expected at least two of prefix, infix"),
        ("compose", {"parts": {"lora": {"rank": 2}, "ia3": {}}}, "unknown method.parts.ia3.name 'ia3'; valid: adapter"),
        ("compose", {"parts": {"lora": {"rnk": 2}, "memory": {}}}, "unknown key in config section method.parts.lora"),
        (
            "compose",
            {"parts": {"infix": {"length": 2}, "ptuning": {"length": 2, "template": "{prompt}{rows:2}"}}},
            "at most one of them may have a template",
        ),
    ],
)
def test_impossible_options_raise(name, options, message):
    with pytest.raises(UserError, match=message):
        make(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"rank": 11}, "method.rank=11 is above what decoder/q has; expected at most 10"),
        ("lora", {"rank": 2, "target_modules": ("q_proj",)}, "'q_proj' names nothing here; valid: c_attn"),
        ("finetune", {"top_layers": 4}, "method.top_layers=4 is more than the model has; expected at most 3"),
        (
            "compose",
            {"parts": {"memory": {}, "prompt": {"length": 2}}, "gates": True},
            "method.gates has nothing to gate",
        ),
        (
            "compose",
            {"parts": {"prompt": {"length": 2}, "propagation": {"length": 3}}},
            re.escape("decoder.prompt of shape (3, 3, 10) adds to the rows of prompt, which has (5, 10)"),
        ),
    ],
)
def test_what_a_model_does_not_offer_raises_before_its_weights_are_read(twin, name, options, message):
    with pytest.raises(UserError, match=message):
        setup.abstract_adaptation(make(name, **options), twin("gpt2").model)


def test_labels_and_texts_need_a_tokenizer():
    with pytest.raises(UserError, match=r"method\.labels needs a tokenizer"):
        prompt.make(None, length=P, init="labels", labels=("a",))
    assert ptuning.make(None, length=P)
    assert finetune.make(None)

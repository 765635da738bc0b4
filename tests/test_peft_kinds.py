"""Every kind of PEFT folder in both directions, with PEFT itself as the judge: prompts, cartridges, LoRA, heads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import P, close, letters, random_prefix, random_reference, random_rows

import prefix_tuning
from prefix_tuning.data import pipeline
from prefix_tuning.errors import UserError
from prefix_tuning.interop import kv
from prefix_tuning.interop import peft as folders
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.types import KV, Adaptation, Batch, LayerHooks

ROWS = [[token for token in row if token != 1] or [2] for row in random_rows(1)]  # 1 is RoBERTa's padding
TARGETS = [[2, 5], [3], [4, 6, 2], [5], [2], [3, 2], [4], [2]]
CLASSES = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}


def apart(model):
    return model.is_encoder_decoder


def ours(model, frozen, adaptation):
    """Logits of decoders and encoder-decoders, hidden states of encoders; a row at a time, as PEFT's are."""
    if apart(model):
        targets = [[model.start, *row] for row in TARGETS]
        return prefix_tuning.logits(model, frozen, adaptation, targets, sources=ROWS)
    if model.writes:
        return prefix_tuning.logits(model, frozen, adaptation, ROWS)
    examples = [pipeline.Example(row, [0], [0]) for row in ROWS]
    batch = Batch(**pipeline.collate([[x] for x in examples], max(map(len, ROWS)), 1))
    found = np.asarray(jax.jit(model.hidden)(frozen, adaptation, batch))
    return [x[: len(row)] for x, row in zip(found, ROWS, strict=True)]


def theirs(tuned, model, prompt=0):
    """What PEFT's model gives, without the positions of a prompt."""
    found = []
    with torch.no_grad():
        for row, target in zip(ROWS, TARGETS, strict=True):
            given = {"input_ids": torch.tensor([row])}
            if apart(model):
                given["decoder_input_ids"] = torch.tensor([[model.start, *target]])
            out = tuned(**given)[0][0].numpy()
            found.append(out if apart(model) else out[prompt:])
    return found


def loaded(reference, folder):
    """PEFT's model of a folder; nothing is missing, and nothing unexpected but what PEFT says of its own files too."""
    tuned = peft.PeftModel.from_pretrained(reference, folder).eval()
    report = tuned.load_adapter(folder, "again")
    assert report.missing_keys == []
    assert set(report.unexpected_keys) <= {"prompt_embeddings"}
    return tuned


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def random_deltas(model, frozen, targets, rank=2, alpha=3.0, **options):
    """A LoRA of which both halves are drawn."""
    method = METHODS["lora"](None, rank=rank, alpha=alpha, target_modules=targets, **options)
    leaves, tree = jax.tree.flatten(method.init(jax.random.key(0), model, frozen))
    rng = np.random.default_rng(1)
    drawn = [jnp.asarray(rng.normal(size=x.shape).astype(np.float32) * 0.3) for x in leaves]
    return method.bind(frozen, jax.tree.unflatten(tree, drawn))[1]


# --- LoRA

LORA = [
    ("gpt2", ("q", "v")),  # two parts of one Conv1D become one change of rank 4
    ("gpt2", ("all-linear",)),
    ("llama", ("q", "down")),
    ("gpt_neox", ("v", "up")),  # interleaved with the others head by head
    ("phi3", ("k", "gate", "o")),
    ("bert", ("query", "down")),
    ("t5", ("q", "cross_v")),
    ("bart", ("v", "up", "cross_o")),
]


@pytest.mark.parametrize(("family", "targets"), LORA)
def test_peft_computes_the_deltas_that_we_write(twin, tmp_path, family, targets):
    _, _, model, frozen = twin(family)
    adaptation = random_deltas(model, frozen, targets)
    prefix_tuning.save_adapter(tmp_path, adaptation, model, frozen)
    reference = random_reference(family)
    found = theirs(loaded(reference, tmp_path), model)
    close(ours(model, frozen, adaptation), found)
    bare = ours(model, frozen, Adaptation())
    assert np.abs(found[0] - bare[0]).max() > 0.01
    known = peft.LoraConfig(task_type="CAUSAL_LM").to_dict().keys()
    assert json.loads((tmp_path / "adapter_config.json").read_text()).keys() <= known
    again = prefix_tuning.load_adapter(tmp_path, model, frozen)
    close(ours(model, frozen, again), ours(model, frozen, adaptation), 1e-5)
    if family not in ("gpt2", "gpt_neox", "phi3"):  # whose fused projections come back whole
        same(again, adaptation)


def test_deltas_of_one_stack_name_its_modules(twin, tmp_path):
    """Where ends of names would also find the other stack's."""
    _, _, model, frozen = twin("t5")
    whole = random_deltas(model, frozen, ("q",))
    one = whole.replace(encoder=LayerHooks())
    prefix_tuning.save_adapter(tmp_path, one, model)
    close(ours(model, frozen, one), theirs(loaded(random_reference("t5"), tmp_path), model))
    same(prefix_tuning.load_adapter(tmp_path, model, frozen), one)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.v_proj": 3}, "alpha_pattern": {"v_proj": 5}},
        {"layers_to_transform": [0, 2]},
    ],
)
def test_we_compute_the_deltas_that_peft_writes(twin, tmp_path, options):
    _, _, model, frozen = twin("llama")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=7,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        **options,
    )
    tuned = peft.get_peft_model(random_reference("llama"), config).eval()
    tuned.save_pretrained(tmp_path)
    adaptation = prefix_tuning.load_adapter(tmp_path, model, frozen)
    assert set(adaptation.decoder.delta) == {"q", "v"}
    close(ours(model, frozen, adaptation), theirs(tuned, model))


def test_lora_of_a_fused_conv1d_is_read(twin, tmp_path):
    _, _, model, frozen = twin("gpt2")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, fan_in_fan_out=True)
    tuned = peft.get_peft_model(random_reference("gpt2"), config).eval()
    tuned.save_pretrained(tmp_path)
    adaptation = prefix_tuning.load_adapter(tmp_path, model, frozen)
    close(ours(model, frozen, adaptation), theirs(tuned, model))
    prefix_tuning.save_adapter(tmp_path / "ours", adaptation, model)
    files = [
        safetensors.numpy.load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "ours")
    ]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        np.testing.assert_array_equal(tensor, files[1][key])


# --- Prompts


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "t5", "bert"])
def test_prompts_are_pefts(twin, tmp_path, family):
    """Written, loaded by PEFT, read again; and read as PEFT writes them, a folded P-tuning too."""
    _, _, model, frozen = twin(family)
    rows = np.random.default_rng(0).normal(size=(P, model.sites[model.entry].width)).astype(np.float32)
    prompt = Adaptation(prompt=jnp.asarray(rows), shift=jnp.int32(P))
    prefix_tuning.save_adapter(tmp_path, prompt, model)
    tuned = loaded(random_reference(family), tmp_path)
    close(ours(model, frozen, prompt), theirs(tuned, model, P))
    same(prefix_tuning.load_adapter(tmp_path, model, frozen), prompt)
    folders.save_adapter(tmp_path / "ptuning", prompt, model, kind="P_TUNING")
    close(theirs(loaded(random_reference(family), tmp_path / "ptuning"), model, P), theirs(tuned, model, P), 1e-6)
    task = {"bart": "SEQ_2_SEQ_LM", "t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION"}.get(family, "CAUSAL_LM")
    for number, config in enumerate((peft.PromptTuningConfig, peft.PromptEncoderConfig)):
        made = peft.get_peft_model(random_reference(family), config(task_type=task, num_virtual_tokens=3)).eval()
        made.save_pretrained(tmp_path / f"theirs{number}")
        adaptation = prefix_tuning.load_adapter(tmp_path / f"theirs{number}", model, frozen)
        assert int(adaptation.shift) == len(adaptation.prompt) == 3
        close(ours(model, frozen, adaptation), theirs(made, model, 3))


# --- Generation


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["prefix", "prompt", "lora"])
def test_peft_writes_the_same_text(twin, tmp_path, kind, beams):
    _, _, model, frozen = twin("llama")
    adaptation = {
        "prefix": random_prefix(model, 5),
        "prompt": Adaptation(
            prompt=jnp.asarray(np.random.default_rng(1).normal(size=(P, 16)), jnp.float32), shift=jnp.int32(P)
        ),
        "lora": random_deltas(model, frozen, ("q", "v", "down")),
    }[kind]
    prefix_tuning.save_adapter(tmp_path, adaptation, model)
    tuned = loaded(random_reference("llama"), tmp_path)
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "num_beams": beams}
    ours = prefix_tuning.generate(model, frozen, adaptation, ROWS[:4], end_tokens=(12,), **options)
    given = {"do_sample": False, "eos_token_id": 12, "pad_token_id": 0}
    for row, new in zip(ROWS[:4], ours, strict=True):
        tokens = torch.tensor([row])
        out = tuned.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options, **given)[0].tolist()
        # Behind a prompt transformers gives the new tokens alone.
        assert out[-7:] == new
    assert len({tuple(new) for new in ours}) > 1


# --- Encoder-decoders


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bart", {"encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 2}),
        ("bart", {"decoder_attention_heads": 2}),
        ("t5", {"num_layers": 4, "num_decoder_layers": 4}),
        ("t5", {}),
    ],
)
def test_prefixes_of_encoder_decoders_are_read_as_peft_computes_with_them(twin, tmp_path, family, options):
    """With layers tied, positions moved, and entries that nothing reads."""
    _, _, model, frozen = twin(family, **options)
    heads, size = model.sites["decoder"].kv["self"]
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, token_dim=heads * size)
    made = peft.get_peft_model(random_reference(family, **options), config).eval()
    made.save_pretrained(tmp_path)
    adaptation = prefix_tuning.load_adapter(tmp_path, model, frozen)
    found = theirs(made, model)
    close(ours(model, frozen, adaptation), found)
    assert np.abs(found[0] - ours(model, frozen, Adaptation())[0]).max() > 0.01
    unread = set(range(2 * model.sites["encoder"].layers)) - {i for own in folders.tied(model) for i in own}
    assert bool(unread) == (model.sites["encoder"].layers != 3 or model.sites["decoder"].layers != 3)
    prefix_tuning.save_adapter(tmp_path / "again", adaptation, model)
    same(prefix_tuning.load_adapter(tmp_path / "again", model, frozen), adaptation)
    rows = prefix_tuning.generate(model, frozen, adaptation, ROWS[:3], max_new_tokens=5, end_tokens=(), num_beams=2)
    with torch.no_grad():
        for row, new in zip(ROWS[:3], rows, strict=True):
            made.base_model.generation_config.forced_eos_token_id = None
            out = made.generate(
                input_ids=torch.tensor([row]),
                attention_mask=torch.ones(1, len(row), dtype=torch.long),
                max_new_tokens=5,
                min_new_tokens=5,
                num_beams=2,
                do_sample=False,
                eos_token_id=-1,
            )
            assert out[0, 1:].tolist() == new
    changed = adaptation.decoder.kv["self"]
    if len(set(folders.tied(model))) < len(folders.tied(model)):  # two layers share their entries
        changed = changed.replace(k=changed.k.at[0].add(1.0))
        with pytest.raises(UserError, match="with layers tied and positions moved, and so cannot hold this one"):
            prefix_tuning.save_adapter(tmp_path / "no", Adaptation(LayerHooks(kv={"self": changed})), model)


# --- Cartridges, and prefixes that an MLP made


def test_cartridges_and_projections_are_read_and_written(twin, tmp_path):
    _, _, model, frozen = twin("llama")
    prefix = random_prefix(model, 3)
    folders.save_adapter(tmp_path, prefix, model, kind="CARTRIDGE", frozen_slots=2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_frozen_tokens"] == 2
    close(ours(model, frozen, prefix), theirs(loaded(random_reference("llama"), tmp_path), model))
    same(prefix_tuning.load_adapter(tmp_path, model, frozen), prefix)
    for number, config in enumerate(
        (
            peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            peft.PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=4
            ),
        )
    ):
        torch.manual_seed(0)
        made = peft.get_peft_model(random_reference("llama"), config).eval()
        made.save_pretrained(tmp_path / f"theirs{number}")
        close(
            ours(model, frozen, prefix_tuning.load_adapter(tmp_path / f"theirs{number}", model, frozen)),
            theirs(made, model),
        )


# --- Task heads

LABELS = {"labels": ("x", "y", "z")}
HEADED = [
    ("bert", "classify", "prefix"),
    ("bert", "classify", "lora"),
    ("bert", "tag", "prompt"),
    ("bert", "span", "prefix"),
    ("roberta", "tag", "prefix"),
    ("electra", "span", "lora"),
    ("distilbert", "tag", "lora"),
    ("llama", "classify", "prefix"),
    ("gpt2", "tag", "lora"),
]


@pytest.mark.parametrize(("family", "kind", "method"), HEADED)
def test_heads_are_transformers_own(twin, tmp_path, family, kind, method):
    """A head written beside an adapter is what PEFT loads into transformers' class, whose scores are ours; and back."""
    task = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "span": "QUESTION_ANS"}[kind]
    outputs = 2 if kind == "span" else 3
    _, folder, model, frozen = twin(family)
    torch_model = CLASSES[task].from_pretrained(folder, num_labels=outputs, pad_token_id=1).eval()
    if kind == "span":  # PEFT drops token types on the way to this class: here both types are embedded alike
        frozen = frozen | {"types": frozen["types"][jnp.zeros(2, int)]}
        for name, weight in torch_model.named_parameters():
            if "token_type" in name:
                weight.data[1] = weight.data[0]
    adaptation = {
        "prefix": lambda: encoder_prefix(model),
        "lora": lambda: random_deltas(model, frozen, ("q", "v")),
        "prompt": lambda: Adaptation(
            prompt=jnp.asarray(np.random.default_rng(0).normal(size=(P, model.sites[model.entry].width)), jnp.float32),
            shift=jnp.int32(P),
        ),
    }[method]()
    section = {"name": kind} | (LABELS if kind != "span" else {})
    objective = OBJECTIVES[kind](None, **(LABELS if kind != "span" else {}))
    head = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32),
        jax.eval_shape(lambda key: objective.head(key, model), jax.random.key(0)),
    )
    place = folders.head_of(section, model)
    folders.save_adapter(tmp_path / "adapter", adaptation, model, frozen=frozen, head=(place, head))
    tuned = loaded(torch_model, tmp_path / "adapter")
    examples = [pipeline.Example(row, [len(row) - 1 if model.writes else 0], [0]) for row in ROWS]
    if kind == "tag":
        examples = [pipeline.Example(row, list(range(len(row))), [0] * len(row)) for row in ROWS]
    if kind == "span":
        examples = [pipeline.Example(row, [0, 0], [0, 0], types=[1] * len(row)) for row in ROWS]
    length, targets = max(map(len, ROWS)), max(len(x.targets) for x in examples)
    batch = Batch(**pipeline.collate([[x] for x in examples], length, targets))
    found = np.asarray(objective.predict(model, frozen | {"head": head}, adaptation, batch))
    taken = P if method == "prompt" else 0
    for b, row in enumerate(ROWS):
        with torch.no_grad():
            out = tuned(input_ids=torch.tensor([row]))
        if kind == "classify":
            wanted = out.logits.numpy()[0]
            np.testing.assert_allclose(found[b, 0], wanted, atol=1e-4)
        elif kind == "tag":
            wanted = out.logits.numpy()[0, taken:]
            np.testing.assert_allclose(found[b, : len(row)], wanted, atol=1e-4)
        else:
            wanted = np.stack([out.start_logits.numpy()[0], out.end_logits.numpy()[0]], -1)
            np.testing.assert_allclose(found[b, : len(row)], wanted, atol=1e-4)
    same(folders.read_head(tmp_path / "adapter", section, model), head)
    with pytest.warns(UserWarning, match="also holds a task head, .* which is left there"):
        again = folders.load_adapter(tmp_path / "adapter", model, frozen)
    if family != "gpt2":
        same(again, adaptation)


def encoder_prefix(model):
    """A random prefix in a model's one stack."""
    sites = model.sites[model.entry]
    k, v = np.random.default_rng(3).normal(size=(2, sites.layers, P, *sites.kv["self"])).astype(np.float32)
    hooks = LayerHooks(kv={"self": KV(jnp.asarray(k), jnp.asarray(v))})
    return Adaptation(**{model.entry: hooks}, shift=jnp.int32(P))


def test_heads_that_transformers_computes_otherwise_are_refused(twin):
    for family, section in (
        ("roberta", {"name": "classify"}),
        ("bert", {"name": "classify", "pooling": "mean"}),
        ("bert", {"name": "choice"}),
        ("llama", {"name": "span"}),
    ):
        with pytest.raises(UserError, match=f"transformers' {family} classes compute no head as the objective"):
            folders.head_of(section, twin(family).model)
    place = folders.head_of({"name": "classify"}, twin("llama").model)
    with pytest.raises(UserError, match="has no bias; this one has been trained"):
        folders.head_tensors(place, {"kernel": np.ones((16, 2)), "bias": np.ones(2)})


# --- What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported; expected False"),
        ({"bias": "all"}, "bias='all' is not supported; expected 'none'"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'; expected a number"),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern '\(' is no regular expression"),
    ],
)
def test_lora_options_that_compute_something_else_are_refused(twin, tmp_path, change, message):
    _, _, model, frozen = twin("llama")
    prefix_tuning.save_adapter(tmp_path, random_deltas(model, frozen, ("q",)), model)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        prefix_tuning.load_adapter(tmp_path, model, frozen)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensor; expected low-rank changes of this model's down_proj"),
        ({"base_model.model.lm_head.lora_A.weight": (2, 16)}, "holds base_model.model.lm_head.lora_A.weight; expected"),
        ({"model.layers.0.self_attn.q_proj.lora_magnitude_vector": (48,)}, "lora_magnitude_vector; expected low-rank"),
        ({"{q}.lora_A.weight": (2, 16)}, r"lacks .*q_proj\.lora_B\.weight"),
        (
            {"{q}.lora_A.weight": (2, 15), "{q}.lora_B.weight": (48, 2)},
            r"A \[2, 15\] and B \[48, 2\]; expected \[R 16\]",
        ),
        ({"{q}.lora_A.weight": (2, 16), "{q}.lora_B.weight": (48, 3)}, r"expected \[R 16\] and \[48 R\]"),
        ({"{q}.lora_A.weight": (2, 16, 1), "{q}.lora_B.weight": (48, 2)}, r"\[2, 16, 1\]; expected a matrix"),
    ],
)
def test_lora_tensors_that_do_not_fit_are_named(twin, tmp_path, tensors, message):
    _, _, model, frozen = twin("llama")
    prefix_tuning.save_adapter(tmp_path, random_deltas(model, frozen, ("q",)), model)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    made = {key.replace("{q}", q): np.zeros(shape, np.float32) for key, shape in tensors.items()}
    safetensors.numpy.save_file(made, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        prefix_tuning.load_adapter(tmp_path, model, frozen)


def test_another_base_unknown_entries_and_wrong_counts(twin, tmp_path):
    _, _, model, frozen = twin("llama")
    prefix_tuning.save_adapter(tmp_path, random_prefix(model, 3), model, frozen)
    other = frozen | {"embedding": frozen["embedding"] + 1}
    with pytest.raises(UserError, match="belongs to a base model of fingerprint"):
        prefix_tuning.load_adapter(tmp_path, model, other)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"colour": "red"}))
    with pytest.warns(UserWarning, match="has entries that are not known and not used: colour"):
        prefix_tuning.load_adapter(tmp_path, model, frozen)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 9}))
    with pytest.raises(UserError, match="holds 5 virtual tokens, and its config says 9"):
        prefix_tuning.load_adapter(tmp_path, model, frozen)


def test_what_no_kind_of_peft_holds(twin, tmp_path):
    _, _, model, frozen = twin("llama")
    prefix, deltas = random_prefix(model, 0), random_deltas(model, frozen, ("q",))
    for adaptation, message in (
        (prefix.replace(decoder=prefix.decoder.replace(delta=deltas.decoder.delta)), "has PREFIX_TUNING, LORA"),
        (
            METHODS["memory"](None).bind(frozen, METHODS["memory"](None).init(None, model, frozen))[1],
            "none of them and what",
        ),
        (Adaptation(rows=jnp.ones((2, 16))), "none of them and what another method trained"),
        (Adaptation(prompt=jnp.ones((2, 3, 16)), shift=jnp.int32(3)), "one shared prompt"),
        (Adaptation(prompt=jnp.ones((3, 16)), shift=jnp.int32(5)), "this shift differs"),
    ):
        with pytest.raises(UserError, match=message):
            prefix_tuning.save_adapter(tmp_path / "out", adaptation, model)
    assert not (tmp_path / "out").exists()
    bart = twin("bart")
    method = METHODS["prefix"](letters, length=2)
    made = method.bind(bart.frozen, method.init(jax.random.key(0), bart.model, bart.frozen))[1]
    with pytest.raises(UserError, match=r"PEFT gives an encoder-decoder one prefix.*valid formats for it: kv"):
        prefix_tuning.save_adapter(tmp_path / "out", made, bart.model)


# --- Whatever it is kept in


def test_an_adapter_is_read_by_what_it_is(twin, tmp_path, monkeypatch):
    """A folder or file of any kind, and a name on the hub, of which only an adapter's files are fetched."""
    _, _, model, frozen = twin("llama")
    prefix = random_prefix(model, 3)
    prefix_tuning.save_adapter(tmp_path / "peft", prefix, model, frozen)
    kv.save(tmp_path / "kv", prefix, model, frozen)
    rows = np.random.default_rng(0).normal(size=(P, 16)).astype(np.float32)
    np.save(tmp_path / "prompt.npy", rows)
    for path in (tmp_path / "peft", tmp_path / "kv", tmp_path / "kv" / "prefix.safetensors"):
        same(prefix_tuning.load_adapter(path, model, frozen), prefix)
    found = prefix_tuning.load_adapter(tmp_path / "prompt.npy", model, frozen)
    same(found, Adaptation(prompt=jnp.asarray(rows), shift=jnp.int32(P)))
    asked = []

    def fetched(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "peft")

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", fetched)
    same(prefix_tuning.load_adapter("someone/a-prefix", model, frozen), prefix)
    assert asked[0][0] == "someone/a-prefix"
    assert set(asked[0][1]) == {"adapter_config.json", "adapter_model.safetensors", "prefix.safetensors", "*.npy"}
    (tmp_path / "text").write_text("hello")
    for path, message in (
        ("no such/folder/here", "adapter 'no such/folder/here' is no folder, and no name on the hub"),
        (tmp_path, "has no adapter_config.json; expected a folder in PEFT's layout"),
        (tmp_path / "text", "is not read as an adaptation; expected a folder in PEFT's layout"),
    ):
        with pytest.raises(UserError, match=message):
            prefix_tuning.load_adapter(path, model, frozen)


def test_written_files_can_be_read_by_others(twin, tmp_path):
    """As the process's mask says; safetensors alone would let only the owner."""
    prefix_tuning.save_adapter(tmp_path, random_prefix(twin("llama").model, 3), twin("llama").model)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert set(modes) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert len(set(modes.values())) == 1

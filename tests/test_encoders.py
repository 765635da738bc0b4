"""Encoders: transformers' hidden states and logits, what a prefix and a prompt are in them, every method on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from conftest import ENCODERS, P, T, V, close, letters, packed, random_rows, three_steps

import prefix_tuning
from prefix_tuning import heads, models, parallel, positions, setup
from prefix_tuning.data import pipeline
from prefix_tuning.errors import UserError
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.registry import named
from prefix_tuning.types import KV, Adaptation, Batch, LayerHooks, count

ROWS = [[token for token in row if token != 1] or [2] for row in random_rows(1)]  # 1 is RoBERTa's padding
MASKED = transformers.AutoModelForMaskedLM
EVERY = pytest.mark.parametrize("family", ENCODERS)


def batch_of(rows, types=None, length=None):
    examples = [pipeline.Example(row, [0], [0], None if types is None else types[i]) for i, row in enumerate(rows)]
    return Batch(**pipeline.collate([[x] for x in examples], length or max(map(len, rows)), 1))


def hidden(model, frozen, adaptation, batch):
    """The hidden states [T D] of each row, unpadded."""
    found = np.asarray(jax.jit(model.hidden)(frozen, adaptation, batch))
    return [x[real] for x, real in zip(found, np.asarray(batch.segments) > 0, strict=True)]


def theirs(reference, rows, types=None, past=None):
    """transformers' outputs for padded rows: its first output of each row, unpadded."""
    longest = max(map(len, rows))
    pad = lambda row, fill: [*row, *[fill] * (longest - len(row))]  # noqa: E731
    mask = torch.tensor([pad([1] * len(row), 0) for row in rows])
    options = {} if types is None else {"token_type_ids": torch.tensor([pad(row, 0) for row in types])}
    seen = mask
    if past is not None:
        options["past_key_values"] = past
        seen = torch.cat([torch.ones(len(rows), P, dtype=mask.dtype), mask], 1)
    with torch.no_grad():
        out = reference(torch.tensor([pad(row, 1) for row in rows]), attention_mask=seen, **options)[0]
    return [x[real].numpy() for x, real in zip(out, mask.bool(), strict=True)]


@EVERY
def test_hidden_states_equal_transformers(twin, family):
    reference, _, model, frozen = twin(family)
    types = [[int(i > 2) for i in range(len(row))] for row in ROWS] if family in ("bert", "electra") else None
    ours = hidden(model, frozen, Adaptation(), batch_of(ROWS, types))
    close(ours, theirs(reference, ROWS, types))
    assert count(frozen) == sum(weight.numel() for weight in reference.parameters())
    if family in ("bert", "roberta"):
        first = torch.tensor(np.stack([x[0] for x in ours]))
        pooled = torch.tanh(reference.pooler.dense(first)).detach().numpy()
        np.testing.assert_allclose(model.pool(frozen, np.stack([x[0] for x in ours])), pooled, atol=1e-5)
    else:
        x = np.ones((2, 10), np.float32)
        assert model.pool(frozen, x) is x


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_masked_tokens_are_predicted_as_transformers_does(twin, family):
    reference, _, model, frozen = twin(family, kind=MASKED)
    ours = [model.unembed(frozen, x) for x in hidden(model, frozen, Adaptation(), batch_of(ROWS))]
    close(ours, theirs(reference, ROWS))
    assert "pooler" not in frozen
    with pytest.raises(UserError, match=f"this {family} model has no head that predicts masked tokens"):
        model.unembed(twin(family).frozen, np.ones((1, 10), np.float32))


@EVERY
def test_a_prefix_is_a_cache_of_transformers(twin, family):
    """With it the positions of real tokens move; DistilBERT's and ELECTRA's classes take none."""
    reference, _, model, frozen = twin(family)
    sites = model.sites["encoder"]
    k, v = np.random.default_rng(3).normal(size=(2, sites.layers, P, *sites.kv["self"])).astype(np.float32)
    prefix = Adaptation(encoder=LayerHooks(kv={"self": KV(k, v)}), shift=jnp.int32(P))
    ours = hidden(model, frozen, prefix, batch_of(ROWS))
    if family in ("bert", "roberta"):
        past = transformers.DynamicCache()
        for layer in range(sites.layers):
            past.update(
                *(torch.tensor(x[layer]).transpose(0, 1).expand(len(ROWS), 2, P, 5).clone() for x in (k, v)), layer
            )
        close(ours, theirs(reference, ROWS, past=past))
    bare = hidden(model, frozen, Adaptation(), batch_of(ROWS))
    assert all(np.abs(a - b).max() > 0.01 for a, b in zip(ours, bare, strict=True))


@EVERY
def test_a_prompt_of_real_embeddings_is_those_tokens(twin, family):
    _, _, model, frozen = twin(family)
    text = [3, 5, 4, 2, 6]
    prompt = Adaptation(prompt=model.embed(frozen, jnp.asarray(text)), shift=jnp.int32(P))
    whole = hidden(model, frozen, Adaptation(), batch_of([text + row for row in ROWS]))
    close(hidden(model, frozen, prompt, batch_of(ROWS)), [x[P:] for x in whole])


def test_propagation_adds_to_the_prompt_before_every_layer(twin):
    """Rows that start at 0 and get the text's embeddings before the first layer are that text (Li et al. 2023)."""
    _, _, model, frozen = twin("bert")
    text, added = jnp.asarray([3, 5, 4, 2, 6]), np.zeros((3, P, 10), np.float32)
    prompt = Adaptation(prompt=model.embed(frozen, text), shift=jnp.int32(P))
    batch = batch_of(ROWS)
    moved = prompt.replace(encoder=LayerHooks(prompt=jnp.asarray(added)))
    close(hidden(model, frozen, moved, batch), hidden(model, frozen, prompt, batch), 1e-6)
    for layer in range(3):
        pushed = prompt.replace(encoder=LayerHooks(prompt=jnp.asarray(added).at[layer].set(1.0)))
        assert np.abs(hidden(model, frozen, pushed, batch)[0] - hidden(model, frozen, prompt, batch)[0]).max() > 1e-3


def test_packed_is_unpacked(twin):
    _, _, model, frozen = twin("bert")
    one, two, three = ROWS[0], ROWS[2], ROWS[5]
    batch = packed([[(one, [1]), (two, [2])], [(three, [3])]], length=T + 4, targets=2)
    found = np.asarray(jax.jit(model.hidden)(frozen, Adaptation(), batch))
    ours = [found[0, : len(one)], found[0, len(one) : len(one) + len(two)], found[1, : len(three)]]
    close(ours, hidden(model, frozen, Adaptation(), batch_of([one, two, three])), 2e-6)


def test_scan_is_loop(twin):
    _, _, model, frozen = twin("bert")
    loop = models.build(model.config, scan=False)
    batch = batch_of(ROWS)
    close(hidden(loop, frozen, Adaptation(), batch), hidden(model, frozen, Adaptation(), batch), 2e-6)


@pytest.mark.parametrize("kind", [transformers.AutoModel, MASKED])
def test_weights_that_a_file_lacks_are_not_counted(twin, kind):
    """So the shapes that a checkpoint of fine-tuning is restored with are those of what was trained."""
    _, folder, model, frozen = twin("bert", kind=kind)
    assert ("pooler" in model.specs, "masked" in model.specs) == (kind is not MASKED, kind is MASKED)
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)  # noqa: E731
    assert shapes(loading.abstract(model)) == shapes(frozen)
    assert shapes(setup.abstract_trainable(METHODS["finetune"](None), model)) == shapes(frozen)
    assert loading.read_model(folder).specs == model.specs


def test_saved_as_transformers_loads(twin, tmp_path):
    reference, _, model, frozen = twin("bert")
    loading.save_pretrained(tmp_path, model, frozen)
    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    close(theirs(again, ROWS), theirs(reference, ROWS), 1e-6)


def test_what_an_encoder_refuses(twin):
    _, _, model, frozen = twin("bert")
    with pytest.raises(UserError, match="a bert model reads text and does not write it; expected a decoder"):
        prefix_tuning.generate(model, frozen, None, [[1, 2]], max_new_tokens=2)
    for family, entry, message in (
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' .* absolute"),
        ("bert", {"is_decoder": True}, "bert with is_decoder=true is not supported"),
        ("electra", {"embedding_size": 4}, "electra with embedding_size=4 is not supported; expected hidden_size, 10"),
    ):
        with pytest.raises(UserError, match=message):
            models.build({"model_type": family, **ENCODERS[family], "type_vocab_size": 2, **entry})
    kv = KV(jnp.ones((3, P, 2, 5)), jnp.ones((3, P, 2, 5)))
    with pytest.raises(UserError, match="this model has no decoder to adapt; valid: encoder"):
        model.hidden(frozen, Adaptation(LayerHooks(kv={"self": kv})), batch_of(ROWS))


OPTIONS = {
    "prefix": [{"length": P, "init": "text", "text": "dabec"}, {"length": P, "reparametrisation": 4}],
    "infix": [{"length": P}],
    "prompt": [{"length": P}],
    "ptuning": [{"length": P, "network": "mlp", "hidden": 4}],
    "memory": [{}],
    "propagation": [{"length": P}],
    "lora": [{"rank": 2, "target_modules": ("query", "down")}],
    "adapter": [{"bottleneck": 3, "form": form} for form in ("houlsby", "lin", "parallel")],
    "finetune": [{}, {"top_layers": 1, "embedding": True}, {"biases": True}],
    "compose": [{"parts": {"prefix": {"length": 2}, "lora": {"rank": 2}}}],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, own in OPTIONS.items() for i in range(len(own))])
def test_every_method_trains_on_an_encoder(twin, name, number):
    """With a head: all that is trained moves and the loss falls; eight devices are one."""
    assert set(OPTIONS) == set(METHODS)
    _, _, model, frozen = twin("bert")
    objective = OBJECTIVES["classify"](None, labels=("yes", "no", "maybe"))
    bare = named("method", METHODS, {"name": name} | OPTIONS[name][number], letters)
    setup.abstract_adaptation(bare, model)
    method = heads.with_head(bare, objective.head)
    frozen = method.prepare(jax.random.key(0), model, frozen)
    start = jax.jit(lambda key: method.init(key, model, frozen))(jax.random.key(1))
    assert set(start) == {"method", "head"}
    virtual = list(range(V, V + P)) if "rows" in bare.template else []
    rows = [pipeline.Example([*row, *virtual], [0], [i % 3]) for i, row in enumerate(ROWS)]
    batch = pipeline.collate([[x] for x in rows], 12, 1)
    given = (model, frozen, method, objective, optax.sgd(0.1), start, batch)
    ours, losses = three_steps(*given)
    if name in ("prefix", "prompt"):  # for the others tests/test_methods.py says so
        spread, _ = three_steps(*given, axis=parallel.AXIS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), ours, spread)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), jax.device_get(start), ours)
    still = {"/".join(key.key for key in path[-2:]) for path, x in jax.tree_util.tree_leaves_with_path(moved) if not x}
    assert still <= {"k/bias"}, still  # which adds the same to every score of a query
    assert losses[-1] < losses[0]


def test_a_prompt_takes_one_text_a_row(twin):
    model = twin("bert").model
    assert setup.one_text_a_row(METHODS["prompt"](None, length=P), model)
    assert not setup.one_text_a_row(METHODS["prefix"](None, length=P), model)
    assert positions.taken(setup.abstract_adaptation(METHODS["prefix"](None, length=P), model), model).read == P

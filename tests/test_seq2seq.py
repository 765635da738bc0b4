"""Encoder-decoders: transformers' logits and texts, what prefixes at each attention and prompts are in them, and every
method on them."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
import torch
import transformers
from conftest import SEQ2SEQ, P, V, batch_logits, close, letters, three_steps

import prefix_tuning
import run
from prefix_tuning import attention, decode, fit, models, parallel, positions, setup
from prefix_tuning.data import pipeline
from prefix_tuning.errors import UserError
from prefix_tuning.interop import merged
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading, t5
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.types import KV, Adaptation, Batch, LayerHooks, count

SOURCES = [[3, 4, 5, 6, 2, 7, 9], [5, 2], [11, 8, 3, 4], [7]]
TARGETS = [[4, 5], [6, 2, 3, 8, 9], [], [10, 3, 3]]
SITES = ("encoder.self", "decoder.self", "decoder.cross")
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VARIANTS = {
    "bart": ("bart", {}),
    "bart with scaled embeddings": ("bart", {"scale_embedding": True, "activation_function": "relu"}),
    "t5": ("t5", {}),
    "t5 1.1": ("t5", V1_1 | {"untied": True}),
    "t5 1.1, tied by transformers 5": ("t5", V1_1),
    "mt5": ("mt5", {"untied": True}),
}
BOTH = pytest.mark.parametrize("family", ["bart", "t5"])
KEY = jax.random.key(0)


def theirs(reference, sources, targets):
    """transformers' logits [T V] of each pair, in one batch, padded on the right."""

    def padded(rows):
        longest = max(map(len, rows))
        tokens = [[*row, *[1] * (longest - len(row))] for row in rows]
        return torch.tensor(tokens), torch.tensor([[int(i < len(row)) for i in range(longest)] for row in rows])

    (read, seen), (written, real) = padded(sources), padded(targets)
    with torch.no_grad():
        out = reference(
            input_ids=read, attention_mask=seen, decoder_input_ids=written, decoder_attention_mask=real
        ).logits
    return [logits[row.bool()].numpy() for logits, row in zip(out, real, strict=True)]


def started(model, targets=TARGETS):
    return [[model.start, *row] for row in targets]


def ours(model, frozen, adaptation=None, sources=SOURCES, targets=TARGETS):
    return prefix_tuning.logits(model, frozen, adaptation, started(model, targets), sources=sources)


def random_prefixes(model, seed=0, sites=SITES, rows=None):
    """Keys and values at some attentions, as an adaptation; with a number of rows each row's own."""
    rng, hooks = np.random.default_rng(seed), {"encoder": {}, "decoder": {}}
    for place in SITES:
        stack, site = place.split(".")
        own = model.sites[stack]
        shape = (own.layers, *(() if rows is None else (rows,)), P, *own.kv[site])
        k, v = rng.normal(size=(2, *shape)).astype(np.float32)
        if place in sites:
            hooks[stack][site] = KV(jnp.asarray(k), jnp.asarray(v))
    return Adaptation(**{stack: LayerHooks(kv=kv or None) for stack, kv in hooks.items()})


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(twin, variant):
    """With unequal depths and numbers of heads, and heads that are no share of the width."""
    family, options = VARIANTS[variant]
    reference, _, model, frozen = twin(family, **options)
    close(ours(model, frozen), theirs(reference, SOURCES, started(model)))
    weights = [*reference.parameters(), *([reference.final_logits_bias] if family == "bart" else [])]
    assert count(frozen) == sum(weight.numel() for weight in weights)
    assert ("unembedding" in frozen) == ("untied" in options)


@BOTH
def test_long_rows_are_attended_in_parts(twin, monkeypatch, family):
    _, _, model, frozen = twin(family)
    prefix = random_prefixes(model)
    at_once = ours(model, frozen, prefix)
    monkeypatch.setattr(attention, "QUERIES", 2)
    monkeypatch.setattr(attention, "SCORES", 0)
    close(ours(models.build(model.config), frozen, prefix), at_once, 5e-6)


def test_far_positions_share_buckets():
    """Every distance in both directions, and beyond the farthest, is in the bucket that transformers puts it in."""
    distance = np.arange(-300, 301)
    reference = transformers.models.t5.modeling_t5.T5Attention
    for both_ways in (True, False):
        for buckets, farthest in ((32, 128), (8, 6)):
            ours = t5.bucket(jnp.asarray(distance), both_ways=both_ways, buckets=buckets, farthest=farthest)
            wanted = reference._relative_position_bucket(torch.tensor(distance), both_ways, buckets, farthest)
            np.testing.assert_array_equal(ours, wanted.numpy())


@pytest.mark.parametrize("sites", [*((site,) for site in SITES), SITES], ids="+".join)
@BOTH
def test_a_prefix_is_slots_in_transformers_own_attention(twin, torch_prefixes, family, sites):
    """Each alone and all together; no position moves, and slots have no distance to tokens."""
    reference, _, model, frozen = twin(family)
    prefix = random_prefixes(model, sites=sites)
    bare = theirs(reference, SOURCES, started(model))
    torch_prefixes(reference, prefix)
    found = ours(model, frozen, prefix)
    close(found, theirs(reference, SOURCES, started(model)))
    assert all(np.abs(one - other).max() > 0.01 for one, other in zip(found, bare, strict=True))


@BOTH
def test_masked_is_removed(twin, family):
    _, _, model, frozen = twin(family)
    nothing = jax.tree.map(
        lambda kv: kv.replace(mask=jnp.zeros(kv.k.shape[:2], bool)),
        random_prefixes(model),
        is_leaf=lambda x: isinstance(x, KV),
    )
    close(ours(model, frozen, nothing), ours(model, frozen), 1e-6)


@BOTH
def test_each_row_may_have_prefixes_of_its_own(twin, family):
    _, _, model, frozen = twin(family)
    own = random_prefixes(model, rows=len(SOURCES))
    each = [jax.tree.map(lambda x, b=b: np.asarray(x)[:, b], own) for b in range(len(SOURCES))]
    close(ours(model, frozen, own), [ours(model, frozen, one)[b] for b, one in enumerate(each)], 1e-5)


@BOTH
def test_a_prompt_of_real_embeddings_is_those_tokens(twin, family):
    """Before the source, and the decoder sees what became of them, as it does of tokens."""
    _, _, model, frozen = twin(family)
    text = [3, 5, 4, 2, 6]
    scaled = model.embed(frozen, jnp.asarray(text))
    prompt = Adaptation(prompt=scaled, shift=jnp.int32(P))
    close(ours(model, frozen, prompt), ours(model, frozen, None, [text + row for row in SOURCES]), 1e-5)
    among = Adaptation(rows=scaled[:2])
    virtual = [[V, *row, V + 1] for row in SOURCES]
    close(ours(model, frozen, among, virtual), ours(model, frozen, None, [[3, *row, 5] for row in SOURCES]), 1e-5)


@BOTH
def test_packed_is_unpacked_and_every_entry_gets_a_gradient(twin, family):
    """Targets read their own sources only, also where a row is full, and rows without any disturb no gradient."""
    _, _, model, frozen = twin(family)
    pairs = [pipeline.Tokens(s, [*t, 1]).after(model.start) for s, t in zip(SOURCES, TARGETS, strict=True)]
    batch = Batch(**pipeline.collate([[pairs[0], pairs[1]], [pairs[2], pairs[3]], []], 9, 9))
    assert batch.source.shape == (3, 9)
    assert batch.tokens.shape == (3, 9)
    logits = batch_logits(model, frozen, Adaptation(), batch)
    sizes = [len(pair.read) for pair in pairs]
    found = [logits[0, : sizes[0]], logits[0, sizes[0] : sum(sizes[:2])]]
    found += [logits[1, : sizes[2]], logits[1, sizes[2] : sum(sizes[2:])]]
    close(found, ours(model, frozen), 1e-5)
    # And every entry of a prefix has one, in every layer: PEFT ties the decoder's, and half of what it trains has none.
    method, objective = METHODS["prefix"](None, length=P), OBJECTIVES["lm"](None)
    trainable = jax.jit(lambda key: method.init(key, model, frozen))(jax.random.key(0))
    assert {f"{stack}.{site}" for stack, own in trainable.items() for site in own} == set(SITES)
    assert count(trainable) == 2 * P * sum(
        sites.layers * heads * size for sites in model.sites.values() for heads, size in sites.kv.values()
    )
    loss = lambda trainable: objective.loss(model, *method.bind(frozen, trainable), batch)[0]  # noqa: E731
    for x in jax.tree.leaves(jax.jit(jax.grad(loss))(trainable)):
        assert np.isfinite(x).all()
        assert (np.abs(x) > 0).all()


@BOTH
def test_prefixes_are_switched_by_name(twin, family):
    _, _, model, frozen = twin(family)
    for site in SITES:
        for options in ({}, {"reparametrisation": 4}, {"init": "text", "text": "dabec"}, {"gates": True}):
            method = METHODS["prefix"](letters, length=P, sites=(site,), **options)
            trainable = jax.eval_shape(lambda frozen, method=method: method.init(KEY, model, frozen), frozen)
            _, adaptation = jax.eval_shape(method.bind, frozen, trainable)
            stack, name = site.split(".")
            assert list(trainable) == [stack]
            assert list(getattr(adaptation, stack).kv) == [name]
            assert adaptation.shift is None
            fit.check(adaptation, model.sites, rows=1)


@BOTH
def test_a_prefix_from_a_text_is_what_the_model_computes_for_it(twin, family):
    """In the encoder that is the text in front of the source; the decoder's are of the text read and then written."""
    _, _, model, frozen = twin(family)
    text = [3, 0, 1, 4, 2]
    made = METHODS["prefix"](letters, length=P, init="text", text="dabec").init(jax.random.key(0), model, frozen)
    both = Batch(**pipeline.collate([[pipeline.Example(text, [0] * P, text, source=text)]], P, P))
    found = jax.jit(model.probe)(frozen, Adaptation(), both)
    assert {stack: set(sites) for stack, sites in made.items()} == {"encoder": {"self"}, "decoder": {"self", "cross"}}
    for stack, sites in made.items():
        for site, own in sites.items():
            norms = {name: np.linalg.norm(own[name], axis=-1).mean(1) for name in "kv"}  # [L K]
            np.testing.assert_allclose(norms["k"], found[stack][site]["token_key_norm"], rtol=1e-5)
            np.testing.assert_allclose(norms["v"], found[stack][site]["token_value_norm"], rtol=1e-5)


@BOTH
def test_scan_is_loop(twin, family):
    _, _, model, frozen = twin(family)
    loop = models.build(model.config, scan=False)
    close(ours(loop, frozen), ours(model, frozen), 5e-6)


@BOTH
def test_weights_in_bfloat16_are_near(twin, tmp_path, family):
    _, folder, model, frozen = twin(family)
    low = prefix_tuning.load_model(str(folder), dtype="bfloat16")[1]
    found = ours(model, low)
    assert all(x.dtype == np.float32 for x in found)
    for low_logits, logits in zip(found, ours(model, frozen), strict=True):
        np.testing.assert_allclose(low_logits, logits, atol=0.15)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_as_transformers_loads(twin, tmp_path, variant):
    family, options = VARIANTS[variant]
    reference, _, model, frozen = twin(family, **options)
    loading.save_pretrained(tmp_path, model, frozen)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    targets = started(model)
    close(theirs(again, SOURCES, targets), theirs(reference, SOURCES, targets), 1e-5)
    # As the hub has a bare model, its names without a first part.
    if family == "bart":
        again.model.save_pretrained(tmp_path / "bare")
        bare, weights, _ = prefix_tuning.load_model(str(tmp_path / "bare"))
        assert "logits_buffer" not in weights
        close(ours(bare, weights | {"logits_buffer": frozen["logits_buffer"]}), ours(model, frozen), 1e-6)


# --- Decoding

N, END = 9, 1


def generated(reference, sources, **options):
    """The new tokens of transformers' `generate`, up to the end token and with it."""
    longest = max(map(len, sources))
    tokens = torch.tensor([[*row, *[1] * (longest - len(row))] for row in sources])
    mask = torch.tensor([[int(i < len(row)) for i in range(longest)] for row in sources])
    reference.generation_config.forced_eos_token_id = None  # BART's is the last token, whatever the beams say
    with torch.no_grad():
        out = reference.generate(
            tokens, attention_mask=mask, max_new_tokens=N, do_sample=False, eos_token_id=END, pad_token_id=0, **options
        )
    new = out[:, 1:].tolist()
    return [row[: row.index(END) + 1] if END in row else row[:N] for row in new]


def decoded(model, params, adaptation, sources, *, longest=0, **options):
    config = decode.DecodeConfig(max_new_tokens=N, end_tokens=(END,), pad_token=0, **options)
    tokens, lengths = prefix_tuning.api.padded(model, adaptation, sources)
    tokens = np.pad(tokens, ((0, 0), (0, max(longest - tokens.shape[1], 0))))
    generate = prefix_tuning.api.generator(prefix_tuning.api.HashableModel(model), config)
    new, counts = generate(params, adaptation, tokens, lengths)
    return [row[:n].tolist() for row, n in zip(np.asarray(new), np.asarray(counts), strict=True)]


def many_sources(seed, size=24):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, V, rng.integers(1, 8)).tolist() for _ in range(size)]


@pytest.mark.apart
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "min_new_tokens": 3}],
    ids=["greedy", "beam", "options"],
)
@pytest.mark.parametrize(("variant", "prefixed"), [*itertools.product(("bart", "t5"), (False, True)), ("t5 1.1", True)])
def test_texts_equal_transformers(twin, torch_prefixes, variant, options, prefixed):
    """Greedy and beam search, with layers apart and prefixes at all three attentions, and without either."""
    family, own = VARIANTS[variant]
    reference, _, model, frozen = twin(family, **own)
    sources = many_sources(1)
    adaptation = jax.tree.map(lambda x: 0.5 * x, random_prefixes(model, 1)) if prefixed else Adaptation()
    torch_prefixes(reference, adaptation)
    weights = decode.ready(frozen, model) if prefixed else frozen
    found = decoded(model, weights, adaptation, sources, **options)
    assert found == generated(reference, sources, **options)
    assert len({tuple(row) for row in found}) > 2  # or this would compare little


@BOTH
def test_what_was_read_is_kept_once_for_all_beams(twin, family):
    """The encoder runs before the loop, and no array in it has its keys, its values or their slots for each beam."""
    _, _, model, frozen = twin(family)
    B, W, S = 2, 3, 7
    config = decode.DecodeConfig(max_new_tokens=N, end_tokens=(END,), pad_token=0, num_beams=W)
    search = functools.partial(decode.search, model, config)
    lengths = jnp.full(B, S, jnp.int32)
    jaxpr = jax.make_jaxpr(search)(frozen, random_prefixes(model), jnp.full((B, S), 5, jnp.int32), lengths)
    inside = {shape for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "while" for shape in shapes(eqn)}
    layers, (K, H) = model.sites["decoder"].layers, model.sites["decoder"].kv["cross"]
    assert (layers, B, K, S, H) in inside
    assert (layers, B, K, N * W, H) in inside  # what the beams wrote, side by side
    for length in (S, P):
        for each in ((B * W, K, length, H), (B * W, length, K, H), (B, W, K, length, H), (B, W, length, K, H)):
            assert not any(shape[-len(each) :] == each for shape in inside)
    encoder = (model.sites["encoder"].layers, 10)  # the norms of the encoder's layers: who has them, runs them
    assert encoder not in inside


def equations(jaxpr):
    """Every equation in a program, those of its parts included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for part in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def shapes(eqn):
    """The shapes of all arrays in an equation's parts and of what it reads."""
    found = {tuple(x.aval.shape) for x in eqn.invars}
    for inner in (part for name, part in eqn.params.items() if name.endswith("jaxpr")):
        for one in equations(inner.jaxpr):
            found |= {tuple(x.aval.shape) for x in (*one.invars, *one.outvars) if hasattr(x.aval, "shape")}
    return found


@pytest.mark.parametrize("beams", [1, 3])
@BOTH
def test_rows_do_not_disturb_each_other(twin, family, beams):
    _, _, model, frozen = twin(family)
    own = random_prefixes(model, 2, rows=len(SOURCES))
    together = decoded(model, frozen, own, SOURCES, num_beams=beams)
    for b, source in enumerate(SOURCES):
        four = jax.tree.map(lambda x, b=b: np.repeat(x[:, b : b + 1], 4, axis=1), own)  # four again: compiled once
        assert decoded(model, frozen, four, [source] * 4, num_beams=beams, longest=7) == [together[b]] * 4


# --- Methods

# Several at sites of their own in a step and a search, and one family or the other, since these take long to compile.
TOGETHER = {
    "t5 0": {
        "prefix": {"length": P},
        "prompt": {"length": P},
        "memory": {},
        "lora": {"rank": 2, "target_modules": ("q", "cross_k", "cross_o", "down")},
        "finetune": {"biases": True},
    },
    "bart 1": {
        "prefix": {"length": P, "init": "text", "text": "dabec", "frozen_slots": 2},
        "infix": {"length": P},
        "adapter": {"bottleneck": 3, "form": "houlsby"},
    },
    "t5 2": {"prefix": {"length": P, "layers": (1,)}, "adapter": {"bottleneck": 3, "form": "lin"}, "finetune": {}},
    "bart 3": {
        "ptuning": {"length": P, "network": "mlp", "hidden": 4, "template": "{rows:2}{prompt}{rows:3}"},
        "adapter": {"bottleneck": 3, "form": "parallel"},
        "finetune": {"top_layers": 1, "embedding": True},
    },
    "t5 4": {"prefix": {"length": 2}, "lora": {"rank": 2, "target_modules": ("cross_v", "q")}},
    "bart 5": {"propagation": {"length": P}, "finetune": {}},
}
GATED, ON_DEVICES = {"t5 4"}, {"t5 0", "bart 1"}


@pytest.mark.parametrize("together", TOGETHER)
def test_every_method_trains_and_decodes(twin, together):
    """All that is trained moves and the loss falls; eight devices are one; the cache says what a full forward says."""
    assert {"compose"} | {name for parts in TOGETHER.values() for name in parts} == set(METHODS)
    (family, _), parts = together.split(), TOGETHER[together]
    _, _, model, frozen = twin(family)
    for name, own in parts.items():
        setup.abstract_adaptation(METHODS[name](letters, **own), model)
    method = METHODS["compose"](letters, parts=parts, gates=together in GATED)
    setup.abstract_adaptation(method, model)
    frozen = method.prepare(jax.random.key(0), model, frozen)
    start = jax.jit(lambda key: method.init(key, model, frozen))(jax.random.key(1))
    virtual = range(V, V + (P if "infix" in parts else 3 if "ptuning" in parts else 0))
    sources = [[*row, *virtual] for row in SOURCES * 2]
    pairs = [pipeline.Tokens(s, [*t, 1]).after(model.start) for s, t in zip(sources, TARGETS * 2, strict=True)]
    batch = pipeline.collate([[pair] for pair in pairs], 13, 6)
    given = (model, frozen, method, OBJECTIVES["lm"](None), optax.adam(0.001), start, batch)
    made, losses = three_steps(*given)
    if together in ON_DEVICES:  # for the others tests/test_methods.py says so
        spread, again = three_steps(*given, axis=parallel.AXIS)
        np.testing.assert_allclose(losses, again, rtol=1e-4)
        assert jax.tree.structure(spread) == jax.tree.structure(made)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), jax.device_get(start), made)
    still = {"/".join(key.key for key in path[-2:]) for path, x in jax.tree_util.tree_leaves_with_path(moved) if not x}
    assert still <= {"k/bias", "cross_k/bias"}, still  # which add the same to every score of a query
    assert losses[-1] < losses[0]
    params, adaptation = jax.jit(method.bind)(frozen, made)
    new = decoded(model, params, adaptation, sources[:2], min_new_tokens=4)
    whole = ours(model, params, adaptation, sources[:2], new)
    for tokens, logits in zip(new, whole, strict=True):
        allowed = np.where((np.arange(V) == END) & (np.arange(len(logits))[:, None] < 4), -np.inf, logits)
        assert allowed[: len(tokens)].argmax(-1).tolist() == tokens


@BOTH
def test_merged_weights_are_the_adaptation(twin, tmp_path, family):
    """LoRA in both stacks, and in cross attention, becomes weights that transformers loads."""
    _, _, model, frozen = twin(family)
    method = METHODS["lora"](None, rank=2, target_modules=("q", "cross_v", "up"))
    trainable = method.init(jax.random.key(0), model, frozen)
    moved = jax.tree.map(lambda x: x + 0.3, trainable)
    params, adaptation = jax.device_get(method.bind(frozen, moved))
    merged.save(tmp_path, model, params, adaptation, None)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    close(theirs(again, SOURCES, started(model)), ours(model, frozen, adaptation))
    assert np.abs(ours(model, frozen, adaptation)[0] - ours(model, frozen)[0]).max() > 0.05


def test_what_an_encoder_decoder_refuses(twin, tmp_path):
    _, _, model, frozen = twin("bart")
    prefix = random_prefixes(model)
    with pytest.raises(UserError, match=r"logits of an encoder-decoder need one of sources=\[...\] for each row"):
        prefix_tuning.logits(model, frozen, None, [[2, 3]])
    with pytest.raises(UserError, match="a bart model writes what follows a source; this batch has none"):
        model.hidden(frozen, Adaptation(), Batch(**pipeline.collate([[pipeline.Example([1], [0], [0])]], 1, 1)))
    with pytest.raises(UserError, match="PEFT gives an encoder-decoder one prefix"):
        prefix_tuning.save_adapter(tmp_path / "adapter", prefix, model)
    with pytest.raises(UserError, match="row 0 has token id 13; valid: 0 to 12"):
        prefix_tuning.logits(model, frozen, Adaptation(rows=jnp.ones((2, 10))), [[2, 13]], sources=[[13]])
    added = LayerHooks(prompt=jnp.ones((2, P, 10)))
    with pytest.raises(UserError, match=r"decoder\.prompt has nothing to add to, as the encoder reads them"):
        fit.check(Adaptation(decoder=added, prompt=jnp.ones((P, 10)), shift=jnp.int32(P)), model.sites, rows=1)
    for given, message in (
        ({"shift": True}, "method.shift=True: the positions of an encoder-decoder never move"),
        ({"layers": (2,)}, r"method.layers=\(2,\) must be different layers among 0 to 1 \(decoder\)"),
    ):
        with pytest.raises(UserError, match=message):
            setup.abstract_adaptation(METHODS["prefix"](None, length=P, **given), model)
    with pytest.raises(UserError, match=r"method\.top_layers=3 is more than the model has; expected at most 2"):
        METHODS["finetune"](None, top_layers=3).init(jax.random.key(0), model, frozen)
    for sites, message in (
        (("cross",), "method.sites 'cross'; valid|unknown method.sites 'cross'"),
        ((), r"method.sites=\(\) must be a tuple"),
        ("decoder.self", "method.sites='decoder.self' must be a tuple"),
    ):
        with pytest.raises(UserError, match=message):
            METHODS["prefix"](None, length=P, sites=sites)
    gpt2 = twin("gpt2").model
    with pytest.raises(UserError, match=r"method.sites=\('decoder.cross',\): this model has decoder.self"):
        setup.abstract_adaptation(METHODS["prefix"](None, length=P, sites=("decoder.cross",)), gpt2)
    with pytest.raises(UserError, match="those of other models none"):
        prefix_tuning.logits(gpt2, twin("gpt2").frozen, None, [[2]], sources=[[2]])
    for family, entry, message in (
        ("bart", {"tie_word_embeddings": False}, "bart with tie_word_embeddings=false is not supported"),
        ("bart", {"is_decoder": True}, "bart with is_decoder=true is not supported"),
        ("bart", {"decoder_start_token_id": None}, "config.json of a bart model lacks decoder_start_token_id"),
        ("t5", {"feed_forward_proj": "gated-swish"}, "feed_forward_proj"),
        ("t5", {"is_decoder": True}, "t5 with is_decoder=true is not supported"),
    ):
        with pytest.raises(UserError, match=message):
            models.build({"model_type": family, "decoder_start_token_id": 2, **SEQ2SEQ[family], **entry})
    long, prompt = [[3] * 30], Adaptation(prompt=jnp.ones((P, 10)), shift=jnp.int32(P))
    with pytest.raises(
        UserError, match=r"prefix or prompt \(5\) \+ longest source \(30\) = 35 positions, but the model has 32"
    ):
        prefix_tuning.generate(model, frozen, prompt, long, max_new_tokens=4)
    assert prefix_tuning.generate(model, frozen, prefix, long, max_new_tokens=4)  # a prefix takes no positions
    assert positions.taken(setup.abstract_adaptation(METHODS["prefix"](None, length=P), model), model).read == 0


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_slots_with_positions_count_among_the_decoders(twin, family):
    """As PEFT's have them; an index beyond a table of positions would read its last row. T5 has no table."""
    _, _, model, frozen = twin(family)
    kv = jnp.ones((2, P, *model.sites["decoder"].kv["self"]))
    placed = Adaptation(LayerHooks(kv={"self": KV(kv, kv, placed=True)}))
    row, sources = [[3] * 28], [[3] * 32]  # of 32 positions, where there are so many
    calls = {
        "longest row": lambda adaptation: prefix_tuning.logits(model, frozen, adaptation, row, sources=sources),
        "max_new_tokens": lambda adaptation: prefix_tuning.generate(
            model, frozen, adaptation, sources, max_new_tokens=28, end_tokens=()
        ),
    }
    for name, call in calls.items():
        assert len(call(None)[0]) == 28
        if family == "t5":
            assert len(call(placed)[0]) == 28
            continue
        message = rf"^prefix of the decoder \(5\) \+ {name} \(28\) = 33 positions, but the model has 32"
        with pytest.raises(UserError, match=message):
            call(placed)


# --- Whole runs

WORDS = ["<pad>", "</s>", "<unk>", *"abcdefgh"]


def make_tokenizer():
    """A token a letter."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def folder(tmp_path, request):
    """A tiny fresh model with a tokenizer, and pairs of a few letters and two of them by the alphabet."""
    sizes = {
        "bart": {"d_model": 24, "activation_function": "relu", "max_position_embeddings": 24, "init_std": 0.2}
        | {
            f"{stack}_{name}": n
            for stack in ("encoder", "decoder")
            for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 40))
        },
        "t5": {"d_model": 24, "d_kv": 8, "num_heads": 3, "d_ff": 40, "num_layers": 1},
    }[request.param]
    config = {"model_type": request.param, "vocab_size": len(WORDS), "decoder_start_token_id": 0, **sizes}
    config |= {"eos_token_id": 1, "pad_token_id": 0, "forced_eos_token_id": None}
    model = models.build(config | {"initializer_range": 0.2})
    loading.save_pretrained(tmp_path / "model", model, loading.initialise(jax.random.key(1), model))
    make_tokenizer().save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for split, size in (("train", 320), ("validation", 8), ("test", 20)):
        sources = [" ".join(rng.choice(list("abcdefgh"), rng.integers(2, 6))) for _ in range(size)]
        rows = [
            json.dumps({"source": source, "target": f"{min(source[::2])} {max(source)}"}) + "\n" for source in sources
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(rows))
    return tmp_path


def train(folder, workdir, method, *options):
    """The shipped quick start with this model and data."""
    given = [f"model.name={folder}/model", f"dataset.path={folder}/data", "text.prompt={source} </s>"]
    given += ["evaluation.metrics=('exact_match',)", "decode.max_new_tokens=5", "decode.num_beams=2", *options]
    config = f"--config=configs/quickstart.py:method={method}"
    return run.main(["train", config, *(f"--config.{x}" for x in given), f"--workdir={workdir}"])


@pytest.mark.parametrize("folder", ["bart", "t5"], indirect=True)
def test_a_run_learns_to_write_what_it_read(folder, capsys):
    """All weights trained, in packed rows: nearly all right; the commands say the same, and transformers too."""
    workdir = folder / "run"
    more = ["train.epochs=60", "train.batch_size=8", "train.packing=True", "optimizer.learning_rate=5e-3"]
    assert train(folder, workdir, "finetune", *more) == 0
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["untuned"]["exact_match"] < 40
    assert summary["tuned"]["exact_match"] >= 90, summary
    rows = [
        json.loads(line) for line in (workdir / f"predictions/test_{summary['steps']}.jsonl").read_text().splitlines()
    ]
    capsys.readouterr()
    assert run.main(["eval", f"--workdir={workdir}", "--split=test"]) == 0
    assert json.loads(capsys.readouterr().out)["exact_match"] == summary["tuned"]["exact_match"]
    out = folder / "out"
    test = f"--input={folder}/data/test.jsonl"
    assert run.main(["generate", f"--workdir={workdir}", test, f"--output={out}"]) == 0
    given = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
    assert {row["prediction"] for row in rows} <= set(given)
    assert run.main(["export", f"--workdir={workdir}", "--format=merged", f"--output={folder}/merged"]) == 0
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "merged")
    first = json.loads((folder / "data/test.jsonl").read_text().splitlines()[0])["source"]
    new = theirs.generate(tokenizer(f"{first} </s>", return_tensors="pt").input_ids, num_beams=2, max_new_tokens=5)
    assert tokenizer.decode(new[0], skip_special_tokens=True).strip() == given[0]


@pytest.mark.parametrize("folder", ["bart"], indirect=True)
def test_a_prefix_is_inspected_at_each_attention(folder, capsys):
    whole = folder / "whole"
    short = ["train.epochs=1", "train.examples=64", "method.length=3", "optimizer.warmup_steps=0"]
    short += ["evaluation.metrics=()", "train.shapes=1"]
    assert train(folder, whole, "prefix", *short) == 0
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["parameters"]["trained"] == 3 * 2 * 3 * 24  # slots, keys and values, attentions, width
    assert summary["adapter"] is None
    capsys.readouterr()
    assert run.main(["inspect", f"--workdir={whole}", "--examples=6"]) == 0
    text = capsys.readouterr().out
    found = json.loads((whole / "inspect.json").read_text())
    assert set(found["attention"]) == set(SITES)
    for site, seen in found["attention"].items():
        assert f"## {site}\n" in text
        assert (whole / f"inspect_{site}.png").exists()
        assert np.asarray(seen["mass"]).shape == (1, 2, 3)
        assert len(seen["without"]) == 3
    assert run.main(["export", f"--workdir={whole}", "--format=peft", f"--output={folder}/out"]) == 1
    assert "PEFT gives an encoder-decoder one prefix" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["bart"], indirect=True)
def test_configs_that_cannot_work(folder, capsys):
    for method, options, message in (
        ("prefix", ["text.prompt={source}" + " a" * 20], "longest source of the train split ("),
        ("prompt", ["method.length=20"], "prefix or prompt (20) + longest source of the train split"),
        ("prefix", ["text.completion={target}" + " a" * 30], "longest target of the train split ("),
        (
            "prefix",
            ["decode.max_new_tokens=30"],
            "decode.max_new_tokens (30) are as many positions, but the model has ",
        ),
        ("prompt", ["train.packing=True"], "an encoder's prompt belongs to one; drop it"),
        ("prefix", ["method.sites=('cross',)"], "method.sites"),
        ("prefix", ["method.shift=True"], "the positions of an encoder-decoder never move"),
        ("prefix", ["text.prompt={chat}", "text.completion={chat}"], "{chat} is for decoders"),
    ):
        assert train(folder, folder / "w", method, *options) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    config = run.load_config("configs/sst2_minilm.py").to_dict()
    config["model"]["name"] = str(folder / "model")
    with pytest.raises(UserError, match="a bart model answers in text; expected objective 'lm'"):
        setup.make_base(config)

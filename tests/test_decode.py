"""Decoding: token by token what transformers generates, and by hand where that has no counterpart."""

import dataclasses
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import table_model

from prefix_tuning import api, decode, models, stacks
from prefix_tuning.decode import DecodeConfig
from prefix_tuning.errors import UserError
from prefix_tuning.models import loading
from prefix_tuning.types import KV, Adaptation, Batch, Below, LayerHooks, Model

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # its threads spin while they wait, which on a busy machine takes ten times as long
MODELS = Path(os.environ.get("PREFIX_TUNING_MODELS", Path(__file__).parents[2] / "models"))
B, T, P, N, L = 8, 7, 5, 12, 3
PAD, END = 0, 3
SEEDS = (0, 1, 2)


class Twin(NamedTuple):
    """A tiny random model, here and in transformers."""

    model: Model
    params: Any
    reference: transformers.PreTrainedModel


def torch_config(family):
    # The scale makes distributions peaked enough to have clear winners, and flat enough for beams to matter.
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=23, n_positions=40, n_embd=12, n_layer=L, n_head=2, initializer_range=0.6
        )
    # No padding token: transformers would give it an embedding of zeros, behind which all tokens are equally probable.
    options = {} if family == "llama" else {"sliding_window": 4, "pad_token_id": None}
    if family == "gemma2":
        # With a tied unembedding it would repeat its last token.
        options |= {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 5, "tie_word_embeddings": False}
    return transformers.AutoConfig.for_model(
        family,
        vocab_size=19,
        hidden_size=18,
        intermediate_size=11,
        num_hidden_layers=L,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        initializer_range=0.6,
        **options,
    )


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """(family, seed) -> Twin; the twins of a family share one Model, and with it what is compiled for it."""
    made, shared = {}, {}

    def twin(family, seed=0):
        if (family, seed) not in made:
            folder = tmp_path_factory.mktemp(f"{family}{seed}")
            torch.manual_seed(seed)
            # In eager code, since faster attention cannot cap scores.
            config = torch_config(family)
            reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            reference.save_pretrained(folder)
            model = shared.setdefault(family, models.build(loading.read_config(folder)))
            params = jax.tree.map(jnp.asarray, loading.load_weights(folder, model, "float32"))
            made[family, seed] = Twin(model, params, reference)
        return made[family, seed]

    return twin


def generator(model, config):
    """A compiled decoder, which the tests of a model and a config share."""
    return api.generator(api.HashableModel(model), config)


def random_prompts(vocabulary, seed, rows=B):
    """Prompts of 1 to T tokens, the first and the last length among them."""
    rng = np.random.default_rng(seed)
    lengths = [T, 1, *rng.integers(1, T + 1, rows - 2)][:rows]
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]


def padded(prompts, length=T):
    tokens = np.array([[*row, *[PAD] * (length - len(row))] for row in prompts], np.int32)
    return tokens, np.array([len(row) for row in prompts], np.int32)


def options(**given):
    return DecodeConfig(**{"max_new_tokens": N, "end_tokens": (END,), "pad_token": PAD} | given)


def unpadded(new, lengths):
    """The new tokens as lists; checks that nothing but padding follows them."""
    new, lengths = np.asarray(new), np.asarray(lengths)
    assert new.dtype == np.int32
    assert all((row[n:] == PAD).all() for row, n in zip(new, lengths, strict=True))
    return [row[:n].tolist() for row, n in zip(new, lengths, strict=True)]


def run(generate, params, prompts, adaptation=None, key=None, length=T):
    return unpadded(*generate(params, adaptation or Adaptation(), *padded(prompts, length), key))


def expected(reference, config, prompts, prefix=None):
    """What transformers generates from the prompts, padded on the left, after a prefix of k, v [L P K H]."""
    rows, longest = len(prompts), max(map(len, prompts))
    tokens = torch.tensor([[*[PAD] * (longest - len(row)), *row] for row in prompts])
    mask = torch.tensor([[*[0] * (longest - len(row)), *[1] * len(row)] for row in prompts])
    given = {}
    if prefix is not None:
        # It wants the tokens that the cache stands for; that they are the padding has no meaning.
        tokens = torch.cat([torch.full((rows, P), PAD), tokens], 1)
        mask = torch.cat([torch.ones(rows, P, dtype=torch.long), mask], 1)
        given["past_key_values"] = transformers.DynamicCache()
        for layer in range(L):
            k, v = (torch.tensor(np.asarray(x[layer])).transpose(0, 1) for x in (prefix.k, prefix.v))  # [K P H]
            copies = (rows * config.num_beams, 1, 1, 1)
            given["past_key_values"].update(k[None].repeat(copies), v[None].repeat(copies), layer)
    with torch.no_grad():
        out = reference.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            num_beams=config.num_beams,
            do_sample=False,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            bad_words_ids=[[token] for token in config.banned] or None,
            no_repeat_ngram_size=config.no_repeat_ngram,
            eos_token_id=list(config.end_tokens),
            pad_token_id=config.pad_token,
            **given,
        )
    new = out[:, tokens.shape[1] :].tolist()
    ends = [next((i + 1 for i, t in enumerate(row) if t in config.end_tokens), len(row)) for row in new]
    return [row[:end] for row, end in zip(new, ends, strict=True)]


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama", {}),
        ("llama", {"end_tokens": (END, 7), "min_new_tokens": 3, "banned": (4, 9)}),
        ("gpt2", {}),
        ("llama", {"num_beams": 5}),
        ("llama", {"num_beams": 5, "early_stopping": True}),
        ("llama", {"num_beams": 5, "length_penalty": 0.5, "end_tokens": (END, 7)}),
        ("llama", {"num_beams": 5, "length_penalty": 2.0, "early_stopping": True, "end_tokens": (END, 7, 11)}),
        ("llama", {"num_beams": 5, "length_penalty": -1.0, "min_new_tokens": 5}),
        ("llama", {"num_beams": 2, "banned": (4, 9), "max_new_tokens": 6}),
        ("gpt2", {"num_beams": 5}),
        ("mistral", {}),
        ("mistral", {"num_beams": 5}),
        ("gemma2", {}),
        ("gemma2", {"num_beams": 5}),
        ("gpt2", {"num_beams": 5, "length_penalty": 2.0, "min_new_tokens": 4, "banned": (5,), "end_tokens": (END, 7)}),
    ],
)
def test_equals_transformers(twins, family, given):
    config = options(**given)
    generate = generator(twins(family).model, config)
    seen = []
    for seed in SEEDS:
        twin = twins(family, seed)
        prompts = random_prompts(twin.model.vocabulary, seed)
        ours = run(generate, twin.params, prompts)
        assert ours == expected(twin.reference, config, prompts)
        seen += ours
    # Without texts that end early, end late and do not end, this would compare little.
    ended = {len(row) for row in seen if row[-1] in config.end_tokens}
    assert len(ended) >= 2
    assert any(row[-1] not in config.end_tokens for row in seen) or len(ended) >= 4
    assert not {token for row in seen for token in row} & set(config.banned)
    assert min(ended) > config.min_new_tokens


def test_no_repeated_ngrams_equals_transformers(twins):
    """Those that begin in the prompt, and in it alone, counted; one prompt at a time, whose padding counts there."""
    changed = 0
    for beams, n in ((1, 1), (1, 2), (5, 3)):
        allowed = options(num_beams=beams, max_new_tokens=10, end_tokens=(END, 7))
        config = dataclasses.replace(allowed, no_repeat_ngram=n)
        twin = twins("llama")
        free, generate = (generator(twin.model, each) for each in (allowed, config))
        prompts = random_prompts(twin.model.vocabulary, 3, 4)
        prompts = [[*prompts[0][:2] * 3], *prompts[1:]]  # a prompt that repeats itself
        ours = run(generate, twin.params, prompts)
        assert ours == [expected(twin.reference, config, [prompt])[0] for prompt in prompts]
        changed += ours != run(free, twin.params, prompts)
    assert changed == 3


def random_prefix(model, seed, *rows):
    """k, v [L *rows P K H]."""
    K, H = model.sites["decoder"].kv["self"]
    k, v = np.random.default_rng(seed).normal(size=(2, L, *rows, P, K, H)).astype(np.float32)
    return KV(jnp.asarray(k), jnp.asarray(v))


def adapted(kv, shift=P):
    return Adaptation(decoder=LayerHooks(kv={"self": kv}), shift=jnp.asarray(shift, jnp.int32))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_prefix_equals_transformers_with_its_keys_and_values(twins, family, beams):
    twin, config = twins(family), options(num_beams=beams)
    prompts, prefix = random_prompts(twin.model.vocabulary, 5), random_prefix(twin.model, 0)
    generate = generator(twin.model, config)
    ours = run(generate, twin.params, prompts, adapted(prefix))
    assert ours == expected(twin.reference, config, prompts, prefix)
    assert ours != run(generate, twin.params, prompts)


@pytest.mark.parametrize(("family", "beams"), [("gpt2", 1), ("gemma2", 3)])
def test_unrolled_layers_write_the_same(twins, family, beams):
    twin, config = twins(family), options(num_beams=beams)
    unrolled = models.build(twin.model.config, scan=False)
    prompts, adaptation = random_prompts(twin.model.vocabulary, 5), adapted(random_prefix(twin.model, 0))
    ours = [run(generator(m, config), twin.params, prompts, adaptation) for m in (unrolled, twin.model)]
    assert ours[0] == ours[1]


@pytest.mark.apart
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_that_lie_apart_write_the_same(twins, family, beams):
    twin = twins(family)
    prompts, adaptation = random_prompts(twin.model.vocabulary, 5), adapted(random_prefix(twin.model, 0))
    stack = twin.params["layers"]
    depth = len(jax.tree.leaves(stack)[0])
    below, above = (jax.tree.map(lambda x, part=part: x[part], stack) for part in (np.s_[:1], np.s_[1:]))
    generate = generator(twin.model, options(num_beams=beams))
    whole = run(generate, twin.params, prompts, adaptation)
    for layers in (stack, (below, above), (Below(stack, 1), above)):
        given = twin.params | {"layers": layers}
        ready = decode.ready(given, twin.model)
        assert [len(jax.tree.leaves(part)[0]) for part in ready["layers"]] == [1] * depth
        assert run(generate, ready, prompts, adaptation) == whole
        assert run(generate, given, prompts, adaptation) == whole
    assert decode.ready(ready, twin.model)["layers"][0] is ready["layers"][0]  # what lies apart is not copied again


@pytest.mark.apart
def test_layers_stay_together_where_memory_has_no_room(twins, monkeypatch):
    twin = twins("llama")
    monkeypatch.setattr(stacks, "on_cpu", lambda _: False)  # where layers are copied
    size = sum(x.nbytes for x in jax.tree.leaves(twin.params["layers"]))
    for free, parts in ((2 * size - 1, 1), (2 * size, twin.model.sites["decoder"].layers), (None, 3)):
        monkeypatch.setattr(decode, "free_memory", lambda free=free: free)
        layers = decode.ready(twin.params, twin.model)["layers"]
        assert (len(layers) if isinstance(layers, tuple) else 1) == parts


@pytest.mark.apart
def test_layers_on_a_cpu_are_no_copies(twins):
    """Views of the stack, as far as a layer begins where an array may, and none that a donated stack would change."""
    twin = twins("llama")
    stack = jnp.arange(3 * 16 * 4, dtype=jnp.float32).reshape(3, 16, 4)
    odd = jnp.arange(9.0).reshape(3, 3)
    params = twin.params | {"layers": {"even": stack, "odd": odd}}
    first, size = stack.unsafe_buffer_pointer(), stack.nbytes // 3
    layers = decode.ready(params, twin.model)["layers"]
    assert [layer["even"].unsafe_buffer_pointer() for layer in layers] == [first + n * size for n in range(3)]
    jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(stack))
    for n, layer in enumerate(layers):
        np.testing.assert_array_equal(layer["even"], np.arange(n * 64.0, (n + 1) * 64).reshape(1, 16, 4))
        np.testing.assert_array_equal(layer["odd"], odd[n : n + 1])
    meshed = jax.device_put(jnp.ones((3, 16)), jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P()))
    assert [x.sharding for x in stacks.views(meshed)] == [meshed.sharding] * 3


@pytest.mark.parametrize("beams", [1, 3])
def test_prefix_of_real_tokens_is_context(twins, beams):
    twin = twins("gpt2")
    context, prompts = [4, 11, 2, 9, 17], random_prompts(twin.model.vocabulary, 6)
    kv = jax.jit(twin.model.keys_values)(twin.params, jnp.asarray(context))["decoder"]["self"]
    generate = generator(twin.model, options(num_beams=beams))
    ours = run(generate, twin.params, prompts, adapted(kv))
    assert ours == run(generate, twin.params, [context + row for row in prompts], length=P + T)
    assert ours != run(generate, twin.params, prompts)


@pytest.mark.parametrize("beams", [1, 3])
def test_own_prefixes_are_each_rows_own(twins, beams):
    twin = twins("gpt2")
    prompts, own = random_prompts(twin.model.vocabulary, 7), random_prefix(twin.model, 1, B)
    shifts = [P, P, 0, 1, P, 2, P, P]
    generate = generator(twin.model, options(num_beams=beams))
    ours = run(generate, twin.params, prompts, adapted(own, shifts))
    shared = [adapted(jax.tree.map(lambda x, b=b: x[:, b], own), shifts[b]) for b in range(B)]
    assert ours == [run(generate, twin.params, [prompts[b]], shared[b])[0] for b in range(B)]
    assert ours != run(generate, twin.params, prompts, adapted(jax.tree.map(lambda x: x[:, 0], own)))


@pytest.mark.parametrize("beams", [1, 5])
def test_mixed_lengths_equal_one_by_one(twins, beams):
    twin = twins("llama")
    prompts = random_prompts(twin.model.vocabulary, 8)
    generate = generator(twin.model, options(num_beams=beams))
    together = run(generate, twin.params, prompts)
    for row, text in zip(prompts, together, strict=True):
        assert run(generate, twin.params, [row] * B) == [text] * B  # as many rows again: compiled once
    assert together == run(generate, twin.params, prompts, length=T + 2)


@pytest.fixture(scope="module")
def log_probabilities(twins):
    """(params, tokens) -> [S V] float32 by one full forward of the llama twins, without any cache."""
    model, S = twins("llama").model, T + N

    @jax.jit
    def forward(params, tokens):
        row, none = jnp.arange(S)[None], jnp.zeros((1, 0), jnp.int32)
        batch = Batch(tokens, row, jnp.ones_like(row), none, none, none, jnp.ones(1, jnp.int32))
        return jax.nn.log_softmax(model.unembed(params, model.hidden(params, Adaptation(), batch)))[0]

    return lambda params, tokens: np.asarray(forward(params, padded([tokens], S)[0]))[: len(tokens)]


def test_cache_equals_no_cache(twins, log_probabilities):
    twin = twins("llama", 1)
    prompts = random_prompts(twin.model.vocabulary, 1)
    for row, ours in zip(prompts, run(generator(twin.model, options()), twin.params, prompts), strict=True):
        text = list(row)
        while len(text) < len(row) + N and (len(text) == len(row) or text[-1] != END):
            text.append(int(log_probabilities(twin.params, text)[-1].argmax()))
        assert ours == text[len(row) :]


@pytest.mark.parametrize("normalise", ["generated", "full"])
def test_beam_scores_equal_rescoring(twins, log_probabilities, normalise):
    twin = twins("llama", 2)
    config = options(num_beams=4, length_penalty=0.7, normalise=normalise)
    prompts = random_prompts(twin.model.vocabulary, 2)
    search = jax.jit(partial(decode.search, twin.model, config))
    new, scores = search(twin.params, Adaptation(), *padded(prompts))
    lengths = set()
    for row, found, score in zip(prompts, np.asarray(new).tolist(), scores, strict=True):
        found = found[: found.index(END) + 1] if END in found else found
        text = row + found
        after = log_probabilities(twin.params, text)[len(row) - 1 : -1]
        total = after[np.arange(len(found)), found].sum()
        length = len(found) if normalise == "generated" else len(text) - (found[-1] == END)
        np.testing.assert_allclose(score, total / length**0.7, rtol=1e-5)
        lengths.add(len(found))
    assert len(lengths) > 1


# --- A model whose next token depends on the last one only: params [V V] are logits


def test_beam_search_by_hand():
    # Tokens: a, b, end.  After a prompt, which ends in b, "end" has log 0.3 and "a end" has log 0.24 = log 0.6 * 0.4.
    table = jnp.log(jnp.array([[0.3, 0.3, 0.4], [0.6, 0.1, 0.3], [1 / 3, 1 / 3, 1 / 3]]))
    tokens, lengths = np.ones((2, 20), np.int32), np.array([4, 20], np.int32)
    given = {"max_new_tokens": 2, "end_tokens": (2,), "pad_token": 0, "num_beams": 2}
    search = jax.jit(partial(decode.search, table_model(3)), static_argnums=0)

    new, scores = search(DecodeConfig(**given), table, Adaptation(), tokens, lengths)
    assert new.tolist() == [[0, 2], [0, 2]]  # log 0.24 / 2 = -0.71 beats log 0.3 / 1 = -1.20
    np.testing.assert_allclose(scores, [math.log(0.24) / 2] * 2, rtol=1e-6)

    new, scores = search(DecodeConfig(**given, normalise="full"), table, Adaptation(), tokens, lengths)
    # log 0.24 / (4 + 1) = -0.285 beats log 0.3 / 4 = -0.301; log 0.3 / 20 = -0.060 beats log 0.24 / (20 + 1) = -0.068
    assert new.tolist() == [[0, 2], [2, 0]]
    np.testing.assert_allclose(scores, [math.log(0.24) / 5, math.log(0.3) / 20], rtol=1e-6)


def test_beam_search_prefers_the_lower_index_among_equals():
    config = DecodeConfig(max_new_tokens=2, end_tokens=(5,), pad_token=5, num_beams=3)
    generate = decode.make_generate(table_model(6), config)
    new, _ = generate(jnp.zeros((6, 6)), Adaptation(), *padded([[1]]))
    assert new.tolist() == [[0, 0]]


def search_of_3_2(table, prompt, beams, new, end, penalty):
    """The best new tokens, and their score, as transformers 3.2 kept its books: lengths include the prompt."""
    table = table - np.log(np.exp(table).sum(1, keepdims=True))
    running, finished = [(0.0, [])], []
    for step in range(new):
        length = len(prompt) + step  # of the hypotheses, before this step's tokens
        candidates = sorted(
            ((s + table[(prompt + h)[-1], t], [*h, t]) for s, h in running for t in range(len(table))),
            key=lambda candidate: -candidate[0],
        )[: 2 * beams]
        ends = [(s / length**penalty, h) for s, h in candidates[:beams] if h[-1] == end]
        finished = sorted(finished + ends, key=lambda hypothesis: -hypothesis[0])[:beams]
        running = [(s, h) for s, h in candidates if h[-1] != end][:beams]
        if len(finished) == beams and finished[-1][0] >= candidates[0][0] / length**penalty:
            return finished[0]
    length = len(prompt) + new
    return max(finished + [(s / length**penalty, h) for s, h in running])


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_full_normalisation_equals_transformers_3_2(penalty):
    V, cases = 11, 40
    config = DecodeConfig(
        max_new_tokens=9, end_tokens=(END,), pad_token=PAD, num_beams=3, length_penalty=penalty, normalise="full"
    )
    search = jax.jit(partial(decode.search, table_model(V), config))
    ended = set()
    for case in range(cases):
        table = np.random.default_rng(case).normal(size=(V, V)) * 2
        prompts = random_prompts(V, case, rows=4)
        new, scores = search(jnp.asarray(table, jnp.float32), Adaptation(), *padded(prompts))
        for row, found, score in zip(prompts, np.asarray(new).tolist(), scores, strict=True):
            best, hypothesis = search_of_3_2(table, row, 3, 9, END, penalty)
            assert found == hypothesis + [PAD] * (9 - len(hypothesis))
            np.testing.assert_allclose(score, best, rtol=1e-5)
            ended.add(len(hypothesis))
    assert len(ended) > 4


@pytest.mark.parametrize("beams", [1, 3])
def test_stops_when_all_rows_have_ended(beams):
    table = np.zeros((5, 5), np.float32)
    table[:, END] = 9.0
    calls = []
    model = table_model(5, lambda: calls.append(1))
    generate = decode.make_generate(model, options(max_new_tokens=50, num_beams=beams, min_new_tokens=2))
    assert {row[-1] for row in run(generate, table, [[1], [2, 4]])} == {END}
    jax.effects_barrier()
    assert 2 <= len(calls) < 10


# --- Sampling


def sampler(vocabulary, **given):
    return decode.make_generate(table_model(vocabulary), options(do_sample=True, **given))


TABLE = np.random.default_rng(0).normal(size=(B, B)).astype(np.float32)


def test_same_seed_same_text():
    generate, prompts = sampler(B), [[1, 2], [5], [5], [7, 7, 1]]
    first = run(generate, TABLE, prompts, key=jax.random.key(4))
    assert first == run(generate, TABLE, prompts, key=jax.random.key(4))
    assert first != run(generate, TABLE, prompts, key=jax.random.key(5))
    assert first[1] != first[2]  # rows with the same prompt draw for themselves
    assert len(set(first[1][:-1])) > 1  # and so do steps


def test_sample_does_not_depend_on_neighbours():
    generate, key = sampler(B), jax.random.key(6)
    first = run(generate, TABLE, [[1, 2], [5], [6, 1]], key=key)
    second = run(generate, TABLE, [[4], [5], [3, 3, 3], [2]], key=key)
    assert first[1] == second[1]
    assert first[0] != second[0]


@pytest.mark.parametrize("given", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"top_k": 1, "top_p": 0.5}])
def test_narrow_sampling_is_greedy(given):
    table = TABLE.round(1)  # with ties, which greedy decoding resolves to the lower index
    if "temperature" in given:
        table = TABLE
    prompts = [[token] for token in range(B)]
    greedy = run(decode.make_generate(table_model(B), options()), table, prompts)
    assert run(sampler(B, **given), table, prompts, key=jax.random.key(0)) == greedy
    assert run(sampler(B), table, prompts, key=jax.random.key(0)) != greedy


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.7), (1.5, 5, 0.8)]
)
def test_first_token_is_drawn_from_the_distribution(temperature, top_k, top_p):
    draws, logits = 5000, [0.1, 1.0, -0.5, 0.4, 1.3, -2.0, 0.7]
    generate = sampler(7, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=1)
    table = jnp.tile(jnp.array(logits), (7, 1))
    new, _ = generate(table, Adaptation(), np.ones((draws, 1), np.int32), np.ones(draws, np.int32), jax.random.key(11))
    counts = np.bincount(np.asarray(new)[:, 0], minlength=7)

    order = sorted(range(7), key=lambda token: -logits[token])[: top_k or 7]
    weights = np.exp(np.array([logits[token] for token in order]) / temperature)
    weights /= weights.sum()
    nucleus = 1 + int((weights.cumsum() < top_p - 1e-9).sum())  # the fewest tokens that reach top_p
    probability = np.zeros(7)
    probability[order[:nucleus]] = weights[:nucleus] / weights[:nucleus].sum()
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(probability))
    kept = probability > 0
    square = ((counts - draws * probability)[kept] ** 2 / (draws * probability)[kept]).sum()
    assert square < 25  # chi-square of 6 degrees of freedom exceeds this with probability 0.0003


def test_sampling_obeys_banned_tokens_and_minimum():
    prompts = [[token] for token in range(B)]
    generate = sampler(B, banned=(1, 6), min_new_tokens=4)
    texts = [row for seed in range(9) for row in run(generate, TABLE, prompts, key=jax.random.key(seed))]
    assert {token for row in texts for token in row} == set(range(B)) - {1, 6}
    assert min(row.index(END) for row in texts if END in row) == 4


# --- What is compiled, and what is refused


def test_one_trace_per_shape():
    model, traces = table_model(B), []

    def counting(*args):
        traces.append(1)
        return model.prefill(*args)

    generate = decode.make_generate(model._replace(prefill=counting), options(num_beams=3))
    for prompts in ([[1], [2, 4]], [[3, 3, 3], [5]]):
        run(generate, TABLE, prompts)
    assert len(traces) == 1
    run(generate, TABLE, [[1], [2, 4], [5]])
    assert len(traces) == 2


@pytest.mark.apart
@pytest.mark.parametrize("beams", [1, 3])
def test_a_step_moves_nothing_of_the_cache(twins, beams):
    """What is compiled writes into keys and values where they are: no copy, gather or transpose in the loop."""
    twin, config = twins("llama"), options(num_beams=beams)
    params, prompts = stacks.apart(twin.params, twin.model), random_prompts(twin.model.vocabulary, 5)
    generate = decode.make_generate(twin.model, config)
    size = B * beams * N * math.prod(twin.model.sites["decoder"].kv["self"])
    made, entry = set(), False
    for line in generate.lower(params, Adaptation(), *padded(prompts)).compile().as_text().splitlines():
        if line.endswith("{"):
            entry = line.startswith("ENTRY")  # where the cache is made
        found = re.search(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if found and not entry and math.prod(map(int, found[1].split(","))) == size:
            made.add(found[2])
    assert "dynamic-update-slice" in made
    assert made <= {"dynamic-update-slice", "fusion", "bitcast", "broadcast", "parameter", "get-tuple-element"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"min_new_tokens": N + 1}, "min_new_tokens is 13; expected 0 to max_new_tokens"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty is nan"),
        ({"num_beams": 2, "normalise": "none"}, "unknown normalise 'none'; valid: full, generated"),
        ({"num_beams": 2, "early_stopping": "never"}, "early_stopping is 'never'; expected True or False"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0; expected above 0"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1"),
        ({"do_sample": True, "top_p": 0.0}, "top_p is 0.0; expected above 0 and at most 1"),
        ({"do_sample": True, "top_p": 1.1}, "top_p is 1.1"),
        ({"do_sample": True, "num_beams": 2}, "sampling needs num_beams=1"),
        ({"banned": (1, END)}, "expected no end token"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1; expected at least 0"),
        ({"temperature": 0.5, "top_k": 2}, "temperature, top_k would do nothing; expected do_sample=True"),
        ({"length_penalty": 2.0}, "length_penalty would do nothing; expected num_beams above 1"),
    ],
)
def test_impossible_options_raise(given, message):
    with pytest.raises(UserError, match=message):
        options(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"end_tokens": (5,)}, "no such token: 5; expected 0 to 4"),
        ({"banned": (-1, 7)}, "no such token: -1, 7; expected 0 to 4"),
        ({"pad_token": 9}, "no such token: 9; expected 0 to 4"),
        ({"banned": (0, 1, 2, 4)}, "all 5 tokens are banned or end tokens"),
    ],
)
def test_tokens_that_the_model_lacks_raise(given, message):
    with pytest.raises(UserError, match=message):
        decode.make_generate(table_model(5), options(**given))


def test_sampling_without_a_key_raises():
    with pytest.raises(UserError, match="needs a key"):
        run(sampler(B), TABLE, [[1]])


def test_too_few_positions_raise(twins):
    twin = twins("gpt2")  # which knows 40
    prefix = random_prefix(twin.model, 0)
    arguments = (twin.params, adapted(prefix), *padded([[1]]))
    beside = jax.eval_shape(decode.make_generate(twin.model, options(max_new_tokens=28)), *arguments)
    assert beside[0].shape == (1, 28)
    with pytest.raises(
        UserError,
        match=r"prefix or prompt \(5\) \+ longest source \(7\) \+ max_new_tokens \(29\) = 41 positions.* has 40",
    ):
        decode.make_generate(twin.model, options(max_new_tokens=29))(*arguments)
    unshifted = (twin.params, adapted(prefix).replace(shift=None), *padded([[1]]))
    assert jax.eval_shape(decode.make_generate(twin.model, options(max_new_tokens=33)), *unshifted)[0].shape == (1, 33)


# --- Real weights

RECORDS = (
    "name : The Copper Kettle | eatType : pub | food : French | near : Holm Bridge\n",
    "name : Larch House | Type : coffee shop | customer rating : 3 out of 5 | area : riverside\n",
    "name : Ostrava | food : Czech | price : cheap\n",
    "name : The Old Ferry | Type : restaurant | family friendly : yes | near : Market Hall | area : city centre\n",
)


@pytest.mark.parametrize("beams", [1, 5])
def test_real_weights_equal_transformers(beams):
    folder = MODELS / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.skip(f"no weights at {folder}; PREFIX_TUNING_MODELS may name the folder that has them")
    model = models.build(loading.read_config(folder))
    params = loading.load_weights(folder, model, "float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = loading.load_tokenizer(folder)(list(RECORDS)).input_ids
    config = DecodeConfig(max_new_tokens=12, end_tokens=(2,), pad_token=PAD, num_beams=beams)
    ours = run(decode.make_generate(model, config), params, prompts, length=max(map(len, prompts)))
    assert ours == expected(reference, config, prompts)

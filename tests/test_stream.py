"""Decoding that refills rows: every text is what the prompt becomes by itself, whoever had its row before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import V, random_prefix, random_rows, table_model

import prefix_tuning
from prefix_tuning import decode, parallel, stream
from prefix_tuning.data import pipeline
from prefix_tuning.decode import DecodeConfig
from prefix_tuning.errors import UserError
from prefix_tuning.methods import METHODS
from prefix_tuning.types import Adaptation

END, N, B = 2, 9, 24  # three rows on each of eight devices
CONFIG = DecodeConfig(max_new_tokens=N, end_tokens=(END, 5, 7), pad_token=0)


def prompts(count, seed=0):
    """From 1 to 11 tokens, so that chunks have several shapes, the last of them with rows that only fill it."""
    return random_rows(seed, np.random.default_rng(seed).integers(1, 12, count))


def streamed(model, config, layout, params, adaptation, rows, batch=B):
    """The text of each prompt, in order; none may come twice."""
    found = {}
    chunks = pipeline.prompt_batches(rows, batch_size=batch, multiple=6)
    for written in stream.make_stream(model, config, layout)(params, adaptation, chunks, jax.random.key(0)):
        for number, new, length in zip(*written, strict=True):
            if number >= 0:
                assert number not in found
                found[int(number)] = new[:length].tolist()
                assert set(new[length:].tolist()) <= {config.pad_token}
    return [found[number] for number in range(len(rows))]


def together(model, config, params, adaptation, rows):
    """The text of each prompt, all in one batch, whose rows have the prompts' numbers."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for out, row in zip(tokens, rows, strict=True):
        out[: len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    new, counts = decode.make_generate(model, config)(params, adaptation, tokens, lengths, jax.random.key(0))
    return [row[:count].tolist() for row, count in zip(np.asarray(new), np.asarray(counts), strict=True)]


def one_prefix(model, params):
    """As strong as it takes for texts to differ."""
    scale = {"t5": 1, "bart": 5}.get(model.config["model_type"], 20)
    method = METHODS["prefix"](None, length=3)
    trainable = method.init(jax.random.key(1), model, params)
    return method.bind(params, jax.tree.map(lambda x: scale * x, trainable))[1]


BEAMS = {"num_beams": 3, "length_penalty": 0.6, "early_stopping": True}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", BEAMS | {"no_repeat_ngram": 2, "min_new_tokens": 2}),
        ("llama", {"do_sample": True, "top_p": 0.9}),
        ("gpt2", {"num_beams": 2, "normalise": "full"}),
        ("gemma2", {"no_repeat_ngram": 2}),
        ("t5", {}),
        ("bart", BEAMS | {"end_tokens": (12,), "min_new_tokens": 4}),
    ],
)
def test_rows_are_refilled_with_the_same_texts(twin, family, options):
    _, _, model, frozen = twin(family)
    config, adaptation = dataclasses.replace(CONFIG, **options), one_prefix(model, frozen)
    rows = prompts(3 * B - 10)
    layout = parallel.Replicated()
    found = streamed(model, config, layout, *layout.place((frozen, adaptation)), rows)
    assert found == together(model, config, frozen, adaptation, rows)
    assert len({len(row) for row in found}) > 2  # or no row would be done before another
    assert len({tuple(row) for row in found}) > 5


def test_a_placed_prefix_and_a_prompt_follow_the_rows(twin):
    """What has positions of its own in T5's decoder, and what a decoder reads before every prompt."""
    layout = parallel.Replicated()
    for family, method in (
        ("t5", METHODS["prefix"](None, length=3, sites=("decoder.self",))),
        ("gpt2", METHODS["prompt"](None, length=3)),
    ):
        _, _, model, frozen = twin(family)
        trainable = method.init(jax.random.key(1), model, frozen)
        params, adaptation = method.bind(frozen, jax.tree.map(lambda x: 20 * x, trainable))
        if family == "t5":
            kv = adaptation.decoder.kv["self"].replace(placed=True)
            adaptation = adaptation.replace(decoder=adaptation.decoder.replace(kv={"self": kv}))
        rows = prompts(2 * B)
        found = streamed(model, CONFIG, layout, *layout.place((params, adaptation)), rows)
        # By one full pass over every text, without any cache.
        before = [[model.start]] * len(rows) if family == "t5" else rows
        whole = [[*row, *text[:-1]] for row, text in zip(before, found, strict=True)]
        sources = rows if family == "t5" else None
        logits = prefix_tuning.logits(model, params, adaptation, whole, sources=sources)
        pairs = zip(before, logits, strict=True)
        assert found == [scores[len(row) - 1 :].argmax(-1).tolist() for row, scores in pairs]
        assert len({tuple(text) for text in found}) > 4


def test_fewer_prompts_than_rows(twin):
    _, _, model, frozen = twin("llama")
    rows, adaptation, layout = prompts(5), random_prefix(model, 3), parallel.Replicated()
    found = streamed(model, CONFIG, layout, *layout.place((frozen, adaptation)), rows)
    assert found == together(model, CONFIG, frozen, adaptation, rows)
    assert list(stream.make_stream(model, CONFIG, layout)(frozen, adaptation, [], jax.random.key(0))) == []


@pytest.mark.parametrize("refills", [True, False])
def test_refilling_takes_fewer_steps(refills):
    """Token n is followed by n - 1, down to the end: a prompt of n takes as many steps as that says."""
    steps = []
    table = np.zeros((V, V), np.float32)
    for token in range(V):
        table[token, token - 1 if token > 3 else END] = 9.0
    layout = parallel.Replicated()
    layout.refills = refills
    first = [V - 1, 3] * 40  # of the texts that stand beside each other, one is long
    model, config = (
        table_model(V, lambda: steps.append(1)),
        dataclasses.replace(CONFIG, max_new_tokens=V, end_tokens=(END,)),
    )
    found = streamed(model, config, layout, *layout.place((table, Adaptation())), [[token] for token in first], 16)
    assert [len(row) for row in found] == [token - 2 for token in first]
    jax.effects_barrier()
    chunked = len(first) // 2 * (V - 4)  # each pair of rows takes as long as its longer text, but for its first token
    assert len(steps) < 0.8 * chunked if refills else len(steps) >= 0.8 * chunked


def test_rows_of_their_own_are_refused(twin):
    _, _, model, frozen = twin("gpt2")
    shared = random_prefix(model, 3)
    own = [random_prefix(model, 3, rows=B), shared.replace(shift=jnp.ones(B, jnp.int32))]
    own.append(shared.replace(prompt=jnp.zeros((B, 2, 10))))
    write = stream.make_stream(model, CONFIG, parallel.Replicated())
    for adaptation in own:
        with pytest.raises(UserError, match="expected one that all rows share"):
            list(write(frozen, adaptation, [], jax.random.key(0)))


def test_chunks_that_grow_are_refused(twin):
    _, _, model, frozen = twin("gpt2")
    chunks = [(np.arange(8), np.ones((8, length), np.int32), np.ones(8, np.int32)) for length in (2, 4)]
    with pytest.raises(UserError, match="a chunk of 4 tokens follows one of 2; expected the longest first"):
        list(stream.make_stream(model, CONFIG, parallel.Replicated())(frozen, Adaptation(), chunks, None))

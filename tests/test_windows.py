"""Sliding windows: which real tokens they hide, and that prefixes and prompts stay visible, against masks by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import FULL, SLIDING, P, V, batch_logits, close, one_a_row, random_prefix

import prefix_tuning
from prefix_tuning import attention
from prefix_tuning.types import Adaptation, Batch

ROW = np.random.default_rng(3).integers(0, V, 12).tolist()  # four times the window
WINDOWED = ("mistral", "gemma2", "gemma3_text")


def test_window_by_hand():
    # Two segments; a window of 2 shows a token itself and the one before it.
    segments, positions = jnp.array([[1, 1, 1, 2, 2]]), jnp.array([[0, 1, 2, 0, 1]])
    causal = attention.causal_mask(segments)
    assert attention.nearby(causal, positions, positions, jnp.int32(2))[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert attention.nearby(causal, positions, positions, None) is causal


def run_reference(reference, slots, *, slots_are_queries, **inputs):
    """transformers' outputs where every token sees all `slots` before the row, and 3 tokens of the row at most."""
    length = len(ROW)
    i, j = np.arange(length)[:, None], np.arange(length)
    first = slots if slots_are_queries else 0

    def mask(window):
        seen = np.zeros((first + length, slots + length), bool)
        seen[:first, :slots] = np.tri(slots, dtype=bool)[:first]
        seen[first:, :slots] = True
        seen[first:, slots:] = (j <= i) & (i - j < window)
        return torch.tensor(np.where(seen, 0.0, np.finfo(np.float32).min), dtype=torch.float32)[None, None]

    masks = {FULL: mask(length), SLIDING: mask(3)}
    with torch.no_grad():
        return reference(
            attention_mask=masks[SLIDING] if reference.config.model_type == "mistral" else masks,
            output_attentions=True,
            use_cache=not slots_are_queries,
            **inputs,
        )


def prefixed_reference(reference, adaptation):
    kv, past = adaptation.decoder.kv["self"], transformers.DynamicCache()
    for layer, pair in enumerate(zip(kv.k, kv.v, strict=True)):
        past.update(*(torch.tensor(np.asarray(x)).transpose(0, 1)[None] for x in pair), layer)
    positions = torch.arange(P, P + len(ROW))[None]
    return run_reference(
        reference,
        P,
        slots_are_queries=False,
        input_ids=torch.tensor([ROW]),
        position_ids=positions,
        past_key_values=past,
    )


@pytest.mark.parametrize("family", WINDOWED)
def test_prefix_is_seen_beyond_the_window(twin, family):
    reference, _, model, frozen = twin(family)
    adaptation = random_prefix(model, 0)
    ours = prefix_tuning.logits(model, frozen, adaptation, [ROW])
    close(ours, [prefixed_reference(reference, adaptation).logits[0].numpy()])
    other = prefix_tuning.logits(model, frozen, random_prefix(model, 1), [ROW])
    assert np.abs(ours[0][-1] - other[0][-1]).max() > 0.01


@pytest.mark.parametrize("family", WINDOWED)
def test_prompt_is_seen_beyond_the_window(twin, family):
    reference, _, model, frozen = twin(family)
    prompt = np.random.default_rng(0).normal(size=(P, 16)).astype(np.float32)
    ours = prefix_tuning.logits(model, frozen, Adaptation(prompt=prompt, shift=np.int32(P)), [ROW])
    with torch.no_grad():
        row = reference.get_input_embeddings()(torch.tensor([ROW]))
    given = torch.cat([torch.tensor(prompt)[None], row], 1)
    theirs = run_reference(reference, P, slots_are_queries=True, inputs_embeds=given)
    close(ours, [theirs.logits[0, P:].numpy()])


@pytest.mark.parametrize("family", WINDOWED)
def test_token_beyond_the_window_is_not_seen(twin, family):
    _, _, model, frozen = twin(family, num_hidden_layers=1, layer_types=None if family == "mistral" else [SLIDING])
    ours, other = (prefix_tuning.logits(model, frozen, None, [row])[0] for row in (ROW, [(ROW[0] + 1) % V, *ROW[1:]]))
    np.testing.assert_array_equal(ours[3:], other[3:])
    assert (np.abs(ours[:3] - other[:3]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("family", WINDOWED)
def test_probe_is_the_attention_that_the_slots_get(twin, family):
    reference, _, model, frozen = twin(family)
    adaptation = random_prefix(model, 0)
    batch: Batch = one_a_row([(ROW, [1])])
    found = jax.jit(model.probe)(frozen, adaptation, batch)["decoder"]["self"]["mass"]
    theirs = [layer[0, :, :, :P].mean(1).numpy() for layer in prefixed_reference(reference, adaptation).attentions]
    close([*np.asarray(found).reshape(len(theirs), -1, P)], theirs)
    assert batch_logits(model, frozen, adaptation, batch).shape == (1, len(ROW), V)

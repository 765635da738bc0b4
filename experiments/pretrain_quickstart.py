"""Makes what `python run.py` tunes: a tokenizer, a small Llama trained from nothing on generated text, and the task.

    python -m experiments.pretrain_quickstart --output=configs/quickstart_assets

Took 8.7 minutes on two x86-64 cores.  Text, order and fresh weights are functions of the seed.
"""

import argparse
import functools
import itertools
import json
import math
import string
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import optax.contrib
import tokenizers
import transformers
from jax import Array
from tokenizers import decoders, pre_tokenizers, trainers

from experiments import quickstart_text
from prefix_tuning import models
from prefix_tuning.models import loading
from prefix_tuning.types import Adaptation, Batch, Model, Params, Spec, count

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 832,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# The space before a value is a token of its own, so that the value reads alike wherever it stands.
PIECES = r" ?[a-z]+|[A-Z][a-z]*|[0-9]|\s|[^\sA-Za-z0-9]"


def train_tokenizer(texts: Iterator[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of CONFIG's vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<pad>", "<eos>"],  # in the order of CONFIG's ids
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONFIG["max_position_embeddings"],
    )


def encoded(tokenizer: transformers.PreTrainedTokenizerFast, texts: Iterator[str]) -> Iterator[list[int]]:
    """Token ids of each text, ended by the end token."""
    while some := list(itertools.islice(texts, 256)):
        yield from ([*ids, tokenizer.eos_token_id] for ids in tokenizer(some)["input_ids"])


def batches(documents: Iterator[list[int]], rows: int, length: int) -> Iterator[Batch]:
    """Endless batches [rows length]: the longest documents first, each in the first row with room; no longer ones."""
    waiting: list[list[int]] = []
    while True:
        tokens, positions, segments = (np.zeros((rows, length), np.int32) for _ in range(3))
        filled, left = np.zeros(rows, int), []
        while sum(map(len, waiting)) < rows * length:
            waiting += (document for document in itertools.islice(documents, rows) if len(document) <= length)
        for document in sorted(waiting, key=len, reverse=True):
            room = np.flatnonzero(filled + len(document) <= length)
            if not room.size:
                left.append(document)
                continue
            row = room[0]
            place = slice(filled[row], filled[row] + len(document))
            tokens[row, place], positions[row, place] = document, np.arange(len(document))
            segments[row, place] = segments[row].max() + 1
            filled[row] += len(document)
        waiting = left
        targets, following = np.roll(tokens, -1, axis=1), np.roll(segments, -1, axis=1)
        mask = (segments == following) & (segments > 0) & (np.arange(length) < length - 1)
        index = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        yield Batch(tokens, positions, segments, index, targets, mask.astype(np.float32), segments.max(axis=1))


def losses(model: Model, params: Params, batch: Batch) -> tuple[Array, Array]:
    """Cross-entropy and correctness of every next token [B T], zero where nothing is to be predicted."""
    logits = model.unembed(params, model.hidden(params, Adaptation(), batch))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return loss * batch.mask, (logits.argmax(-1) == batch.targets) * batch.mask


def repeated(batch: Batch, pieces: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Marks targets [B T] of values that their document has shown before: the first token of each, and the others."""
    first, rest = np.zeros(batch.tokens.shape, bool), np.zeros(batch.tokens.shape, bool)
    seen: dict[tuple, set] = {}
    found = []
    for row, ids in enumerate(batch.tokens):
        start = 0
        while start < len(ids):
            end = start + 1
            if pieces[ids[start]][0] in string.ascii_uppercase:
                while end < len(ids) and pieces[ids[end]].islower() and pieces[ids[end]].isascii():
                    end += 1
                document = (row, batch.segments[row, start])
                if document in seen.setdefault(value := tuple(ids[start:end]), set()):
                    found.append((row, start, end, value))
                seen[value].add(document)
            start = end
    for row, start, end, value in found:
        if len(seen[value]) == 1:  # what several documents write is no value, but a sentence's first word
            first[row, start - 1], rest[row, start : end - 1] = True, True
    return first, rest


def matrices(model: Model) -> Params:
    """Which axes of a layer's weights are its inputs and outputs; None for embeddings and norms."""

    def axes(spec):
        if spec.inner is None or "{layer}" not in spec.source:
            return None
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(1, 1 + spec.inner)), tuple(range(1 + spec.inner, len(spec.shape)))
        )

    return jax.tree.map(axes, model.specs, is_leaf=lambda x: isinstance(x, Spec))


def pretrain(
    model: Model, tokenizer: transformers.PreTrainedTokenizerFast, options: argparse.Namespace
) -> Iterator[tuple[float, Params]]:
    """Trains from fresh weights; yields (progress, weights) now and then, and at the end with progress 1."""
    params = loading.initialise(jax.random.key(options.seed), model)
    optimizer = optax.contrib.muon(  # learns to copy from fewer tokens than Adam, and the cores are slow
        1.0,
        weight_decay=0.05,
        adam_b2=0.98,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda _: matrices(model),
    )
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch, rate):
        def loss(params):
            return losses(model, params, batch)[0].sum() / batch.mask.sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), opt_state, value

    examine = jax.jit(functools.partial(losses, model))
    probe = next(batches(encoded(tokenizer, quickstart_text.documents(0, "validation")), 64, options.length))
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    first, rest = repeated(probe, pieces)
    stream = batches(encoded(tokenizer, quickstart_text.documents(options.seed)), options.rows, options.length)
    start, tokens = time.time(), 0
    for number in itertools.count():
        minutes = (time.time() - start) / 60
        progress = number / options.steps
        if number % options.every == 0 or progress >= 1:
            loss, right = examine(params, probe)
            print(
                f"step {number}, {minutes:.1f} minutes, {tokens / 1e6:.2f}M tokens: "
                f"loss {loss.sum() / probe.mask.sum():.3f}; of unseen values repeated, "
                f"{right[first].mean():.1%} of first and {right[rest].mean():.1%} of other tokens right",
                flush=True,
            )
            yield progress, params
            if progress >= 1:
                return
        rate = options.rate * min(1, (number + 1) / 30) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        batch = next(stream)
        tokens += int(batch.mask.sum())
        # What can be copied counts four times: nothing else is hard, and what cannot be predicted is noise.
        batch = batch.replace(mask=np.where(np.logical_or(*repeated(batch, pieces)), 4 * batch.mask, batch.mask))
        params, opt_state, _ = step(params, opt_state, batch, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for model/ and task/")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--every", type=int, default=100, help="steps between saves and reports")
    options = parser.parse_args()

    quickstart_text.write_task(options.output / "task")
    folder = options.output / "model"
    tokenizer = train_tokenizer(itertools.islice(quickstart_text.documents(0), 20_000))
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": CONFIG["eos_token_id"], "pad_token_id": CONFIG["pad_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    model = models.build(CONFIG)
    print(f"{count(model.specs):,} parameters, {len(tokenizer)} tokens")
    for _, params in pretrain(model, tokenizer, options):
        loading.save_pretrained(folder, model, params, "bfloat16")


if __name__ == "__main__":
    main()

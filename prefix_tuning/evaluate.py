"""Decoding a split and scoring it: prompts -> texts -> metrics, and the loss on the same records."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from prefix_tuning import hosts, metrics
from prefix_tuning.data import pipeline, tasks
from prefix_tuning.decode import ready
from prefix_tuning.errors import UserError
from prefix_tuning.parallel import Layout
from prefix_tuning.registry import options_of
from prefix_tuning.setup import Base, Run, Split
from prefix_tuning.stream import make_stream
from prefix_tuning.types import Adaptation, Batch, Params

SHAPES = 4  # padded lengths that batches of what is chosen may have
MULTIPLE = 32  # prompts are padded to multiples of this, so that few shapes are compiled

# (params, adaptation, prompts, seed) -> one text each
Write = Callable[[Params, Adaptation, Sequence[Sequence[int]] | tasks.Encoded, int], list[str]]


def make_writer(base: Base, batch_size: int, *, check: Callable = lambda: None) -> Write:
    """write(params, adaptation, prompts, seed) -> one answer each, in order; only sampling looks at the seed.

    `check` runs between batches and may raise.

    Rows of a batch are spread over the devices, and where each host has the model, batches over hosts; all get all
    answers, and `check` must then be a meeting of all.  Raises `UserError` if batch_size does not divide evenly.
    """
    with options_of("evaluation"):
        base.layout.check_rows(batch_size, own=True)
    return make_chooser(base, batch_size, check) if base.task else make_generator(base, batch_size, check)


def make_chooser(base: Base, batch_size: int, check: Callable) -> Write:
    """Answers that are read off scores."""
    predict = base.layout.jit(functools.partial(base.objective.predict, base.model))

    def write(params: Params, adaptation: Adaptation, encoded: tasks.Encoded, seed: int) -> list[str]:
        del seed
        scores: dict[int, np.ndarray] = {}
        batches = pipeline.eval_batches(encoded.examples, batch_size=batch_size, shapes=SHAPES)
        for _, (indices, batch) in hosts.shared_out(batches, check, apart=base.layout.apart):
            rows = Batch(**jax.tree.map(base.layout.split_rows, batch))
            found = jax.device_get(predict(params, adaptation, rows))
            for b, i in enumerate(indices):
                if i >= 0:
                    scores[int(i)] = found[b]
        scores = hosts.collected(scores) if base.layout.apart else scores
        return tasks.answers(base.task, encoded, [scores[i] for i in range(len(encoded.examples))])

    return write


def make_generator(base: Base, batch_size: int, check: Callable) -> Write:
    """Answers that are written."""
    stream = make_stream(base.model, base.decode, base.layout)
    longest = base.model.max_positions
    if longest is not None:
        written = 0 if base.model.is_encoder_decoder else base.decode.max_new_tokens
        longest -= base.taken.read + written

    def write(params: Params, adaptation: Adaptation, prompts: Sequence[Sequence[int]], seed: int) -> list[str]:
        texts: dict[int, str] = {}
        params = ready(params, base.model)
        batches = pipeline.prompt_batches(prompts, batch_size=batch_size, multiple=MULTIPLE, longest=longest)
        own = (batch for _, batch in hosts.shared_out(batches, check, apart=base.layout.apart))
        for written in stream(params, adaptation, own, jax.random.key(seed)):
            for number, new, length in zip(*written, strict=True):
                if number >= 0:
                    texts[int(number)] = base.tokenizer.decode(new[:length], skip_special_tokens=True).strip()
        everyone = hosts.gather(list(texts.items())) if base.layout.apart else [texts.items()]
        found = {number: text for one in everyone for number, text in one}
        return [found[i] for i in range(len(prompts))]

    return write


def score(names: Sequence[str], predictions: Sequence[str], split: Split) -> dict[str, float | None]:
    """The metrics of these predictions against the split's references."""
    columns = {name: list(split.records[name]) for name in split.records.column_names}
    try:
        return metrics.score(names, list(predictions), columns["targets"], columns["source"], columns.get("group"))
    except ValueError as error:
        raise UserError(str(error)) from error


def rows(predictions: Sequence[str], split: Split) -> list[dict[str, Any]]:
    """One object per record: source, prediction, references."""
    columns = zip(split.records["source"], predictions, split.records["targets"], strict=True)
    return [{"source": s, "prediction": p, "references": r} for s, p, r in columns]


def mean_loss(
    step: Callable, layout: Layout, frozen: Params, trainable: Params, split: Split, run: Run, *, check: Callable
) -> dict[str, float]:
    """Loss as training normalises it and accuracy on a split's pairs, and perplexity per token of what is written."""
    totals: dict[str, np.ndarray] = {}
    options = {"batch_size": run.evaluation.batch_size, "shapes": run.train.shapes, "part": layout.part()}
    for _, batch in pipeline.eval_batches(split.pairs, **options):
        check()
        sums = jax.device_get(step(frozen, trainable, layout.split_eval_batch(batch)))
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    perplexity = {"perplexity": float(np.exp(totals["nll"] / totals["targets"]))} if "nll" in totals else {}
    return {
        "loss": float(totals["loss"] / totals["count"]),
        **perplexity,
        "accuracy": float(totals["correct"] / totals["targets"]),
    }

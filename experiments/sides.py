"""The two sides of a comparison with PEFT: batches and steps of a torch model as its users have them, and our own."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from prefix_tuning import data, parallel, setup
from prefix_tuning.train_step import make_train_step


def training_rows(config: dict[str, Any]) -> Dataset:
    """What our own run trains on, so that both see the same text."""
    rows, size = setup.load_split(config, "train"), config["train"]["examples"]
    return rows if size is None else data.subsample(rows, size, config["seed"])


def shuffled(rows: Sequence[Any], batch_size: int, epochs: int, seed: int) -> Iterator[list[Any]]:
    """The batches of a Hugging Face trainer: every row once an epoch, in a random order."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(rows))
        for start in range(0, len(order), batch_size):
            yield [rows[i] for i in order[start : start + batch_size]]


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> torch.Tensor:
    """Rows [B T] as a Hugging Face collator lays them out: padded on the right to the longest."""
    table = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
    for b, row in enumerate(rows):
        table[b, : len(row)] = torch.tensor(row)
    return table


def torch_step(
    model: torch.nn.Module, total: int, *, learning_rate: float, weight_decay: float = 0.0, clip: float = 1.0
) -> Callable[[dict[str, torch.Tensor]], float]:
    """step(batch) -> loss: AdamW with a learning rate that falls linearly to 0 after `total` steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_step(config: dict[str, Any], base: setup.Base, run: setup.Run) -> tuple[Callable, Callable]:
    """step(batch) -> loss, and bound() -> what the method has made of the weights so far."""
    frozen = parallel.place(setup.load_weights(base, config))
    state = parallel.place(setup.fresh_state(config, base, run, frozen))
    body = parallel.train_step(make_train_step(base.model, base.method, base.objective, run.tx, axis=parallel.AXIS))

    def step(batch: dict[str, np.ndarray]) -> float:
        nonlocal state
        state, sums = body(frozen, state, parallel.split_batch(batch, run.train.accumulate))
        return float(sums["loss"] / sums["count"])

    return step, lambda: base.method.bind(frozen, state.trainable)


def timed(seconds: list[float], function: Callable, *arguments: Any) -> Any:
    """What a function returns; how long it took goes to the end of `seconds`."""
    start = time.perf_counter()
    result = function(*arguments)
    seconds.append(time.perf_counter() - start)
    return result

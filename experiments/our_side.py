"""Our side of a comparison with PEFT: training rows, steps and decoding without the loop of `run.py train`.

`python -m experiments.our_side TASK.json` is that side of experiments/bench.py.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from datasets import Dataset

from experiments import growth, in_turn, profiles
from prefix_tuning import data, decode, optimizer, parallel, setup, stream, torchless
from prefix_tuning.data import pipeline
from prefix_tuning.evaluate import MULTIPLE
from prefix_tuning.interop import peft
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import Adaptation, Batch, Params, TrainState


def training_rows(config: dict[str, Any]) -> Dataset:
    """What our own run trains on, so that both sides see the same text."""
    rows, size = setup.load_split(config, "train"), config["train"]["examples"]
    return rows if size is None else data.subsample(rows, size, config["seed"])


def make_step(base: setup.Base, tx: Any, frozen: Params, state: TrainState) -> tuple[Callable, Callable]:
    """step(batch) -> loss, and now() -> the trainable parameters."""
    body = parallel.train_step(make_train_step(base.model, base.method, base.objective, tx, axis=parallel.AXIS))

    def step(batch: dict[str, np.ndarray]) -> float:
        nonlocal state
        state, sums = body(frozen, state, parallel.split_batch(batch))
        return float(sums["loss"] / sums["count"])

    return step, lambda: state.trainable


def our_step(config: dict[str, Any], base: setup.Base, run: setup.Run) -> tuple[Callable, Callable]:
    """step(batch) -> loss, and bound() -> what the method has made of the weights so far."""
    frozen = parallel.place(setup.load_weights(base, config))
    state = parallel.place(setup.fresh_state(config, base, run, frozen))
    step, now = make_step(base, run.tx, frozen, state)
    return step, lambda: base.method.bind(frozen, now())


def decode_config(beams: int, new: int, end: list[int], least: int = 0) -> decode.DecodeConfig:
    """From `least` to `new` tokens, greedily or with beams."""
    options = {"max_new_tokens": new, "min_new_tokens": least, "end_tokens": tuple(end), "num_beams": beams}
    return decode.DecodeConfig(**options, pad_token=0)


class Side:
    """What experiments/bench.py asks of us."""

    def __init__(self, task: dict[str, Any]):
        self.task, self.config = task, task["config"]
        self.base = setup.make_base(self.config)
        self.frozen: Params | None = None
        self.trainable: Params | None = None
        self.step: Callable | None = None
        self.generators: dict[Any, Callable] = {}  # by what they do, and the number of beams
        self.bound: tuple[Params, Adaptation] | None = None  # what they read

    def load(self) -> dict[str, Any]:
        """The model with its adapter, ready."""
        base = self.base
        self.frozen = parallel.place(setup.load_weights(base, self.config))
        adaptation = peft.load_adapter(self.task["adapter"], base.model, self.frozen)
        trainable = base.bare.adopt(base.model, self.frozen, adaptation)
        if base.objective.head is not None:
            head = peft.read_head(self.task["adapter"], self.config["objective"], base.model)
            trainable = {"method": trainable, "head": head}
        self.trainable = parallel.place(trainable)
        jax.block_until_ready((self.frozen, self.trainable))
        return {}

    def train(self, batch: str) -> dict[str, Any]:
        """A step on the batch in a file."""
        if self.step is None:
            tx, _ = optimizer.make_optimizer(self.task["steps"], **self.config["optimizer"])
            key = jax.random.key(0)
            trainable = jax.tree.map(jnp.copy, self.trainable)  # a step gives its state away, and texts are of this
            state = TrainState(jnp.int32(0), trainable, tx.init(trainable), key)
            self.step, _ = make_step(self.base, tx, self.frozen, parallel.place(state))
        return {"loss": self.step(dict(np.load(batch)))}

    def operations(self, batch: str) -> dict[str, Any]:
        """How many of them a step on the batch in a file takes, by XLA's count, padding included."""
        base = setup.make_base(self.config | {"model": self.config["model"] | {"scan": False}})
        tx, _ = optimizer.make_optimizer(self.task["steps"], **self.config["optimizer"])
        shapes = jax.eval_shape(lambda *trees: trees, self.frozen, self.trainable, Batch(**np.load(batch)))
        return {"count": growth.counted_step(base.model, base.method, base.objective, tx, *shapes)}

    def generate(self, prompts: list[list[int]], beams: int, new: int, end: list[int]) -> dict[str, Any]:
        """So many new tokens for each prompt, never an end token before them."""
        lengths = np.array([len(row) for row in prompts], np.int32)
        tokens = np.zeros((len(prompts), -(-max(lengths) // MULTIPLE) * MULTIPLE), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        if beams not in self.generators:
            config = decode_config(beams, new, end, least=new)
            self.generators[beams] = decode.make_generate(self.base.model, config)
        return {"tokens": np.asarray(self.generators[beams](*self.ready(), tokens, lengths)[0]).tolist()}

    def texts(self, prompts: list[list[int]], beams: int, new: int, end: list[int], rows: int) -> dict[str, Any]:
        """At most so many new tokens for each prompt, up to their end token, in so many rows, as `evaluate` does."""
        if ("texts", beams) not in self.generators:
            config = decode_config(beams, new, end)
            self.generators["texts", beams] = stream.make_stream(self.base.model, config, self.base.layout)
        chunks = pipeline.prompt_batches(prompts, batch_size=rows, multiple=MULTIPLE)
        found = {}
        for written in self.generators["texts", beams](*self.ready(), chunks, jax.random.key(0)):
            found |= {int(i): row[:n].tolist() for i, row, n in zip(*written, strict=True)}
        return {"tokens": [found[i] for i in range(len(prompts))]}

    def ready(self) -> tuple[Params, Adaptation]:
        """What decoding reads, made once for all batches, as `evaluate` does."""
        if self.bound is None:
            params, adaptation = self.base.method.bind(self.frozen, self.trainable)
            self.bound = decode.ready(params, self.base.model), adaptation
        return self.bound

    def profile(self, what: str, **values: Any) -> dict[str, Any]:
        """Where the time of one of the others goes."""
        return {"kinds": profiles.traced(lambda: getattr(self, what)(**values))}

    def memory(self) -> dict[str, Any]:
        """MiB held at most and still free, of the accelerator if there is one."""
        stats = jax.local_devices()[0].memory_stats()
        if not stats:
            return in_turn.host_memory()
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        return {"peak": stats["peak_bytes_in_use"] / 2**20, "free": free / 2**20}


if __name__ == "__main__":
    os.environ.setdefault(torchless.WITHOUT_TORCH, "1")  # as in run.py
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be taken for an answer
    side = Side(json.loads(Path(sys.argv[1]).read_text()))
    actions = ("load", "train", "operations", "generate", "texts", "profile", "memory")
    in_turn.serve({name: getattr(side, name) for name in actions}, answers)

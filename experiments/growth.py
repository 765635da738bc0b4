"""What a training step costs as things grow, and what fits where: counted from shapes alone, on any machine.

    python -m experiments.growth

prints, for SmolLM2-135M's shape, how operations and memory grow with the prefix, the batch, the text, the depth and the
number of prefixes that train at once, and how they shrink on each of several devices that weights and rows are spread
over; and the largest batch of 1,024 tokens that fits beside 1B, 8B and 70B bases on one H200, on eight, and on a TPU
v5e pod.  Three things are counted: the weights, in bfloat16; what is trained with Adam's two moments, in float32; and
what the backward pass reads again (JAX's own residuals of the forward pass, for every layer; with `model.remat` each
layer's input, and one layer's residuals).  A tenth of a device's memory is left free, for scores of attention that are
never kept among others.  Operations are XLA's count of the step with its layers unrolled.

    python -m experiments.growth --measure [--dtype=bfloat16]

runs steps of that shape with 6 layers on one device instead, each size in a process of its own, and prints the median
time of a step, real tokens a second, and the most memory that the process has held.  A GPU is used where JAX finds one.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import in_turn
from prefix_tuning import models, setup, sharding
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES, vocabulary
from prefix_tuning.registry import named
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import Batch, Method, Model, Objective, Params, Spec, TrainState

GIB = 2**30
RESERVE = 0.1  # of a device's memory, for what XLA holds beside what is counted
DEVICES = {  # what is meant by a name -> devices, bytes of memory of each as its maker states them
    "one H200": (1, 141e9),
    "8 H200": (8, 141e9),
    "v5e pod (256 chips)": (256, 16e9),
}
LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "vocab_size": 128_256}
LLAMA |= {"max_position_embeddings": 8192, "num_key_value_heads": 8, "tie_word_embeddings": False}


def llama(layers: int, width: int, heads: int, inner: int, **own: Any) -> dict[str, Any]:
    """The config.json of a Llama 3 of these sizes."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return LLAMA | sizes | {"intermediate_size": inner} | own


BASES = {
    "1B": llama(16, 2048, 32, 8192, tie_word_embeddings=True),
    "8B": llama(32, 4096, 32, 14_336),
    "70B": llama(80, 8192, 64, 28_672),
}
SMALL = llama(30, 576, 9, 1536, tie_word_embeddings=True, num_key_value_heads=3, vocab_size=49_152)
FITTED = {
    "prefix": {"length": 100, "init": "random"},
    "lora": {"rank": 8},
    "finetune": {},
}


class Cost(NamedTuple):
    """What a step needs, in bytes."""

    weights: int
    state: int  # what is trained, and Adam's moments
    kept: int  # from the forward pass for the backward pass, over the whole batch


class Point(NamedTuple):
    """A step's sizes."""

    prefix: int = 10  # slots
    batch: int = 8  # rows
    length: int = 128  # tokens a row
    layers: int = 30
    population: int = 1  # prefixes that train at once, each with a batch of its own
    devices: int = 1  # that weights and rows are spread over


GROWN = {
    "prefix": (1, 10, 128, 512, 2048),
    "batch": (1, 8, 32),
    "length": (64, 128, 512, 2048),
    "layers": (6, 12, 30),
    "population": (1, 2, 5, 10),
    "devices": (1, 2, 4, 8),
}

MEASURED = {  # of a shape with fewer layers, so that two cores can
    "prefix": (1, 10, 128, 512, 2048),
    "batch": (1, 8, 32),
    "length": (64, 128, 512, 1024),
    "layers": (6, 12, 30),
    "population": (1, 2, 5),
}
STEPS = 3  # that are timed, after one that compiles


def size(tree: Any) -> int:
    """Bytes of a tree of shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def rows(batch: int, length: int) -> Batch:
    """The shapes of a batch whose rows' second half is written."""
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    targets = jax.ShapeDtypeStruct((batch, length // 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch, length // 2), jnp.float32)
    examples = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return Batch(
        tokens=tokens,
        positions=tokens,
        segments=tokens,
        examples=examples,
        target_index=targets,
        targets=targets,
        mask=mask,
    )


def made(name: str, options: dict[str, Any]) -> Method:
    """A method by name."""
    return named("method", METHODS, {"name": name, **options}, None)


OBJECTIVE = named("objective", OBJECTIVES, {"name": "lm", "normalisation": "token"}, None)
TX = optax.adam(1e-3)


def cost(model: Model, method: Method, batch: Batch, dtype: str = "bfloat16") -> Cost:
    """What a step over `batch` needs."""
    frozen, trainable = setup.abstract_frozen(method, model, dtype), setup.abstract_trainable(method, model)

    def backward(frozen, trainable, batch):
        def loss(trainable):
            params, adaptation = method.bind(frozen, trainable, key=None)
            return OBJECTIVE.loss(model, params, adaptation, batch)[0]

        return jax.vjp(loss, trainable)[1]

    # What the backward pass closes over is the weights, which are there anyway, and what the forward pass made.
    kept = jax.eval_shape(backward, frozen, trainable, batch)
    there = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((frozen, trainable))}
    new = [leaf for leaf in jax.tree.leaves(kept) if (leaf.shape, leaf.dtype) not in there]
    return Cost(size(frozen), size(trainable) + size(jax.eval_shape(TX.init, trainable)), size(new))


def counted(function: Callable, *arguments: Any) -> float:
    """XLA's count of a function's floating-point operations, for shapes; its layers have to be unrolled."""
    # All targets in one chunk: XLA counts what is in a loop once, however often it runs.
    with mock.patch.multiple(vocabulary, CPU_ROWS=sys.maxsize, ROWS=sys.maxsize):
        return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def counted_step(
    model: Model, method: Method, objective: Objective, tx: Any, frozen: Params, trainable: Params, batch: Batch
) -> float:
    """XLA's count of a train step, of an unrolled model; trees of shapes, a batch of one device."""
    opt_state, key = jax.eval_shape(tx.init, trainable), jax.eval_shape(lambda: jax.random.key(0))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, opt_state, key)
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)
    return counted(make_train_step(model, method, objective, tx), frozen, state, micro)


def operations(point: Point, *, forward: bool = False) -> float:
    """XLA's count of a train step's floating-point operations on each device, or of its forward pass alone."""
    model = models.build(SMALL | {"num_hidden_layers": point.layers}, scan=False)
    method = made("prefix", {"length": point.prefix, "init": "random"})
    frozen, trainable = setup.abstract_frozen(method, model), setup.abstract_trainable(method, model)
    batch = rows(point.batch // point.devices, point.length)
    if forward:

        def loss(frozen, trainable, batch):
            params, adaptation = method.bind(frozen, trainable, key=None)
            return OBJECTIVE.loss(model, params, adaptation, batch)[0]

        return counted(loss, frozen, trainable, batch)
    return point.population * counted_step(model, method, OBJECTIVE, TX, frozen, trainable, batch)


def at(point: Point) -> Cost:
    """What a step of SmolLM2-135M's shape needs on each device."""
    model = models.build(SMALL | {"num_hidden_layers": point.layers})
    method = made("prefix", {"length": point.prefix, "init": "random"})
    one = cost(model, method, rows(point.batch // point.devices, point.length))
    weights = held(model.specs, point.devices) if point.devices > 1 else one.weights
    return Cost(weights, point.population * one.state, point.population * one.kept)


def growth() -> str:
    """A line for each size of each thing that grows, the others as in `Point()`."""
    lines = [["what", "size", "GFLOP", "over a forward pass", "weights MiB", "trained, Adam MiB", "kept MiB"]]
    lines.append(["---"] * len(lines[0]))
    for name, sizes in GROWN.items():
        for value in sizes:
            point = Point()._replace(**{name: value})
            step, once = operations(point), point.population * operations(point, forward=True)
            mib = [f"{number / 2**20:,.1f}" for number in at(point)]
            lines.append([name, f"{value:,}", f"{step / 1e9:,.0f}", f"{step / once:.2f}", *mib])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def real_rows(batch: int, length: int) -> Batch:
    """A batch of `rows` without padding."""
    half = length // 2
    spread = lambda row: np.broadcast_to(np.asarray(row, np.int32), (batch, len(row)))  # noqa: E731
    return Batch(
        tokens=spread(np.arange(length) % SMALL["vocab_size"]),
        positions=spread(np.arange(length)),
        segments=spread(np.ones(length)),
        target_index=spread(np.arange(half, length)),
        targets=spread(np.arange(half)),
        mask=np.ones((batch, half), np.float32),
        examples=np.ones(batch, np.int32),
    )


def run(point: Point, dtype: str, config: dict[str, Any] = SMALL) -> dict[str, float]:
    """The seconds of a step, and the MiB that this process has held; random weights."""
    if point.devices != 1:
        sys.exit(f"error: a step is measured on one device, not on {point.devices}")
    model = models.build(config | {"num_hidden_layers": point.layers})
    method = made("prefix", {"length": point.prefix, "init": "random"})
    frozen = jax.tree.map(lambda x: x.astype(dtype), loading.initialise(jax.random.key(0), model))
    frozen = method.prepare(jax.random.key(1), model, frozen)
    trainable = method.init(jax.random.key(2), model, frozen)
    one = TrainState(jnp.int32(0), trainable, TX.init(trainable), jax.random.key(3))
    state = jax.tree.map(lambda x: jnp.stack([x] * point.population), one)
    micro = jax.tree.map(lambda x: x[None], real_rows(point.batch, point.length))
    # As `population` steps: K runs over one copy of the frozen weights.
    body = jax.vmap(make_train_step(model, method, OBJECTIVE, TX), in_axes=(None, 0, None))
    step, seconds = jax.jit(body, donate_argnums=1), []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        state, sums = step(frozen, state, micro)
        jax.block_until_ready(sums)
        seconds.append(time.perf_counter() - start)
    stats = jax.local_devices()[0].memory_stats()
    peak = stats["peak_bytes_in_use"] / 2**20 if stats else in_turn.host_memory()["peak"]
    return {"seconds": statistics.median(seconds[1:]), "peak": peak}


def measured(dtype: str) -> str:
    """A line for each size of `MEASURED`, the others as in `Point(layers=6)`, each from a process of its own."""
    lines = [["what", "size", "seconds a step", "real tokens/s", "peak MiB"]]
    lines.append(["---"] * len(lines[0]))
    for name, sizes in MEASURED.items():
        for value in sizes:
            point = Point(layers=6)._replace(**{name: value})
            command = [sys.executable, "-m", "experiments.growth", json.dumps(point._asdict()), dtype]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            tokens = point.population * point.batch * point.length / found["seconds"]
            lines.append([name, f"{value:,}", f"{found['seconds']:.3g}", f"{tokens:,.0f}", f"{found['peak']:,.0f}"])
            print(*lines[-1], file=sys.stderr, flush=True)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def held(specs: Any, devices: int) -> int:
    """Bytes of bfloat16 weights on each of so many devices, as `parallel=sharded` splits them over a data axis."""
    sizes = {sharding.DATA: devices, sharding.MODEL: 1}
    total = 0
    for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, Spec)):
        split = sharding.partition(spec.axes, spec.shape, sizes)
        total += 2 * math.prod(spec.shape) // math.prod(sizes[axis] for axis in split if axis)
    return total


def largest(config: dict[str, Any], row: Cost, devices: int, memory: float) -> int:
    """How many rows fit when the weights and what is trained like them are spread over the devices, and rows too.

    A layer's weights are gathered whole while it computes, and the next one's meanwhile.
    """
    specs = models.build(config).specs
    weights = held(specs, devices)
    state = row.state * weights // row.weights if row.state > row.weights else row.state  # copies of weights, or small
    gathered = 0 if devices == 1 else 2 * row.weights // config["num_hidden_layers"]
    free = memory * (1 - RESERVE) - weights - state - gathered
    return devices * max(0, int(free // row.kept))


def fits(length: int = 1024) -> str:
    """A line for each base and method: bytes, and the largest batch on each kind of device."""
    lines = [["base", "method", "`model.remat`", "weights GiB", "trained, Adam GiB", "kept GiB a row", *DEVICES]]
    lines.append(["---"] * len(lines[0]))
    for base, config in BASES.items():
        for name, options in FITTED.items():
            method, layers = made(name, options), config["num_hidden_layers"]
            plain, saved = (cost(models.build(config, remat=remat), method, rows(1, length)) for remat in (False, True))
            saved = saved._replace(kept=saved.kept + plain.kept // layers)  # a layer's at a time comes again
            for remat, row in ((False, plain), (True, saved)):
                found = [largest(config, row, *device) for device in DEVICES.values()]
                gib = [f"{number / GIB:,.3g}" for number in row]
                lines.append([base, name, str(remat), *gib, *(f"{batch:,} rows" if batch else "-" for batch in found)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str]) -> None:
    """Counts, or measures; a point and a precision, in a process that `measured` has started, runs that."""
    if len(arguments) == 2 and arguments[0].startswith("{"):
        print(json.dumps(run(Point(**json.loads(arguments[0])), arguments[1])))
    elif arguments[:1] == ["--measure"] and arguments[1:] in ([], ["--dtype=float32"], ["--dtype=bfloat16"]):
        print(measured(arguments[1].partition("=")[2] if arguments[1:] else "float32"))
    elif arguments:
        sys.exit(f"error: unknown {' '.join(arguments)}; valid: --measure, with --dtype=float32 or --dtype=bfloat16")
    else:
        print(growth(), end="\n\n")
        print(fits())


if __name__ == "__main__":
    main(sys.argv[1:])

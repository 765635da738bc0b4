"""What a training step costs as things grow, and what fits where: counted from shapes alone, on any machine.

    python -m experiments.growth

prints, for SmolLM2-135M's shape, how operations and memory grow with the prefix, the batch, the text, the depth and the
number of prefixes that train at once; and the largest batch of 1,024 tokens that fits beside 1B, 8B and 70B bases on
one H200, on eight, and on a TPU v5e pod.  Three things are counted: the weights, in bfloat16; what is trained with
Adam's two moments, in float32; and what the backward pass reads again (JAX's own residuals of the forward pass, for
every layer).  Operations are XLA's count of the step with its layers unrolled.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from configs import common
from prefix_tuning import models, setup
from prefix_tuning.methods import METHODS
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.registry import named
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import Batch, Method, Model, TrainState

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
    "prefix": {"length": 100, "init": "random", "text": None},
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


GROWN = {
    "prefix": (1, 10, 128, 512, 2048),
    "batch": (1, 8, 32),
    "length": (64, 128, 512, 2048),
    "layers": (6, 12, 30),
    "population": (1, 2, 5, 10),
}


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
    """A method by name, with what differs from its usual options."""
    return named("method", METHODS, common.method(name, **{name: options}).to_dict(), None)


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


def operations(point: Point, *, forward: bool = False) -> float:
    """XLA's count of a train step's floating-point operations, or of its forward pass alone."""
    model = models.build(SMALL | {"num_hidden_layers": point.layers}, scan=False)
    method = made("prefix", {"length": point.prefix, "init": "random", "text": None})
    frozen, trainable = setup.abstract_frozen(method, model), setup.abstract_trainable(method, model)
    batch = rows(point.batch, point.length)
    if forward:

        def loss(frozen, trainable, batch):
            params, adaptation = method.bind(frozen, trainable, key=None)
            return OBJECTIVE.loss(model, params, adaptation, batch)[0]

        return jax.jit(loss).lower(frozen, trainable, batch).cost_analysis()["flops"]
    step = make_train_step(model, method, OBJECTIVE, TX)
    opt_state = jax.eval_shape(TX.init, trainable)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, opt_state, key)
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)
    return point.population * jax.jit(step).lower(frozen, state, micro).cost_analysis()["flops"]


def at(point: Point) -> Cost:
    """What a step of SmolLM2-135M's shape needs."""
    model = models.build(SMALL | {"num_hidden_layers": point.layers})
    method = made("prefix", {"length": point.prefix, "init": "random", "text": None})
    one = cost(model, method, rows(point.batch, point.length))
    return Cost(one.weights, point.population * one.state, point.population * one.kept)


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


def largest(model: Model, method: Method, length: int, devices: int, memory: float) -> tuple[Cost, int]:
    """The bytes of a row, and how many rows fit when weights and state are spread over the devices, and rows too.

    A layer's weights are gathered whole while it computes, and the next one's meanwhile.
    """
    row = cost(model, method, rows(1, length))
    gathered = 0 if devices == 1 else 2 * row.weights // next(iter(model.sites.values())).layers
    free = memory * (1 - RESERVE) - (row.weights + row.state) / devices - gathered
    return row, devices * max(0, int(free // row.kept))


def fits(length: int = 1024) -> str:
    """A line for each base and method: bytes, and the largest batch on each kind of device."""
    lines = [["base", "method", "weights GiB", "trained, Adam GiB", "kept GiB a row", *DEVICES]]
    lines.append(["---"] * len(lines[0]))
    for base, config in BASES.items():
        model = models.build(config)
        for name, options in FITTED.items():
            method = made(name, options)
            found = [largest(model, method, length, *device) for device in DEVICES.values()]
            row = found[0][0]
            gib = [f"{number / GIB:,.3g}" for number in row]
            lines.append([base, name, *gib, *(f"{batch:,} rows" if batch else "-" for _, batch in found)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(growth(), end="\n\n")
    print(fits())

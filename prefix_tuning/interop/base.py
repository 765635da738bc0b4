"""Which frozen model an adaptation belongs to: written beside it, and compared before it is used."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prefix_tuning import hosts
from prefix_tuning.errors import UserError
from prefix_tuning.models import loading
from prefix_tuning.types import Model, Params, Quantised

SAMPLE = 256  # numbers of each weight that a fingerprint looks at
KEY = "base_model"  # what an entry of a file's metadata about the base begins with


def fingerprint(model: Model, frozen: Params) -> str | None:
    """A number, in hexadecimal, of the frozen weights: the same in float32 and bfloat16, None in float16 and int8.

    It hashes the name and shape of every weight and numbers at even distances in it, rounded to bfloat16; others
    would round them otherwise.  What methods and heads keep beside the weights does not count.
    """
    leaves = dict(sorted(loading.flatten({name: frozen[name] for name in model.specs if name in frozen}).items()))
    if any(isinstance(leaf, Quantised) or leaf.dtype not in (np.float32, jnp.bfloat16) for leaf in leaves.values()):
        return None
    found = hashlib.sha256()
    whole = [readable(leaf) for leaf in leaves.values()]
    # In numpy where the numbers can be read as they lie: a program would take longer to compile than these to read.
    some = hosts.fetch(samples([*leaves.values()])) if any(x is None for x in whole) else list(map(sample, whole))
    for (path, leaf), numbers in zip(leaves.items(), some, strict=True):
        found.update(f"{'/'.join(path)} {leaf.shape}".encode())
        found.update(np.asarray(numbers).astype(jnp.bfloat16).tobytes())
    return found.hexdigest()[:32]


@jax.jit  # all at once: a program for each shape would take longer to compile than the weights to load
def samples(leaves: list[Array]) -> list[Array]:
    """`sample` of each array."""
    return list(map(sample, leaves))


def sample(leaf: Any) -> Any:
    """Numbers at even distances in an array, at most `SAMPLE`."""
    picked = np.linspace(0, leaf.size - 1, min(SAMPLE, leaf.size)).astype(np.int64)
    return leaf[np.unravel_index(picked, leaf.shape)]  # by its own axes, so that a sharded weight stays in its shards


def readable(leaf: Any) -> np.ndarray | None:
    """An array that the host can read without a copy: numpy's, or all of one that a CPU device has; None for others."""
    if isinstance(leaf, np.ndarray):
        return leaf
    if not leaf.is_fully_replicated or next(iter(leaf.devices())).platform != "cpu":
        return None
    return np.asarray(leaf.addressable_data(0))


def identity(model: Model, frozen: Params | None) -> dict[str, str]:
    """What a file's metadata says of the base; without its weights only the family."""
    own = {f"{KEY}_type": str(model.config["model_type"])}
    number = None if frozen is None else fingerprint(model, frozen)
    return own | ({} if number is None else {f"{KEY}_fingerprint": number})


def check(metadata: dict[str, Any], model: Model, frozen: Params | None, where: str) -> None:
    """Raises `UserError` if a file's metadata says that it belongs to another base than this; it may say nothing."""
    if not any(key.startswith(KEY) for key in metadata):
        return
    for key, own in identity(model, frozen).items():
        told = metadata.get(key)
        if told is not None and told != own:
            name = key.removeprefix(f"{KEY}_")
            raise UserError(f"{where} belongs to a base model of {name} {told}; this one has {name} {own}")

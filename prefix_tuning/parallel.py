"""One step body on all devices: weights and state replicated, batches split over their rows, also over processes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prefix_tuning import hosts
from prefix_tuning.errors import UserError
from prefix_tuning.types import Batch

AXIS = "data"


def mesh() -> Mesh:
    """All local devices in a row."""
    return Mesh(np.asarray(jax.local_devices()), (AXIS,))


def place(tree: Any) -> Any:
    """The tree on every local device, once; otherwise pmap would broadcast it again at each call."""
    return jax.device_put(tree, NamedSharding(mesh(), PartitionSpec()))


def split_rows(array: Any) -> Any:
    """An array [B ...] with its rows spread over the local devices, for `jax.jit`."""
    return jax.device_put(array, NamedSharding(mesh(), PartitionSpec(AXIS)))


def check_rows(rows: int, accumulate: int = 1, *, own: bool = False) -> None:
    """Raises `UserError` unless `rows` can be split evenly over micro-batches and the devices of all processes.

    Over this process's alone where batches are its `own`.
    """
    devices, several = jax.local_device_count() if own else jax.device_count(), jax.process_count()
    if hosts.count() != several:
        raise UserError(f"JAX runs in {several} processes that have not been joined; start all with --hosts=auto")
    if accumulate < 1 or rows < 1 or rows % (accumulate * devices):
        raise UserError(
            f"a batch of {rows} rows cannot be split over {accumulate} micro-batches and {devices} devices"
            + (f" ({several} processes of {jax.local_device_count()})" if devices > jax.local_device_count() else "")
            + f"; expected a multiple of {max(accumulate, 1) * devices}"
        )


def split_batch(batch: dict[str, np.ndarray], accumulate: int = 1, devices: int | None = None) -> Batch:
    """Leaves [B ...], this process's rows, as [devices A B/(devices A) ...], ready for a pmapped train step.

    devices=None is all the local ones.
    """
    devices = jax.local_device_count() if devices is None else devices
    return Batch(**jax.tree.map(lambda x: x.reshape(devices, accumulate, -1, *x.shape[1:]), batch))


def train_step(step: Callable) -> Callable:
    """A train step over `AXIS`, pmapped; the state is donated, the frozen weights never are."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None, donate_argnums=1)


def eval_step(step: Callable) -> Callable:
    """An evaluation step over `AXIS`, pmapped."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None)

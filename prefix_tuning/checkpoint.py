"""Checkpoints of the `TrainState` through Orbax: asynchronous, atomic, the newest few, each with a checksum.

What lies in shards is written, read and summed up in shards: no host ever has the whole of it.
"""

import contextlib
import itertools
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from prefix_tuning import hosts
from prefix_tuning.errors import UserError
from prefix_tuning.types import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save

import orbax.checkpoint as ocp  # noqa: E402 (it logs while it is imported)

OPENED = itertools.count()  # folders so far, in the same order on all hosts
AT_ONCE = 1 << 22  # words of an array on the host that a checksum looks at together


class Checkpoints:
    """The checkpoints of one run; the frozen weights are never in them."""

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        """Opens or makes the folder; raises `UserError` if it cannot be written."""
        if keep < 1:
            raise UserError(f"train.keep must be at least 1, got {keep}")
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Several hosts meet by names, which two folders that are written at once must not share.
            meetings = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=f"checkpoints_{next(OPENED)}")
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, multiprocessing_options=meetings
            )
            self.manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error.strerror or error}") from error

    def save(self, state: TrainState, **notes: Any) -> None:
        """Starts to write the state, and any JSON notes beside it; returns before it is done."""
        step, items = int(state.step), jax.tree.map(lambda x: x if in_shards(x) else jax.device_get(x), plain(state))
        if step in self.manager.all_steps():
            return
        notes |= {"sums": {name: checksum(tree) for name, tree in items.items()}}
        saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            self.manager.save(step, args=ocp.args.Composite(**saves, notes=ocp.args.JsonSave(notes)), force=True)
        except Exception as error:  # Orbax and TensorStore raise many types, also for the save before this one
            raise unwritable(self.folder, error) from error

    def restore(self, like: TrainState, limit: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest readable state, as `like` and of no later step than `limit`, and its notes; or None.

        Leaves of `like`, arrays or shapes, that lie in shards are read into these, others to the host.  Damaged
        checkpoints are reported by a warning and removed.  Raises `UserError` if all are damaged, since starting over
        would throw the run away.
        """
        found = self.newest(plain(like), limit)
        if found is None:
            return None
        step, items, notes = found
        for damaged in [other for other in self.manager.all_steps() if other > step]:
            self.manager.delete(damaged)
        return unplain(items, like), notes

    def restore_trainable(self, like: Any) -> tuple[Any, int] | None:
        """The newest readable trainable parameters, as `like`, and their step; None if there are none."""
        found = self.newest({"trainable": like})
        return found and (found[1]["trainable"], found[0])

    def newest(
        self, like: dict[str, Any], limit: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """(step, items, notes) of the newest checkpoint whose items, named and laid out as in `like`, are undamaged.

        None later than `limit` is looked at.
        """
        wanted = {name: jax.tree.map(target, tree) for name, tree in like.items()}
        steps = sorted((s for s in self.manager.all_steps() if limit is None or s <= limit), reverse=True)
        for step in steps:
            found, wrong = None, None
            try:
                found = self.read(step, wanted)
            except Exception as error:  # whatever a damaged file makes the reader raise
                wrong = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            # Each host reads its own shards, and what one of them cannot read is lost to all.
            wrong = next(filter(None, hosts.gather(wrong)), None) or wrong_sum(*found)
            if wrong is None:
                return step, *found
            told = f"checkpoint {self.folder / str(step)} is damaged ({wrong})"
            warnings.warn(told if step == steps[-1] else f"{told}; trying the one before", stacklevel=3)
        if steps:
            raise UserError(f"every checkpoint in {self.folder} is damaged (steps {steps}); use another workdir")
        return None

    def read(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(items, notes) of a checkpoint; raises what a damaged file makes Orbax raise."""
        # Not through the manager, whose hosts meet after a restore, where one that could not read does not come.
        place, arrays, notes = self.folder / str(step), ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
        with contextlib.closing(arrays), contextlib.closing(notes):
            read = {
                name: arrays.restore(place / name, args=ocp.args.StandardRestore(tree)) for name, tree in wanted.items()
            }
            noted = notes.restore(place / "notes", args=ocp.args.JsonRestore())
        for name, tree in wanted.items():
            if jax.tree.map(np.shape, read[name]) != jax.tree.map(np.shape, tree):
                raise ValueError(f"the shapes of {name} are not those of this run")
        return read, noted

    def wait(self) -> None:
        """Blocks until what was saved is on disk; raises `UserError` if it could not be written."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise unwritable(self.folder, error) from error

    def close(self) -> None:
        """Waits, then frees the background threads."""
        self.wait()
        self.manager.close()


def plain(state: TrainState) -> dict[str, Any]:
    """The state as two items of nested dicts of ordinary arrays; the trainable one can be restored alone."""
    leaves = jax.tree.leaves(state.opt_state)
    progress = {
        "step": state.step,
        "key": key_data(state.key),
        "opt_state": {f"{i:03d}": leaf for i, leaf in enumerate(leaves)},
    }
    return {"trainable": state.trainable, "progress": progress}


def unplain(items: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of `plain`, with the structure of `like`."""
    progress = items["progress"]
    leaves = [progress["opt_state"][name] for name in sorted(progress["opt_state"])]
    return TrainState(
        step=progress["step"],
        trainable=items["trainable"],
        opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves),
        key=jax.random.wrap_key_data(progress["key"]),
    )


def wrong_sum(items: dict[str, Any], notes: dict[str, Any]) -> str | None:
    """What is wrong with the contents of a checkpoint, if anything; of several hosts, all must call it."""
    if "checksums" in notes:
        return None  # of an older version, which could not sum up shards
    sums = {name: checksum(tree) for name, tree in items.items()}
    differing = [name for name in items if sums[name] != notes.get("sums", {}).get(name)]
    return f"the contents of {' and '.join(differing)} do not match their checksum" if differing else None


def key_data(key: Array | jax.ShapeDtypeStruct) -> Array | jax.ShapeDtypeStruct:
    """A key's numbers, of a shape their shape."""
    if isinstance(key, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, key)
    return jax.random.key_data(key)


def in_shards(x: Any) -> bool:
    """Whether an array, or one that a shape describes, lies in parts on several devices."""
    where = getattr(x, "sharding", None)
    return isinstance(where, NamedSharding) and not where.is_fully_replicated


def target(x: Any) -> np.ndarray | jax.ShapeDtypeStruct:
    """What Orbax reads an array into."""
    if in_shards(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return np.zeros(x.shape, x.dtype)


def checksum(tree: Any) -> int:
    """A 32-bit sum over every leaf, the same on the host and in shards; where these are of several hosts, all must
    call it."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        own = sum_of_shards(leaf) if in_shards(leaf) else sum_on_host(np.asarray(leaf))
        total = (31 * total + int(own)) % (1 << 32)
    return total


def sum_on_host(array: np.ndarray) -> int:
    """The `mixed_sum` of an array, a part at a time."""
    words = np.ascontiguousarray(array).reshape(-1).view(word(array.dtype))
    total = 0
    for start in range(0, len(words), AT_ONCE):
        part = words[start : start + AT_ONCE]
        total += int(mixed_sum(part, np.arange(start, start + len(part)).astype(np.uint32)))
    return total


@jax.jit
def sum_of_shards(array: Array) -> Array:
    """The `mixed_sum` of an array, on the devices that have it."""
    words, place = array.view(word(array.dtype)), jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return mixed_sum(words, place)


def word(dtype: np.dtype) -> str:
    """The unsigned integers that an array's bits are taken for, of 4 bytes at most."""
    return f"u{min(dtype.itemsize, 4)}"


def mixed_sum(words: Any, place: Any) -> Any:
    """The sum of the words, each mixed with its place by what can be undone: so no single one can change unseen."""
    return mixed(words.astype(np.uint32) ^ mixed(place)).sum(dtype=np.uint32)


def mixed(words: Any) -> Any:
    """The words with every bit spread over all, one to one."""
    for factor in (0x9E3779B1, 0x85EBCA6B):
        words = words * np.uint32(factor)
        words = words ^ (words >> np.uint32(15))
    return words


def unwritable(folder: Path, error: Exception) -> UserError:
    """One line for a disk that is full or a folder that may not be written."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return UserError(f"cannot write a checkpoint to {folder}: {reason}; what was saved before is still there")

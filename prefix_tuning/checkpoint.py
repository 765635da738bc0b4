"""Checkpoints of the `TrainState` through Orbax: asynchronous, atomic, the newest few, each with a checksum."""

import itertools
import logging
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prefix_tuning import hosts
from prefix_tuning.errors import UserError
from prefix_tuning.types import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save

import orbax.checkpoint as ocp  # noqa: E402 (it logs while it is imported)

OPENED = itertools.count()  # folders so far, in the same order on all hosts


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
        step, items = int(state.step), hosts.fetch(plain(state))
        if step in self.manager.all_steps():
            return
        notes |= {"checksums": {name: checksum(tree) for name, tree in items.items()}}
        saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            self.manager.save(step, args=ocp.args.Composite(**saves, notes=ocp.args.JsonSave(notes)), force=True)
        except Exception as error:  # Orbax and TensorStore raise many types, also for the save before this one
            raise unwritable(self.folder, error) from error

    def restore(self, like: TrainState, limit: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest readable state, shaped as `like` and of no later step than `limit`, and its notes; or None.

        Damaged ones are reported by a warning and removed.  Raises `UserError` if all are damaged, since starting over
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
        """The newest readable trainable parameters, shaped as `like`, and their step; None if there are none."""
        found = self.newest({"trainable": like})
        return found and (found[1]["trainable"], found[0])

    def newest(
        self, like: dict[str, Any], limit: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """(step, items, notes) of the newest checkpoint whose items, named and shaped as in `like`, are undamaged.

        None later than `limit` is looked at.
        """
        wanted = {name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree) for name, tree in like.items()}
        restores = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        steps = sorted((s for s in self.manager.all_steps() if limit is None or s <= limit), reverse=True)
        for step in steps:
            try:
                read = self.manager.restore(step, args=ocp.args.Composite(**restores, notes=ocp.args.JsonRestore()))
                for name in like:
                    if jax.tree.map(np.shape, read[name]) != jax.tree.map(np.shape, wanted[name]):
                        raise ValueError(f"the shapes of {name} are not those of this run")
                    if read.notes["checksums"][name] != checksum(read[name]):
                        raise ValueError(f"the contents of {name} do not match their checksum")
            except Exception as error:  # whatever a damaged file makes the reader raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                path = self.folder / str(step)
                told = f"checkpoint {path} is damaged ({reason})"
                warnings.warn(told if step == steps[-1] else f"{told}; trying the one before", stacklevel=3)
                continue
            return step, {name: read[name] for name in like}, read.notes
        if steps:
            raise UserError(f"every checkpoint in {self.folder} is damaged (steps {steps}); use another workdir")
        return None

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
        "key": jax.random.key_data(state.key),
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


def checksum(tree: Any) -> int:
    """CRC-32 over the bytes of every leaf, in order."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
    return total


def unwritable(folder: Path, error: Exception) -> UserError:
    """One line for a disk that is full or a folder that may not be written."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return UserError(f"cannot write a checkpoint to {folder}: {reason}; what was saved before is still there")

"""One step body on many devices, also of several processes: replicated, everything on each and batches split over their
rows; or sharded, the weights split as well, by rules that are data."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prefix_tuning import hosts
from prefix_tuning.data.pipeline import WHOLE as ALL_ROWS
from prefix_tuning.data.pipeline import Part
from prefix_tuning.errors import OptionError, UserError, valid
from prefix_tuning.registry import call
from prefix_tuning.sharding import DATA, MODEL, partition
from prefix_tuning.types import Batch, Params, Spec

AXIS, HOSTS = DATA, "hosts"
WHOLE = PartitionSpec()


def mesh() -> Mesh:
    """All local devices in a row."""
    return Mesh(np.asarray(jax.local_devices()), (AXIS,))


def everywhere() -> Mesh:
    """The devices of all processes [hosts data]."""
    return Mesh(np.asarray(devices()).reshape(jax.process_count(), -1), (HOSTS, AXIS))


def devices() -> list[jax.Device]:
    """Those of all processes, one process after the other."""
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def joined(tree: Any, mesh: Mesh) -> Any:
    """What `place` made in every process, as arrays on the devices of all: nothing is copied."""
    where = NamedSharding(mesh, WHOLE)

    def join(x: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(x.shape, where, [shard.data for shard in x.addressable_shards])

    return jax.tree.map(join, tree)


def assembled(array: np.ndarray, where: NamedSharding, axis: int, part: Part) -> jax.Array:
    """An array on the devices of all processes, of which each has a `part` along an axis."""
    own = array.shape[axis]
    shape = (*array.shape[:axis], own * part.count, *array.shape[axis + 1 :])

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[axis].indices(shape[axis])
        here = slice(start - part.index * own, stop - part.index * own)
        return array[(*index[:axis], here, *index[axis + 1 :])]

    return jax.make_array_from_callback(shape, where, shard)


def place(tree: Any) -> Any:
    """The tree on every local device, once; otherwise pmap would broadcast it again at each call."""
    return jax.device_put(tree, NamedSharding(mesh(), PartitionSpec()))


def split_rows(array: Any) -> Any:
    """An array [B ...] with its rows spread over the local devices, for `jax.jit`."""
    return jax.device_put(array, NamedSharding(mesh(), PartitionSpec(AXIS)))


def check_rows(rows: int, accumulate: int, devices: int) -> None:
    """Raises `OptionError` unless `rows` can be split evenly over micro-batches and devices."""
    several, local = jax.process_count(), jax.local_device_count()
    if hosts.count() != several:
        raise UserError(f"JAX runs in {several} processes that have not been joined; start all with --hosts=auto")
    if accumulate < 1 or rows < 1 or rows % (accumulate * devices):
        raise OptionError(
            f"batch_size: a batch of {rows} rows cannot be split over {accumulate} micro-batches and {devices} devices"
            + (f" ({several} processes of {local})" if devices > local else "")
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


class Replicated:
    """The layout in which everything is on every local device, and the step itself sums over them, under pmap."""

    axis = AXIS
    apart = True  # each process has the model, and computes by itself what needs no sum over all rows
    refills = True  # so does each device, and need not wait for others when a row is done
    place = staticmethod(place)
    split_rows = staticmethod(split_rows)
    split_batch = staticmethod(split_batch)
    eval_step = staticmethod(eval_step)

    def where(self, spec: Spec) -> NamedSharding:
        """Where a weight lies."""
        del spec  # they are all alike
        return NamedSharding(mesh(), WHOLE)

    def like(self, shapes: Any) -> Any:
        """The shapes of a tree, which say where it is to be read to: here to the host, for `place`."""
        return shapes

    def check_rows(self, rows: int, accumulate: int = 1, *, own: bool = False) -> None:
        """Raises `OptionError` unless `rows` can be split evenly over micro-batches and the devices of all processes.

        Over this process's alone where batches are its `own`.
        """
        check_rows(rows, accumulate, jax.local_device_count() if own else jax.device_count())

    def part(self, accumulate: int = 1) -> Part:
        """The rows of every batch that this process makes."""
        del accumulate  # gradients are sums over all micro-batches
        return Part(hosts.index(), hosts.count())

    def split_eval_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """Leaves [B ...], this process's part, for `eval_step`."""
        return jax.tree.map(lambda x: x[:, 0], split_batch(batch))

    def train_step(self, step: Callable, state: Any) -> Callable:
        """A train step for this layout; what comes out lies where `state` does."""
        del state
        return train_step(step)

    def jit(self, function: Callable) -> Callable:
        """A compiled function (params, adaptation, rows ...) -> what one can read."""
        return jax.jit(function)

    def rows(self, array: np.ndarray) -> jax.Array:
        """An array [B ...], of which each device has its part, for what `each` makes."""
        return split_rows(array.reshape(jax.local_device_count(), -1, *array.shape[1:]))

    def each(self, function: Callable, **options: Any) -> Callable:
        """A compiled function (params, adaptation, key, trees of rows ...) -> a tree of rows, that each device computes
        for itself with loops of its own; options are `jax.jit`'s."""

        def own(params: Any, adaptation: Any, key: Any, *rows: Any) -> Any:
            found = function(params, adaptation, key, *jax.tree.map(lambda x: x[0], rows))
            return jax.tree.map(lambda x: x[None], found)

        def on_all(params: Any, adaptation: Any, key: Any, *rows: Any) -> Any:
            specs = WHOLE, WHOLE, WHOLE, *[PartitionSpec(AXIS)] * len(rows)
            split = jax.shard_map(own, mesh=mesh(), in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)
            return split(params, adaptation, key, *rows)

        return jax.jit(on_all, **options)

    def read(self, rows: Any) -> Any:
        """A tree of rows that `each` gave as arrays [B ...] on the host."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(rows))

    def by_run(self, runs: int) -> bool:
        """Whether so many runs that train in one step are spread over a host's devices, or else their rows."""
        return runs % jax.local_device_count() == 0

    def held(self, tree: Any) -> int:
        """The bytes of a tree, of arrays or shapes, on each device."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Sharded:
    """The layout in which weights are split over a mesh [data model] by the `RULES` of sharding.py, and with them what
    is trained as their copy; a step is one computation of all processes, under jit, whose sums over rows XLA splits."""

    axis = None
    apart = False
    refills = False

    def __init__(self, specs: Params, data: int, model: int):
        """For the weights that `specs` describe, on data x model devices."""
        # Those of a process stand side by side, along `model` first: what is exchanged most stays within a host.
        self.mesh = Mesh(np.asarray(devices()).reshape(data, model), (AXIS, MODEL))
        leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, Spec))
        self.specs = {names(path): spec for path, spec in leaves}

    def where(self, spec: Spec) -> NamedSharding:
        """Where a weight lies."""
        return self.on(partition(spec.axes, spec.shape, self.mesh.shape))

    def on(self, spec: PartitionSpec) -> NamedSharding:
        """A sharding of this mesh."""
        return NamedSharding(self.mesh, spec)

    def sharding(self, path: tuple, leaf: Any) -> NamedSharding:
        """Where an array of some tree lies: as the weight that its path ends in, if it has its shape, L aside; else
        whole everywhere.  So moments in an optimizer's state lie where their parameters do."""
        ends = names(path)
        for start in range(len(ends)):
            spec = self.specs.get(ends[start:])
            if spec is not None and len(leaf.shape) == len(spec.shape) and leaf.shape[1:] == spec.shape[1:]:
                return self.on(partition(spec.axes, leaf.shape, self.mesh.shape))
        return self.on(WHOLE)

    def shardings(self, tree: Any) -> Any:
        """`sharding` of each leaf of a tree of arrays or shapes."""
        return jax.tree_util.tree_map_with_path(self.sharding, tree)

    def like(self, shapes: Any) -> Any:
        """As for `Replicated`; here each into its shards."""
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, self.shardings(shapes)
        )

    def place(self, tree: Any) -> Any:
        """The tree on the mesh, once."""
        return hosts.spread(tree, self.shardings(tree))

    def check_rows(self, rows: int, accumulate: int = 1, *, own: bool = False) -> None:
        """As for `Replicated`, over the data axis alone."""
        del own
        check_rows(rows, accumulate, self.mesh.shape[AXIS])

    def part(self, accumulate: int = 1) -> Part:
        """As for `Replicated`; those of every micro-batch.  Processes whose devices share rows make the same ones."""
        own = [any(one.process_index == jax.process_index() for one in row) for row in self.mesh.devices]
        first, count = own.index(True), sum(own)
        if len(own) % count or first % count:  # its devices begin or end amid those of a row: it makes all
            return Part(blocks=accumulate)
        return Part(first // count, len(own) // count, accumulate)

    def split_rows(self, array: np.ndarray, axis: int = 0, part: Part = ALL_ROWS) -> jax.Array:
        """An array with its rows, on this axis, spread over the mesh's data axis; the given ones are this `part`."""
        return assembled(array, self.on(PartitionSpec(*[None] * axis, AXIS)), axis, part)

    def split_batch(self, batch: dict[str, np.ndarray], accumulate: int = 1) -> Batch:
        """Leaves [B ...], this process's part, as [A B/A ...] of all, ready for `train_step`."""
        parts = {name: x.reshape(accumulate, -1, *x.shape[1:]) for name, x in batch.items()}
        return Batch(**{name: self.split_rows(x, 1, self.part()) for name, x in parts.items()})

    def split_eval_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """As for `Replicated`."""
        return Batch(**{name: self.split_rows(x, 0, self.part()) for name, x in batch.items()})

    def train_step(self, step: Callable, state: Any) -> Callable:
        """As for `Replicated`: the state is donated, the frozen weights never are."""
        return jax.jit(self.told(step), donate_argnums=1, out_shardings=(self.shardings(state), self.on(WHOLE)))

    def eval_step(self, step: Callable) -> Callable:
        """As for `Replicated`."""
        return self.jit(step)

    def jit(self, function: Callable) -> Callable:
        """As for `Replicated`; every process can read what comes out."""
        return jax.jit(self.told(function), out_shardings=self.on(WHOLE))

    def rows(self, array: np.ndarray) -> jax.Array:
        """As for `Replicated`."""
        return self.split_rows(array)

    def each(self, function: Callable, **options: Any) -> Callable:
        """As for `Replicated`, but computed by all devices together; what comes out stays where it is made."""
        return jax.jit(self.told(function), **options)

    def read(self, rows: Any) -> Any:
        """As for `Replicated`."""
        return jax.device_get(jax.jit(lambda x: x, out_shardings=self.on(WHOLE))(rows))

    def told(self, function: Callable) -> Callable:
        """The function, which knows this mesh while it is traced; `sharding.spread` asks for it."""

        def traced(*arguments: Any) -> Any:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return function(*arguments)

        return traced

    def by_run(self, runs: int) -> bool:
        """As for `Replicated`."""
        del runs
        return False

    def held(self, tree: Any) -> int:
        """As for `Replicated`."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return sum(math.prod(self.sharding(path, x).shard_shape(x.shape)) * x.dtype.itemsize for path, x in leaves)


Layout = Replicated | Sharded


def told_of(weights: Params) -> contextlib.AbstractContextManager:
    """In which what is traced knows the mesh that weights are split over, if they are, as `Sharded.told` says."""
    where = getattr(jax.tree.leaves(weights)[0], "sharding", None)
    if not isinstance(where, NamedSharding):
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(where.mesh.abstract_mesh)


def names(path: tuple) -> tuple[str, ...]:
    """The keys of nested dicts that a path ends in, or that lead to the numbers of a `Quantised`."""
    found: list[str] = []
    in_8_bits = path[-1:] == (jax.tree_util.GetAttrKey("values"),)
    for entry in reversed(path[:-1] if in_8_bits else path):
        if not isinstance(entry, jax.tree_util.DictKey):
            break
        found.insert(0, entry.key)
    return tuple(found)


def make(specs: Params, kind: str = "replicated", sizes: dict[str, int | None] | None = None) -> Layout:
    """The layout that a config's `parallel` and section `mesh` ask for, for a model's weights; raises `UserError`."""
    valid("parallel", kind, ("replicated", "sharded"))
    if kind == "sharded":
        return Sharded(specs, *call("mesh", mesh_sizes, sizes or {}, jax.device_count()))
    if any(size is not None for size in (sizes or {}).values()):
        raise UserError(f"mesh={sizes} goes with parallel=sharded; with parallel={kind} it would do nothing")
    return Replicated()


def mesh_sizes(devices: int, *, data: int | None = None, model: int | None = None) -> tuple[int, int]:
    """(data, model) on so many devices: what is None takes the rest, both the weights' shards over all of them.

    Raises `UserError` for sizes that do not make the number of devices.
    """
    given = data, model
    if model is None:
        model = 1 if data is None else devices // max(data, 1)
    if data is None:
        data = devices // max(model, 1)
    if data < 1 or data * model != devices:
        told = " and ".join(f"mesh.{n}={x}" for n, x in zip((AXIS, MODEL), given, strict=True) if x is not None)
        known = ", ".join(f"{d} x {m}" for d, m in meshes(devices))
        raise UserError(f"{told} cannot be on {devices} devices; valid, data x model: {known}")
    return data, model


def here(config: dict[str, Any]) -> dict[str, Any]:
    """What a finished run's config must change on these devices: a mesh of another number gives way to the default,
    and attention by cuDNN to the plain one where there is none."""
    changed = {}
    try:
        call("mesh", mesh_sizes, config.get("mesh") or {}, jax.device_count())
    except UserError:
        changed["mesh"] = {}
    if config.get("model", {}).get("attention") == "cudnn" and not has_cudnn():
        changed["model"] = config["model"] | {"attention": "plain"}
    return changed


def has_cudnn() -> bool:
    """Whether the local devices are NVIDIA's, of a kind that cuDNN has attention for."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # "9.0"; AMD's begin with letters
    return capability[:1].isdigit() and float(capability) >= 8


def meshes(devices: int) -> list[tuple[int, int]]:
    """Every (data, model) on so many devices."""
    return [(devices // model, model) for model in range(1, devices + 1) if devices % model == 0]


def memory_limit() -> int | None:
    """The bytes that a device can hold; None where it does not say so, as a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def check_memory(layout: Layout, specs: Params, parts: dict[str, Any], limit: int | None) -> None:
    """Raises `UserError` if what stays on a device all the time, trees of shapes by name, is more than its limit.

    Activations come on top of it.
    """
    needed = layout.held(list(parts.values()))
    if limit is None or needed <= limit:
        return
    told = " + ".join(f"{name} {gibibytes(layout.held(tree))}" for name, tree in parts.items())
    wrong = f"{told} are {gibibytes(needed)} on each device, which can hold {gibibytes(limit)}"
    each = {sizes: Sharded(specs, *sizes).held(list(parts.values())) for sizes in meshes(jax.device_count())}
    fitting = [f"mesh.data={d}, mesh.model={m}: {gibibytes(each[d, m])}" for d, m in each if each[d, m] <= limit]
    if not fitting:
        least = gibibytes(min(each.values()))
        raise UserError(
            f"{wrong}; with parallel=sharded it is {least} on each of the {jax.device_count()} devices here; "
            "expected more devices, model.dtype=bfloat16 or a smaller model"
        )
    raise UserError(f"{wrong}; expected parallel=sharded, with {' or '.join(fitting[:3])} each")


def gibibytes(size: int) -> str:
    """A number of bytes, to be read."""
    return f"{size / 2**30:.3g} GiB"

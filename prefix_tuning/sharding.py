"""How weights are split over a mesh of devices, and what XLA has to be told of it while it partitions a computation."""

import jax
from jax import Array
from jax.sharding import PartitionSpec

DATA, MODEL = "data", "model"  # the axes of a mesh: over the first, rows are spread as well
# Mesh axis -> the logical axes of a weight that it may split, the first that it divides.  A weight that has none of
# them, or none that it divides, is whole on all devices along that mesh axis: 9 heads on 4 devices are no error.
RULES = {
    MODEL: ("vocabulary", "kv_heads", "mlp", "groups"),  # tensor parallelism: each device computes its part
    DATA: ("width",),  # fully sharded data parallelism: XLA gathers a layer's weights where it needs them
}


def partition(axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """How a weight with these logical axes is split over a mesh of these sizes, by `RULES`."""
    found: dict[str, str] = {}
    for mesh_axis, wanted in RULES.items():
        for name in wanted:
            # A vector per layer is small, and gathering it costs more than it saves.
            long = len(set(axes) - {"layers"}) > 1 or mesh_axis != DATA
            if name in axes and long and shape[axes.index(name)] % sizes[mesh_axis] == 0:
                found[name] = mesh_axis
                break
    return PartitionSpec(*(found.get(name) for name in axes))


def gathered(weight: Array, axes: tuple[str | None, ...]) -> Array:
    """A weight with these logical axes, or a layer of it, whole along the mesh's data axis; elsewhere as it is.

    Without a word XLA may first compute the dtype that it is used in, and gather that.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if DATA not in mesh.auto_axes:
        return weight
    split = partition(axes[len(axes) - weight.ndim :], weight.shape, mesh.shape)
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(*(None if axis == DATA else axis for axis in split)))


def spread(x: Array) -> Array:
    """x [B ...] with its rows over the mesh's data axis, where XLA partitions a computation; elsewhere as it is.

    Without a word XLA may split activations as weights are, over their width, and then hold all rows on each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if DATA not in mesh.auto_axes or len(x) % mesh.shape[DATA]:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(DATA))


def row_groups(rows: int) -> int:
    """Over how many devices `spread` spreads the rows of a batch; 1 where it leaves them as they are."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if DATA not in mesh.auto_axes or rows % mesh.shape[DATA] else mesh.shape[DATA]

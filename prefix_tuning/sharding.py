"""What XLA has to be told of a mesh while it partitions a computation over its devices."""

import jax
from jax import Array

DATA = "data"  # the axis of a mesh that rows are spread over


def spread(x: Array) -> Array:
    """x [B ...] with its rows over the mesh's data axis, where XLA partitions a computation; elsewhere as it is.

    Without a word XLA may split activations as weights are, over their width, and then hold all rows on each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if DATA not in mesh.auto_axes or len(x) % mesh.shape[DATA]:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(DATA))


def row_groups(rows: int) -> int:
    """Over how many devices `spread` spreads the rows of a batch; 1 where it leaves them as they are."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if DATA not in mesh.auto_axes or rows % mesh.shape[DATA] else mesh.shape[DATA]

"""The device mesh and where arrays lie on it."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """One axis `data` over all devices; Auto axes, so that folding [B, N] into [B*N] stays a plain reshape."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rigs over `data`; the cameras of a rig stay together."""
    return NamedSharding(mesh, PartitionSpec("data"))


def spread(batch: dict[str, Any]) -> dict[str, Any]:
    """A NumPy batch over all devices where its size allows it, else unchanged (each device then computes all of it)."""
    devices = jax.device_count()
    if devices == 1 or any(len(array) % devices for array in batch.values()):
        return batch
    sharding = batch_sharding(make_mesh())
    return {name: jax.device_put(array, sharding) for name, array in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())

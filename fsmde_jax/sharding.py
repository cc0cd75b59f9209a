"""The device mesh and where arrays lie on it.

Rigs are spread over all devices. Parameters and their optimiser state are whole on every device (`train.fsdp` = 1), or
the large ones are divided over groups of `train.fsdp` devices and gathered where a step uses them (fully sharded data
parallelism, FSDP).
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fsmde_jax.errors import ConfigError

DATA, FSDP = "data", "fsdp"
MIN_SHARDED = 2**14  # elements; what is smaller costs more to gather than it saves


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """Axes `data` x `fsdp` over `devices` (default: all of all processes).

    Auto axes, so that folding [B, N] into [B*N] stays a plain reshape.

    Raises:
      ConfigError: the devices cannot be divided into groups of `fsdp`.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise ConfigError(
            f"train.fsdp = {fsdp}: the {len(devices)} devices cannot be divided into groups of that size; choose a"
            f" divisor of {len(devices)}"
        )
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rigs over all devices; the cameras of a rig stay together."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_size(tree: Any, mesh: Mesh) -> Any:
    """Tree of shardings for a tree of arrays or shapes: what has `MIN_SHARDED` elements or more is divided over `fsdp`.

    Divided is the longest axis that the group's size divides, of equal ones the last; without such an axis the array
    stays whole.
    """
    group = mesh.shape[FSDP]

    def one(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        axes = [axis for axis, length in enumerate(shape) if length % group == 0]
        if group == 1 or not axes or np.prod(shape) < MIN_SHARDED:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: (shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*(FSDP if axis == longest else None for axis in range(len(shape)))))

    return jax.tree.map(one, tree)


def gathered(tree: Any, mesh: Mesh) -> Any:
    """Inside a jitted function: the arrays whole on every device, as FSDP uses them. Nothing to do without FSDP."""
    if mesh.shape[FSDP] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def mesh_here(mesh: Mesh) -> Mesh:
    """`mesh` itself, or that of this process's own devices where there are several processes."""
    return mesh if jax.process_count() == 1 else make_mesh(devices=jax.local_devices())


def whole_here(tree: Any, mesh: Mesh) -> Any:
    """Arrays that live on `mesh` as this process can use them by itself, e.g. to evaluate its share of the records."""
    if mesh.shape[FSDP] > 1:
        tree = jax.jit(lambda t: t, out_shardings=replicated(mesh))(tree)
    if jax.process_count() == 1:
        return tree
    here = replicated(mesh_here(mesh))
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf.addressable_data(0)), here), tree)


def spread(batch: dict[str, Any]) -> dict[str, Any]:
    """A NumPy batch over this process's devices where its size allows it, else unchanged (each computes all of it)."""
    devices = jax.local_devices()
    if len(devices) == 1 or any(len(array) % len(devices) for array in batch.values()):
        return batch
    sharding = batch_sharding(make_mesh(devices=devices))
    return {name: jax.device_put(array, sharding) for name, array in batch.items()}

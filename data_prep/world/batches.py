"""Training batches straight from the renderer, without disk: `for batch in batches(rig, batch_size=8, seed=0): ...`.

The same entries as the record pipeline's (docs/data_format.md), made and kept on the device: labels are the sweep's
points at their nearest pixel, the nearest point wins. Sample k of a stream depends on (seed, split, k) alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world import drive
from data_prep.world.lidar import Sweep
from data_prep.world.rigs import Rig
from data_prep.world.scene import Scene, sample_scene, scene_key
from fsmde_jax import geometry
from fsmde_jax.data import dense
from fsmde_jax.errors import ConfigError

Batch = dict[str, Any]


def scatter_sweep(
    sweep: Sweep, sensor_to_world: jax.Array, camera_to_world: jax.Array, intrinsics: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """Sparse z-depth [N, H, W] metres (0 = none) of a sweep in N cameras [N, 4, 4], [N, 3, 3]."""
    height, width = size
    world = geometry.transform_points(sensor_to_world, sweep.points)

    def one(pose: jax.Array, k: jax.Array) -> jax.Array:
        local = geometry.transform_points(geometry.invert_rigid(pose), world)
        z = local[:, 2]
        front = sweep.valid & (z > 1e-3)
        uv = (local[:, :2] @ k[:2, :2].T) / jnp.where(front, z, 1.0)[:, None] + k[:2, 2]
        column, row = (jnp.floor(uv[:, i] + 0.5).astype(jnp.int32) for i in (0, 1))
        inside = front & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        target = jnp.where(inside, row * width + column, height * width)  # one place more takes what is outside
        nearest = jnp.full(height * width + 1, jnp.inf).at[target].min(z)[:-1]
        return jnp.where(jnp.isfinite(nearest), nearest, 0.0).reshape(height, width)

    return jax.vmap(one)(camera_to_world, intrinsics)


def sample_function(rig: Rig, *, samples: int = 1) -> Callable[[Scene, jax.Array], Batch]:
    """(scene, int32 microseconds) -> the arrays of one rig sample; a pure function, jit and vmap it.

    Raises:
      ConfigError: the rig's cameras differ in image size, so that they do not fit one array.
    """
    sizes = {camera.size for camera in rig.cameras.values()}
    if len(sizes) != 1:
        raise ConfigError(
            f"rig {rig.name}: its images have the sizes {sorted(sizes)}; one batch needs one size,"
            " use rigs.scaled(rig, size=(H, W))"
        )
    (size,) = sizes
    cameras = list(rig.cameras.values())
    intrinsics = np.stack([camera.intrinsics for camera in cameras]).astype(np.float32)
    cam_to_ego = np.stack([camera.cam_to_ego for camera in cameras]).astype(np.float32)
    masks = np.stack([mask for mask in drive.body_masks(rig).values()])
    render = drive.frame_function(rig, samples=samples)

    def sample(world: Scene, time_us: jax.Array) -> Batch:
        frame = render(world, time_us)
        (views,) = frame.views
        sensor_to_world = frame.lidar_ego @ jnp.asarray(rig.lidar.sensor_to_ego, jnp.float32)
        depth = scatter_sweep(
            frame.sweep, sensor_to_world, frame.camera_ego @ cam_to_ego, jnp.asarray(intrinsics), size
        )
        return {
            "images": views.rgb,
            "intrinsics": jnp.asarray(intrinsics),
            "cam_to_ego": jnp.asarray(cam_to_ego),
            "ego_to_global": frame.camera_ego,  # relative to the anchor's cell; only differences mean anything
            "depth": depth,
            "dense_depth": jnp.where(views.depth < dense.MAX_DEPTH, views.depth, 0.0),  # as far as records reach
            "ego_mask": jnp.asarray(masks),
            "view_mask": jnp.ones(len(cameras), bool),
        }

    return sample


def batches(
    rig: Rig, *, batch_size: int, seed: int, split: str = "train", start: int = 0, frames_per_scene: int = 1,
    samples: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """Endless batches of rendered rigs.

    Args:
      rig: all images of one size (`rigs.scaled(read_rig("nuscenes"), size=(352, 640))`).
      batch_size: rigs per batch, B.
      seed, split: which scenes; splits ("train", "val", "test") never share one.
      start: number of the first sample, to go on where another stream stopped.
      frames_per_scene: consecutive keyframes taken of every scene.
      samples: rays per pixel along each axis for the colours, 1 or 2.

    Yields:
      images [B, N, H, W, 3] uint8, intrinsics [B, N, 3, 3], cam_to_ego, ego_to_global [B, N, 4, 4], depth and
      dense_depth [B, N, H, W] metres (0 = none), ego_mask [B, N, H, W], view_mask [B, N], record_index [B] (host).

    Raises:
      ConfigError: images of different sizes, or a batch_size or frames_per_scene below 1.
    """
    for name, value in (("batch_size", batch_size), ("frames_per_scene", frames_per_scene)):
        if value < 1:
            raise ConfigError(f"{name} = {value}: must be at least 1")
    if frames_per_scene / rig.keyframe_rate > 1000:
        raise ConfigError(f"frames_per_scene = {frames_per_scene}: a scene lasts at most 1000 s")
    one = sample_function(rig, samples=samples)

    def rendered(item: tuple[jax.Array, jax.Array]) -> Batch:
        return one(sample_scene(item[0]), item[1])

    @jax.jit
    def batch(keys: jax.Array, times_us: jax.Array) -> Batch:
        items = (keys, times_us)
        # One by one, a CPU skips what a view does not show (drive.py).
        return jax.lax.map(rendered, items) if jax.default_backend() == "cpu" else jax.vmap(rendered)(items)

    while True:
        numbers = np.arange(start, start + batch_size, dtype=np.int64)
        keys = jnp.stack([scene_key(seed, split, int(n) // frames_per_scene) for n in numbers])
        times = jnp.asarray([round(int(n) % frames_per_scene * 1e6 / rig.keyframe_rate) for n in numbers], jnp.int32)
        yield batch(keys, times) | {"record_index": numbers}
        start += batch_size

"""Pictures of a scene with exact depth: rays, shading and the sensor, for one pinhole camera."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from data_prep.world import pavement, sensor, shading
from data_prep.world.primitives import Geometry
from data_prep.world.raycast import NOTHING, Hits, Tiles, pinhole_tiles, trace, untile
from data_prep.world.shadow import Shadow, shadow_map
from data_prep.world.texture import hashed

if TYPE_CHECKING:
    from data_prep.world.scene import Scene

__all__ = ["Image", "Shadow", "render_camera", "shadow_map"]
_TILE = (32, 64)


class Image(NamedTuple):
    """One camera's picture; pixel (0, 0) is the centre of the upper left one."""

    rgb: jax.Array  # [H, W, 3] uint8, sRGB
    depth: jax.Array  # [H, W] float32 metres along the optical axis at pixel centres; 0 = sky
    semantic: jax.Array  # [H, W] uint8, `surfaces.Semantic`


def _radiance(
    rows: shading.Surfaces, ground: pavement.Ground, shadow: Shadow, scene: Scene, tiles: Tiles, hits: Hits,
    steps: tuple[jax.Array, jax.Array], seed: jax.Array,
) -> jax.Array:  # fmt: skip
    """[T, R, 3] linear colours of traced tiles."""
    count, _, rays = tiles.directions.shape

    def one(item: tuple) -> jax.Array:
        index, direction, hit = item
        jitter = hashed(seed, index, jnp.arange(rays))
        out = shading.shade(rows, ground, shadow, scene.light, tiles.origin, direction, *steps, hit, jitter)
        return out.T

    items = (jnp.arange(count), tiles.directions, hits)
    if jax.default_backend() == "cpu":  # tiles one by one skip the materials that they do not show
        return jax.lax.map(one, items)
    return jax.vmap(one)(items)


def render_camera(
    scene: Scene, geometry: Geometry, shadow: Shadow, anchor: jax.Array, camera_to_world: jax.Array,
    intrinsics: jax.Array, size: tuple[int, int], key: jax.Array, *, samples: int = 1,
    camera: sensor.Sensor | None = None,
) -> Image:  # fmt: skip
    """Renders one camera.

    Args:
      scene: its road (markings), light and key are used.
      geometry: everything the camera sees, relative to `anchor`.
      shadow: `shadow_map` of that moment, relative to the same anchor.
      anchor: int32 cell.
      camera_to_world: [4, 4], camera x right, y down, z forward; world relative to the anchor.
      intrinsics: [3, 3] for pixel coordinates whose integers are pixel centres.
      size: (height, width).
      key: of this picture's noise.
      samples: rays per pixel along each axis for the colours (1 or 2); depth and classes always come from the ray
        through the pixel's centre.
      camera: the sensor's own tint, blur and so on; drawn from `key` if None. Pass `sensor.sample_sensor` of a key
        that depends on the camera only to keep them the same over time.

    Returns:
      the picture, its depth and its classes.
    """
    of_sensor, of_noise, of_jitter = jax.random.split(key, 3)
    seed = jax.random.bits(of_jitter, (), jnp.uint32)
    light = scene.light
    rows = shading.surfaces(geometry)
    ground = pavement.ground_of(scene.road, scene.key, anchor, light.seed, light.wetness)
    tiles = pinhole_tiles(intrinsics, camera_to_world, size, _TILE)
    hits = trace(geometry, tiles)
    rotation = camera_to_world[:3, :3]

    def colours(tiles: Tiles, hits: Hits, size: tuple[int, int], intrinsics: jax.Array) -> jax.Array:
        steps = (rotation[:, 0] / intrinsics[0, 0], rotation[:, 1] / intrinsics[1, 1])
        return untile(_radiance(rows, ground, shadow, scene, tiles, hits, steps, seed), size, _TILE)

    if samples == 1:
        linear = colours(tiles, hits, size, intrinsics)
    else:
        finer = (size[0] * samples, size[1] * samples)
        # Sub-pixel i of pixel p lies at p + (i + 0.5) / samples - 0.5.
        shift = 0.5 * (samples - 1)
        fine = intrinsics.at[:2].multiply(float(samples)).at[:2, 2].add(shift)
        fine_tiles = pinhole_tiles(fine, camera_to_world, finer, _TILE)
        linear = colours(fine_tiles, trace(geometry, fine_tiles), finer, fine)
        # Very bright points are dimmed first, so that one sample does not make a whole pixel white.
        linear = jnp.minimum(linear, 4.0)
        linear = linear.reshape(size[0], samples, size[1], samples, 3).mean((1, 3))
    semantic = jnp.concatenate([geometry.solids.semantic, geometry.rounds.semantic])[jnp.maximum(hits.part, 0)]
    semantic = jnp.where(hits.part == NOTHING, 0, semantic).astype(jnp.uint8)
    depth = jnp.where(hits.part == NOTHING, 0.0, 1.0 / jnp.maximum(hits.inverse, 1e-9))
    camera = sensor.sample_sensor(of_sensor) if camera is None else camera
    rgb = sensor.expose(linear, light, camera, of_noise)
    return Image(rgb, untile(depth, size, _TILE), untile(semantic, size, _TILE))

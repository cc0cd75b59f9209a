"""What the sun and the sky reach: a shadow map seen from the sun and a height map seen from above, for one moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from data_prep.world.primitives import Geometry
from data_prep.world.raycast import pinhole_tiles, trace, untile

if TYPE_CHECKING:
    from data_prep.world.scene import Scene

SUN_DISTANCE = 3000.0  # metres: rays differ by at most 1 degree within the map
HALF_WINDOW = 55.0  # metres around the car that have shadows
HALF_SKY = 48.0  # metres around the car of the map seen from above
_LOW, _HIGH = 2.5, 14.0  # metres of height above the ground that matter for near and for wide occlusion


class Shadow(NamedTuple):
    """Maps of one moment, in the frame of the geometry they were made from."""

    rotation: jax.Array  # [3, 3] rows: right, down, away from the sun
    origin: jax.Array  # [3] where the map is seen from
    focal: jax.Array  # [2] pixels, x and y
    sun: jax.Array  # [res, res] distance from there along the third row, metres
    centre: jax.Array  # [3] of the sky map
    sky: jax.Array  # [3, sky res, sky res] over (x, y): ground height, mean height above it near by and farther off


def _camera(rotation: jax.Array, origin: jax.Array) -> jax.Array:
    top = jnp.concatenate([rotation.T, origin[:, None]], 1)
    return jnp.concatenate([top, jnp.array([[0.0, 0.0, 0.0, 1.0]])])


def _depth(geometry: Geometry, camera: jax.Array, focal: jax.Array, resolution: int) -> jax.Array:
    middle = (resolution - 1) / 2.0
    intrinsics = jnp.array([[1.0, 0.0, middle], [0.0, 1.0, middle], [0.0, 0.0, 1.0]])
    intrinsics = intrinsics.at[0, 0].set(focal[0]).at[1, 1].set(focal[1])
    tile = (min(32, resolution), min(64, resolution))
    hits = trace(geometry, pinhole_tiles(intrinsics, camera, (resolution, resolution), tile))
    inverse = untile(hits.inverse, (resolution, resolution), tile)
    return 1.0 / jnp.maximum(inverse, 1e-6)


def _blurred(image: jax.Array, half: int) -> jax.Array:
    """Box blur applied twice (a tent), edges repeated."""
    for _ in range(2):
        for axis in (0, 1):
            pad = [(0, 0), (0, 0)]
            pad[axis] = (half + 1, half)
            total = jnp.cumsum(jnp.pad(image, pad, mode="edge"), axis)
            size = 2 * half + 1
            last = jax.lax.slice_in_dim(total, size, None, axis=axis)
            image = (last - jax.lax.slice_in_dim(total, 0, -size, axis=axis)) / size
    return image


def _lowest(image: jax.Array, half: int) -> jax.Array:
    for window in ((2 * half + 1, 1), (1, 2 * half + 1)):
        image = jax.lax.reduce_window(image, jnp.inf, jax.lax.min, window, (1, 1), "SAME")
    return image


def shadow_map(scene: Scene, geometry: Geometry, centre: jax.Array, resolution: int = 1024) -> Shadow:
    """Maps of sun and sky around a point.

    Args:
      scene: its light is used.
      geometry: everything that casts shadows, in the same frame as `centre`.
      centre: [3] point on the ground, e.g. the car's position; shadows reach `HALF_WINDOW` metres around it.
      resolution: pixels of the square sun map; about twice the height of the images looks sharp.
    """
    away = -scene.light.sun_direction
    right = jnp.stack([away[1], -away[0], jnp.zeros(())])
    right = right / jnp.maximum(jnp.linalg.norm(right), 1e-6)
    down = jnp.cross(away, right)
    rotation = jnp.stack([right, down, away])
    # Seen from a low sun the ground is flat: the map's rows then cover less, but reach up to 20 m high things.
    sine, cosine = -away[2], jnp.linalg.norm(away[:2])
    half = jnp.stack([jnp.float32(HALF_WINDOW), HALF_WINDOW * sine + 10.0 * cosine])
    origin = centre + jnp.array([0.0, 0.0, 10.0]) * cosine - SUN_DISTANCE * away
    focal = 0.5 * resolution * SUN_DISTANCE / half
    sun = _depth(geometry, _camera(rotation, origin), focal, resolution)

    size = max(160, resolution // 4)
    from_above = jnp.array([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]])
    above = centre + jnp.array([0.0, 0.0, 1000.0])
    focal_sky = jnp.full(2, 0.5 * size * 1000.0 / HALF_SKY)
    top = above[2] - _depth(geometry, _camera(from_above, above), focal_sky, size)
    top = top.T[:, ::-1]  # index 0 along x, index 1 along y
    cells = size / (2 * HALF_SKY)  # per metre
    ground = _blurred(_lowest(jnp.clip(top, centre[2] - 20.0, centre[2] + 60.0), round(5 * cells)), round(2 * cells))
    rise = jnp.maximum(top - ground, 0.0)
    # Crowns and bridges high above let light in from the sides; cars and benches do not.
    close = jnp.minimum(rise, _LOW) - jnp.clip(rise - 3.0, 0.0, 2.1)
    near = _blurred(close, max(1, round(0.45 * cells)))
    wide = _blurred(jnp.minimum(rise, _HIGH), max(1, round(3.0 * cells)))
    return Shadow(rotation, origin, focal, sun, centre, jnp.stack([ground, near, wide]))


def sunlit(shadow: Shadow, point: jax.Array, normal: jax.Array, softness: jax.Array, jitter: jax.Array) -> jax.Array:
    """Share 0..1 [R] of the sun seen from points [3, R] with normals [3, R]; 1 outside the map.

    `softness` is in metres on the map; `jitter` [R] 0..1 turns the four taps.
    """
    resolution = shadow.sun.shape[0]
    texel = SUN_DISTANCE / shadow.focal[0]
    lifted = point + normal * (1.2 * texel + 0.01) - shadow.origin[:, None]
    x, y, z = (shadow.rotation[i, 0] * lifted[0] + shadow.rotation[i, 1] * lifted[1]
               + shadow.rotation[i, 2] * lifted[2] for i in range(3))  # fmt: skip
    middle = (resolution - 1) / 2.0
    column, row = x / z * shadow.focal[0] + middle, y / z * shadow.focal[1] + middle
    inside = (jnp.abs(column - middle) < middle - 2) & (jnp.abs(row - middle) < middle - 2)
    flat = shadow.sun.reshape(-1)
    spread = jnp.maximum(softness / SUN_DISTANCE * shadow.focal, 0.6)
    turn = 2 * jnp.pi * jitter
    dx, dy = jnp.cos(turn), jnp.sin(turn)
    total = jnp.zeros_like(x)
    for sx, sy in ((dx, dy), (-dy, dx), (-dx, -dy), (dy, -dx)):
        c = jnp.clip(column + sx * spread[0], 0.0, resolution - 1.001)
        r = jnp.clip(row + sy * spread[1], 0.0, resolution - 1.001)
        ci, ri = jnp.floor(c).astype(jnp.int32), jnp.floor(r).astype(jnp.int32)
        fc, fr = c - ci, r - ri
        start = ri * resolution + ci

        def lit(index: jax.Array) -> jax.Array:
            return (flat.at[index].get(mode="promise_in_bounds") > z - 0.04).astype(jnp.float32)

        upper = lit(start) * (1.0 - fc) + lit(start + 1) * fc
        lower = lit(start + resolution) * (1.0 - fc) + lit(start + resolution + 1) * fc
        total += upper * (1.0 - fr) + lower * fr
    return jnp.where(inside, 0.25 * total, 1.0)


def openness(shadow: Shadow, point: jax.Array, normal: jax.Array) -> jax.Array:
    """Share [R] of the sky's light that reaches points [3, R] with normals [3, R], 1 = open field."""
    size = shadow.sky.shape[1]
    rows = shadow.sky.reshape(3, -1)
    cells = size / (2 * HALF_SKY)

    def looked_up(reach: float) -> tuple[jax.Array, jax.Array]:
        """Values [3, R] `reach` metres in front of the surface, and the share of the map's inside."""
        x = (point[0] + normal[0] * reach - shadow.centre[0]) * cells + (size - 1) / 2.0
        y = (point[1] + normal[1] * reach - shadow.centre[1]) * cells + (size - 1) / 2.0
        edge = jnp.maximum(jnp.abs(x - size / 2.0), jnp.abs(y - size / 2.0))
        inside = jnp.clip((size / 2.0 - 2.0 - edge) / (4.0 * cells), 0.0, 1.0)
        x, y = jnp.clip(x, 0.0, size - 1.001), jnp.clip(y, 0.0, size - 1.001)
        xi, yi = jnp.floor(x).astype(jnp.int32), jnp.floor(y).astype(jnp.int32)
        fx, fy = x - xi, y - yi
        start = xi * size + yi

        def at(index: jax.Array) -> jax.Array:
            return rows.at[:, index].get(mode="promise_in_bounds")

        low = at(start) * (1.0 - fy) + at(start + 1) * fy
        high = at(start + size) * (1.0 - fy) + at(start + size + 1) * fy
        return low * (1.0 - fx) + high * fx, inside

    close, inside_close = looked_up(0.8)
    far, inside_far = looked_up(4.0)
    above = jnp.maximum(point[2] + 0.3 * normal[2] - close[0], 0.0)
    near = jnp.clip((close[1] - jnp.minimum(above, _LOW)) / 1.3, 0.0, 1.0) * inside_close
    wide = jnp.clip((far[2] - above) / 11.0, 0.0, 1.0) * inside_far
    return (1.0 - 0.8 * near) * (1.0 - 0.75 * wide)

"""A spinning LiDAR: exact ranges from the same ray casting as the cameras, then what real sensors add and lose.

A return is seen where the light that comes back, reflectivity * facing / range^2, is strong enough; so dark and grazed
surfaces vanish first, and glass lets nearly everything through. Mirror-like returns and points that lie between two
surfaces are not modelled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world import raycast
from data_prep.world.primitives import Geometry
from data_prep.world.raycast import NOTHING, Tiles
from data_prep.world.rigs import Lidar
from data_prep.world.surfaces import Material, Semantic

_SECTOR_COLUMNS, _BAND_BEAMS = 48, 16  # rays of one tile: few enough to miss most parts, many enough to be efficient
_MIN_SECTORS = 8  # a tile is a pinhole, so it must stay well below half a turn
_SHARPNESS = 2.5  # how suddenly returns vanish when they get weaker

# Near-infrared reflectivity of each material: a + b * luminance of its colour. Above 1 are retro-reflectors.
_REFLECTIVITY = {
    Material.PLAIN: (0.10, 0.55), Material.ROAD: (0.09, 0.30), Material.PAVING: (0.15, 0.35),
    Material.VERGE: (0.25, 0.40), Material.FACADE: (0.12, 0.55), Material.BRICK: (0.20, 0.40),
    Material.PLASTER: (0.15, 0.60), Material.ROOF: (0.12, 0.40), Material.CONCRETE: (0.15, 0.50),
    Material.PAINT: (0.03, 0.55), Material.GLASS: (0.05, 0.0), Material.RUBBER: (0.04, 0.05),
    Material.METAL: (0.25, 0.30), Material.BARK: (0.20, 0.30), Material.LEAVES: (0.40, 0.30),
    Material.CLOTH: (0.15, 0.50), Material.SKIN: (0.40, 0.20), Material.SIGN: (2.50, 0.50),
    Material.WOOD: (0.25, 0.40), Material.LAMP: (0.60, 0.0), Material.REAR_LAMP: (3.00, 0.0),
    Material.SHUTTER: (0.20, 0.40),
}  # fmt: skip
_GLASS_SEEN = 0.12  # share of rays that a glass pane sends back at all


class Sweep(NamedTuple):
    """One revolution of P = columns * beams rays, column by column; only `valid` ones are points."""

    points: jax.Array  # [P, 3] float32 metres in the sensor's frame
    intensity: jax.Array  # [P] 0..1
    ring: jax.Array  # [P] int32, beams from the lowest up
    valid: jax.Array  # [P] bool


def _sector_columns(lidar: Lidar) -> int:
    return max(1, min(_SECTOR_COLUMNS, lidar.columns // _MIN_SECTORS))


def _rays(lidar: Lidar) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles in the sensor's frame: directions [S, N, 3, R] scaled to 1 along the sector's axis, corners [S, N, 4, 3],
    and elevations [N, E] that fill up the last band of beams; R = E beams of C columns."""
    width = _sector_columns(lidar)
    sectors = -(-lidar.columns // width)
    bands = -(-len(lidar.elevations) // _BAND_BEAMS)
    per_band = -(-len(lidar.elevations) // bands)
    elevation = np.pad(lidar.elevations, (0, bands * per_band - len(lidar.elevations)), mode="edge")
    elevation = elevation.reshape(bands, per_band)
    step = 2 * np.pi / lidar.columns
    offset = (np.arange(width) - (width - 1) / 2) * -step  # clockwise
    axis = lidar.start - step * (width * np.arange(sectors) + (width - 1) / 2)
    aside = np.tan(offset)[None, None, :]  # [1, 1, C]
    up = np.tan(elevation)[:, :, None] / np.cos(offset)[None, None, :]  # [N, E, C]
    aside = np.broadcast_to(aside, up.shape)

    def turned(aside: np.ndarray, up: np.ndarray) -> np.ndarray:  # [N, ...] -> [S, N, 3, ...]
        a = axis.reshape(-1, *(1,) * aside.ndim)
        x, y = np.cos(a) - aside * np.sin(a), np.sin(a) + aside * np.cos(a)
        return np.stack([x, y, np.broadcast_to(up, x.shape)], 2)

    low, high = up.min((1, 2)), up.max((1, 2))
    side = np.full_like(low, np.tan(offset[0]))
    corners = turned(np.stack([side, -side, -side, side], 1), np.stack([low, low, high, high], 1))  # [S, N, 3, 4]
    directions = turned(aside, up).reshape(sectors, bands, 3, -1)
    return directions.astype(np.float32), np.swapaxes(corners, 2, 3).astype(np.float32), elevation


def _ordered(values: jax.Array, lidar: Lidar, per_band: int) -> jax.Array:
    """[S * N, R, ...] of the tiles -> [P, ...], column by column, beams from the lowest up."""
    rest = values.shape[2:]
    bands = -(-len(lidar.elevations) // per_band)
    grid = values.reshape(-1, bands, per_band, _sector_columns(lidar), *rest)
    grid = jnp.moveaxis(grid, 3, 1).reshape(-1, bands * per_band, *rest)
    return grid[: lidar.columns, : len(lidar.elevations)].reshape(-1, *rest)


def sweep(
    geometry: Geometry, lidar: Lidar, sensor_to_world: jax.Array, key: jax.Array, extinction: jax.Array | float = 0.0
) -> Sweep:
    """One revolution at one moment.

    Args:
      geometry: everything the sensor can hit, in the frame that `sensor_to_world` [4, 4] leads to.
      lidar: static description.
      key: of noise and dropouts.
      extinction: of haze or rain, 1 / metre.
    """
    directions, corners, elevation = _rays(lidar)
    rotation, origin = sensor_to_world[:3, :3], sensor_to_world[:3, 3]
    local = jnp.asarray(directions).reshape(-1, *directions.shape[2:])
    tiles = Tiles(
        origin,
        jnp.einsum("ij,tjr->tir", rotation, local),
        jnp.einsum("ij,tcj->tci", rotation, jnp.asarray(corners).reshape(-1, 4, 3)),
    )
    hits = raycast.trace(geometry, tiles)
    d = jnp.swapaxes(local, 1, 2)
    length = jnp.linalg.norm(d, axis=-1)
    distance = length / jnp.maximum(hits.inverse, 1e-9)
    where = origin + jnp.swapaxes(tiles.directions, 1, 2) / jnp.maximum(hits.inverse, 1e-9)[..., None]
    normal = raycast.normals(geometry, hits, where)
    facing = jnp.abs(jnp.sum(normal * jnp.swapaxes(tiles.directions, 1, 2), -1)) / length

    def of_part(name: str) -> jax.Array:
        rows = jnp.concatenate([getattr(geometry.solids, name), getattr(geometry.rounds, name)])
        return rows[jnp.maximum(hits.part, 0)]

    material, semantic = of_part("material"), of_part("semantic")
    colour, glass_share = of_part("colour"), of_part("extra")[..., 2]
    table = jnp.array([_REFLECTIVITY[m] for m in Material])[material]
    reflectivity = table[..., 0] + table[..., 1] * (colour @ jnp.array([0.2126, 0.7152, 0.0722]))
    of_glass, of_loss, of_window, of_range = (jax.random.uniform(k, distance.shape) for k in jax.random.split(key, 4))
    pane = (material == Material.GLASS) | ((material == Material.FACADE) & (of_window < 0.6 * glass_share))
    back = reflectivity * (0.15 + 0.85 * facing) * jnp.exp(-2.0 * extinction * distance)
    strength = back / jnp.square(distance) / (0.1 / lidar.range_dark**2)  # 1: seen half of the time
    seen = of_loss < jax.nn.sigmoid(_SHARPNESS * jnp.log(jnp.maximum(strength, 1e-9))) * (1.0 - lidar.dropout)
    valid = (hits.part != NOTHING) & seen & (~pane | (of_glass < _GLASS_SEEN))
    valid = valid & (distance > lidar.range_min) & (distance < lidar.range_max)
    if not lidar.body_returns:
        valid = valid & (semantic != Semantic.EGO)
    noise = jnp.clip(jax.scipy.special.ndtri(jnp.clip(of_range, 1e-4, 1 - 1e-4)), -3.0, 3.0) * lidar.range_noise
    points = d / length[..., None] * (distance + noise)[..., None]
    beams = jnp.repeat(jnp.arange(elevation.size).reshape(elevation.shape), _sector_columns(lidar), axis=1)  # [N, R]
    ring = jnp.tile(beams, (hits.part.shape[0] // len(beams), 1))
    per_band = elevation.shape[1]
    return Sweep(
        _ordered(points, lidar, per_band),
        _ordered(jnp.clip(back, 0.0, 1.0), lidar, per_band),
        _ordered(ring, lidar, per_band),
        _ordered(valid, lidar, per_band),
    )

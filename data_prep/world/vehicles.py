"""Vehicles of every kind as batched parts: which ones there are, what they look like, how they stand."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world import road as roads
from data_prep.world import vehicle_fleet as fleet
from data_prep.world.primitives import Geometry, Parts, flatten, place

DRAWS = 12  # uniform numbers that make up one vehicle

# Shares of the models among light and heavy vehicles; parked ones have no buses and riders.
_LIGHT = {
    "supermini": 0.14, "hatchback": 0.2, "saloon": 0.15, "executive saloon": 0.07, "estate": 0.09,
    "people carrier": 0.07, "crossover": 0.15, "large SUV": 0.08, "pickup": 0.05,
}  # fmt: skip
_HEAVY = {"panel van": 0.34, "minibus": 0.1, "high van": 0.2, "light lorry": 0.13, "lorry": 0.08, "midi bus": 0.05,
          "bus": 0.1}  # fmt: skip
_HEAVY_PARKED = {"panel van": 0.55, "minibus": 0.2, "high van": 0.25}
_RIDERS = {"motorcycle": 1.0}
_CYCLISTS = {"bicycle": 0.5, "bicycle pedalling": 0.5}

# Paints in linear light with their shares on the road.
_PAINTS = (
    (0.25, (0.62, 0.62, 0.60)), (0.20, (0.012, 0.012, 0.014)), (0.12, (0.11, 0.115, 0.12)),
    (0.08, (0.035, 0.037, 0.04)),
    (0.13, (0.40, 0.41, 0.42)), (0.05, (0.015, 0.04, 0.14)), (0.04, (0.03, 0.12, 0.36)), (0.05, (0.30, 0.012, 0.015)),
    (0.02, (0.11, 0.01, 0.015)), (0.015, (0.02, 0.09, 0.04)), (0.015, (0.11, 0.06, 0.03)), (0.015, (0.42, 0.35, 0.25)),
    (0.008, (0.62, 0.42, 0.02)), (0.007, (0.55, 0.14, 0.01)),
)  # fmt: skip
_BUS_PAINTS = ((0.3, (0.55, 0.02, 0.02)), (0.25, (0.7, 0.7, 0.68)), (0.2, (0.62, 0.42, 0.03)),
               (0.15, (0.02, 0.1, 0.35)), (0.1, (0.03, 0.25, 0.1)))  # fmt: skip
_SECOND = ((0.6, (0.70, 0.70, 0.68)), (0.12, (0.02, 0.1, 0.3)), (0.08, (0.4, 0.03, 0.02)), (0.1, (0.2, 0.2, 0.2)),
           (0.05, (0.03, 0.2, 0.08)), (0.05, (0.55, 0.35, 0.05)))  # fmt: skip
_CLOTHS = ((0.4, (0.03, 0.03, 0.035)), (0.2, (0.08, 0.1, 0.16)), (0.15, (0.25, 0.25, 0.25)), (0.1, (0.35, 0.04, 0.03)),
           (0.1, (0.45, 0.5, 0.03)), (0.05, (0.6, 0.6, 0.55)))  # fmt: skip


class Vehicles(NamedTuple):
    """N vehicles without a place."""

    model: jax.Array  # [N] int32, index of `vehicle_fleet.MODELS`
    scale: jax.Array  # [N, 3] of the model's x, y, z; near 1
    palette: jax.Array  # [N, 5, 3] colours of `vehicle_models.FIXED`.. (the first is unused), linear light

    @property
    def length(self) -> jax.Array:
        """Metres [N], bumper to bumper."""
        return jnp.asarray(fleet.LENGTH)[self.model] * self.scale[:, 0]

    @property
    def width(self) -> jax.Array:
        """Metres [N], without mirrors."""
        return jnp.asarray(fleet.WIDTH)[self.model] * self.scale[:, 1]

    @property
    def wheelbase(self) -> jax.Array:
        """Metres [N]."""
        return jnp.asarray(fleet.WHEELBASE)[self.model] * self.scale[:, 0]


def _which(shares: list[float], u: jax.Array) -> jax.Array:
    """Index [...] into shares, from uniform numbers [...]."""
    edges = np.cumsum(shares)[:-1] / np.sum(shares)
    return jnp.sum(u[..., None] >= jnp.asarray(edges, jnp.float32), -1)


def _pick(shares: dict[str, float], u: jax.Array) -> jax.Array:
    indices = jnp.array([fleet.NAMES.index(name) for name in shares])
    return indices[_which(list(shares.values()), u)].astype(jnp.int32)


def choose(table: tuple, u: jax.Array) -> jax.Array:
    """Colours [..., 3] by their shares from uniform numbers u [...]; `table` holds (share, colour) pairs."""
    return jnp.array([colour for _, colour in table])[_which([share for share, _ in table], u)]


def sample(
    u: jax.Array, heavy: jax.Array, *, parked: bool = False, rider: jax.Array | float = 0.0,
    cyclist: jax.Array | bool = False,
) -> Vehicles:  # fmt: skip
    """Vehicles from uniform numbers.

    Args:
      u: [N, DRAWS] uniform numbers.
      heavy: share of vans, lorries and buses, broadcastable to [N].
      parked: kinds that park along streets: no lorries, no buses.
      rider: share of motorcycles among the rest.
      cyclist: [N], these are bicycles.
    """
    model = jnp.where(u[:, 0] < heavy, _pick(_HEAVY_PARKED if parked else _HEAVY, u[:, 1]), _pick(_LIGHT, u[:, 1]))
    model = jnp.where(u[:, 2] < rider, _pick(_RIDERS, u[:, 1]), model)
    model = jnp.where(cyclist, _pick(_CYCLISTS, u[:, 1]), model)
    spread = jnp.array([0.05, 0.025, 0.03])
    scale = 1.0 + spread * (2.0 * u[:, 3:6] - 1.0)
    is_bus = jnp.isin(model, jnp.array([fleet.NAMES.index(name) for name in ("bus", "midi bus")]))
    is_van = jnp.isin(model, jnp.array([fleet.NAMES.index(name) for name in ("panel van", "high van", "lorry")]))
    body = choose(_PAINTS, u[:, 6])
    body = jnp.where(is_bus[:, None], choose(_BUS_PAINTS, u[:, 6]), body)
    body = jnp.where((is_van & (u[:, 7] < 0.55))[:, None], jnp.array([0.62, 0.62, 0.60]), body)
    body = jnp.clip(body * (0.85 + 0.3 * u[:, 8:9]), 0.0, 0.75)
    second, cloth, trousers = choose(_SECOND, u[:, 9]), choose(_CLOTHS, u[:, 10]), choose(_CLOTHS, u[:, 11] * 0.9)
    return Vehicles(model, scale, jnp.stack([body, body, second, cloth, trousers], 1))


def _form(tables: fleet.Tables, vehicles: Vehicles, curved: bool) -> Parts:
    """Parts [N, K] in the vehicles' own frames. Solid parts are stretched by the scale; round ones only move along x
    and y, so that wheels stay round and on the ground."""
    rows = jax.tree.map(lambda table: jnp.asarray(table)[vehicles.model], tables)
    planes, scale = rows.planes, vehicles.scale[:, None]
    centre = rows.centre
    if curved:
        centre = centre * scale.at[..., 2].set(1.0)
        offsets = planes[..., 3] + jnp.einsum("nkfx,nkx->nkf", planes[..., :3], centre - rows.centre)
        planes = jnp.concatenate([planes[..., :3], offsets[..., None]], -1)
    else:
        normals = planes[..., :3] / scale[:, :, None]
        length = jnp.linalg.norm(normals, axis=-1, keepdims=True)
        planes = jnp.concatenate([normals, planes[..., 3:]], -1) / jnp.where(length > 0, length, 1.0)
    shape = rows.valid.shape
    semantic = jnp.broadcast_to(jnp.asarray(fleet.SEMANTIC)[vehicles.model][:, None], shape)
    from_palette = jnp.take_along_axis(vehicles.palette, rows.slot[..., None], axis=1)
    return Parts(
        planes=planes,
        centre=centre,
        quadric=rows.quadric,
        rotation=jnp.broadcast_to(jnp.eye(3, dtype=jnp.float32), (*shape, 3, 3)),
        origin=jnp.zeros((*shape, 3), jnp.float32),
        material=rows.material,
        semantic=semantic,
        colour=jnp.where((rows.slot == 0)[..., None], rows.colour, from_palette),
        extra=rows.extra,
        valid=rows.valid,
    )


def stand(
    road: roads.Road, anchor: jax.Array, xy: jax.Array, yaw: jax.Array, wheelbase: jax.Array, raised: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """How vehicles stand on the ground with all wheels: rotations [N, 3, 3] and origins [N, 3].

    Args:
      road, anchor: the ground.
      xy: [N, 2] middle of the wheelbase, relative to the anchor.
      yaw: [N] radians.
      wheelbase: [N] metres.
      raised: ground height above the road, metres (the curb, for things beyond it).
    """
    reach = jnp.maximum(0.5 * wheelbase * jnp.abs(jnp.cos(yaw)), 0.7 * jnp.abs(jnp.sin(yaw)))
    ahead, behind = (roads.height(road, anchor, xy[:, 0] + s * reach) for s in (1.0, -1.0))
    slope = (ahead - behind) / (2 * reach)
    up = jnp.stack([-slope, jnp.zeros_like(slope), jnp.ones_like(slope)], -1)
    up = up / jnp.linalg.norm(up, axis=-1, keepdims=True)
    forward = jnp.stack([jnp.cos(yaw), jnp.sin(yaw), slope * jnp.cos(yaw)], -1)
    forward = forward / jnp.linalg.norm(forward, axis=-1, keepdims=True)
    rotation = jnp.stack([forward, jnp.cross(up, forward), up], -1)
    return rotation, jnp.concatenate([xy, ((ahead + behind) / 2 + raised)[:, None]], -1)


def build(vehicles: Vehicles, rotation: jax.Array, origin: jax.Array, valid: jax.Array, detailed: int) -> Geometry:
    """Geometry of placed vehicles.

    Args:
      vehicles: N of them.
      rotation, origin: [N, 3, 3], [N, 3], of `stand`.
      valid: [N] bool.
      detailed: how many of the first ones get their detailed form; the others get the coarse one.
    """

    total = valid.shape[0]

    def placed(*forms: tuple[fleet.Tables, int, int]) -> Parts:
        of = np.concatenate([np.repeat(np.arange(a, b), form.valid.shape[1]) for form, a, b in forms])
        local = [
            _form(form, jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], vehicles), form is fleet.ROUND)
            for form, a, b in forms
        ]
        parts = place(flatten(*local), rotation[of], origin[of])
        return parts._replace(valid=parts.valid & valid[of])

    return Geometry(
        placed((fleet.DETAILED, 0, detailed), (fleet.FAR, detailed, total)), placed((fleet.ROUND, 0, detailed))
    )


def nearest(distance: jax.Array, valid: jax.Array, count: int) -> jax.Array:
    """Indices [count] of the nearest valid ones, nearest first; invalid ones only where there are too few."""
    return jax.lax.top_k(jnp.where(valid, -distance, -jnp.inf), min(count, valid.shape[0]))[1]

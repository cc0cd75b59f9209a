"""A plain street in the place of the rendered world's contents: compiles in seconds, for tests of what is around it."""

import jax
import jax.numpy as jnp
import pytest

from data_prep.world import primitives, scene
from data_prep.world import road as roads
from data_prep.world.primitives import Geometry, Parts
from data_prep.world.surfaces import Material, Semantic

_EXTRA = (3.0, 3.0, 0.4, 0.5)


def _many(part: Parts, count: int) -> Parts:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), part)


def _ground(road: roads.Road, anchor: jax.Array) -> Parts:
    """Strips between the knots, 300 m wide and 50 m thick."""
    x = jnp.arange(-200.0, 290.0, roads.KNOT)
    start, end = roads.height(road, anchor, x), roads.height(road, anchor, x + roads.KNOT)
    rise, zero, one = (end - start) / roads.KNOT, jnp.zeros_like(x), jnp.ones_like(x)
    sides = jnp.array([[-1.0, 0, 0], [1, 0, 0], [0, 0, -1], [0, -1, 0], [0, 1, 0]])
    top = jnp.stack([-rise, zero, one], -1)[:, None]
    normals = jnp.concatenate([top, jnp.broadcast_to(sides, (len(x), 5, 3))], 1)
    offsets = jnp.stack([start - rise * x, -x, x + roads.KNOT, 50 - start, 150 * one, 150 * one], 1)
    return primitives.painted(primitives.half_spaces(normals, offsets), Material.ROAD, Semantic.ROAD, jnp.full(3, 0.15))


def static_geometry(world: scene.Scene, anchor: jax.Array) -> Geometry:
    """Ground, a house on both sides and a bush per cell."""
    road = world.road
    cells = jnp.arange(-roads.CELLS_BEHIND, roads.CELLS_AHEAD)
    x = cells * roads.CELL + 5.0
    house = primitives.box(jnp.array([-12.0, -5.0, -2.0]), jnp.array([12.0, 5.0, 9.0]))
    house = primitives.painted(house, Material.FACADE, Semantic.BUILDING, (0.6, 0.5, 0.4), _EXTRA)
    bush = primitives.ellipsoid(jnp.array([0.0, 0.0, 0.8]), jnp.array([1.0, 1.2, 1.0]))
    bush = primitives.painted(bush, Material.LEAVES, Semantic.VEGETATION, (0.1, 0.2, 0.05))
    solids, rounds = [_ground(road, anchor)], []
    for side in (-1.0, 1.0):
        at, yaw = roads.beside(road, anchor, x, side * (road.half_width + road.sidewalk + 6.0))
        solids.append(primitives.place(_many(house, len(x)), primitives.yaw_rotation(yaw), at))
        at, yaw = roads.beside(road, anchor, x + 20.0, side * (road.half_width + 1.5))
        rounds.append(primitives.place(_many(bush, len(x)), primitives.yaw_rotation(yaw), at))
    return Geometry(primitives.flatten(*solids), primitives.flatten(*rounds))


def moving_geometry(world: scene.Scene, anchor: jax.Array, t: jax.Array) -> Geometry:
    """A van with round lamps that keeps 45 m ahead of the car."""
    road = world.road
    x = roads.ego_station(road, t) - anchor.astype(jnp.float32) * roads.CELL + 45.0
    at, yaw = roads.beside(road, anchor, x[None], -(road.ego_lane + 0.5) * road.lane_width)
    van = primitives.box(jnp.array([[-2.5, -1.0, 0.3]]), jnp.array([[2.5, 1.0, 2.3]]))
    van = primitives.painted(van, Material.PAINT, Semantic.VEHICLE, (0.5, 0.5, 0.55))
    lamp = primitives.ellipsoid(jnp.array([[-2.5, 0.0, 1.2]]), jnp.array([[0.1, 0.2, 0.1]]))
    lamp = primitives.painted(lamp, Material.REAR_LAMP, Semantic.VEHICLE, (0.5, 0.02, 0.02))
    turn = primitives.yaw_rotation(yaw)
    return Geometry(primitives.place(van, turn, at), primitives.place(lamp, turn, at))


def install(patch: pytest.MonkeyPatch) -> None:
    """Puts this street into every scene until `patch` is undone."""
    patch.setattr(scene, "static_geometry", static_geometry)
    patch.setattr(scene, "moving_geometry", moving_geometry)

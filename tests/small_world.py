"""A small world of a few parts, for tests of the renderer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world import light as lights
from data_prep.world import primitives
from data_prep.world import road as roads
from data_prep.world.surfaces import Material, Semantic
from tests import polyhedra


class World(NamedTuple):
    """What the renderer reads of a scene."""

    key: jax.Array
    road: roads.Road
    light: lights.Light


def straight_road(**changes) -> roads.Road:
    """A flat straight road with two lanes per direction and no junctions."""
    road = roads.sample_road(jax.random.key(5))
    numbers = dict(lanes=jnp.int32(2), lane_width=3.5, parking=0.3, sidewalk=2.5, curb=0.12, junction_rate=0.0)
    numbers = {name: jnp.asarray(value) for name, value in (numbers | changes).items()}
    return road._replace(curve=road.curve.at[:, 0].set(0.0), grade=road.grade.at[:, 0].set(0.0), **numbers)


def clear_light(elevation: float = 0.8, azimuth: float = 2.0) -> lights.Light:
    """Sharp sun, no haze, no clouds."""
    light = lights.sample_light(jax.random.key(1))
    flat = np.cos(elevation)
    sun = jnp.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], jnp.float32)
    calm = {name: jnp.float32(0.0) for name in ("extinction", "wetness", "lamps", "clouds", "exposure")}
    return light._replace(
        sun_direction=sun, sun_colour=jnp.ones(3), zenith=jnp.full(3, 0.3), horizon=jnp.full(3, 0.5),
        softness=jnp.float32(0.0), noise=jnp.float32(1.0), seed=jnp.uint32(77), **calm,
    )  # fmt: skip


def street() -> tuple[list[primitives.Parts], list[primitives.Parts]]:
    """Ground and a few things on it: solids and rounds."""
    ground = primitives.box(jnp.array([-300.0, -150.0, -5.0]), jnp.array([300.0, 150.0, 0.0]))
    house = primitives.box(jnp.array([10.0, -16.0, -1.0]), jnp.array([24.0, -9.0, 9.0]))
    car = primitives.box(jnp.array([12.0, 4.0, 0.3]), jnp.array([16.3, 5.8, 1.5]))
    sign = primitives.box(jnp.array([7.98, -6.2, 2.0]), jnp.array([8.02, -5.2, 2.7]))
    crown = primitives.ellipsoid(jnp.array([15.0, 11.0, 4.0]), jnp.array([2.0, 2.0, 1.5]))
    trunk = polyhedra.cylinder(jnp.array([15.0, 11.0, 1.5]), 2, jnp.array([0.2, 0.2]), 1.5)
    paint = primitives.painted
    solids = [
        paint(ground, Material.ROAD, Semantic.ROAD, (0.13, 0.13, 0.13)),
        paint(house, Material.FACADE, Semantic.BUILDING, (0.5, 0.4, 0.3), (2.5, 3.0, 0.3, 0.4)),
        paint(car, Material.PAINT, Semantic.VEHICLE, (0.3, 0.02, 0.02)),
        paint(sign, Material.SIGN, Semantic.SIGN, (0.5, 0.5, 0.5), (0.5, 0.35, 0.7, 0.0)),
    ]
    rounds = [
        paint(crown, Material.LEAVES, Semantic.VEGETATION, (0.08, 0.14, 0.04)),
        paint(trunk, Material.BARK, Semantic.VEGETATION, (0.16, 0.12, 0.09)),
    ]
    return solids, rounds


def geometry(solids, rounds, shift: float = 0.0) -> primitives.Geometry:
    """The parts as arrays, moved by `shift` metres along x (the ground's frame stays)."""
    offset = jnp.array([shift, 0.0, 0.0])
    moved = [[primitives.place(part, jnp.eye(3), offset) for part in group] for group in (solids, rounds)]
    lists = [[jax.tree.map(lambda leaf: leaf[None], part) for part in group] for group in moved]
    return primitives.Geometry(primitives.flatten(*lists[0]), primitives.flatten(*lists[1]))


def camera(height: int, width: int, *, x: float = 0.0, yaw: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Intrinsics with 80 degrees and a pose 1.6 m above the ground, looking along x."""
    focal = 0.5 * width / np.tan(np.radians(40.0))
    intrinsics = jnp.array([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])
    c, s = np.cos(yaw), np.sin(yaw)
    pose = np.eye(4)
    pose[:3] = [[s, 0.0, c, x], [-c, 0.0, s, 0.0], [0.0, -1.0, 0.0, 1.6]]
    return intrinsics.astype(jnp.float32), jnp.asarray(pose, jnp.float32)

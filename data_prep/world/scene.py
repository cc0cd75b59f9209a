"""A scene: its road, style and light; and everything that stands or moves around the car at one moment."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_prep.world import light as lights
from data_prep.world import road as roads
from data_prep.world import street, style, traffic
from data_prep.world.primitives import Geometry, merge

SPLITS = ("train", "val", "test")


class Scene(NamedTuple):
    """Everything random about a scene; the rest follows from it and the time."""

    key: jax.Array
    road: roads.Road
    style: style.Style
    light: lights.Light


def scene_key(seed: int, split: str, index: int) -> jax.Array:
    """Random key of a scene. Its two words are (seed, split) and index, so different arguments give different keys:
    no two scenes of any seeds and splits are the same. seed < 2**28, index < 2**32."""
    if not 0 <= seed < 2**28 or not 0 <= index < 2**32:
        raise ValueError(f"seed {seed} and index {index} must be in 0..2**28-1 and 0..2**32-1")
    words = jnp.array([seed * 4 + SPLITS.index(split), index], jnp.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def sample_scene(key: jax.Array) -> Scene:
    """A scene from its key."""
    of_road, of_style, of_light, rest = jax.random.split(key, 4)
    return Scene(rest, roads.sample_road(of_road), style.sample_style(of_style), lights.sample_light(of_light))


def static_geometry(scene: Scene, anchor: jax.Array) -> Geometry:
    """What stands still in the cells around an anchor, in the anchor's frame: ground, buildings, trees, parked cars."""
    cells = anchor + jnp.arange(-roads.CELLS_BEHIND, roads.CELLS_AHEAD)
    return merge(
        street.ground(scene.road, scene.style, scene.key, anchor),
        street.cells(scene.road, scene.style, scene.key, anchor, cells),
        traffic.parked(scene.road, scene.style, scene.key, anchor, cells),
    )


def moving_geometry(scene: Scene, anchor: jax.Array, t: jax.Array) -> Geometry:
    """What moves, at t seconds after the scene's start: traffic, pedestrians, cyclists (not the car itself)."""
    cells = anchor + jnp.arange(-roads.CELLS_BEHIND, roads.CELLS_AHEAD)
    return merge(
        traffic.driving(scene.road, scene.style, scene.key, anchor, t),
        traffic.walking(scene.road, scene.style, scene.key, anchor, cells, t),
    )

"""The rendered pictures: exact depth and classes, textures that stay in place, supersampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.world import render
from data_prep.world import road as roads
from data_prep.world.surfaces import Semantic
from tests.small_world import World, camera, clear_light, geometry, straight_road, street

SIZE = (64, 128)


@pytest.fixture(scope="module")
def renderer():
    """One compiled renderer for all tests."""

    def run(world, parts, anchor, pose, intrinsics, key, size, samples):
        maps = render.shadow_map(world, parts, pose[:3, 3] * jnp.array([1.0, 1.0, 0.0]), 256)
        return render.render_camera(world, parts, maps, anchor, pose, intrinsics, size, key, samples=samples)

    return jax.jit(run, static_argnums=(6, 7))


@pytest.fixture(scope="module")
def picture(renderer):
    world = World(jax.random.key(3), straight_road(), clear_light())
    intrinsics, pose = camera(*SIZE)
    args = (world, geometry(*street()), jnp.int32(0), pose, intrinsics, jax.random.key(0), SIZE)
    return renderer(*args, 1), args


def test_depth_and_classes_are_those_of_the_surfaces(picture):
    """Against rays computed here in float64: the ground plane, the house's front and the sky."""
    image, (_, _, _, _, intrinsics, _, _) = picture
    depth, semantic = np.asarray(image.depth), np.asarray(image.semantic)
    k = np.asarray(intrinsics, np.float64)
    v, u = np.mgrid[: SIZE[0], : SIZE[1]]
    right, down = (u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1]
    ground = semantic == Semantic.ROAD
    assert ground.mean() > 0.2
    np.testing.assert_allclose(depth[ground], (1.6 / down)[ground], rtol=2e-5)
    # The house's side towards the road is the plane y = -9; its end is the plane x = 10.
    house = semantic == Semantic.BUILDING
    assert house.sum() > 100
    side, end = 9.0 / np.where(right > 0, right, np.nan), np.full(SIZE, 10.0)
    expected = np.where((side >= 10.0) & (side <= 24.0), side, end)
    np.testing.assert_allclose(depth[house], expected[house], rtol=2e-5)
    sky = semantic == Semantic.SKY
    assert sky.mean() > 0.2 and (depth[sky] == 0).all() and (depth[~sky] > 0).all()
    assert {Semantic.VEHICLE, Semantic.SIGN, Semantic.VEGETATION} <= set(np.unique(semantic).tolist())


@pytest.mark.slow
def test_supersampling_changes_colours_only(picture, renderer):
    one, args = picture
    two = renderer(*args, 2)
    np.testing.assert_array_equal(one.depth, two.depth)
    np.testing.assert_array_equal(one.semantic, two.semantic)
    a, b = np.asarray(one.rgb, float), np.asarray(two.rgb, float)
    assert abs(a.mean() - b.mean()) < 3.0
    assert 0.5 < np.abs(a - b).mean() < 12.0


def test_textures_stay_in_place_when_the_anchor_moves(renderer):
    """The same view from the next anchor: colours of the ground belong to the world, not to the frame of a moment."""
    world = World(jax.random.key(3), straight_road(), clear_light())
    solids, rounds = street()
    pictures = []
    for anchor in (7, 8):
        shift = (8 - anchor) * roads.CELL
        intrinsics, pose = camera(*SIZE, x=shift)
        parts = geometry(solids, rounds, shift)
        out = renderer(world, parts, jnp.int32(anchor), pose, intrinsics, jax.random.key(0), SIZE, 1)
        pictures.append(np.asarray(out.rgb, float))
    difference = np.abs(pictures[0] - pictures[1])
    assert np.percentile(difference, 97) <= 3.0
    other = world._replace(light=world.light._replace(seed=jnp.uint32(78)))
    changed = renderer(other, parts, jnp.int32(8), pose, intrinsics, jax.random.key(0), SIZE, 1)
    assert np.percentile(np.abs(np.asarray(changed.rgb, float) - pictures[1]), 90) > 3.0

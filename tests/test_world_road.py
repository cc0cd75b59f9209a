"""The road: continuous, the same from every anchor, and driven along as a car drives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.world import road as roads


@pytest.fixture(scope="module", params=range(4))
def road(request):
    return roads.sample_road(jax.random.key(request.param))


def test_heights_and_centre_line_do_not_depend_on_the_anchor(road):
    x = jnp.linspace(-100.0, 200.0, 500)
    first, second = jnp.int32(3), jnp.int32(5)
    shift = (second - first) * roads.CELL
    here, there = roads.anchor_position(road, first), roads.anchor_position(road, second)
    np.testing.assert_allclose(
        roads.height(road, first, x + shift) + here[2], roads.height(road, second, x) + there[2], atol=1e-4
    )
    np.testing.assert_allclose(
        roads.centre(road, first, x + shift) + here[1], roads.centre(road, second, x) + there[1], atol=1e-4
    )
    np.testing.assert_allclose(there[0] - here[0], 2 * roads.CELL)


def test_heading_and_slope_are_the_derivatives(road):
    x = np.linspace(-95.0, 195.0, 400)
    x = x[np.abs((x + 5) % roads.KNOT - 5) > 0.1]  # the ground bends at the knots
    anchor = jnp.int32(2)
    step = 0.02
    for value, derivative in ((roads.centre, lambda *a: jnp.tan(roads.heading(*a))), (roads.height, roads.slope)):
        high, low = value(road, anchor, jnp.asarray(x + step)), value(road, anchor, jnp.asarray(x - step))
        rate = (np.asarray(high, np.float64) - np.asarray(low, np.float64)) / (2 * step)
        np.testing.assert_allclose(rate, derivative(road, anchor, jnp.asarray(x)), atol=3e-3)
    assert np.abs(roads.slope(road, anchor, jnp.asarray(x))).max() < 0.12
    bend = np.diff(np.asarray(roads.heading(road, anchor, jnp.asarray(x)))) / np.diff(x)
    assert np.abs(bend).max() < 1 / 40, "no road bends tighter than 40 m"


def test_lane_coordinates_invert_beside(road):
    rng = np.random.default_rng(0)
    x, lateral = jnp.asarray(rng.uniform(-80, 120, 200)), jnp.asarray(rng.uniform(-15, 15, 200))
    anchor = jnp.int32(1)
    points, _ = roads.beside(road, anchor, x, lateral)
    station, found = roads.lane_coordinates(road, anchor, points[:, :2])
    np.testing.assert_allclose(found, lateral, atol=0.05)
    np.testing.assert_allclose(station, x, atol=0.6)
    near = np.abs(lateral) < 8
    np.testing.assert_allclose(np.asarray(found)[near], np.asarray(lateral)[near], atol=0.01)


def test_the_car_stays_in_its_lane_on_the_road(road):
    times = np.arange(0.0, 40.0, 0.1)
    lateral, position, stations = [], [], []
    drive = jax.jit(lambda t: roads.ego_pose(road, roads.anchor_at(road, t), t))
    for t in times:
        anchor = roads.anchor_at(road, jnp.float32(t))
        pose = np.asarray(drive(jnp.float32(t)), np.float64)
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-5)
        assert 0 <= pose[0, 3] + 2 < roads.CELL + 4
        lateral.append(float(roads.lane_coordinates(road, anchor, jnp.asarray(pose[:2, 3]))[1]))
        assert abs(pose[2, 3] - float(roads.height(road, anchor, jnp.asarray(pose[0, 3])))) < 1e-3
        position.append(pose[:3, 3] + np.asarray(roads.anchor_position(road, anchor), np.float64))
        stations.append(float(roads.ego_station(road, jnp.float32(t))))
    lane = -(float(road.ego_lane) + 0.5) * float(road.lane_width)
    np.testing.assert_allclose(lateral, lane, atol=0.2)
    speed = np.linalg.norm(np.diff(position, axis=0), axis=1) / 0.1
    assert np.all(np.diff(stations) > 0)
    assert speed.min() > 0.5 * float(road.speed)
    assert speed.max() < 1.4 * float(road.speed)
    assert np.abs(np.diff(speed)).max() < 0.6, "a jump where the anchor changes"


def test_junctions_depend_on_the_cell_alone_and_have_the_asked_rate():
    road = roads.sample_road(jax.random.key(0))._replace(junction_rate=jnp.float32(0.3))
    cells = jnp.arange(-300, 700)
    found = jax.vmap(lambda c: roads.is_junction(road, jax.random.key(5), c))(cells)
    assert 0.24 < float(found.mean()) < 0.36
    again = jax.vmap(lambda c: roads.is_junction(road, jax.random.key(5), c))(cells[::-1])[::-1]
    np.testing.assert_array_equal(found, again)

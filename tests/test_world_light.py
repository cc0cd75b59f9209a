"""What pictures are made of: textures filtered over pixels, the road's markings, shadows, weather, the sensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.world import light as lights
from data_prep.world import pavement, primitives, raycast, render, sensor, shadow, texture
from data_prep.world import road as roads
from tests import polyhedra
from tests.small_world import World, clear_light, geometry, straight_road, street


def test_markings_far_away_do_not_alias():
    """Colours of pixels on the road, near and far, against the mean of 20 x 20 small points inside each."""
    ground = pavement.ground_of(straight_road(), jax.random.key(0), jnp.int32(0), jnp.uint32(1), jnp.float32(0.0))

    @jax.jit
    def colour(down: jax.Array, right: jax.Array, step: float) -> jax.Array:
        """At image directions (down, right, 1) from 1.6 m above the road, for pixels of `step`."""
        depth = 1.6 / down
        zero = jnp.zeros_like(down)
        on_x = jnp.stack([zero, depth * step, zero])
        on_y = jnp.stack([depth * step / down, right * depth * step / down, zero])
        at = pavement.spot(ground, jnp.stack([depth, -right * depth - 5.0, zero]), on_x, on_y)
        return pavement.asphalt(ground, at, jnp.full((3, down.size), 0.1))[0][0]

    step = 1.0 / 120.0
    down, right = (jnp.asarray(a.ravel(), jnp.float32) for a in np.mgrid[0.03:0.5:step, -0.9:0.9:step])
    inner = (jnp.arange(20) + 0.5) / 20 - 0.5
    total = sum(colour(down + dy * step, right + dx * step, step / 20) for dy in inner for dx in inner)
    exact, filtered, point = np.asarray(total) / 400, np.asarray(colour(down, right, step)), colour(down, right, 1e-5)
    error, unfiltered = np.abs(filtered - exact), np.abs(np.asarray(point) - exact)
    assert exact.std() > 0.02  # there are markings
    assert error.mean() < 0.5 * unfiltered.mean()
    assert np.square(error).mean() < 0.2 * np.square(unfiltered).mean()


@pytest.fixture(scope="module")
def mapper():
    """One compiled shadow map for worlds of three solids and a round."""
    return jax.jit(lambda world, parts: render.shadow_map(world, parts, jnp.zeros(3), 768))


def test_sun_shadow_of_a_box_lies_where_geometry_says(mapper):
    world = World(jax.random.key(3), straight_road(), clear_light(elevation=0.7, azimuth=1.1))
    box = primitives.box(jnp.array([4.0, 2.0, 0.0]), jnp.array([8.0, 5.0, 3.0]))
    ground = primitives.box(jnp.array([-200.0, -200.0, -5.0]), jnp.array([200.0, 200.0, 0.0]))
    ball = primitives.ellipsoid(jnp.array([-10.0, -10.0, 4.0]), jnp.ones(3))
    nothing = box._replace(valid=jnp.array(False))
    maps = mapper(world, geometry([ground, box, nothing], [ball]))
    sun = np.asarray(world.light.sun_direction, np.float64)
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-13, 10, (4000, 2)), np.zeros((4000, 1))], 1)

    def through_box(grow: float) -> np.ndarray:  # do rays to the sun meet the box, grown by some metres?
        low, high = np.array([4.0, 2.0, 0.0]) - grow, np.array([8.0, 5.0, 3.0]) + grow
        t = np.stack([(low - points) / sun, (high - points) / sun])
        return t.min(0).max(-1) < t.max(0).min(-1)

    def through_ball(grow: float) -> np.ndarray:
        to_ball = np.array([-10.0, -10.0, 4.0]) - points
        off = to_ball - (to_ball @ sun)[:, None] * sun
        return np.linalg.norm(off, axis=-1) < 1.0 + grow

    shaded = through_box(-0.3) | through_ball(-0.3)
    free = ~through_box(0.3) & ~through_ball(0.3)
    inside = (points[:, 0] > 3.9) & (points[:, 0] < 8.1) & (points[:, 1] > 1.9) & (points[:, 1] < 5.1)
    up = np.broadcast_to([0.0, 0.0, 1.0], points.shape)
    to_columns = [jnp.asarray(a.T, jnp.float32) for a in (points, up)]
    lit = np.asarray(shadow.sunlit(maps, *to_columns, jnp.float32(0.0), jnp.zeros(4000)))
    assert (shaded & ~inside).sum() > 60 and free.sum() > 2000
    assert lit[shaded & ~inside].max() < 0.02
    assert lit[free & ~inside].min() > 0.98
    # Walls that the sun meets are lit, points far outside the map too.
    wall = jnp.array([[6.0], [5.0], [1.5]]), jnp.array([[0.0], [1.0], [0.0]])
    assert shadow.sunlit(maps, *wall, jnp.float32(0.0), jnp.zeros(1))[0] > 0.98
    far = jnp.array([[150.0], [0.0], [0.0]]), jnp.array([[0.0], [0.0], [1.0]])
    assert shadow.sunlit(maps, *far, jnp.float32(0.0), jnp.zeros(1))[0] == 1.0


def test_less_sky_reaches_places_that_are_built_over(mapper):
    world = World(jax.random.key(3), straight_road(), clear_light())
    ground = primitives.box(jnp.array([-200.0, -200.0, -5.0]), jnp.array([200.0, 200.0, 0.0]))
    car = primitives.box(jnp.array([4.0, 2.0, 0.3]), jnp.array([8.5, 3.8, 1.5]))
    wall = primitives.box(jnp.array([-30.0, -20.0, 0.0]), jnp.array([30.0, -12.0, 12.0]))
    none = primitives.ellipsoid(jnp.zeros(3), jnp.ones(3))._replace(valid=jnp.array(False))
    maps = mapper(world, geometry([ground, car, wall], [none]))

    def at(x: float, y: float, z: float = 0.0, normal: tuple = (0.0, 0.0, 1.0)) -> float:
        return float(shadow.openness(maps, jnp.array([[x], [y], [z]]), jnp.array(normal)[:, None])[0])

    field, under, beside, foot = at(-10.0, 20.0), at(6.2, 2.9), at(6.2, 4.1), at(0.0, -11.7)
    assert field > 0.97
    assert under < 0.45 < beside < 0.95
    assert foot < 0.8
    assert at(0.0, -12.0, 1.0, (0.0, 1.0, 0.0)) <= at(0.0, -12.0, 11.5, (0.0, 1.0, 0.0))
    assert at(0.0, -16.0, 12.0) > 0.9  # on the roof


def test_thin_things_far_away_keep_their_size():
    """Quadrics seen from the sun's distance: a lamp post of 12 cm from 3 km, against its exact width and distance."""
    post = polyhedra.cylinder(jnp.zeros(3), 2, jnp.array([0.06, 0.06]), 3.0)
    post = primitives.place(post, primitives.yaw_rotation(jnp.float32(0.4)), jnp.array([3000.0, 2.0, 0.0]))
    parts = geometry([street()[0][0]._replace(valid=jnp.array(False))], [post])
    y = np.linspace(1.85, 2.15, 1501)
    directions = jnp.asarray(np.stack([np.ones_like(y), y / 3000.0, np.zeros_like(y)])[None], jnp.float32)
    corners = jnp.array([[[1.0, a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]])
    hits = raycast.trace(parts, raycast.Tiles(jnp.zeros(3), directions, corners))
    hit = np.asarray(hits.part[0] != raycast.NOTHING)
    assert np.diff(hit.astype(int)).tolist().count(1) == 1 and np.diff(hit.astype(int)).tolist().count(-1) == 1
    assert hit.sum() * 0.3 / 1500 == pytest.approx(0.12, abs=0.003)
    exact = 3000.0 - np.sqrt(np.maximum(0.06**2 - (y - 2.0) ** 2, 0.0))
    np.testing.assert_allclose(1.0 / np.asarray(hits.inverse[0])[hit], exact[hit], atol=0.012)


@pytest.mark.parametrize("width", [0.001, 0.4, 1.7, 30.0])
def test_stripes_are_means_over_the_footprint(width):
    """Against counting samples in the footprint."""
    x = np.linspace(-9.0, 40.0, 57)
    samples = x[:, None] + width * ((np.arange(4000) + 0.5) / 4000 - 0.5)
    inside = (np.mod(samples, 1.5) >= 0.3) & (np.mod(samples, 1.5) < 0.8)
    stripes = texture.stripes(jnp.asarray(x, jnp.float32), 1.5, 0.3, 0.8, jnp.float32(width))
    np.testing.assert_allclose(stripes, inside.mean(1), atol=4e-3)
    inside = (samples >= 2.0) & (samples < 5.0)
    band = texture.band(jnp.asarray(x, jnp.float32), 2.0, 5.0, jnp.float32(width))
    np.testing.assert_allclose(band, inside.mean(1), atol=4e-3)


def test_noise_is_smooth_varied_and_fades_with_the_footprint():
    x = jnp.linspace(-40.0, 40.0, 20001)
    y = jnp.full_like(x, 3.3)
    values = np.asarray(texture.noise2(x, y, jnp.uint32(4)))
    assert np.abs(values).max() <= 1.0 and values.std() > 0.25 and abs(values.mean()) < 0.2
    assert np.abs(np.diff(values)).max() < 0.02  # 4 mm steps of a pattern of 1 m
    different = np.asarray(texture.noise2(x, y, jnp.uint32(5)))
    assert abs(np.corrcoef(values, different)[0, 1]) < 0.3
    strength = [float(texture.fractal2(x, y, jnp.full_like(x, w), jnp.uint32(4), 2.0, 4).std()) for w in (0.01, 0.5, 4)]
    assert strength[0] > strength[1] > strength[2] == 0.0
    numbers = np.asarray(texture.hashed(jnp.uint32(9), jnp.arange(-5000, 5000), jnp.int32(-3)))
    counts = np.histogram(numbers, 10, (0, 1))[0]
    assert counts.min() > 850 and counts.max() < 1150 and abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.05


def test_road_coordinates_of_textures_are_those_of_the_road():
    """The table of the centre line against `road.lane_coordinates` on a road with strong bends."""
    road = roads.sample_road(jax.random.key(2))
    road = road._replace(curve=jnp.array([[9.0, 340.0, 1.0], [3.0, 210.0, 2.0], [0.8, 121.0, 3.0]]))
    anchor = jnp.int32(11)
    ground = pavement.ground_of(road, jax.random.key(0), anchor, jnp.uint32(1), jnp.float32(0.0))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.uniform(-180, 260, 3000), jnp.float32)
    point, _ = roads.beside(road, anchor, x, jnp.asarray(rng.uniform(-12, 12, 3000), jnp.float32))
    step = jnp.full((3, 3000), 0.01)
    at = pavement.spot(ground, point.T, step, step)
    station, lateral = roads.lane_coordinates(road, anchor, point[:, :2])
    np.testing.assert_allclose(at.station, station, atol=1e-3)
    np.testing.assert_allclose(at.lateral, lateral, atol=1e-3)


def test_lane_lines_lie_between_the_lanes():
    """Mean brightness across the road peaks at the lane widths, and dashes are 3 m long."""
    road = straight_road(lanes=jnp.int32(3), lane_width=3.3)
    ground = pavement.ground_of(road, jax.random.key(0), jnp.int32(0), jnp.uint32(1), jnp.float32(0.0))
    lateral = np.arange(-12.0, 12.0, 0.05)
    station = np.arange(0.0, 36.0, 0.25)
    s, across = (jnp.asarray(a.ravel(), jnp.float32) for a in np.meshgrid(station, lateral))
    zero, small = jnp.zeros_like(s), jnp.full_like(s, 0.05)
    at = pavement.Spot(s, across, small, small, zero, zero)
    colours, _ = pavement.asphalt(ground, at, jnp.full((3, s.size), 0.1))
    white = np.asarray(colours[2]).reshape(lateral.size, station.size) > 0.25
    share = white.mean(1)
    for line in (-6.6, -3.3, 3.3, 6.6):
        assert 0.2 < share[np.abs(lateral - line) < 0.05].max() < 0.4  # 3 m of every 9 or 12
    middles = [np.abs(lateral - m) < 1.0 for m in (-8.25, -4.95, -1.65, 1.65, 4.95, 8.25)]
    assert max(share[middle].max() for middle in middles) == 0.0


def test_junctions_have_crossings_and_no_lane_lines():
    road = straight_road(junction_rate=1.0, cross_half_width=5.0)
    x = jnp.linspace(10.0, 30.0, 400)  # the junction's middle is at 20

    @jax.jit
    def white(seed: jax.Array, lateral: jax.Array) -> jax.Array:
        ground = pavement.ground_of(road, jax.random.key(0), jnp.int32(0), seed, jnp.float32(0.0))
        at = pavement.spot(ground, jnp.stack([x, jnp.full_like(x, lateral), 0 * x]), *[jnp.full((3, 400), 0.02)] * 2)
        return pavement.asphalt(ground, at, jnp.full((3, 400), 0.1))[0][2] > 0.25

    seeds = jnp.arange(12, dtype=jnp.uint32)
    lines = {lateral: np.stack([white(seed, lateral) for seed in seeds]) for lateral in (0.0, 1.5, 3.5)}
    within = np.abs(np.asarray(x) - 20.0) < 4.8
    crossing = (np.abs(np.asarray(x) - 20.0) > 6.1) & (np.abs(np.asarray(x) - 20.0) < 8.9)
    assert not lines[0.0][:, within].any() and not lines[3.5][:, within].any()
    bars = lines[1.5][:, crossing].mean(1)
    assert 3 <= (bars > 0.5).sum() < 12  # most seeds mark crossings, some none


def test_weather_varies_within_physical_bounds():
    light = jax.jit(jax.vmap(lights.sample_light))(jax.random.split(jax.random.key(0), 400))
    np.testing.assert_allclose(np.linalg.norm(light.sun_direction, axis=1), 1.0, rtol=1e-5)
    elevation = np.degrees(np.arcsin(np.asarray(light.sun_direction[:, 2])))
    assert elevation.min() > 2.0 and elevation.max() < 66.0 and np.std(elevation) > 10
    visibility = 3.9 / np.asarray(light.extinction)
    assert 150 < visibility.min() < 1000 < 15000 < visibility.max() < 26000
    bright = np.asarray(light.sun_colour).max(1)
    assert 0.15 < (bright < 0.12).mean() < 0.5 and (bright > 0.6).mean() > 0.4
    assert (np.asarray(light.horizon) > 0.05).all() and 0.02 < (np.asarray(light.wetness) > 0).mean() < 0.2


def test_sensor_exposes_dim_scenes_and_adds_noise_of_its_key():
    light = clear_light()
    camera_ = sensor.sample_sensor(jax.random.key(1))._replace(vignetting=jnp.float32(0.3))
    scene = jnp.broadcast_to(jnp.linspace(0.05, 0.5, 64)[None, :, None], (48, 64, 3))
    expose = jax.jit(sensor.expose)
    first, again, other = (expose(scene, light, camera_, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    a, b = np.asarray(first, float), np.asarray(other, float)
    assert 0.5 < np.abs(a - b).mean() < 8.0
    dim = np.asarray(expose(0.25 * scene, light, camera_, jax.random.key(1)), float)
    assert 0.7 * a.mean() < dim.mean() < a.mean()
    columns = a.mean((0, 2))
    assert (np.diff(columns[::8]) > 0).all()
    flat = np.asarray(expose(jnp.full((49, 65, 3), 0.3), light, camera_, jax.random.key(1)), float).mean(-1)
    assert flat[:6, :6].mean() < flat[20:28, 28:36].mean() - 5

"""The LiDAR against closed forms in float64: where its points lie, and which surfaces it loses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.world import lidar, primitives, rigs
from data_prep.world.primitives import Geometry
from data_prep.world.surfaces import Material, Semantic

GREY = jnp.full(3, 0.5)
NONE = primitives.ellipsoid(jnp.zeros((1, 3)), jnp.ones((1, 3)))._replace(valid=jnp.zeros(1, bool))
PERFECT = dataclasses.replace(
    rigs.read_rig("nuscenes").lidar, range_noise=0.0, dropout=0.0, range_dark=1000.0, range_max=900.0
)
HALF, FLOOR = (14.0, 9.0), -1.7  # a room around the sensor: |x| < 14, |y| < 9, z > -1.7, no ceiling


def room(material: int = Material.CONCRETE, colour=GREY) -> Geometry:
    low = jnp.array([[14.0, -30, -5], [-15.0, -30, -5], [-30, 9.0, -5], [-30, -10.0, -5], [-30, -30, -3.0]])
    high = jnp.array([[15.0, 30, 30], [-14.0, 30, 30], [30, 10.0, 30], [30, -9.0, 30], [30, 30, FLOOR]])
    walls = primitives.painted(primitives.box(low, high), int(material), int(Semantic.BUILDING), colour)
    return Geometry(walls, NONE)


def wall(distance: float, material: int, colour=GREY, extra=(0.0, 0.0, 0.0, 0.0)) -> Geometry:
    """A ring of walls that fills the whole horizon at one distance."""
    d = distance
    low = jnp.array([[d, -400.0, -200], [-d - 1, -400, -200], [-400, d, -200], [-400, -d - 1, -200]])
    high = jnp.array([[d + 1, 400.0, 200], [-d, 400, 200], [400, d + 1, 200], [400, -d, 200]])
    return Geometry(primitives.painted(primitives.box(low, high), int(material), 4, colour, extra), NONE)


_compiled: dict[int, tuple] = {}


def scan(geometry: Geometry, sensor: rigs.Lidar, pose=None, seed: int = 0, extinction: float = 0.0) -> lidar.Sweep:
    if id(sensor) not in _compiled:  # compiled once per sensor; the entry keeps the sensor, and so its id, alive
        _compiled[id(sensor)] = (sensor, jax.jit(lambda g, p, k, e: lidar.sweep(g, sensor, p, k, e)))
    pose = jnp.asarray(np.eye(4) if pose is None else pose, jnp.float32)
    return jax.device_get(_compiled[id(sensor)][1](geometry, pose, jax.random.key(seed), extinction))


def expected(sensor: rigs.Lidar, pose: np.ndarray) -> np.ndarray:
    """Points [columns, beams, 3] in the sensor's frame in the room, NaN where there is sky; float64 closed form."""
    azimuth = sensor.start - 2 * np.pi / sensor.columns * np.arange(sensor.columns)
    azimuth, elevation = np.meshgrid(azimuth, sensor.elevations, indexing="ij")
    rays = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], -1)
    d, o = rays @ pose[:3, :3].T, pose[:3, 3]
    with np.errstate(divide="ignore"):
        to_x = np.where(d[..., 0] > 0, HALF[0] - o[0], -HALF[0] - o[0]) / d[..., 0]
        to_y = np.where(d[..., 1] > 0, HALF[1] - o[1], -HALF[1] - o[1]) / d[..., 1]
        to_floor = np.where(d[..., 2] < 0, (FLOOR - o[2]) / d[..., 2], np.inf)
    return rays * np.minimum(np.minimum(to_x, to_y), to_floor)[..., None]


@pytest.mark.parametrize("columns, beams", [(1084, 32), (97, 37), (48, 1)])
def test_points_are_where_the_beams_meet_the_room(columns, beams):
    sensor = dataclasses.replace(PERFECT, columns=columns, elevations=np.deg2rad(np.linspace(-31.0, 11.0, beams)))
    pose = np.eye(4)
    pose[:3, :3] = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # as nuScenes' is mounted
    pose[:3, 3] = [0.4, -0.3, 0.2]
    made = scan(room(), sensor, pose)
    wanted = expected(sensor, pose).reshape(-1, 3)
    assert made.points.shape == (columns * beams, 3) and made.valid.all()
    np.testing.assert_allclose(made.points, wanted, rtol=2e-5, atol=2e-4)
    np.testing.assert_array_equal(made.ring, np.tile(np.arange(beams), columns))


def test_the_built_in_lidar_fires_like_the_real_one():
    """HDL-32E: 32 beams from -30.67 to 10.67 degrees, 1084 columns; DDAD: 64 and more beams, 250 m."""
    nuscenes, ddad = (rigs.read_rig(name).lidar for name in ("nuscenes", "ddad"))
    assert np.degrees(nuscenes.elevations[[0, -1]]) == pytest.approx([-30.67, 10.67])
    assert (len(nuscenes.elevations), nuscenes.columns) == (32, 1084)
    assert len(ddad.elevations) >= 64 and ddad.range_max == 250 and not ddad.body_returns


def share(geometry: Geometry, sensor: rigs.Lidar, **options) -> float:
    return float(scan(geometry, sensor, **options).valid.mean())


def test_dark_far_and_grazed_surfaces_are_lost_first():
    sensor = dataclasses.replace(PERFECT, range_dark=50.0, elevations=np.deg2rad([-1.0, 0.0, 1.0]), columns=200)
    black, white = jnp.zeros(3), jnp.ones(3)
    near, far = (share(wall(d, Material.PAINT, black), sensor) for d in (5.0, 60.0))
    assert near > 0.99 and far < 0.1
    assert share(wall(60.0, Material.PAINT, white), sensor) > 0.5
    assert share(wall(60.0, Material.SIGN, white), sensor) > 0.97  # retro-reflecting
    clear, hazy = (share(wall(50.0, Material.PAINT, white), sensor, extinction=e) for e in (0.0, 0.03))
    assert hazy < 0.5 * clear
    # What `range_dark` says: 10 % reflectivity, facing, that far away: half of the returns.
    narrow = dataclasses.replace(sensor, columns=4000, range_dark=30.0, start=np.deg2rad(4.5))
    paint = jnp.full(3, (0.1 - 0.03) / 0.55)
    assert scan(wall(30.0, Material.PAINT, paint), narrow).valid[: 100 * 3].mean() == pytest.approx(0.5, abs=0.09)
    # Asphalt far away is grazed, so returns get rare long before the range limit.
    slab = primitives.box(jnp.array([[-300.0, -300, -3]]), jnp.array([[300.0, 300, -1.8]]))
    floor = Geometry(primitives.painted(slab, int(Material.ROAD), 1, GREY), NONE)
    rows = scan(floor, dataclasses.replace(sensor, elevations=np.deg2rad([-20.0, -4.0, -1.2]))).valid.reshape(-1, 3)
    at_5m, at_26m, at_86m = rows.mean(0)
    assert at_5m > 0.98 and 0.2 < at_26m < 0.9 and at_86m < 0.05


def test_glass_is_mostly_not_seen_and_facades_lose_their_windows():
    sensor = dataclasses.replace(PERFECT, elevations=np.deg2rad([0.0, 2.0]))
    assert 0.05 < share(wall(8.0, Material.GLASS), sensor) < 0.2
    solid, half = (share(wall(8.0, Material.FACADE, GREY, (3.0, 3.0, s, 0.5)), sensor) for s in (0.0, 0.5))
    assert solid > 0.99 and 0.6 < half < 0.85


def test_range_limits_noise_and_dropout():
    sensor = dataclasses.replace(PERFECT, range_noise=0.05, dropout=0.3, range_min=10.0, range_max=14.0)
    made, same, other = scan(room(), sensor), scan(room(), sensor), scan(room(), sensor, seed=1)
    for a, b in zip(made, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (made.valid != other.valid).mean() > 0.05
    true = np.linalg.norm(expected(sensor, np.eye(4)).reshape(-1, 3), axis=1)
    assert not made.valid[(true < 10.0) | (true > 14.0)].any()
    inside = (true > 10.0) & (true < 14.0)
    assert made.valid[inside].mean() == pytest.approx(0.7, abs=0.03)
    error = np.linalg.norm(made.points, axis=1)[made.valid] - true[made.valid]
    assert error.std() == pytest.approx(0.05, rel=0.1) and abs(error.mean()) < 0.005
    assert made.intensity.min() >= 0.0 and made.intensity.max() <= 1.0


def test_the_cars_own_body_hides_what_is_behind_it_and_is_kept_or_not():
    top = primitives.box(jnp.array([[-2.0, -1, -1]]), jnp.array([[2.0, 1, -0.3]]))
    roof = primitives.painted(top, int(Material.PAINT), int(Semantic.EGO), GREY)
    scene = primitives.merge(room(), Geometry(roof, NONE))
    kept = scan(scene, dataclasses.replace(PERFECT, body_returns=True))
    dropped = scan(scene, dataclasses.replace(PERFECT, body_returns=False))
    on_roof = np.abs(kept.points - [0, 0, -0.3]).max(1) < 2.01
    on_roof &= np.abs(kept.points[:, 2] + 0.3) < 1e-3
    assert on_roof.sum() > 1000 and kept.valid.all()
    np.testing.assert_array_equal(dropped.valid, ~on_roof)

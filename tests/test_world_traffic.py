"""Traffic and pedestrians: on the ground, in nobody's way, moving steadily, the same from every anchor."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.world import road as roads
from data_prep.world import style as styles
from data_prep.world import traffic
from data_prep.world import vehicle_fleet as fleet
from data_prep.world.surfaces import Material, Semantic
from tests.polyhedra import corners


def scene(key):
    """A road and a busy style."""
    style = styles.sample_style(key)._replace(
        parked=jnp.float32(0.9), traffic=jnp.float32(0.8), people=jnp.float32(8.0), heavy=jnp.float32(0.3)
    )
    return roads.sample_road(key), style


@jax.jit
def _moment(key, t, shift):
    road, style = scene(key)
    anchor = roads.anchor_at(road, t) + shift
    cells = anchor + jnp.arange(-roads.CELLS_BEHIND, roads.CELLS_AHEAD)
    return (
        road, anchor, roads.ego_pose(road, anchor, t),
        traffic.parked(road, style, key, anchor, cells), traffic.driving(road, style, key, anchor, t),
        traffic.walking(road, style, key, anchor, cells, t),
    )  # fmt: skip


@functools.cache
def moment(seed: int, t: float, shift: int = 0):
    """Road, anchor, pose of the car; geometry of parked and driving vehicles and of people, in the frame of the
    anchor's cell + shift."""
    return jax.tree.map(np.asarray, _moment(jax.random.key(seed), jnp.float32(t), jnp.int32(shift)))


def bodies(geometry, detailed: int) -> dict[int, tuple]:
    """Per valid vehicle: corners [K, 3] of its solid parts, its rotation, its origin."""
    solids = geometry.solids
    near = detailed * fleet.SOLIDS
    total = solids.valid.shape[0]
    owner = np.concatenate([np.arange(near) // fleet.SOLIDS, detailed + np.arange(total - near) // fleet.COARSE])
    found = {}
    for vehicle in np.unique(owner[solids.valid]):
        mine = np.nonzero((owner == vehicle) & solids.valid)[0]
        points = np.concatenate([corners(solids.planes[part]) for part in mine])
        found[int(vehicle)] = (points, solids.rotation[mine[0]], solids.origin[mine[0]])
    return found


def outline(body: tuple) -> np.ndarray:
    """Rectangle [4, 2] around a vehicle in plan view, along its own axes, mirrors left out."""
    points, rotation, origin = body
    local = (points - origin) @ rotation
    x0, x1 = local[:, 0].min(), local[:, 0].max()
    y = np.quantile(np.abs(local[local[:, 2] < 0.7, 1]), 1.0)
    corners_2d = np.array([[x0, -y], [x1, -y], [x1, y], [x0, y]])
    return corners_2d @ rotation[:2, :2].T + origin[:2]


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Signed gap of two rectangles [4, 2] along the best separating axis: negative where they overlap."""
    best = -np.inf
    for rectangle in (a, b):
        for edge in (rectangle[1] - rectangle[0], rectangle[2] - rectangle[1]):
            axis = np.array([-edge[1], edge[0]]) / np.linalg.norm(edge)
            pa, pb = a @ axis, b @ axis
            best = max(best, pb.min() - pa.max(), pa.min() - pb.max())
    return best


MOMENTS = [(1, 3.0), (2, 0.5), (3, 7.3), (5, 12.0)]


@pytest.mark.parametrize(("seed", "t"), MOMENTS)
def test_vehicles_overlap_nobody_and_keep_clear_of_the_car(seed, t):
    _, _, pose, parked, driving, _ = moment(seed, t)
    standing = bodies(parked, traffic.PARKED_DETAILED)
    moving = bodies(driving, traffic.DRIVING_DETAILED)
    assert len(moving) > 8
    rectangles = [outline(body) for body in (*standing.values(), *moving.values())]
    for a, b in itertools.combinations(rectangles, 2):
        if np.linalg.norm(a.mean(0) - b.mean(0)) < 14:
            assert gap(a, b) > 0.05
    # the car: 4.1 m long ahead of 0.9 m behind its rear axle; 8 m clear before and behind it in its lane
    own = np.array([[-0.9 - 7.5, -1.3], [4.1 + 7.5, -1.3], [4.1 + 7.5, 1.3], [-0.9 - 7.5, 1.3]])
    own = own @ pose[:2, :2].T + pose[:2, 3]
    for rectangle in rectangles:
        assert gap(own, rectangle) > 0.0


@pytest.mark.parametrize(("seed", "t"), MOMENTS)
def test_wheels_stand_on_the_ground(seed, t):
    road, anchor, _, parked, driving, _ = moment(seed, t)
    for geometry in (parked, driving):
        rounds = geometry.rounds
        wheels = rounds.valid & (rounds.material == Material.RUBBER) & (rounds.semantic == Semantic.VEHICLE)
        assert wheels.sum() >= 16
        axle = np.abs(rounds.planes[wheels, 0, :3])
        radius = 1 / np.sqrt(np.linalg.eigvalsh(rounds.quadric[wheels])[:, 2])
        upward = np.sqrt(np.maximum(1 - axle[:, 2] ** 2, 0))
        low = rounds.centre[wheels, 2] - radius * upward
        ground = np.asarray(roads.height(road, anchor, jnp.asarray(rounds.centre[wheels, 0])))
        np.testing.assert_allclose(low, ground, atol=0.05)
        assert np.abs(low - ground).mean() < 0.012


def test_parked_cars_stand_in_their_strip_away_from_junctions():
    seen = 0
    for seed, t in MOMENTS:
        road, anchor, _, parked, _, _ = moment(seed, t)
        key = jax.random.key(seed)
        for points, rotation, origin in bodies(parked, traffic.PARKED_DETAILED).values():
            station, lateral = roads.lane_coordinates(road, anchor, jnp.asarray(points[:, :2]))
            station, lateral = np.asarray(station), np.abs(np.asarray(lateral))
            cell = int(np.floor(station.mean() / roads.CELL))
            middle = (cell + 0.5) * roads.CELL
            junction = bool(roads.is_junction(road, key, anchor + cell))
            if lateral.min() > road.half_width:  # in a crossing street
                point, yaw = roads.beside(road, anchor, jnp.float32(middle), jnp.float32(0.0))
                across = (points[:, :2] - np.asarray(point[:2])) @ [np.cos(yaw), np.sin(yaw)]
                assert junction and np.abs(across[points[:, 2] - origin[2] < 0.7]).max() < road.cross_half_width
                continue
            seen += 1
            assert road.parking > 1.0
            low = points[:, 2] - origin[2] < 0.7
            assert lateral[low].max() < road.half_width and lateral[low].min() > road.half_width - road.parking
            heading = float(roads.heading(road, anchor, jnp.float32(station.mean())))
            assert abs(np.cos(heading) * rotation[0, 0] + np.sin(heading) * rotation[1, 0]) > 0.99
            if junction:
                assert np.abs(station - middle).min() > road.cross_half_width + 5.5
    assert seen > 30


@pytest.mark.parametrize(("seed", "t"), MOMENTS[:2])
def test_the_same_street_from_the_next_anchor(seed, t):
    """Vehicles near the car are where they are, whichever cell the coordinates start from."""
    one, two = moment(seed, t), moment(seed, t, 1)
    here, there = (np.asarray(roads.anchor_position(m[0], jnp.int32(m[1])), np.float64) for m in (one, two))
    for index, detailed in ((3, traffic.PARKED_DETAILED), (4, traffic.DRIVING_DETAILED)):
        first = np.array([body[2] for body in bodies(one[index], detailed).values()]) + here
        second = np.array([body[2] for body in bodies(two[index], detailed).values()]) + there
        near = np.abs(first[:, 0] - here[0] - 40) < 60
        assert near.sum() >= 2
        nearest = np.abs(first[near, None] - second[None]).max(-1).min(1)
        assert nearest.max() < 2e-3


def test_traffic_moves_steadily():
    """From one moment to the next every vehicle near the car goes on along its lane; none appears or vanishes."""
    for seed, t in ((1, 3.0), (3, 7.3)):
        one, two = moment(seed, t), moment(seed, t + 0.1)
        assert one[1] == two[1]
        ego = one[2][0, 3]
        before = np.array([body[2] for body in bodies(one[4], traffic.DRIVING_DETAILED).values()])
        after = np.array([body[2] for body in bodies(two[4], traffic.DRIVING_DETAILED).values()])
        before = before[np.abs(before[:, 0] - ego) < 70]
        distance = np.linalg.norm(before[:, None] - after[None], axis=-1)
        nearest = distance.min(1)
        assert nearest.max() < 2.0 and len(set(distance.argmin(1))) == len(before)
        side = np.asarray(roads.lane_coordinates(one[0], one[1], jnp.asarray(before[:, :2]))[1])
        forward = after[distance.argmin(1), 0] - before[:, 0]
        assert np.all(np.where(side < 0, forward, -forward) > 0.1), "right-hand traffic"


@pytest.mark.parametrize(("seed", "t"), MOMENTS)
def test_people_are_on_the_sidewalk(seed, t):
    road, anchor, _, _, _, walking = moment(seed, t)
    rounds = walking.rounds
    near = traffic.PEOPLE_DETAILED * 12
    valid = rounds.valid[:near].reshape(-1, 12).all(1)
    assert valid.sum() >= 8 and (rounds.semantic[rounds.valid] == Semantic.PEDESTRIAN).all()
    quadric = rounds.quadric[:near].reshape(-1, 12, 3, 3)[valid].astype(np.float64)
    half = np.sqrt(np.linalg.inv(quadric)[..., 2, 2])
    low = (rounds.centre[:near, 2].reshape(-1, 12)[valid] - half).min(1)
    middle = rounds.centre[:near, :2].reshape(-1, 12, 2)[:, 2][valid]
    station, lateral = roads.lane_coordinates(road, anchor, jnp.asarray(middle))
    deep = np.abs(np.asarray(lateral)) - road.half_width
    assert deep.min() > 0.3 and deep.max() < road.sidewalk
    above = low - np.asarray(roads.height(road, anchor, jnp.asarray(middle[:, 0])))
    on_curb = np.abs(above - road.curb) < 0.04
    assert on_curb.mean() > 0.5
    for x, up, raised in zip(np.asarray(station), above, on_curb, strict=True):
        if not raised:  # crossing a street, on its asphalt
            cell = int(np.floor(x / roads.CELL))
            assert bool(roads.is_junction(road, jax.random.key(seed), anchor + cell)) and abs(up) < 0.04
            assert abs(x - (cell + 0.5) * roads.CELL) < road.cross_half_width + 2.6


def test_walkers_walk():
    one, two = moment(1, 3.0), moment(1, 3.1)
    near = traffic.PEOPLE_DETAILED * 12
    chests = [m[5].rounds.centre[:near].reshape(-1, 12, 3)[:, 2][m[5].rounds.valid[:near:12]] for m in (one, two)]
    moved = np.linalg.norm(chests[0][:, None] - chests[1][None], axis=-1).min(1) / 0.1
    moved = np.sort(moved)[: max(len(moved) - 2, 4)]  # one or two may swap their form with distant ones
    assert moved.max() < 1.8 and np.median(moved) > 0.9


def test_scenes_can_be_made_together():
    """vmap over scenes gives what each scene gives alone, and seeds differ."""
    _, anchor, _, _, alone, _ = moment(1, 3.0)

    def driving(key):
        return traffic.driving(*scene(key), key, anchor, jnp.float32(3.0)).solids

    together = jax.jit(jax.vmap(driving))(jnp.stack([jax.random.key(4), jax.random.key(1)]))
    assert np.array_equal(together.valid[1], alone.solids.valid)
    np.testing.assert_allclose(together.planes[1], alone.solids.planes, atol=2e-3)
    assert not np.allclose(together.planes[0], together.planes[1], atol=1.0)

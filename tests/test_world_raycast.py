"""Ray casting against an independent float64 NumPy slab/quadratic solution, and closed forms of the primitives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.world import primitives, raycast
from data_prep.world.primitives import FACES, Geometry
from tests import polyhedra

SIZE = (40, 72)
K = jnp.array([[60.0, 0.0, 35.5], [0.0, 55.0, 18.0], [0.0, 0.0, 1.0]])


def camera(yaw: float = 0.0, origin=(0.0, 0.0, 1.5)) -> jnp.ndarray:
    pose = np.eye(4)
    pose[:3, 0] = [np.sin(yaw), -np.cos(yaw), 0.0]
    pose[:3, 1] = [0.0, 0.0, -1.0]
    pose[:3, 2] = [np.cos(yaw), np.sin(yaw), 0.0]
    pose[:3, 3] = origin
    return jnp.asarray(pose, jnp.float32)


def random_geometry(seed: int, count: int = 60) -> Geometry:
    """Boxes, frusta, extrusions, ellipsoids and cylinders all around, none at the origin, some not valid."""
    rng = np.random.default_rng(seed)

    def places(n):
        angle, radius = rng.uniform(0, 2 * np.pi, n), rng.uniform(5, 60, n)
        return jnp.asarray(np.stack([radius * np.cos(angle), radius * np.sin(angle), rng.uniform(-1, 3, n)], -1))

    def turned(parts, n):
        rotation = primitives.yaw_rotation(jnp.asarray(rng.uniform(-3, 3, n)), jnp.asarray(rng.uniform(-0.3, 0.3, n)))
        moved = primitives.place(parts, rotation, places(n))
        return primitives.painted(moved, 0, 0, jnp.full(3, 0.5), valid=jnp.asarray(rng.uniform(size=n) < 0.9))

    size = jnp.asarray(rng.uniform(0.2, 2.0, (count, 3)))
    car = jnp.array([[-2.2, 0.3], [-2.2, 0.9], [-0.8, 1.45], [0.6, 1.45], [2.2, 0.7], [2.2, 0.3]])
    solids = [
        turned(primitives.box(-size, size), count),
        turned(primitives.frustum(-size, size, size[:, :2] * 0.9, size[:, :2] * 0.3), count),
        turned(polyhedra.extrusion(jnp.broadcast_to(car, (count, 6, 2)), size[:, 0], 0.1), count),
        primitives.half_spaces(jnp.array([[[0.05, -0.02, 1.0]]]), jnp.array([[-0.2]])),  # a sloping ground
    ]
    rounds = [
        turned(primitives.ellipsoid(0.1 * size, size), count),
        *(turned(polyhedra.cylinder(0.1 * size, axis, size[:, :2], size[:, 2]), count) for axis in range(3)),
    ]
    return Geometry(primitives.flatten(*solids), primitives.flatten(*rounds))


def reference(geometry: Geometry, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances [P] (inf = none) and parts [P] by clipping every ray with every part in float64; directions [P, 3]."""
    best, which = np.full(len(directions), np.inf), np.full(len(directions), -1)
    first = 0
    for parts, is_round in ((geometry.solids, False), (geometry.rounds, True)):
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parts)
        for i in np.flatnonzero(np.asarray(parts.valid)):
            low, high = np.full(len(directions), -np.inf), np.full(len(directions), np.inf)
            for normal, offset in zip(p.planes[i, :, :3], p.planes[i, :, 3], strict=True):
                speed, gap = directions @ normal, offset - normal @ origin
                with np.errstate(divide="ignore", invalid="ignore"):
                    s = gap / speed
                high = np.where(speed > 0, np.minimum(high, s), high)
                low = np.where(speed < 0, np.maximum(low, s), low)
                low = np.where((speed == 0) & (gap < 0), np.inf, low)
            if is_round:
                offset = origin - p.centre[i]
                a = np.einsum("pi,ij,pj->p", directions, p.quadric[i], directions)
                b = directions @ p.quadric[i] @ offset
                c = offset @ p.quadric[i] @ offset - 1
                under = b * b - a * c
                root = np.sqrt(np.maximum(under, 0))
                low = np.where(under > 0, np.maximum(low, (-b - root) / a), np.inf)
                high = np.minimum(high, (-b + root) / a)
            hit = (low < high) & (low > 0) & (low < best)
            best, which = np.where(hit, low, best), np.where(hit, i + first, which)
        first += len(parts.valid)
    return best, which


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tiles_at_once", [1, 3, 100])
def test_first_hits_equal_the_float64_reference(seed, tiles_at_once):
    geometry = random_geometry(seed)
    tiles = raycast.pinhole_tiles(K, camera(yaw=0.7 + seed), SIZE, tile=(16, 32))
    hits = jax.jit(raycast.trace, static_argnums=2)(geometry, tiles, tiles_at_once)
    directions = np.moveaxis(np.asarray(tiles.directions, np.float64), 1, 2).reshape(-1, 3)
    distance, part = reference(geometry, np.asarray(tiles.origin, np.float64), directions)
    inverse = np.asarray(hits.inverse).ravel()
    found = np.asarray(hits.part).ravel()
    agree = found == part
    assert (part >= 0).mean() > 0.4  # the test sees something
    assert len(set(part.tolist())) > 20
    assert agree.mean() > 0.998, "only rays through an edge may fall on either side in float32"
    seen = agree & (part >= 0)
    np.testing.assert_allclose(1 / inverse[seen], distance[seen], rtol=3e-4)
    np.testing.assert_allclose(np.median(np.abs(inverse[seen] * distance[seen] - 1)), 0.0, atol=1e-6)
    assert np.all(inverse[found < 0] == 0)


def test_depth_of_the_ground_and_a_sphere_in_closed_form():
    ground = primitives.half_spaces(jnp.array([[[0.0, 0.0, 1.0]]]), jnp.zeros((1, 1)))
    ball = primitives.ellipsoid(jnp.array([[8.0, 0.0, 1.5]]), jnp.array([[1.0, 1.0, 1.0]]))
    geometry = Geometry(primitives.flatten(ground), primitives.flatten(ball))
    hits = raycast.trace(geometry, raycast.pinhole_tiles(K, camera(), SIZE))
    inverse = np.asarray(raycast.untile(hits.inverse, SIZE))
    part = np.asarray(raycast.untile(hits.part, SIZE))
    v, u = np.mgrid[: SIZE[0], : SIZE[1]]
    x, y = (u - 35.5) / 60.0, (v - 18.0) / 55.0
    with np.errstate(divide="ignore", invalid="ignore"):
        on_ground = 1.5 / y
        spread = 1 + x**2 + y**2
        on_ball = (8 - np.sqrt(64 - spread * 63)) / spread
    ball_seen = spread * 63 < 64
    np.testing.assert_allclose(1 / inverse[ball_seen], on_ball[ball_seen], rtol=1e-5)
    below = (y > 0) & ~ball_seen
    np.testing.assert_allclose(1 / inverse[below], on_ground[below], rtol=1e-5)
    assert np.all(part[ball_seen] == 1)
    assert np.all(part[(y <= 0) & ~ball_seen] == raycast.NOTHING)


def test_normals_point_at_the_camera_and_are_those_of_the_surface():
    geometry = random_geometry(3)
    tiles = raycast.pinhole_tiles(K, camera(0.3), SIZE)
    hits = raycast.trace(geometry, tiles)
    directions = jnp.moveaxis(tiles.directions, 1, 2)
    points = tiles.origin + directions / jnp.maximum(hits.inverse, 1e-6)[..., None]
    normal = np.asarray(raycast.normals(geometry, hits, points))
    seen = np.asarray(hits.part) != raycast.NOTHING
    np.testing.assert_allclose(np.linalg.norm(normal[seen], axis=-1), 1.0, atol=1e-5)
    assert np.all(np.sum(normal * np.asarray(directions), -1)[seen] < 1e-4)
    # a step along the normal leaves the part; a step against it enters
    part, face = np.asarray(hits.part), np.asarray(hits.face)
    curved = seen & (face == FACES)
    assert curved.sum() > 50
    index = part[curved] - len(geometry.solids.valid)
    q, c = np.asarray(geometry.rounds.quadric)[index], np.asarray(geometry.rounds.centre)[index]
    for sign in (-1, 1):
        moved = np.asarray(points)[curved] + sign * 0.02 * normal[curved] - c
        value = np.einsum("pi,pij,pj->p", moved, q, moved)
        assert np.mean((value - 1) * sign > 0) > 0.99


def test_a_part_around_the_camera_is_not_seen():
    room = primitives.flatten(primitives.box(jnp.array([[-1.0, -1.0, 0.0]]), jnp.array([[1.0, 1.0, 3.0]])))
    ball = primitives.flatten(primitives.ellipsoid(jnp.array([[0.0, 0.0, 1.5]]), jnp.array([[2.0, 2.0, 2.0]])))
    hits = raycast.trace(Geometry(room, ball), raycast.pinhole_tiles(K, camera(), SIZE))
    assert np.all(np.asarray(hits.part) == raycast.NOTHING)


def test_a_round_part_is_seen_from_a_corner_of_its_bounding_box():
    ground = primitives.flatten(primitives.box(jnp.array([[-9.0, -9.0, -2.0]]), jnp.array([[9.0, 9.0, -1.0]])))
    ball = primitives.flatten(primitives.ellipsoid(jnp.array([[1.8, 1.8, 1.5]]), jnp.array([[2.0, 2.0, 2.0]])))
    tiles = raycast.pinhole_tiles(K, camera(yaw=np.pi / 4), SIZE)
    hits = raycast.trace(Geometry(ground, ball), tiles)
    inverse = np.asarray(raycast.untile(hits.inverse, SIZE))
    assert 1 / inverse[18, 35] == pytest.approx(1.8 * np.sqrt(2) - 2.0, rel=2e-2)  # nearly the optical axis
    assert np.all(np.asarray(raycast.untile(hits.part, SIZE)) == 1)
    behind = raycast.trace(Geometry(ground, ball), raycast.pinhole_tiles(K, camera(yaw=np.pi * 5 / 4), SIZE))
    assert not np.any(np.asarray(behind.part) == 1)


def test_worlds_without_round_parts_have_hits_and_normals():
    box = primitives.flatten(primitives.box(jnp.array([[4.0, -9.0, -9.0]]), jnp.array([[5.0, 9.0, 9.0]])))
    empty = jax.tree.map(lambda leaf: leaf[:0], box)
    tiles = raycast.pinhole_tiles(K, camera(), SIZE)
    hits = raycast.trace(Geometry(box, empty), tiles)
    points = tiles.origin + jnp.moveaxis(tiles.directions, 1, 2) / jnp.maximum(hits.inverse, 1e-6)[..., None]
    normal = raycast.normals(Geometry(box, empty), hits, points)
    np.testing.assert_allclose(normal, np.broadcast_to([-1.0, 0.0, 0.0], normal.shape), atol=1e-6)


def test_constructors_bound_what_they_say():
    rng = np.random.default_rng(0)
    points = rng.uniform(-3, 3, (4000, 3))

    def inside(parts) -> np.ndarray:
        planes = np.asarray(parts.planes, np.float64)
        offset = points - np.asarray(parts.centre, np.float64)
        flat = np.all(points @ planes[:, :3].T <= planes[:, 3] + 1e-6, -1)
        return flat & (np.einsum("pi,ij,pj->p", offset, np.asarray(parts.quadric, np.float64), offset) <= 1)

    x, y, z = points.T
    low, high = jnp.array([-1.0, -2.0, 0.0]), jnp.array([2.0, 1.0, 2.5])
    in_box = (x >= -1) & (x <= 2) & (y >= -2) & (y <= 1) & (z >= 0) & (z <= 2.5)
    np.testing.assert_array_equal(inside(primitives.box(low, high)), in_box)
    tapered = primitives.frustum(low, high, jnp.array([0.5, 1.0]), jnp.array([1.0, 0.0]))
    up = z / 2.5
    shrunk = (x >= -1 + 0.5 * up) & (x <= 2 - up) & (y >= -2 + up) & (y <= 1) & (z >= 0) & (z <= 2.5)
    np.testing.assert_array_equal(inside(tapered), shrunk)
    radii = np.array([1.0, 2.0, 0.5])
    np.testing.assert_array_equal(
        inside(primitives.ellipsoid(jnp.array([0.2, 0.1, 0.3]), jnp.asarray(radii))),
        np.sum(((points - [0.2, 0.1, 0.3]) / radii) ** 2, -1) <= 1,
    )
    np.testing.assert_array_equal(
        inside(polyhedra.cylinder(jnp.zeros(3), 1, jnp.array([1.0, 2.0]), 1.5)),
        (x**2 + (z / 2) ** 2 <= 1) & (np.abs(y) <= 1.5),
    )
    wedge = polyhedra.extrusion(jnp.array([[-1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]), 1.0, 0.2)
    np.testing.assert_array_equal(inside(wedge), (z >= 0) & (z <= 2 - 2 * np.abs(x)) & (np.abs(y) <= 1 - 0.2 * z))


def test_placing_moves_planes_quadrics_and_frames_alike():
    parts = primitives.flatten(polyhedra.cylinder(jnp.array([[0.5, 0.0, 1.0]]), 2, jnp.array([[0.5, 0.8]]), 1.0))
    rotation = primitives.yaw_rotation(jnp.float32(0.7), jnp.float32(0.2))
    origin = jnp.array([3.0, -2.0, 0.5])
    moved = primitives.place(parts, rotation, origin)
    rng = np.random.default_rng(1)
    local = rng.uniform(-2, 3, (500, 3)).astype(np.float32)
    world = local @ np.asarray(rotation).T + np.asarray(origin)

    def signed(p, x):
        planes, offset = np.asarray(p.planes[0]), x - np.asarray(p.centre[0])
        value = np.einsum("pi,ij,pj->p", offset, np.asarray(p.quadric[0]), offset)
        return np.concatenate([x @ planes[:, :3].T - planes[:, 3], value[:, None]], 1)

    np.testing.assert_allclose(signed(parts, local), signed(moved, world), atol=2e-5)
    back = (world - np.asarray(moved.origin[0])) @ np.asarray(moved.rotation[0])
    np.testing.assert_allclose(back, local, atol=1e-5)

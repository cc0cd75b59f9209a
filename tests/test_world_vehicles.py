"""Vehicle models and figures of people: real sizes, closed shapes, honest statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.world import people as persons
from data_prep.world import vehicle_fleet as fleet
from data_prep.world import vehicles
from data_prep.world.primitives import yaw_rotation
from data_prep.world.surfaces import Material, Semantic
from tests.polyhedra import corners

# Length, width and height in metres, as on data sheets of current vehicles of each kind (without mirrors).
SIZES = {
    "supermini": ((3.5, 4.1), (1.6, 1.8), (1.40, 1.55)),
    "hatchback": ((4.0, 4.5), (1.7, 1.9), (1.40, 1.55)),
    "saloon": ((4.4, 4.9), (1.75, 1.95), (1.38, 1.50)),
    "executive saloon": ((4.7, 5.2), (1.8, 2.0), (1.40, 1.52)),
    "estate": ((4.4, 4.9), (1.75, 1.95), (1.42, 1.58)),
    "people carrier": ((4.3, 4.8), (1.75, 1.95), (1.58, 1.75)),
    "crossover": ((4.2, 4.7), (1.75, 1.95), (1.55, 1.72)),
    "large SUV": ((4.6, 5.1), (1.85, 2.05), (1.68, 1.88)),
    "pickup": ((5.1, 5.6), (1.8, 2.0), (1.70, 1.90)),
    "panel van": ((4.8, 5.4), (1.9, 2.05), (1.90, 2.10)),
    "minibus": ((4.8, 5.4), (1.9, 2.05), (1.90, 2.10)),
    "high van": ((5.5, 6.4), (1.95, 2.15), (2.50, 2.80)),
    "light lorry": ((6.0, 7.5), (2.1, 2.45), (2.80, 3.30)),
    "lorry": ((8.5, 10.0), (2.4, 2.60), (3.50, 4.00)),
    "midi bus": ((9.0, 10.6), (2.4, 2.60), (2.85, 3.20)),
    "bus": ((11.5, 12.7), (2.5, 2.60), (2.90, 3.30)),
    "motorcycle": ((1.8, 2.3), (0.5, 1.0), (1.45, 1.90)),
    "bicycle": ((1.6, 1.95), (0.4, 0.8), (1.50, 1.90)),
    "bicycle pedalling": ((1.6, 1.95), (0.4, 0.8), (1.50, 1.90)),
}
MIRRORS = 0.3  # metres that mirrors may stick out on each side


@functools.cache
def model_corners(name: str, coarse: bool = False) -> list[np.ndarray]:
    model = fleet.MODELS[fleet.NAMES.index(name)]
    return [corners(piece.planes) for piece in (model.coarse if coarse else model.solids)]


@pytest.mark.parametrize("name", fleet.NAMES)
def test_models_have_real_sizes_and_closed_parts(name):
    model = fleet.MODELS[fleet.NAMES.index(name)]
    (long, wide, tall) = SIZES[name]
    for coarse in (False, True):
        every = model_corners(name, coarse)
        assert all(len(points) >= 6 for points in every), "a part has no volume"
        points = np.concatenate(every)
        for piece in model.rounds if not coarse else []:
            half = np.sqrt(np.abs(np.diag(np.linalg.pinv(piece.quadric))))
            points = np.concatenate([points, [piece.centre + half, piece.centre - half]])
        low, high = points.min(0), points.max(0)
        length = high[0] - low[0]
        assert long[0] * 0.98 <= length <= long[1] * 1.02, length
        assert abs(length - model.length) < 0.17
        assert wide[0] <= model.width <= wide[1] and high[1] <= model.width / 2 + MIRRORS
        assert tall[0] <= high[2] <= tall[1], high[2]
        assert low[2] > -1e-3 and (low[2] < 1e-3), "wheels touch the ground and nothing reaches below it"
        assert not np.isclose(low[1], 0) and abs(low[1] + high[1]) < 0.1


@pytest.mark.parametrize("name", fleet.NAMES)
def test_no_two_faces_of_a_model_lie_in_one_plane(name):
    """Parallel faces of parts that look different, seen from outside, are at least 3 mm apart: no z-fighting.

    Rays from all sides; the two nearest parts that each ray enters.
    """
    rng = np.random.default_rng(0)
    model = fleet.MODELS[fleet.NAMES.index(name)]
    for pieces in (model.solids, model.coarse):
        points = np.concatenate([corners(piece.planes) for piece in pieces])
        target = rng.uniform(points.min(0), points.max(0), (4000, 3))
        direction = rng.normal(size=(4000, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        origin = target - 15.0 * direction
        entries, normals = [], []
        for piece in pieces:
            planes = piece.planes[np.linalg.norm(piece.planes[:, :3], axis=1) > 0.5]
            ahead = direction @ planes[:, :3].T
            with np.errstate(divide="ignore", invalid="ignore"):
                at = (planes[:, 3] - origin @ planes[:, :3].T) / ahead
            enter = np.where(ahead < 0, at, -np.inf)
            leave = np.where(ahead > 0, at, np.inf).min(1)
            entries.append(np.where(enter.max(1) < leave, enter.max(1), np.inf))
            normals.append(planes[enter.argmax(1), :3])
        entries, normals = np.array(entries), np.array(normals)
        looks = np.array([hash((piece.material, piece.colour, piece.slot)) for piece in pieces])
        order = np.argsort(entries, 0)[:2]
        first, second = np.take_along_axis(entries, order, 0)
        rays = np.arange(4000)
        parallel = (normals[order[0], rays] * normals[order[1], rays]).sum(1) > 0.9995
        seen = np.isfinite(first)
        assert seen.sum() > 300
        both = np.isfinite(second) & parallel & (looks[order[0]] != looks[order[1]])
        doubtful = second[both] - first[both] < 0.003
        assert doubtful.sum() <= 0.001 * seen.sum(), [(o, n) for o, n in zip(*order[:, both][:, doubtful], strict=True)]


def test_wheels_are_round_and_symmetric():
    for name, model in zip(fleet.NAMES, fleet.MODELS, strict=True):
        wheels = [piece for piece in model.rounds if piece.material == Material.RUBBER]
        assert len(wheels) == (2 if model.semantic == Semantic.CYCLIST else 4), name
        for wheel in wheels:
            radius = 1 / np.sqrt(wheel.quadric[0, 0])
            np.testing.assert_allclose(wheel.quadric[2, 2], wheel.quadric[0, 0])
            np.testing.assert_allclose(wheel.centre[2], radius)
            assert 0.28 <= radius <= 0.5
        xs = sorted({round(float(wheel.centre[0]), 4) for wheel in wheels})
        np.testing.assert_allclose(xs[1] - xs[0], model.wheelbase, atol=1e-3)


def test_vehicle_statistics():
    u = jax.random.uniform(jax.random.key(0), (6000, vehicles.DRAWS))
    some = vehicles.sample(u, 0.25)
    paint = np.asarray(some.palette[:, 1])
    names = np.array(fleet.NAMES)[np.asarray(some.model)]
    car = ~np.isin(names, ["bus", "midi bus"])
    grey = paint.max(1) - paint.min(1) < 0.15 * paint.max(1) + 0.01
    assert 0.65 < grey[car].mean() < 0.9, "white, black, grey and silver dominate"
    assert 0.15 < (paint.min(1) > 0.45)[car].mean() < 0.45
    heavy = np.isin(names, list(vehicles._HEAVY))
    assert abs(heavy.mean() - 0.25) < 0.03
    assert float(some.scale.min()) > 0.9 and float(some.scale.max()) < 1.1
    assert np.std(np.asarray(some.length)[names == "saloon"]) > 0.05
    parked = vehicles.sample(u, 0.25, parked=True)
    assert not np.isin(np.array(fleet.NAMES)[np.asarray(parked.model)], ["bus", "midi bus", "lorry", "bicycle"]).any()


def test_people_have_human_sizes_and_stand_on_their_feet():
    u = jax.random.uniform(jax.random.key(4), (4000, persons.DRAWS))
    group = persons.sample(u)
    height, child = np.asarray(group.height), np.asarray(group.child)
    assert 0.08 < child.mean() < 0.16
    assert height[~child].min() >= 1.5 and height[~child].max() <= 1.95 and abs(height[~child].mean() - 1.72) < 0.03
    assert height[child].min() >= 1.0 and height[child].max() <= 1.5
    some = jax.tree.map(lambda leaf: leaf[:48], group)
    number = 48
    phase = jnp.linspace(0, 12.0, number)
    stride = jnp.where(jnp.arange(number) % 4 == 0, 0.0, 1.0)
    turn, valid = yaw_rotation(jnp.linspace(0, 6.0, number)), jnp.ones(number, bool)
    build = jax.jit(persons.build, static_argnums=6)
    made = build(some, phase, stride, turn, jnp.zeros((number, 3)), valid, 24)
    rounds = jax.tree.map(lambda leaf: np.asarray(leaf)[: 24 * 12].reshape(24, 12, *leaf.shape[1:]), made.rounds)
    half = np.sqrt(np.linalg.inv(rounds.quadric.astype(np.float64))[..., 2, 2])
    low, high = (rounds.centre[..., 2] - half).min(1), (rounds.centre[..., 2] + half).max(1)
    np.testing.assert_allclose(low, 0.0, atol=0.03)
    np.testing.assert_allclose(high, np.asarray(some.height)[:24], rtol=0.06)
    far = [corners(planes) for planes in np.asarray(made.solids.planes)[24 * 3 :]]
    assert len(far) == 48 and all(abs(points[:, 2].min()) < 1e-3 for points in far)

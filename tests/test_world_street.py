"""Ground and street furniture of the rendered world, checked by float64 geometry of their planes and quadrics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.world import road as roads
from data_prep.world import street
from data_prep.world.assembly import BOX, CONE, DISC, ROW, Placed, Rounds, Solids, Spot
from data_prep.world.style import KINDS, Style, sample_style
from data_prep.world.surfaces import Material, Semantic

SEEDS = (3, 11, 14, 20, 27, 31, 33, 40, 44)


@jax.jit
def sampled(seed):
    of_road, of_style, rest = jax.random.split(jax.random.key(seed), 3)
    return roads.sample_road(of_road), sample_style(of_style), rest


@jax.jit
def _world(road, style, key, anchor):
    cells = anchor + jnp.arange(-roads.CELLS_BEHIND, roads.CELLS_AHEAD)
    return street.ground(road, style, key, anchor), street.cells(road, style, key, anchor, cells)


@functools.cache
def world(seed: int, anchor: int = 2):
    """Road, style, key, float64 ground and cells of a scene around an anchor."""
    road, style, key = sampled(seed)
    ground, cells = _world(road, style, key, jnp.int32(anchor))
    exact = [
        jax.tree.map(lambda a: np.asarray(a, np.float64 if a.dtype == jnp.float32 else None), g)
        for g in (ground, cells)
    ]
    return road, style, key, *exact


_junctions = jax.jit(jax.vmap(roads.is_junction, in_axes=(None, None, 0)))
_beside = jax.jit(roads.beside)


def junctions(road, key, anchor: int = 2) -> dict[int, bool]:
    cells = jnp.arange(-3, 6) + anchor
    found = _junctions(road, key, cells)
    return dict(zip((cells - anchor).tolist(), np.asarray(found).tolist(), strict=True))


def at(road, station, lateral, anchor: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """x, y [N, 2] and road height [N] of points beside the road."""
    points, _ = _beside(road, jnp.int32(anchor), jnp.asarray(station, jnp.float32), jnp.asarray(lateral, jnp.float32))
    points = np.asarray(points, np.float64)
    return points[:, :2], points[:, 2]


def top_of(parts, xy: np.ndarray) -> np.ndarray:
    """[N] highest point of valid solids above or below each point."""
    planes = parts.planes[parts.valid]
    level = planes[..., 3] - np.einsum("pfi,ni->npf", planes[..., :2], xy)
    up = planes[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        high = np.where(up > 1e-6, level / up, np.inf).min(-1)
        low = np.where(up < -1e-6, level / up, -np.inf).max(-1)
    inside = np.where(np.abs(up) <= 1e-6, level >= 0, True).all(-1) & (high > low)
    return np.where(inside, high, -np.inf).max(-1)


def containing(parts, points: np.ndarray) -> np.ndarray:
    """[N, P] bool: which valid parts contain the points [N, 3]."""
    flat = np.einsum("pfi,ni->npf", parts.planes[..., :3], points) <= parts.planes[..., 3]
    apart = points[:, None] - parts.centre
    return flat.all(-1) & (np.einsum("npi,pij,npj->np", apart, parts.quadric, apart) <= 1) & parts.valid


def street_only(ground):
    """The ground without the far buildings."""
    return ground.solids._replace(valid=ground.solids.valid & (ground.solids.semantic != Semantic.BUILDING))


@pytest.mark.parametrize("seed", SEEDS)
def test_ground_has_the_road_s_height_curbs_sidewalks_and_no_holes(seed):
    road, style, key, ground, _ = world(seed)
    rng = np.random.default_rng(seed)
    solids = street_only(ground)
    half, walk, curb = float(road.half_width), float(road.sidewalk), float(road.curb)
    station = rng.uniform(-100, 200, 400)
    xy, z = at(road, station, rng.uniform(-half + 0.25, half - 0.25, 400))
    np.testing.assert_allclose(top_of(solids, xy), z, atol=2e-3)
    crossing = {cell for cell, found in junctions(road, key).items() if found}
    away = np.array([int(np.floor(s / roads.CELL)) not in crossing for s in station])
    side = rng.choice([-1, 1], 400)
    if not float(style.rural):
        xy, z = at(road, station, side * rng.uniform(half + 0.45, half + walk - 0.3, 400))
        np.testing.assert_allclose(top_of(solids, xy)[away], (z + curb)[away], atol=2e-3)
    xy, z = at(road, station, side * rng.uniform(half + walk + 0.3, 30.0, 400))
    np.testing.assert_allclose(top_of(solids, xy)[away], (z + curb - street.VERGE_DROP)[away], atol=2e-3)
    anywhere = np.stack([rng.uniform(-190, 330, 400), rng.uniform(-90, 90, 400)], -1)
    z = np.asarray(roads.height(road, jnp.int32(2), jnp.asarray(anywhere[:, 0], jnp.float32)))
    assert np.all(np.abs(top_of(solids, anywhere) - z) < curb + 0.02)


def test_crossing_streets_are_asphalt_from_side_to_side():
    checked = 0
    for seed in SEEDS:
        road, _, key, ground, _ = world(seed)
        for cell, found in junctions(road, key).items():
            if found:
                rng = np.random.default_rng(cell + 100)
                wide = float(road.cross_half_width) - 0.2
                station = (cell + 0.5) * roads.CELL + rng.uniform(-wide, wide, 60)
                xy, z = at(road, np.full(60, (cell + 0.5) * roads.CELL), rng.uniform(-25, 25, 60))
                yaw = float(roads.heading(road, jnp.int32(2), jnp.float32((cell + 0.5) * roads.CELL)))
                xy = xy + (station - (cell + 0.5) * roads.CELL)[:, None] * np.array([np.cos(yaw), np.sin(yaw)])
                z = np.asarray(roads.height(road, jnp.int32(2), jnp.asarray(xy[:, 0], jnp.float32)))
                np.testing.assert_allclose(top_of(street_only(ground), xy), z, atol=2e-3)
                checked += 1
    assert checked > 5


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_stands_on_the_asphalt_or_hangs_into_the_car_s_lane(seed):
    road, _, key, ground, cells = world(seed)
    rng = np.random.default_rng(seed)
    half = float(road.half_width)
    own = -(float(road.ego_lane) + 0.5) * float(road.lane_width)
    for lateral, top in (((-half + 0.3, half - 0.3), 2.3), ((own - 1.3, own + 1.3), 4.0)):
        count = 600
        xy, z = at(road, rng.uniform(-80, 160, count), rng.uniform(*lateral, count))
        points = np.concatenate([xy, (z + rng.uniform(0.1, top, count))[:, None]], 1)
        for parts in (*cells, *ground):
            assert not containing(parts, points).any()
    for cell, found in junctions(road, key).items():
        if found:  # and on crossing streets only trees' crowns and wires are above them
            wide = float(road.cross_half_width) - 0.3
            station = (cell + 0.5) * roads.CELL + rng.uniform(-wide, wide, 300)
            xy, z = at(road, station, rng.uniform(-20, 20, 300))
            points = np.concatenate([xy, (z + rng.uniform(0.2, 2.0, 300))[:, None]], 1)
            for parts in cells:
                solid = parts._replace(valid=parts.valid & (parts.semantic != Semantic.VEGETATION))
                assert not containing(solid, points).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_near_reaches_into_the_ground(seed):
    _, _, _, _, cells = world(seed)
    lowest: dict[tuple, float] = {}
    for parts in cells:
        near = (
            parts.valid
            & (np.linalg.norm(parts.origin[:, :2] - [20, 0], axis=-1) < 45)
            & (parts.material != Material.SIGN)
        )
        normals = np.einsum("pfi,pij->pfj", parts.planes[..., :3], parts.rotation)  # in the object's frame
        offsets = parts.planes[..., 3] - np.einsum("pfi,pi->pf", parts.planes[..., :3], parts.origin)
        down = normals[..., 2] < -0.999
        low = np.where(down, -offsets, np.inf).min(-1)
        for index in np.flatnonzero(near):
            place = tuple(np.round(parts.origin[index], 3))
            lowest[place] = min(lowest.get(place, np.inf), low[index])
    assert len(lowest) > 8
    floating = {place: low for place, low in lowest.items() if low > 0.0}
    assert not floating


def test_the_same_things_stand_there_after_the_anchor_moved():
    matched = total = large = 0
    for seed in SEEDS:
        road, *_, before = world(seed, 2)
        after = world(seed, 3)[-1]
        shift = np.asarray(roads.anchor_position(road, jnp.int32(3)) - roads.anchor_position(road, jnp.int32(2)))
        for old, new in zip(before, after, strict=True):
            here = old.valid & (np.abs(old.origin[:, 0] - 40) < 20) & (np.abs(old.origin[:, 1]) < 25)
            there = new.valid
            rows = np.concatenate([old.origin - shift, old.colour, old.centre - old.origin], 1)[here]
            others = np.concatenate([new.origin, new.colour, new.centre - new.origin], 1)[there]
            gap = np.abs(rows[:, None] - others).max(-1).min(-1)
            matched, total = matched + (gap < 2e-3).sum(), total + len(rows)
            important = np.isin(old.material[here], (Material.FACADE, Material.BARK, Material.ROOF))
            assert np.all(gap[important] < 2e-3)
            large += important.sum()
    assert total > 700 and large > 120
    assert matched > 0.95 * total  # the smallest parts may be left out of one of them


def test_sizes_are_those_of_real_streets():
    storeys, boards, lamps, trunks, widths = [], [], [], [], []
    for seed in SEEDS:
        solids, rounds = world(seed)[-1]
        facade = solids.valid & (solids.material == Material.FACADE)
        storeys.extend(solids.extra[facade & (solids.extra[:, 2] > 0.2), 1])
        sign = solids.valid & (solids.material == Material.SIGN) & (solids.semantic == Semantic.SIGN)
        boards.extend(2 * solids.extra[sign, 1])
        pole = rounds.valid & (rounds.semantic == Semantic.POLE)
        top = rounds.planes[:, 1, 3] - np.einsum("pi,pi->p", rounds.planes[:, 1, :3], rounds.origin)
        lamps.extend(top[pole & (top > 3.5)])
        trunks.extend(1 / np.sqrt(rounds.quadric[rounds.valid & (rounds.material == Material.BARK), 0, 0]))
        deep = solids.valid & (solids.semantic == Semantic.BUILDING) & facade
        size = solids.planes[:, 1, 3] - np.einsum("pi,pi->p", solids.planes[:, 1, :3], solids.origin)
        pitch = solids.extra[:, 0]
        body = (
            deep
            & (pitch > 0.5)
            & (np.abs(solids.planes[:, 0, 3] - np.einsum("pi,pi->p", solids.planes[:, 0, :3], solids.origin)) < 1e-3)
        )
        widths.extend(size[body] / pitch[body])
    storeys = np.array(storeys)
    assert np.mean((storeys > 2.75) & (storeys < 3.55)) > 0.85 and storeys.max() < 5.3
    assert np.quantile(boards, 0.02) >= 0.2 and np.quantile(boards, 0.98) < 1.0 and len(boards) > 30
    assert np.min(lamps) > 3.5 and np.max(lamps) < 10.5 and len(lamps) > 30
    assert np.min(trunks) > 0.03 and np.max(trunks) < 0.35
    whole = np.abs(np.array(widths) - np.round(widths))
    assert len(whole) > 200 and np.mean(whole < 1e-2) > 0.95, "fronts hold whole windows"


def test_styles_are_of_several_kinds_and_within_their_ranges():
    styles = jax.jit(jax.vmap(sample_style))(jax.random.split(jax.random.key(5), 2000))
    kinds = np.asarray(styles.kind)
    assert set(kinds.tolist()) == set(range(len(KINDS)))
    amounts = {"building_height", "height_spread", "setback", "overpass", "people", "lot_width", "rural", "kind"}
    for name in Style._fields:
        values = np.asarray(getattr(styles, name))
        assert np.all(np.isfinite(values)) and np.all(values >= 0), name
        if name not in amounts:
            assert np.all(values <= 1) and np.std(values) > 0.005, name
    tall = np.asarray(styles.building_height)
    assert tall[kinds == 0].mean() > 2 * tall[kinds == 2].mean()  # downtown against detached houses
    assert np.asarray(styles.gap)[kinds == 5].mean() > 0.6  # open country
    assert np.all(np.asarray(styles.rural) == (kinds == 5))


def test_only_the_parts_that_look_largest_are_kept_and_outlines_have_their_shape():
    solids, rounds = Solids(), Rounds()
    solids.add((-1.0, -1.0, 0.0), (1.0, 1.0, 2.0), Material.PLAIN, Semantic.WALL, (0.1, 0.2, 0.3))
    solids.add(
        (-1.0, -1.0, 0.0),
        (1.0, 1.0, 3.0),
        Material.LEAVES,
        Semantic.WALL,
        (0.1, 0.2, 0.3),
        shrink=(0.9,) * 4,
        outline=CONE,
    )
    solids.add((-0.02, -0.5, 2.0), (0.02, 0.5, 3.0), Material.SIGN, Semantic.SIGN, (0.9, 0.2, 0.3), outline=3)
    solids.add((0.0, 0.0, 0.0), (0.0, 1.0, 1.0), Material.PLAIN, Semantic.WALL, (0.1, 0.2, 0.3))  # no extent
    rounds.add((0.0, 0.0, 1.0), (0.1, 0.5, 0.5), Material.SIGN, Semantic.SIGN, (0.1, 0.2, 0.3), outline=DISC)
    count = 30
    x = jnp.linspace(5.0, 200.0, count)
    spots = Spot(jnp.stack([x, 0 * x, 0 * x], -1), 0.3 + 0 * x, 0 * x, jnp.arange(count) != 3)
    assert solids.rows().shape == (4, ROW) and BOX == 0

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def chosen(rows, number, solid=True):
        placed = Placed(spots)
        placed.add(jnp.broadcast_to(rows, (count, *rows.shape)), np.arange(count))
        return (placed.solids if solid else placed.rounds)(number, jnp.zeros(3))

    parts = jax.tree.map(np.asarray, chosen(solids.rows(), 24))
    assert parts.valid.all()
    boxes = sorted(parts.origin[parts.material == Material.PLAIN][:, 0])
    np.testing.assert_allclose(boxes, [v for i, v in enumerate(np.asarray(x)) if i != 3][: len(boxes)], rtol=1e-5)
    everything = jax.tree.map(np.asarray, chosen(solids.rows(), 4 * count))
    assert everything.valid.sum() == 3 * (count - 1)
    first = np.argsort(np.linalg.norm(everything.origin, axis=-1) + 1e6 * ~everything.valid)[:3]
    near = jax.tree.map(lambda leaf: leaf[first], everything)
    turned = np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]])
    probe = {  # points in the object's frame, and the materials of the parts that contain them
        (0.9, 0.9, 1.0): {Material.PLAIN}, (0.0, 0.0, 2.9): {Material.LEAVES, Material.SIGN},
        (0.0, 0.0, 2.5): {Material.LEAVES, Material.SIGN}, (0.0, 0.45, 2.2): set(), (0.0, 0.38, 2.28): {Material.SIGN},
        (0.0, 0.0, 1.0): {Material.PLAIN, Material.LEAVES}, (0.0, 0.1, 2.8): {Material.SIGN, Material.LEAVES},
    }  # fmt: skip
    points = np.array(list(probe)) @ turned.T + np.array([5.0, 0.0, 0.0])
    inside = containing(near, points)
    for row, expected in zip(inside, probe.values(), strict=True):
        assert set(near.material[row].tolist()) == {int(m) for m in expected}
    discs = jax.tree.map(np.asarray, chosen(rounds.rows(), 1, False))
    points = np.array([(0.0, 0.0, 1.45), (0.0, 0.4, 1.4), (0.09, 0.3, 1.0), (0.11, 0.0, 1.0)]) @ turned.T + [
        5.0,
        0.0,
        0.0,
    ]
    np.testing.assert_array_equal(containing(discs, points)[:, 0], [True, False, True, False])

"""The ground: asphalt, curbs, sidewalks and what lies beyond, piece by piece between knots; and the far distance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world import primitives
from data_prep.world import road as roads
from data_prep.world.assembly import Draws, Placed, Rounds, Solids, Spot, numbers
from data_prep.world.primitives import Geometry, Parts
from data_prep.world.style import Style
from data_prep.world.surfaces import Material, Semantic

FIRST_KNOT, LAST_KNOT = -20, 34  # strips of ground around the anchor
VERGE_DROP = 0.02  # ground beyond the sidewalk lies lower: a small step, and no two surfaces in one plane
CURBSTONE = 0.16  # metres of width
CURBSTONE_KNOTS = 14  # strips with curbstones to either side of the car's
CROSS_SIDEWALK = 2.2
_PER_CELL = round(roads.CELL / roads.KNOT)
FAR_SOLIDS, FAR_ROUNDS = 40, 30
_FAR_CELL = 200.0  # metres along x of one stretch of far hills and skyline
_SEED = 311


def edge_y(road: roads.Road, anchor: jax.Array, x: jax.Array, lateral: jax.Array) -> jax.Array:
    """y [...] at world x [...] (relative to the anchor) of the line at a distance `lateral` left of the centre line."""
    station = x
    for _ in range(3):
        station = x + lateral * jnp.sin(roads.heading(road, anchor, station))
    return roads.centre(road, anchor, station) + lateral * jnp.cos(roads.heading(road, anchor, station))


class _Cells(NamedTuple):
    """What the strips of a cell need to know of it; [...] cells."""

    junction: jax.Array
    middle: jax.Array  # x of the middle, metres
    yaw: jax.Array  # of the road there
    at: jax.Array  # [..., 2] the middle of the junction
    grass: jax.Array  # [..., 2] bool: grass beyond the sidewalk, left and right


def _cells(road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array, offset: jax.Array) -> _Cells:
    """Of the cells [C] at `offset` from the anchor."""
    middle = (offset.astype(jnp.float32) + 0.5) * roads.CELL

    def own(cell: jax.Array) -> tuple[jax.Array, jax.Array]:
        grass = numbers(jax.random.fold_in(roads.cell_key(key, cell), _SEED), 2) < style.green
        return roads.is_junction(road, key, cell), grass

    junction, grass = jax.vmap(own)(anchor + offset)
    at = jnp.stack([middle, roads.centre(road, anchor, middle)], -1)
    return _Cells(junction, middle, roads.heading(road, anchor, middle), at, grass)


def _shapes(
    road: roads.Road, rural: jax.Array, x: jax.Array, z: jax.Array, y: jax.Array, cell: _Cells
) -> tuple[Parts, Parts, jax.Array]:
    """The asphalt of a strip, [2, 4] pieces of both sides (curbstone, sidewalk, verge, cross street's sidewalk), and
    whether the strip touches a junction.

    Args:
      road: the road.
      rural: bool, a shoulder instead of a curb.
      x: [2] ends of the strip.
      z: [2] height of the asphalt there.
      y: [2, 2, 3] of the left and right curb line, curbstone's and sidewalk's far edge, at both ends.
      cell: the strip's cell.
    """
    slope = (z[1] - z[0]) / roads.KNOT
    zero = jnp.zeros(())
    up = jnp.stack([-slope, zero, zero + 1.0])
    level = z[0] - slope * x[0]
    ahead, bottom = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 0.0, -1.0, 300.0])

    def plane(normal: jax.Array, offset: jax.Array) -> jax.Array:
        normal = normal if normal.shape[0] == 3 else jnp.concatenate([normal, zero[None]])
        return jnp.concatenate([normal, offset[None]])

    along, left = jnp.stack([jnp.cos(cell.yaw), jnp.sin(cell.yaw)]), jnp.stack([-jnp.sin(cell.yaw), jnp.cos(cell.yaw)])
    towards = jnp.where(x[1] <= cell.middle + 0.1, along, -along)  # to the middle of the junction
    reach = towards @ cell.at - road.cross_half_width
    corner = jnp.minimum(2.5, road.sidewalk)
    strip = jnp.stack([plane(-ahead, -x[0]), plane(ahead, x[1])])
    top = plane(up, level)
    ramp = road.curb / 0.9
    cut = jnp.where(cell.junction, plane(towards, reach), bottom)
    far_cut = plane(-towards, -reach + CROSS_SIDEWALK)

    def side(sign: jax.Array, ends: jax.Array) -> jax.Array:
        """[4, 8, 4] planes; `ends` [2, 3] y of the three lines at both ends."""
        step = ends[1] - ends[0]
        normal = -sign * jnp.stack([-step, jnp.full(3, roads.KNOT)], -1)
        normal = normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)
        offset = normal[:, 0] * x[0] + normal[:, 1] * ends[0]
        lines = jnp.concatenate([normal, jnp.zeros((3, 1)), offset[:, None]], -1)  # farther from the road than a line
        curb, stone, walk = lines
        shoulder = top + ramp * curb
        inner = jnp.where(rural, shoulder, stone + jnp.array([0.0, 0.0, 0.0, 0.01]))
        chamfer = plane(towards - sign * left, reach - sign * (left @ cell.at) - road.half_width - corner)
        chamfer = jnp.where(cell.junction, chamfer, bottom)
        pieces = [
            [curb, -stone, cut, chamfer, bottom], [inner, -walk, cut, chamfer, bottom],
            [walk, cut, bottom, bottom, bottom], [walk, cut, far_cut, bottom, bottom],
        ]  # fmt: skip
        raised = jnp.stack([road.curb + 0.01, road.curb, road.curb - VERGE_DROP, road.curb])
        tops = top + raised[:, None] * jnp.array([0.0, 0.0, 0.0, 1.0])
        own = jnp.stack([plane for piece in pieces for plane in piece]).reshape(4, 5, 4)
        return jnp.concatenate([jnp.broadcast_to(strip, (4, 2, 4)), tops[:, None], own], 1)

    planes = jax.vmap(side)(jnp.array([1.0, -1.0]), y)
    asphalt = jnp.concatenate([strip, top[None]])
    near = cell.junction & (jnp.abs(0.5 * (x[0] + x[1]) - cell.middle) < roads.KNOT)
    build = primitives.half_spaces
    return build(asphalt[:, :3], asphalt[:, 3]), build(planes[..., :3], planes[..., 3]), near


def _strips(road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array) -> Parts:
    """Asphalt and the pieces of both sides of all strips, in one list."""
    knots = jnp.arange(FIRST_KNOT, LAST_KNOT + 1)
    x = knots.astype(jnp.float32) * roads.KNOT
    z = roads.height(road, anchor, x)
    half, sign = road.half_width, jnp.array([1.0, -1.0])
    laterals = sign[:, None] * jnp.stack([half, half + CURBSTONE, half + road.sidewalk])
    y = edge_y(road, anchor, x[:, None, None], laterals)  # [K + 1, 2, 3]
    first = FIRST_KNOT // _PER_CELL
    offset = jnp.arange(first, -(-LAST_KNOT // _PER_CELL))
    every = _cells(road, style, key, anchor, offset)
    cell = jax.tree.map(lambda leaf: leaf[knots[:-1] // _PER_CELL - first], every)
    rural = style.rural > 0

    def pairs(values: jax.Array) -> jax.Array:
        return jnp.stack([values[:-1], values[1:]], 1)

    asphalt, pieces, near_junction = jax.vmap(lambda *strip: _shapes(road, rural, *strip))(
        pairs(x), pairs(z), jnp.moveaxis(pairs(y), 1, 2), cell
    )
    draws = Draws(numbers(jax.random.fold_in(key, _SEED), 8))
    tone, dry, slab = draws(0.22, 0.42), draws(), draws(0.3, 0.9)
    grass = jnp.array([0.075, 0.125, 0.03]) + dry * jnp.array([0.12, 0.075, 0.03])
    bare = draws.pick([(0.3, 0.29, 0.27), (0.26, 0.21, 0.15), (0.36, 0.33, 0.28)])
    grey = tone * jnp.array([1.0, 0.98, 0.93])
    asphalt = primitives.painted(asphalt, Material.ROAD, Semantic.ROAD, draws(0.07, 0.16) * jnp.array([1.0, 1.0, 1.02]))
    shape = cell.grass.shape  # [K, 2]
    paving = jnp.where(rural, Material.VERGE, Material.PAVING)
    walk = jnp.where(rural, Semantic.TERRAIN, Semantic.SIDEWALK)
    walk_colour = jnp.where(rural, 0.8 * grass, grey)
    verge = jnp.where(cell.grass | rural, Material.VERGE, Material.PAVING)
    verge_colour = jnp.where(cell.grass[..., None], grass, bare)

    def each(*values: jax.Array | int) -> jax.Array:
        arrays = [jnp.asarray(value) for value in values]
        rest = max((a.shape[2:] if a.ndim > 1 else a.shape for a in arrays), key=len)
        return jnp.stack([jnp.broadcast_to(a, (*shape, *rest)) for a in arrays], 2)

    pieces = primitives.painted(
        pieces,
        each(Material.CONCRETE, paving, verge, paving),
        each(Semantic.SIDEWALK, walk, Semantic.TERRAIN, walk),
        each(grey * 1.15, walk_colour, verge_colour, grey),
        jnp.stack([slab, 0 * slab, 0 * slab, 0 * slab]),
        jnp.stack([~rural, rural | True, rural | True, ~rural]) & each(True, True, True, near_junction[:, None]),
    )
    # curbstones only where they can be seen, sidewalks of crossing streets only beside the middle of a cell
    strip = np.arange(FIRST_KNOT, LAST_KNOT)
    chosen = (np.abs(strip - 2) < CURBSTONE_KNOTS, strip == strip, strip == strip, np.isin(strip % _PER_CELL, (1, 2)))
    kept = [
        jax.tree.map(lambda leaf, i=i, of_kind=of_kind: leaf[of_kind, :, i], pieces) for i, of_kind in enumerate(chosen)
    ]
    return primitives.flatten(asphalt, *kept)


def _far_ends(road: roads.Road, anchor: jax.Array) -> Parts:
    """[2] level ground behind the first and ahead of the last strip."""
    x = jnp.array([FIRST_KNOT, LAST_KNOT]) * roads.KNOT
    normals = jnp.array([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    z = roads.height(road, anchor, x)
    ends = primitives.half_spaces(normals, jnp.stack([jnp.stack([x[0], -x[1]]), z], -1))
    return primitives.painted(ends, Material.VERGE, Semantic.TERRAIN, jnp.array([0.12, 0.14, 0.07]))


def _far_stretch(road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array, index: jax.Array) -> tuple:
    """Hills and large buildings beyond the street's own, on both sides of one stretch of `_FAR_CELL` metres."""
    per_cell = round(_FAR_CELL / roads.CELL)
    start = jnp.floor_divide(anchor, per_cell) + index
    x = ((start * per_cell - anchor).astype(jnp.float32)) * roads.CELL

    values = numbers(roads.cell_key(jax.random.fold_in(key, _SEED + 1), start), 2, 48)

    def side(sign: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        draws = Draws(own)
        rounds, solids = Rounds(), Solids()
        for _ in range(2):
            wide, deep = draws(120.0, 420.0), draws(100.0, 300.0)
            lateral = 190.0 + deep + draws(0.0, 900.0) * draws()
            tall = lateral * draws(0.01, 0.055)
            green = jnp.array([0.05, 0.085, 0.03]) * draws(0.8, 1.5)
            rounds.add(
                (draws(0.0, _FAR_CELL), sign * lateral, -0.2 * tall), (wide, deep, 1.2 * tall),
                Material.LEAVES, Semantic.VEGETATION, green, valid=draws.chance(0.35 + 0.6 * style.green),
            )  # fmt: skip
        for _ in range(3):
            along, lateral = draws(0.0, _FAR_CELL), draws(130.0, 500.0)
            wide, deep = draws(14.0, 40.0), draws(12.0, 25.0)
            tall = jnp.clip(style.building_height * draws(0.8, 2.5), 6.0, 90.0)
            solids.add(
                (along, jnp.minimum(sign * lateral, sign * (lateral + deep)), -8.0),
                (along + wide, jnp.maximum(sign * lateral, sign * (lateral + deep)), tall),
                Material.FACADE, Semantic.BUILDING, draws(0.2, 0.55) * jnp.array([1.0, 0.95, 0.88]),
                extra=(draws(2.5, 4.0), 3.2, draws(0.3, 0.6), draws()),
                valid=draws.chance(jnp.where(style.rural > 0, 0.1, 0.8)),
            )  # fmt: skip
        return solids.rows(), rounds.rows()

    solids, rounds = jax.vmap(side)(jnp.array([1.0, -1.0]), values)
    origin = jnp.stack([x, roads.centre(road, anchor, x), roads.height(road, anchor, x)])
    return solids, rounds, jnp.broadcast_to(origin, (2, 3))


def ground(road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array) -> Geometry:
    """The ground within about 220 m behind and 360 m ahead, as wide as the eye reaches, and the far distance.

    The asphalt is exactly `road.height`; the sidewalk lies `road.curb` higher, the ground beyond it 2 cm lower than
    that. Crossing streets cut through both sides at right angles to the road.
    """
    stretches = jnp.arange(-4, 6)
    solid_rows, round_rows, origin = jax.vmap(lambda i: _far_stretch(road, style, key, anchor, i))(stretches)
    level = jnp.zeros(2 * stretches.shape[0])
    spots = Spot(origin.reshape(-1, 3), level, level, level == 0)
    far_solids, far_rounds = Placed(spots), Placed(spots)
    far_solids.add(solid_rows.reshape(-1, *solid_rows.shape[2:]), np.arange(2 * stretches.shape[0]))
    far_rounds.add(round_rows.reshape(-1, *round_rows.shape[2:]), np.arange(2 * stretches.shape[0]))
    eye = jnp.zeros(3)
    solids = primitives.flatten(
        _strips(road, style, key, anchor), _far_ends(road, anchor), far_solids.solids(FAR_SOLIDS, eye)
    )
    return Geometry(solids, far_rounds.rounds(FAR_ROUNDS, eye))

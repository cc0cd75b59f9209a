"""Everything that stands still along the road, cell by cell: buildings, gardens, trees, street furniture, bridges."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world import barriers, buildings, furniture, plants
from data_prep.world import road as roads
from data_prep.world.assembly import Draws, Placed, Spot, numbers, stacked
from data_prep.world.ground import VERGE_DROP, ground
from data_prep.world.primitives import Geometry, yaw_rotation
from data_prep.world.style import Style

__all__ = ["cells", "ground", "overpass"]

SOLIDS, ROUNDS = 900, 450  # parts that are kept: those that look largest from the anchor's cell
FURTHER_AHEAD = 2  # cells beyond the given ones, so that the street has no end in sight
LOTS = 4  # at most, per cell and side
_PLACES = {  # per cell and side
    "street_trees": 4, "front_trees": LOTS, "back_trees": LOTS, "field_trees": 4, "bushes": LOTS, "lamps": 2,
    "signs": 2, "small": 3, "lights": 1, "stops": 1, "wires": 1, "boards": 1, "rails": 4,
}  # fmt: skip
_CELL, _SCENE = 78, 80
DRAWS = 64  # random numbers of an object; a building has twice as many
_ROWS = 2 + sum(_PLACES.values()) + 2 * LOTS


class Crossing(NamedTuple):
    """What crosses the road in the middle of a cell; [...] cells."""

    cell: jax.Array  # int32
    junction: jax.Array  # bool: a street
    signals: jax.Array  # bool: with traffic lights
    bridge: jax.Array  # bool: a bridge above
    half_deck: jax.Array  # of the bridge, metres
    numbers: jax.Array  # [..., 1 + 2 _ROWS, DRAWS] random: of the bridge, of the left and of the right side


class Lots(NamedTuple):
    """Building lots of one side of one cell, stations in the cell: [LOTS]."""

    low: jax.Array
    high: jax.Array
    exists: jax.Array


def _crossing(road: roads.Road, style: Style, key: jax.Array, cell: jax.Array) -> Crossing:
    every = numbers(jax.random.fold_in(roads.cell_key(key, cell), _CELL), 1 + 2 * _ROWS, DRAWS)
    draws = Draws(every[0, ::-1])  # the bridge itself takes them from the other end
    junction = roads.is_junction(road, key, cell)
    signals = junction & draws.chance(0.2 + 0.5 * style.traffic)
    return Crossing(cell, junction, signals, draws.chance(style.overpass) & ~junction, draws(3.5, 7.0), every)


def overpass(style: Style, road: roads.Road, key: jax.Array, cell: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether a bridge crosses above the middle of a cell, and half its deck's width in metres."""
    crossing = _crossing(road, style, key, cell)
    return crossing.bridge, crossing.half_deck


def _lots(style: Style, draws: Draws, blocked: jax.Array) -> Lots:
    """Divides one side of a cell; nothing stands within `blocked` metres (0 = no crossing) of its middle."""
    cell = roads.CELL
    count = jnp.clip(jnp.round(cell / (style.lot_width * draws(0.75, 1.35))), 1.0, LOTS)
    index = jnp.arange(LOTS + 1)
    shift = draws.several(LOTS + 1, -0.12, 0.12)
    edges = cell * (index + jnp.where((index > 0) & (index < count), shift, 0.0)) / count
    free = Lots(edges[:-1], edges[1:], index[:-1] < count)
    half = 0.5 * cell - blocked
    split = jnp.where(count > 2, draws(0.4, 0.6), 1.0) * half
    low = jnp.stack([0.0 * half, split, cell - half, cell - half + split])
    high = jnp.stack([split, half, cell - half + split, cell + 0.0 * half])
    around = Lots(low, high, high - low > 5.0)
    return jax.tree.map(lambda a, b: jnp.where(blocked > 0, a, b), around, free)


class _Found(NamedTuple):
    """What one side of a cell holds."""

    spots: Spot  # [places + LOTS]: those of `_PLACES` in order, then the lots' corners (their `exists`: fenced)
    numbers: jax.Array  # [places + 2 LOTS, DRAWS] random
    lots: jax.Array  # [LOTS] bool: which lots exist
    built: jax.Array  # [LOTS] bool: with a building
    length: jax.Array  # [LOTS] metres along the road
    reach: jax.Array  # largest radius of the crowns beside the curb, metres
    yard: jax.Array  # [LOTS] the same in front of the buildings


def _one_side(
    road: roads.Road, style: Style, scene: jax.Array, anchor: jax.Array, crossing: Crossing, sign: jax.Array
) -> _Found:  # fmt: skip
    """Spots and sizes of everything on one side (+1 left, -1 right) of one cell; `scene` [DRAWS] random numbers that
    the whole street shares."""
    values = jnp.where(sign > 0, crossing.numbers[1 : 1 + _ROWS], crossing.numbers[1 + _ROWS :])
    draws, of_scene = Draws(values[:2].reshape(-1)), Draws(scene)
    asked: dict[str, list[jax.Array]] = {}

    def ask(name: str, along: jax.Array, lateral: jax.Array, exists: jax.Array, spare: float = 0.5) -> None:
        """Places [K] `along` metres in driving direction from the cell's start, `lateral` metres from the centre line,
        at least `spare` metres away from what crosses."""
        for value in (along, lateral, exists, spare):
            each = jnp.broadcast_to(value, (_PLACES[name],)).astype(jnp.float32)
            asked.setdefault(name, []).extend(jnp.unstack(each))

    start = (crossing.cell - anchor).astype(jnp.float32) * roads.CELL
    cross = jnp.where(crossing.bridge, crossing.half_deck + 1.5, 0.0)
    blocked = jnp.where(crossing.junction, road.cross_half_width + 2.4, cross)
    front = road.half_width + road.sidewalk
    rural = style.rural > 0
    lots = _lots(style, draws, blocked)
    built = lots.exists & (draws.several(LOTS) > style.gap)

    def in_lot(share: jax.Array) -> jax.Array:
        """Metres in driving direction of a share of each lot."""
        station = lots.low + share * (lots.high - lots.low)
        return jnp.where(sign > 0, roads.CELL - station, station)

    # trees: beside the curb, in front of and behind buildings, in the fields
    avenue = jnp.where(of_scene.chance(style.trees), 0.9, 0.25 * style.trees)
    places = 5.0 + 10.0 * jnp.arange(4)
    ask(
        "street_trees", places + draws.several(4, -1.2, 1.2), road.half_width + 0.75,
        (draws.several(4) < avenue) & (road.sidewalk > 2.4) & ~rural, 2.5,
    )  # fmt: skip
    reach = jnp.clip(road.sidewalk + style.setback - 0.9, 1.0, 3.6)
    behind = style.setback * 1.4 + 15.0
    front_y = jnp.where(built, 0.45 * style.setback, draws.several(LOTS, 2.0, 14.0))
    yard = jnp.where(built, jnp.minimum(0.42 * style.setback, 3.5), 4.0)
    ask(
        "front_trees", in_lot(draws.several(LOTS, 0.1, 0.9)), front + front_y,
        lots.exists & (draws.several(LOTS) < style.trees) & (~built | (style.setback > 3.5)),
    )  # fmt: skip
    ask(
        "back_trees", in_lot(draws.several(LOTS, 0.1, 0.9)),
        front + jnp.where(built, behind, 3.0) + draws.several(LOTS, 0.0, 12.0),
        lots.exists & (draws.several(LOTS) < 1.2 * style.trees),
    )  # fmt: skip
    field_y = jnp.where(
        rural & (draws.several(4) < 0.4), draws.several(4, 3.0, 9.0),
        behind + 14.0 + draws.several(4, 0.0, 30.0),
    )  # fmt: skip
    ask(
        "field_trees", roads.CELL * draws.several(4), front + field_y,
        draws.several(4) < jnp.maximum(style.trees * style.green, 0.15), 4.0,
    )  # fmt: skip
    ask(
        "bushes", in_lot(draws.several(LOTS, 0.05, 0.95)),
        front + jnp.where(built, jnp.maximum(style.setback * 0.7 - 1.2, 1.2), 1.6),
        lots.exists & (draws.several(LOTS) < style.green * 0.8) & (style.setback > 2.5),
    )  # fmt: skip

    # street furniture
    curb_line = road.half_width + 0.45
    has_lamps = of_scene.chance(jnp.where(rural, 0.08, 0.95))
    both, dense = of_scene.chance(0.45), of_scene.chance(0.5)
    stagger = jnp.where(both | (sign > 0), 10.2, 30.2)
    ask("lamps", jnp.stack([stagger, 40.4 - stagger]), curb_line, has_lamps & (jnp.array([True, False]) | dense))
    ask(
        "signs", draws.several(2, 1.0, 39.0), curb_line + jnp.where(rural, 0.9, 0.0),
        draws.several(2) < 0.25 + 0.5 * style.furniture,
    )  # fmt: skip
    ask(
        "small", draws.several(3, 1.5, 38.5), road.half_width + 0.62,
        (draws.several(3) < style.furniture) & ~rural, 1.0,
    )  # fmt: skip
    one = jnp.ones(1)
    ask("lights", one * (0.5 * roads.CELL - road.cross_half_width - 2.7), curb_line, crossing.signals, -10.0)
    ask(
        "stops", one * draws(5.0, 35.0), front - 0.85,
        draws.chance(0.12 * style.furniture) & (road.sidewalk > 2.6) & ~rural, 3.0,
    )  # fmt: skip
    wired = of_scene.chance(0.75 * (1 - style.attached)) & (of_scene.chance(0.5) == (sign > 0))
    ask("wires", one * 20.0, front + 0.4, wired)
    ask(
        "boards", one * draws(4.0, 36.0), front + 0.5 * style.setback,
        draws.chance(0.25 * style.furniture * style.green) & (style.setback > 5.2), 3.0,
    )  # fmt: skip
    ask("rails", places, road.half_width + 0.6, draws.chance(0.35) & rural, 3.0)

    # all points at once; lots by their corners on the sidewalk's far edge: x runs so that y points away from the road
    along, lateral, wanted, spare = (
        stacked([asked[name][i * size + j] for name, size in _PLACES.items() for j in range(size)]) for i in range(4)
    )
    exists = (wanted > 0.5) & ((blocked == 0) | (jnp.abs(along - 0.5 * roads.CELL) > blocked + spare))
    station = jnp.concatenate([jnp.where(sign > 0, roads.CELL - along, along), lots.low, lots.high]) + start
    lateral = jnp.concatenate([lateral, jnp.broadcast_to(front, (2 * LOTS,))])
    point, yaw = roads.beside(road, anchor, station, sign * lateral)
    point = point.at[:, 2].add(jnp.where(lateral >= front, road.curb - VERGE_DROP, road.curb))
    pitch = -sign * jnp.arctan(roads.slope(road, anchor, point[:, 0]))
    ends = point[-2 * LOTS :].reshape(2, LOTS, 3)
    corner, other = jnp.where(sign > 0, ends, ends[::-1])
    step = other - corner
    length = jnp.linalg.norm(step[:, :2], axis=-1)
    fenced = lots.exists & (draws.several(LOTS) < style.fences) & (style.setback > 1.5)
    tilted = np.repeat([name == "rails" for name in _PLACES], list(_PLACES.values()))
    spots = Spot(
        jnp.concatenate([point[: -2 * LOTS], corner]),
        jnp.concatenate([yaw[: -2 * LOTS] + jnp.where(sign > 0, jnp.pi, 0.0), jnp.arctan2(step[:, 1], step[:, 0])]),
        jnp.concatenate([pitch[: -2 * LOTS] * tilted, jnp.arctan2(step[:, 2], length)]),
        jnp.concatenate([exists, fenced]),
    )
    return _Found(spots, values[2:], lots.exists, built, length, reach, yard)


def cells(road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array, cells: jax.Array) -> Geometry:
    """What stands beside the road in `cells` [C] (consecutive, int32) and a few beyond, in the anchor's frame.

    The most visible parts only: `SOLIDS` and `ROUNDS` of them.
    """
    every = cells[0] + jnp.arange(cells.shape[0] + FURTHER_AHEAD)
    sides = jnp.array([1.0, -1.0])
    scene = numbers(jax.random.fold_in(key, _SCENE), DRAWS)
    crossings = jax.vmap(lambda cell: _crossing(road, style, key, cell))(every)
    found = jax.vmap(
        lambda crossing: jax.vmap(lambda sign: _one_side(road, style, scene, anchor, crossing, sign))(sides)
    )(crossings)  # leaves [C, 2, places, ...]
    found = jax.lax.optimization_barrier(found)
    at_sides = 2 * every.shape[0]
    last = np.cumsum(list(_PLACES.values()))
    places = {name: slice(end - size, end) for (name, size), end in zip(_PLACES.items(), last, strict=True)}
    per_side = int(last[-1]) + LOTS

    def index(here: slice) -> np.ndarray:
        return (per_side * np.arange(at_sides)[:, None] + np.arange(per_side)[here]).reshape(-1)

    def random(here: slice, columns: int = DRAWS) -> jax.Array:
        return found.numbers[:, :, here].reshape(-1, columns)

    of_lots = slice(per_side - LOTS, per_side)
    spots: Spot = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), found.spots)
    lots, built, length = (leaf.reshape(-1) for leaf in (found.lots, found.built, found.length))
    of_building = random(slice(per_side - LOTS, per_side + LOTS), 2 * DRAWS)
    house, body = jax.vmap(lambda *own: buildings.building(own[0], style, *own[1:]))(of_building, length, built)
    lot: Spot = jax.tree.map(lambda leaf: leaf[index(of_lots)], spots)
    shift = jnp.stack([body.offset, body.setback, 0.0 * body.width], -1)
    corner = lot.origin + jnp.einsum("nij,nj->ni", yaw_rotation(lot.yaw), shift)
    level = roads.height(road, anchor, corner[:, 0] + 0.5 * body.width * jnp.cos(lot.yaw)) + road.curb - VERGE_DROP
    houses = Spot(corner.at[:, 2].set(level), lot.yaw, 0.0 * lot.yaw, lots)

    middles = ((every - anchor).astype(jnp.float32) + 0.5) * roads.CELL
    origin, yaw = roads.beside(road, anchor, middles, jnp.zeros(()))
    bridges = Spot(origin, yaw, 0.0 * yaw, crossings.bridge)
    every_spot: Spot = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), spots, houses, bridges)
    solids, rounds = Placed(every_spot), Placed(every_spot)
    total = per_side * at_sides
    solids.add(house, total + np.arange(lots.shape[0]))
    fences = jax.vmap(barriers.fence)(of_building[:, ::-1], length, body.setback)
    solids.add(fences, index(of_lots))
    beyond = jnp.broadcast_to(road.half_width + road.sidewalk, middles.shape)
    decks = jax.vmap(barriers.bridge)(crossings.numbers[:, 0], crossings.half_deck, beyond)
    solids.add(decks, total + lots.shape[0] + np.arange(middles.shape[0]))

    woods = slice(0, places["field_trees"].stop)  # trees come first
    reach = jnp.broadcast_to(found.reach[..., None], (*found.reach.shape, _PLACES["street_trees"]))
    others = jnp.full((*found.reach.shape, _PLACES["back_trees"] + _PLACES["field_trees"]), 5.0)
    reach = jnp.concatenate([reach, found.yard, others], -1).reshape(-1)
    beside_road = np.tile(np.arange(woods.stop) < _PLACES["street_trees"], at_sides)
    clear = jnp.where(beside_road, jnp.where(reach > 1.9, 4.2, 2.6), 0.8)
    fir = (random(woods)[:, -1] < style.conifers) & ~beside_road
    rounds.add(jax.vmap(plants.tree)(random(woods), reach, clear), index(woods), ~fir)
    solids.add(jax.vmap(plants.conifer)(random(woods)), index(woods), fir)
    rounds.add(jax.vmap(plants.bush)(random(places["bushes"])), index(places["bushes"]))

    arm = jnp.where(road.lanes > 1, road.half_width - 1.0, 0.0)
    pairs = {
        "lamps": lambda values: furniture.lamp(scene), "signs": furniture.sign, "small": furniture.small_thing,
        "wires": furniture.utility_pole, "boards": furniture.billboard,
        "lights": lambda values: furniture.traffic_light(values, arm),
    }  # fmt: skip
    for name, make in pairs.items():
        solid_rows, round_rows = jax.vmap(make)(random(places[name]))
        solids.add(solid_rows, index(places[name]))
        rounds.add(round_rows, index(places[name]))
    solids.add(jax.vmap(furniture.shelter)(random(places["stops"])), index(places["stops"]))
    rails = barriers.guard_rail()
    spots_of_rails = index(places["rails"])
    solids.add(jnp.broadcast_to(rails, (len(spots_of_rails), *rails.shape)), spots_of_rails)
    eye = jnp.array([0.5 * roads.CELL, 0.0, 2.0])
    return Geometry(solids.solids(SOLIDS, eye), rounds.rounds(ROUNDS, eye))

"""Who else is on the street: parked cars, waiting and driving vehicles, cyclists, pedestrians.

Lanes and sidewalks carry endless rows of SLOTS that move with one speed each; a hash of (lane, slot) decides who is in
a slot. So nobody ever overtakes, appears or collides, at any time, and every moment can be made by itself. The car's
own lane moves exactly as the car does, with the car in slot 0.
"""

import math

import jax
import jax.numpy as jnp

from data_prep.world import people as persons
from data_prep.world import road as roads
from data_prep.world import vehicles as cars
from data_prep.world.primitives import Geometry, yaw_rotation
from data_prep.world.style import Style

MAX_LANES = 3  # per direction
SLOT = 26.0  # metres of lane per vehicle
BAY = 6.0  # metres of curb per parking place
STEP = 5.0  # metres of sidewalk per walker
CLEAR = 8.0  # metres that stay free ahead of and behind the car's bumpers
PARKED_DETAILED, PARKED_COARSE = 20, 44
DRIVING_DETAILED, DRIVING_COARSE = 9, 23
PEOPLE_DETAILED, PEOPLE_COARSE = 12, 20
_BEHIND, _AHEAD = roads.CELLS_BEHIND * roads.CELL, roads.CELLS_AHEAD * roads.CELL
_PLACES = math.ceil(roads.CELL / BAY)  # parking places per curb that may begin in one cell
_QUEUE = 4  # vehicles per side of a crossing street
_STANDERS = 4  # people per cell who may stand
_PARKED, _CROSSING, _SPEED, _DRIVING, _PACE, _WALKING, _STANDING = (100 * n for n in range(1, 8))  # rows of `_uniform`


def _mixed(word: jax.Array) -> jax.Array:
    """Every bit of the result depends on every bit of the words (murmur3's finaliser)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _uniform(key: jax.Array, row: jax.Array | int, slot: jax.Array, count: int) -> jax.Array:
    """[..., count] uniform numbers for slots [...] of rows: a hash of (key, row, slot), which costs the compiler far
    less than one threefry per use."""
    words = jax.random.key_data(key).astype(jnp.uint32)
    seed = _mixed(words[-1] + jnp.uint32(0x9E3779B9) * jnp.asarray(row).astype(jnp.uint32)) ^ words[0]
    seed = _mixed(seed + jnp.uint32(0x85EBCA77) * slot.astype(jnp.uint32))
    bits = _mixed(seed[..., None] + jnp.uint32(0xC2B2AE3D) * jnp.arange(1, count + 1, dtype=jnp.uint32))
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _junctions(road: roads.Road, key: jax.Array, cells: jax.Array) -> jax.Array:
    """[C] bool: which cells a street crosses."""
    return jax.vmap(lambda cell: roads.is_junction(road, key, cell))(cells)


def _take(tree, indices: jax.Array):  # type: ignore[no-untyped-def]
    return jax.tree.map(lambda leaf: leaf[indices], tree)


def _realise(
    road: roads.Road, anchor: jax.Array, fleet: cars.Vehicles, xy: jax.Array, yaw: jax.Array, valid: jax.Array,
    distance: jax.Array, detailed: int, coarse: int,
) -> Geometry:  # fmt: skip
    """The nearest of N candidate vehicles, on the ground."""
    chosen = cars.nearest(distance, valid, detailed + coarse)
    # A barrier: fused with what made the candidates, the rest takes far longer to compile.
    fleet, xy, yaw, valid = jax.lax.optimization_barrier(_take((fleet, xy, yaw, valid), chosen))
    rotation, origin = cars.stand(road, anchor, xy, yaw, fleet.wheelbase, 0.0)
    return cars.build(fleet, rotation, origin, valid, min(detailed, valid.shape[0]))


def _at_curbs(
    road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array, cells: jax.Array, crossed: jax.Array
) -> tuple:
    """Candidates in the parking strips: vehicles, xy, yaw, valid. Places begin at multiples of BAY along the road."""
    first = jnp.ceil(cells.astype(jnp.float32) * (roads.CELL / BAY) - 1e-3).astype(jnp.int32)
    bay = first[:, None] + jnp.arange(_PLACES)
    inside = (bay.astype(jnp.float32) + 1e-3) * BAY < (cells[:, None] + 1).astype(jnp.float32) * roads.CELL
    left = jnp.arange(2)
    u = _uniform(key, _PARKED + left[:, None, None], bay, cars.DRAWS + 4)
    shape = u.shape[:-1]
    bay, inside, crossed, side = (
        jnp.broadcast_to(leaf, shape).reshape(-1)
        for leaf in (bay, inside, crossed[:, None], (2.0 * left - 1.0)[:, None, None])
    )
    u = u.reshape(-1, u.shape[-1])
    fleet = cars.sample(u[:, : cars.DRAWS], 0.4 * style.heavy, parked=True)
    narrow = jnp.minimum(1.0, (road.parking - 0.15) / fleet.width)
    fleet = fleet._replace(scale=fleet.scale.at[:, 1].multiply(jnp.where(narrow > 0.93, narrow, 1.0)))
    x = (bay.astype(jnp.float32) + 0.5) * BAY - anchor.astype(jnp.float32) * roads.CELL
    play = jnp.maximum(BAY - 0.3 - fleet.length, 0.0)
    x = x + play * (u[:, -2] - 0.5)
    from_junction = jnp.abs(jnp.mod(x, roads.CELL) - roads.CELL / 2) - road.cross_half_width - fleet.length / 2
    valid = inside & (u[:, -1] < style.parked) & (road.parking > 1.0) & (~crossed | (from_junction > 6.0))
    valid = valid & (fleet.length < BAY - 0.3) & (fleet.width < road.parking)
    slack = jnp.maximum(road.parking - fleet.width - 0.1, 0.0)
    lateral = side * (road.half_width - 0.08 - fleet.width / 2 - slack * u[:, -3] * 0.6)
    points, yaw = roads.beside(road, anchor, x, lateral)
    backwards = u[:, -4] < 0.06  # a few park against the direction of travel
    yaw = yaw + jnp.where((side > 0) ^ backwards, jnp.pi, 0.0) + 0.02 * (u[:, 2] - 0.5)
    return fleet, points[:, :2], yaw, valid


def _in_crossings(
    road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array, cells: jax.Array, crossed: jax.Array
) -> tuple:
    """Candidates in crossing streets: on each side two that wait to enter, one that left, one parked at the edge."""
    left, row = jnp.arange(2), jnp.arange(_QUEUE)
    u = _uniform(key, _CROSSING + 10 * left[:, None, None] + row, cells[:, None], cars.DRAWS + 3)
    shape = u.shape[:-1]
    # The second waits only behind a first one; no parked car where the street is narrow.
    share = jnp.stack([0.25 + 0.5 * style.traffic, 0.6 * style.traffic, 0.5 * style.traffic, style.parked])
    used = u[..., -2] < share
    used = used & ((row != 1) | used[..., :1]) & ((row != 3) | (road.cross_half_width > 5.4))
    used = (used & crossed[:, None]).reshape(-1)
    side, row, cells = (
        jnp.broadcast_to(leaf, shape).reshape(-1) for leaf in ((2.0 * left - 1.0)[:, None, None], row, cells[:, None])
    )
    u = u.reshape(-1, u.shape[-1])
    fleet = cars.sample(u[:, : cars.DRAWS], 0.5 * style.heavy, parked=True)
    out = jnp.array([0.3, 8.3, 14.0, 10.0])[row] + jnp.array([1.0, 1.5, 9.0, 8.0])[row] * u[:, -1]
    lateral = side * (road.half_width + jnp.maximum(road.sidewalk, 4.0) + out + fleet.length / 2)
    # Right-hand traffic: those who come from +y drive at smaller x, those from -y at greater x.
    parks = road.cross_half_width > 5.4
    lane = jnp.where(parks, road.cross_half_width - 2.3, road.cross_half_width) / 2
    across = jnp.where(row == 3, road.cross_half_width - fleet.width / 2 - 0.2, lane)
    across = across * -side * jnp.where(row < 2, 1.0, -1.0)
    x = (cells - anchor).astype(jnp.float32) * roads.CELL + roads.CELL / 2
    middle, yaw = roads.beside(road, anchor, x, jnp.zeros_like(x))
    cosine, sine = jnp.cos(yaw), jnp.sin(yaw)
    xy = middle[:, :2] + jnp.stack([across * cosine - lateral * sine, across * sine + lateral * cosine], -1)
    away = jnp.where(row < 2, -side, side)
    return fleet, xy, yaw + away * jnp.pi / 2, used


def parked(road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array, cells: jax.Array) -> Geometry:
    """Vehicles that stand: in the parking strips and in the crossing streets of cells [C] (int32).

    None within 6 m of a junction, none where the parking strip is under 1 m wide. The nearest to the anchor cell's
    middle are detailed; the farthest are left out where there are more than fit.
    """
    crossed = _junctions(road, key, cells)
    groups = [make(road, style, key, anchor, cells, crossed) for make in (_at_curbs, _in_crossings)]
    fleet, xy, yaw, valid = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups)
    eye = jnp.array([roads.CELL / 2 + 5.0, 0.0])
    distance = jnp.linalg.norm(xy - eye, axis=-1)
    return _realise(road, anchor, fleet, xy, yaw, valid, distance, PARKED_DETAILED, PARKED_COARSE)


def _lane_speeds(road: roads.Road, key: jax.Array) -> jax.Array:
    """Speeds [2 * MAX_LANES] m/s along x: own lanes from the centre line to the curb, then the oncoming ones."""
    u = _uniform(key, _SPEED, jnp.arange(2 * MAX_LANES), 1)[:, 0]
    speed = jnp.clip(road.speed * (0.7 + 0.6 * u) + 1.5, 3.5, 18.0)
    return speed * jnp.where(jnp.arange(2 * MAX_LANES) < MAX_LANES, 1.0, -1.0)


def driving(road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array, t: jax.Array) -> Geometry:
    """Vehicles and cyclists on the lanes at t seconds, both directions.

    The car's own lane moves as the car does; within CLEAR metres of the car's bumpers it is empty.
    """
    station = roads.ego_station(road, t)
    origin = anchor.astype(jnp.float32) * roads.CELL
    lane = jnp.arange(2 * MAX_LANES)[:, None]
    own = lane == road.ego_lane
    speed = _lane_speeds(road, key)[:, None]
    shift = jnp.where(own, station, speed * t)
    first = jnp.ceil((origin - _BEHIND - shift) / SLOT).astype(jnp.int32)
    slot = first + jnp.arange(int((_BEHIND + _AHEAD) // SLOT) + 1)
    u = _uniform(key, _DRIVING + lane, slot, cars.DRAWS + 4)
    shape = slot.shape
    speed = jnp.where(own, road.speed, jnp.abs(speed))
    lane, own, speed, shift = (jnp.broadcast_to(leaf, shape).reshape(-1) for leaf in (lane, own, speed, shift))
    slot, u = slot.reshape(-1), u.reshape(-1, u.shape[-1])
    index = lane % MAX_LANES
    cyclist = (index == road.lanes - 1) & (speed < 8.0) & (u[:, -4] < 0.18)
    fleet = cars.sample(u[:, : cars.DRAWS], style.heavy, rider=0.05, cyclist=cyclist)
    jitter = (SLOT - CLEAR - 13.0) * (u[:, -1] - 0.5)
    x = slot.astype(jnp.float32) * SLOT + jitter + shift
    side = jnp.where(lane < MAX_LANES, -1.0, 1.0)
    offset = jnp.where(cyclist, 0.5 * road.lane_width - 0.45, 0.3 * (u[:, -2] - 0.5))
    lateral = side * ((index + 0.5) * road.lane_width + offset)
    share = jnp.where(cyclist, 0.4 + 0.6 * style.traffic, style.traffic)
    ahead = x - origin
    valid = (index < road.lanes) & (u[:, -3] < share) & (~own | (slot != 0))
    valid = valid & (ahead > -_BEHIND) & (ahead < _AHEAD - 5.0)
    points, yaw = roads.beside(road, anchor, ahead, lateral)
    yaw = yaw + jnp.where(side > 0, jnp.pi, 0.0)
    return _realise(
        road, anchor, fleet, points[:, :2], yaw, valid, jnp.abs(x - station - 5.0), DRIVING_DETAILED, DRIVING_COARSE
    )


def _pavement(road: roads.Road, anchor: jax.Array, cells: jax.Array, crossed: jax.Array, xy: jax.Array) -> jax.Array:
    """Height [N] of the ground beside the road at points [N, 2] in consecutive cells [C]: the road's where a street
    crosses, elsewhere the curb's."""
    cell = jnp.floor(xy[:, 0] / roads.CELL)
    crossed = crossed[jnp.clip(cell.astype(jnp.int32) + anchor - cells[0], 0, cells.shape[0] - 1)]
    middle, yaw = roads.beside(road, anchor, (cell + 0.5) * roads.CELL, jnp.zeros_like(cell))
    offset = xy - middle[:, :2]
    away = jnp.abs(offset[:, 0] * jnp.cos(yaw) + offset[:, 1] * jnp.sin(yaw)) - road.cross_half_width
    beyond = jnp.abs(offset[:, 1] * jnp.cos(yaw) - offset[:, 0] * jnp.sin(yaw)) - road.half_width
    corner = jnp.minimum(2.5, road.sidewalk)  # the corners of the sidewalk are cut
    street = crossed & ((away < 0.0) | (away + beyond < corner))
    return roads.height(road, anchor, xy[:, 0]) + jnp.where(street, 0.0, road.curb)


def _walkers(road: roads.Road, style: Style, key: jax.Array, t: jax.Array) -> tuple[jax.Array, ...]:
    """Candidates that walk, two rows per sidewalk, one each way: draws [N, D], station, lateral, speed, valid [N]."""
    row = jnp.arange(4)[:, None]
    side = jnp.where(row < 2, -1.0, 1.0)
    speed = jnp.where(row % 2 == 0, 1.0, -1.0) * (1.05 + 0.5 * _uniform(key, _PACE, row, 1)[..., 0])
    first = jnp.ceil((roads.ego_station(road, t) - 90.0 - speed * t) / STEP).astype(jnp.int32)
    slot = first + jnp.arange(int(240.0 // STEP))
    u = _uniform(key, _WALKING + row, slot, 2 * persons.DRAWS + 4)
    # Between the furniture at the curb and the house fronts.
    inner, outer = jnp.clip(road.sidewalk - 1.0, 0.85, 1.35), road.sidewalk - 0.4
    deep = jnp.where(row % 2 == 0, inner, outer) + (outer - inner) * 0.1 * (2.0 * u[..., -2] - 1.0)
    x = slot.astype(jnp.float32) * STEP + 2.0 * (u[..., -1] - 0.5) + speed * t
    valid = u[..., -3] < jnp.minimum(style.people / (4 * roads.CELL / STEP) * 0.75, 0.7)
    flat = [jnp.broadcast_to(leaf, x.shape).reshape(-1) for leaf in (x, side * (road.half_width + deep), speed, valid)]
    return u.reshape(-1, u.shape[-1]), *flat


def _standers(
    road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array, cells: jax.Array, crossed: jax.Array
) -> tuple[jax.Array, ...]:
    """Candidates that stand, at the corners of junctions or before the houses: draws, station, lateral, turn, valid."""
    number = jnp.arange(_STANDERS)
    u = _uniform(key, _STANDING + number, cells[:, None], persons.DRAWS + 4)
    crossed = crossed[:, None]
    side = jnp.where(number % 2 == 0, -1.0, 1.0)
    corner = roads.CELL / 2 + jnp.where(number < 2, -1.0, 1.0) * (road.cross_half_width + 3.3 + 0.8 * u[..., -2])
    along = jnp.where(crossed, corner, roads.CELL * u[..., -2])
    deep = jnp.where(crossed, 0.4 + 0.3 * u[..., -1], road.sidewalk - 0.35)
    x = (cells - anchor).astype(jnp.float32)[:, None] * roads.CELL + along
    turn = -side * jnp.pi / 2 + 1.6 * (u[..., -4] - 0.5)  # they look at the road
    valid = u[..., -3] < jnp.minimum(style.people / _STANDERS * 0.25, 0.8)
    flat = [jnp.broadcast_to(v, x.shape).reshape(-1) for v in (x, side * (road.half_width + deep), turn, valid)]
    return u.reshape(-1, u.shape[-1]), *flat


def walking(
    road: roads.Road, style: Style, key: jax.Array, anchor: jax.Array, cells: jax.Array, t: jax.Array
) -> Geometry:
    """Pedestrians at t seconds, up to 90 m behind and 150 m ahead of the car: walking both ways on the sidewalks and
    over crossing streets, alone or in pairs; some in the cells [C] (consecutive) stand at corners and before houses."""
    crossed = _junctions(road, key, cells)
    u, x, lateral, speed, walks = _walkers(road, style, key, t)
    x = x - anchor.astype(jnp.float32) * roads.CELL
    draws = persons.DRAWS
    # A companion walks half a metre farther in; only where the other row is out of reach.
    nearer = jnp.where(jnp.abs(lateral) < road.half_width + 0.5 * road.sidewalk + 0.5, 1.0, -1.0)
    pairs = walks & (u[:, -4] < 0.3) & (road.sidewalk > 3.0)
    other = lateral + 0.56 * nearer * jnp.sign(lateral)
    still_u, still_x, still_lateral, turn, stands = _standers(road, style, key, anchor, cells, crossed)
    u = jnp.concatenate([u[:, :draws], u[:, draws : 2 * draws], still_u[:, :draws]])
    x, lateral = jnp.concatenate([x, x + 0.1, still_x]), jnp.concatenate([lateral, other, still_lateral])
    pace = jnp.concatenate([speed, speed, jnp.zeros_like(still_x)])
    turn = jnp.concatenate([jnp.where(pace[: -turn.shape[0]] < 0, jnp.pi, 0.0), turn])
    valid = jnp.concatenate([walks, pairs, stands])
    from_car = jnp.abs(x + anchor.astype(jnp.float32) * roads.CELL - roads.ego_station(road, t) - 5.0)
    chosen = cars.nearest(from_car, valid, PEOPLE_DETAILED + PEOPLE_COARSE)
    u, x, lateral, pace, turn, valid = jax.lax.optimization_barrier(_take((u, x, lateral, pace, turn, valid), chosen))
    points, yaw = roads.beside(road, anchor, x, lateral)
    group = persons.sample(u)
    phase = 2 * jnp.pi * (jnp.abs(pace) * t / (0.86 * group.height) + 7.0 * u[:, 0])
    spot = jnp.concatenate([points[:, :2], _pavement(road, anchor, cells, crossed, points[:, :2])[:, None]], -1)
    moves = jnp.where(pace == 0.0, 0.0, 1.0)
    return persons.build(group, phase, moves, yaw_rotation(yaw + turn), spot, valid, PEOPLE_DETAILED)

"""Colours of the ground: asphalt with its markings, wear and repairs, curbs, paving slabs, grass and gravel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_prep.world import road as roads
from data_prep.world.texture import band, courses, fractal2, hashed, noise2, stripes, visible

_TABLE_START, _TABLE = -12, 28  # cells relative to the anchor whose junctions are looked up
_STEP = 2.5  # metres: cubic interpolation over it is exact to a hundredth of a millimetre


class Ground(NamedTuple):
    """What the ground's texture needs of a scene, for one anchor."""

    road: roads.Road
    anchor: jax.Array  # int32
    junctions: jax.Array  # [28] 0 or 1 per cell
    line: jax.Array  # [2, K] y and slope of the centre line every `_STEP` metres
    start: jax.Array  # absolute x of the anchor in metres, modulo 8 km
    seed: jax.Array  # uint32
    wetness: jax.Array


def ground_of(road: roads.Road, key: jax.Array, anchor: jax.Array, seed: jax.Array, wetness: jax.Array) -> Ground:
    """Junctions around the anchor and everything else that is the same for all pixels."""
    cells = anchor + jnp.arange(_TABLE_START, _TABLE_START + _TABLE)
    junctions = jax.vmap(lambda cell: roads.is_junction(road, key, cell))(cells)
    start = jnp.mod(anchor, 200).astype(jnp.float32) * roads.CELL
    x = (_TABLE_START + jnp.arange(0.0, _TABLE, _STEP / roads.CELL)) * roads.CELL
    line = jnp.stack([roads.centre(road, anchor, x), jnp.tan(roads.heading(road, anchor, x))])
    return Ground(road, anchor, junctions.astype(jnp.float32), line, start, seed, wetness)


def _centre_line(ground: Ground, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y and slope dy/dx [R] of the centre line at x [R]: `road.centre` and `road.heading` without their sines."""
    at = jnp.clip(x / _STEP - _TABLE_START * roads.CELL / _STEP, 0.0, ground.line.shape[1] - 1.001)
    index = at.astype(jnp.int32)
    t = at - index
    y0, m0 = (row.at[index].get(mode="promise_in_bounds") for row in ground.line)
    y1, m1 = (row.at[index + 1].get(mode="promise_in_bounds") for row in ground.line)
    m0, m1 = m0 * _STEP, m1 * _STEP
    rise = y1 - y0
    b, c = 3.0 * rise - 2.0 * m0 - m1, m0 + m1 - 2.0 * rise
    return y0 + t * (m0 + t * (b + t * c)), (m0 + t * (2.0 * b + 3.0 * c * t)) / _STEP


class Spot(NamedTuple):
    """Points of the ground in the road's coordinates, each [R]."""

    station: jax.Array  # metres along the road, relative to the anchor
    lateral: jax.Array  # metres to the left of the centre line
    width_s: jax.Array  # footprint along the road
    width_l: jax.Array  # and across
    to_junction: jax.Array  # signed metres along the road from the middle of the cell's junction
    junction: jax.Array  # 1 in cells with a junction, otherwise 0


def spot(ground: Ground, point: jax.Array, across_x: jax.Array, across_y: jax.Array) -> Spot:
    """Road coordinates of points [3, R]; `across_*` [3, R] are the steps on the surface from pixel to pixel."""
    # The same steps as `road.lane_coordinates`.
    y, slope = _centre_line(ground, point[0])
    c = jax.lax.rsqrt(1.0 + slope * slope)
    s = slope * c
    station = point[0] + (point[1] - y) * c * s
    y, slope = _centre_line(ground, station)
    lateral = ((point[1] - y) - (point[0] - station) * slope) * jax.lax.rsqrt(1.0 + slope * slope)
    width_s = jnp.abs(c * across_x[0] + s * across_x[1]) + jnp.abs(c * across_y[0] + s * across_y[1])
    width_l = jnp.abs(c * across_x[1] - s * across_x[0]) + jnp.abs(c * across_y[1] - s * across_y[0])
    cell = jnp.floor(station / roads.CELL)
    index = jnp.clip(cell.astype(jnp.int32) - _TABLE_START, 0, _TABLE - 1)
    return Spot(
        station, lateral, width_s, width_l, station - (cell + 0.5) * roads.CELL,
        ground.junctions.at[index].get(mode="promise_in_bounds"),
    )  # fmt: skip


def _markings(ground: Ground, at: Spot, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Coverage [R] by white and by yellow paint; `where` [R] is the absolute station."""
    road, ws, wl = ground.road, at.width_s, at.width_l
    style = hashed(ground.seed, jnp.arange(8))
    side = jnp.abs(at.lateral)
    carriageway = road.lanes * road.lane_width
    cross = road.cross_half_width
    away = jnp.abs(at.to_junction) - cross  # metres outside the crossing street
    crossing = style[0] < 0.7  # zebra crossings at junctions
    zone = jnp.where(crossing, 5.2, 2.0)
    open_road = jnp.where(at.junction > 0.5, band(away, zone, 1e3, ws), 1.0)
    # Lane lines: dashes of 3 m every 9 or 12 m; the line in the middle of the road is solid on wide roads.
    period = jnp.where(style[1] < 0.5, 9.0, 12.0)
    dashes = stripes(where, period, 0.0, 3.0, ws)
    half = 0.06 + 0.03 * style[2]
    lane = stripes(at.lateral + half, road.lane_width, 0.0, 2 * half, wl) * band(side, 0.5, carriageway - 0.5, wl)
    double = band(side, 0.08, 0.08 + 1.6 * half, wl)
    single = band(at.lateral, -half, half, wl)
    solid = (road.lanes > 1) | (style[3] < 0.3)
    middle = jnp.where(solid, jnp.where(style[4] < 0.5, double, single), single * dashes)
    edge = band(side, carriageway - 0.12, carriageway + 0.02, wl) * jnp.where(style[5] < 0.7, 1.0, 0.0)
    bays = stripes(where, 6.0, 0.0, 0.1, ws) * band(side, carriageway, carriageway + road.parking, wl)
    bays = bays * jnp.where((road.parking > 1.5) & (style[6] < 0.6), 1.0, 0.0)
    white = jnp.maximum(jnp.maximum(lane * dashes, edge), bays) * open_road
    # Zebra crossings over the main road (bars along it) and over the crossing street (bars along that).
    bars = stripes(at.lateral, 1.0, 0.25, 0.75, wl) * band(side, 0.0, road.half_width - 0.2, wl)
    zebra = bars * band(away, 1.0, 4.0, ws)
    own_side = jnp.where(at.to_junction * at.lateral > 0, 1.0, 0.0)  # stop lines lie before the crossing
    stop = band(away, zone - 0.7, zone - 0.3, ws) * own_side * band(side, 0.2, carriageway, wl)
    beyond = side - road.half_width
    bars = stripes(at.to_junction, 1.0, 0.25, 0.75, ws) * band(-away, 0.3, 1e3, ws)
    cross_zebra = bars * band(beyond, 0.8, 3.4, wl)
    cross_dashes = stripes(at.lateral, 9.0, 0.0, 3.0, wl) * band(beyond, zone, 1e3, wl)
    cross_middle = band(at.to_junction, -half, half, ws) * cross_dashes
    there = jnp.where(at.junction > 0.5, 1.0, 0.0)
    zebras = jnp.where(crossing, jnp.maximum(zebra, cross_zebra), 0.0)
    white = jnp.maximum(white, there * jnp.maximum(jnp.maximum(zebras, stop), cross_middle))
    middle = middle * open_road
    yellow = style[7] < 0.35
    marked = jnp.where(carriageway > 3.3, 1.0, 0.0)
    return jnp.where(yellow, white, jnp.maximum(white, middle)) * marked, jnp.where(yellow, middle, 0.0) * marked


def asphalt(ground: Ground, at: Spot, colour: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Colour [3, R] of road surfaces of base colour [3, R], and how wet puddles are there, 0..1 [R]."""
    road, seed = ground.road, ground.seed
    where, lateral = at.station + ground.start, at.lateral
    ws, wl = at.width_s, at.width_l
    width = jnp.sqrt(ws * wl) + 0.3 * (ws + wl)
    cloudy = fractal2(where, lateral, width, seed, 7.0, 3)
    grain = visible(0.05, width) * (hashed(seed, where * 60.0, lateral * 60.0) - 0.5)
    grain += 0.6 * visible(0.16, width) * noise2(where * 9.0, lateral * 9.0, seed)
    tone = 1.0 + 0.10 * cloudy + 0.22 * grain
    # Wheels polish two tracks of each lane, oil darkens the middle between them.
    lane = lateral / road.lane_width
    within = (lane - jnp.floor(lane) - 0.5) * road.lane_width
    driven = jnp.where(jnp.abs(lateral) < road.lanes * road.lane_width, 1.0, 0.0)
    oil = jnp.exp(-jnp.square(within / 0.35)) * (0.08 + 0.05 * cloudy)
    tracks = jnp.exp(-jnp.square((jnp.abs(within) - 0.8) / 0.3)) * 0.06
    tone = tone * (1.0 - driven * (oil - tracks))
    # Repairs: rectangles of newer or older asphalt with sealed edges.
    block, strip = jnp.floor(where / 11.0), jnp.floor(lateral / 2.3)
    chance, size = hashed(seed + 1, block, strip), hashed(seed + 2, block, strip)
    shift = hashed(seed + 3, block, strip)
    low_s, low_l = 1.0 + 5.0 * shift, 0.1 + 0.6 * shift
    s, across = where - block * 11.0, lateral - strip * 2.3
    high_s, high_l = low_s + 0.8 + 4.0 * size, low_l + 0.7 + 0.8 * size
    patch = band(s, low_s, high_s, ws) * band(across, low_l, high_l, wl)
    inner = band(s, low_s + 0.05, high_s - 0.05, ws) * band(across, low_l + 0.05, high_l - 0.05, wl)
    repaired = jnp.where(chance < 0.10 + 0.12 * hashed(seed, jnp.int32(90)), 1.0, 0.0)
    tone = tone * (1.0 + repaired * (patch * (0.5 * shift - 0.3) - 0.35 * (patch - inner)))
    # Cracks follow the level lines of a slow noise; a tar seam runs along the middle of the road.
    wander = noise2(where / 3.1, lateral / 2.3, seed + 5) + 0.35 * noise2(where / 0.7, lateral / 0.6, seed + 6)
    worn = jnp.clip(6.0 * noise2(where / 13.0, lateral / 4.0, seed + 7) - 1.5, 0.0, 1.0)
    crack = visible(0.12, width) * worn * jnp.clip(1.0 - jnp.abs(wander) / (0.006 + 0.3 * width), 0.0, 1.0)
    seam = band(lateral + 0.04 * noise2(where / 2.0, where * 0.0, seed + 8) - 0.22, -0.025, 0.025, wl)
    tone = tone * (1.0 - 0.5 * crack) * (1.0 - 0.4 * seam)
    # Manhole covers.
    column = jnp.floor(where / 23.0)
    centre_s = 23.0 * column + 4.0 + 15.0 * hashed(seed + 11, column)
    centre_l = (hashed(seed + 12, column) * 2.0 - 1.0) * (road.half_width - 0.7)
    radius = jnp.sqrt(jnp.square(where - centre_s) + jnp.square(lateral - centre_l))
    cover = band(radius, -1.0, 0.33, width)
    ring = cover - band(radius, -1.0, 0.28, width)
    tread = jnp.sign(noise2(s * 20.0, lateral * 20.0, seed)) * visible(0.1, width)
    tone = tone * (1.0 - 0.35 * cover + 0.1 * cover * tread)
    tone = tone * (1.0 - 0.4 * ring)
    # Dirt gathers along the curbs.
    gutter = jnp.abs(jnp.abs(lateral) - road.half_width)
    tone = tone * (1.0 - 0.22 * jnp.exp(-jnp.square(gutter / 0.35)) * (1.0 + 0.6 * cloudy))
    white, yellow = _markings(ground, at, where)
    wear = 0.55 + 0.4 * hashed(seed, jnp.int32(91))
    kept = jnp.clip(wear + 0.5 * cloudy * 0.5 + 0.9 * grain - 0.5 * crack, 0.15, 0.95)
    out = colour * jnp.maximum(tone, 0.2) * (1.0 - 0.35 * ground.wetness)
    out = out + kept * white * (0.62 - out)
    paint = jnp.array([0.60, 0.38, 0.06])[:, None]
    out = out + kept * yellow * (paint - out)
    puddle = jnp.clip(2.2 * noise2(where / 2.9, lateral / 1.3, seed + 20) + 0.9 * cloudy - 0.1, 0.0, 1.0)
    return out, ground.wetness * (0.4 + 0.6 * puddle)


def paving(ground: Ground, at: Spot, colour: jax.Array, slab: jax.Array, upright: jax.Array) -> jax.Array:
    """Colour [3, R] of sidewalks: slabs [R] metres wide behind curb stones; `upright` [R] marks the curb's face."""
    seed = ground.seed
    where, lateral, ws, wl = at.station + ground.start, at.lateral, at.width_s, at.width_l
    width = jnp.sqrt(ws * wl) + 0.3 * (ws + wl)
    slab = jnp.where(slab > 0.05, slab, 0.5)
    joint, column, row = courses(where, lateral, slab, slab, jnp.minimum(0.012, 0.1 * slab), ws, wl)
    each = (hashed(seed + 30, column, row) - 0.5) * visible(2.0 * slab, width)
    dirt = fractal2(where, lateral, width, seed + 31, 4.0, 3)
    grain = visible(0.06, width) * (hashed(seed + 32, where * 50.0, lateral * 50.0) - 0.5)
    tone = (1.0 + 0.16 * each + 0.10 * dirt + 0.15 * grain) * (1.0 - 0.45 * joint)
    stone = jnp.where((jnp.abs(jnp.abs(lateral) - ground.road.half_width) < 0.15) | upright, 1.0, 0.0)
    stone_joint = stripes(where, 1.0, 0.0, 0.012, ws)
    stone_tone = (1.12 + 0.08 * dirt + 0.12 * grain) * (1.0 - 0.5 * stone_joint) * jnp.where(upright, 0.85, 1.0)
    tone = tone + stone * (stone_tone - tone)
    return colour * jnp.maximum(tone, 0.2) * (1.0 - 0.3 * ground.wetness)


def verge(ground: Ground, at: Spot, colour: jax.Array) -> jax.Array:
    """Colour [3, R] of grass, gravel or soil: tufts and bare patches."""
    seed = ground.seed
    where, lateral = at.station + ground.start, at.lateral
    width = jnp.sqrt(at.width_s * at.width_l) + 0.3 * (at.width_s + at.width_l)
    broad = fractal2(where, lateral, width, seed + 40, 9.0, 3)
    fine = fractal2(where, lateral, width, seed + 41, 0.5, 4, 0.8)
    tone = jnp.maximum(1.0 + 0.18 * broad + 0.28 * fine, 0.3) * (1.0 - 0.25 * ground.wetness)
    green = jnp.where(colour[1] > 1.15 * colour[0], 1.0, 0.0)
    bare = green * jnp.clip(3.0 * (broad + 0.35 * fine) - 1.3, 0.0, 1.0)
    soil = jnp.array([0.16, 0.12, 0.08])[:, None]
    grass = colour * (1.0 + broad * green * jnp.array([0.25, 0.0, -0.15])[:, None])
    return (grass + bare * (soil - grass)) * tone

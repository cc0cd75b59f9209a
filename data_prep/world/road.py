"""The road that everything stands along: centre line, slopes, junctions, and how the car drives on it.

Positions along the road are metres of world x; the world is made cell by cell (`CELL` metres), so a drive has no end.
Coordinates are relative to an ANCHOR, the corner of a cell near the car, so that float32 stays exact to < 0.1 mm.
World frame: x along the road, y left, z up; traffic keeps to the right (negative lateral positions).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_prep.world.primitives import yaw_rotation

CELL = 40.0  # metres along x
KNOT = 10.0  # the ground is piecewise linear between stations this far apart
CELLS_BEHIND, CELLS_AHEAD = 5, 7  # cells around the anchor's that exist at any moment
WHEELBASE = 2.7


class Road(NamedTuple):
    """One scene's road. Waves are sums of sines over x."""

    curve: jax.Array  # [3, 3]: amplitude (m), wavelength (m), phase of the centre line's lateral waves
    grade: jax.Array  # [3, 3]: the same of the height
    lanes: jax.Array  # lanes per direction (1..3), int32
    lane_width: jax.Array  # metres, about 3.5
    parking: jax.Array  # width of the parking strip at each curb, 0 or about 2.2 m
    sidewalk: jax.Array  # width of the pavement beside the curb, metres
    curb: jax.Array  # height of the curb, metres (about 0.12)
    junction_rate: jax.Array  # probability that a cell holds a junction
    cross_half_width: jax.Array  # half width of crossing streets, metres
    speed: jax.Array  # of the car, m/s
    ego_lane: jax.Array  # 0 = beside the centre line, int32

    @property
    def half_width(self) -> jax.Array:
        """Centre line to curb, metres."""
        return self.lanes * self.lane_width + self.parking


def sample_road(key: jax.Array) -> Road:
    """A road with statistics of city and country streets: slopes up to about 8 %, radii above about 150 m."""
    keys = iter(jax.random.split(key, 32))

    def uniform(low: float, high: float, shape: tuple = ()) -> jax.Array:
        return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    curve_length = jnp.array([420.0, 260.0, 150.0]) * uniform(0.8, 1.2, (3,))
    bend = jax.random.bernoulli(next(keys), 0.65).astype(jnp.float32)
    curve_amplitude = bend * jnp.array([9.0, 3.0, 0.8]) * uniform(0.0, 1.0, (3,))
    grade_length = jnp.array([330.0, 190.0, 110.0]) * uniform(0.8, 1.2, (3,))
    hilly = jax.random.bernoulli(next(keys), 0.6).astype(jnp.float32)
    grade_amplitude = (0.15 + hilly) * jnp.array([1.6, 0.7, 0.25]) * uniform(0.0, 1.0, (3,))
    lanes = 1 + jax.random.categorical(next(keys), jnp.log(jnp.array([0.45, 0.4, 0.15]))).astype(jnp.int32)
    parking = jnp.where(jax.random.bernoulli(next(keys), 0.7), uniform(2.0, 2.5), 0.3)
    return Road(
        curve=jnp.stack([curve_amplitude, curve_length, uniform(0.0, 2 * jnp.pi, (3,))], 1),
        grade=jnp.stack([grade_amplitude, grade_length, uniform(0.0, 2 * jnp.pi, (3,))], 1),
        lanes=lanes,
        lane_width=uniform(3.1, 3.7),
        parking=parking,
        sidewalk=uniform(1.8, 4.5),
        curb=uniform(0.10, 0.16),
        junction_rate=uniform(0.1, 0.4),
        cross_half_width=uniform(3.5, 7.0),
        speed=uniform(3.0, 14.0),
        ego_lane=jnp.minimum(jax.random.randint(next(keys), (), 0, 3), lanes - 1),
    )


def _waves(waves: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(waves[:, 0] * jnp.sin(2 * jnp.pi * x[..., None] / waves[:, 1] + waves[:, 2]), -1)


def _knot_height(road: Road, knot: jax.Array) -> jax.Array:
    return _waves(road.grade, knot.astype(jnp.float32) * KNOT)


def height(road: Road, anchor: jax.Array, x: jax.Array) -> jax.Array:
    """Ground height [...] (road surface, without curbs) at x [...] metres, relative to the anchor cell's corner."""
    per_cell = round(CELL / KNOT)
    knot = jnp.floor(x / KNOT)
    index = anchor * per_cell + knot.astype(jnp.int32)
    low, high = _knot_height(road, index), _knot_height(road, index + 1)
    share = x / KNOT - knot
    return low + (high - low) * share - _knot_height(road, anchor * per_cell)


def slope(road: Road, anchor: jax.Array, x: jax.Array) -> jax.Array:
    """dz/dx [...] of the ground at x [...]."""
    index = anchor * round(CELL / KNOT) + jnp.floor(x / KNOT).astype(jnp.int32)
    return (_knot_height(road, index + 1) - _knot_height(road, index)) / KNOT


def centre(road: Road, anchor: jax.Array, x: jax.Array) -> jax.Array:
    """y [...] of the centre line at x [...], relative to the anchor."""
    start = anchor.astype(jnp.float32) * CELL
    return _waves(road.curve, start + x) - _waves(road.curve, start)


def heading(road: Road, anchor: jax.Array, x: jax.Array) -> jax.Array:
    """Yaw [...] of the centre line at x [...], radians, left positive."""
    at = (anchor.astype(jnp.float32) * CELL + x)[..., None]
    waves = road.curve
    turn = 2 * jnp.pi / waves[:, 1]
    return jnp.arctan(jnp.sum(waves[:, 0] * turn * jnp.cos(turn * at + waves[:, 2]), -1))


def beside(road: Road, anchor: jax.Array, x: jax.Array, lateral: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Point [..., 3] at a distance `lateral` [...] to the left of the centre line at x, on the ROAD's height there, and
    the road's yaw [...]. Things beside the road stand `road.curb` higher."""
    x, lateral = jnp.broadcast_arrays(jnp.asarray(x, jnp.float32), jnp.asarray(lateral, jnp.float32))
    yaw = heading(road, anchor, x)
    px = x - lateral * jnp.sin(yaw)
    py = centre(road, anchor, x) + lateral * jnp.cos(yaw)
    return jnp.stack([px, py, height(road, anchor, px)], -1), yaw


def lane_coordinates(road: Road, anchor: jax.Array, xy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """World x of the station and lateral distance (left positive) of points [..., 2], both relative to the anchor."""
    yaw = heading(road, anchor, xy[..., 0])
    lateral = (xy[..., 1] - centre(road, anchor, xy[..., 0])) * jnp.cos(yaw)
    station = xy[..., 0] + lateral * jnp.sin(yaw)
    lateral = (xy[..., 1] - centre(road, anchor, station)) * jnp.cos(heading(road, anchor, station)) - (
        xy[..., 0] - station
    ) * jnp.sin(heading(road, anchor, station))
    return station, lateral


def cell_key(key: jax.Array, cell: jax.Array) -> jax.Array:
    """Random key of one cell of a scene; the same whenever the cell comes into view."""
    return jax.random.fold_in(key, cell + 2**20)


def is_junction(road: Road, key: jax.Array, cell: jax.Array) -> jax.Array:
    """Whether a street crosses at the middle of a cell (x = (cell + 0.5) CELL)."""
    return jax.random.uniform(jax.random.fold_in(cell_key(key, cell), 77)) < road.junction_rate


def ego_station(road: Road, t: jax.Array) -> jax.Array:
    """Absolute x [...] of the car's rear axle, t seconds after the scene's start; its speed varies a little."""
    return 20.0 + road.speed * (t + 0.6 * jnp.sin(0.35 * t))


def anchor_at(road: Road, t: jax.Array) -> jax.Array:
    """The anchor cell (int32) of a moment: the cell that the car is in."""
    return jnp.floor(ego_station(road, t) / CELL).astype(jnp.int32)


def anchor_position(road: Road, anchor: jax.Array) -> jax.Array:
    """World position [3] of an anchor: add it to everything relative to it (in float64, on the host)."""
    at = anchor.astype(jnp.float32) * CELL
    return jnp.stack([at, _waves(road.curve, at), _knot_height(road, anchor * round(CELL / KNOT))])


def ego_pose(road: Road, anchor: jax.Array, t: jax.Array) -> jax.Array:
    """ego -> world (relative to the anchor) [4, 4] at t seconds: origin on the ground below the rear axle."""
    x = ego_station(road, t) - anchor.astype(jnp.float32) * CELL
    sway = 0.12 * jnp.sin(0.5 * t + road.curve[0, 2])
    lateral = -(road.ego_lane + 0.5) * road.lane_width + sway
    rear, yaw = beside(road, anchor, x, lateral)
    front = height(road, anchor, rear[0] + WHEELBASE * jnp.cos(yaw))
    pitch = jnp.arctan2(front - rear[2], WHEELBASE) + 0.003 * jnp.sin(7.0 * t + road.grade[0, 2])
    yaw = yaw + 0.01 * jnp.cos(0.5 * t + road.curve[0, 2])
    top = jnp.concatenate([yaw_rotation(yaw, pitch), rear[:, None]], 1)
    return jnp.concatenate([top, jnp.array([[0.0, 0.0, 0.0, 1.0]])], 0)

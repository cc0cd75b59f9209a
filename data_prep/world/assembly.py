"""Objects of many parts: lists of parts described by scalars, and a choice of the parts that count.

Objects are described for ONE place with scalars and vmapped over all places; the lists collect the numbers of all their
parts and build them with a few array operations, which keeps compilation short.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world import primitives
from data_prep.world.primitives import Parts, yaw_rotation
from data_prep.world.surfaces import Material

Number = jax.Array | float
BELOW = 1.5  # metres that things reach below their ground, so that nothing floats on a slope


BOX, CONE = 0, 1  # outlines of solids; 3, 4, 6: a board with this many corners, facing x
BALL, PILLAR, DISC = 0, 1, 2  # ellipsoid, upright cylinder, cylinder along x
# columns of rows: two corners, what the top is smaller by at -x -y +x +y, outline, turn; then the surface
_SHAPE_NUMBERS, _SURFACE_NUMBERS = 12, 10
ROW = _SHAPE_NUMBERS + _SURFACE_NUMBERS
_CHUNK = 6  # rows that are selected together: the work per number grows with the length of the selection


class Spot(NamedTuple):
    """Where objects stand; [K]."""

    origin: jax.Array  # [K, 3] on the ground
    yaw: jax.Array  # radians
    pitch: jax.Array  # nose up, radians; 0 for upright things
    exists: jax.Array  # bool


class Draws:
    """Uniform random numbers [N], drawn at once by `jax.random.uniform` and handed out one by one."""

    def __init__(self, values: jax.Array):
        self._values = values
        self._used = 0

    def __call__(self, low: Number = 0.0, high: Number = 1.0) -> jax.Array:
        """The next number, scaled to low..high. Raises ValueError when all are used."""
        if self._used == self._values.shape[0]:
            raise ValueError(f"all {self._used} random numbers are used; draw more")
        value = jax.lax.index_in_dim(self._values, self._used, keepdims=False)
        self._used += 1
        if isinstance(low, float) and isinstance(high, float):
            value = value if high - low == 1.0 else value * (high - low)
            return value if low == 0.0 else value + low
        return low + (high - low) * value

    def chance(self, probability: Number) -> jax.Array:
        """Bool: true with this probability."""
        return self() < probability

    def several(self, count: int, low: Number = 0.0, high: Number = 1.0) -> jax.Array:
        """[count] numbers. Raises ValueError when there are not enough."""
        if self._used + count > self._values.shape[0]:
            raise ValueError(f"{self._used} of {self._values.shape[0]} random numbers are used; draw more")
        values = jax.lax.slice_in_dim(self._values, self._used, self._used + count)
        self._used += count
        return low + (high - low) * values

    def pick(self, rows: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> jax.Array:
        """One of the rows (for example colours [K, 3]) -> [3]."""
        share = np.ones(len(rows)) if weights is None else np.array(weights, float)
        value, result = self(), jnp.asarray(np.array(rows[0], np.float32))
        for row, edge in zip(rows[1:], np.cumsum(share / share.sum())[:-1], strict=True):
            result = jnp.where(value >= float(edge), jnp.asarray(np.array(row, np.float32)), result)
        return result


def stacked(values: Sequence[Number]) -> jax.Array:
    """[N] float32 from scalars.

    Elementwise selections instead of a concatenation: those are fused with what computes the scalars, so that an object
    of hundreds of numbers is one compiled loop, not hundreds.
    """
    values = list(values)
    result = jnp.asarray(np.array([0.0 if isinstance(v, jax.Array) else v for v in values], np.float32))
    first: dict[int, int] = {}
    source = [first.setdefault(id(v), i) if isinstance(v, jax.Array) else -1 for i, v in enumerate(values)]
    columns = jnp.asarray(np.array(source, np.int32))
    for index in first.values():
        result = jnp.where(columns == index, values[index], result)
    return result


class _Rows:
    """Collects the rows of one object."""

    def __init__(self) -> None:
        self._numbers: list[Number] = []

    def _add(self, shape: Sequence[Number], surface: Sequence[Number], colour, valid) -> None:
        colour = (
            colour if isinstance(colour, tuple) else [jax.lax.index_in_dim(colour, i, keepdims=False) for i in range(3)]
        )
        self._numbers.extend([*shape, *surface, *colour, valid if isinstance(valid, jax.Array) else float(valid)])

    def rows(self) -> jax.Array:
        """[K, ROW]."""
        chunks = [stacked(self._numbers[i : i + _CHUNK * ROW]) for i in range(0, len(self._numbers), _CHUNK * ROW)]
        return jnp.concatenate(chunks).reshape(-1, ROW)


class Solids(_Rows):
    """A list of boxes, frusta, cones and boards of one object."""

    def add(
        self, low: Sequence[Number], high: Sequence[Number], material: Number, semantic: Number, colour, *,
        extra: Sequence[Number] = (0.0, 0.0, 0.0, 0.0), valid: jax.Array | bool = True,
        shrink: Sequence[Number] = (0.0, 0.0, 0.0, 0.0), outline: Number = BOX, turn: Number = 0.0,
    ) -> None:  # fmt: skip
        """A box between corners, metres in the object's frame; its top is smaller by `shrink` at -x, -y, +x, +y.
        `colour` is a tuple or an array [3]; `turn` in radians is that of a CONE about its axis. Parts without extent
        along an axis do not exist."""
        self._add([*low, *high, *shrink, outline, turn], [material, semantic, *extra], colour, valid)


class Rounds(_Rows):
    """A list of ellipsoids, upright cylinders and discs of one object."""

    def add(
        self, centre: Sequence[Number], radii: Sequence[Number], material: Number, semantic: Number, colour, *,
        extra: Sequence[Number] = (0.0, 0.0, 0.0, 0.0), valid: jax.Array | bool = True, outline: Number = BALL,
    ) -> None:  # fmt: skip
        """An ellipsoid, PILLAR or DISC around `centre`, metres in the object's frame."""
        low = [c - r for c, r in zip(centre, radii, strict=True)]
        high = [c + r for c, r in zip(centre, radii, strict=True)]
        self._add([*low, *high, 0.0, 0.0, 0.0, 0.0, outline, 0.0], [material, semantic, *extra], colour, valid)

    def pole(
        self, foot: Sequence[Number], radius: Number, top: Number, material: Number, semantic: Number, colour, *,
        extra: Sequence[Number] = (0.0, 0.0, 0.0, 0.0), valid: jax.Array | bool = True,
    ) -> None:  # fmt: skip
        """An upright cylinder from `foot` (x, y, z) to the height `top`."""
        low, high = [foot[0] - radius, foot[1] - radius, foot[2]], [foot[0] + radius, foot[1] + radius, top]
        self._add([*low, *high, 0.0, 0.0, 0.0, 0.0, PILLAR, 0.0], [material, semantic, *extra], colour, valid)


def numbers(key: jax.Array, *shape: int) -> jax.Array:
    """Uniform random numbers 0..1 of this shape."""
    return jax.random.uniform(key, shape)


class Placed:
    """Objects and the spots where they stand."""

    def __init__(self, spots: Spot) -> None:
        columns = [spots.yaw, spots.pitch, spots.exists.astype(jnp.float32)]
        self._table = jnp.concatenate([spots.origin, jnp.stack(columns, -1)], -1)  # [K, 6]: one gather, not four
        self._rows: list[jax.Array] = []
        self._index: list[np.ndarray] = []

    def add(self, rows: jax.Array, index: np.ndarray, exists: jax.Array | None = None) -> None:
        """Rows [N, K, ROW] of objects at the spots `index` [N]; without those for which `exists` [N] is false."""
        if exists is not None:
            rows = rows.at[..., -1].multiply(exists[:, None])
        self._rows.append(rows.reshape(-1, ROW))
        self._index.append(np.repeat(index, rows.shape[1]))

    def largest(self, count: int, eye: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The parts that look largest from `eye` [3]: rows [count, ROW], whether they exist, rotations and origins of
        their objects. Arrays stay small although most parts of most objects do not exist or are too far away."""
        rows, spot = jnp.concatenate(self._rows), self._table[np.concatenate(self._index)]
        low, high = rows[:, :3], rows[:, 3:6]
        extent = high - low
        real = (rows[:, -1] > 0.5) & (spot[:, 5] > 0.5) & jnp.all(extent > 1e-3, -1)
        middle, yaw = 0.5 * (low + high), spot[:, 3]
        x = middle[:, 0] * jnp.cos(yaw) - middle[:, 1] * jnp.sin(yaw)
        y = middle[:, 0] * jnp.sin(yaw) + middle[:, 1] * jnp.cos(yaw)
        away = jnp.linalg.norm(spot[:, :3] + jnp.stack([x, y, middle[:, 2]], -1) - eye, axis=-1)
        size = jnp.sqrt(jnp.prod(jnp.maximum(extent, 1e-3), -1) / jnp.maximum(jnp.min(extent, -1), 1e-3))
        size = jnp.where(low[:, 2] < 0.0, extent.max(-1), size)  # nothing loses its foot before the rest
        # beyond some 60 m, details of large things yield to small things nearby
        apparent = size / ((away + 5.0) * (1.0 + away / 60.0))
        apparent, chosen = jax.lax.top_k(jnp.where(real, apparent, -1.0), count)
        spot = spot[chosen]
        return rows[chosen], apparent > 0, yaw_rotation(spot[:, 3], spot[:, 4]), spot[:, :3]

    def solids(self, count: int, eye: jax.Array) -> Parts:
        """`largest` as parts [count] made of planes."""
        rows, real, rotation, origin = self.largest(count, eye)
        low, high = rows[:, :3], jnp.where(real[:, None], rows[:, 3:6], rows[:, :3] + 1.0)
        shrink, outline, turn = rows[:, 6:10], rows[:, 10], rows[:, 11]
        parts = primitives.frustum(low, high, shrink[:, :2], shrink[:, 2:])
        plain = parts.planes
        middle, half = 0.5 * (low + high), 0.5 * (high - low)

        def around(normals: jax.Array, reach: jax.Array) -> jax.Array:
            """[count, 8, 4] from six normals [count, 6, 3] with their distances from the middle and two ends."""
            length = jnp.linalg.norm(normals, axis=-1)
            normals = normals / length[..., None]
            offsets = reach / length + jnp.einsum("kfi,ki->kf", normals, middle)
            return jnp.concatenate([normals, offsets[..., None]], -1)

        angle = turn[:, None] + jnp.arange(6) * (np.pi / 3)
        lean = jnp.broadcast_to((shrink[:, 0] / (2 * half[:, 2]))[:, None], angle.shape)
        sides = jnp.stack([jnp.cos(angle), jnp.sin(angle), lean], -1)
        cone = around(sides, half[:, :1] - 0.5 * shrink[:, :1])
        cone = jnp.concatenate([cone, plain[:, 4:6]], 1)
        corners = jnp.maximum(outline, 3.0)[:, None]
        angle = jnp.arange(6) * (2 * np.pi / corners) - np.pi / 2
        angle = angle + jnp.where(corners == 4, 0.0, np.pi * (corners == 6) / 6)
        sides = jnp.stack([jnp.zeros_like(angle), jnp.cos(angle), jnp.sin(angle)], -1)
        board = around(sides, half[:, 2:] * jnp.cos(np.pi / corners))
        board = jnp.concatenate([board, plain[:, :2]], 1)
        outline = outline[:, None, None]
        planes = jnp.where(outline == BOX, plain, jnp.where(outline == CONE, cone, board))
        return _finished(parts._replace(planes=planes), rows, real, rotation, origin)

    def rounds(self, count: int, eye: jax.Array) -> Parts:
        """`largest` as round parts [count]."""
        rows, real, rotation, origin = self.largest(count, eye)
        low, high = rows[:, :3], jnp.where(real[:, None], rows[:, 3:6], rows[:, :3] + 1.0)
        parts = primitives.ellipsoid(0.5 * (low + high), 0.5 * (high - low))
        outline = rows[:, 10, None]
        along = (outline == PILLAR) * jnp.array([0.0, 0.0, 1.0]) + (outline == DISC) * jnp.array([1.0, 0.0, 0.0])
        disc_order = jnp.array([2, 3, 0, 1, 4, 5, 6, 7])  # its caps first
        planes = jnp.where(outline[..., None] == DISC, parts.planes[:, disc_order], parts.planes)
        quadric = parts.quadric * (1.0 - along)[:, None, :]
        return _finished(parts._replace(planes=planes, quadric=quadric), rows, real, rotation, origin)


def _finished(parts: Parts, rows: jax.Array, real: jax.Array, rotation: jax.Array, origin: jax.Array) -> Parts:
    """Painted and placed. The texture of a sign starts in its middle, all others at the origin of their object."""
    surface = rows[:, _SHAPE_NUMBERS:]
    material = surface[:, 0].astype(jnp.int32)
    parts = primitives.painted(parts, material, surface[:, 1].astype(jnp.int32), surface[:, 6:9], surface[:, 2:6], real)
    middle = 0.5 * (rows[:, :3] + rows[:, 3:6])
    parts = parts._replace(origin=jnp.where((material == Material.SIGN)[:, None], middle, 0.0))
    return primitives.place(parts, rotation, origin)

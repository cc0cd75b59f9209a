"""Exact first hits of bundles of rays with convex parts; the same for cameras, LiDAR and the sun.

Along a ray o + s d, with w = 1 / s, the plane n . x = p is met at w = (n . d) / (p - n . o): linear in d. Planes that
face the origin (p < n . o) bound w from above, the others from below, so a solid part costs a few multiplications per
plane, no division. Rays come in tiles; a part that cannot meet the pyramid around a tile is left out for all its rays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_prep.world.primitives import FACES, Geometry

_FAR = 1e9  # an inverse distance that no hit reaches
_AT_ONCE = 4  # parts per iteration of the inner loop
_CODE = 16  # part * _CODE + face in one integer
NOTHING = -1


class Tiles(NamedTuple):
    """T tiles of R rays from one origin. Directions need no unit length; every ray of a tile lies inside the pyramid
    that its four `corners` span."""

    origin: jax.Array  # [3]
    directions: jax.Array  # [T, 3, R]
    corners: jax.Array  # [T, 4, 3]


class Hits(NamedTuple):
    """First hits. The distance in lengths of the direction is 1 / `inverse`; 0 where nothing is hit."""

    inverse: jax.Array  # [T, R]
    part: jax.Array  # [T, R] int32: index into solids, then rounds; NOTHING = -1
    face: jax.Array  # [T, R] int32: plane of the part; FACES = the quadric


def _coefficients(planes: jax.Array, origin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per plane: gradient of w with respect to the direction [P, F, 3], and whether it faces the origin [P, F]."""
    gap = planes[..., 3] - planes[..., :3] @ origin
    gap = jnp.where(jnp.abs(gap) < 1e-6, 1e-6, gap)
    return planes[..., :3] / gap[..., None], gap < 0


def _largest_entry(gradient: jax.Array, facing: jax.Array, corners: jax.Array) -> jax.Array:
    """[T, P]: no ray inside the corners' pyramid meets the part at a larger w; 0 where none can meet it at all."""
    # Face by face and corner by corner on [T, P]: an einsum would write [T, P, 8, 4] to memory.
    highest_entry, lowest_exit = jnp.float32(_FAR), jnp.float32(0.0)
    for face in range(FACES):
        g = gradient[:, face]
        at = [
            corners[:, c, 0, None] * g[:, 0] + corners[:, c, 1, None] * g[:, 1] + corners[:, c, 2, None] * g[:, 2]
            for c in range(4)
        ]
        highest = jnp.maximum(jnp.maximum(at[0], at[1]), jnp.maximum(at[2], at[3]))
        lowest = jnp.minimum(jnp.minimum(at[0], at[1]), jnp.minimum(at[2], at[3]))
        highest_entry = jnp.minimum(highest_entry, jnp.where(facing[:, face], highest, _FAR))
        lowest_exit = jnp.maximum(lowest_exit, jnp.where(facing[:, face], 0.0, lowest))
    return jnp.where((highest_entry > lowest_exit) & (highest_entry > 0), highest_entry, 0.0)


def _listed(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices where `mask` [P] holds, filled up with P, and how many there are."""
    size = mask.shape[0]
    return jnp.nonzero(mask, size=size + _AT_ONCE, fill_value=size)[0], mask.sum()


def _cholesky(quadric: jax.Array) -> jax.Array:
    """[P, 6] entries 00 10 20 11 21 22 of the lower triangular L of Q = L L^T; Q [P, 3, 3] may be singular."""

    def root(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.sqrt(jnp.maximum(x, 0.0))
        return x, jnp.where(x > 1e-9, 1.0 / jnp.maximum(x, 1e-9), 0.0)

    l00, inverse = root(quadric[:, 0, 0])
    l10, l20 = quadric[:, 1, 0] * inverse, quadric[:, 2, 0] * inverse
    l11, inverse = root(quadric[:, 1, 1] - l10 * l10)
    l21 = (quadric[:, 2, 1] - l20 * l10) * inverse
    l22, _ = root(quadric[:, 2, 2] - l20 * l20 - l21 * l21)
    return jnp.stack([l00, l10, l20, l11, l21, l22], -1)


def _times(factor: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """L^T x for the entries [6, ...] of `_cholesky` and x [3, ...]."""
    first = factor[0] * x[0] + factor[1] * x[1] + factor[2] * x[2]
    return first, factor[3] * x[1] + factor[4] * x[2], factor[5] * x[2]


def _solid_interval(d: jax.Array, gradient: jax.Array, facing: jax.Array, faces: range) -> tuple:
    entry = jnp.full(d.shape[1:], _FAR)
    leave = jnp.zeros(d.shape[1:])
    face = jnp.zeros(d.shape[1:], jnp.int32)
    for k in faces:
        w = d[0] * gradient[k, 0] + d[1] * gradient[k, 1] + d[2] * gradient[k, 2]
        front = jnp.where(facing[k], w, _FAR)
        face = jnp.where(front < entry, k, face)
        entry = jnp.minimum(entry, front)
        leave = jnp.maximum(leave, jnp.where(facing[k], 0.0, w))
    return entry, leave, face


def _walk(indices: jax.Array, count: jax.Array, bounds: jax.Array, start: tuple, meet) -> tuple:
    """Runs `meet(part index, state)` for the listed parts, nearest bounds first, until none can change a ray."""

    def body(carry):
        i, state = carry
        ids = jax.lax.dynamic_slice(indices, (i,), (_AT_ONCE,))
        for j in range(_AT_ONCE):
            state = meet(ids[j], state)
        return i + _AT_ONCE, state

    def goes_on(carry):
        i, (best, _) = carry
        return (i < count) & jnp.any(best < bounds[indices[i]])

    return jax.lax.while_loop(goes_on, body, (0, start))[1]


def trace(geometry: Geometry, tiles: Tiles, tiles_at_once: int | None = None) -> Hits:
    """First hit of every ray.

    Args:
      geometry: parts in the same frame as the rays; parts that contain the origin are not seen.
      tiles: the rays.
      tiles_at_once: how many tiles are traced together; default 1 on a CPU (each then meets only its own parts),
        all on accelerators.
    """
    if tiles_at_once is None:
        tiles_at_once = 1 if jax.default_backend() == "cpu" else tiles.directions.shape[0]
    solids, rounds = geometry.solids, geometry.rounds
    num_solids = solids.valid.shape[0]

    def padded(array: jax.Array) -> jax.Array:  # the fill index of `_listed` points at a part that is never hit
        return jnp.concatenate([array, jnp.zeros((1, *array.shape[1:]), array.dtype)])

    def prepared(parts, may_surround: bool) -> tuple:  # nearest first: a tile is done when nothing nearer can come
        gradient, facing = _coefficients(parts.planes, tiles.origin)
        usable = parts.valid & (facing.any(-1) | may_surround)  # a round part has corners of its box to be in
        entry = jnp.where(usable, _largest_entry(gradient, facing, tiles.corners), 0.0)
        bound = entry.max(0)
        order = jnp.argsort(-bound)
        return order, padded(gradient[order]), padded(facing[order]), padded(bound[order]), entry[:, order] > 0

    solid_order, solid_gradient, solid_facing, solid_bound, solid_mask = prepared(solids, False)
    round_order, round_gradient, round_facing, round_bound, round_mask = prepared(rounds, True)
    factor = _cholesky(rounds.quadric[round_order])
    offset = rounds.centre[round_order] - tiles.origin
    seen = jnp.stack(_times(jnp.moveaxis(factor, -1, 0), jnp.moveaxis(offset, -1, 0)), -1)
    a = jnp.sum(seen * seen, -1) - 1.0
    round_mask = round_mask & (a > 1e-6)  # otherwise the origin is inside the quadric
    a, factor, seen = padded(jnp.where(a > 1e-6, a, 1.0)), padded(factor), padded(seen)
    solid_part, round_part = padded(solid_order), padded(round_order + num_solids)

    def meet_solid(d, index, state):
        best, code = state
        entry, leave, at = _solid_interval(d, solid_gradient[index], solid_facing[index], range(FACES))
        hit = (entry > leave) & (entry > best) & (entry < _FAR)
        return jnp.where(hit, entry, best), jnp.where(hit, solid_part[index] * _CODE + at, code)

    def meet_round(d, index, state):
        best, code = state
        entry, leave, at = _solid_interval(d, round_gradient[index], round_facing[index], range(2))  # the caps
        # In coordinates where the quadric is the unit sphere around 0, seen from -u along v. |u x v| instead of
        # b^2 - a |v|^2: thin things far away are what is left of two huge numbers there.
        u, v = seen[index], _times(factor[index], d)
        b = u[0] * v[0] + u[1] * v[1] + u[2] * v[2]
        x, y, z = u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]
        under = v[0] * v[0] + v[1] * v[1] + v[2] * v[2] - (x * x + y * y + z * z)
        root = jnp.sqrt(jnp.maximum(under, 0.0))
        near, far = (b + root) / a[index], (b - root) / a[index]
        at = jnp.where(near < entry, FACES, at)
        entry, leave = jnp.minimum(entry, near), jnp.maximum(leave, far)
        hit = (under > 0) & (entry > leave) & (entry > best) & (index < rounds.valid.shape[0])
        return jnp.where(hit, entry, best), jnp.where(hit, round_part[index] * _CODE + at, code)

    def one(item):
        d, of_solids, of_rounds = item
        shape = d.shape[1:]
        # Part and face in one number: every array of the state makes the loop compute the interval once more.
        state = (jnp.zeros(shape), jnp.full(shape, NOTHING * _CODE, jnp.int32))
        state = _walk(*_listed(of_solids), solid_bound, state, lambda i, s: meet_solid(d, i, s))
        best, code = _walk(*_listed(of_rounds), round_bound, state, lambda i, s: meet_round(d, i, s))
        return best, code // _CODE, code % _CODE

    items = (tiles.directions, solid_mask, round_mask)
    total = tiles.directions.shape[0]
    if tiles_at_once >= total:
        return Hits(*jax.vmap(one)(items))
    return Hits(*jax.lax.map(one, items, batch_size=tiles_at_once if tiles_at_once > 1 else None))


def normals(geometry: Geometry, hits: Hits, points: jax.Array) -> jax.Array:
    """Outward unit normals [..., 3] at the hit points [..., 3] (world frame); zeros where nothing was hit."""
    parts_planes = jnp.concatenate([geometry.solids.planes, geometry.rounds.planes])
    part, face = jnp.maximum(hits.part, 0), jnp.minimum(hits.face, FACES - 1)
    flat = parts_planes.reshape(-1, 4)[part * FACES + face, :3]
    index = jnp.maximum(part - geometry.solids.valid.shape[0], 0)
    quadric, centre = (  # one row more, so that there is one where no part is round
        jnp.concatenate([rows, jnp.zeros((1, *rows.shape[1:]))])
        for rows in (geometry.rounds.quadric, geometry.rounds.centre)
    )
    curved = jnp.einsum("...ij,...j->...i", quadric[index], points - centre[index])
    curved = curved / jnp.maximum(jnp.linalg.norm(curved, axis=-1, keepdims=True), 1e-12)
    normal = jnp.where((hits.face == FACES)[..., None], curved, flat)
    return jnp.where((hits.part != NOTHING)[..., None], normal, 0.0)


def pinhole_tiles(
    intrinsics: jax.Array, camera_to_world: jax.Array, size: tuple[int, int], tile: tuple[int, int] = (32, 64)
) -> Tiles:
    """Rays through all pixels of an image: directions with z = 1 in the camera, so that 1 / `Hits.inverse` is z-depth.

    Tiles reach beyond the image where its (height, width) `size` is no multiple of `tile`; `untile` cuts them off.
    """
    (height, width), (tall, wide) = size, tile
    rows, columns = -(-height // tall), -(-width // wide)
    y = ((jnp.arange(rows * tall) - intrinsics[1, 2]) / intrinsics[1, 1]).reshape(rows, 1, tall, 1)
    x = ((jnp.arange(columns * wide) - intrinsics[0, 2]) / intrinsics[0, 0]).reshape(1, columns, 1, wide)
    rotation = camera_to_world[:3, :3]

    def rays(x: jax.Array, y: jax.Array) -> jax.Array:  # [rows, columns, 3, ...]
        x, y = jnp.broadcast_arrays(x, y)
        local = jnp.stack([x, y, jnp.ones_like(x)], 2)
        return jnp.einsum("ij,rcjhw->rcihw", rotation, local).reshape(rows * columns, 3, -1)

    corners = rays(x[..., jnp.array([0, -1])], y[:, :, jnp.array([0, -1])])
    return Tiles(camera_to_world[:3, 3], rays(x, y), jnp.swapaxes(corners, 1, 2))


def untile(values: jax.Array, size: tuple[int, int], tile: tuple[int, int] = (32, 64)) -> jax.Array:
    """[T, R, ...] of `pinhole_tiles` -> [H, W, ...]."""
    (height, width), (tall, wide) = size, tile
    rows, columns = -(-height // tall), -(-width // wide)
    rest = values.shape[2:]
    grid = values.reshape(rows, columns, tall, wide, *rest).swapaxes(1, 2)
    return grid.reshape(rows * tall, columns * wide, *rest)[:height, :width]

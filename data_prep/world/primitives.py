"""Convex parts from which everything in the world is built, as batched arrays that jit and vmap.

A solid part is the intersection of up to `FACES` half-spaces; a round part is a quadric (ellipsoid, elliptic cylinder)
cut by two caps. Constructors take any leading batch shape [...] and build parts in the frame of their object
(x forward, y left, z up; metres); `place` moves them into the world.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FACES = 8  # half-spaces of a part; unused ones are (0, 0, 0 | 1), which every point satisfies


class Parts(NamedTuple):
    """P convex parts. `planes` are outward unit normals and offsets: inside is n . x <= d."""

    planes: jax.Array  # [..., 8, 4]
    centre: jax.Array  # [..., 3] of the quadric
    quadric: jax.Array  # [..., 3, 3]: (x - centre)^T Q (x - centre) <= 1; zero for solid parts
    rotation: jax.Array  # [..., 3, 3] object -> world: textures live in the frame of the object
    origin: jax.Array  # [..., 3] of that frame
    material: jax.Array  # [...] int32, `surfaces.Material`
    semantic: jax.Array  # [...] int32, `surfaces.Semantic`
    colour: jax.Array  # [..., 3] base colour, linear light, 0..1
    extra: jax.Array  # [..., 4] parameters of the material
    valid: jax.Array  # [...] bool: parts that do not exist in this scene stay in the arrays, so that shapes are fixed


class Geometry(NamedTuple):
    """Everything that a ray can hit: solid and round parts, each flattened to one leading dimension."""

    solids: Parts  # [S, ...]
    rounds: Parts  # [R, ...]


def _parts(planes: jax.Array, centre: jax.Array, quadric: jax.Array) -> Parts:
    shape = planes.shape[:-2]
    missing = FACES - planes.shape[-2]
    unused = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0]), (*shape, missing, 4))
    return Parts(
        planes=jnp.concatenate([planes, unused], -2).astype(jnp.float32),
        centre=jnp.broadcast_to(centre, (*shape, 3)).astype(jnp.float32),
        quadric=jnp.broadcast_to(quadric, (*shape, 3, 3)).astype(jnp.float32),
        rotation=jnp.broadcast_to(jnp.eye(3, dtype=jnp.float32), (*shape, 3, 3)),
        origin=jnp.zeros((*shape, 3), jnp.float32),
        material=jnp.zeros(shape, jnp.int32),
        semantic=jnp.zeros(shape, jnp.int32),
        colour=jnp.full((*shape, 3), 0.5, jnp.float32),
        extra=jnp.zeros((*shape, 4), jnp.float32),
        valid=jnp.ones(shape, bool),
    )


def half_spaces(normals: jax.Array, offsets: jax.Array) -> Parts:
    """Solid part from outward normals [..., K, 3] (any length > 0) and offsets [..., K], K <= 8."""
    normals, offsets = jnp.asarray(normals, jnp.float32), jnp.asarray(offsets, jnp.float32)
    length = jnp.linalg.norm(normals, axis=-1, keepdims=True)
    planes = jnp.concatenate([normals / length, offsets[..., None] / length], -1)
    return _parts(planes, jnp.zeros(3), jnp.zeros((3, 3)))


def box(low: jax.Array, high: jax.Array) -> Parts:
    """Box between two corners [..., 3]. Faces in order -x +x -y +y -z +z."""
    low, high = jnp.broadcast_arrays(jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32))
    axes = jnp.repeat(jnp.eye(3), 2, axis=0) * jnp.array([-1.0, 1.0] * 3)[:, None]
    offsets = jnp.stack([-low[..., 0], high[..., 0], -low[..., 1], high[..., 1], -low[..., 2], high[..., 2]], -1)
    return half_spaces(jnp.broadcast_to(axes, (*offsets.shape[:-1], 6, 3)), offsets)


def frustum(low: jax.Array, high: jax.Array, shrink_low: jax.Array, shrink_high: jax.Array) -> Parts:
    """Box whose TOP is smaller: its x and y sides move inwards by `shrink_low` (at -x, -y) and `shrink_high` (+x, +y).

    `low`, `high` [..., 3]; `shrink_*` [..., 2] metres at the top. Cabins with slanted windscreens, gable and hip roofs
    (shrink by half the width), embankments. Faces in order -x +x -y +y -z +z.
    """
    low, high, = jnp.broadcast_arrays(jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32))  # fmt: skip
    shape = low.shape[:-1]
    shrink_low = jnp.broadcast_to(jnp.asarray(shrink_low, jnp.float32), (*shape, 2))
    shrink_high = jnp.broadcast_to(jnp.asarray(shrink_high, jnp.float32), (*shape, 2))
    tall = high[..., 2] - low[..., 2]
    zero = jnp.zeros(shape)
    normals, offsets = [], []
    for axis in (0, 1):
        for sign, corner, shrink in ((-1.0, low, shrink_low), (1.0, high, shrink_high)):
            side = [zero, zero, shrink[..., axis] / tall]
            side[axis] = jnp.full(shape, sign)
            normals.append(jnp.stack(side, -1))
            offsets.append(sign * corner[..., axis] + low[..., 2] * shrink[..., axis] / tall)
    for sign, corner in ((-1.0, low), (1.0, high)):
        normals.append(jnp.broadcast_to(jnp.array([0.0, 0.0, sign]), (*shape, 3)))
        offsets.append(sign * corner[..., 2])
    return half_spaces(jnp.stack(normals, -2), jnp.stack(offsets, -1))


def ellipsoid(centre: jax.Array, radii: jax.Array) -> Parts:
    """Round part; `centre`, `radii` [..., 3]."""
    centre, radii = jnp.broadcast_arrays(jnp.asarray(centre, jnp.float32), jnp.asarray(radii, jnp.float32))
    bounds = box(centre - radii, centre + radii)
    caps_first = jnp.array([4, 5, 0, 1, 2, 3])
    return _parts(bounds.planes[..., caps_first, :], centre, jnp.eye(3) / jnp.square(radii)[..., None, :])


def painted(
    parts: Parts, material: jax.Array | int, semantic: jax.Array | int, colour: jax.Array,
    extra: jax.Array | tuple = (0.0, 0.0, 0.0, 0.0), valid: jax.Array | bool = True,
) -> Parts:  # fmt: skip
    """The parts with surface attributes; each broadcasts to the parts' leading shape."""
    shape = parts.valid.shape
    return parts._replace(
        material=jnp.broadcast_to(jnp.asarray(material, jnp.int32), shape),
        semantic=jnp.broadcast_to(jnp.asarray(semantic, jnp.int32), shape),
        colour=jnp.broadcast_to(jnp.asarray(colour, jnp.float32), (*shape, 3)),
        extra=jnp.broadcast_to(jnp.asarray(extra, jnp.float32), (*shape, 4)),
        valid=parts.valid & jnp.broadcast_to(jnp.asarray(valid, bool), shape),
    )


def yaw_rotation(yaw: jax.Array, pitch: jax.Array | float = 0.0) -> jax.Array:
    """Rotation [..., 3, 3], object -> world: first pitch (nose up positive) about y, then yaw (left) about z."""
    yaw, pitch = jnp.broadcast_arrays(jnp.asarray(yaw, jnp.float32), jnp.asarray(pitch, jnp.float32))
    cy, sy, cp, sp = jnp.cos(yaw), jnp.sin(yaw), jnp.cos(pitch), jnp.sin(pitch)
    zero = jnp.zeros_like(cy)
    rows = [
        jnp.stack([cy * cp, -sy, -cy * sp], -1),
        jnp.stack([sy * cp, cy, -sy * sp], -1),
        jnp.stack([sp, zero, cp], -1),
    ]
    return jnp.stack(rows, -2)


def place(parts: Parts, rotation: jax.Array, origin: jax.Array) -> Parts:
    """Moves parts by x -> rotation @ x + origin; `rotation` [..., 3, 3], `origin` [..., 3] broadcast to the parts."""
    shape = parts.valid.shape
    rotation = jnp.broadcast_to(rotation, (*shape, 3, 3))
    origin = jnp.broadcast_to(origin, (*shape, 3))
    normals = jnp.einsum("...ij,...kj->...ki", rotation, parts.planes[..., :3])
    offsets = parts.planes[..., 3] + jnp.einsum("...ki,...i->...k", normals, origin)
    return parts._replace(
        planes=jnp.concatenate([normals, offsets[..., None]], -1),
        centre=jnp.einsum("...ij,...j->...i", rotation, parts.centre) + origin,
        quadric=rotation @ parts.quadric @ jnp.swapaxes(rotation, -1, -2),
        rotation=rotation @ parts.rotation,
        origin=jnp.einsum("...ij,...j->...i", rotation, parts.origin) + origin,
    )


def flatten(*groups: Parts) -> Parts:
    """One list of parts [P, ...] from groups with any leading shapes."""
    flat = [jax.tree.map(lambda leaf, n=group.valid.ndim: leaf.reshape(-1, *leaf.shape[n:]), group) for group in groups]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 0), *flat)


def merge(*geometries: Geometry) -> Geometry:
    """Everything of several geometries."""
    return Geometry(flatten(*(g.solids for g in geometries)), flatten(*(g.rounds for g in geometries)))

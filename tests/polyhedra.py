"""Convex parts of the rendered world: more shapes, and parts as point sets, for tests."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world import primitives
from data_prep.world.primitives import Parts, box, half_spaces


def corners(planes: np.ndarray, tolerance: float = 2e-3) -> np.ndarray:
    """Vertices [K, 3] of a convex part: the meeting points of three planes that no other plane cuts off."""
    planes = np.asarray(planes, np.float64)
    planes = planes[np.linalg.norm(planes[:, :3], axis=1) > 0.5]
    triples = np.array(list(itertools.combinations(range(len(planes)), 3)))
    normals, offsets = planes[triples, :3], planes[triples, 3]
    usable = np.abs(np.linalg.det(normals)) > 1e-4
    points = np.linalg.solve(normals[usable], offsets[usable][..., None])[..., 0]
    return points[(points @ planes[:, :3].T <= planes[:, 3] + tolerance).all(1)]


def extrusion(profile: jax.Array, half_width: jax.Array, lean: jax.Array | float = 0.0) -> Parts:
    """Convex side profile swept along y: [..., K, 2] points (x, z) in clockwise order seen from the right (+x right,
    z up), 3 <= K <= 6; the sides lean inwards by `lean` metres per metre of height above z = 0.

    Faces: the K edges of the profile in order, then -y and +y. Cars, ramps, pitched roofs.
    """
    profile = jnp.asarray(profile, jnp.float32)
    edge = jnp.roll(profile, -1, axis=-2) - profile
    normals = jnp.stack([-edge[..., 1], jnp.zeros_like(edge[..., 0]), edge[..., 0]], -1)  # left of a clockwise edge
    length = jnp.maximum(jnp.linalg.norm(normals, axis=-1, keepdims=True), 1e-6)
    normals = normals / length
    offsets = normals[..., 0] * profile[..., 0] + normals[..., 2] * profile[..., 1]
    shape = profile.shape[:-2]
    lean = jnp.broadcast_to(jnp.asarray(lean, jnp.float32), shape)
    half_width = jnp.broadcast_to(jnp.asarray(half_width, jnp.float32), shape)
    sides = jnp.stack([jnp.stack([jnp.zeros(shape), jnp.full(shape, sign), lean], -1) for sign in (-1.0, 1.0)], -2)
    return half_spaces(
        jnp.concatenate([normals, sides], -2),
        jnp.concatenate([offsets, jnp.stack([half_width, half_width], -1)], -1),
    )


def cylinder(centre: jax.Array, axis: int, radii: jax.Array, half_length: jax.Array) -> Parts:
    """Round part: elliptic cylinder along `axis` (0 x, 1 y, 2 z); `radii` [..., 2] along the other two axes."""
    centre = jnp.asarray(centre, jnp.float32)
    radii = jnp.asarray(radii, jnp.float32)
    shape = jnp.broadcast_shapes(centre.shape[:-1], radii.shape[:-1], jnp.shape(half_length))
    half = [jnp.broadcast_to(radii[..., 0], shape), jnp.broadcast_to(radii[..., 1], shape)]
    half.insert(axis, jnp.broadcast_to(jnp.asarray(half_length, jnp.float32), shape))
    extent = jnp.stack(half, -1)
    centre = jnp.broadcast_to(centre, (*shape, 3))
    bounds = box(centre - extent, centre + extent)
    caps = [2 * axis, 2 * axis + 1]
    order = jnp.array([*caps, *(i for i in range(6) if i not in caps)])
    inverse = jnp.where(jnp.arange(3) == axis, 0.0, 1.0 / jnp.square(extent))
    return primitives._parts(bounds.planes[..., order, :], centre, jnp.eye(3) * inverse[..., None, :])

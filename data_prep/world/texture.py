"""Procedural patterns that are filtered over a pixel's footprint, so that they neither shimmer nor alias.

Coordinates are in metres; `width` is the footprint of a pixel along a coordinate, in the same unit. Everything is
elementwise on arrays of one shape.
"""

import jax
import jax.numpy as jnp

_X, _Y, _Z = 0x8DA6B343, 0xD8163841, 0xCB1AB31F  # odd multipliers that spread lattice points over 32 bits


def _mixed(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 15)) * jnp.uint32(0x2C1B3C6D)
    h = (h ^ (h >> 12)) * jnp.uint32(0x297A2D39)
    return h ^ (h >> 15)


def _unit(h: jax.Array) -> jax.Array:
    return (h >> 8).astype(jnp.float32) * 2.0**-24


def _bits(index: jax.Array) -> jax.Array:
    return index.astype(jnp.int32).astype(jnp.uint32)


def hashed(seed: jax.Array, *indices: jax.Array) -> jax.Array:
    """Uniform numbers 0..1 from a uint32 seed and up to three integer (valued) indices."""
    h = jnp.asarray(seed, jnp.uint32)
    for index, factor in zip(indices, (_X, _Y, _Z), strict=False):
        h = h + _bits(index) * jnp.uint32(factor)
    return _unit(_mixed(h))


def _smooth(f: jax.Array) -> jax.Array:
    return f * f * (3.0 - 2.0 * f)


def noise2(x: jax.Array, y: jax.Array, seed: jax.Array) -> jax.Array:
    """Smooth value noise of period 1, mean 0, range -1..1."""
    ix, iy = jnp.floor(x), jnp.floor(y)
    fx, fy = _smooth(x - ix), _smooth(y - iy)
    h = jnp.asarray(seed, jnp.uint32) + _bits(ix) * jnp.uint32(_X) + _bits(iy) * jnp.uint32(_Y)
    right, up = jnp.uint32(_X), jnp.uint32(_Y)
    a, b = _unit(_mixed(h)), _unit(_mixed(h + right))
    c, d = _unit(_mixed(h + up)), _unit(_mixed(h + right + up))
    low, high = a + (b - a) * fx, c + (d - c) * fx
    return 2.0 * (low + (high - low) * fy) - 1.0


def noise3(x: jax.Array, y: jax.Array, z: jax.Array, seed: jax.Array) -> jax.Array:
    """Smooth value noise of period 1 in space, mean 0, range -1..1."""
    iz = jnp.floor(z)
    fz = _smooth(z - iz)
    h = jnp.asarray(seed, jnp.uint32) + _bits(iz) * jnp.uint32(_Z)
    low, high = noise2(x, y, h), noise2(x, y, h + jnp.uint32(_Z))
    return low + (high - low) * fz


def visible(period: jax.Array | float, width: jax.Array) -> jax.Array:
    """How much of a pattern's contrast is left, 1..0: none where a pixel covers more than one period."""
    return _smooth(jnp.clip(1.35 - 1.35 * width / period, 0.0, 1.0))


def fractal2(
    x: jax.Array, y: jax.Array, width: jax.Array, seed: jax.Array, period: float, octaves: int, gain: float = 0.6
) -> jax.Array:
    """Sum of `octaves` of noise from `period` metres downwards, each `gain` times as strong as the one before."""
    total = jnp.zeros_like(x)
    for k in range(octaves):
        size = period / 2.1**k
        total += gain**k * visible(size, width) * noise2(x / size, y / size, seed + jnp.uint32(k * 7919))
    return total


def fractal3(
    p: tuple[jax.Array, jax.Array, jax.Array], width: jax.Array, seed: jax.Array, period: float, octaves: int,
    gain: float = 0.6,
) -> jax.Array:  # fmt: skip
    """The same in space, `p` = (x, y, z)."""
    total = jnp.zeros_like(p[0])
    for k in range(octaves):
        size = period / 2.1**k
        value = noise3(p[0] / size, p[1] / size, p[2] / size, seed + jnp.uint32(k * 7919))
        total += gain**k * visible(size, width) * value
    return total


def band(x: jax.Array, low: jax.Array | float, high: jax.Array | float, width: jax.Array) -> jax.Array:
    """Share 0..1 of the footprint [x - width / 2, x + width / 2] that lies between `low` and `high`."""
    width = jnp.maximum(width, 1e-4)
    overlap = jnp.minimum(x + 0.5 * width, high) - jnp.maximum(x - 0.5 * width, low)
    return jnp.clip(overlap / width, 0.0, 1.0)


def stripes(
    x: jax.Array, period: jax.Array | float, low: jax.Array | float, high: jax.Array | float, width: jax.Array
) -> jax.Array:
    """`band` of [low, high] repeated every `period`, 0 <= low < high <= period."""
    width = jnp.maximum(width, 1e-4)

    def integral(at: jax.Array) -> jax.Array:  # of the stripes from 0 to `at`
        whole = jnp.floor(at / period)
        return whole * (high - low) + jnp.clip(at - whole * period - low, 0.0, high - low)

    # Relative to the footprint's period, so that far coordinates cost no precision.
    x = x - jnp.floor(x / period) * period
    return jnp.clip((integral(x + 0.5 * width) - integral(x - 0.5 * width)) / width, 0.0, 1.0)


def courses(
    u: jax.Array, v: jax.Array, length: jax.Array, tall: jax.Array, joint: jax.Array, width_u: jax.Array,
    width_v: jax.Array, shift: jax.Array | float = 0.5,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Bricks, slabs or boards of `length` x `tall` metres, every other course shifted by `shift` lengths.

    Returns the share of the footprint that is joints, and the integer indices (column, row) of the brick.
    """
    row = jnp.floor(v / tall)
    along = u + shift * length * (row - 2.0 * jnp.floor(row * 0.5))
    column = jnp.floor(along / length)
    faces = stripes(v, tall, joint, tall, width_v) * stripes(along, length, joint, length, width_u)
    return 1.0 - faces, column, row

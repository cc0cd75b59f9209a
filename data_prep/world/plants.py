"""Trees, conifers, bushes and hedges, each in the frame of its own place (origin on the ground at the trunk)."""

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world.assembly import BELOW, CONE, Draws, Rounds, Solids
from data_prep.world.surfaces import Material, Semantic

CLUMPS = 7  # ellipsoids around the middle of a crown
GREENS = ((0.05, 0.10, 0.02), (0.07, 0.12, 0.03), (0.04, 0.075, 0.025), (0.10, 0.13, 0.035), (0.13, 0.10, 0.03))
_GREEN_WEIGHTS = (4, 4, 3, 2, 0.5)
_LAYERS = 4


def tree(values: jax.Array, reach: jax.Array, clear: jax.Array) -> jax.Array:
    """A broad-leaved tree: trunk and clumps of leaves [2 + CLUMPS].

    Args:
      values: random numbers [64].
      reach: largest radius of the crown, metres.
      clear: height of the lowest leaves above the ground for trees beside a road, metres (about 2.5).
    """
    draws, rounds = Draws(values), Rounds()
    species = draws()
    slim = species < 0.15  # poplars
    wide = species > 0.8
    small = (species > 0.15) & (species < 0.35)
    tall = jnp.where(small, draws(3.5, 6.0), jnp.where(slim, draws(9.0, 17.0), draws(6.0, 15.0)))
    radius = jnp.where(slim, 0.13, jnp.where(wide, 0.45, 0.32)) * tall * draws(0.8, 1.2)
    radius = jnp.minimum(radius, reach)
    bottom = jnp.maximum(clear, tall * draws(0.16, 0.3))
    tall = jnp.maximum(tall, bottom + 1.2 * radius)
    half = 0.5 * (tall - bottom)
    middle = bottom + half
    trunk = 0.012 * tall * draws(0.7, 1.4) + 0.03
    birch = draws.chance(0.12)
    bark = jnp.where(birch, 0.5, jnp.array([0.10, 0.075, 0.055]) * draws(0.7, 1.5))
    leaves = draws.pick(GREENS, _GREEN_WEIGHTS) * draws(0.75, 1.25)
    lean = draws.several(2, -0.15, 0.15)
    rounds.pole((0.0, 0.0, -BELOW), trunk, middle, Material.BARK, Semantic.VEGETATION, bark)
    rounds.add(
        (lean[0], lean[1], middle), (0.76 * radius, 0.76 * radius, 0.93 * half), Material.LEAVES, Semantic.VEGETATION,
        leaves, 
    )  # fmt: skip
    turn = draws(0.0, 2 * np.pi)
    for index in range(CLUMPS):
        angle = turn + 2 * np.pi * index * 0.382 + draws(-0.5, 0.5)
        level = -0.75 + 1.5 * (index + 0.5) / CLUMPS + draws(-0.15, 0.15)
        ring = radius * (1.0 - 0.5 * level**2) * draws(0.4, 0.56)
        size = radius * draws(0.42, 0.58)
        up = jnp.minimum(size * draws(0.7, 1.1) * jnp.where(slim, 2.5, 1.0), 0.5 * half)
        height = jnp.clip(middle + level * half, bottom + up * 0.95, tall - up * 0.7)
        rounds.add(
            (ring * jnp.cos(angle), ring * jnp.sin(angle), height), (size, size * draws(0.8, 1.15), up),
            Material.LEAVES, Semantic.VEGETATION, leaves * draws(0.8, 1.2),
        )  # fmt: skip
    return rounds.rows()


def conifer(values: jax.Array) -> jax.Array:
    """Rows [5] of a fir or cypress: hexagonal cones on each other above a stem."""
    draws, solids = Draws(values), Solids()
    tall = draws(4.0, 16.0)
    cypress = draws.chance(0.2)
    radius = tall * jnp.where(cypress, draws(0.08, 0.11), draws(0.16, 0.24))
    bottom = jnp.where(cypress, 0.3, draws(0.4, 1.6))
    turn, crown = draws(), tall - bottom
    green = jnp.array([0.03, 0.065, 0.028]) * draws(0.7, 1.4)
    for layer in range(_LAYERS):
        share = layer / _LAYERS
        wide, narrow = 1.0 - 0.82 * share, 0.06 if layer == _LAYERS - 1 else 0.42
        low, high = share - 0.06 * (share > 0), min(share + 1.45 / _LAYERS, 1.0)
        reach, cut = radius * wide, radius * (wide * (1 - narrow))
        solids.add(
            (-reach, -reach, bottom + crown * low), (reach, reach, bottom + crown * high), Material.LEAVES,
            Semantic.VEGETATION, green, shrink=(cut, cut, cut, cut), outline=CONE, turn=turn + 0.4 * layer,
        )  # fmt: skip
    stem = 0.018 * tall + 0.03
    solids.add(
        (-stem, -stem, -BELOW), (stem, stem, bottom + 0.5), Material.BARK, Semantic.VEGETATION, (0.09, 0.06, 0.045)
    )
    return solids.rows()


def bush(values: jax.Array) -> jax.Array:
    """A garden bush [3], 0.5 to 2 m high."""
    draws, rounds = Draws(values), Rounds()
    size = draws(0.35, 1.0)
    leaves = draws.pick(GREENS, _GREEN_WEIGHTS) * draws(0.8, 1.3)
    for index in range(3):
        share = size * draws(0.6, 1.0)
        at = (0.0, 0.0) if index == 0 else (size * draws(-0.8, 0.8), size * draws(-0.8, 0.8))
        rounds.add(
            (*at, 0.5 * share), (share, share * draws(0.8, 1.1), share * draws(0.7, 1.2)), Material.LEAVES,
            Semantic.VEGETATION, leaves * draws(0.85, 1.15),
        )  # fmt: skip
    return rounds.rows()

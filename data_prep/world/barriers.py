"""Fences, hedges and walls of lots, guard rails, and bridges over the road."""

import jax
import jax.numpy as jnp

from data_prep.world.assembly import BELOW, Draws, Solids
from data_prep.world.plants import GREENS
from data_prep.world.road import KNOT
from data_prep.world.surfaces import Material, Semantic


def fence(values: jax.Array, lot: jax.Array, setback: jax.Array) -> jax.Array:
    """What closes a lot of `lot` metres to the sidewalk: hedge, wooden fence, wall, or posts with rails: [11] solids.

    Frame: x along the lot's front from its corner, y into the lot, z up.
    """
    draws, solids = Draws(values), Solids()
    kind = draws()
    hedge, boards, bricks = kind < 0.35, (kind >= 0.35) & (kind < 0.6), (kind >= 0.6) & (kind < 0.8)
    rails = kind >= 0.8
    tall = jnp.where(hedge, draws(0.9, 2.0), jnp.where(boards, draws(0.9, 1.9), draws(0.6, 1.9)))
    thick = jnp.where(hedge, draws(0.5, 0.9), jnp.where(boards, 0.04, 0.22))
    plaster = draws.chance(0.4)
    wall = jnp.where(plaster, Material.PLASTER, Material.BRICK)
    material = jnp.where(hedge, Material.LEAVES, jnp.where(boards, Material.WOOD, wall))
    semantic = jnp.where(hedge, Semantic.VEGETATION, Semantic.WALL)
    green = draws.pick(GREENS[:4]) * draws(0.8, 1.2)
    wood = draws.pick([(0.22, 0.12, 0.06), (0.6, 0.6, 0.58), (0.13, 0.1, 0.08), (0.3, 0.2, 0.12)])
    masonry = jnp.where(plaster, 0.5, jnp.array([0.3, 0.13, 0.08])) * draws(0.7, 1.2)
    colour = jnp.where(hedge, green, jnp.where(boards, wood, masonry))
    extra = (jnp.where(boards, 0.12, 0.0), 0.0, 0.0, 0.0)
    gate = draws(0.1, 0.7) * lot
    gate_end = gate + jnp.minimum(draws(1.2, 4.0), 0.3 * lot)
    front = 0.12
    closed = ~rails
    solids.add((0.1, front, -BELOW), (gate, front + thick, tall), material, semantic, colour, extra=extra, valid=closed)
    solids.add(
        (gate_end, front, -BELOW),
        (lot - 0.1, front + thick, tall),
        material,
        semantic,
        colour,
        extra=extra,
        valid=closed,
    )
    sides = jnp.clip(setback - 0.5, 0.0, 12.0)
    solids.add(
        (0.06, front + 0.1, -BELOW),
        (0.06 + thick, sides, tall * 0.93),
        material,
        semantic,
        colour * 0.95,
        extra=extra,
        valid=closed & (sides > 2.0),
    )
    for x in (gate - 0.4, gate_end):
        solids.add(
            (x, front - 0.08, -BELOW), (x + 0.4, front + 0.32, tall + 0.25), material, semantic, colour, valid=bricks
        )
    metal = jnp.where(plaster, Material.METAL, Material.WOOD)
    for z in (0.42, 0.85):
        solids.add(
            (0.1, front, z),
            (lot - 0.1, front + 0.05, z + 0.09),
            metal,
            Semantic.WALL,
            wood,
            extra=(0.2, 0.0, 0.0, 0.0),
            valid=rails,
        )
    for share in (0.02, 0.32, 0.64, 0.97):
        x = share * lot
        solids.add(
            (x, front + 0.02, -BELOW),
            (x + 0.09, front + 0.12, 1.0),
            metal,
            Semantic.WALL,
            wood,
            extra=(0.2, 0.0, 0.0, 0.0),
            valid=rails,
        )
    return solids.rows()


def guard_rail() -> jax.Array:
    """A steel rail 0.75 m high along x, as long as a strip of ground, centred: [3] solids."""
    solids = Solids()
    half = 0.5 * KNOT + 0.02
    steel = (0.42, 0.43, 0.44)
    solids.add((-half, -0.04, 0.45), (half, 0.04, 0.76), Material.METAL, Semantic.WALL, steel)
    for x in (-2.5, 2.5):
        solids.add((x - 0.06, -0.16, -BELOW), (x + 0.06, -0.05, 0.72), Material.METAL, Semantic.WALL, steel)
    return solids.rows()


def bridge(values: jax.Array, half_deck: jax.Array, clear_half: jax.Array) -> jax.Array:
    """A bridge across the road: deck, parapets, beams, piers, abutments, embankments: [13] solids.

    Frame: x along the road, y left, origin on the road below the middle. `half_deck`: half the deck's width along the
    road; `clear_half`: metres from the centre line to the far edge of the sidewalks.
    """
    draws, solids = Draws(values), Solids()
    clear = draws(5.2, 6.6)
    top = clear + draws(0.9, 1.4)
    grey = draws(0.25, 0.5) * jnp.array([1.0, 0.97, 0.92])
    span = clear_half + draws(1.0, 12.0)
    part, concrete = Semantic.BRIDGE, Material.CONCRETE
    wing, thin, deep = span + 110.0, 0.25, draws(0.3, 0.6)
    solids.add((-half_deck, -wing, clear), (half_deck, wing, top), concrete, part, grey)
    rail = draws(0.8, 1.2)
    for x in (-half_deck - 0.05, half_deck - thin + 0.05):
        solids.add((x, -wing, clear + deep), (x + thin, wing, top + rail), concrete, part, grey * 1.1)
    for share in (-0.6, 0.0, 0.6):
        x = share * half_deck
        solids.add((x - 0.35, -span, clear - 0.5), (x + 0.35, span, clear + 0.1), concrete, part, grey * 0.9)
    piers = draws.chance(0.5)
    for y in (-clear_half - 0.6, clear_half + 0.1):
        for share in (-0.6, 0.6):
            x = share * half_deck
            solids.add(
                (x - 0.4, y, -4.0),
                (x + 0.4, y + 0.5, clear - 0.1),
                concrete,
                part,
                grey * 0.95,
                valid=piers & (span > clear_half + 2.0),
            )
    for low, high in ((-wing, -span), (span, wing)):
        solids.add((-half_deck + 0.1, low, -6.0), (half_deck - 0.1, high, clear + 0.05), concrete, part, grey)
    return solids.rows()

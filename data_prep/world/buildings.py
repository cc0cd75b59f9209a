"""Buildings of all kinds, described in the frame of their lot.

A building's frame has its origin at a lower front corner of the main body: x runs along the front (0 at the corner), y
into the lot, z up from the ground. Widths and depths are whole numbers of window pitches and storeys have equal height,
so FACADE surfaces show whole windows when columns are counted from local x or y = 0 and storeys from local z = 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_prep.world.assembly import Draws, Solids
from data_prep.world.style import Style
from data_prep.world.surfaces import Material, Semantic

DEEP = -4.0  # foundations reach this deep, metres
WALLS = (  # linear light
    (0.62, 0.56, 0.42), (0.68, 0.66, 0.62), (0.40, 0.39, 0.37), (0.55, 0.40, 0.22), (0.26, 0.10, 0.065),
    (0.33, 0.16, 0.10), (0.45, 0.48, 0.50), (0.60, 0.47, 0.36), (0.20, 0.20, 0.21), (0.52, 0.27, 0.18),
    (0.50, 0.52, 0.42), (0.36, 0.42, 0.47),
)  # fmt: skip
_WALL_WEIGHTS = (5, 5, 4, 2, 3, 3, 2, 3, 1.5, 1, 1, 1)
ROOFS = ((0.22, 0.075, 0.045), (0.13, 0.06, 0.045), (0.07, 0.07, 0.075), (0.11, 0.10, 0.09), (0.25, 0.11, 0.06))
SIGNS = (
    (0.45, 0.03, 0.03), (0.03, 0.12, 0.35), (0.02, 0.22, 0.09), (0.65, 0.42, 0.03), (0.6, 0.6, 0.58),
    (0.03, 0.03, 0.03), (0.5, 0.2, 0.03), (0.2, 0.05, 0.22),
)  # fmt: skip


class Body(NamedTuple):
    """Where the main body stands in its lot; metres."""

    offset: jax.Array  # from the lot's low end to the corner
    setback: jax.Array  # from the lot's front line
    width: jax.Array
    depth: jax.Array
    height: jax.Array  # of the walls


def _round_to(value: jax.Array, unit: jax.Array) -> jax.Array:
    return unit * jnp.maximum(jnp.round(value / unit), 1.0)


def building(values: jax.Array, style: Style, lot: jax.Array, exists: jax.Array) -> tuple[jax.Array, Body]:
    """The parts [K] of one building, in its own frame, and where it stands in its lot of `lot` metres."""
    draws, solids = Draws(values), Solids()
    building_ = Semantic.BUILDING
    attached, hall = draws.chance(style.attached), draws.chance(style.halls)
    garage = draws.chance(style.garages)
    room = jnp.where(attached, 0.0, draws(2.0, 4.0) + jnp.where(garage, 3.8, 0.0))
    widest = jnp.where(hall, 36.0, jnp.where(style.rural > 0, 14.0, 25.0))
    widest = jnp.where(attached, 40.0, jnp.where(style.kind == 2, draws(8.0, 14.0), widest))
    width = jnp.clip(lot - room, 5.0, widest)
    storey = jnp.where(hall, draws(4.0, 5.2), draws(2.8, 3.5))
    spread = (draws() + draws() + draws() - 1.5) * 2.0  # about normal
    wanted = style.building_height * jnp.exp(style.height_spread * spread)
    wanted = jnp.where(hall, jnp.clip(wanted, 5.0, 11.0), wanted)
    storeys = jnp.clip(jnp.round(wanted / storey), 1.0, 14.0)
    height = storeys * storey
    pitch = width / jnp.round(width / draws(2.3, 3.8)).clip(1.0)
    depth = _round_to(jnp.where(hall, draws(14.0, 26.0), draws(8.0, 13.5)), pitch)
    setback = style.setback * jnp.where(attached, 1.0, draws(0.7, 1.4)) + draws(0.0, 0.15)
    side = jnp.where(attached, 0.5, draws(0.2, 0.5)) * (lot - width - jnp.where(garage & ~attached, 3.8, 0.0))
    body = Body(jnp.maximum(side, 0.0), setback, width, depth, height)
    colour = draws.pick(WALLS, _WALL_WEIGHTS) * draws(0.8, 1.1)
    trim = jnp.clip(colour * draws(0.6, 1.5) + draws(0.0, 0.15), 0.02, 0.8)
    glass = jnp.where(hall, draws(0.05, 0.2), jnp.where(storeys > 6, draws(0.3, 0.8), draws(0.2, 0.42)))
    facade = (pitch, storey, glass, draws())
    ribbed = hall & draws.chance(0.5)
    walls = jnp.where(ribbed, Material.SHUTTER, Material.FACADE)
    wall_extra = tuple(jnp.where(ribbed, a, b) for a, b in zip((0.3, 1.0, 0.0, 0.0), facade, strict=True))
    solids.add((0.0, 0.0, DEEP), (width, depth, height), walls, building_, colour, extra=wall_extra, valid=exists)

    # roofs: flat, gable with the ridge along the street or across it, hip
    flat = draws.chance(style.flat_roofs) | (storeys > 4) | hall
    kind = draws()
    across = (kind < 0.3) & (width < 12.0) & ~flat
    hip = (kind > 0.75) & ~flat
    gable = ~across & ~hip & ~flat
    steep = draws(0.45, 1.0)
    eaves = draws(0.25, 0.55)
    flush = jnp.where(attached, 0.04, 0.0)
    over_x = jnp.where(gable, -0.06, jnp.where(attached, -flush, eaves))
    over_y = jnp.where(across, -0.06, eaves)
    roof_low, roof_high = (-over_x, -over_y, height - 0.02), (width + over_x, depth + over_y)
    half_x, half_y = 0.5 * width + over_x, 0.5 * depth + over_y
    hip_run = jnp.minimum(half_x, half_y)
    cut_x = jnp.where(across, half_x, jnp.where(hip, hip_run, 0.0))
    cut_y = jnp.where(gable, half_y, jnp.where(hip, hip_run, 0.0))
    rise = steep * jnp.maximum(cut_x, cut_y) + jnp.where(flat, 1.0, 0.0)
    roof_colour = draws.pick(ROOFS) * draws(0.75, 1.2)
    solids.add(
        roof_low, (*roof_high, height + rise), Material.ROOF, building_, roof_colour,
        valid=exists & ~flat, shrink=(cut_x, cut_y, cut_x, cut_y),
    )  # fmt: skip
    end_x, end_y = jnp.where(across, 0.5 * width, 0.0), jnp.where(gable, 0.5 * depth, 0.0)
    solids.add(
        (0.0, 0.0, height - 0.01), (width, depth, height - 0.01 + steep * jnp.maximum(end_x, end_y)), walls,
        building_, colour, extra=wall_extra, valid=exists & (gable | across), shrink=(end_x, end_y, end_x, end_y),
    )  # fmt: skip
    edge, parapet = draws(0.06, 0.35), draws(0.25, 0.9)
    solids.add(
        (-edge * (1 - 2 * flush) + flush, -edge, height - draws(0.1, 0.4)),
        (width + jnp.where(attached, -0.04, edge), depth + edge, height + parapet),
        Material.CONCRETE, building_, trim, valid=exists & flat,
    )  # fmt: skip
    top = height + parapet
    inset = draws(1.5, 3.0)
    stepped = flat & ~hall & draws.chance(0.4) & (depth > 8.5) & (width > 8.5)
    solids.add(
        (inset, inset, height), (width - inset, depth - inset, height + 2 * storey * (draws() > 0.6) + storey), walls,
        building_, colour * 0.9, extra=wall_extra, valid=exists & stepped,
    )  # fmt: skip
    for _ in range(2):  # lift houses and machines on flat roofs, chimneys on pitched ones
        x, y = draws(0.15, 0.7) * width, draws(0.3, 0.6) * depth
        wide, tall = jnp.where(flat, draws(1.2, 3.5), draws(0.45, 0.9)), draws(0.9, 2.8)
        tip = jnp.where(flat, top + tall, height + rise + 0.3 * tall)
        solids.add(
            (x, y, height - 0.3), (x + wide, y + wide * 0.8, tip), jnp.where(flat, Material.METAL, Material.BRICK),
            building_, jnp.where(flat, 0.4, jnp.array([0.25, 0.11, 0.08])), valid=exists & draws.chance(0.6) & ~stepped,
        )  # fmt: skip
    for place in (0.2, 0.6):  # dormers
        x = place * width
        solids.add(
            (x, 0.25 * depth * 0.5, height), (x + 1.5, 0.5 * depth, height + jnp.minimum(0.75 * rise, 2.1)),
            Material.FACADE, building_, trim, extra=(1.5, 2.4, 0.4, facade[3]),
            valid=exists & gable & (rise > 2.2) & draws.chance(0.45), shrink=(0.0, 0.0, 0.0, 0.0),
        )  # fmt: skip

    # ground floor
    shop = draws.chance(style.shops) & ~hall
    sign = draws.pick(SIGNS)
    solids.add(
        (0.35, -0.05, 0.4),
        (width - 0.35, 0.1, 2.55),
        Material.GLASS,
        building_,
        (0.05, 0.06, 0.07),
        valid=exists & shop,
    )
    solids.add(
        (0.2, -0.16, 2.72),
        (width - 0.2, 0.05, 2.75 + draws(0.45, 0.8)),
        Material.PLAIN,
        building_,
        sign,
        valid=exists & shop,
    )
    reach = draws(0.9, 1.4)
    solids.add(
        (0.4, -reach, 2.3), (width - 0.4, 0.02, 2.74), Material.CLOTH, building_, draws.pick(SIGNS),
        valid=exists & shop & draws.chance(0.4), shrink=(0.0, 0.9 * reach, 0.0, 0.0),
    )  # fmt: skip
    for share in (0.33, 0.67):
        x = share * width
        solids.add((x - 0.2, -0.1, DEEP), (x + 0.2, 0.1, 2.73), Material.CONCRETE, building_, trim, valid=exists & shop)
    solids.add(
        (flush, -0.08, storey - draws(0.1, 0.2)), (width - flush, 0.1, storey + draws(0.05, 0.15)), Material.CONCRETE,
        building_, trim, valid=exists & draws.chance(0.4) & ~shop & (storeys > 1),
    )  # fmt: skip
    plinth = draws(0.3, 0.9)
    solids.add(
        (flush, -0.04, DEEP), (width - flush, 0.1, plinth), Material.CONCRETE, building_, trim * 0.7,
        valid=exists & ~shop & draws.chance(0.6),
    )  # fmt: skip
    door = pitch * (jnp.floor(draws(0.0, 0.99) * width / pitch) + 0.5) - 0.52  # below a column of windows
    door_colour = draws.pick(
        [(0.12, 0.05, 0.02), (0.3, 0.3, 0.3), (0.03, 0.07, 0.04), (0.04, 0.05, 0.12), (0.2, 0.02, 0.02)]
    )
    solids.add(
        (door, -0.07, 0.02),
        (door + 1.05, 0.1, 2.12),
        Material.WOOD,
        building_,
        door_colour,
        extra=(0.25, 0, 0, 0),
        valid=exists,
    )
    solids.add(
        (door - 0.3, -0.9, DEEP),
        (door + 1.35, 0.0, 0.16),
        Material.CONCRETE,
        building_,
        (0.3, 0.3, 0.29),
        valid=exists & ~shop,
    )
    solids.add(
        (door - 0.4, -1.1, 2.35), (door + 1.5, 0.0, 2.5), Material.CONCRETE, building_, trim,
        valid=exists & ~shop & draws.chance(0.4),
    )  # fmt: skip

    # fronts: balconies, a bay, garages and gates
    with_balconies = draws.chance(style.balconies) & (storeys > 2) & ~hall
    whole = draws.chance(0.4)
    column = pitch * jnp.floor(draws(0.0, 0.99) * width / pitch)
    out = draws(0.9, 1.4)
    railing = draws.pick([(0.35, 0.35, 0.36), (0.6, 0.58, 0.53), (0.12, 0.13, 0.14)])
    for level in range(1, 7):
        solids.add(
            (jnp.where(whole, 0.4, column), -out, level * storey - 0.15),
            (jnp.where(whole, width - 0.4, column + pitch), 0.0, level * storey + 0.95), Material.PLAIN, building_,
            railing, valid=exists & with_balconies & (storeys > level),
        )  # fmt: skip
    bay = pitch * jnp.floor(draws(0.0, 0.99) * width / pitch)
    solids.add(
        (bay, -0.7, jnp.where(shop, storey, DEEP)), (bay + pitch, 0.05, jnp.minimum(storeys, 4.0) * storey - 0.2),
        Material.FACADE, building_, colour * 1.05, extra=facade,
        valid=exists & ~hall & ~with_balconies & draws.chance(0.25) & (storeys > 1),
    )  # fmt: skip
    gate_wide, gate_tall = jnp.where(hall, 4.2, 2.5), jnp.where(hall, 3.9, 2.15)
    gate_colour = draws.pick([(0.5, 0.5, 0.48), (0.2, 0.22, 0.24), (0.3, 0.16, 0.08), (0.1, 0.17, 0.28)])
    beside = garage & ~attached & ~hall
    in_front = (hall | (garage & attached & ~shop)) & (width > 9.0)
    for index in range(2):
        low = jnp.where(beside, width + 0.45, width * (0.45 * index + 0.08))
        front = jnp.where(beside, 1.0, 0.0)
        solids.add(
            (low, front - 0.05, 0.0), (low + gate_wide, front + 0.1, gate_tall), Material.SHUTTER, building_,
            gate_colour, extra=(0.35, 0.0, 0.0, 0.0),
            valid=exists & jnp.where(beside, index == 0, in_front & (hall | (index == 0))),
        )  # fmt: skip
    solids.add(
        (width - 0.1, 1.0, DEEP),
        (width + 3.4, 1.0 + draws(5.0, 7.0), 2.55),
        Material.PLASTER,
        building_,
        colour,
        valid=exists & beside,
    )
    solids.add(
        (width - 0.05, 0.75, 2.55), (width + 3.6, 8.3, 2.75 + draws(0.0, 1.2)), Material.ROOF, building_, roof_colour,
        valid=exists & beside, shrink=(0.0, 1.5, 0.3, 1.5),
    )  # fmt: skip

    # behind: a wing, and buildings of the next street
    solids.add(
        (0.0, depth - 0.1, DEEP),
        (
            _round_to(0.4 * width, pitch), depth + _round_to(draws(4.0, 9.0), pitch),
            storey * (storeys - 1).clip(1.0) - 0.1,
        ),
        Material.FACADE, building_, colour, extra=facade, valid=exists & draws.chance(0.35),
    )  # fmt: skip
    back, tall = (
        22.0 + style.setback + draws(0.0, 22.0),
        storey * jnp.clip(jnp.round(storeys * draws(0.6, 1.6)), 1.0, 14.0),
    )
    town = (style.rural < 1) & draws.chance(0.6)
    far_wide = _round_to(draws(9.0, 18.0), pitch)
    solids.add(
        (0.0, back, DEEP), (far_wide, back + _round_to(draws(9.0, 14.0), pitch), tall), Material.FACADE, building_,
        draws.pick(WALLS, _WALL_WEIGHTS), extra=(pitch, storey, draws(0.2, 0.5), draws()), valid=town,
    )  # fmt: skip
    solids.add(
        (-0.4, back - 0.4, tall), (far_wide + 0.4, back + 10.0, tall + 3.0), Material.ROOF, building_, roof_colour,
        valid=town & (storeys < 4), shrink=(4.4, 4.4, 4.4, 4.4),
    )  # fmt: skip
    return solids.rows(), body

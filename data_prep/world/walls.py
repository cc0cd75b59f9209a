"""Colours of upright and built surfaces: facades with windows, bricks, plaster, roofs, boards, shutters, signs.

Coordinates u (level) and v (up) lie in the plane of a face; widths are footprints of a pixel. All arrays are [R] or
[3, R].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_prep.world.surfaces import Material
from data_prep.world.texture import band, courses, fractal2, hashed, noise2, stripes, visible


class Face(NamedTuple):
    """Points on faces of parts."""

    u: jax.Array  # [R] metres
    v: jax.Array  # [R] metres
    width_u: jax.Array  # [R]
    width_v: jax.Array  # [R]
    colour: jax.Array  # [3, R] base colour
    extra: jax.Array  # [4, R]
    seed: jax.Array  # [R] uint32, random per part and face


class Look(NamedTuple):
    """What a surface does with light."""

    albedo: jax.Array  # [3, R]
    mirror: jax.Array  # [R] share of light that is mirrored at normal incidence
    shine: jax.Array  # [3, R] radiance of its own


def _grey(value: float | jax.Array) -> jax.Array:
    return jnp.full((3, 1), value) if isinstance(value, float) else value[None]


def _stains(face: Face, width: jax.Array) -> jax.Array:
    """Weather on walls: clouds, streaks that run down, dirt near the ground; about 1."""
    cloud = fractal2(face.u, face.v, width, face.seed, 3.5, 3)
    streak = noise2(face.u / 0.35, face.v / 4.0, face.seed + 3) * visible(0.35, face.width_u)
    low = jnp.exp(-jnp.maximum(face.v, 0.0) / 0.5)
    return 1.0 + 0.07 * cloud + 0.05 * streak - 0.18 * low * (0.6 + 0.4 * cloud)


def _bricks(face: Face, width: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tone of each brick [R] and share of mortar [R]."""
    u, v = face.u, face.v
    mortar, column, row = courses(u, v, 0.25, 0.083, 0.012, face.width_u, face.width_v)  # type: ignore[arg-type]
    each = (hashed(face.seed, column, row) - 0.5) * visible(0.2, width)
    return 1.0 + 0.35 * each, mortar


def facade(face: Face, lamps: jax.Array) -> Look:
    """Walls with windows; extra = (window pitch, floor height, glass share, random). v = 0 is the ground."""
    pitch, tall = jnp.maximum(face.extra[0], 0.8), jnp.maximum(face.extra[1], 2.2)
    share, random = jnp.clip(face.extra[2], 0.05, 0.9), face.extra[3]
    wu, wv = face.width_u, face.width_v
    width = jnp.sqrt(wu * wv)
    style = (random * 4096.0).astype(jnp.uint32)
    looks = [hashed(style, jnp.int32(k)) for k in range(6)]
    column, row = jnp.floor(face.u / pitch), jnp.floor(face.v / tall)
    u, v = face.u - column * pitch, face.v - row * tall
    # Windows: single, in pairs of panes, or in ribbons as on office buildings.
    high = tall * jnp.clip(0.85 * jnp.sqrt(share) + 0.14, 0.35, 0.82)
    wide = jnp.clip(share * pitch * tall / high, 0.35, 0.92 * pitch)
    wide = jnp.where((looks[0] < 0.2) & (share > 0.3), pitch, wide)
    low_u, low_v = 0.5 * (pitch - wide), jnp.minimum(0.3 * tall, 0.92 * tall - high)
    solid = jnp.where(face.v > 0, 1.0, 0.0)
    rim = 0.05 + 0.05 * looks[1]

    def pane(grow: jax.Array | float) -> jax.Array:
        # Bands, not stripes: inside one window everything is sharp, and far away the filter's average is right.
        across = stripes(face.u - low_u + grow, pitch, 0.0, jnp.minimum(wide + 2 * grow, pitch), wu)
        return across * stripes(face.v - low_v + grow, tall, 0.0, high + 2 * grow, wv) * solid

    opening, glass = pane(0.0), pane(-rim)
    bars = band(u - 0.5 * pitch, -0.03, 0.03, wu) * jnp.where(looks[2] < 0.6, 1.0, 0.0)
    bars = jnp.maximum(bars, band(v - low_v - 0.68 * high, -0.03, 0.03, wv) * jnp.where(looks[2] < 0.25, 1.0, 0.0))
    glass = glass * (1.0 - bars * visible(0.5, width))
    sill = stripes(face.v - low_v + 0.12, tall, 0.0, 0.10, wv) * stripes(
        face.u - low_u + 0.08, pitch, 0.0, jnp.minimum(wide + 0.16, pitch), wu
    )
    sill = sill * solid * jnp.where(looks[3] < 0.6, 1.0, 0.0)
    # Rooms behind the glass: dark, curtains, blinds let down to different heights, some lit.
    keep = visible(1.2 * pitch, width)
    room, kind = hashed(face.seed + 1, column, row), hashed(face.seed + 2, column, row)
    down = hashed(face.seed + 3, column, row)
    blind = jnp.where(kind < 0.3, band(v, low_v + high * (1.0 - 0.9 * down), tall, wv), 0.0)
    hang = jnp.abs(u - 0.5 * pitch) / (0.5 * wide)
    curtain = jnp.where((kind > 0.6) & (hang > 0.35 + 0.5 * down), 1.0, 0.0)
    inside = 0.03 + 0.05 * room + 0.45 * jnp.maximum(blind, 0.8 * curtain)
    inside = 0.12 + (inside - 0.12) * keep
    reveal = band(v, low_v + high - 0.18, low_v + high, wv) * visible(0.6, width)  # shadow of the lintel
    inside = inside * (1.0 - 0.6 * reveal)
    # The wall itself.
    brick, mortar = _bricks(face, width)
    is_brick = jnp.where(looks[4] < 0.4, 1.0, 0.0)
    panels = stripes(face.v, tall, 0.0, 0.03, wv) * jnp.where(looks[4] > 0.6, 1.0, 0.0)
    ledge = band(v, tall - 0.14, tall, wv) * jnp.where(looks[3] > 0.7, 1.0, 0.0)
    tone = _stains(face, width) * (1.0 + is_brick * (brick - 1.0)) * (1.0 - 0.35 * panels) * (1.0 + 0.2 * ledge)
    below = band(low_v - 0.12 - v, 0.0, 0.25, wv) * band(jnp.abs(u - 0.5 * pitch), 0.0, 0.5 * wide, wu)
    tone = tone * (1.0 - 0.12 * below * jnp.where(looks[3] < 0.6, 1.0, 0.0))
    wall = face.colour * tone
    wall = wall + is_brick * mortar * (0.42 * _grey(tone) - wall)
    # Doors at street level in some columns.
    door = jnp.where((row == 0) & (hashed(face.seed + 5, column) < 0.18), 1.0, 0.0)
    door_area = door * band(u - 0.5 * pitch, -0.5, 0.5, wu) * band(v, 0.0, 2.1, wv)
    opening, glass, sill = (x * (1.0 - door) for x in (opening, glass, sill))
    frame_tone = jnp.where(looks[5] < 0.55, 0.72, 0.12 + 0.2 * looks[5])
    out = wall + sill * (0.55 - wall)
    out = out + opening * (_grey(frame_tone) - out)
    out = out + glass * (_grey(inside) * jnp.array([0.92, 0.98, 1.0])[:, None] - out)
    door_colour = 0.06 + 0.3 * room + (down - 0.3) * jnp.array([0.25, 0.05, -0.1])[:, None]
    out = out + door_area * (jnp.maximum(door_colour, 0.03) - out)
    lit = jnp.where(hashed(face.seed + 4, column, row) < 0.35, 0.3 + room, 0.0)
    lit = 0.28 + (lit - 0.28) * keep
    shine = (lamps * glass * lit * (0.4 + 0.6 * inside / 0.5)) * jnp.array([0.85, 0.60, 0.30])[:, None]
    return Look(out, 0.10 * glass * (1.0 - 0.6 * blind), shine)


def walls(face: Face, material: jax.Array) -> Look:
    """Bricks, plaster, concrete, roof tiles, boards, and ribbed shutters, by `material` [R]."""
    wu, wv = face.width_u, face.width_v
    width = jnp.sqrt(wu * wv)

    def is_(kind: Material) -> jax.Array:
        return jnp.where(material == kind, 1.0, 0.0)

    def chosen(**values: float | jax.Array) -> jax.Array:
        out = jnp.zeros_like(width)
        for name, value in values.items():
            out = jnp.where(material == Material[name.upper()], value, out)
        return out

    upright = face.extra[1] > 0.5
    ribbed = (material == Material.SHUTTER) | (material == Material.WOOD)
    swap = (material == Material.WOOD) | ((material == Material.SHUTTER) & upright)
    u, v = jnp.where(swap, face.v, face.u), jnp.where(swap, face.u, face.v)
    wu, wv = jnp.where(swap, face.width_v, wu), jnp.where(swap, face.width_u, wv)
    rib = jnp.where(face.extra[0] > 0.03, face.extra[0], 0.14)
    tall = chosen(brick=0.083, plaster=50.0, concrete=1.3, roof=0.32, wood=rib, shutter=rib)
    length = chosen(brick=0.25, plaster=50.0, concrete=2.6, roof=0.24, wood=4.0, shutter=50.0)
    joint = chosen(brick=0.012, plaster=0.0, concrete=0.015, roof=0.03, wood=0.012, shutter=0.0)
    gap, column, row = courses(u, v, length, tall, joint, wu, wv)
    spread = chosen(brick=0.35, concrete=0.10, roof=0.25, wood=0.30)
    each = (hashed(face.seed, column, row) - 0.5) * visible(2.0 * jnp.minimum(tall, length), width)
    # Ribs and tiles are rounded: light and dark across each.
    phase = (v / tall - jnp.floor(v / tall) - 0.5) * visible(tall, wv)
    round_off = chosen(roof=0.35, shutter=0.45) * phase
    stains = _stains(face, width)
    grain = jnp.where(
        material == Material.WOOD,
        noise2(u / 0.6, v / 0.012, face.seed + 9) * visible(0.03, width),
        noise2(u / 0.05, v / 0.05, face.seed + 9) * visible(0.08, width),
    )
    tone = stains * (1.0 + spread * each + round_off + 0.07 * grain)
    dark = chosen(concrete=0.45, roof=0.55, wood=0.75)
    out = face.colour * jnp.maximum(tone * (1.0 - dark * gap), 0.1)
    out = out + is_(Material.BRICK) * gap * (0.42 * _grey(stains) - out)
    moss = is_(Material.ROOF) * jnp.clip(1.5 * fractal2(face.u, face.v, width, face.seed + 17, 2.0, 2) - 0.6, 0.0, 0.6)
    out = out + moss * (jnp.array([0.12, 0.14, 0.07])[:, None] - out)
    mirror = jnp.where(ribbed & (material == Material.SHUTTER), 0.02, 0.0)
    return Look(out, mirror, jnp.zeros_like(out))


def sign(face: Face, local: jax.Array, facing: jax.Array) -> Look:
    """Traffic signs and boards; extra = (half width, half height, style 0..1). `local` [3, R] is relative to the
    middle of the board, y across, z up; `facing` [R] is the normal's local x: boards face -x, the rest is grey."""
    half_u, half_v = jnp.maximum(face.extra[0], 0.05), jnp.maximum(face.extra[1], 0.05)
    style = face.extra[2]
    u, v = local[1] / half_u, local[2] / half_v
    width = jnp.sqrt(face.width_u * face.width_v) / half_u
    round_ = jnp.sqrt(u * u + v * v)
    square = jnp.maximum(jnp.abs(u), jnp.abs(v))
    disc = (style < 0.5) & (jnp.abs(half_u - half_v) < 0.25 * half_u)
    edge = jnp.where(disc, round_, square)
    rim = band(edge, jnp.where(disc, 0.78, 0.90), 9.0, width)
    seed = (style * 8191.0).astype(jnp.uint32)
    # A symbol: blocks of a 5 x 5 grid, mirrored, or lines of writing on boards.
    column, row = jnp.floor(jnp.abs(u) * 4.0), jnp.floor(v * 4.0)
    symbol = jnp.where((hashed(seed, column, row) < 0.5) & (edge < 0.62), 1.0, 0.0) * visible(0.5, width)
    letters = hashed(seed, jnp.floor(local[1] / 0.07), jnp.floor(local[2] / 0.16)) < 0.6
    written = (jnp.abs(u) < 0.8) & (jnp.abs(v) < 0.75)
    line = stripes(local[2], 0.16, 0.03, 0.12, face.width_v) * jnp.where(written, 1.0, 0.0)
    writing = line * (0.45 + (jnp.where(letters, 0.9, 0.1) - 0.45) * visible(0.14, face.width_u))
    symbol = jnp.where(disc, symbol, writing)
    red, blue = jnp.array([0.55, 0.02, 0.03])[:, None], jnp.array([0.02, 0.08, 0.40])[:, None]
    white, black = jnp.full((3, 1), 0.75), jnp.full((3, 1), 0.03)
    prohibition = style < 0.3
    ground = jnp.where(disc, jnp.where(prohibition, white, blue), face.colour)
    bright = face.colour.mean(0) > 0.35
    ink = jnp.where(disc, jnp.where(prohibition, black, white), jnp.where(bright, black, white))
    border = jnp.where(disc, jnp.where(prohibition, red, white), ink)
    out = ground + symbol * (ink - ground)
    out = out + rim * (border - out)
    back = facing > -0.5
    out = jnp.where(back, 0.22, out)
    return Look(out, jnp.full_like(u, 0.02), jnp.zeros_like(out))

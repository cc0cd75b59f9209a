"""Radiance of what rays meet: surface colours by material, sun, sky, shadows, mirrors, lamps and haze."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_prep.world import pavement
from data_prep.world.light import Light
from data_prep.world.primitives import FACES, Geometry, Parts
from data_prep.world.raycast import NOTHING, Hits
from data_prep.world.shadow import Shadow, openness, sunlit
from data_prep.world.surfaces import Material
from data_prep.world.texture import fractal2, fractal3, hashed, noise2, noise3, visible
from data_prep.world.walls import Face, Look, facade, sign, walls


class Surfaces(NamedTuple):
    """Rows of all parts that shading looks up by the index of the hit part (solids first)."""

    rows: jax.Array  # [21, P]: rotation 9, origin 3, colour 3, extra 4, material, seed
    normals: jax.Array  # [3, P * 8] of the planes
    quadric: jax.Array  # [12, R + 1] centre and the quadratic form of round parts
    num_solids: int


def surfaces(geometry: Geometry) -> Surfaces:
    """Tables of a geometry's parts."""
    solids, rounds = geometry.solids, geometry.rounds
    parts: Parts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), solids, rounds)
    count = parts.valid.shape[0]
    # The same part has the same colour and parameters in every frame, so its texture stays with it.
    numbers = jnp.concatenate([parts.colour, parts.extra], -1)
    weights = jnp.array([3, 5, 7, 11, 13, 17, 19], jnp.uint32) * jnp.uint32(2654435761)
    words = (numbers * 4096.0 + 0.5).astype(jnp.int32).astype(jnp.uint32) * weights
    seed = (hashed(words.sum(-1, dtype=jnp.uint32), jnp.int32(1)) * 2.0**22).astype(jnp.float32)
    material = parts.material[:, None].astype(jnp.float32)
    rows = jnp.concatenate(
        [parts.rotation.reshape(count, 9), parts.origin, parts.colour, parts.extra, material, seed[:, None]], -1
    )
    quadric = jnp.concatenate([rounds.centre, rounds.quadric.reshape(-1, 9)], -1)
    quadric = jnp.concatenate([quadric, jnp.zeros((1, 12))])  # a row to look up where no part is round
    return Surfaces(rows.T, parts.planes[..., :3].reshape(-1, 3).T, quadric.T, solids.valid.shape[0])


def _looked_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """Columns [C, R] of a table [C, P]."""
    return table.at[:, index].get(mode="promise_in_bounds")


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(a: jax.Array) -> jax.Array:
    return a * jax.lax.rsqrt(jnp.maximum(_dot(a, a), 1e-20))


def sky(direction: jax.Array, light: Light, detailed: bool = True) -> jax.Array:
    """Radiance [3, R] of the sky in unit directions [3, R]; below the horizon it is that of the horizon's haze."""
    up = jnp.maximum(direction[2], 0.0)
    towards = jnp.maximum(_dot(direction, light.sun_direction[:, None]), 0.0)
    fade = jnp.square(jnp.square(1.0 - up)) * (1.0 - up)
    clear = light.zenith[:, None] + (light.horizon - light.zenith)[:, None] * fade
    warm = light.sun_colour / jnp.maximum(light.sun_colour.max(), 1e-3)
    aureole = 0.35 * towards**6 + 0.9 * towards**60
    clear = clear + light.glow * aureole * warm[:, None]
    # Clouds on a plane far overhead.
    x, y = direction[0] / (up + 0.12), direction[1] / (up + 0.12)
    width = 0.004 / (up + 0.12)
    seed = light.seed + jnp.uint32(101)
    octaves = 5 if detailed else 2
    body = fractal2(x, y, width, seed, 1.7, octaves, 0.55)
    low = 0.9 - 1.9 * light.clouds
    cover = jnp.clip((body - low) / 0.55, 0.0, 1.0)
    cover = cover * cover * (3.0 - 2.0 * cover)
    mean = 0.5 * (light.zenith + light.horizon).mean()
    thick = jnp.clip((body - low - 0.2) / 1.2, 0.0, 1.0)
    bright = (0.9 * light.sun_colour + 0.9 * mean)[:, None] * (0.75 + 0.6 * aureole)
    dark = (0.15 * light.sun_colour + 0.75 * mean)[:, None]
    cloud = bright + (dark - bright) * thick
    return clear + cover * (1.0 - 0.8 * fade) * (cloud - clear)


def _disc(direction: jax.Array, light: Light) -> jax.Array:
    towards = _dot(direction, light.sun_direction[:, None])
    return 15.0 * jnp.clip((towards - 0.99980) / 0.00008, 0.0, 1.0) * light.sun_colour[:, None]


def _street_mirrored(direction: jax.Array, light: Light) -> jax.Array:
    """What shiny surfaces mirror: the sky above a skyline of dark house fronts, and the road below."""
    ambient = 0.5 * (light.zenith + light.horizon)[:, None] + 0.35 * light.sun_colour[:, None]
    skyline = 0.16 + 0.12 * noise2(direction[0] * 3.0, direction[1] * 3.0, light.seed)
    open_sky = jnp.clip((direction[2] - skyline) / 0.12, 0.0, 1.0)
    below = jnp.clip(-direction[2] / 0.1, 0.0, 1.0)
    fronts = noise2(direction[0] * 7.0 + direction[1] * 5.0, direction[2] * 9.0, light.seed + jnp.uint32(1))
    street = ambient * (0.26 - 0.08 * below) * (1.0 + 0.6 * fronts * (1.0 - below))
    return street + open_sky * (sky(direction, light, detailed=False) - street)


def _when(mask: jax.Array, change, look: Look) -> Look:
    """`change()` where `mask` [R] holds; skipped where it holds nowhere."""

    def changed(look: Look) -> Look:
        return jax.tree.map(lambda new, old: jnp.where(mask, new, old), change(), look)

    return jax.lax.cond(mask.any(), changed, lambda look: look, look)


def _foliage(local: jax.Array, width: jax.Array, seed: jax.Array, colour: jax.Array, bark: jax.Array) -> tuple:
    """Albedo [3, R] of crowns and trunks, and a bend [3, R] of the normal that makes clumps of leaves."""
    x, y, z = local[0], local[1], local[2]
    clump = noise3(x / 0.7, y / 0.7, z / 0.6, seed) * visible(0.7, width)
    leaf = fractal3((x, y, z), width, seed + 1, 0.22, 3, 0.85)
    dark = jnp.clip(0.5 + 0.45 * clump + 0.62 * leaf, 0.0, 1.0)  # deep between the leaves it is dark
    dark = dark * dark * (3.0 - 2.0 * dark)
    hue = 0.16 * clump + 0.12 * leaf
    leaves = colour * (1.0 + hue * jnp.array([1.0, 0.0, -1.0])[:, None]) * (0.14 + 1.35 * dark)
    ridge = noise3(x / 0.05, y / 0.05, z / 0.35, seed + 5) * visible(0.1, width)
    trunk = colour * jnp.maximum(1.0 + 0.35 * ridge + 0.15 * clump, 0.2)
    seeds = seed + jnp.arange(11, 14, dtype=jnp.uint32)[:, None]
    bend = 0.9 * noise3(x / 0.45, y / 0.45, z / 0.45, seeds) * visible(0.5, width)
    return jnp.where(bark, trunk, leaves), jnp.where(bark, 0.0, bend)


def _behind_glass(local: jax.Array, width: jax.Array, seed: jax.Array, colour: jax.Array) -> jax.Array:
    x, y, z = local[0], local[1], local[2]
    shapes = noise3(x / 0.8, y / 0.8, z / 0.5, seed) * visible(0.5, width)
    things = noise3(x / 0.22, y / 0.22, z / 0.17, seed + 1) * visible(0.17, width)
    return colour * (1.0 + 0.9 * jnp.maximum(shapes, -0.6) + 1.6 * jnp.maximum(things * shapes, 0.0)) + 0.012


_SHINY = {
    Material.PAINT: 0.045, Material.GLASS: 0.07, Material.METAL: 0.12, Material.LAMP: 0.05, Material.REAR_LAMP: 0.04,
    Material.RUBBER: 0.01,
}  # fmt: skip


def _mirrors() -> jax.Array:
    table = [0.0] * (max(Material) + 1)
    for material, share in _SHINY.items():
        table[material] = share
    return jnp.array(table)


def shade(
    geometry_rows: Surfaces, ground: pavement.Ground, shadow: Shadow, light: Light, origin: jax.Array,
    direction: jax.Array, step_x: jax.Array, step_y: jax.Array, hits: Hits, jitter: jax.Array,
) -> jax.Array:  # fmt: skip
    """Radiance of a bundle of rays.

    Args:
      geometry_rows: `surfaces` of the geometry that was hit.
      ground: of the scene and anchor.
      shadow: of the same geometry.
      light: of the scene.
      origin: [3] of the rays.
      direction: [3, R]; points are origin + direction / hits.inverse.
      step_x: [3] change of the direction from a pixel to the next in its row.
      step_y: [3] the same in its column.
      hits: arrays [R].
      jitter: [R] random 0..1.

    Returns:
      [3, R] linear RGB.
    """
    tables = geometry_rows
    met = hits.part != NOTHING
    part = jnp.maximum(hits.part, 0)
    row = _looked_up(tables.rows, part)
    depth = 1.0 / jnp.maximum(hits.inverse, 1e-5)
    point = origin[:, None] + direction * depth
    curved = hits.face == FACES
    flat = _looked_up(tables.normals, part * FACES + jnp.minimum(hits.face, FACES - 1))
    q = _looked_up(tables.quadric, jnp.maximum(part - tables.num_solids, 0))
    off = point - q[:3]
    form = q[3:6] * off[0] + q[6:9] * off[1] + q[9:12] * off[2]
    normal = jnp.where(curved, _unit(form), flat)
    length = jnp.sqrt(_dot(direction, direction))
    view = direction / length
    distance = depth * length
    colour, extra, material = row[12:15], row[15:19], row[19].astype(jnp.int32)
    seed = row[20].astype(jnp.uint32)

    def at_parts(v: jax.Array) -> jax.Array:  # world -> frame of the part
        return row[0:3] * v[0] + row[3:6] * v[1] + row[6:9] * v[2]

    local, local_normal = at_parts(point - row[9:12]), at_parts(normal)
    # Steps on the surface between neighbouring pixels: their lengths along the face's axes are the footprint.
    facing = _dot(normal, direction)
    facing = jnp.minimum(facing, -0.02 * length)
    on_x = depth * (step_x[:, None] - direction * (_dot(normal, step_x[:, None]) / facing))
    on_y = depth * (step_y[:, None] - direction * (_dot(normal, step_y[:, None]) / facing))
    level = jnp.sqrt(jnp.square(local_normal[0]) + jnp.square(local_normal[1]))
    sloped = level > 0.1
    scale = 1.0 / jnp.maximum(level, 0.1)
    tx = jnp.where(sloped, -local_normal[1] * scale, 1.0)
    ty = jnp.where(sloped, local_normal[0] * scale, 0.0)
    bx, by, bz = -local_normal[2] * ty, local_normal[2] * tx, local_normal[0] * ty - local_normal[1] * tx
    local_x, local_y = at_parts(on_x), at_parts(on_y)

    def along(v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tx * v[0] + ty * v[1], bx * v[0] + by * v[1] + bz * v[2]

    u, v = along(local)
    (ux, vx), (uy, vy) = along(local_x), along(local_y)
    width_u, width_v = jnp.abs(ux) + jnp.abs(uy) + 1e-4, jnp.abs(vx) + jnp.abs(vy) + 1e-4
    width = 0.5 * jnp.sqrt(width_u * width_v) + 0.25 * (width_u + width_v)
    face = Face(u, v, width_u, width_v, colour, extra, seed + hits.face.astype(jnp.uint32) * jnp.uint32(9973))

    def is_(*kinds: Material) -> jax.Array:
        found = material == kinds[0]
        for kind in kinds[1:]:
            found |= material == kind
        return found & met

    mirror = _mirrors().at[material].get(mode="promise_in_bounds")
    warm = jnp.array([1.0, 0.85, 0.6])[:, None]
    red = jnp.array([1.0, 0.05, 0.03])[:, None]
    # Lamps of one clear colour are traffic lights, which shine by day, too.
    signal = jnp.where(colour.max(0) > 3.0 * colour.min(0), 1.3 * colour, 2.5 * light.lamps * warm)
    rear = 2.5 * light.lamps * red
    shine = jnp.where(is_(Material.LAMP), signal, jnp.where(is_(Material.REAR_LAMP), rear, 0.0))
    look = Look(colour * jnp.ones_like(width), mirror, shine)

    on_ground = is_(Material.ROAD, Material.PAVING, Material.VERGE)
    # Every kind of surface has its own branch: a single one of many kinds compiles to slow code.
    at = jax.lax.cond(
        on_ground.any(), lambda: pavement.spot(ground, point, on_x, on_y),
        lambda: pavement.Spot(*[jnp.zeros_like(width)] * 6),
    )  # fmt: skip
    matt = Look(look.albedo, jnp.zeros_like(mirror), jnp.zeros_like(look.albedo))

    def asphalt() -> Look:
        albedo, wet = pavement.asphalt(ground, at, colour)
        return matt._replace(albedo=albedo, mirror=0.03 * wet)

    def slabs() -> Look:
        return matt._replace(albedo=pavement.paving(ground, at, colour, extra[0], jnp.abs(normal[2]) < 0.5))

    look = _when(is_(Material.ROAD), asphalt, look)
    look = _when(is_(Material.PAVING), slabs, look)
    look = _when(is_(Material.VERGE), lambda: matt._replace(albedo=pavement.verge(ground, at, colour)), look)
    built = (Material.BRICK, Material.PLASTER, Material.ROOF, Material.CONCRETE, Material.WOOD, Material.SHUTTER)
    look = _when(is_(Material.FACADE), lambda: facade(face, light.lamps), look)
    look = _when(is_(*built), lambda: walls(face, material), look)
    look = _when(is_(Material.SIGN), lambda: sign(face, local, local_normal[0]), look)
    # Behind glass: seats, goods and walls of rooms, dimly.
    look = _when(is_(Material.GLASS), lambda: look._replace(albedo=_behind_glass(local, width, seed, colour)), look)
    green = is_(Material.LEAVES, Material.BARK)

    def of_plants(state: tuple) -> tuple:
        albedo, bend = _foliage(local, width, seed, colour, material == Material.BARK)
        return jnp.where(green, albedo, state[0]), jnp.where(green, _unit(normal + bend), state[1])

    albedo, shading_normal = jax.lax.cond(green.any(), of_plants, lambda s: s, (look.albedo, normal))

    # Light: the sun through the shadow map, the sky by openness, and what the ground throws back.
    leafy = jnp.where(is_(Material.LEAVES), 0.35, 0.0)
    towards = _dot(shading_normal, light.sun_direction[:, None])
    direct = jnp.maximum((towards + leafy) / (1.0 + leafy), 0.0)
    soft = light.softness * 6.0
    direct = direct * sunlit(shadow, point, normal, soft, jitter)
    open_ = openness(shadow, point, normal)
    up = 0.5 + 0.5 * shading_normal[2]
    mean_sky = (0.45 * light.zenith + 0.55 * light.horizon)[:, None] + 0.12 * light.sun_colour[:, None] * light.clouds
    lit_ground = 0.20 * (mean_sky + light.sun_colour[:, None] * jnp.maximum(light.sun_direction[2], 0.0) * 0.7)
    ambient = lit_ground * (1.0 - up) + mean_sky * up
    ambient = ambient * (1.0 + 0.25 * _dot(shading_normal, light.sun_direction[:, None]) * light.glow)
    pools = 0.10 * light.lamps * warm
    radiance = albedo * (light.sun_colour[:, None] * direct + (ambient + pools) * open_) + look.shine

    shiny = jnp.where(met, look.mirror, 0.0)

    def mirrored(radiance: jax.Array) -> jax.Array:
        rough = jnp.where(is_(Material.FACADE), 0.02, 0.0)
        window = hashed(seed, jnp.floor(u / jnp.maximum(extra[0], 0.8)), jnp.floor(v / jnp.maximum(extra[1], 2.2)))
        tilt = rough * (window - 0.5) * visible(2.0, width)
        n = _unit(normal + tilt * jnp.array([1.0, -1.0, 1.0])[:, None])
        towards_eye = jnp.clip(-_dot(n, view), 0.0, 1.0)
        back = view + 2.0 * towards_eye * n
        grazing = jnp.square(jnp.square(1.0 - towards_eye)) * (1.0 - towards_eye)
        strength = shiny + (0.85 - shiny) * grazing * jnp.minimum(shiny / 0.03, 1.0)
        strength = jnp.where(shiny > 0.001, strength, 0.0) * (0.4 + 0.6 * open_)
        image = _street_mirrored(back, light)
        glint = jnp.maximum(_dot(back, light.sun_direction[:, None]), 0.0) ** 120 * jnp.minimum(direct * 4.0, 1.0)
        image = image + 6.0 * glint * light.sun_colour[:, None]
        return radiance * (1.0 - strength) + strength * image

    radiance = jax.lax.cond((shiny > 0.001).any(), mirrored, lambda r: r, radiance)
    # Haze takes the sky's colour at the horizon in the direction of view.
    far = jnp.exp(-light.extinction * distance)
    glow = jnp.maximum(_dot(view, light.sun_direction[:, None]), 0.0) ** 6 * 0.35 * light.glow
    haze = light.horizon[:, None] + glow * light.sun_colour[:, None]
    radiance = haze + far * (radiance - haze)
    return jax.lax.cond(
        (~met).any(),
        lambda r: jnp.where(met, r, sky(view, light) + _disc(view, light)),
        lambda r: r, radiance,
    )  # fmt: skip

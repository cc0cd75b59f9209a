"""People on foot as batched parts: walking, standing, tall and small, with bags, coats and hats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world.primitives import Geometry, Parts, ellipsoid, flatten, frustum, painted, place
from data_prep.world.surfaces import Material, Semantic
from data_prep.world.vehicles import choose

DRAWS = 12  # uniform numbers that make up one person

_SKINS = ((0.5, (0.50, 0.30, 0.21)), (0.2, (0.36, 0.20, 0.12)), (0.2, (0.16, 0.08, 0.05)), (0.1, (0.07, 0.035, 0.02)))
_HAIRS = ((0.4, (0.015, 0.012, 0.01)), (0.3, (0.07, 0.04, 0.02)), (0.15, (0.25, 0.16, 0.07)), (0.15, (0.3, 0.3, 0.3)))
_TOPS = (
    (0.24, (0.02, 0.02, 0.024)), (0.12, (0.03, 0.045, 0.09)), (0.13, (0.2, 0.2, 0.21)), (0.12, (0.62, 0.61, 0.58)),
    (0.08, (0.4, 0.03, 0.03)), (0.06, (0.05, 0.16, 0.4)), (0.06, (0.06, 0.1, 0.04)), (0.06, (0.28, 0.18, 0.09)),
    (0.04, (0.6, 0.42, 0.03)), (0.05, (0.32, 0.1, 0.2)), (0.04, (0.62, 0.2, 0.02)),
)  # fmt: skip
_BOTTOMS = ((0.4, (0.025, 0.04, 0.09)), (0.3, (0.016, 0.016, 0.018)), (0.15, (0.22, 0.17, 0.11)),
            (0.15, (0.14, 0.14, 0.14)))  # fmt: skip


class People(NamedTuple):
    """N people without a place."""

    height: jax.Array  # [N] metres
    stout: jax.Array  # [N] width relative to the usual
    child: jax.Array  # [N] bool
    skirt: jax.Array  # [N] bool: a coat or skirt to the knees
    bag: jax.Array  # [N] 0 nothing, 1 backpack, 2 bag in the hand
    hat: jax.Array  # [N] bool
    colours: jax.Array  # [N, 5, 3] skin, hair, top, bottom, bag; linear light


def sample(u: jax.Array) -> People:
    """People from uniform numbers [N, DRAWS]: adults of 1.5-1.95 m (about 1.71 +- 0.08), children of 1.0-1.5 m."""
    child = u[:, 0] < 0.12
    bell = (u[:, 1] + u[:, 2] + u[:, 3]) / 3
    height = jnp.where(child, 1.0 + 0.5 * u[:, 1], 1.5 + 0.45 * (0.08 + 0.84 * bell))
    skin, hair = choose(_SKINS, u[:, 4]), choose(_HAIRS, u[:, 5])
    top, bottom = choose(_TOPS, u[:, 6]), choose(_BOTTOMS, u[:, 7])
    bag = choose(_TOPS, u[:, 8])
    skirt = (u[:, 9] < 0.22) & ~child
    bottom = jnp.where((skirt & (u[:, 7] > 0.4))[:, None], top, bottom)
    held = jnp.where(u[:, 10] < 0.2, 1, jnp.where(u[:, 10] < 0.38, 2, 0))
    return People(
        height,
        0.88 + 0.3 * u[:, 11] ** 1.5,
        child,
        skirt,
        held,
        u[:, 9] > 0.8,
        jnp.stack([skin, hair, top, bottom, bag], 1),
    )


def _segment(start: jax.Array, angle: jax.Array, length: jax.Array, thick: jax.Array) -> tuple[jax.Array, ...]:
    """Limb from `start` [N, 2, 3] hanging down, swung forward by `angle` [N, 2]: centre, radii; and its other end."""
    down = jnp.stack([jnp.sin(angle), 0.0 * angle, -jnp.cos(angle)], -1)
    end = start + length[..., None] * down
    long = 0.5 * length + 0.6 * thick
    return (start + end) / 2, jnp.stack([thick, thick, long], -1), end


class _Posed(NamedTuple):
    """Parts [N, K] in frames of their own, and these frames in that of the person, who looks along x."""

    parts: Parts
    rotation: jax.Array  # [N, K, 3, 3]
    origin: jax.Array  # [N, K, 3]


def _posed(parts: Parts, origin: jax.Array, rotation: jax.Array | None = None) -> _Posed:
    rotation = jnp.eye(3) if rotation is None else rotation
    shape = parts.valid.shape
    return _Posed(parts, jnp.broadcast_to(rotation, (*shape, 3, 3)), jnp.broadcast_to(origin, (*shape, 3)))


def _figures(people: People, phase: jax.Array, stride: jax.Array) -> tuple[_Posed, _Posed]:
    """Round parts [N, 12] and solid parts [N, 3] of people seen from near."""
    h, wide = people.height[:, None], (people.height * people.stout)[:, None]
    skin, hair, top, bottom, bag = (people.colours[:, k] for k in range(5))
    size = jnp.where(people.child[:, None], 0.085, 0.066) * h  # half the head's height
    side, both = jnp.array([1.0, -1.0]), jnp.zeros((h.shape[0], 2))  # left and right
    turned = phase[:, None] + jnp.array([0.0, np.pi])
    amount, swing = stride[:, None], jnp.sin(turned)

    def at(x: jax.Array | float, y: jax.Array | float, z: jax.Array | float) -> jax.Array:
        return jnp.stack([x + both, y + both, z + both], -1)

    # The legs hang from hips at height 0; the lower foot then says how high the hips are.
    lifted = jnp.maximum(jnp.cos(turned), 0.0)  # this leg swings forward
    lean = amount * (0.44 * swing + 0.1 * lifted)
    bend = lean - amount * (0.12 + 0.85 * lifted)
    thigh, thigh_radii, knee = _segment(at(0.0, side * 0.052 * wide, 0.0), lean, 0.245 * h + both, 0.047 * wide + both)
    shin, shin_radii, ankle = _segment(knee, bend, 0.235 * h + both, 0.032 * wide + both)
    foot = ankle + at(0.028 * h, 0.0, -0.012 * h)
    up = jnp.max(0.024 * h - foot[..., 2], 1)
    up = jnp.stack([0.0 * up, 0.0 * up, up], -1)[:, None]
    shoulder = 0.29 * h
    wave = 0.06 - 0.5 * amount * swing
    arm, arm_radii, _ = _segment(
        at(0.0, side * 0.122 * wide, shoulder - 0.02 * h), wave, 0.345 * h + both, 0.03 * wide + both
    )
    face = shoulder + 0.055 * h + size
    hat = jnp.where(people.hat[:, None], 0.35, 0.2) * size
    number = jnp.array([0.0, 1.0])  # head and hair, then chest and waist
    head = at(h * (0.02 - 0.015 * number), 0.0, face + hat * number)
    head_radii = at(size * (0.88 + 0.07 * number), size * (0.76 + 0.1 * number), size * (1.12 - 0.14 * number))
    trunk = at(-0.005 * h * number, 0.0, h * (0.19 - 0.17 * number))
    trunk_radii = at(0.073 * wide, wide * (0.118 - 0.018 * number), h * (0.165 - 0.06 * number))
    centre = jnp.concatenate([head, trunk, thigh, shin, foot, arm], 1)
    radii = jnp.concatenate(
        [head_radii, trunk_radii, thigh_radii, shin_radii, at(0.072 * h, 0.028 * h, 0.024 * h), arm_radii], 1
    )
    angle = jnp.concatenate([both, both, lean, bend, both, wave], 1)
    stocking = jnp.where(people.skirt[:, None], skin * 0.5, bottom)
    shoe = jnp.broadcast_to(jnp.array([0.02, 0.018, 0.016]), skin.shape)
    crown = jnp.where(people.hat[:, None], bag, hair)
    colours = jnp.stack([skin, crown, top, bottom, bottom, bottom, stocking, stocking, shoe, shoe, top, top], 1)
    sine, cosine, none = jnp.sin(angle), jnp.cos(angle), jnp.zeros_like(angle)
    swung = jnp.stack([cosine, none, -sine, none, none + 1, none, sine, none, cosine], -1).reshape(*angle.shape, 3, 3)
    material = np.full(12, Material.CLOTH)
    material[[0, 8, 9]] = Material.SKIN, Material.RUBBER, Material.RUBBER
    rounds = painted(ellipsoid(jnp.zeros(3), radii), jnp.asarray(material), Semantic.PEDESTRIAN, colours)
    # Backpack, bag in the hand, coat or skirt: corners in units of the height along x and z, of the width along y.
    low = jnp.array([[-0.15, -0.085, 0.07], [-0.07, 0.135, -0.14], [-0.11, -0.125, -0.23]])
    high = jnp.array([[-0.045, 0.085, 0.28], [0.08, 0.195, 0.02], [0.11, 0.125, 0.06]])
    shrink = jnp.array([[0.005, 0.005], [0.005, 0.005], [0.04, 0.04]])
    unit = jnp.stack([h, wide, h], -1)
    worn = jnp.stack([people.bag == 1, people.bag == 2, people.skirt], 1)
    solids = painted(
        frustum(low * unit, high * unit, shrink * wide[..., None], shrink * wide[..., None]),
        Material.CLOTH, Semantic.PEDESTRIAN, jnp.stack([bag, bag, bottom], 1), valid=worn,
    )  # fmt: skip
    return _posed(rounds, centre + up, swung), _posed(solids, up)


def _distant(people: People, phase: jax.Array, stride: jax.Array) -> tuple[_Posed, _Posed]:
    """The same far away: round parts [N, 2] (head, upper body), solid parts [N, 2] (legs)."""
    h, wide = people.height, people.height * people.stout
    zero = jnp.zeros_like(h)
    size = jnp.where(people.child, 0.085, 0.066) * h
    body = jnp.stack([0.09 * wide, 0.145 * wide, 0.22 * h], -1)
    radii = jnp.stack([size[:, None] * jnp.array([0.9, 0.85, 1.15]), body], 1)
    middle = jnp.stack([jnp.stack([zero, zero, h - 1.15 * size], -1), jnp.stack([zero, zero, 0.65 * h], -1)], 1)
    face = (people.colours[:, 0] + people.colours[:, 1]) / 2
    rounds = painted(
        ellipsoid(jnp.zeros(3), radii), jnp.array([Material.SKIN, Material.CLOTH]), Semantic.PEDESTRIAN,
        jnp.stack([face, people.colours[:, 2]], 1),
    )  # fmt: skip
    side = jnp.array([1.0, -1.0])
    ahead = side * (stride * 0.17 * h * jnp.sin(phase))[:, None]
    aside, thin, tall = side * 0.05 * wide[:, None], 0.04 * wide[:, None], h[:, None] + 0.0 * side
    low = jnp.stack([ahead - 0.035 * tall, aside - thin, 0.0 * tall], -1)
    high = jnp.stack([ahead + 0.05 * tall, aside + thin, 0.5 * tall], -1)
    shift = jnp.stack([-ahead, 0.0 * tall], -1)
    legs = frustum(low, high, shift, -shift)
    legs = painted(legs, Material.CLOTH, Semantic.PEDESTRIAN, people.colours[:, 3][:, None])
    return _posed(rounds, middle), _posed(legs, jnp.zeros(3))


def build(
    people: People, phase: jax.Array, stride: jax.Array, rotation: jax.Array, origin: jax.Array, valid: jax.Array,
    detailed: int,
) -> Geometry:  # fmt: skip
    """Geometry of placed people.

    Args:
      people: N of them.
      phase: [N] radians of the gait; one cycle is two steps.
      stride: [N] 1 = walking, 0 = standing.
      rotation, origin: [N, 3, 3], [N, 3]; the origin is on the ground between the feet.
      valid: [N] bool.
      detailed: how many of the first ones get 12 round parts; the others get 2 round and 2 solid ones.
    """

    near, far = (jax.tree.map(lambda leaf, p=p: leaf[p], people) for p in (slice(detailed), slice(detailed, None)))
    figures = _figures(near, phase[:detailed], stride[:detailed])
    distant = _distant(far, phase[detailed:], stride[detailed:])

    def placed(close: _Posed, away: _Posed) -> Parts:
        counts = [posed.parts.valid.shape[1] for posed in (close, away)]
        of = np.concatenate(
            [np.repeat(np.arange(detailed), counts[0]), np.repeat(np.arange(detailed, valid.shape[0]), counts[1])]
        )
        frames = [(p.rotation.reshape(-1, 3, 3), p.origin.reshape(-1, 3)) for p in (close, away)]
        turned, shifted = (jnp.concatenate(leaves) for leaves in zip(*frames, strict=True))
        whole = rotation[of]
        shifted = jnp.einsum("pij,pj->pi", whole, shifted) + origin[of]
        parts = place(flatten(close.parts, away.parts), whole @ turned, shifted)
        return parts._replace(valid=parts.valid & valid[of])

    return Geometry(placed(figures[1], distant[1]), placed(figures[0], distant[0]))

"""What stands on and beside the sidewalk: lamps, signs, traffic lights, small furniture, shelters, fences, bridges.

Every object is described in the frame of its place: x along the road in the direction that its side drives, y towards
the road's left hand as seen so (the road lies at +y), z up from the ground; origin on the ground.
"""

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.world.assembly import BELOW, BOX, DISC, Draws, Rounds, Solids
from data_prep.world.surfaces import Material, Semantic

_METALS = ((0.25, 0.26, 0.27), (0.08, 0.09, 0.09), (0.04, 0.10, 0.07), (0.42, 0.43, 0.44))
_SIGN_COLOURS = (
    (0.55, 0.02, 0.03), (0.02, 0.10, 0.45), (0.7, 0.7, 0.68), (0.65, 0.40, 0.02), (0.02, 0.25, 0.10),
)  # fmt: skip


def lamp(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A street lamp of 5 to 9 m: arm and head [3] solids, pole and globe [3] rounds. All lamps of a scene share the
    key, so that a street has one kind."""
    draws, solids, rounds = Draws(values), Solids(), Rounds()
    old = draws.chance(0.25)  # a lantern on a short post
    tall = jnp.where(old, draws(3.8, 4.8), draws(5.5, 9.0))
    arm = draws(0.6, 2.2)
    colour = draws.pick(_METALS)
    pole, shine = Semantic.POLE, (0.75, 0.72, 0.62)
    rounds.pole((0.0, 0.0, -BELOW), 0.045 + 0.006 * tall, tall, Material.METAL, pole, colour)
    rounds.pole((0.0, 0.0, -BELOW), 0.09 + 0.006 * tall, 0.9, Material.METAL, pole, colour)
    rounds.add((0.0, 0.0, tall + 0.22), (0.22, 0.22, 0.27), Material.LAMP, pole, shine, valid=old)
    modern = ~old
    solids.add((-0.04, -0.05, tall - 0.1), (0.04, arm, tall), Material.METAL, pole, colour, valid=modern)
    solids.add(
        (-0.13, arm - 0.15, tall - 0.09), (0.13, arm + 0.55, tall + 0.06), Material.METAL, pole, colour, valid=modern
    )
    solids.add((-0.1, arm - 0.1, tall - 0.13), (0.1, arm + 0.45, tall - 0.08), Material.LAMP, pole, shine, valid=modern)
    return solids.rows(), rounds.rows()


def sign(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A traffic sign 2 to 2.6 m above the ground that faces the traffic coming from -x: [2] solids (a board of 3 to 6
    corners or a rectangle, a small board below), [2] rounds (post, disc)."""
    draws, solids, rounds = Draws(values), Solids(), Rounds()
    low, radius, kind = draws(2.0, 2.4), draws(0.28, 0.4), draws()
    disc, rectangle = kind < 0.35, kind > 0.72
    colour = draws.pick(_SIGN_COLOURS, (3, 3, 2, 2, 1))
    half_y = jnp.where(rectangle, draws(0.25, 0.5), radius)
    half_z = jnp.where(rectangle, draws(0.25, 0.45), radius)
    corners = jnp.where(rectangle, BOX, jnp.where(kind < 0.5, 3, jnp.where(kind < 0.6, 4, 6)))
    middle = low + half_z
    look = (half_y, half_z, draws(), 0.0)
    post, board = Semantic.POLE, Semantic.SIGN
    rounds.pole((0.0, 0.0, -BELOW), 0.03, middle + half_z + 0.05, Material.METAL, post, (0.4, 0.41, 0.42))
    rounds.add(
        (-0.05, 0.0, middle), (0.012, radius, radius), Material.SIGN, board, colour, extra=look, valid=disc,
        outline=DISC,
    )  # fmt: skip
    solids.add(
        (-0.062, -half_y, low), (-0.038, half_y, low + 2 * half_z), Material.SIGN, board, colour, extra=look,
        valid=~disc, outline=corners,
    )  # fmt: skip
    solids.add(
        (-0.062, -0.28, low - 0.28), (-0.038, 0.28, low - 0.04), Material.SIGN, board, colour,
        extra=(0.28, 0.12, draws(), 0.0), valid=draws.chance(0.3),
    )  # fmt: skip
    return solids.rows(), rounds.rows()


def traffic_light(values: jax.Array, over_road: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A traffic light for the traffic coming from -x: [7] solids, [1] round. `over_road`: length of the arm above the
    lanes, metres, 0 for none."""
    draws, solids, rounds = Draws(values), Solids(), Rounds()
    red = draws.chance(0.5)
    shine = jnp.where(red, jnp.array([0.9, 0.04, 0.03]), jnp.array([0.05, 0.8, 0.35]))
    dark, pole = (0.025, 0.027, 0.027), Semantic.POLE
    arm = over_road > 0.5
    rounds.pole((0.0, 0.0, -BELOW), 0.08, jnp.where(over_road > 0.5, 6.0, 3.3), Material.METAL, pole, (0.2, 0.21, 0.21))
    solids.add((-0.06, 0.0, 5.85), (0.06, over_road, 5.97), Material.METAL, pole, (0.2, 0.21, 0.21), valid=arm)
    for y, z, valid in ((0.0, 2.35, True), (over_road - 0.3, 5.2, arm)):
        solids.add((-0.32, y - 0.17, z), (-0.09, y + 0.17, z + 0.95), Material.PLAIN, Semantic.SIGN, dark, valid=valid)
        solids.add(
            (-0.1, y - 0.26, z - 0.08), (-0.07, y + 0.26, z + 1.03), Material.PLAIN, Semantic.SIGN, dark, valid=valid
        )
        at = z + jnp.where(red, 0.66, 0.08)
        solids.add((-0.34, y - 0.1, at), (-0.3, y + 0.1, at + 0.2), Material.LAMP, Semantic.SIGN, shine, valid=valid)
    return solids.rows(), rounds.rows()


_IRON, _STEEL, _DARK, _GREEN, _RED = (0.1,) * 3, (0.3, 0.31, 0.32), (0.05,) * 3, (0.05, 0.12, 0.07), (0.5, 0.04, 0.03)
_BROWN, _STONE, _YELLOW = (0.22, 0.11, 0.05), (0.4, 0.38, 0.35), (0.6, 0.4, 0.02)
_M = Material
# Small things: boxes (low, high, material, colour) and poles (x, y, radius, low, high, material, colour)
_SMALL: tuple[tuple[list, list], ...] = (
    ([], [(0, 0, 0.22, -1, 0.85, _M.METAL, _GREEN), (0, 0, 0.24, 0.85, 0.95, _M.METAL, _DARK)]),  # bin
    ([], [(0, 0, 0.12, -1, 0.7, _M.METAL, _RED), (0, 0, 0.16, 0.55, 0.66, _M.METAL, _RED)]),  # hydrant
    ([], [(-0.75, 0, 0.06, -1, 0.95, _M.METAL, _DARK), (0.75, 0, 0.06, -1, 0.95, _M.METAL, _DARK)]),  # bollards
    (  # utility box
        [
            ((-0.55, -0.2, -1), (0.55, 0.2, 1.25), _M.METAL, (0.32, 0.34, 0.31)),
            ((-0.6, -0.24, 1.25), (0.6, 0.24, 1.31), _M.METAL, _STEEL),
        ],
        [],
    ),
    (  # bench
        [
            ((-0.9, -0.3, 0.4), (0.9, 0.15, 0.46), _M.WOOD, _BROWN),
            ((-0.9, -0.32, 0.5), (0.9, -0.27, 0.9), _M.WOOD, _BROWN),
            ((-0.7, -0.31, -1), (-0.6, 0.1, 0.4), _M.METAL, _IRON),
            ((0.6, -0.31, -1), (0.7, 0.1, 0.4), _M.METAL, _IRON),
        ],
        [],
    ),
    (  # planter
        [
            ((-0.7, -0.45, -1), (0.7, 0.45, 0.6), _M.CONCRETE, _STONE),
            ((-0.62, -0.37, 0.5), (0.62, 0.37, 0.95), _M.LEAVES, (0.06, 0.11, 0.03)),
        ],
        [],
    ),
    (  # letter box
        [
            ((-0.25, -0.2, 0.35), (0.25, 0.2, 1.35), _M.PAINT, _YELLOW),
            ((-0.07, -0.07, -1), (0.07, 0.07, 0.36), _M.METAL, _STEEL),
        ],
        [],
    ),
    ([], [(0, 0, 0.6, -1, 2.7, _M.PLAIN, (0.5, 0.35, 0.25)), (0, 0, 0.7, 2.7, 3.0, _M.METAL, _GREEN)]),  # adverts
    (  # parking meter
        [
            ((-0.12, -0.1, 1.0), (0.12, 0.1, 1.45), _M.METAL, _STEEL),
            ((-0.035, -0.035, -1), (0.035, 0.035, 1.01), _M.METAL, _STEEL),
        ],
        [],
    ),
    (  # barrier
        [
            ((-1.0, -0.03, 0.75), (1.0, 0.03, 1.0), _M.PAINT, _RED),
            ((-0.9, -0.25, -0.3), (-0.82, 0.25, 0.98), _M.METAL, _STONE),
            ((0.82, -0.25, -0.3), (0.9, 0.25, 0.98), _M.METAL, _STONE),
            ((-1.0, -0.025, 0.35), (1.0, 0.025, 0.5), _M.PLAIN, (0.6,) * 3),
        ],
        [],
    ),
    (  # refuse container
        [
            ((-0.32, -0.36, -1), (0.32, 0.36, 1.05), _M.PLAIN, (0.02, 0.05, 0.03)),
            ((-0.33, -0.4, 1.05), (0.33, 0.42, 1.12), _M.PLAIN, (0.35, 0.25, 0.02)),
        ],
        [],
    ),
    (  # bicycle stand
        [
            ((-0.02, -0.4, -1), (0.02, 0.4, 0.75), _M.METAL, _STEEL),
            ((0.78, -0.4, -1), (0.82, 0.4, 0.75), _M.METAL, _STEEL),
        ],
        [],
    ),
)
_SMALL_WEIGHTS = (4, 1.5, 4, 2, 3, 2, 1.5, 0.7, 3, 1, 2.5, 1)
_SMALL_SOLIDS, _SMALL_ROUNDS = 4, 2


def _small_tables() -> tuple[np.ndarray, np.ndarray]:
    """[kinds, 4, 10] (low, high, material, colour) and [kinds, 2, 9]; zero rows where a kind has fewer parts."""
    solids = np.zeros((len(_SMALL), _SMALL_SOLIDS, 10), np.float32)
    rounds = np.zeros((len(_SMALL), _SMALL_ROUNDS, 9), np.float32)
    for kind, (boxes, poles) in enumerate(_SMALL):
        for i, (low, high, material, colour) in enumerate(boxes):
            solids[kind, i] = [*low, *high, material, *colour]
        for i, (x, y, radius, low, high, material, colour) in enumerate(poles):
            rounds[kind, i] = [x, y, radius, low, high, material, *colour]
    return solids, rounds


_TABLES = _small_tables()


def small_thing(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A bin, hydrant, pair of bollards, utility box, bench, planter, letter box, advertising column, parking meter,
    barrier, refuse container or bicycle stand: [4] solids, [2] rounds."""
    draws, solids, rounds = Draws(values), Solids(), Rounds()
    share = np.cumsum(np.array(_SMALL_WEIGHTS) / sum(_SMALL_WEIGHTS))[:-1]
    kind = jnp.sum(draws() >= jnp.asarray(share, jnp.float32))
    size, tone = draws(0.9, 1.12), draws(0.7, 1.3)
    boxes, poles = jnp.asarray(_TABLES[0])[kind], jnp.asarray(_TABLES[1])[kind]
    low, high = boxes[:, :3] * size, boxes[:, 3:6] * size
    for i in range(_SMALL_SOLIDS):
        solids.add(
            jnp.unstack(low[i]),
            jnp.unstack(high[i]),
            boxes[i, 6],
            Semantic.WALL,
            boxes[i, 7:] * tone,
            extra=(0.3, 0.0, 0.0, 0.0),
        )
    for i in range(_SMALL_ROUNDS):
        x, y, radius, foot, top = (poles[i, k] * size for k in range(5))
        rounds.pole((x, y, foot), radius, top, poles[i, 5], Semantic.POLE, poles[i, 6:] * tone, valid=(radius > 0))
    return solids.rows(), rounds.rows()


def shelter(values: jax.Array) -> jax.Array:
    """A bus shelter about 3.5 m long that opens to the road: [6] solids."""
    draws, solids = Draws(values), Solids()
    half, frame = draws(1.4, 2.2), (0.09, 0.1, 0.11)
    solids.add((-half - 0.1, -0.75, 2.35), (half + 0.1, 0.75, 2.5), Material.METAL, Semantic.WALL, frame)
    solids.add((-half, -0.65, 0.15), (half, -0.62, 2.2), Material.GLASS, Semantic.WALL, (0.05, 0.07, 0.07))
    solids.add(
        (-half, -0.6, -BELOW), (-half + 0.06, 0.6, 2.4), Material.PLAIN, Semantic.WALL, draws.pick(_SIGN_COLOURS)
    )
    solids.add((half - 0.06, -0.6, -BELOW), (half, -0.5, 2.4), Material.METAL, Semantic.POLE, frame)
    solids.add((-0.7 * half, -0.5, 0.42), (0.6 * half, -0.15, 0.48), Material.WOOD, Semantic.WALL, (0.2, 0.1, 0.05))
    solids.add((-0.04, -0.7, -BELOW), (0.04, -0.6, 2.4), Material.METAL, Semantic.POLE, frame)
    return solids.rows()


def utility_pole(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A wooden pole with cross arms: [3] solids, [1] round."""
    draws, solids, rounds = Draws(values), Solids(), Rounds()
    tall, brown = draws(7.5, 10.0), (0.14, 0.1, 0.07)
    rounds.pole((0.0, 0.0, -BELOW), draws(0.11, 0.16), tall, Material.WOOD, Semantic.POLE, brown, extra=(2.0, 0, 0, 0))
    for drop in (0.4, 1.1):
        z = tall - drop
        solids.add(
            (-0.06, -1.0, z), (0.06, 1.0, z + 0.11), Material.WOOD, Semantic.POLE, brown, extra=(1.0, 0, 0, 0),
            valid=draws.chance(0.7),
        )  # fmt: skip
    solids.add(
        (-0.25, 0.1, tall - 2.6),
        (0.25, 0.6, tall - 1.7),
        Material.METAL,
        Semantic.POLE,
        (0.3, 0.31, 0.31),
        valid=draws.chance(0.3),
    )
    return solids.rows(), rounds.rows()


def billboard(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An advertising board of about 4 x 2.7 m on two posts, across the road's direction: [1] solid, [2] rounds."""
    draws, solids, rounds = Draws(values), Solids(), Rounds()
    half, low, tall = draws(1.4, 2.6), draws(1.2, 3.0), draws(2.2, 3.0)
    for y in (-0.7 * half, 0.7 * half):
        rounds.pole((0.0, y, -BELOW), 0.1, low + 0.9 * tall, Material.METAL, Semantic.POLE, (0.2, 0.2, 0.2))
    solids.add((-0.25, -half, low), (-0.12, half, low + tall), Material.PLAIN, Semantic.SIGN, draws.pick(_SIGN_COLOURS))
    return solids.rows(), rounds.rows()

"""The shapes of road vehicles: tables of convex parts in the vehicle's own frame, made once with NumPy.

Frame: x forward, y left, z up, metres; the origin is on the ground below the middle of the wheelbase. A model has a
detailed form (`SOLIDS` solid and `ROUNDS` round parts) and a coarse one for the distance (`COARSE` solid parts). Wheel
arches, pillars, lamps and mirrors reach through the whole width: one part serves both sides, and what covers its middle
(grille, tailgate, glass) stands a few centimetres further out. No two faces of different parts coincide.
"""

from typing import NamedTuple

import numpy as np

from data_prep.world.surfaces import Material, Semantic

SOLIDS, ROUNDS, COARSE = 20, 8, 8
FIXED, BODY, SECOND, CLOTH, TROUSERS = range(5)  # where a part's colour comes from; FIXED: from the table

BLACK, DARK, TYRE = (0.012, 0.012, 0.013), (0.03, 0.03, 0.032), (0.018, 0.018, 0.018)
PANE, ALLOY, PLATE = (0.02, 0.024, 0.028), (0.42, 0.42, 0.43), (0.52, 0.52, 0.46)
HEADLIGHT, RED = (0.40, 0.42, 0.44), (0.33, 0.012, 0.012)
HEADLIGHT_LOOK = (Material.LAMP, HEADLIGHT)
RED_LOOK = (Material.REAR_LAMP, RED)


class Piece(NamedTuple):
    """One part of a model before it goes into the tables."""

    planes: np.ndarray  # [8, 4] outward normals and offsets: n . x <= d
    centre: np.ndarray  # [3]
    quadric: np.ndarray  # [3, 3]; zero for solid parts
    material: int
    colour: tuple[float, float, float]
    slot: int  # FIXED or the palette entry that replaces `colour`
    extra: tuple[float, float, float, float]


class Model(NamedTuple):
    """A vehicle: its parts and the numbers that placing it needs."""

    name: str
    solids: list[Piece]
    rounds: list[Piece]
    coarse: list[Piece]
    wheelbase: float
    length: float
    width: float
    semantic: int


def block(
    x: tuple[float, float], y: float, z: tuple[float, float], material: int, colour: tuple = (0.5, 0.5, 0.5),
    slot: int = FIXED, *, drop: float = 0.0, rear: float = 0.0, front: float = 0.0, lean: float = 0.0,
    side: float = 0.0, nose: tuple[float, float] | None = None, tail: tuple[float, float] | None = None,
    crest: tuple[float, float, float, float] | None = None, edges: tuple[float, float] | None = None,
    extra: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
) -> Piece:  # fmt: skip
    """Solid part between x[0]..x[1] and z[0]..z[1], |y - side| <= y at its bottom.

    `rear`, `front`, `lean`: inward shift of the rear, front and side faces per metre of height; `drop`: how much lower
    the top is at the front. One pair of edges may be cut: `nose`/`tail` the upright front/rear ones (metres along x,
    along y), `crest` the top front and top rear ones (along x, along z, each), `edges` the top side ones (along y, z).
    """
    (x0, x1), (z0, z1) = x, z
    planes = [
        (0.0, 0.0, -1.0, -z0),
        (drop, 0.0, x1 - x0, drop * x0 + (x1 - x0) * z1),
        (-1.0, 0.0, rear, rear * z0 - x0),
        (1.0, 0.0, front, front * z0 + x1),
        (0.0, 1.0, lean, lean * z0 + y + side),
        (0.0, -1.0, lean, lean * z0 + y - side),
    ]
    if nose is not None or tail is not None:
        (u, v), sign = (nose, 1.0) if nose is not None else (tail, -1.0)  # type: ignore[misc]
        rake, end = (front, x1) if nose is not None else (rear, -x0)
        upward = v * rake + u * lean
        planes += [(sign * v, s * u, upward, v * end + u * (y - v) + s * u * side + upward * z0) for s in (1.0, -1.0)]
    elif crest is not None:
        u, v, u2, v2 = crest
        planes.append(_through((x1 - front * (z1 - z0) - u, z1), (x1 - front * (z1 - v - z0), z1 - v)))
        planes.append(_through((x0 + rear * (z1 - v2 - z0), z1 - v2), (x0 + rear * (z1 - z0) + u2, z1)))
    elif edges is not None:
        u, v = edges
        across, _, up, offset = _through((y - lean * (z1 - z0) - u, z1), (y - lean * (z1 - v - z0), z1 - v))
        planes += [(0.0, s * across, up, offset + s * across * side) for s in (1.0, -1.0)]
    planes += [(0.0, 0.0, 0.0, 1.0)] * (8 - len(planes))
    array = np.array(planes)
    length = np.linalg.norm(array[:, :3], axis=1, keepdims=True)
    array = np.where(length > 0, array / np.maximum(length, 1e-9), array)
    return Piece(array, np.zeros(3), np.zeros((3, 3)), int(material), colour, slot, extra)


def _through(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float, float, float]:
    """Plane along y through two points (x, z) of a clockwise profile."""
    normal_x, normal_z = -(b[1] - a[1]), b[0] - a[0]
    return normal_x, 0.0, normal_z, normal_x * a[0] + normal_z * a[1]


def _round(centre, axes, radii, capped: bool, material, colour, slot) -> Piece:  # type: ignore[no-untyped-def]
    centre, axes, radii = np.asarray(centre, float), np.asarray(axes, float), np.asarray(radii, float)
    normals = np.stack([axes[0], -axes[0], axes[1], -axes[1], axes[2], -axes[2]])
    planes = np.concatenate([normals, (normals @ centre + np.repeat(radii, 2))[:, None]], 1)
    planes = np.concatenate([planes, np.tile([0.0, 0.0, 0.0, 1.0], (2, 1))])
    inverse = 1.0 / np.square(radii)
    if capped:
        inverse[0] = 0.0
    return Piece(planes, centre, axes.T @ np.diag(inverse) @ axes, int(material), colour, slot, (0.0, 0.0, 0.0, 0.0))


def wheel(x: float, y: float, radius: float, half_width: float, material: int = Material.RUBBER, colour=TYRE) -> Piece:  # type: ignore[no-untyped-def]
    """Cylinder along y that stands on the ground if `radius` is the tyre's; a hub has `radius` (tyre, own)."""
    return _round((x, y, radius), np.roll(np.eye(3), -1, 0), (half_width, radius, radius), True, material, colour, 0)


def hub(x: float, y: float, radius: float, half_width: float, share: float = 0.62) -> Piece:
    """The metal disc of a wheel whose tyre has `radius`."""
    axes = np.roll(np.eye(3), -1, 0)
    return _round((x, y, radius), axes, (half_width, radius * share, radius * share), True, Material.METAL, ALLOY, 0)


def limb(a: tuple, b: tuple, thick: float, material: int, colour: tuple = (0.5, 0.5, 0.5), slot: int = FIXED) -> Piece:
    """Ellipsoid from point a to point b."""
    start, stop = np.asarray(a, float), np.asarray(b, float)
    along = stop - start
    length = float(np.linalg.norm(along))
    along = along / length
    across = np.cross(along, (0.0, 1.0, 0.0) if abs(along[1]) < 0.9 else (1.0, 0.0, 0.0))
    across /= np.linalg.norm(across)
    axes = (along, across, np.cross(along, across))
    return _round((start + stop) / 2, axes, (length / 2, thick, thick), False, material, colour, slot)


def car(
    name: str, length: float, width: float, height: float, wheelbase: float, *, overhang: float, belt: float,
    bonnet: float, cowl: float, screen: float, glass_rear: float, rear: float, panel: float, radius: float = 0.32,
    clearance: float = 0.19, tail_up: float = 0.0, trim: int = BODY, closed: bool = False, bed: float = 0.0,
    rails: float = 0.0,
) -> Model:  # fmt: skip
    """Any vehicle with a bonnet and a glazed cabin.

    `overhang`: front bumper to front axle; `belt`, `bonnet`: heights of the window sill and the bonnet's front edge;
    `cowl`: x of the windscreen's foot behind the front axle; `screen`, `rear`: rakes of windscreen and rear window (m
    per m); `glass_rear`: foot of the rear window, metres ahead of the tail; `panel`: length of the painted panel behind
    the side windows; `closed`: it also covers the rear window; `bed`: height of a pickup's bed above the belt.
    """
    w, nose_x = width / 2, wheelbase / 2 + overhang
    tail_x, cowl_x = nose_x - length, wheelbase / 2 - cowl
    glass_x0 = tail_x + max(glass_rear, 0.08 * (belt - clearance) + 0.015)  # inside the leaning tail
    top = height - 0.02 - rails
    lean, paint = 0.05, Material.PAINT
    cut, tail_cut = (0.42, 0.14), (0.16, 0.10)
    cabin_lean = 0.26 if height < 1.8 else 0.12
    cabin_w = w - lean * (belt - clearance) - 0.02
    tub = block(
        (tail_x, cowl_x - 0.06), w, (clearance, belt + tail_up), paint, slot=BODY, rear=0.08, lean=lean, tail=tail_cut,
        drop=tail_up,
    )  # fmt: skip
    snout = block(
        (cowl_x - 0.1, nose_x), w - 0.012, (clearance + 0.01, belt + 0.01), paint, slot=BODY, lean=lean, front=0.12,
        nose=cut, drop=belt - bonnet,
    )  # fmt: skip
    glass = block((glass_x0, cowl_x), cabin_w, (belt - 0.15, top - 0.03), Material.GLASS, PANE,
                  rear=rear, front=screen, lean=cabin_lean)  # fmt: skip
    rise = top - 0.07 - (belt - 0.15)
    roof = block(
        (glass_x0 + rear * rise - 0.02, cowl_x - screen * rise + 0.02), cabin_w - cabin_lean * rise + 0.012,
        (top - 0.07, top), paint, slot=BODY, rear=2.2, front=2.2, lean=1.0, crest=(0.35, 0.02, 0.35, 0.02),
    )  # fmt: skip

    def pillar(x0: float, x1: float, rake: float, material: int, colour: tuple, slot: int, out: float = 0.012) -> Piece:
        return block((x0, x1), cabin_w + out, (belt - 0.15, top - 0.045), material, colour, slot,
                     rear=-rake, front=rake, lean=cabin_lean)  # fmt: skip

    back = -0.012 if closed else 0.05
    pillars = [
        pillar(glass_x0 + back, glass_x0 + panel, -rear, paint, DARK, BODY),
        pillar(cowl_x - 0.14, cowl_x - 0.035, screen, paint, DARK, BODY),
        pillar(cowl_x - 1.2, cowl_x - 1.11, 0.15, Material.PLAIN, BLACK, FIXED, 0.018),
    ]
    arch_top = 2 * radius + 0.05
    arches = [
        block((x - radius - 0.07, x + radius + 0.07), w + 0.008, (clearance - 0.02, arch_top), Material.PLAIN, BLACK,
              lean=lean, crest=(0.24, 0.26, 0.24, 0.26))
        for x in (wheelbase / 2, -wheelbase / 2)
    ]  # fmt: skip
    low = clearance + 0.03
    bumper = (Material.PLAIN, DARK) if trim == FIXED else (Material.PAINT, DARK)
    lamp_z, red_z = bonnet - 0.17, min(belt - 0.24, 0.82)

    def shell(front_end: bool, z: tuple[float, float], out: float, look: tuple, deep: float = 0.5) -> Piece:
        """A band around the nose or the tail, `out` metres outside the body."""
        at = z[0] - clearance - (0.01 if front_end else 0.0)
        half = (w - 0.012 if front_end else w) - lean * at + min(out, 0.012)
        if front_end:
            end = nose_x - 0.12 * at + out
            return block((end - deep, end), half, z, *look, lean=lean, front=0.12, nose=cut)
        end = tail_x + 0.08 * at - out
        return block((end, end + deep), half, z, *look, lean=lean, rear=0.08, tail=tail_cut)

    def badge(front_end: bool, z: tuple[float, float], half: float, out: float, look: tuple) -> Piece:
        """A plate or grille in the middle of the nose or the tail."""
        at = z[0] - clearance
        if front_end:
            return block((nose_x - 0.12 * at - 0.2, nose_x - 0.12 * at + out), half, z, *look, front=0.12)
        return block((tail_x + 0.08 * at - out, tail_x + 0.08 * at + 0.2), half, z, *look, rear=0.08)

    sills = block(
        (-wheelbase / 2 + radius + 0.05, wheelbase / 2 - radius - 0.05), w + 0.012,
        (clearance - 0.03, clearance + 0.09), Material.PLAIN, DARK, lean=lean,
    )  # fmt: skip
    mirror = cowl_x - 0.32 * screen - 0.03  # behind the windscreen at the mirrors' height
    details = [
        shell(True, (low, bonnet - 0.27), 0.04, (*bumper, trim)),
        shell(False, (low, red_z - 0.1), 0.04, (*bumper, trim)),
        shell(True, (lamp_z, lamp_z + 0.13), 0.012, HEADLIGHT_LOOK, 0.42),
        badge(True, (bonnet - 0.3, bonnet - 0.05), w * 0.56, 0.03, (Material.PLAIN, BLACK)),
        badge(False, (red_z - 0.14, belt + tail_up - 0.03), w * 0.66, 0.022, (paint, DARK, BODY)),
        badge(True, (low + 0.08, low + 0.19), 0.26, 0.06, (Material.PLAIN, PLATE)),
        badge(False, (red_z - 0.06, red_z + 0.05), 0.26, 0.05, (Material.PLAIN, PLATE)),
        block((mirror - 0.12, mirror), w + 0.14, (belt + 0.03, belt + 0.17), *bumper, trim, front=0.3),
        sills,
        badge(True, (clearance - 0.01, low + 0.05), w * 0.6, 0.056, (Material.PLAIN, BLACK)),
    ]  # fmt: skip
    red = shell(False, (red_z, red_z + 0.13), 0.012, RED_LOOK, 0.3)
    if bed:  # the closed cover of a pickup's bed instead of the black middle pillar
        pillars[2] = block((tail_x + 0.05, glass_x0 - 0.02), w - 0.12, (belt - 0.2, belt + bed), Material.PLAIN, BLACK)
    elif rails:  # on the roof of estates and SUVs: one slab of dark rails
        pillars[2] = block((glass_x0 + rear * rise + 0.2, cowl_x - screen * rise - 0.25),
                           cabin_w - cabin_lean * rise - 0.05, (top - 0.05, top + rails), Material.METAL, DARK,
                           rear=3.0, front=3.0)  # fmt: skip
    rollers = [
        block((x - radius, x + radius), w + 0.01, (0.0, 2 * radius), Material.RUBBER, TYRE,
              crest=(0.2, 0.22, 0.2, 0.22))
        for x in (wheelbase / 2, -wheelbase / 2)
    ]  # fmt: skip
    wheels = [
        make(x, side * (w - 0.1), radius, half)
        for make, half in ((wheel, 0.115), (hub, 0.13))
        for x in (wheelbase / 2, -wheelbase / 2)
        for side in (1, -1)
    ]
    solids = [tub, snout, glass, roof, *pillars, *arches, *details, red]
    coarse = [tub, snout, glass, roof, pillars[0], *rollers, red]
    return Model(name, solids, wheels, coarse, wheelbase, length, width, Semantic.VEHICLE)

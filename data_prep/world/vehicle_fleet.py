"""The fleet: every vehicle model with its real dimensions, as stacked tables that `vehicles` indexes."""

from typing import NamedTuple

import numpy as np

from data_prep.world import vehicle_models as parts
from data_prep.world.surfaces import Material, Semantic
from data_prep.world.vehicle_models import (
    BODY,
    CLOTH,
    COARSE,
    FIXED,
    ROUNDS,
    SECOND,
    SOLIDS,
    TROUSERS,
    Model,
    Piece,
    block,
    car,
    hub,
    limb,
    wheel,
)

_PAINT, _PLAIN, _GLASS = Material.PAINT, Material.PLAIN, Material.GLASS


def lorry(name: str, length: float, height: float, width: float = 2.45, ribbed: bool = False) -> Model:
    """Cab over engine with a box body."""
    w, radius = width / 2, 0.46
    wheelbase = 0.56 * length
    nose_x = wheelbase / 2 + 1.25
    tail_x, cab_x = nose_x - length, nose_x - 1.75
    cab_top = min(2.75, height - 0.35)
    box_x1 = cab_x - 0.12
    cargo = (Material.SHUTTER, (0.5, 0.5, 0.5), SECOND) if ribbed else (_PAINT, (0.5, 0.5, 0.5), SECOND)
    extra = (0.25, 1.0, 0.0, 0.0)
    body = [
        block((tail_x, box_x1), w, (1.05, height), *cargo, extra=extra),
        block((cab_x, nose_x), w - 0.06, (0.5, cab_top), _PAINT, slot=BODY, lean=0.015, front=0.05, nose=(0.2, 0.16)),
        block((nose_x - 0.6, nose_x - 0.03), w - 0.11, (1.55, cab_top - 0.42), _GLASS, parts.PANE, front=0.05,
              nose=(0.12, 0.1)),
        block((cab_x + 0.55, nose_x - 0.35), w - 0.06, (1.5, cab_top - 0.45), _GLASS, parts.PANE, front=0.3),
        block((tail_x + 0.15, nose_x - 0.4), w - 0.45, (0.55, 1.02), _PLAIN, parts.BLACK),
        block((nose_x - 0.7, nose_x + 0.05), w - 0.03, (0.38, 0.78), _PLAIN, parts.DARK, front=0.05, nose=(0.25, 0.18)),
    ]  # fmt: skip
    rollers = [
        block((x - radius, x + radius), w - 0.03, (0.0, 2 * radius), Material.RUBBER, parts.TYRE,
              crest=(0.28, 0.3, 0.28, 0.3))
        for x in (wheelbase / 2, -wheelbase / 2)
    ]  # fmt: skip
    details = [
        block((nose_x - 0.3, nose_x + 0.07), w - 0.1, (0.52, 0.7), *parts.HEADLIGHT_LOOK, nose=(0.2, 0.15)),
        block((nose_x - 0.3, nose_x + 0.09), w - 0.5, (0.45, 0.73), _PLAIN, parts.BLACK),
        block((nose_x - 0.3, nose_x + 0.11), 0.26, (0.46, 0.57), _PLAIN, parts.PLATE),
        block((nose_x - 0.5, nose_x + 0.01), w - 0.3, (0.95, 1.35), _PLAIN, parts.BLACK, front=0.05),
        block((tail_x - 0.03, tail_x + 0.1), w - 0.05, (0.82, 0.98), *parts.RED_LOOK),
        block((tail_x - 0.05, tail_x + 0.12), w - 0.45, (0.8, 1.0), _PLAIN, parts.BLACK),
        block((tail_x - 0.06, tail_x + 0.08), 0.26, (0.84, 0.95), _PLAIN, parts.PLATE),
        block((tail_x - 0.02, tail_x + 0.02), w - 0.09, (1.12, height - 0.1), Material.SHUTTER, (0.4, 0.4, 0.4),
              extra=(0.2, 0.0, 0.0, 0.0)),
        block((nose_x - 0.5, nose_x - 0.34), w + 0.2, (1.5, 2.0), _PLAIN, parts.BLACK),
        block((tail_x + 1.4, wheelbase / 2 - radius - 0.2), w - 0.1, (0.5, 0.95), _PLAIN, parts.DARK,
              front=0.1, rear=0.1),
        block((-wheelbase / 2 - radius - 0.12, -wheelbase / 2 + radius + 0.12), w - 0.02, (0.7, 1.03), _PLAIN,
              parts.BLACK, crest=(0.2, 0.2, 0.2, 0.2)),
        block((wheelbase / 2 - radius - 0.08, wheelbase / 2 + radius + 0.08), w - 0.045, (0.47, 1.02), _PLAIN,
              parts.BLACK, crest=(0.24, 0.3, 0.24, 0.3)),
    ]  # fmt: skip
    wheels = [
        make(x, side * (w - inset), radius, half)
        for make, more in ((wheel, 0.0), (hub, 0.015))
        for x, half, inset in ((wheelbase / 2, 0.15 + more, 0.2), (-wheelbase / 2, 0.28 + more, 0.32))
        for side in (1, -1)
    ]
    coarse = [*body[:5], *rollers, details[4]]
    return Model(name, [*body, *details], wheels, coarse, wheelbase, length, width, Semantic.VEHICLE)


def bus(name: str, length: float, height: float, width: float = 2.55) -> Model:
    """City bus: a glazed box, doors on the right."""
    w, radius = width / 2, 0.48
    wheelbase = 0.5 * length
    nose_x = wheelbase / 2 + 0.225 * length
    tail_x = nose_x - length
    sill, head = 1.15, height - 0.75
    posts = np.linspace(tail_x + 0.35, nose_x - 1.0, 6)
    hull = block((tail_x, nose_x), w, (0.32, height), _PAINT, slot=BODY, edges=(0.2, 0.18), front=0.02)
    panes = block((tail_x + 0.35, nose_x - 0.5), w + 0.01, (sill, head), _GLASS, parts.PANE)
    screen = block((nose_x - 0.7, nose_x + 0.012), w - 0.08, (1.0, height - 0.5), _GLASS, parts.PANE, front=0.02,
                   nose=(0.06, 0.08))  # fmt: skip
    rear_pane = block((tail_x - 0.012, tail_x + 0.3), w - 0.25, (1.6, height - 0.6), _GLASS, parts.PANE)
    skirt = block((tail_x + 0.2, nose_x - 0.2), w + 0.012, (0.34, 0.62), _PAINT, slot=SECOND)
    red = block((tail_x - 0.02, tail_x + 0.2), w - 0.04, (0.8, 1.15), *parts.RED_LOOK)
    rollers = [
        block((x - radius, x + radius), w + 0.025, (0.0, 2 * radius), Material.RUBBER, parts.TYRE,
              crest=(0.28, 0.3, 0.28, 0.3))
        for x in (wheelbase / 2, -wheelbase / 2)
    ]  # fmt: skip
    details = [
        *(block((x - 0.06, x + 0.06), w + 0.02, (sill - 0.02, head + 0.02), _PLAIN, parts.BLACK) for x in posts[1:4]),
        block((nose_x - 1.5, nose_x - 0.35), 0.2, (0.4, 2.4), _GLASS, parts.PANE, side=-w + 0.175),
        block((-0.6, 0.6), 0.2, (0.4, 2.4), _GLASS, parts.PANE, side=-w + 0.175),
        block((nose_x - 0.4, nose_x + 0.02), w - 0.35, (height - 0.46, height - 0.2), Material.LAMP, (0.6, 0.3, 0.03)),
        block((nose_x - 0.4, nose_x + 0.02), w - 0.1, (0.6, 0.82), *parts.HEADLIGHT_LOOK, nose=(0.1, 0.1)),
        block((nose_x - 0.4, nose_x + 0.035), w - 0.5, (0.5, 0.95), _PLAIN, parts.DARK),
        block((tail_x - 0.035, tail_x + 0.2), w - 0.25, (0.6, 1.3), _PAINT, slot=SECOND),
        block((nose_x - 0.06, nose_x + 0.06), 0.26, (0.52, 0.63), _PLAIN, parts.PLATE),
        block((tail_x - 0.05, tail_x + 0.06), 0.26, (0.7, 0.81), _PLAIN, parts.PLATE),
        block((nose_x - 0.5, nose_x - 0.32), w + 0.22, (1.9, 2.35), _PLAIN, parts.BLACK, front=0.3),
    ]  # fmt: skip
    wheels = [
        make(x, side * (w - 0.15), radius, half)
        for make, half in ((wheel, 0.175), (hub, 0.19))
        for x in (wheelbase / 2, -wheelbase / 2)
        for side in (1, -1)
    ]
    solids = [hull, panes, screen, rear_pane, skirt, red, *details]
    coarse = [hull, panes, screen, rear_pane, skirt, red, *rollers]
    return Model(name, solids, wheels, coarse, wheelbase, length, width, Semantic.VEHICLE)


def _rider(hip: tuple, shoulder: tuple, hand: tuple, feet: tuple, knees: tuple) -> tuple[list[Piece], list[Piece]]:
    """A rider's solid parts (helmet's visor side, arms) and round parts (head, torso, legs)."""
    head = (shoulder[0] + 0.08, shoulder[2] + 0.2)
    bars = []
    for side in (1, -1):
        rake = (hand[0] - shoulder[0]) / (shoulder[2] - hand[2])
        bars.append(
            block((hand[0] - 0.05, hand[0] + 0.05), 0.05, (hand[2], shoulder[2]), Material.CLOTH, slot=CLOTH,
                  rear=-rake, front=rake, side=side * 0.22)
        )  # fmt: skip
    rounds = [
        limb((head[0], 0, head[1] - 0.14), (head[0], 0, head[1] + 0.14), 0.115, _PAINT, slot=SECOND),
        limb((hip[0] - 0.04, 0, hip[2] - 0.12), (shoulder[0] + 0.02, 0, shoulder[2] + 0.1), 0.19, Material.CLOTH,
             slot=CLOTH),
    ]  # fmt: skip
    for side, foot, knee in ((1, feet[0], knees[0]), (-1, feet[1], knees[1])):
        y = side * 0.13
        rounds.append(limb((hip[0] - 0.06, y, hip[2]), (knee[0], y, knee[1]), 0.085, Material.CLOTH, slot=TROUSERS))
        rounds.append(limb((knee[0], y, knee[1] + 0.04), (foot[0], y, foot[1]), 0.06, Material.CLOTH, slot=TROUSERS))
    return bars, rounds


def motorcycle(name: str) -> Model:
    """Motorcycle with rider."""
    wheelbase, radius = 1.42, 0.31
    bars, rider = _rider(
        (-0.3, 0, 0.86), (-0.12, 0, 1.38), (0.32, 0, 1.0), ((-0.1, 0.3),) * 2, ((0.18, 0.66), (0.18, 0.66))
    )
    body = [
        block((-0.12, 0.42), 0.16, (0.62, 0.98), _PAINT, slot=BODY, rear=0.5, front=0.4, lean=0.2),
        block((-0.85, 0.05), 0.12, (0.66, 0.82), _PLAIN, parts.BLACK, rear=0.8),
        block((-0.35, 0.42), 0.17, (0.2, 0.66), Material.METAL, parts.DARK, rear=0.2, front=0.3),
        block((0.6, 0.74), 0.07, (0.2, 1.0), Material.METAL, parts.ALLOY, rear=-0.45, front=0.45),
        block((0.25, 0.62), 0.2, (0.84, 1.12), _PAINT, slot=BODY, front=0.5, nose=(0.12, 0.1)),
        block((0.42, 0.6), 0.13, (1.1, 1.32), _GLASS, parts.PANE, rear=-0.5, front=0.6),
        block((0.28, 0.32), 0.38, (0.985, 1.045), _PLAIN, parts.BLACK),
    ]
    more = [
        block((0.5, 0.645), 0.09, (0.86, 0.98), *parts.HEADLIGHT_LOOK),
        block((-0.9, -0.7), 0.07, (0.68, 0.76), *parts.RED_LOOK),
        block((-0.98, -0.92), 0.1, (0.46, 0.6), _PLAIN, parts.PLATE),
        block((-0.98, -0.7), 0.09, (0.58, 0.68), _PLAIN, parts.BLACK, rear=-0.3),
        block((-0.95, -0.2), 0.06, (0.28, 0.4), Material.METAL, parts.ALLOY, side=-0.2),
        block((0.25, 0.3), 0.42, (1.12, 1.2), _PLAIN, parts.BLACK, rear=0.0),
        *bars,
    ]
    wheels = [wheel(x, 0.0, radius, 0.065) for x in (wheelbase / 2, -wheelbase / 2)]
    stubs = [
        block(
            (x - radius, x + radius), 0.06, (0.0, 2 * radius), Material.RUBBER, parts.TYRE, crest=(0.18, 0.2, 0.18, 0.2)
        )
        for x in (wheelbase / 2, -wheelbase / 2)
    ]
    person = [
        block((-0.42, 0.12), 0.2, (0.55, 1.5), Material.CLOTH, slot=CLOTH, rear=0.2, front=0.15, lean=0.05),
        block((-0.16, 0.08), 0.11, (1.48, 1.74), _PAINT, slot=SECOND, rear=0.2, front=0.2, lean=0.15),
    ]
    coarse = [body[0], body[2], body[4], body[3], *stubs, *person]
    return Model(name, [*body, *more], [*wheels, *rider], coarse, wheelbase, 2.1, 0.8, Semantic.CYCLIST)


def bicycle(name: str, stroke: float) -> Model:
    """Bicycle with rider; `stroke` is the angle of the cranks."""
    wheelbase, radius = 1.05, 0.34
    crank = (-0.05, 0.29)
    pedals = [(crank[0] + s * 0.17 * np.cos(stroke), crank[1] + s * 0.17 * np.sin(stroke) + 0.04) for s in (1.0, -1.0)]
    knees = [(0.16 + 0.35 * (p[0] - crank[0]), 0.68 + 0.55 * (p[1] - crank[1])) for p in pedals]
    bars, rider = _rider((-0.26, 0, 0.98), (0.02, 0, 1.42), (0.4, 0, 1.06), tuple(pedals), tuple(knees))
    tube = (_PAINT, (0.5, 0.5, 0.5), BODY)
    frame = [
        block((-0.05, 0.0), 0.02, (0.29, 0.76), *tube, rear=-0.36, front=0.36),
        block((-0.04, 0.01), 0.018, (0.3, 0.72), *tube, rear=0.9, front=-0.9),
        block((-0.22, 0.38), 0.017, (0.7, 0.75), *tube),
        block((-0.54, -0.06), 0.03, (0.29, 0.33), *tube),
        block((0.49, 0.53), 0.022, (0.32, 1.02), *tube, rear=-0.26, front=0.26),
        block((0.3, 0.36), 0.3, (1.02, 1.06), _PLAIN, parts.BLACK),
        block((-0.36, -0.12), 0.08, (0.88, 0.95), _PLAIN, parts.BLACK, front=0.6),
        block((-0.26, -0.22), 0.016, (0.74, 0.9), Material.METAL, parts.ALLOY),
        block((-0.62, -0.3), 0.07, (0.74, 0.77), Material.METAL, parts.DARK),
        block((-0.64, -0.6), 0.03, (0.66, 0.72), *parts.RED_LOOK),
        *bars,
    ]
    wheels = [
        wheel(x, 0.0, radius, 0.018, Material.RUBBER, (0.12, 0.12, 0.12)) for x in (wheelbase / 2, -wheelbase / 2)
    ]
    stubs = [
        block(
            (x - radius, x + radius),
            0.025,
            (0.0, 2 * radius),
            Material.RUBBER,
            parts.TYRE,
            crest=(0.2, 0.22, 0.2, 0.22),
        )
        for x in (wheelbase / 2, -wheelbase / 2)
    ]
    person = [
        block((-0.4, 0.1), 0.2, (0.9, 1.5), Material.CLOTH, slot=CLOTH, rear=0.35, front=-0.15, lean=0.05),
        block((0.0, 0.22), 0.1, (1.5, 1.76), _PAINT, slot=SECOND, rear=0.2, front=0.2, lean=0.15),
        block((-0.2, 0.2), 0.17, (0.2, 0.95), Material.CLOTH, slot=TROUSERS),
    ]
    coarse = [frame[2], frame[5], frame[4], *stubs, *person]
    return Model(name, frame, [*wheels, *rider], coarse, wheelbase, 1.75, 0.6, Semantic.CYCLIST)


MODELS = (
    car("supermini", 3.75, 1.68, 1.48, 2.42, overhang=0.72, belt=0.96, bonnet=0.76, cowl=0.18, screen=1.3,
        glass_rear=0.06, rear=0.38, panel=0.45, radius=0.30),
    car("hatchback", 4.25, 1.80, 1.46, 2.62, overhang=0.86, belt=0.95, bonnet=0.72, cowl=0.32, screen=1.55,
        glass_rear=0.08, rear=0.62, panel=0.55),
    car("saloon", 4.68, 1.83, 1.45, 2.82, overhang=0.84, belt=0.95, bonnet=0.72, cowl=0.46, screen=1.55,
        glass_rear=0.48, rear=1.75, panel=0.5, tail_up=0.06),
    car("executive saloon", 4.93, 1.88, 1.46, 2.96, overhang=0.84, belt=0.97, bonnet=0.75, cowl=0.55, screen=1.6,
        glass_rear=0.52, rear=1.7, panel=0.48, radius=0.34, tail_up=0.07),
    car("estate", 4.62, 1.81, 1.50, 2.70, overhang=0.88, belt=0.95, bonnet=0.73, cowl=0.40, screen=1.5,
        glass_rear=0.06, rear=0.5, panel=0.28, rails=0.035),
    car("people carrier", 4.55, 1.83, 1.66, 2.78, overhang=0.86, belt=1.02, bonnet=0.80, cowl=0.10, screen=1.35,
        glass_rear=0.06, rear=0.32, panel=0.30),
    car("crossover", 4.40, 1.84, 1.62, 2.66, overhang=0.86, belt=1.06, bonnet=0.88, cowl=0.42, screen=1.25,
        glass_rear=0.07, rear=0.45, panel=0.42, radius=0.35, clearance=0.24, trim=FIXED, rails=0.04),
    car("large SUV", 4.85, 1.95, 1.78, 2.90, overhang=0.88, belt=1.14, bonnet=0.98, cowl=0.50, screen=1.05,
        glass_rear=0.06, rear=0.25, panel=0.35, radius=0.38, clearance=0.26, rails=0.04),
    car("pickup", 5.35, 1.90, 1.80, 3.22, overhang=0.92, belt=1.12, bonnet=0.98, cowl=0.55, screen=1.0,
        glass_rear=1.72, rear=0.2, panel=0.22, radius=0.39, clearance=0.30, trim=FIXED, bed=0.025),
    car("panel van", 5.05, 1.95, 1.98, 3.05, overhang=0.92, belt=1.12, bonnet=0.95, cowl=0.02, screen=0.95,
        glass_rear=0.03, rear=0.06, panel=2.75, radius=0.34, clearance=0.23, trim=FIXED, closed=True),
    car("minibus", 5.10, 1.95, 1.99, 3.10, overhang=0.90, belt=1.12, bonnet=0.95, cowl=0.02, screen=0.95,
        glass_rear=0.03, rear=0.06, panel=0.30, radius=0.34, clearance=0.23),
    car("high van", 5.95, 2.02, 2.65, 3.65, overhang=1.00, belt=1.25, bonnet=1.05, cowl=-0.05, screen=0.62,
        glass_rear=0.02, rear=0.03, panel=3.60, radius=0.36, clearance=0.25, trim=FIXED, closed=True),
    lorry("light lorry", 6.6, 3.05, 2.25),
    lorry("lorry", 9.2, 3.75, 2.50, ribbed=True),
    bus("midi bus", 9.8, 3.0),
    bus("bus", 12.0, 3.1),
    motorcycle("motorcycle"),
    bicycle("bicycle", 0.5),
    bicycle("bicycle pedalling", 1.9),
)  # fmt: skip
NAMES = tuple(model.name for model in MODELS)


class Tables(NamedTuple):
    """One form of all M models: K parts each."""

    planes: np.ndarray  # [M, K, 8, 4]
    centre: np.ndarray  # [M, K, 3]
    quadric: np.ndarray  # [M, K, 3, 3]
    material: np.ndarray  # [M, K]
    colour: np.ndarray  # [M, K, 3]
    slot: np.ndarray  # [M, K]
    extra: np.ndarray  # [M, K, 4]
    valid: np.ndarray  # [M, K]


def _tables(lists: list[list[Piece]], size: int) -> Tables:
    nothing = Piece(
        np.tile([0.0, 0.0, 0.0, 1.0], (8, 1)), np.zeros(3), np.zeros((3, 3)), 0, (0.5, 0.5, 0.5), FIXED, (0.0,) * 4
    )
    rows = [[*pieces, *[nothing] * (size - len(pieces))] for pieces in lists]
    columns = [np.array([[getattr(piece, name) for piece in row] for row in rows]) for name in Piece._fields]
    valid = np.array([[k < len(pieces) for k in range(size)] for pieces in lists])
    columns = [column.astype(np.int32 if column.dtype.kind == "i" else np.float32) for column in columns]
    return Tables(**dict(zip(Piece._fields, columns, strict=True)), valid=valid)


DETAILED = _tables([model.solids for model in MODELS], SOLIDS)
ROUND = _tables([model.rounds for model in MODELS], ROUNDS)
FAR = _tables([model.coarse for model in MODELS], COARSE)
WHEELBASE = np.array([model.wheelbase for model in MODELS], np.float32)
LENGTH = np.array([model.length for model in MODELS], np.float32)
WIDTH = np.array([model.width for model in MODELS], np.float32)
SEMANTIC = np.array([model.semantic for model in MODELS], np.int32)

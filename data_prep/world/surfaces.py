"""Numbers for what a surface is made of (`Material`) and what it belongs to (`Semantic`)."""

import enum


class Material(enum.IntEnum):
    """What a surface is made of: chooses texture, gloss and LiDAR reflectivity. `extra` [4] holds its parameters."""

    PLAIN = 0  # matt, one colour
    ROAD = 1  # asphalt with the road's markings and crossings; ground height comes from the road
    PAVING = 2  # sidewalk slabs; extra = (slab size m, 0, 0, 0)
    VERGE = 3  # ground beyond the sidewalk: grass, gravel or dirt by `colour`
    FACADE = 4  # wall with windows; extra = (window pitch m, floor height m, glass share 0..1, random 0..1)
    BRICK = 5
    PLASTER = 6  # stained, slightly rough wall
    ROOF = 7  # tiles in rows
    CONCRETE = 8
    PAINT = 9  # car paint, glossy
    GLASS = 10  # windscreens and shop fronts: dark, mirror-like
    RUBBER = 11
    METAL = 12  # poles, rails
    BARK = 13
    LEAVES = 14  # crowns and hedges
    CLOTH = 15  # clothing
    SKIN = 16
    SIGN = 17  # traffic signs: coloured disc or board with a border; extra = (half width, half height, style 0..1, 0)
    WOOD = 18  # fences: boards along local z; extra = (board width m, 0, 0, 0)
    LAMP = 19  # shines when lamps are on: street lamps, headlights
    REAR_LAMP = 20
    SHUTTER = 21  # garage doors, containers: horizontal or vertical ribs; extra = (rib pitch m, 1 if vertical, 0, 0)


class Semantic(enum.IntEnum):
    """Class ids of the optional semantic images; 0 is the sky."""

    SKY = 0
    ROAD = 1
    SIDEWALK = 2
    TERRAIN = 3
    BUILDING = 4
    WALL = 5  # walls, fences, barriers
    POLE = 6
    SIGN = 7
    VEGETATION = 8
    VEHICLE = 9
    PEDESTRIAN = 10
    CYCLIST = 11
    BRIDGE = 12
    EGO = 13

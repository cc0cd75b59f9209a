"""Rigs of the world: cameras, LiDAR and the car's own body, read from a small file (docs/custom_rig.md).

The file is the `rig.yaml` of docs/custom_data.md, so one file serves a rig while it is only planned and later,
when it is built; what only rendering needs stands in its section `world`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from data_prep import rig_yaml
from data_prep.plan import suggest
from data_prep.world.surfaces import Material
from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError

BUILT_IN = ("nuscenes", "ddad", "surround")
FORMATS = ("nuscenes", "dgp")
MAX_PIXELS = 4096 * 4096  # of one image
_LIDAR_NAMES = ("LIDAR", "LIDAR_TOP")  # what the formats call the LiDAR; no camera may have its folder
_FOLDER = Path(__file__).parent / "rigs"
_WORLD_KEYS = {"format", "keyframe_rate", "lidar", "body"}
_SCAN = {  # number: default, lowest, highest
    "columns": (1084, 8, 20000),
    "rate": (10.0, 0.1, 100.0),
    "start": (-172.0, -360.0, 360.0),
    "range_min": (0.3, 0.0, 100.0),
    "range_max": (105.0, 1.0, 1000.0),
    "range_dark": (55.0, 1.0, 1000.0),
    "range_noise": (0.02, 0.0, 1.0),
    "dropout": (0.01, 0.0, 1.0),
}
_PART_KEYS = {"low", "high", "shrink_low", "shrink_high", "colour", "material"}


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera on the car."""

    size: tuple[int, int]  # height, width
    intrinsics: np.ndarray  # [3, 3] pixels, centres at integers
    cam_to_ego: np.ndarray  # [4, 4]; camera x right, y down, z forward
    delay: float  # seconds after the LiDAR's time


@dataclasses.dataclass(frozen=True)
class Lidar:
    """A spinning LiDAR. All points of a sweep belong to one time, as after motion compensation."""

    sensor_to_ego: np.ndarray  # [4, 4]
    elevations: np.ndarray  # [B] radians, ascending: one beam each
    columns: int  # firings per revolution
    rate: float  # revolutions per second
    start: float  # azimuth of the first column in the sensor's frame, radians; columns then go clockwise
    range_min: float  # metres
    range_max: float
    range_dark: float  # where a matt surface of 10 % reflectivity is seen half of the time, metres
    range_noise: float  # standard deviation, metres
    dropout: float  # share of returns that are lost at random
    body_returns: bool  # whether points on the car itself are kept


@dataclasses.dataclass(frozen=True)
class Body:
    """The car's own body: P boxes with (possibly) smaller tops, in the ego frame."""

    low: np.ndarray  # [P, 3] metres
    high: np.ndarray  # [P, 3]
    shrink_low: np.ndarray  # [P, 2] how far the top's -x and -y sides lie further inside, metres
    shrink_high: np.ndarray  # [P, 2] the same of +x and +y
    colour: np.ndarray  # [P, 3] 0..1
    material: np.ndarray  # [P] int32
    in_images: bool  # whether cameras see it; LiDAR and sun always do


@dataclasses.dataclass(frozen=True)
class Rig:
    """A rig, checked."""

    name: str
    format: str  # of the datasets that are written: one of FORMATS
    cameras: dict[str, Camera]
    lidar: Lidar
    body: Body
    keyframe_rate: float  # per second

    @property
    def sweeps_per_keyframe(self) -> int:
        """LiDAR revolutions from one keyframe to the next, at least 1."""
        return max(1, round(self.lidar.rate / self.keyframe_rate))


def built_in(name: str) -> Path:
    """File of a built-in rig, an example for others."""
    return _FOLDER / f"{name}.yaml"


def read_rig(name_or_path: str | Path) -> Rig:
    """A built-in rig by name, or one from a YAML file.

    Raises:
      ConfigError, DataError: no such rig or file, or something in it is wrong; names the file and the key.
    """
    path = Path(name_or_path)
    if str(name_or_path) in BUILT_IN:
        path = built_in(str(name_or_path))
    elif path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--rig={name_or_path}: neither a .yaml file nor a rig{suggest(str(name_or_path), BUILT_IN)}")
    content = rig_yaml.read_yaml(path)
    real = rig_yaml.read_rig(path)
    world = content.get("world") or {}
    where = f"{path}, world"
    rig_yaml.check_keys(world, _WORLD_KEYS, set(), where)
    form = world.get("format", "nuscenes")
    if form not in FORMATS:
        raise ConfigError(f"{where}: format = {form!r}{suggest(str(form), FORMATS)}")
    keyframe_rate = rig_yaml.read_number(world, "keyframe_rate", 2.0, where)
    if not 0.1 <= keyframe_rate <= 100:
        raise ConfigError(f"{where}: keyframe_rate = {keyframe_rate:g}; expected 0.1 to 100 per second")
    for name, camera in real.cameras.items():
        if name in _LIDAR_NAMES:
            raise ConfigError(f"{path}, camera {name}: this is the LiDAR's name in datasets; choose another one")
        if camera.native_size[0] * camera.native_size[1] > MAX_PIXELS:
            raise ConfigError(f"{path}, camera {name}: image_size = {list(camera.native_size)} is too large")
        if not 0.05 <= camera.cam_to_ego[2, 3] <= 6.0 or np.abs(camera.cam_to_ego[:2, 3]).max() > 12.0:
            raise ConfigError(
                f"{path}, camera {name}: its position {camera.cam_to_ego[:3, 3].tolist()} is not on a road vehicle;"
                " expected metres, z above the ground (0.05 to 6), x forward and y left within 12"
            )
    rig = Rig(
        name=real.name,
        format=form,
        cameras={
            name: Camera(c.native_size, c.intrinsics, c.cam_to_ego, c.delay_ms * 1e-3)
            for name, c in real.cameras.items()
        },
        lidar=_lidar(world.get("lidar") or {}, real.sensor_to_ego, f"{where}, lidar"),
        body=_body(world.get("body") or {}, f"{where}, body"),
        keyframe_rate=keyframe_rate,
    )
    _check_timing(rig, path)
    _check_outside(rig, path)
    if rig.body.in_images and len(rig.body.low) and rig.format == "nuscenes":
        raise ConfigError(
            f"{path}, world, body: in_images = true, but the nuScenes format has no masks, so the car's own body would"
            " be trained on; set world.format: dgp, which writes masks"
        )
    return rig


def scaled(rig: Rig, *, scale: float | None = None, size: tuple[int, int] | None = None) -> Rig:
    """The rig with smaller (or larger) images: all sides times `scale`, or every image at `size` (height, width).

    Intrinsics follow as for a resized image, so the field of view stays (with `size`, pixels may get non-square).
    """
    cameras = {}
    for name, camera in rig.cameras.items():
        new = size or (max(1, round(camera.size[0] * (scale or 1.0))), max(1, round(camera.size[1] * (scale or 1.0))))
        if new[0] * new[1] > MAX_PIXELS:
            raise ConfigError(f"camera {name}: images of {new[0]}x{new[1]} are too large")
        k = geometry.resize_intrinsics(camera.intrinsics, new[0] / camera.size[0], new[1] / camera.size[1])
        cameras[name] = dataclasses.replace(camera, size=new, intrinsics=k)
    return dataclasses.replace(rig, cameras=cameras)


def varied(rig: Rig, rng: np.random.Generator) -> Rig:
    """Another calibration around the rig's; names, sizes and delays of its cameras, LiDAR and body stay.

    Focal lengths are multiplied by exp(U(ln 0.65, ln 1.6)), one factor for the rig, times exp(U(-0.1, 0.1)) per camera;
    principal points move by up to 3 % of the image's sides. Cameras turn in their own frames: yaw U(-15, 15), pitch
    U(-8, 8), roll U(-4, 4) degrees. They stand at one height, U(0.9, 2.3) m, +-0.1 m each, and +-0.2 m along x and y.

    Raises:
      ConfigError: the images show the car's body, whose masks would differ from scene to scene.
    """
    check_variable(rig)
    zoom, height = np.exp(rng.uniform(np.log(0.65), np.log(1.6))), rng.uniform(0.9, 2.3)
    cameras = {}
    for name, camera in rig.cameras.items():
        intrinsics, pose = camera.intrinsics.copy(), camera.cam_to_ego.copy()
        intrinsics[:2, :2] *= zoom * np.exp(rng.uniform(-0.1, 0.1))
        intrinsics[:2, 2] += rng.uniform(-0.03, 0.03, 2) * camera.size[::-1]
        turn = rng.uniform((-15.0, -8.0, -4.0), (15.0, 8.0, 4.0))  # about the camera's y (down), x (right), z (forward)
        pose[:3, :3] = pose[:3, :3] @ Rotation.from_euler("YXZ", turn, degrees=True).as_matrix()
        moved = rng.uniform((-0.2, -0.2, -0.1), (0.2, 0.2, 0.1))
        pose[:3, 3] = np.array([*pose[:2, 3], height]) + moved
        cameras[name] = dataclasses.replace(camera, intrinsics=intrinsics, cam_to_ego=pose)
    return dataclasses.replace(rig, cameras=cameras)


def check_variable(rig: Rig) -> None:
    """`ConfigError` if `varied` does not take the rig."""
    if rig.body.in_images and len(rig.body.low):
        raise ConfigError(
            f"rig {rig.name}: world.body.in_images = true, so its masks would differ from scene to scene; --vary_rig"
            " takes rigs whose images do not show the car (surround, nuscenes, or in_images: false in your file)"
        )


def _lidar(content: Any, sensor_to_ego: np.ndarray, where: str) -> Lidar:
    rig_yaml.check_keys(content, {*_SCAN, "beams", "body_returns"}, set(), where)
    numbers = {}
    for key, (default, lowest, highest) in _SCAN.items():
        numbers[key] = rig_yaml.read_number(content, key, default, where)
        if not lowest <= numbers[key] <= highest:
            raise ConfigError(f"{where}: {key} = {numbers[key]:g}; expected {lowest:g} to {highest:g}")
    if numbers["columns"] != int(numbers["columns"]) or numbers["range_min"] >= numbers["range_max"]:
        raise ConfigError(f"{where}: columns must be a whole number, and range_min below range_max")
    keep = content.get("body_returns", True)
    if not isinstance(keep, bool):
        raise ConfigError(f"{where}: body_returns = {keep!r}; expected true or false")
    if not 0.1 <= sensor_to_ego[2, 3] <= 8.0:
        raise ConfigError(
            f"{where}: the LiDAR is {sensor_to_ego[2, 3]:g} m above the ground; give its place on the car in"
            " lidar.sensor_to_ego or lidar.position (0.1 to 8 m high)"
        )
    return Lidar(
        sensor_to_ego=sensor_to_ego,
        elevations=np.deg2rad(_beams(content.get("beams", [[-30.67, 10.67, 32]]), f"{where}, beams")),
        columns=int(numbers["columns"]),
        rate=numbers["rate"],
        start=float(np.deg2rad(numbers["start"])),
        range_min=numbers["range_min"],
        range_max=numbers["range_max"],
        range_dark=numbers["range_dark"],
        range_noise=numbers["range_noise"],
        dropout=numbers["dropout"],
        body_returns=keep,
    )


def _beams(content: Any, where: str) -> np.ndarray:
    """Elevations [B] in degrees, ascending, from a list of numbers and of [lowest, highest, count] groups."""
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{where}: expected a list of elevations or [lowest, highest, count] groups in degrees")
    found: list[float] = []
    for entry in content:
        numbers = entry if isinstance(entry, list) else [entry, entry, 1]
        if len(numbers) != 3 or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
            raise ConfigError(f"{where}: {entry!r}; expected an elevation or [lowest, highest, count] in degrees")
        low, high, count = numbers
        if not (-85 <= low <= high <= 85 and 1 <= count <= 1024 and count == int(count)):  # in this order: .inf, .nan
            raise ConfigError(f"{where}: {entry!r}; expected elevations within -85..85 degrees and a count of 1..1024")
        found += np.linspace(low, high, int(count)).tolist()
    if len(set(found)) != len(found) or len(found) > 1024:
        raise ConfigError(f"{where}: {len(found)} beams; expected at most 1024, each elevation once")
    return np.sort(found)


def _body(content: Any, where: str) -> Body:
    rig_yaml.check_keys(content, {"in_images", "parts"}, set(), where)
    parts = content.get("parts") or []
    shown = content.get("in_images", False)
    if not isinstance(parts, list) or not isinstance(shown, bool):
        raise ConfigError(f"{where}: expected in_images: true or false, and parts: a list of boxes")
    rows: dict[str, list] = {key: [] for key in ("low", "high", "shrink_low", "shrink_high", "colour")}
    materials = []
    for number, part in enumerate(parts):
        here = f"{where}, part {number + 1}"
        rig_yaml.check_keys(part, _PART_KEYS, {"low", "high"}, here)
        for key, default in (
            ("low", None), ("high", None), ("shrink_low", [0, 0]), ("shrink_high", [0, 0]),
            ("colour", [0.2, 0.2, 0.22]),
        ):  # fmt: skip
            rows[key].append(_vector(part.get(key, default), 2 if key.startswith("shrink") else 3, f"{here}, {key}"))
        low, high = rows["low"][-1], rows["high"][-1]
        left = high[:2] - low[:2] - rows["shrink_low"][-1] - rows["shrink_high"][-1]
        if np.any(high <= low) or np.any(left < 0):
            raise ConfigError(f"{here}: high must lie above low on every axis, and the shrunk top must not vanish")
        if np.any(rows["colour"][-1] < 0) or np.any(rows["colour"][-1] > 1):
            raise ConfigError(f"{here}: colour = {part['colour']}; expected red, green, blue within 0..1")
        name = str(part.get("material", "paint"))
        if name.upper() not in Material.__members__:
            raise ConfigError(f"{here}: material = {name!r}{suggest(name, [m.lower() for m in Material.__members__])}")
        materials.append(int(Material[name.upper()]))
    shapes = {key: 2 if key.startswith("shrink") else 3 for key in rows}
    arrays = {key: np.asarray(values, np.float32).reshape(-1, shapes[key]) for key, values in rows.items()}
    return Body(**arrays, material=np.asarray(materials, np.int32), in_images=shown)


def _vector(content: Any, length: int, where: str) -> np.ndarray:
    try:
        vector = np.asarray(content, np.float64)
    except (TypeError, ValueError):
        vector = np.zeros(0)
    if vector.shape != (length,) or not np.all(np.isfinite(vector)):
        raise ConfigError(f"{where}: {content}; expected {length} numbers")
    return vector


def _check_timing(rig: Rig, path: Path) -> None:
    if abs(rig.lidar.rate / rig.keyframe_rate - rig.sweeps_per_keyframe) > 1e-6:
        raise ConfigError(
            f"{path}, world: lidar.rate = {rig.lidar.rate:g} is no multiple of keyframe_rate = {rig.keyframe_rate:g}"
        )
    for name, camera in rig.cameras.items():
        if abs(camera.delay) >= 0.5 / rig.keyframe_rate:
            raise ConfigError(
                f"{path}, camera {name}: delay_ms = {camera.delay * 1e3:g} is half of a keyframe's time or more"
            )


def _check_outside(rig: Rig, path: Path) -> None:
    """Nothing sees the part that it sits in, so sensors must be outside of all parts that they should see."""
    sensors = {"the LiDAR": rig.lidar.sensor_to_ego[:3, 3]}
    if rig.body.in_images:
        sensors |= {f"camera {name}": camera.cam_to_ego[:3, 3] for name, camera in rig.cameras.items()}
    for what, at in sensors.items():
        for number in range(len(rig.body.low)):
            low, high = rig.body.low[number], rig.body.high[number]
            share = (at[2] - low[2]) / (high[2] - low[2])
            inside = np.all(at[:2] > low[:2] + share * rig.body.shrink_low[number])
            if 0 < share < 1 and inside and np.all(at[:2] < high[:2] - share * rig.body.shrink_high[number]):
                raise ConfigError(
                    f"{path}, world, body, part {number + 1}: {what} at {np.round(at, 3).tolist()} is inside of it"
                )

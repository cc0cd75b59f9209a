"""The description of a user's own rig: `rig.yaml` (docs/custom_data.md has the format)."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.plan import suggest
from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError, DataError

TOP_KEYS = {
    "name", "cameras", "lidar", "point_rule", "min_depth", "max_depth", "time_unit", "match", "tolerance_ms", "world",
}  # fmt: skip
_POSE_KEYS = {"position", "yaw", "pitch", "roll"}
_CAMERA_KEYS = {"image_size", "intrinsics", "hfov", "distortion", "cam_to_ego", "images", "mask", "delay_ms"}
_LIDAR_KEYS = {"sensor_to_ego", "bin_columns"}
_CAMERA_AXES = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # level and forward: x right, y down
TIME_UNITS = {"s": 10**6, "ms": 10**3, "us": 1, "ns": 10**-3}  # microseconds in one unit


@dataclasses.dataclass(frozen=True)
class RigCamera:
    """One camera of `rig.yaml`."""

    folder: str  # below --images
    native_size: tuple[int, int]
    intrinsics: np.ndarray  # [3, 3]
    cam_to_ego: np.ndarray  # [4, 4]
    mask: str | None
    delay_ms: float = 0.0  # exposure after the LiDAR's time; for rendering (data_prep.world), unused by converters


@dataclasses.dataclass(frozen=True)
class Rig:
    """`rig.yaml`, checked."""

    name: str
    cameras: dict[str, RigCamera]
    sensor_to_ego: np.ndarray  # [4, 4] of the LiDAR
    bin_columns: int
    point_rule: str
    min_depth: float
    max_depth: float
    time_unit: str
    match: str
    tolerance_ms: float


def read_rig(path: str | Path) -> Rig:
    """Reads and checks `rig.yaml`.

    Raises:
      ConfigError: missing, broken, a key is unknown or missing, a value is wrong. DataError: a calibration is not
        rigid or is singular, or there is lens distortion.
    """
    path = Path(path)
    content = read_yaml(path)
    lidar = content.get("lidar") or {}
    check_keys(lidar, _LIDAR_KEYS | _POSE_KEYS, set(), f"{path}, lidar")
    for key, known in (
        ("point_rule", ("round", "truncate")),
        ("match", ("name", "nearest")),
        ("time_unit", TIME_UNITS),
    ):
        if content.get(key) is not None and content[key] not in known:
            raise ConfigError(f"{path}: {key} = {content[key]!r}{suggest(str(content[key]), known)}")
    try:
        rig = Rig(
            name=str(content.get("name", path.stem)),
            cameras={str(n): read_camera(str(n), c, path) for n, c in content["cameras"].items()},
            sensor_to_ego=read_pose(lidar, "sensor_to_ego", np.eye(3), f"{path}, lidar"),
            bin_columns=int(lidar.get("bin_columns", 4)),
            point_rule=content.get("point_rule", "round"),
            min_depth=float(content.get("min_depth", 0.1)),
            max_depth=float(content.get("max_depth", 100.0)),
            time_unit=content.get("time_unit", "us"),
            match=content.get("match", "name"),
            tolerance_ms=float(content.get("tolerance_ms", 50.0)),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: a value has the wrong type ({error})") from error
    if not 0 <= rig.min_depth < rig.max_depth < np.inf:
        raise ConfigError(
            f"{path}: min_depth = {rig.min_depth:g}, max_depth = {rig.max_depth:g}; expected 0 <= min_depth < max_depth"
        )
    if rig.bin_columns < 3 or not rig.tolerance_ms >= 0:
        raise ConfigError(f"{path}: bin_columns must be 3 or more, tolerance_ms 0 or more")
    return rig


def read_yaml(path: Path) -> dict[str, Any]:
    """Content of a rig file with its top-level keys checked; `world` is for data_prep.world only.

    Raises:
      ConfigError: missing, broken, a top-level key is unknown, or there are no cameras. DataError: not UTF-8.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"--rig={path}: cannot read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--rig={path}: broken YAML ({error})") from error
    check_keys(content, TOP_KEYS, {"cameras"}, str(path))
    if not isinstance(content["cameras"], dict) or not content["cameras"]:
        raise ConfigError(f"{path}: cameras must be a list of `name: {{...}}` entries")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, but a key that is there twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def check_keys(content: Any, known: set[str], needed: set[str], where: str) -> None:
    """`ConfigError` naming `where` unless `content` is a dict with `needed` and otherwise only `known` keys."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected `key: value` entries")
    for key in content:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{suggest(str(key), known)}")
    if missing := sorted(needed - set(content)):
        raise ConfigError(f"{where}: missing {', '.join(missing)}")


def read_camera(name: str, content: Any, path: Path) -> RigCamera:
    """One entry of `cameras`, checked.

    Raises:
      ConfigError, DataError: see `read_rig`; names the file, the camera and the key.
    """
    where = f"{path}, camera {name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"{where}: expected a name of letters, digits, _ and - only; folders are named after it")
    check_keys(content, _CAMERA_KEYS | _POSE_KEYS, {"image_size"}, where)
    given = content.get("distortion") or [0.0]
    values = list(given.values()) if isinstance(given, dict) else given
    try:
        pinhole = not np.any(np.asarray(values, np.float64))
    except (TypeError, ValueError):
        pinhole = False
    if not pinhole:
        raise DataError(
            f"{where}: lens distortion {given}, but records hold pinhole images; undistort the images once with"
            " cv2.undistort(image, K, distortion, None, K_new), K_new from cv2.getOptimalNewCameraMatrix"
            " (cv2.fisheye.undistortImage for fisheye lenses), then write K_new here and leave distortion out"
        )
    size = content["image_size"]
    if not isinstance(size, list) or len(size) != 2 or any(not isinstance(x, int) or x < 1 for x in size):
        raise ConfigError(f"{where}: image_size = {size}; expected [height, width]")
    matrix = _intrinsics(content, (size[0], size[1]), where)
    cx, cy = matrix[0, 2], matrix[1, 2]
    if not (0 <= cx <= size[1] and 0 <= cy <= size[0]):
        raise ConfigError(
            f"{where}, intrinsics: the principal point ({cx:g}, {cy:g}) lies outside the {size[0]}x{size[1]} image"
            " (height x width); is this the calibration of another resolution?"
        )
    mask = content.get("mask")
    return RigCamera(
        folder=str(content.get("images", name)),
        native_size=(size[0], size[1]),
        intrinsics=matrix,
        cam_to_ego=read_pose(content, "cam_to_ego", _CAMERA_AXES, where),
        mask=str(path.parent / mask) if mask else None,
        delay_ms=read_number(content, "delay_ms", 0.0, where),
    )


def _intrinsics(content: dict, size: tuple[int, int], where: str) -> np.ndarray:
    """[3, 3] from `intrinsics`, or from `hfov` in degrees: square pixels, principal point in the middle."""
    if ("hfov" in content) == ("intrinsics" in content):
        raise ConfigError(f"{where}: give either intrinsics or hfov (horizontal field of view in degrees)")
    if "hfov" in content:
        hfov = read_number(content, "hfov", 0.0, where)
        if not 1 <= hfov <= 150:
            raise ConfigError(f"{where}: hfov = {hfov:g}; expected 1 to 150 degrees (these are pinhole images)")
        focal = size[1] / 2 / np.tan(np.deg2rad(hfov) / 2)
        return np.array([[focal, 0.0, (size[1] - 1) / 2], [0.0, focal, (size[0] - 1) / 2], [0.0, 0.0, 1.0]])
    k = content["intrinsics"]
    if isinstance(k, dict):
        check_keys(k, {"fx", "fy", "cx", "cy"}, {"fx", "fy", "cx", "cy"}, f"{where}, intrinsics")
        k = [[k["fx"], 0.0, k["cx"]], [0.0, k["fy"], k["cy"]], [0.0, 0.0, 1.0]]
    matrix = _numbers(k, f"{where}, intrinsics")
    geometry.check_intrinsics(matrix, f"{where}, intrinsics")
    return matrix


def read_number(content: dict, key: str, default: float, where: str) -> float:
    """A finite number of an entry, `default` where the key is missing; `ConfigError` naming `where` otherwise."""
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise ConfigError(f"{where}: {key} = {value!r}; expected a number")
    return float(value)


def read_pose(content: dict, key: str, axes: np.ndarray, where: str) -> np.ndarray:
    """Sensor -> ego [4, 4] of an entry: a transform at `key`, or `position` with optional angles in degrees: `yaw`
    (left positive), `pitch` (up positive), `roll` (clockwise for who looks along it). The identity where none is there.

    Args:
      axes: [3, 3] sensor -> ego rotation of the sensor at yaw = pitch = roll = 0.

    Raises:
      ConfigError, DataError: both forms or half of one, wrong numbers, not rigid.
    """
    angles = _POSE_KEYS & set(content)
    if key in content or not angles:
        if angles:
            raise ConfigError(f"{where}: give either {key} or position with yaw, pitch, roll; both are there")
        if key not in content and key == "cam_to_ego":
            raise ConfigError(f"{where}: missing cam_to_ego (or position with yaw, pitch, roll)")
        return _transform(content.get(key, np.eye(4).tolist()), f"{where}, {key}")
    position = _numbers(content.get("position"), f"{where}, position")
    if position.shape != (3,) or not np.all(np.isfinite(position)):
        raise ConfigError(f"{where}: position = {content.get('position')}; expected [x, y, z] in metres")
    yaw, pitch, roll = (np.deg2rad(read_number(content, k, 0.0, where)) for k in ("yaw", "pitch", "roll"))
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    turn = np.array([[cy, -sy, 0.0], [sy, cy, 0.0], [0.0, 0.0, 1.0]])
    lift = np.array([[cp, 0.0, -sp], [0.0, 1.0, 0.0], [sp, 0.0, cp]])
    tilt = np.array([[1.0, 0.0, 0.0], [0.0, cr, -sr], [0.0, sr, cr]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn @ lift @ tilt @ axes, position
    return pose


def _transform(content: Any, where: str) -> np.ndarray:
    """[4, 4] from a 4x4 or 3x4 matrix, or from {quaternion: [w, x, y, z], translation: [x, y, z]}."""
    if isinstance(content, dict):
        check_keys(content, {"quaternion", "translation"}, {"quaternion", "translation"}, where)
        try:
            matrix = geometry.pose_matrix(content["quaternion"], content["translation"])
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    else:
        matrix = _numbers(content, where)
        if matrix.shape == (3, 4):
            matrix = np.concatenate([matrix, [[0.0, 0.0, 0.0, 1.0]]])
    geometry.check_rigid(matrix, where)
    return matrix


def _numbers(content: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(content, np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: expected a matrix of numbers, got {content} ({error})") from error

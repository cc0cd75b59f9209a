"""The description of a user's own rig: `rig.yaml` (docs/custom_data.md has the format)."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.plan import suggest
from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError, DataError

_TOP_KEYS = {"name", "cameras", "lidar", "point_rule", "min_depth", "max_depth", "time_unit", "match", "tolerance_ms"}
_CAMERA_KEYS = {"image_size", "intrinsics", "distortion", "cam_to_ego", "images", "mask"}
_LIDAR_KEYS = {"sensor_to_ego", "bin_columns"}
TIME_UNITS = {"s": 10**6, "ms": 10**3, "us": 1, "ns": 10**-3}  # microseconds in one unit


@dataclasses.dataclass(frozen=True)
class RigCamera:
    """One camera of `rig.yaml`."""

    folder: str  # below --images
    native_size: tuple[int, int]
    intrinsics: np.ndarray  # [3, 3]
    cam_to_ego: np.ndarray  # [4, 4]
    mask: str | None


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
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"--rig={path}: cannot read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--rig={path}: broken YAML ({error})") from error
    _check_keys(content, _TOP_KEYS, {"cameras"}, str(path))
    lidar = content.get("lidar") or {}
    _check_keys(lidar, _LIDAR_KEYS, set(), f"{path}, lidar")
    if not isinstance(content["cameras"], dict) or not content["cameras"]:
        raise ConfigError(f"{path}: cameras must be a list of `name: {{...}}` entries")
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
            cameras={str(n): _camera(str(n), c, path) for n, c in content["cameras"].items()},
            sensor_to_ego=_transform(lidar.get("sensor_to_ego", np.eye(4).tolist()), f"{path}, lidar, sensor_to_ego"),
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


def _check_keys(content: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected `key: value` entries")
    for key in content:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{suggest(str(key), known)}")
    if missing := sorted(needed - set(content)):
        raise ConfigError(f"{where}: missing {', '.join(missing)}")


def _camera(name: str, content: Any, path: Path) -> RigCamera:
    where = f"{path}, camera {name}"
    _check_keys(content, _CAMERA_KEYS, {"image_size", "intrinsics", "cam_to_ego"}, where)
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
    k = content["intrinsics"]
    if isinstance(k, dict):
        _check_keys(k, {"fx", "fy", "cx", "cy"}, {"fx", "fy", "cx", "cy"}, f"{where}, intrinsics")
        k = [[k["fx"], 0.0, k["cx"]], [0.0, k["fy"], k["cy"]], [0.0, 0.0, 1.0]]
    matrix = _numbers(k, f"{where}, intrinsics")
    geometry.check_intrinsics(matrix, f"{where}, intrinsics")
    size = content["image_size"]
    if not isinstance(size, list) or len(size) != 2 or any(not isinstance(x, int) or x < 1 for x in size):
        raise ConfigError(f"{where}: image_size = {size}; expected [height, width]")
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
        cam_to_ego=_transform(content["cam_to_ego"], f"{where}, cam_to_ego"),
        mask=str(path.parent / mask) if mask else None,
    )


def _transform(content: Any, where: str) -> np.ndarray:
    """[4, 4] from a 4x4 or 3x4 matrix, or from {quaternion: [w, x, y, z], translation: [x, y, z]}."""
    if isinstance(content, dict):
        _check_keys(content, {"quaternion", "translation"}, {"quaternion", "translation"}, where)
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

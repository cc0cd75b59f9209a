"""The description of a user's own rig: `rig.yaml`, and the ego poses beside it (docs/custom_data.md has the format)."""

import csv
import dataclasses
import json
from collections.abc import Iterable
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
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--rig={path}: cannot read ({error.strerror})") from error
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
        return Rig(
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
    lens = np.asarray(content.get("distortion") or [0.0], np.float64)
    if np.any(lens != 0):
        raise DataError(
            f"{where}: lens distortion {lens.tolist()}, but records hold pinhole images; undistort the images once with"
            " cv2.undistort(image, K, distortion, None, K_new), K_new from cv2.getOptimalNewCameraMatrix"
            " (cv2.fisheye.undistortImage for fisheye lenses), then write K_new here and leave distortion out"
        )
    k = content["intrinsics"]
    if isinstance(k, dict):
        _check_keys(k, {"fx", "fy", "cx", "cy"}, {"fx", "fy", "cx", "cy"}, f"{where}, intrinsics")
        k = [[k["fx"], 0.0, k["cx"]], [0.0, k["fy"], k["cy"]], [0.0, 0.0, 1.0]]
    matrix = np.asarray(k, np.float64)
    geometry.check_intrinsics(matrix, f"{where}, intrinsics")
    size = content["image_size"]
    if not isinstance(size, list) or len(size) != 2 or any(not isinstance(x, int) or x < 1 for x in size):
        raise ConfigError(f"{where}: image_size = {size}; expected [height, width]")
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
        if len(content["translation"]) != 3:
            raise ConfigError(f"{where}: translation needs three numbers, got {content['translation']}")
        matrix = geometry.pose_matrix(content["quaternion"], content["translation"])
    else:
        matrix = np.asarray(content, np.float64)
        if matrix.shape == (3, 4):
            matrix = np.concatenate([matrix, [[0.0, 0.0, 0.0, 1.0]]])
    geometry.check_rigid(matrix, where)
    return matrix


class Poses:
    """ego_to_global over time: exact rows, or between two rows by slerp and linear interpolation.

    Rows may name a sensor (a camera or `lidar`): those are used for this sensor only, and before the others.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], where: str):
        self.where = where
        tables: dict[str, dict[int, np.ndarray]] = {}
        for number, row in enumerate(rows, 1):
            try:
                values = [float(row[k]) for k in ("qw", "qx", "qy", "qz", "x", "y", "z")]
                time = int(row["timestamp_us"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{where}, row {number}: expected timestamp_us,x,y,z,qw,qx,qy,qz (and sensor), problem: {error}"
                ) from error
            if not np.all(np.isfinite(values)):
                raise DataError(f"{where}, row {number}: numbers that are not finite")
            tables.setdefault(str(row.get("sensor") or ""), {})[time] = geometry.pose_matrix(values[:4], values[4:])
        if not tables:
            raise DataError(f"{where}: holds no pose")
        self._tables = {name: (np.array(sorted(t)), [t[k] for k in sorted(t)]) for name, t in tables.items()}

    def at(self, sensor: str, time_us: int) -> np.ndarray:
        """ego_to_global [4, 4] of a sensor's time; `DataError` outside the rows' range."""
        if not ("" in self._tables or sensor in self._tables):
            raise DataError(f"{self.where}: no rows for sensor {sensor!r}")
        times, poses = self._tables.get(sensor) or self._tables[""]
        after = int(np.searchsorted(times, time_us))
        if after < len(times) and times[after] == time_us:
            return poses[after]
        if after == 0 or after == len(times):
            raise DataError(
                f"{self.where}: no pose at {time_us} us for {sensor!r}; rows reach from {times[0]} to {times[-1]}"
            )
        share = (time_us - times[after - 1]) / (times[after] - times[after - 1])
        return interpolate(poses[after - 1], poses[after], float(share))


def interpolate(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Pose [4, 4] between two: constant turn (slerp) and straight, even motion."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_matrix(first[:3, :3].T @ second[:3, :3]).as_rotvec()
    result = np.eye(4)
    result[:3, :3] = first[:3, :3] @ Rotation.from_rotvec(share * turn).as_matrix()
    result[:3, 3] = (1 - share) * first[:3, 3] + share * second[:3, 3]
    return result


def read_poses(path: str | Path) -> Poses:
    """Poses of a .csv with a header line, or of a .json list of the same rows."""
    path = Path(path)
    try:
        text = path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    except OSError as error:
        raise ConfigError(f"--poses={path}: cannot read ({error.strerror})") from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: broken file ({error})") from error
    return Poses(rows, str(path))

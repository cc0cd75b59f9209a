"""Reader of the DGP dataset format (DDAD): dataset json -> scene json -> samples -> datums, calibration and poses.

Meaning of the numbers, checked on recorded data: a datum's pose is its SENSOR's pose in the world at the datum's own
time (sensor -> world); an extrinsic is sensor -> vehicle. The LiDAR's extrinsic is the identity, so its points already
are in the vehicle frame (x forward, y left, z up).
"""

import dataclasses
import datetime
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import rendered
from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError, DataError

SPLITS = {"train": 0, "val": 1, "test": 2, "train_overfit": 3}
_PINHOLE = {"fx", "fy", "cx", "cy", "skew", "fov"}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Static calibration of one sensor."""

    intrinsics: np.ndarray  # [3, 3]
    sensor_to_ego: np.ndarray  # [4, 4]


@dataclasses.dataclass(frozen=True)
class Datum:
    """One file of one sensor."""

    name: str
    kind: str  # "image" | "point_cloud"
    path: Path
    sensor_to_global: np.ndarray  # [4, 4]
    timestamp_us: int
    native_size: tuple[int, int]  # (height, width), images only


@dataclasses.dataclass(frozen=True)
class Sample:
    """Datums of one moment by sensor name, and where their calibration lies."""

    datums: dict[str, Datum]
    calibration: Path


def read_json(path: Path) -> Any:
    """A json file's content; `DataError` naming it where it is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: missing ({error.strerror}); is the dataset unpacked completely?") from error
    except ValueError as error:
        raise DataError(f"{path}: broken json ({error}); unpack this file again") from error


def scene_files(dataset_json: str | Path) -> dict[str, list[Path]]:
    """Scene files of each split: {split name: paths}.

    Raises:
      ConfigError: the file is not there. DataError: it is broken or not a DGP dataset.
    """
    path = Path(dataset_json)
    if not path.is_file():
        raise ConfigError(f"--json={path}: no such file; {rendered.advice(path.parent) or 'expected a ddad.json'}")
    content = read_json(path)
    try:
        splits = content["scene_splits"]
        return {
            name: [path.parent / f for f in splits.get(str(key), splits.get(name, {})).get("filenames", [])]
            for name, key in SPLITS.items()
        }
    except (KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not a DGP dataset (no scene_splits with filenames)") from error


def pose(message: dict) -> np.ndarray:
    """Transform [4, 4] of a DGP pose; numbers that json left out are 0, as in protobuf."""
    rotation, translation = message.get("rotation", {}), message.get("translation", {})
    return geometry.pose_matrix(
        [float(rotation.get(k, 0.0)) for k in ("qw", "qx", "qy", "qz")], [float(translation.get(k, 0.0)) for k in "xyz"]
    )


def _pose_of(message: dict, where: str) -> np.ndarray:
    try:
        return pose(message)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def timestamp_us(text: str) -> int:
    """Microseconds since 1970 of an RFC 3339 time like 2019-05-01T10:00:00.0279Z (digits past the sixth dropped)."""
    head, _, fraction = text.rstrip("Z").partition(".")
    moment = datetime.datetime.fromisoformat(head).replace(tzinfo=datetime.UTC)
    return round(moment.timestamp()) * 1_000_000 + int((fraction + "000000")[:6])


@functools.lru_cache(maxsize=4)
def read_scene(path: Path) -> list[Sample]:
    """Samples of a scene in recorded order.

    Raises:
      DataError: the file is missing or broken, or a sample refers to a datum that is not there.
    """
    scene = read_json(path)
    try:
        datums = {d["key"]: d for d in scene["data"]}
        samples = []
        for sample in scene["samples"]:
            missing = [k for k in sample["datum_keys"] if k not in datums]
            if missing:
                raise DataError(
                    f"{path}: a sample refers to datum {missing[0]}, which is not in the scene; unpack this file again"
                )
            read = [_datum(datums[k], path.parent) for k in sample["datum_keys"]]
            calibration = path.parent / "calibration" / f"{sample['calibration_key']}.json"
            samples.append(Sample({d.name: d for d in read if d is not None}, calibration))
        return samples
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a DGP scene ({type(error).__name__}: {error}); unpack this file again") from error


def _datum(message: dict, folder: Path) -> Datum | None:
    """A camera image or a point cloud; None for other kinds, e.g. radar."""
    for kind in ("image", "point_cloud"):
        if kind in message["datum"]:
            content = message["datum"][kind]
            size = (int(content.get("height", 0)), int(content.get("width", 0)))
            name, time = message["id"]["name"], timestamp_us(message["id"]["timestamp"])
            sensor_to_global = _pose_of(content["pose"], f"{folder}, datum {message['key']} of {name}")
            return Datum(name, kind, folder / content["filename"], sensor_to_global, time, size)
    return None


@functools.lru_cache(maxsize=64)
def read_calibration(path: Path) -> dict[str, Calibration]:
    """Calibration of every sensor by name.

    Raises:
      DataError: missing or broken, or a camera has lens distortion.
    """
    content = read_json(path)
    try:
        result = {}
        for name, k, extrinsic in zip(content["names"], content["intrinsics"], content["extrinsics"], strict=True):
            lens = {key: v for key, v in k.items() if key not in _PINHOLE and isinstance(v, (int, float)) and v != 0}
            if lens:
                raise DataError(
                    f"{path}: camera {name} has lens distortion {lens};"
                    " undistort its images first (docs/custom_data.md)"
                )
            values = {key: float(k.get(key, 0.0)) for key in ("fx", "fy", "cx", "cy", "skew")}
            matrix = np.array(
                [[values["fx"], values["skew"], values["cx"]], [0.0, values["fy"], values["cy"]], [0.0, 0.0, 1.0]]
            )
            result[name] = Calibration(matrix, _pose_of(extrinsic, f"{path}, extrinsics of {name}"))
        return result
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: not a DGP calibration ({type(error).__name__}: {error}); unpack this file again"
        ) from error

"""Ego poses of a user's own rig: `poses.csv` or `poses.json` (docs/custom_data.md has the format)."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError, DataError

MAX_GAP_US = 1_000_000  # between two rows: a car turns and brakes within a second, a straight line would be a guess


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
            try:
                pose = geometry.pose_matrix(values[:4], values[4:])
            except DataError as error:
                raise DataError(f"{where}, row {number}: {error}") from error
            tables.setdefault(str(row.get("sensor") or ""), {})[time] = pose
        if not tables:
            raise DataError(f"{where}: holds no pose")
        self._tables = {name: (np.array(sorted(t)), [t[k] for k in sorted(t)]) for name, t in tables.items()}

    def at(self, sensor: str, time_us: int) -> np.ndarray:
        """ego_to_global [4, 4] of a sensor's time; `DataError` outside the rows and in gaps over `MAX_GAP_US`."""
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
        if times[after] - times[after - 1] > MAX_GAP_US:
            raise DataError(
                f"{self.where}: no pose near {time_us} us for {sensor!r}: the rows around it are"
                f" {(times[after] - times[after - 1]) / 1e6:.1f} s apart, at most {MAX_GAP_US / 1e6:g} s are bridged"
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
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    except OSError as error:
        raise ConfigError(f"--poses={path}: cannot read ({error.strerror})") from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: broken file ({error})") from error
    return Poses(rows, str(path))

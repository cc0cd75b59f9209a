"""Rendered scenes in the nuScenes format, version v1.0-trainval with the official scene names: the devkit opens it.

The official split lists then select the right scenes. Log and scenes say that they are rendered.
"""

import io
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.nuscenes import load_devkit
from data_prep.rendered import NUSCENES_LOCATION, NUSCENES_VERSION
from data_prep.world.drive import Cloud, Drive
from data_prep.world.output import Job, SceneWriter, quaternion, token, write
from data_prep.world.rigs import Rig
from fsmde_jax.errors import ConfigError

VERSION = NUSCENES_VERSION
LIDAR = "LIDAR_TOP"
_EMPTY = ("category", "attribute", "visibility", "instance", "sample_annotation")


def scene_names(split: str, count: int) -> list[str]:
    """Names of the first `count` scenes of a split: official ones, so that the devkit's split lists select them.

    Raises:
      ConfigError: the devkit is missing, or the split has fewer scenes.
    """
    official = load_devkit()[1]()[split]
    if count > len(official):
        raise ConfigError(
            f"nuScenes names {len(official)} {split} scenes, {count} are asked for; render further ones with another"
            " --seed into another --out"
        )
    return list(official[:count])


def _posed(pose: np.ndarray) -> dict[str, list[float]]:
    return {"rotation": quaternion(pose), "translation": pose[:3, 3].tolist()}


class NuscenesScene(SceneWriter):
    """Files of one scene below samples/, sweeps/ and dense_depth/, and its rows of the tables."""

    def __init__(self, job: Job, rig: Rig):
        super().__init__(job, rig)
        self.samples: list[dict] = []
        self.poses: list[dict] = []
        self.chains: dict[str, list[dict]] = {name: [] for name in (*rig.cameras, LIDAR)}

    def keyframe(self, drive: Drive, number: int) -> None:
        """See `SceneWriter`."""
        pictures, cloud = drive.keyframe(number)
        sample = token(self._name(), number)
        self.samples.append({"token": sample, "timestamp": self.job.start_us + cloud.time_us})
        for name, picture in pictures.items():
            path = self._file("samples", name, picture.time_us, "jpg")
            self.write_picture(picture, path, self.job.out, name)
            self._add(name, sample, picture.time_us, picture.ego_to_global, path, self.rig.cameras[name].size, True)
        self._cloud(cloud, sample, True)
        total, asked = self.rig.sweeps_per_keyframe, self.job.look.sweeps_between
        if number + 1 < self.job.look.frames:
            for i in range(1, asked + 1):
                step = round(i * total / (asked + 1)) / self.rig.lidar.rate
                self._cloud(drive.sweep(cloud.time_us + round(step * 1e6)), sample, False)

    def finish(self) -> dict[str, list[dict]]:
        """See `SceneWriter`."""
        for rows in (self.samples, *self.chains.values()):
            for row in rows:
                row |= {"prev": "", "next": ""}
            for first, second in itertools.pairwise(rows):
                first["next"], second["prev"] = second["token"], first["token"]
        scene = token(self._name())
        for row in self.samples:
            row["scene_token"] = scene
        ends = {"first_sample_token": self.samples[0]["token"], "last_sample_token": self.samples[-1]["token"]}
        texts = {"name": self.job.name, "description": self.job.description}
        row = {"token": scene, "log_token": _log_token(self.job.look.seed), "nbr_samples": len(self.samples)}
        return {
            "scene": [{**row, **ends, **texts}],
            "sample": self.samples,
            "sample_data": [row for rows in self.chains.values() for row in rows],
            "ego_pose": self.poses,
        } | ({"calibrated_sensor": _calibration(self.rig, self._name())} if self.job.look.vary_rig else {})

    def _name(self) -> str:
        return f"{self.job.look.seed}/{self.job.name}"

    def _file(self, folder: str, sensor: str, time_us: int, suffix: str) -> Path:
        return self.job.out / folder / sensor / f"world__{sensor}__{self.job.start_us + time_us}.{suffix}"

    def _cloud(self, cloud: Cloud, sample: str, key: bool) -> None:
        path = self._file("samples" if key else "sweeps", LIDAR, cloud.time_us, "pcd.bin")
        intensity = np.rint(cloud.intensity * 255)
        self.write(path, np.column_stack([cloud.points, intensity, cloud.ring]).astype("<f4").tobytes())
        self._add(LIDAR, sample, cloud.time_us, cloud.ego_to_global, path, (0, 0), key)

    def _add(
        self, sensor: str, sample: str, time_us: int, pose: np.ndarray, path: Path, size: tuple[int, int], key: bool
    ) -> None:
        row, stamp = token(self._name(), sensor, time_us), self.job.start_us + time_us
        rig = [self._name()] if self.job.look.vary_rig else []
        self.poses.append({"token": row, "timestamp": stamp, **_posed(pose)})
        self.chains[sensor].append({
            "token": row, "sample_token": sample, "ego_pose_token": row, "timestamp": stamp, "is_key_frame": key,
            "calibrated_sensor_token": token("calibration", *rig, sensor), "height": size[0], "width": size[1],
            "fileformat": "pcd" if sensor == LIDAR else "jpg", "filename": path.relative_to(self.job.out).as_posix(),
        })  # fmt: skip


def _log_token(seed: int) -> str:
    return token("log", seed)


def _calibration(rig: Rig, *scene: str) -> list[dict]:
    """Rows of calibrated_sensor: of one scene, or of all."""
    sensors: dict[str, tuple] = {name: (c.cam_to_ego, c.intrinsics.tolist()) for name, c in rig.cameras.items()}
    sensors[LIDAR] = (rig.lidar.sensor_to_ego, [])
    return [
        {
            "token": token("calibration", *scene, name), "sensor_token": token("sensor", name), **_posed(pose),
            "camera_intrinsic": intrinsics,
        }
        for name, (pose, intrinsics) in sensors.items()
    ]  # fmt: skip


def write_tables(out: Path, rig: Rig, seed: int, scenes: list[Any]) -> None:
    """The 13 tables from all scenes' rows; the folder appears under its name when it is whole."""
    log = {"token": _log_token(seed), "logfile": f"rendered world, seed {seed}", "vehicle": f"rig {rig.name}"}
    map_file = f"maps/{token('map')}.png"
    tables: dict[str, list[dict]] = {name: [] for name in _EMPTY}
    tables["log"] = [{**log, "date_captured": "2020-09-13", "location": NUSCENES_LOCATION}]
    tables["map"] = [
        {"token": token("map"), "log_tokens": [log["token"]], "category": "semantic_prior", "filename": map_file}
    ]
    tables["sensor"] = [
        {"token": token("sensor", name), "channel": name, "modality": "lidar" if name == LIDAR else "camera"}
        for name in (*rig.cameras, LIDAR)
    ]
    own = [row for scene in scenes for row in scene.get("calibrated_sensor", ())]
    tables["calibrated_sensor"] = own or _calibration(rig)
    for name in ("scene", "sample", "sample_data", "ego_pose"):
        tables[name] = [row for scene in scenes for row in scene[name]]
    picture = io.BytesIO()
    Image.new("L", (64, 64), 255).save(picture, "PNG")  # the devkit insists on a map's picture; it says nothing
    write(out / map_file, picture.getvalue())
    unfinished = out / f"{VERSION}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, table in tables.items():
        write(unfinished / f"{name}.json", json.dumps(table, indent=0).encode())
    shutil.rmtree(out / VERSION, ignore_errors=True)
    unfinished.rename(out / VERSION)

"""Rendered scenes in the DGP format, as DDAD is published: ddad.json, scenes, and masks of the car's own body."""

import datetime
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.rendered import DGP_INDEX, DGP_NAME
from data_prep.world.drive import Drive, body_masks
from data_prep.world.output import Job, SceneWriter, quaternion, token, write
from data_prep.world.rigs import Rig
from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError

LIDAR = "LIDAR"
INDEX = DGP_INDEX
MASKS = "masks"
_VAL_FROM = 500_000  # numbers of scenes: train from 0, val from here


def scene_names(split: str, count: int) -> list[str]:
    """Names of the first `count` scenes of a split: numbers of six digits, as DDAD's.

    Raises:
      ConfigError: more than the numbers hold.
    """
    if count > _VAL_FROM:
        raise ConfigError(f"{count} {split} scenes: at most {_VAL_FROM}")
    return [f"{(_VAL_FROM if split == 'val' else 0) + i:06d}" for i in range(count)]


def _pose(matrix: np.ndarray) -> dict[str, dict[str, float]]:
    rotation = dict(zip(("qw", "qx", "qy", "qz"), quaternion(matrix), strict=True))
    return {"rotation": rotation, "translation": dict(zip("xyz", matrix[:3, 3].tolist(), strict=True))}


def _stamp(time_us: int) -> str:
    moment = datetime.datetime.fromtimestamp(time_us // 1_000_000, datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_us % 1_000_000:06d}Z"


def _calibration(rig: Rig) -> tuple[str, bytes]:
    """Key and json of a rig's calibration. Points are written in the vehicle frame, so the LiDAR's is the identity."""
    names = [LIDAR, *rig.cameras]
    poses = [np.eye(4), *(c.cam_to_ego for c in rig.cameras.values())]
    matrices = [np.zeros((3, 3)), *(c.intrinsics for c in rig.cameras.values())]
    rows = [{"fx": k[0, 0], "fy": k[1, 1], "cx": k[0, 2], "cy": k[1, 2], "skew": k[0, 1], "fov": 0.0} for k in matrices]
    content = {"names": names, "extrinsics": [_pose(p) for p in poses], "intrinsics": rows}
    data = json.dumps(content).encode()
    return token(data), data


class DgpScene(SceneWriter):
    """Folder of one scene."""

    def __init__(self, job: Job, rig: Rig):
        super().__init__(job, rig)
        self.folder = job.out / job.name
        self.data: list[dict] = []
        self.samples: list[dict] = []
        self.calibration, content = _calibration(rig)
        self.write(self.folder / "calibration" / f"{self.calibration}.json", content)

    def keyframe(self, drive: Drive, number: int) -> None:
        """See `SceneWriter`."""
        pictures, cloud = drive.keyframe(number)
        points = geometry.transform_points(self.rig.lidar.sensor_to_ego, cloud.points.astype(np.float64))
        path = self.folder / "point_cloud" / LIDAR / f"{self.job.start_us + cloud.time_us}.npz"
        content = io.BytesIO()
        np.savez_compressed(content, data=np.column_stack([points, cloud.intensity]).astype(np.float32))
        self.write(path, content.getvalue())
        fields: dict[str, Any] = {"point_format": ["X", "Y", "Z", "INTENSITY"], "point_fields": []}
        keys = [self._add("point_cloud", LIDAR, number, cloud.time_us, path, cloud.ego_to_global, fields)]
        for name, picture in pictures.items():
            camera = self.rig.cameras[name]
            path = self.folder / "rgb" / name / f"{self.job.start_us + picture.time_us}.jpg"
            self.write_picture(picture, path, self.folder, name)
            fields = {"height": camera.size[0], "width": camera.size[1], "channels": 3}
            pose = picture.ego_to_global @ camera.cam_to_ego
            keys.append(self._add("image", name, number, picture.time_us, path, pose, fields))
        identity = self._identity("", number, cloud.time_us)
        self.samples.append({"id": identity, "datum_keys": keys, "calibration_key": self.calibration, "metadata": {}})

    def finish(self) -> dict[str, str]:
        """See `SceneWriter`; writes the scene's json."""
        content = {
            "name": self.job.name, "description": self.job.description, "log": "rendered world", "metadata": {},
            "ontologies": {}, "data": self.data, "samples": self.samples,
        }  # fmt: skip
        name = f"scene_{token(self.job.look.seed, self.job.name)}.json"
        self.write(self.folder / name, json.dumps(content).encode())
        return {"split": self.job.split, "scene": self.job.name, "file": f"{self.job.name}/{name}"}

    def _identity(self, name: str, number: int, time_us: int) -> dict[str, str]:
        stamp = _stamp(self.job.start_us + time_us)
        return {"log": "rendered world", "name": name, "timestamp": stamp, "index": str(number)}

    def _add(
        self, kind: str, sensor: str, number: int, time_us: int, path: Path, pose: np.ndarray, fields: dict[str, Any]
    ) -> str:
        key = token(self.job.look.seed, self.job.name, sensor, number)
        content = {"filename": path.relative_to(self.folder).as_posix(), "pose": _pose(pose), "annotations": {}}
        row = {"datum": {kind: {**content, "metadata": {}, **fields}}, "id": self._identity(sensor, number, time_us)}
        before = token(self.job.look.seed, self.job.name, sensor, number - 1) if number else ""
        last = number + 1 == self.job.look.frames
        after = "" if last else token(self.job.look.seed, self.job.name, sensor, number + 1)
        self.data.append({"key": key, "prev_key": before, "next_key": after, **row})
        return key


def write_index(out: Path, rig: Rig, seed: int, scenes: list[Any]) -> None:
    """Masks, their table, and then ddad.json, which appears under its name when everything is there."""
    for name, mask in body_masks(rig).items():
        picture = io.BytesIO()
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(picture, "PNG")
        write(out / MASKS / "0" / f"{name}_mask.png", picture.getvalue())
    write(out / MASKS / "scene_to_set.json", json.dumps({row["scene"]: 0 for row in scenes}).encode())
    splits = {
        number: {"filenames": [row["file"] for row in scenes if row["split"] == split]}
        for number, split in (("0", "train"), ("1", "val"))
    }
    metadata = {"name": DGP_NAME, "version": f"rig {rig.name}, seed {seed}", "creator": "data_prep.world"}
    unfinished = out / f"{INDEX}.tmp"
    write(unfinished, json.dumps({"metadata": metadata, "scene_splits": splits}, indent=1).encode())
    os.replace(unfinished, out / INDEX)

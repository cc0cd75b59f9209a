"""Textured boxes along a street, ray-cast exactly in float64, as a nuScenes-format folder: a quick fixture of tests.

It shares no code with data_prep.world. scene-0061 is in mini_train and scene-0103 in mini_val. Every sensor is cast at
its own time from a moving car, so ego motion matters as it should.
"""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.images import encode_jpeg
from fsmde_jax import geometry

# Yaw (degrees, left positive), fx / width, position in the ego frame (metres), delay against the LiDAR (microseconds).
NUSCENES_CAMERAS = {
    "CAM_FRONT": (0.0, 0.79, (1.70, 0.02, 1.51), -35_000),
    "CAM_FRONT_LEFT": (55.0, 0.79, (1.52, 0.49, 1.51), -43_000),
    "CAM_BACK_LEFT": (110.0, 0.79, (1.04, 0.48, 1.56), -1_000),
    "CAM_BACK": (180.0, 0.506, (0.03, 0.0, 1.57), -10_000),
    "CAM_BACK_RIGHT": (-110.0, 0.79, (1.01, -0.48, 1.56), -20_000),
    "CAM_FRONT_RIGHT": (-55.0, 0.79, (1.55, -0.49, 1.50), -28_000),
}
LIDAR_TO_EGO = geometry.pose_matrix([np.sqrt(0.5), 0.0, 0.0, -np.sqrt(0.5)], [0.94, 0.0, 1.84])
START_US = 1_532_402_927_000_000
FRAME_US = 500_000  # 2 Hz keyframes
_SCENES = (("scene-0061", 0), ("scene-0103", 1))  # name, seed


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Axis-aligned boxes on the ground z = 0: corners [M, 2, 3] metres and base colours [M, 3] in 0..1."""

    corners: np.ndarray
    colours: np.ndarray


def make_street(seed: int) -> Boxes:
    """Houses on both sides of a street along +x, and parked boxes at its edge."""
    rng = np.random.default_rng(seed)
    corners = []
    for side in (-1.0, 1.0):
        for x in np.arange(-50.0, 90.0, 17.0):
            inner, depth = rng.uniform(9, 14), rng.uniform(6, 12)
            y = sorted((side * inner, side * (inner + depth)))
            corners.append([[x, y[0], 0.0], [x + rng.uniform(9, 15), y[1], rng.uniform(5, 14)]])
        for x in np.arange(-30.0, 70.0, 13.0) + rng.uniform(0, 8):
            y = sorted((side * 4.5, side * 6.5))
            corners.append([[x, y[0], 0.0], [x + rng.uniform(2, 5), y[1], rng.uniform(1.2, 2.6)]])
    return Boxes(np.array(corners), rng.uniform(0.25, 0.9, (len(corners), 3)))


def ego_pose(time_us: int) -> np.ndarray:
    """ego_to_global [4, 4] at a time since the scene's start: 6 m/s along +x with a slight weave."""
    t = time_us * 1e-6
    yaw = 0.05 * np.sin(0.8 * t)
    return geometry.pose_matrix([np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)], [411.3 + 6.0 * t, 1180.9, 0.0])


def camera_pose(yaw_degrees: float, position: tuple[float, float, float]) -> np.ndarray:
    """cam_to_ego [4, 4] of a level camera; yaw 0 looks forward, positive to the left."""
    yaw = np.deg2rad(yaw_degrees)
    pose = np.eye(4)
    pose[:3, 0] = [np.sin(yaw), -np.cos(yaw), 0.0]  # image right
    pose[:3, 1] = [0.0, 0.0, -1.0]  # image down
    pose[:3, 2] = [np.cos(yaw), np.sin(yaw), 0.0]
    pose[:3, 3] = position
    return pose


def intrinsics(focal_fraction: float, size: tuple[int, int]) -> np.ndarray:
    """Pinhole matrix [3, 3] at (height, width) with fx = fy = focal_fraction * width."""
    focal = focal_fraction * size[1]
    return np.array([[focal, 0.0, (size[1] - 1) / 2], [0.0, focal, (size[0] - 1) / 2 + 3.0], [0.0, 0.0, 1.0]])


def cast(street: Boxes, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First hits of rays from one point (street coordinates; the ground is z = 0).

    Args:
      origin: [3]; directions: [P, 3], of any length.

    Returns:
      t [P] in lengths of the direction (inf = sky), which [P] box index (-1 ground), axis [P] of the face's normal.
    """
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1.0 / directions
        t = np.where(directions[:, 2] < -1e-9, -origin[2] * inverse[:, 2], np.inf)
        which, axis = np.full(len(t), -1), np.full(len(t), 2)
        for index, (low, high) in enumerate(street.corners):
            centre, radius = (low + high) / 2 - origin, float(np.linalg.norm(high - low)) / 2
            distance = max(float(np.linalg.norm(centre)), radius)
            cone = np.sqrt(1 - (radius / distance) ** 2) if distance > radius else -1.0
            rays = np.flatnonzero(unit @ (centre / distance) >= cone - 1e-9)  # only these can meet the bounding sphere
            near, far = (low - origin) * inverse[rays], (high - origin) * inverse[rays]
            enter = np.nan_to_num(np.minimum(near, far), nan=-np.inf)
            entry, leave = enter.max(1), np.nan_to_num(np.maximum(near, far), nan=np.inf).min(1)
            hit = (entry > 0) & (entry < leave) & (entry < t[rays])
            t[rays[hit]], which[rays[hit]], axis[rays[hit]] = entry[hit], index, enter[hit].argmax(1)
    return t, which, axis


def street_from_global() -> np.ndarray:
    """[4, 4]: the street's origin lies at the first ego position."""
    return geometry.invert_rigid(geometry.pose_matrix([1.0, 0.0, 0.0, 0.0], ego_pose(0)[:3, 3]))


def render(
    street: Boxes, cam_to_global: np.ndarray, k: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Image [H, W, 3] uint8 and exact z-depth [H, W] float64 (inf = sky) of a camera."""
    v, u = np.mgrid[: size[0], : size[1]].astype(np.float64)
    rays = geometry.unproject(k, np.stack([u.ravel(), v.ravel()], -1), np.ones(u.size))  # z = 1: t is the z-depth
    cam_to_street = street_from_global() @ cam_to_global
    directions = rays @ cam_to_street[:3, :3].T
    t, which, axis = cast(street, cam_to_street[:3, 3], directions)
    seen = np.isfinite(t)
    hit = np.where(seen, t, 0.0)[:, None] * directions + cam_to_street[:3, 3]
    checks = (np.floor(hit / 1.5 + 1e-6).astype(np.int64).sum(1) % 2)[:, None]
    base = np.where((which >= 0)[:, None], street.colours[which], [0.42, 0.42, 0.44])
    shade = np.array([0.75, 1.0, 0.9])[axis][:, None] * (0.72 + 0.28 * checks)
    haze = np.exp(-np.where(seen, t, 0.0) / 150.0)[:, None]
    up = np.clip(directions[:, 2:] / np.linalg.norm(directions, axis=1, keepdims=True), 0, 1)
    sky = np.array([0.75, 0.85, 0.97]) - up * np.array([0.45, 0.3, 0.1])
    colour = np.where(seen[:, None], base * shade * haze + sky * (1 - haze), sky)
    return (colour * 255).round().astype(np.uint8).reshape(*size, 3), t.reshape(size)


def sweep(street: Boxes, sensor_to_global: np.ndarray, beams: int = 32, columns: int = 900) -> np.ndarray:
    """One LiDAR revolution: hits [P, 3] float64 in the sensor's frame, up to 100 m."""
    elevation, azimuth = np.meshgrid(np.deg2rad(np.linspace(-30, 10, beams)), np.linspace(0, 2 * np.pi, columns, False))
    rays = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], -1)
    rays = rays.reshape(-1, 3)
    pose = street_from_global() @ sensor_to_global
    t = cast(street, pose[:3, 3], rays @ pose[:3, :3].T)[0]
    return rays[t < 100.0] * t[t < 100.0, None]


def _token(*parts: Any) -> str:
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


def _posed(matrix: np.ndarray) -> dict[str, list[float]]:
    from pyquaternion import Quaternion

    return {"rotation": list(Quaternion(matrix=matrix, atol=1e-6)), "translation": matrix[:3, 3].tolist()}


def write_nuscenes(
    out: str | Path, frames: tuple[int, int] = (8, 4), size: tuple[int, int] = (360, 640),
    cameras: dict[str, tuple] | None = None, beams: int = 32, columns: int = 900,
) -> None:  # fmt: skip
    """Writes a `v1.0-mini` dataroot: scene-0061 with frames[0] samples, scene-0103 with frames[1].

    One sweep that is not a keyframe lies between keyframes. `cameras` as `NUSCENES_CAMERAS` (the default).
    """
    out, cameras = Path(out), cameras or NUSCENES_CAMERAS
    (out / "v1.0-mini").mkdir(parents=True, exist_ok=True)
    names = "category attribute visibility instance sensor calibrated_sensor ego_pose scene sample sample_data"
    tables: dict[str, list[dict]] = {name: [] for name in (*names.split(), "sample_annotation")}
    tables["log"] = [
        {"token": _token("log"), "logfile": "boxes", "vehicle": "boxes", "date_captured": "", "location": "boxes"}
    ]
    tables["map"] = [
        {"token": _token("map"), "log_tokens": [_token("log")], "category": "", "filename": "v1.0-mini/scene.json"}
    ]
    calibrations: dict[str, tuple] = {
        name: (camera_pose(c[0], c[2]), intrinsics(c[1], size), c[3]) for name, c in cameras.items()
    }
    calibrations["LIDAR_TOP"] = (LIDAR_TO_EGO, None, 0)
    for name, (pose, k, _) in calibrations.items():
        modality = "lidar" if k is None else "camera"
        tables["sensor"].append({"token": _token("sensor", name), "channel": name, "modality": modality})
        row = {"token": _token("calibration", name), "sensor_token": _token("sensor", name), **_posed(pose)}
        tables["calibrated_sensor"].append({**row, "camera_intrinsic": [] if k is None else k.tolist()})
    for (scene, seed), count in zip(_SCENES, frames, strict=True):
        if count < 1:
            continue
        street = make_street(seed)
        tokens = [_token(scene, i) for i in range(count)]
        scene_row = {"token": _token(scene), "log_token": _token("log"), "nbr_samples": count, "name": scene}
        scene_row |= {"description": "boxes"}
        tables["scene"].append({**scene_row, "first_sample_token": tokens[0], "last_sample_token": tokens[-1]})
        chain: dict[str, list[dict]] = {name: [] for name in calibrations}
        for i in range(count):
            neighbours = {"prev": tokens[i - 1] if i else "", "next": tokens[i + 1] if i + 1 < count else ""}
            time_us = i * FRAME_US
            stamp = START_US + seed * 10**9 + time_us
            tables["sample"].append(
                {"token": tokens[i], "timestamp": stamp, "scene_token": _token(scene), **neighbours}
            )
            for name, (pose, k, delay) in calibrations.items():
                for between in (False, True) if k is None and i + 1 < count else (False,):
                    at = time_us + delay + (FRAME_US // 2 if between else 0)
                    folder = out / ("sweeps" if between else "samples") / name
                    folder.mkdir(parents=True, exist_ok=True)
                    path = folder / f"boxes__{name}__{START_US + seed * 10**9 + at}.{'pcd.bin' if k is None else 'jpg'}"
                    sensor_to_global = ego_pose(at) @ pose
                    if k is None:
                        points = sweep(street, sensor_to_global, beams, columns)
                        np.concatenate([points, np.zeros((len(points), 2))], 1).astype("<f4").tofile(path)
                    else:
                        path.write_bytes(encode_jpeg(render(street, sensor_to_global, k, size)[0], 95))
                    token = _token(scene, name, at)
                    moment = START_US + seed * 10**9 + at
                    tables["ego_pose"].append({"token": token, "timestamp": moment, **_posed(ego_pose(at))})
                    chain[name].append({
                        "token": token, "sample_token": tokens[i], "ego_pose_token": token, "timestamp": moment,
                        "calibrated_sensor_token": _token("calibration", name), "is_key_frame": not between,
                        "fileformat": path.suffix[1:], "height": size[0] if k is not None else 0,
                        "width": size[1] if k is not None else 0, "filename": str(path.relative_to(out)),
                        "prev": "", "next": "",
                    })  # fmt: skip
        for records in chain.values():
            for first, second in itertools.pairwise(records):
                first["next"], second["prev"] = second["token"], first["token"]
            tables["sample_data"] += records
    for name, table in tables.items():
        (out / "v1.0-mini" / f"{name}.json").write_text(json.dumps(table, indent=1))

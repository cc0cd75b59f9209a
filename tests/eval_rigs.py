"""Rendered-from-nothing rigs for the evaluation tests: world points of known identity, projected by plain formulas."""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np

from fsmde_jax.data import schema
from fsmde_jax.data.tfrecord import write_records

NAMES = ["FRONT", "FRONT_LEFT", "BACK_LEFT", "BACK", "BACK_RIGHT", "FRONT_RIGHT"]


def rig(seed=0, cameras=6, points=4000, native=(60, 100), stored=(30, 50), rule="round"):
    """(RigSample, ids): cameras with 90 degree views, each at its own time; ids[i] = world points of points[i]."""
    rng = np.random.default_rng(seed)
    angle, radius = rng.uniform(0, 2 * np.pi, points), np.exp(rng.uniform(np.log(1.5), np.log(120.0), points))
    world = np.stack(
        [radius * np.cos(angle), radius * np.sin(angle), rng.uniform(-0.25, 0.3, points) * radius + 1.0], -1
    )
    height, width = native
    k_native = np.array([[width / 2, 0, (width - 1) / 2], [0, width / 2, (height - 1) / 2], [0, 0, 1.0]])
    scale = np.array([stored[1] / width, stored[0] / height])
    k_stored = k_native.copy()
    k_stored[0, 0] *= scale[0]
    k_stored[1, 1] *= scale[1]
    k_stored[:2, 2] = (k_native[:2, 2] + 0.5) * scale - 0.5
    cam_to_ego, ego_to_global, uvz, ids = [], [], [], []
    for i in range(cameras):
        yaw = 2 * np.pi * i / cameras
        forward, left, up = [np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]
        extrinsic = np.eye(4)
        extrinsic[:3, :3] = np.stack([-np.array(left), -np.array(up), forward], -1)
        extrinsic[:3, 3] = np.array(forward) * 0.8 + [0.2, 0.0, 1.5]
        pose = np.eye(4)  # the car drives on and turns a little between the exposures
        turn = 0.01 * i
        pose[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        pose[:3, 3] = [0.15 * i, 0.02 * i, 0.0]
        extrinsic, pose = extrinsic.astype(np.float32), pose.astype(np.float32)
        camera = np.linalg.inv(pose.astype(float) @ extrinsic.astype(float))
        p = world @ camera[:3, :3].T + camera[:3, 3]
        with np.errstate(all="ignore"):
            uv = (p[:, :2] / p[:, 2:]) @ k_native[:2, :2].T + k_native[:2, 2]
        table = np.concatenate([uv, p[:, 2:]], 1).astype(np.float32)
        with np.errstate(invalid="ignore"):
            pixel = np.floor(table[:, :2] + np.float32(0.5)) if rule == "round" else np.floor(table[:, :2])
        inside = (table[:, 2] > 0) & (pixel >= 0).all(1) & (pixel < [width, height]).all(1)
        uvz.append(table[inside])
        ids.append(np.flatnonzero(inside))
        cam_to_ego.append(extrinsic)
        ego_to_global.append(pose)
    images = [cv2.imencode(".png", rng.integers(0, 256, (*stored, 3), np.uint8))[1].tobytes() for _ in range(cameras)]
    none = np.zeros((0, 3), np.float32)
    sample = schema.RigSample(
        sample_id=f"sample{seed}", scene="scene", timestamp_us=seed, camera_names=NAMES[:cameras], images=images,
        image_size=np.array([stored] * cameras), native_size=np.array([native] * cameras),
        intrinsics=np.array([k_stored] * cameras, np.float32), cam_to_ego=np.array(cam_to_ego),
        ego_to_global=np.array(ego_to_global), global_origin=np.zeros(3, np.int64),
        camera_timestamps_us=np.zeros(cameras, np.int64), points=uvz, extra_points=[none] * cameras,
        ego_masks=[b""] * cameras, dense_depth=[b""] * cameras,
    )  # fmt: skip
    return sample, ids


def write_folder(folder: Path, samples, **changes) -> Path:
    """A records folder with the samples, in one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "fsmde_rig-val.tfrecord-00000-of-00001"
    write_records(folder / name, [schema.encode(s) for s in samples])
    manifest = schema.Manifest(
        format_version=schema.FORMAT_VERSION, dataset="folder", source_version="1", split="val", complete_split=False,
        num_samples=len(samples),
        shards=[{"name": name, "num_records": len(samples), "num_bytes": (folder / name).stat().st_size, "sha256": ""}],
        cameras=list(samples[0].camera_names), point_rule="round", sweeps=0, image_size=None, dense_depth=False,
        min_depth=0.1, max_depth=80.0, focal_by_width=[0.5, 0.5], scenes=["scene"], options={}, skipped=[],
        statistics={}, fingerprint=f"print of {folder.name}",
    )  # fmt: skip
    manifest = dataclasses.replace(manifest, **changes)
    (folder / schema.MANIFEST_NAME).write_text(json.dumps(dataclasses.asdict(manifest)))
    return folder

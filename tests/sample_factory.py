"""Small rigs for tests: smooth random images, a ring of cameras, LiDAR points that agree with the calibration."""

import dataclasses
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np

from fsmde_jax.data import schema, tfrecord

RING_NAMES = {
    3: ["FRONT", "BACK_LEFT", "BACK_RIGHT"],
    6: ["FRONT", "FRONT_LEFT", "BACK_LEFT", "BACK", "BACK_RIGHT", "FRONT_RIGHT"],
}


def ring_cam_to_ego(cameras: int) -> np.ndarray:
    """Extrinsics [N, 4, 4] of cameras on a circle, camera 0 forward, anticlockwise; slightly pitched."""
    result = np.tile(np.eye(4), (cameras, 1, 1))
    forward = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # columns: camera axes in the ego frame
    for i in range(cameras):
        yaw = 2 * np.pi * i / cameras
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        pitch = 0.02 * (i % 3)
        tilt = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
        result[i, :3, :3] = turn @ forward @ tilt
        result[i, :3, 3] = turn @ [0.8, 0.0, 0.0] + [1.0, 0.0, 1.5]
    return result


def smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8 without sharp edges, so that JPEG and resizing change it little."""
    coarse = rng.uniform(0, 255, (5, 7, 3)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR), 0, 255).astype(np.uint8)


@dataclasses.dataclass
class Rig:
    """A sample and the truth behind it: `cloud` [P, 3] in the ego frame, `pixels` the uncompressed images."""

    sample: schema.RigSample
    cloud: np.ndarray
    pixels: list[np.ndarray]


def make_rig(
    seed: int = 0,
    *,
    cameras: int = 6,
    native_size: tuple[int, int] = (90, 160),
    image_size: tuple[int, int] | None = None,
    num_points: int = 400,
    names: list[str] | None = None,
    masks: bool = False,
    extra_points: int = 0,
    image_format: str = ".png",
) -> Rig:
    """A rig whose points are the projections of one ego-frame cloud (all poses equal, so no motion in between)."""
    rng = np.random.default_rng(seed)
    height, width = native_size
    stored = image_size or native_size
    cam_to_ego = ring_cam_to_ego(cameras)
    focal = 0.5 * width / np.tan(np.pi / cameras + 0.1) * rng.uniform(0.95, 1.05, cameras)
    native_k = np.zeros((cameras, 3, 3))
    native_k[:, 0, 0], native_k[:, 1, 1], native_k[:, 2, 2] = focal, focal * 1.02, 1
    native_k[:, 0, 2] = width / 2 + rng.uniform(-4, 4, cameras)
    native_k[:, 1, 2] = height / 2 + rng.uniform(-4, 4, cameras)

    def project(cloud: np.ndarray) -> list[np.ndarray]:
        result = []
        for k, pose in zip(native_k, cam_to_ego, strict=True):
            local = (np.concatenate([cloud, np.ones((len(cloud), 1))], 1) @ np.linalg.inv(pose).T)[:, :3]
            local = local[local[:, 2] > 0.1]
            u = k[0, 0] * local[:, 0] / local[:, 2] + k[0, 2]
            v = k[1, 1] * local[:, 1] / local[:, 2] + k[1, 2]
            inside = (u > -0.5) & (u < width - 0.5) & (v > -0.5) & (v < height - 0.5)
            result.append(np.stack([u, v, local[:, 2]], 1)[inside].astype(np.float32))
        return result

    def cloud_of(count: int) -> np.ndarray:
        azimuth, distance = rng.uniform(-np.pi, np.pi, count), rng.uniform(4, 60, count)
        z = 1.5 + distance * rng.uniform(-0.25, 0.25, count)
        return np.stack([distance * np.cos(azimuth), distance * np.sin(azimuth), z], 1)

    cloud = cloud_of(num_points)
    pixels = [smooth_image(rng, *stored) for _ in range(cameras)]
    encoded = [cv2.imencode(image_format, image[..., ::-1])[1].tobytes() for image in pixels]
    scale_y, scale_x = stored[0] / height, stored[1] / width
    stored_k = native_k.copy()
    stored_k[:, 0] *= scale_x
    stored_k[:, 1] *= scale_y
    stored_k[:, 0, 2] += 0.5 * scale_x - 0.5
    stored_k[:, 1, 2] += 0.5 * scale_y - 0.5
    ego_masks = [b""] * cameras
    if masks:
        for i in range(0, cameras, 2):
            mask = np.full(native_size, 255, np.uint8)
            mask[-height // 5 :, width // 4 : width // 2] = 0
            ego_masks[i] = cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_BILEVEL, 1])[1].tobytes()
    turn = rng.uniform(-np.pi, np.pi)
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    pose[:3, 3] = rng.uniform(-20, 20, 3)
    sample = schema.RigSample(
        sample_id=f"sample-{seed}",
        scene=f"scene-{seed % 3}",
        timestamp_us=1_000_000 + seed,
        camera_names=list(names or RING_NAMES.get(cameras) or [f"CAM_{i}" for i in range(cameras)]),
        images=encoded,
        image_size=np.tile(np.array(stored, np.int64), (cameras, 1)),
        native_size=np.tile(np.array(native_size, np.int64), (cameras, 1)),
        intrinsics=stored_k.astype(np.float32),
        cam_to_ego=cam_to_ego.astype(np.float32),
        ego_to_global=np.tile(pose.astype(np.float32), (cameras, 1, 1)),
        global_origin=np.zeros(3, np.int64),
        camera_timestamps_us=np.arange(cameras, dtype=np.int64),
        points=project(cloud),
        extra_points=project(cloud_of(extra_points)) if extra_points else [np.zeros((0, 3), np.float32)] * cameras,
        ego_masks=ego_masks,
        dense_depth=[b""] * cameras,
    )
    return Rig(sample, cloud, pixels)


def write_folder(folder: Path, samples: list[schema.RigSample], *, shards: int = 2, **overrides: object) -> Path:
    """Writes samples as a records folder with its manifest; `overrides` replace manifest entries."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for k in range(shards):
        part = samples[k * len(samples) // shards : (k + 1) * len(samples) // shards]
        path = folder / f"{schema.TFDS_NAME}-train.tfrecord-{k:05d}-of-{shards:05d}"
        tfrecord.write_records(path, [schema.encode(s) for s in part])
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        names.append({"name": path.name, "num_records": len(part), "num_bytes": len(data), "sha256": sha256})
    manifest = schema.Manifest(
        format_version=schema.FORMAT_VERSION,
        dataset="test",
        source_version="1",
        split="train",
        complete_split=True,
        num_samples=len(samples),
        shards=names,
        cameras=list(samples[0].camera_names) if samples else [],
        point_rule="round",
        sweeps=0,
        image_size=None,
        dense_depth=all(all(s.dense_depth) for s in samples),
        min_depth=0.1,
        max_depth=80.0,
        focal_by_width=[0.4, 0.8],
        scenes=sorted({s.scene for s in samples}),
        options={},
        skipped=[],
        statistics={},
        fingerprint=hashlib.sha256("".join(str(n["sha256"]) for n in names).encode()).hexdigest(),
    )
    entries = dataclasses.asdict(manifest) | overrides
    (folder / schema.MANIFEST_NAME).write_text(json.dumps(entries))
    return folder


def make_folder(folder: Path, count: int, *, shards: int = 2, **rig_options: object) -> Path:
    """A records folder of `count` small rigs, seeds 0 .. count - 1."""
    return write_folder(folder, [make_rig(seed, **rig_options).sample for seed in range(count)], shards=shards)  # type: ignore[arg-type]

"""A rig in a box-shaped room, by formulas: exact dense depth, and LiDAR points that are not at pixel centres."""

import dataclasses

import cv2
import numpy as np

from fsmde_jax.data import dense
from fsmde_jax.data.schema import RigSample
from tests import sample_factory

LOW, HIGH = np.array([-14.0, -9.0, 0.0]), np.array([22.0, 11.0, 7.0])  # corners of the room in the ego frame, metres


def depth_at(intrinsics: np.ndarray, cam_to_ego: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """z-depth [P] of the room's inside at pixels uv [P, 2]."""
    pixels = np.concatenate([uv, np.ones((len(uv), 1))], 1)
    rays = pixels @ np.linalg.inv(intrinsics).T @ cam_to_ego[:3, :3].T
    with np.errstate(divide="ignore", invalid="ignore"):
        to_walls = np.where(rays > 0, (HIGH - cam_to_ego[:3, 3]) / rays, (LOW - cam_to_ego[:3, 3]) / rays)
    return np.nanmin(np.where(rays == 0, np.inf, to_walls), 1)


def pixels_of(size) -> np.ndarray:
    """Centres [H * W, 2] = (u, v) of all pixels, row by row."""
    v, u = np.mgrid[: size[0], : size[1]]
    return np.stack([u.ravel(), v.ravel()], 1).astype(np.float64)


def plane(sample: RigSample, camera: int) -> np.ndarray:
    """Dense depth [h, w] metres of one camera at the stored size."""
    size = tuple(sample.image_size[camera])
    k, pose = sample.intrinsics[camera].astype(float), sample.cam_to_ego[camera].astype(float)
    return depth_at(k, pose, pixels_of(size)).reshape(size)


def make(seed: int = 0, *, points: int = 300, sky_rows: int = 0, **options) -> RigSample:
    """A rig of `sample_factory` in the room; the first `sky_rows` rows of every dense plane have no depth."""
    sample = sample_factory.make_rig(seed, **options).sample
    rng = np.random.default_rng(seed + 1000)
    clouds, planes = [], []
    for i in range(sample.num_cameras):
        height, width = sample.native_size[i]
        k, pose = sample.native_intrinsics[i], sample.cam_to_ego[i].astype(float)
        uv = rng.uniform([-0.49, -0.49], [width - 0.51, height - 0.51], (points, 2))
        clouds.append(np.concatenate([uv, depth_at(k, pose, uv)[:, None]], 1).astype(np.float32))
        depth = plane(sample, i)
        depth[:sky_rows] = 0
        planes.append(dense.encode(depth))
    return dataclasses.replace(sample, points=clouds, dense_depth=planes)


def png(depth: np.ndarray) -> bytes:
    """The file of a depth plane, by OpenCV and the words of docs/data_format.md alone."""
    return cv2.imencode(".png", np.round(depth * 256).astype(np.uint16))[1].tobytes()

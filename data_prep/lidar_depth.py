"""LiDAR sweeps to sparse depth points: sub-pixel u, v at native size and z-depth, ego-motion compensated in float64."""

from typing import Literal

import numpy as np

from fsmde_jax import geometry

PointRule = Literal["round", "truncate"]


def pixel_of(uv: np.ndarray, rule: PointRule) -> np.ndarray:
    """Pixel [..., 2] int64 (column, row) that a sub-pixel position [..., 2] float32 belongs to.

    `round` (nuScenes): nearest pixel centre, halves upwards. `truncate` (DDAD): the fraction is dropped; positions left
    of 0 are outside, so this is `floor`.
    """
    shifted = uv + uv.dtype.type(0.5) if rule == "round" else uv
    return np.floor(shifted).astype(np.int64)


def lidar_to_camera(sensor_to_global: np.ndarray, ego_to_global: np.ndarray, cam_to_ego: np.ndarray) -> np.ndarray:
    """Transform [4, 4] float64: lidar -> global (sweep's time) -> ego (camera's time) -> camera."""
    return geometry.invert_rigid(cam_to_ego) @ geometry.invert_rigid(ego_to_global) @ sensor_to_global


def project_sweep(
    points: np.ndarray, to_camera: np.ndarray, intrinsics: np.ndarray, native_size: tuple[int, int], rule: PointRule
) -> np.ndarray:
    """Points that land in the image, in the sweep's order.

    Kept is every point with z > 0 whose pixel lies in the image. The test is made on the float32 values that are
    stored, so a reader that applies the same rule never leaves the image.

    Args:
      points: [P, 3] metres, LiDAR frame.
      to_camera: [4, 4] LiDAR to camera (`lidar_to_camera`).
      intrinsics: [3, 3] pixels at `native_size`.
      native_size: (height, width).

    Returns:
      [Q, 3] float32 (u, v, z).
    """
    camera = geometry.transform_points(np.asarray(to_camera, np.float64), np.asarray(points, np.float64))
    camera = camera[camera[:, 2] > 0]
    uv, z = geometry.project(np.asarray(intrinsics, np.float64), camera)
    height, width = native_size
    near = np.all(np.abs(uv) < 1e7, axis=1)  # float32 and int64 stay meaningful; the rest is far outside anyway
    uvz = np.concatenate([uv[near], z[near, None]], 1).astype(np.float32)
    pixel = pixel_of(uvz[:, :2], rule)
    inside = np.all((pixel >= 0) & (pixel < [width, height]), axis=1) & (uvz[:, 2] > 0)
    return uvz[inside]

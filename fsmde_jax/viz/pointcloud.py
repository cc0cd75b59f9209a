"""Depth maps of a rig as one coloured point cloud in an ego frame, and as a PLY file."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fsmde_jax import geometry
from fsmde_jax.data.tfrecord import write_atomically

AGREE = 1.15  # factor within which two cameras show the same surface
KEEP = 0.9  # share of the pixels, the surest ones, that a cloud shows
MAX_RANGE = 60.0  # metres of z-depth that a cloud shows


def surest(confidence: Sequence[np.ndarray], share: float, visible: Sequence[np.ndarray] | None = None) -> float:
    """The confidence that `share` of all pixels reach: a limit for `fuse` whatever a student's calibration.

    Args:
      confidence: N x [H, W].
      share: above 0, at most 1.
      visible: N x [H, W] bool, False = the car's own body, whose pixels do not count; None = all visible.
    """
    counted = [np.ravel(each) if visible is None else each[visible[i]] for i, each in enumerate(confidence)]
    known = np.concatenate(counted)
    return float(np.quantile(known, 1 - share)) if known.size else 0.0


class Cloud(NamedTuple):
    """Points [P, 3] float32 metres in an ego frame (x forward, y left, z up), colours [P, 3] uint8, camera [P]."""

    points: np.ndarray
    colours: np.ndarray
    camera: np.ndarray


def fuse(
    images: Sequence[np.ndarray],
    depth: Sequence[np.ndarray],
    confidence: Sequence[np.ndarray],
    intrinsics: np.ndarray,
    cam_to_ego: np.ndarray,
    *,
    visible: Sequence[np.ndarray] | None = None,
    min_confidence: float = 0.0,
    max_range: float = MAX_RANGE,
    stride: int = 1,
) -> Cloud:
    """The surfaces that N cameras see, each once.

    A point that another camera shows, too - it lands on that one's image, and that one's depth there is within a factor
    of `AGREE` and not left out itself - is kept of the camera that is more confident there (of equal ones the first).
    Where cameras disagree, both stay: neither is known to be right.

    Args:
      images: N x [H, W, 3] uint8.
      depth: N x [H, W] metres; 0 or not finite = none.
      confidence: N x [H, W].
      intrinsics: [N, 3, 3] pixels at the images' sizes.
      cam_to_ego: [N, 4, 4], all into one ego frame: of a car that moves between the cameras' times,
        `RigFrame.cam_to_reference`.
      visible: N x [H, W] bool, False = the car's own body; None = all visible.
      min_confidence: what is below is left out.
      max_range: metres of z-depth; what is beyond is left out.
      stride: takes every so many-th row and column.
    """
    known = []  # confidence, -inf at pixels that are left out: they must not outdo those of another camera
    for i, z in enumerate(depth):
        keep = np.isfinite(z) & (z > 0) & (z < max_range) & (confidence[i] >= min_confidence)
        known.append(np.where(keep if visible is None else keep & visible[i], confidence[i], -np.inf))
    points, colours, cameras = [], [], []
    for i, picture in enumerate(images):
        height, width = depth[i].shape
        rows, cols = (g.ravel() for g in np.mgrid[0:height:stride, 0:width:stride])
        keep = known[i][rows, cols] > -np.inf
        rows, cols = rows[keep], cols[keep]
        z, sure = depth[i][rows, cols].astype(np.float64), known[i][rows, cols]
        uv = np.stack([cols, rows], -1).astype(np.float64)
        own = geometry.transform_points(cam_to_ego[i].astype(np.float64), geometry.unproject(intrinsics[i], uv, z))
        twice = np.zeros(len(own), bool)
        for j in range(len(images)):
            if j != i:
                # Pixels that only `stride` skips do count: their neighbours show that surface of camera j already.
                twice |= _better_elsewhere(own, sure, i, j, depth, known, intrinsics, cam_to_ego)
        points.append(own[~twice].astype(np.float32))
        colours.append(picture[rows[~twice], cols[~twice]])
        cameras.append(np.full(len(points[-1]), i, np.int32))
    return Cloud(np.concatenate(points), np.concatenate(colours), np.concatenate(cameras))


def _better_elsewhere(
    points: np.ndarray, sure: np.ndarray, i: int, j: int, depth: Sequence[np.ndarray],
    confidence: Sequence[np.ndarray], intrinsics: np.ndarray, cam_to_ego: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Which points [P, 3] of camera i camera j shows with more confidence (of equal ones the first camera's stay)."""
    there = geometry.transform_points(geometry.invert_rigid(cam_to_ego[j].astype(np.float64)), points)
    uv, z = geometry.project(intrinsics[j], there)
    cols, rows = (np.rint(np.where(z > 0, uv[:, axis], -1)).astype(np.int64) for axis in (0, 1))
    height, width = depth[j].shape
    inside = (z > 0) & (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    rows, cols = np.where(inside, rows, 0), np.where(inside, cols, 0)
    other, known = depth[j][rows, cols], confidence[j][rows, cols]
    safe = np.where(other > 0, other, 1.0)
    same = inside & (other > 0) & (np.maximum(z / safe, safe / np.where(z > 0, z, 1.0)) < AGREE)
    return same & ((known > sure) | ((known == sure) & (j < i)))


def write_ply(path: str | Path, cloud: Cloud) -> None:
    """Writes a binary PLY file (x, y, z, red, green, blue), by rename."""
    kinds = [("xyz", "<f4", 3), ("rgb", "u1", 3)]
    table = np.empty(len(cloud.points), np.dtype([(name, kind, (size,)) for name, kind, size in kinds]))
    table["xyz"], table["rgb"] = cloud.points, cloud.colours
    header = (
        f"ply\nformat binary_little_endian 1.0\ncomment ego frame: x forward, y left, z up, metres\n"
        f"element vertex {len(table)}\n"
        + "".join(f"property float {axis}\n" for axis in "xyz")
        + "".join(f"property uchar {colour}\n" for colour in ("red", "green", "blue"))
        + "end_header\n"
    )
    write_atomically(Path(path), header.encode("ascii") + table.tobytes())

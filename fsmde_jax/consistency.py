"""What two adjacent cameras see together: overlap pixels, LiDAR correspondences and cross-view consistency.

Cameras fire at their own times, so a point goes camera i -> ego at i's time -> global -> ego at j's time -> camera j.
NumPy float64 on the host.
"""

import dataclasses

import numpy as np
from scipy.spatial import cKDTree

from fsmde_jax import geometry
from fsmde_jax.data.schema import RigSample

PIXEL_TOLERANCE = 0.05  # px in u and in v
DEPTH_TOLERANCE = 1e-4  # relative


def neighbours(sample: RigSample) -> np.ndarray:
    """Adjacency [N, N] bool of the sample's cameras (`geometry.adjacency` at native size); absent ones have none."""
    present = np.array([bool(image) for image in sample.images])
    extrinsics = sample.cam_to_ego.astype(np.float64)
    return geometry.adjacency(extrinsics, sample.native_intrinsics, sample.native_size[:, 1], present)


def cam_to_cam(sample: RigSample, i: int, j: int) -> np.ndarray:
    """Transform [4, 4] float64 from camera i (at its time) to camera j (at its own)."""
    to_global = [sample.ego_to_global[k].astype(np.float64) @ sample.cam_to_ego[k].astype(np.float64) for k in (i, j)]
    return geometry.invert_rigid(to_global[1]) @ to_global[0]


def lift(sample: RigSample, i: int, j: int, uv: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Pixels uv [P, 2] of camera i at z-depth z [P] as they appear in camera j: [P, 3] = (u, v, z) at j's native size.

    u, v mean nothing where the returned z <= 0 (behind camera j).
    """
    intrinsics, moved = sample.native_intrinsics, cam_to_cam(sample, i, j)
    turn = intrinsics[j] @ moved[:3, :3] @ np.linalg.inv(intrinsics[i])
    shift = intrinsics[j] @ moved[:3, 3]
    depth = z.astype(np.float64)
    x, y = uv[:, 0] * depth, uv[:, 1] * depth
    # by columns: matrix products of three numbers with every pixel of dense depth take ten times as long
    a, b, w = (row[0] * x + row[1] * y + (row[2] * depth + offset) for row, offset in zip(turn, shift, strict=True))
    safe = np.where(w > 0, w, 1.0)
    return np.stack([a / safe, b / safe, w], 1)


def _lands(uvz: np.ndarray, size: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """Which (u, v, z) [P, 3] lie in front of the camera and on its image: -.5 <= u < W - .5, likewise v."""
    u, v, z = uvz.T
    low, high = -0.5 - margin, margin - 0.5
    return (z > 0) & (u >= low) & (u < size[1] + high) & (v >= low) & (v < size[0] + high)


def seen_by_neighbours(sample: RigSample, i: int, points: np.ndarray) -> np.ndarray:
    """Which points [P, 3] = (u, v, z) of camera i, at their measured depth, land on the image of an adjacent camera.

    Occlusion is not looked at: the LiDAR sits above the cameras and may see what a camera does not.
    """
    seen = np.zeros(len(points), bool)
    for j in np.flatnonzero(neighbours(sample)[i]):
        seen |= _lands(lift(sample, i, int(j), points[:, :2], points[:, 2]), sample.native_size[j])
    return seen


def correspondences(sample: RigSample, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
    """LiDAR points that cameras i and j both have: indices ([M] into points[i], [M] into points[j]).

    Records hold no point identities. A point of camera i, lifted at its measured depth, corresponds to the point of
    camera j nearest to it in max(|du|, |dv|) / 0.05 px and |d log z| / 1e-4, if that is within both tolerances. (The
    same LiDAR return agrees to better than 1e-3 px on real rigs; float32 storage is the difference.)
    """
    own, other = sample.points[i], sample.points[j]
    empty = np.zeros(0, np.int64)
    if not (len(own) and len(other)):
        return empty, empty
    lifted = lift(sample, i, j, own[:, :2], own[:, 2])
    index = np.flatnonzero(_lands(lifted, sample.native_size[j], margin=1.0))  # j's own points say where its image ends
    if not len(index):
        return empty, empty

    def scaled(uvz: np.ndarray) -> np.ndarray:
        uvz = uvz.astype(np.float64)
        return np.concatenate([uvz[:, :2] / PIXEL_TOLERANCE, np.log(uvz[:, 2:]) / DEPTH_TOLERANCE], 1)

    candidates = np.flatnonzero(other[:, 2] > 0)
    tree = cKDTree(scaled(other[candidates]))
    distance, nearest = tree.query(scaled(lifted[index]), p=np.inf, distance_upper_bound=1.0)
    found = np.isfinite(distance)
    return index[found], candidates[nearest[found]]


@dataclasses.dataclass
class Consistency:
    """Mean |z_ij - d_j| / d_j over the LiDAR points that two adjacent cameras see, per directed pair and over all.

    z_ij: the prediction of camera i at the point's pixel, lifted along the point's exact ray into camera j; d_j: the
    prediction of camera j at the point's pixel there. Predictions are clipped to [min_depth, max_depth] as in P1, and
    only points whose measured depth is strictly in that range in both cameras count. 0 for a perfect prediction; a
    wrong scale or cameras that disagree both raise it.
    """

    min_depth: float
    max_depth: float
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, sample: RigSample, at_points: list[np.ndarray]) -> None:
        """Adds one rig sample; `at_points[i]` [P_i] is the prediction, metres, at the pixel of each of points[i]."""
        for i, j in np.argwhere(neighbours(sample)).tolist():
            pair = f"{sample.camera_names[i]}>{sample.camera_names[j]}"
            a, b = correspondences(sample, i, j)
            depth_a, depth_b = sample.points[i][a, 2], sample.points[j][b, 2]
            usable = (np.minimum(depth_a, depth_b) > self.min_depth) & (np.maximum(depth_a, depth_b) < self.max_depth)
            a, b = a[usable], b[usable]
            pred_i, pred_j = (np.clip(p, self.min_depth, self.max_depth) for p in (at_points[i][a], at_points[j][b]))
            lifted = lift(sample, i, j, sample.points[i][a, :2], pred_i)[:, 2]
            self.sums[pair] = self.sums.get(pair, 0.0) + float(np.sum(np.abs(lifted - pred_j) / pred_j))
            self.counts[pair] = self.counts.get(pair, 0) + len(a)

    def result(self) -> dict[str, float]:
        """Value per directed pair "A>B" that shares points, and "overall", the mean over all points of all pairs."""
        values = {pair: total / self.counts[pair] for pair, total in self.sums.items() if self.counts[pair]}
        if values:
            values["overall"] = sum(self.sums.values()) / sum(self.counts.values())
        return values

"""Evaluation protocol P0 of docs/protocol.md: relative predictions, aligned to the ground truth image by image.

NumPy float64 on the host, as protocols P1 and P2.
"""

from typing import Any

import numpy as np

from fsmde_jax import metrics
from fsmde_jax.data.schema import RigSample
from fsmde_jax.metrics import Table
from fsmde_jax.protocols import PointRule, TruthKind, check_prediction, sample_bilinear, table_of, truth_of


def align(rel_inv_depth: np.ndarray, gt: np.ndarray) -> tuple[float, float]:
    """(s, t) of the least squares of s r + t - 1 / gt under s >= 0.

    s is 0 where the alignment failed: r is constant, or larger where the ground truth is farther. The best that is
    left then is a constant, t = mean 1 / gt.

    Args:
      rel_inv_depth: [P] r, larger = nearer; gt: [P] metres, P >= 1.
    """
    r, target = np.asarray(rel_inv_depth, np.float64), 1.0 / np.asarray(gt, np.float64)
    centred = r - r.mean()
    power = float(np.sum(centred**2))
    varies = power > r.size * (1e-12 * float(np.abs(r).max())) ** 2  # rounding alone is no variation
    scale = float(np.sum(centred * target)) / power if varies else 0.0
    scale = scale if scale > 0 else 0.0
    return scale, float(target.mean() - scale * r.mean())


def to_depth(rel_inv_depth: np.ndarray, s: float, t: float, *, min_depth: float, max_depth: float) -> np.ndarray:
    """Metres [...] of r [...]: s r + t clipped to [1 / max_depth, 1 / min_depth], inverted."""
    aligned = s * np.asarray(rel_inv_depth, np.float64) + t
    return 1.0 / np.clip(aligned, 1.0 / max_depth, 1.0 / min_depth)


def aligned_maps(rel_inv_depth: np.ndarray, truth: np.ndarray, *, min_depth: float, max_depth: float) -> np.ndarray:
    """Depth [N, H, W] float32 metres for pictures: each map aligned to the depths in range of `truth`, 0 = none.

    A map without any gets `max_depth` everywhere.
    """
    maps = []
    for r, gt in zip(rel_inv_depth, truth, strict=True):
        known = (gt > min_depth) & (gt < max_depth)
        s, t = align(r[known], gt[known]) if known.any() else (0.0, 1.0 / max_depth)
        maps.append(to_depth(r, s, t, min_depth=min_depth, max_depth=max_depth))
    return np.stack(maps).astype(np.float32)


class AffineProtocol:
    """P0: per image least squares s, t of s r + t to 1 / gt over the valid pixels, s >= 0; then as P1; part `affine`.

    r is resized to the ground truth's image as P1 resizes depth. Images whose alignment failed (s = 0, see `align`)
    are counted in `failed` and measured as the constant that is left: a prediction that fails gains nothing by it.
    """

    name = "affine"

    def __init__(self, *, min_depth: float, max_depth: float, point_rule: PointRule, truth: TruthKind = "lidar"):
        self.min_depth, self.max_depth, self.point_rule, self.truth = min_depth, max_depth, point_rule, truth
        self.samples = 0
        self.pixels: dict[str, int] = {}  # valid pixels per camera
        self.skipped: dict[str, int] = {}  # images without a valid pixel, per camera
        self.failed: dict[str, int] = {}  # images whose alignment failed, per camera
        self._means: dict[str, metrics.Mean] = {}

    def add(self, rel_inv_depth: np.ndarray, sample: RigSample) -> None:
        """Adds the prediction [N, H, W] (relative inverse depth, any resolution) of one rig sample.

        Raises:
          ValueError: wrong shape, or values that are not finite.
        """
        check_prediction(rel_inv_depth, sample)
        self.samples += 1
        for i, camera in enumerate(sample.camera_names):
            if not sample.images[i]:
                continue  # the sample lacks this camera
            truth, size = truth_of(sample, i, self.truth, self.point_rule)
            valid = (truth.depth > self.min_depth) & (truth.depth < self.max_depth)
            self.pixels[camera] = self.pixels.get(camera, 0) + int(valid.sum())
            self.skipped[camera] = self.skipped.get(camera, 0) + int(not valid.any())
            self.failed.setdefault(camera, 0)
            if not valid.any():
                continue
            r, gt = sample_bilinear(rel_inv_depth[i], truth.rows[valid], truth.cols[valid], size), truth.depth[valid]
            s, t = align(r, gt)
            self.failed[camera] += int(s == 0)
            depth = to_depth(r, s, t, min_depth=self.min_depth, max_depth=self.max_depth)
            self._means.setdefault(camera, metrics.Mean()).add(metrics.depth_metrics(depth, gt))

    def totals(self) -> dict[str, Any]:
        """What has been added, as sums (JSON): totals of several add up to those of all their samples."""
        means = {camera: mean.totals() for camera, mean in self._means.items()}
        return {
            "samples": self.samples, "pixels": self.pixels, "skipped": self.skipped, "failed": self.failed,
            "means": means,
        }  # fmt: skip

    def set_totals(self, totals: dict[str, Any]) -> None:
        """Replaces what has been added."""
        self.samples, self.pixels = totals["samples"], totals["pixels"]
        self.skipped, self.failed = totals["skipped"], totals["failed"]
        self._means = {camera: metrics.Mean(**each) for camera, each in totals["means"].items()}

    def table(self) -> Table:
        """{"affine": {camera or "all": {metric: value}}}; empty without a value."""
        return table_of({"affine": self._means} if self._means else {})

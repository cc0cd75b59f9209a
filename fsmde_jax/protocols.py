"""Evaluation protocols P1 and P2 of docs/protocol.md: what is compared with what, and averaged over what.

NumPy float64 on the host. A prediction is looked up only at the pixels that have ground truth; that equals resizing the
whole prediction first, at a hundredth of the work.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fsmde_jax import metrics
from fsmde_jax.consistency import Consistency, seen_by_neighbours
from fsmde_jax.data import dense, transforms
from fsmde_jax.data.schema import RigSample
from fsmde_jax.metrics import Table

PointRule = Literal["round", "truncate"]
TruthKind = Literal["lidar", "dense"]
RANGES = ((0, 20), (20, 40), (40, 80), (80, 200))  # metres


@dataclasses.dataclass
class GroundTruth:
    """Pixels of one camera that have a known depth, each once."""

    rows: np.ndarray  # [P] int64, at native size (dense: at the stored size)
    cols: np.ndarray  # [P] int64
    depth: np.ndarray  # [P] float64, metres
    uvz: np.ndarray  # [P, 3]: sub-pixel position at native size and depth, metres


def point_pixels(points: np.ndarray, size: Sequence[int], rule: PointRule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integer pixels of points [P, 3] = (u, v, z) in an image of `size` (H, W).

    `round` (nuScenes): nearest pixel centre, halves upwards; `truncate` (DDAD): the fraction is dropped.

    Returns:
      (rows [P] int64, cols [P] int64, inside [P] bool).
    """
    if rule not in ("round", "truncate"):
        raise ValueError(f"point rule must be 'round' or 'truncate', got {rule!r}")
    uv = points[:, :2]  # in their own float32, as data_prep did when it chose the points that lie in the image
    pixel = np.floor(uv + uv.dtype.type(0.5) if rule == "round" else uv).astype(np.int64)
    cols, rows = pixel[:, 0], pixel[:, 1]
    inside = (rows >= 0) & (rows < size[0]) & (cols >= 0) & (cols < size[1]) & (points[:, 2] > 0)
    return rows, cols, inside


def last_per_pixel(rows: np.ndarray, cols: np.ndarray, width: int) -> np.ndarray:
    """Indices of the entries that remain when all are written to an image in order: the last one of each pixel wins."""
    flat = rows * width + cols
    _, from_the_end = np.unique(flat[::-1], return_index=True)
    return len(flat) - 1 - from_the_end


def ground_truth(points: np.ndarray, size: Sequence[int], rule: PointRule) -> GroundTruth:
    """Ground truth at native size: points [P, 3] = (u, v, z) written in sweep order, the last one of a pixel wins.

    Args:
      points: of the sample's OWN sweep, never the accumulated training labels.
      size: native height and width.
      rule: how u, v become a pixel; the manifest's `point_rule`.
    """
    return _written(points, *point_pixels(points, size, rule), size)


def _written(
    points: np.ndarray, rows: np.ndarray, cols: np.ndarray, inside: np.ndarray, size: Sequence[int]
) -> GroundTruth:
    index = np.flatnonzero(inside)
    index = index[last_per_pixel(rows[index], cols[index], int(size[1]))]
    return GroundTruth(rows[index], cols[index], points[index, 2].astype(np.float64), points[index])


def dense_truth(sample: RigSample, i: int) -> GroundTruth:
    """Every pixel of camera i, at the stored size, that has a dense depth and does not show the car's own body.

    Raises:
      DataError: the dense depth or the mask is damaged.
    """
    stored, native = ((int(size[i, 0]), int(size[i, 1])) for size in (sample.image_size, sample.native_size))
    where = f"sample {sample.sample_id!r}, camera {sample.camera_names[i]}"
    depth = dense.decode(sample.dense_depth[i], stored, where)
    if sample.ego_masks[i]:
        depth = depth * (transforms.decode_ego_mask(sample.ego_masks[i], native, stored) == 255)
    rows, cols = np.nonzero(depth)
    at = depth[rows, cols].astype(np.float64)
    u, v = (cols + 0.5) * (native[1] / stored[1]) - 0.5, (rows + 0.5) * (native[0] / stored[0]) - 0.5
    return GroundTruth(rows, cols, at, np.stack([u, v, at], 1))


def truth_of(sample: RigSample, i: int, truth: TruthKind, rule: PointRule) -> tuple[GroundTruth, Sequence[int]]:
    """Ground truth of camera i, of a kind, and the size (height, width) of the image that its pixels belong to."""
    size = [int(side) for side in (sample.image_size if truth == "dense" else sample.native_size)[i]]
    return (dense_truth(sample, i) if truth == "dense" else ground_truth(sample.points[i], size, rule)), size


def sample_bilinear(image: np.ndarray, rows: np.ndarray, cols: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Values [P] float64 that `image` [h, w] has at pixels (rows, cols) after a bilinear resize to `size` (H, W).

    Half-pixel centres, no antialias, border clamped: PyTorch's interpolate(mode="bilinear", align_corners=False).
    """
    h, w = image.shape
    if (h, w) == tuple(size):
        return image[rows, cols].astype(np.float64)
    y = np.clip((rows + 0.5) * (h / size[0]) - 0.5, 0.0, h - 1.0)
    x = np.clip((cols + 0.5) * (w / size[1]) - 0.5, 0.0, w - 1.0)
    y0, x0 = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    y1, x1 = np.minimum(y0 + 1, h - 1), np.minimum(x0 + 1, w - 1)
    wy, wx = y - y0, x - x0
    top = image[y0, x0].astype(np.float64) * (1 - wx) + image[y0, x1].astype(np.float64) * wx
    bottom = image[y1, x0].astype(np.float64) * (1 - wx) + image[y1, x1].astype(np.float64) * wx
    return top * (1 - wy) + bottom * wy


def check_prediction(pred_depth: np.ndarray, sample: RigSample) -> None:
    if pred_depth.ndim != 3 or len(pred_depth) != sample.num_cameras:
        raise ValueError(f"expected [N, H, W] with N = {sample.num_cameras}, got pred_depth {pred_depth.shape}")
    if not np.all(np.isfinite(pred_depth)):
        raise ValueError(f"the prediction for sample {sample.sample_id!r} has values that are not finite")


class SurroundProtocol:
    """P1: metrics per image at native size; mean over images per camera; unweighted mean of the cameras = "all".

    Its table's parts: `metric` (as predicted), `median` (each image scaled by median(gt) / median(pred)),
    `shared_median` (one such scale for all images of a rig sample), `range_<from>_<to>` (metric, pixels of that gt
    range) and `overlap` (metric, pixels whose LiDAR point also projects into an adjacent camera). Medians are over the
    valid pixels of the unclipped resized prediction; clipping to [min_depth, max_depth] comes after the scaling.

    With `truth` "dense" the ground truth is the dense depth at the stored image size instead (`dense_truth`); the
    overlap is then that of every pixel's surface point. Cross-view consistency stays that of the LiDAR points.
    `extras` False leaves everything but `metric` out.
    """

    name = "surround"

    def __init__(
        self, *, min_depth: float, max_depth: float, point_rule: PointRule, truth: TruthKind = "lidar",
        extras: bool = True,
    ):  # fmt: skip
        self.min_depth, self.max_depth, self.point_rule = min_depth, max_depth, point_rule
        self.truth, self.extras = truth, extras
        self.samples = 0
        self.pixels: dict[str, int] = {}  # valid pixels per camera
        self.skipped: dict[str, int] = {}  # images without a valid pixel, per camera
        self.consistency = Consistency(min_depth, max_depth)
        self._means: dict[str, dict[str, metrics.Mean]] = {}

    def add(self, pred_depth: np.ndarray, sample: RigSample) -> None:
        """Adds the prediction [N, H, W] (metres, any resolution) of one rig sample.

        Raises:
          ValueError: wrong shape, values that are not finite, or a median that is not positive.
        """
        check_prediction(pred_depth, sample)
        self.samples += 1
        images = []
        for i, camera in enumerate(sample.camera_names):
            if not sample.images[i]:
                continue  # the sample lacks this camera
            truth, size = truth_of(sample, i, self.truth, self.point_rule)
            valid = (truth.depth > self.min_depth) & (truth.depth < self.max_depth)
            self.pixels[camera] = self.pixels.get(camera, 0) + int(valid.sum())
            self.skipped[camera] = self.skipped.get(camera, 0) + int(not valid.any())
            if valid.any():
                pred = sample_bilinear(pred_depth[i], truth.rows[valid], truth.cols[valid], size)
                images.append((i, camera, pred, truth.depth[valid], truth.uvz[valid]))
        if not images:
            return
        if not self.extras:
            for _, camera, pred, gt, _ in images:
                self._add("metric", camera, self._clip(pred), gt)
            return
        self.consistency.add(sample, self._at_points(pred_depth, sample))
        shared = _ratio(np.concatenate([x[3] for x in images]), np.concatenate([x[2] for x in images]))
        for i, camera, pred, gt, uvz in images:
            clipped = self._clip(pred)
            self._add("metric", camera, clipped, gt)
            self._add("median", camera, self._clip(pred * _ratio(gt, pred)), gt)
            self._add("shared_median", camera, self._clip(pred * shared), gt)
            for low, high in RANGES:
                self._add(f"range_{low}_{high}", camera, clipped, gt, (gt >= low) & (gt < high))
            self._add("overlap", camera, clipped, gt, seen_by_neighbours(sample, i, uvz))

    def _at_points(self, pred_depth: np.ndarray, sample: RigSample) -> list[np.ndarray]:
        """The prediction at the pixel of each LiDAR point, per camera [P_i]."""
        found = []
        for depth, points, size in zip(pred_depth, sample.points, sample.native_size, strict=True):
            rows, cols, _ = point_pixels(points, size, self.point_rule)
            found.append(sample_bilinear(depth, rows, cols, size))
        return found

    def _clip(self, depth: np.ndarray) -> np.ndarray:
        return np.clip(depth, self.min_depth, self.max_depth)

    def _add(self, part: str, camera: str, pred: np.ndarray, gt: np.ndarray, where: np.ndarray | None = None) -> None:
        mean = self._means.setdefault(part, {}).setdefault(camera, metrics.Mean())
        if where is not None:
            pred, gt = pred[where], gt[where]
        if gt.size:
            mean.add(metrics.depth_metrics(pred, gt))

    def totals(self) -> dict[str, Any]:
        """What has been added, as sums (JSON): totals of several add up to those of all their samples."""
        return {
            **_totals(self), "consistency_sums": self.consistency.sums, "consistency_counts": self.consistency.counts
        }  # fmt: skip

    def set_totals(self, totals: dict[str, Any]) -> None:
        """Replaces what has been added."""
        _set_totals(self, totals)
        self.consistency.sums, self.consistency.counts = totals["consistency_sums"], totals["consistency_counts"]

    def table(self) -> Table:
        """Part -> camera or "all" -> metric -> value; parts and cameras without a value are absent."""
        return table_of(self._means)


class VfdepthProtocol:
    """P2, for comparison with papers that evaluate as VFDepth does; parts `metric` and `median`.

    Ground truth at the network's resolution (native integer pixel times the scale, truncated; written row by row, the
    last one wins), self-occlusion mask applied, 0 < gt < max_depth; the prediction is clamped to [0, max_depth]; pixels
    of a camera are pooled over batches of rigs (the last may be smaller), scaled by the LOWER middle values as
    torch.median does, clamped again; mean over batches per camera, unweighted mean of the cameras.
    """

    name = "vfdepth"

    def __init__(self, *, max_depth: float, point_rule: PointRule, batch_size: int = 4):
        self.max_depth, self.point_rule, self.batch_size = max_depth, point_rule, batch_size
        self.samples = 0
        self.pixels: dict[str, int] = {}
        self.skipped: dict[str, int] = {}  # batches of a camera without a valid pixel
        self._pool: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._pooled = 0
        self._means: dict[str, dict[str, metrics.Mean]] = {}

    def add(self, pred_depth: np.ndarray, sample: RigSample, ego_mask: np.ndarray) -> None:
        """Adds one rig sample: prediction [N, H, W] metres and ego_mask [N, H, W] bool, True = not the ego body."""
        check_prediction(pred_depth, sample)
        if ego_mask.shape != pred_depth.shape:
            raise ValueError(f"expected ego_mask {pred_depth.shape}, got {ego_mask.shape}")
        self.samples += 1
        self._pooled += 1
        height, width = pred_depth.shape[1:]
        for i, camera in enumerate(sample.camera_names):
            native = sample.native_size[i]
            truth = ground_truth(sample.points[i], native, self.point_rule)  # sorted by row, then column
            rows = (truth.rows * (height / native[0])).astype(np.int64)
            cols = (truth.cols * (width / native[1])).astype(np.int64)
            last = last_per_pixel(rows, cols, width)
            rows, cols, gt = rows[last], cols[last], truth.depth[last]
            valid = (gt > 0) & (gt < self.max_depth) & ego_mask[i, rows, cols]
            pred = np.clip(pred_depth[i, rows, cols].astype(np.float64), 0.0, self.max_depth)
            self._pool.setdefault(camera, []).append((pred[valid], gt[valid]))
            self.pixels[camera] = self.pixels.get(camera, 0) + int(valid.sum())
            self.skipped.setdefault(camera, 0)
        if self._pooled == self.batch_size:
            self._flush()

    def _flush(self) -> None:
        for camera, entries in self._pool.items():
            pred, gt = (np.concatenate([e[k] for e in entries]) for k in (0, 1))
            if not gt.size:
                self.skipped[camera] += 1
                continue
            ratio = _lower_median(gt) / _positive(_lower_median(pred))
            for part, values in (("metric", pred), ("median", np.clip(pred * ratio, 0.0, self.max_depth))):
                mean = self._means.setdefault(part, {}).setdefault(camera, metrics.Mean())
                mean.add(metrics.depth_metrics(values, gt))
        self._pool, self._pooled = {}, 0

    def totals(self) -> dict[str, Any]:
        """What has been added, as sums (JSON); a batch that is not full yet is closed by this call."""
        self._flush()
        return _totals(self)

    def set_totals(self, totals: dict[str, Any]) -> None:
        """Replaces what has been added."""
        _set_totals(self, totals)

    def table(self) -> Table:
        """Part -> camera or "all" -> metric -> value; a batch that is not full yet is closed by this call."""
        self._flush()
        return table_of(self._means)


def _totals(protocol: SurroundProtocol | VfdepthProtocol) -> dict[str, Any]:
    means = {part: {camera: mean.totals() for camera, mean in of.items()} for part, of in protocol._means.items()}
    return {"samples": protocol.samples, "pixels": protocol.pixels, "skipped": protocol.skipped, "means": means}


def _set_totals(protocol: SurroundProtocol | VfdepthProtocol, totals: dict[str, Any]) -> None:
    protocol.samples, protocol.pixels, protocol.skipped = (totals[name] for name in ("samples", "pixels", "skipped"))
    protocol._means = {
        part: {camera: metrics.Mean(**each) for camera, each in of.items()} for part, of in totals["means"].items()
    }


def table_of(means: dict[str, dict[str, metrics.Mean]]) -> Table:
    table: Table = {}
    for part, cameras in means.items():
        rows = {camera: mean.result() for camera, mean in cameras.items() if mean.counts}
        if rows:
            table[part] = rows | {"all": metrics.unweighted_mean(list(rows.values()))}
    return table


def _positive(median: float) -> float:
    if not median > 0:
        raise ValueError(f"the median of the prediction is {median}; scaling by medians needs positive depths")
    return median


def _ratio(gt: np.ndarray, pred: np.ndarray) -> float:
    """median(gt) / median(pred) with true medians (mean of the two middle values)."""
    return float(np.median(gt)) / _positive(float(np.median(pred)))


def _lower_median(values: np.ndarray) -> float:
    middle = (values.size - 1) // 2
    return float(np.partition(values, middle)[middle])

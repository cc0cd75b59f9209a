"""How well a student's bin distribution knows its own error (`eval.confidence`, docs/protocol.md).

Two maps are computed where the distribution lies, on the device, so that nothing with K entries a pixel leaves it
(`measure`): an uncertainty, the standard deviation of log depth, and the probability integral transform (PIT), the
distribution's CDF at the label. From these the host (NumPy float64, as protocol P1) makes sparsification curves, AUSE
and the coverage of central intervals (`Confidence`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsmde_jax import interpolate
from fsmde_jax.data.schema import RigSample
from fsmde_jax.protocols import PointRule, TruthKind, check_prediction, sample_bilinear, truth_of

Array = Any  # jax.Array
METRICS = ("abs_rel", "rmse")
REMOVED = tuple(range(0, 100, 5))  # percent of the pixels of an image
LEVELS = tuple(level / 10 for level in range(1, 10))  # nominal probabilities of central intervals


def log_edges(log_centers: Array) -> Array:
    """Edges [..., K + 1] of bins with ascending centers [..., K], K >= 2: midpoints, the outer two mirrored."""
    middle = 0.5 * (log_centers[..., 1:] + log_centers[..., :-1])
    first, last = 2 * log_centers[..., :1] - middle[..., :1], 2 * log_centers[..., -1:] - middle[..., -1:]
    return jnp.concatenate([first, middle, last], -1)


def log_spread(probabilities: Array, centers: Array) -> Array:
    """Standard deviation [...] of log depth under p [..., K] on centers [..., K] in metres."""
    log_centers = jnp.log(centers)
    mean = jnp.sum(probabilities * log_centers, -1, keepdims=True)
    return jnp.sqrt(jnp.sum(probabilities * (log_centers - mean) ** 2, -1))


def cdf(depth: Array, probabilities: Array, centers: Array) -> Array:
    """Probability [...] that the depth is at most `depth` [...]: p_k lies evenly in log depth between its bin's edges.

    Args:
      depth: metres; 0 (no label) counts as 1 m.
      probabilities: [..., K]; centers: [..., K] metres, ascending (equal ones make a step).
    """
    edges = log_edges(jnp.log(centers))
    low, high = edges[..., :-1], edges[..., 1:]
    at = jnp.log(jnp.where(depth > 0, depth, 1.0))[..., None]
    width = high - low
    share = jnp.clip((at - low) / jnp.where(width > 0, width, 1.0), 0.0, 1.0)
    return jnp.sum(probabilities * jnp.where(width > 0, share, at >= high), -1)


def within(depth: Array, probabilities: Array, centers: Array, factor: float = 1.25) -> Array:
    """Probability [...] that the depth is within `factor` of `depth` [...] metres: what a1 asks, by the bins' word.

    Args: as `cdf`, depth positive.
    """
    return cdf(depth * factor, probabilities, centers) - cdf(depth / factor, probabilities, centers)


def _neighbours(src: int, dst: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(index [dst], weight [dst]) of the two cells that a bilinear resize of one axis reads (half-pixel centres)."""
    position = np.clip((np.arange(dst) + 0.5) * (src / dst) - 0.5, 0.0, src - 1.0)
    low = np.floor(position).astype(np.int32)
    weight = (position - low).astype(np.float32)
    return (low, 1 - weight), (np.minimum(low + 1, src - 1), weight)


def pit(label: Array, probabilities: Array, centers: Array) -> Array:
    """CDF [V, H, W] at the labels, of the distribution that every pixel's depth is the mean of.

    Depth is resized bilinearly, so a pixel's distribution is the mixture of those of four head pixels with the bilinear
    weights; its CDF is the weighted sum of theirs.

    Args:
      label: [V, H, W] metres, 0 = none (its value means nothing).
      probabilities: [V, h, w, K]; centers: [V, 1, 1, K] or [V, h, w, K] metres, ascending.
    """

    def of_view(arguments: tuple[Array, Array, Array]) -> Array:
        depth, *both = arguments
        total = jnp.zeros(depth.shape, jnp.float32)
        for rows, row_weight in _neighbours(probabilities.shape[1], depth.shape[0]):
            for cols, col_weight in _neighbours(probabilities.shape[2], depth.shape[1]):
                there = [x if x.shape[:2] == (1, 1) else x[rows[:, None], cols] for x in both]
                total = total + row_weight[:, None] * col_weight * cdf(depth, *there)
        return total

    return jax.lax.map(of_view, (label, probabilities, centers))  # one view at a time: [H, W, K] each


@jax.jit
def measure(outputs: Mapping[str, Array], label: Array) -> dict[str, Array]:
    """What evaluation needs of a student's outputs, [B, N, H, W] float32 each.

    Args:
      outputs: `pred_depth` [B, N, H, W] metres, `bin_logits` [B, N, h, w, K], `bin_centers` [B, N, 1, 1, K] or
        [B, N, h, w, K] metres.
      label: [B, N, H, W] metres, 0 = none.

    Returns:
      `pred_depth` as it came; `uncertainty`, the standard deviation of log depth, resized bilinearly; `pit`.
    """
    b, n, height, width = label.shape
    probabilities = jax.nn.softmax(outputs["bin_logits"].astype(jnp.float32), -1)
    centers = outputs["bin_centers"].astype(jnp.float32)
    spread = interpolate.resize(log_spread(probabilities, centers)[..., None], height, width, "bilinear")[..., 0]
    views = [x.reshape(b * n, *x.shape[2:]) for x in (label, probabilities, centers)]
    return {"pred_depth": outputs["pred_depth"], "uncertainty": spread, "pit": pit(*views).reshape(label.shape)}


def sparsification(error: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Mean [len(REMOVED)] of the errors that remain when the pixels of the largest `order` are removed.

    Of P pixels and r percent, floor(r P / 100) go. Pixels of equal `order` go in random order: the expected mean.

    Args:
      error: [P], P >= 1; order: [P].
    """
    _, group, counts = np.unique(order, return_inverse=True, return_counts=True)
    expected = (np.bincount(group, error) / counts)[group]
    total = np.cumsum(expected[np.argsort(order, kind="stable")])
    kept = np.array([len(error) - len(error) * percent // 100 for percent in REMOVED])
    return total[kept - 1] / kept


def curves(pred: np.ndarray, gt: np.ndarray, uncertainty: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Metric -> `uncertainty`, `oracle` (the largest errors go first), `random` -> curve [len(REMOVED)] of one image.

    Args:
      pred, gt: [P] metres, positive; uncertainty: [P].
    """
    pred, gt = pred.astype(np.float64), gt.astype(np.float64)
    result = {}
    for name, error in (("abs_rel", np.abs(pred - gt) / gt), ("rmse", (pred - gt) ** 2)):
        found = {"uncertainty": sparsification(error, uncertainty), "oracle": sparsification(error, error)}
        found["random"] = np.full(len(REMOVED), error.mean())
        result[name] = {key: np.sqrt(curve) if name == "rmse" else curve for key, curve in found.items()}
    return result


def ause(curve: np.ndarray, oracle: np.ndarray) -> float:
    """Area between two sparsification curves, over the value at 0; 0 where nothing is wrong.

    Trapezoids over the removed fractions 0 ... 0.95. Normalised as in Ilg et al. (Uncertainty estimates and multi-
    hypotheses networks for optical flow, ECCV 2018).
    """
    gap = curve - oracle
    area = float(np.sum(0.5 * (gap[1:] + gap[:-1]) * np.diff(REMOVED)) / 100)
    return area / float(curve[0]) if curve[0] > 0 else 0.0


def coverage(values: np.ndarray) -> np.ndarray:
    """Share [len(LEVELS)] of PIT values [P] in the central interval of each nominal probability."""
    return np.array([np.mean(np.abs(values - 0.5) <= level / 2) for level in LEVELS])


class Confidence:
    """Sparsification and calibration of a student: per image, mean over images per camera, unweighted mean = "all".

    Errors are P1's, of the unscaled prediction clipped to the range at the pixels of the ground truth; the
    uncertainty is looked up there bilinearly, as the depth is. The PIT is taken at network resolution, at the labels
    in range.
    """

    def __init__(self, *, min_depth: float, max_depth: float, point_rule: PointRule, truth: TruthKind = "lidar"):
        self.min_depth, self.max_depth, self.point_rule, self.truth = min_depth, max_depth, point_rule, truth
        self._sums: dict[str, dict[str, np.ndarray]] = {}  # camera -> name -> sum over images
        self._counts: dict[str, dict[str, int]] = {}

    def add(self, maps: Mapping[str, np.ndarray], label: np.ndarray, sample: RigSample) -> None:
        """Adds one rig sample.

        Args:
          maps: `pred_depth`, `uncertainty`, `pit` [N, H, W], see `measure`.
          label: [N, H, W] metres, 0 = none: what the PIT was taken at.
          sample: whose own sweep or dense depth is the ground truth.

        Raises:
          ValueError: wrong shape, or values that are not finite.
        """
        for name in ("pred_depth", "uncertainty"):
            check_prediction(maps[name], sample)
        for i, camera in enumerate(sample.camera_names):
            if not sample.images[i]:
                continue  # the sample lacks this camera
            truth, size = truth_of(sample, i, self.truth, self.point_rule)
            valid = self._in_range(truth.depth)
            if valid.any():
                at = (truth.rows[valid], truth.cols[valid], size)
                pred = np.clip(sample_bilinear(maps["pred_depth"][i], *at), self.min_depth, self.max_depth)
                found = curves(pred, truth.depth[valid], sample_bilinear(maps["uncertainty"][i], *at))
                for metric, each in found.items():
                    self._mean(camera, f"ause_{metric}", ause(each["uncertainty"], each["oracle"]))
                    self._mean(camera, f"random_ause_{metric}", ause(each["random"], each["oracle"]))
                    for name, curve in each.items():
                        self._mean(camera, f"{metric} {name}", curve)
            labelled = self._in_range(label[i])
            if labelled.any():
                self._mean(camera, "coverage", coverage(maps["pit"][i][labelled].astype(np.float64)))

    def totals(self) -> dict[str, Any]:
        """What has been added, as sums (JSON): totals of several add up to those of all their samples."""
        sums = {camera: {name: np.asarray(v).tolist() for name, v in of.items()} for camera, of in self._sums.items()}
        return {"sums": sums, "counts": self._counts}

    def set_totals(self, totals: dict[str, Any]) -> None:
        """Replaces what has been added."""
        self._sums = {camera: {name: np.asarray(v) for name, v in of.items()} for camera, of in totals["sums"].items()}
        self._counts = totals["counts"]

    def _in_range(self, depth: np.ndarray) -> np.ndarray:
        return (depth > self.min_depth) & (depth < self.max_depth)

    def _mean(self, camera: str, name: str, value: np.ndarray | float) -> None:
        sums, counts = self._sums.setdefault(camera, {}), self._counts.setdefault(camera, {})
        sums[name], counts[name] = sums.get(name, 0.0) + np.asarray(value), counts.get(name, 0) + 1

    def result(self) -> dict[str, Any]:
        """JSON-ready: `removed` (fractions), `levels`; camera or "all" -> values below `cameras`; {} without a value.

        Of a camera: `ause_abs_rel`, `ause_rmse`; `random_ause_*`, the same of a random order; `ece`, the mean
        |coverage - nominal| of the camera's mean coverage; `coverage` per level; `curves`: metric -> `uncertainty`,
        `oracle`, `random` -> value per removed fraction (rmse in metres).
        """
        means = {c: {name: sums[name] / self._counts[c][name] for name in sums} for c, sums in self._sums.items()}
        if not means:
            return {}
        names = dict.fromkeys(name for of in means.values() for name in of)
        means["all"] = {name: np.mean([of[name] for of in means.values() if name in of], 0) for name in names}
        fractions = [percent / 100 for percent in REMOVED]
        return {"removed": fractions, "levels": list(LEVELS), "cameras": {c: _entry(of) for c, of in means.items()}}


def _entry(means: Mapping[str, np.ndarray]) -> dict[str, Any]:
    entry: dict[str, Any] = {name: float(value) for name, value in means.items() if value.ndim == 0}
    if "coverage" in means:
        entry["ece"] = float(np.mean(np.abs(means["coverage"] - np.array(LEVELS))))
        entry["coverage"] = means["coverage"].tolist()
    entry["curves"] = {}
    for metric in METRICS:
        parts = {name.split()[1]: curve.tolist() for name, curve in means.items() if name.startswith(f"{metric} ")}
        if parts:
            entry["curves"][metric] = parts
    return entry

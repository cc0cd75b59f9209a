"""Depth metrics on flat arrays, and means that are kept as (sum, count).

NumPy float64 on the host: evaluation compares a few thousand LiDAR points per image, and its numbers must not depend on
the accelerator. docs/protocol.md says which values are averaged over what.
"""

from collections.abc import Mapping, Sequence

import numpy as np

NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3", "silog", "log10")
Table = dict[str, dict[str, dict[str, float]]]  # part ("metric", "median", ...) -> camera or "all" -> metric -> value
LOWER_IS_BETTER = frozenset({"abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "log10"})


def depth_metrics(pred: np.ndarray, gt: np.ndarray) -> dict[str, float]:
    """The nine depth metrics of one set of pixels.

    abs_rel = mean |d - g| / g; sq_rel = mean (d - g)^2 / g (metres); rmse = sqrt mean (d - g)^2 (metres);
    rmse_log = sqrt mean (log d - log g)^2 (natural logarithm); a_n = fraction with max(d/g, g/d) < 1.25^n;
    silog = 100 sqrt(mean e^2 - (mean e)^2), e = log d - log g; log10 = mean |log10 d - log10 g|.

    Args:
      pred: [P] predicted depth d, metres, positive.
      gt: [P] measured depth g, metres, positive.

    Returns:
      Value per name of `NAMES`.

    Raises:
      ValueError: no pixel, unequal shapes, or a value that is not finite and positive.
    """
    pred, gt = np.asarray(pred, np.float64), np.asarray(gt, np.float64)
    if pred.ndim != 1 or pred.shape != gt.shape or pred.size == 0:
        raise ValueError(f"depth_metrics: expected two equal [P] arrays with P > 0, got {pred.shape} and {gt.shape}")
    for name, values in (("predicted", pred), ("measured", gt)):
        if not (np.all(np.isfinite(values)) and np.all(values > 0)):
            raise ValueError(f"depth_metrics: {name} depths must be finite and positive (clip to the range first)")
    difference = pred - gt
    log_error = np.log(pred) - np.log(gt)
    ratio = np.maximum(pred / gt, gt / pred)
    return {
        "abs_rel": float(np.mean(np.abs(difference) / gt)),
        "sq_rel": float(np.mean(difference**2 / gt)),
        "rmse": float(np.sqrt(np.mean(difference**2))),
        "rmse_log": float(np.sqrt(np.mean(log_error**2))),
        "a1": float(np.mean(ratio < 1.25)),
        "a2": float(np.mean(ratio < 1.25**2)),
        "a3": float(np.mean(ratio < 1.25**3)),
        "silog": float(100.0 * np.std(log_error)),  # the standard deviation, without its cancellation
        "log10": float(np.mean(np.abs(log_error)) / np.log(10.0)),
    }


class Mean:
    """Mean of named values, kept as (sum, count) per name; `weight` lets one call stand for many values."""

    def __init__(self, sums: Mapping[str, float] | None = None, counts: Mapping[str, float] | None = None) -> None:
        self.sums: dict[str, float] = dict(sums or {})
        self.counts: dict[str, float] = dict(counts or {})

    def totals(self) -> dict[str, dict[str, float]]:
        """What `Mean(**totals)` is made of again; totals of several add up."""
        return {"sums": self.sums, "counts": self.counts}

    def add(self, values: Mapping[str, float], weight: float = 1.0) -> None:
        """Adds one value per name, counted `weight` times."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * float(value)
            self.counts[name] = self.counts.get(name, 0.0) + weight

    def result(self) -> dict[str, float]:
        """Mean per name; names that never got a value with weight are absent."""
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name] > 0}


def unweighted_mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each name over the rows that have it, every row counting once (`all` of the protocols)."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}

"""Predictors without a network: what a measured figure has to beat."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from fsmde_jax.data.records import Records
from fsmde_jax.errors import DataError

PredictFn = Callable[[dict[str, Any]], Any]  # batch -> pred_depth [B, N, H, W] metres


def constant_predictor(depth: float) -> PredictFn:
    """Predicts `depth` metres everywhere."""

    def predict(batch: dict[str, Any]) -> np.ndarray:
        return np.full(batch["images"].shape[:4], depth, np.float32)

    return predict


def row_medians(
    records: Records,
    image_size: tuple[int, int],
    *,
    min_depth: float,
    max_depth: float,
    indices: Iterable[int] | None = None,
) -> np.ndarray:
    """Median measured depth of each image row of each camera: [N, H] float32 metres.

    Rows are the network's; a row without a point takes the value interpolated between the nearest rows that have some.

    Args:
      records: training records; their own sweeps are used.
      image_size: network height and width.
      min_depth: points outside (min_depth, max_depth), metres, are ignored.
      max_depth: likewise.
      indices: which records; None = all.

    Raises:
      DataError: a camera has no point in range in any of the records.
    """
    height = image_size[0]
    medians = np.zeros((len(records.cameras), height), np.float32)
    samples = [records[i] for i in (range(len(records)) if indices is None else indices)]
    for camera, name in enumerate(records.cameras):
        rows, depths = [], []
        for sample in samples:
            _, v, z = sample.points[camera].astype(np.float64).T
            usable = (z > min_depth) & (z < max_depth)
            rows.append(np.floor((v[usable] + 0.5) * (height / sample.native_size[camera, 0])).astype(int))
            depths.append(z[usable])
        row, depth = np.clip(np.concatenate(rows), 0, height - 1), np.concatenate(depths)
        if not len(row):
            raise DataError(
                f"camera {name}: none of {len(samples)} records has a point between {min_depth} and {max_depth} m"
            )
        filled = np.unique(row)
        medians[camera] = np.interp(np.arange(height), filled, [np.median(depth[row == r]) for r in filled])
    return medians


def row_median_predictor(
    records: Records,
    image_size: tuple[int, int],
    *,
    min_depth: float,
    max_depth: float,
    indices: Iterable[int] | None = None,
) -> PredictFn:
    """Predicts for every pixel the median training depth of its row and camera (see `row_medians`)."""
    medians = row_medians(records, image_size, min_depth=min_depth, max_depth=max_depth, indices=indices)

    def predict(batch: dict[str, Any]) -> np.ndarray:
        shape = batch["images"].shape[:4]
        return np.broadcast_to(medians[None, :, :, None], shape).astype(np.float32)

    return predict

"""Predictors without a network: what a measured figure has to beat.

`fit` makes all of them from training records, each in its best form: the constants are those of the lowest mean
relative error on the training pixels (a median weighted by 1 / depth), besides plain medians.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from fsmde_jax import geometry
from fsmde_jax.data.records import Records
from fsmde_jax.errors import DataError
from fsmde_jax.protocols import TruthKind, dense_truth

PredictFn = Callable[[dict[str, Any]], Any]  # batch -> pred_depth [B, N, H, W] metres
_FIT_RECORDS = 200  # spread evenly over the training records
_FIT_PIXELS = 4000  # of an image with dense depth
_CAPS = 96  # candidates for the cap of the ground plane


def constant_predictor(depth: float) -> PredictFn:
    """Predicts `depth` metres everywhere."""

    def predict(batch: dict[str, Any]) -> np.ndarray:
        return np.full(batch["images"].shape[:4], depth, np.float32)

    return predict


@dataclasses.dataclass(frozen=True)
class CameraDepths:
    """Known depths of one camera over some records, [P] each."""

    row: np.ndarray  # int64, of the network's image
    depth: np.ndarray  # float64, metres
    ground: np.ndarray  # float64, metres: depth of the ground plane there, inf above the horizon


def collect(
    records: Records,
    image_size: tuple[int, int],
    *,
    min_depth: float,
    max_depth: float,
    indices: Iterable[int] | None = None,
    truth: TruthKind = "lidar",
) -> list[CameraDepths]:
    """Known depths of every camera of some records.

    Args:
      records: training records.
      image_size: network height and width.
      min_depth: depths outside (min_depth, max_depth), metres, are ignored.
      max_depth: likewise.
      indices: which records; None = all.
      truth: "lidar", points of the records' own sweeps, or "dense", an even part of the pixels of the dense depth.

    Raises:
      DataError: a camera has no depth in range in any of the records.
    """
    height = image_size[0]
    found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in records.cameras]
    count = 0
    for index in range(len(records)) if indices is None else indices:
        sample = records[index]
        count += 1
        intrinsics, extrinsics = sample.native_intrinsics, sample.cam_to_ego.astype(np.float64)
        for camera in range(len(records.cameras)):
            uvz = sample.points[camera].astype(np.float64)
            if truth == "dense":
                uvz = dense_truth(sample, camera).uvz if sample.dense_depth[camera] else uvz[:0]
                step = max(1, len(uvz) // _FIT_PIXELS)
                uvz = uvz[index % step :: step | 1]  # odd, so that no column of an even width is preferred
            uvz = uvz[(uvz[:, 2] > min_depth) & (uvz[:, 2] < max_depth)]
            scale = height / sample.native_size[camera, 0]
            row = np.clip(np.floor((uvz[:, 1] + 0.5) * scale).astype(int), 0, height - 1)
            found[camera].append((row, uvz[:, 2], ground_depth(intrinsics[camera], extrinsics[camera], uvz[:, :2])))
    cameras = []
    for name, parts in zip(records.cameras, found, strict=True):
        camera_depths = CameraDepths(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        if not len(camera_depths.row):
            raise DataError(f"camera {name}: none of {count} records has a point between {min_depth} and {max_depth} m")
        cameras.append(camera_depths)
    return cameras


def ground_depth(intrinsics: np.ndarray, cam_to_ego: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """z-depth [..., P] metres of the plane z = 0 of the ego frame at pixels uv [..., P, 2]; inf where a ray misses it.

    Args:
      intrinsics: [..., 3, 3] pixels; cam_to_ego: [..., 4, 4] metres.
    """
    rays = geometry.unproject(intrinsics, uv, np.ones(uv.shape[:-1]))
    down = -np.einsum("...j,...pj->...p", cam_to_ego[..., 2, :3], rays)
    above = cam_to_ego[..., 2, 3, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((down > 0) & (above > 0), above / down, np.inf)


def lowest_error_constant(depth: np.ndarray) -> float:
    """The constant c of the lowest mean |c - d| / d over depths [P]: their median, weighted by 1 / d."""
    ordered = np.sort(depth)
    total = np.cumsum(1.0 / ordered)
    return float(ordered[np.searchsorted(total, 0.5 * total[-1])])


def _by_row(camera: CameraDepths, height: int, choose: Callable[[np.ndarray], Any]) -> np.ndarray:
    """`choose` of the depths of each row [H]; interpolated between the nearest rows where one has none."""
    order = np.argsort(camera.row, kind="stable")
    filled, starts = np.unique(camera.row[order], return_index=True)
    values = [choose(depths) for depths in np.split(camera.depth[order], starts[1:])]
    return np.interp(np.arange(height), filled, values)


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
    Arguments and errors: see `collect`.
    """
    cameras = collect(records, image_size, min_depth=min_depth, max_depth=max_depth, indices=indices)
    return np.stack([_by_row(camera, image_size[0], np.median) for camera in cameras]).astype(np.float32)


def row_median_predictor(
    records: Records,
    image_size: tuple[int, int],
    *,
    min_depth: float,
    max_depth: float,
    indices: Iterable[int] | None = None,
) -> PredictFn:
    """Predicts for every pixel the median training depth of its row and camera (see `row_medians`)."""
    return row_predictor(row_medians(records, image_size, min_depth=min_depth, max_depth=max_depth, indices=indices))


def row_predictor(depths: np.ndarray) -> PredictFn:
    """Predicts depths [N, H], metres, by camera and row."""

    def predict(batch: dict[str, Any]) -> np.ndarray:
        shape = batch["images"].shape[:4]
        return np.broadcast_to(depths[None, :, :, None], shape).astype(np.float32)

    return predict


def ground_predictor(*, beyond: np.ndarray, caps: np.ndarray) -> PredictFn:
    """Predicts the flat ground z = 0 of the ego frame from the batch's calibration.

    Args:
      beyond: [N] metres, the prediction where a ray meets the ground beyond `caps` or never.
      caps: [N] metres.
    """

    def predict(batch: dict[str, Any]) -> np.ndarray:
        images = batch["images"]
        height, width = images.shape[2:4]
        u, v = np.meshgrid(np.arange(width), np.arange(height))
        pixels = np.stack([u, v], -1).reshape(-1, 2).astype(np.float64)
        uv = np.broadcast_to(pixels, (*images.shape[:2], *pixels.shape))
        calibration = [np.asarray(batch[name], np.float64) for name in ("intrinsics", "cam_to_ego")]
        depth = ground_depth(calibration[0], calibration[1], uv).reshape(images.shape[:4])
        limit, instead = (np.asarray(x, np.float64)[None, :, None, None] for x in (caps, beyond))
        return np.where(depth > limit, instead, depth).astype(np.float32)

    return predict


def _best_cap(camera: CameraDepths, min_depth: float, max_depth: float) -> float:
    """The c of the lowest mean relative error of min(ground plane, c)."""
    candidates = np.exp(np.linspace(np.log(max(min_depth, 0.5)), np.log(max_depth), _CAPS))
    errors = [np.mean(np.abs(np.minimum(camera.ground, c) - camera.depth) / camera.depth) for c in candidates]
    return float(candidates[int(np.argmin(errors))])


def fit(
    records: Records,
    image_size: tuple[int, int],
    *,
    min_depth: float,
    max_depth: float,
    truth: TruthKind = "lidar",
) -> dict[str, PredictFn]:
    """Every trivial predictor, fitted on at most 200 of the training records: {name: predictor}.

    Names and what they mean are in docs/protocol.md. Arguments and errors: see `collect`.
    """
    indices = np.unique(np.linspace(0, len(records) - 1, min(_FIT_RECORDS, len(records))).round().astype(int))
    cameras = collect(
        records, image_size, min_depth=min_depth, max_depth=max_depth, indices=indices.tolist(), truth=truth
    )
    everything = np.concatenate([camera.depth for camera in cameras])
    height = image_size[0]
    far = np.full(len(cameras), max_depth)
    missed = []  # what stands where the ground plane gives no depth in range
    for camera in cameras:
        above = camera.depth[camera.ground >= max_depth]
        missed.append(lowest_error_constant(above) if len(above) else max_depth)
    caps = np.array([_best_cap(camera, min_depth, max_depth) for camera in cameras])
    return {
        "constant, median": constant_predictor(float(np.median(everything))),
        "constant, lowest error": constant_predictor(lowest_error_constant(everything)),
        "row median": row_predictor(np.stack([_by_row(c, height, np.median) for c in cameras])),
        "row, lowest error": row_predictor(np.stack([_by_row(c, height, lowest_error_constant) for c in cameras])),
        "ground plane, constant above": ground_predictor(beyond=np.array(missed), caps=far),
        "ground plane, capped": ground_predictor(beyond=caps, caps=caps),
    }

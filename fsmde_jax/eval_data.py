"""What an evaluation measures on: its records, checked and titled, and the batches that the network sees of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fsmde_jax import geometry
from fsmde_jax.data import dense
from fsmde_jax.data.records import Records, require_dense_depth
from fsmde_jax.data.schema import RigSample
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.eval_options import EvalOptions
from fsmde_jax.names import nearest
from fsmde_jax.protocols import TruthKind

OFFICIAL_COUNTS = {
    ("nuscenes", "val"): 6019,
    ("nuscenes", "train"): 28130,
    ("ddad", "val"): 3950,
    ("ddad", "train"): 12650,
}


def check_records(records: Records, options: EvalOptions) -> tuple[str, int]:
    """Title of the table and number of samples to come.

    Raises:
      ConfigError: the folders differ in dataset or point rule, so that one table would mix unlike things; or they lack
        the dense depth that is asked for, or a camera that is to be dropped.
      DataError: a count that contradicts the manifest, or a "complete" official split of the wrong size.
    """
    manifest = records.manifest
    kinds = sorted({(m.dataset, m.point_rule) for m in records.manifests})
    if len(kinds) > 1:
        raise ConfigError(f"data.eval_records mixes {kinds}: evaluate one dataset at a time")
    if len(records) != manifest.num_samples:
        raise DataError(f"{records.folders[0]}: {len(records)} records, but the manifest says {manifest.num_samples}")
    count = min(options.limit, len(records)) if options.limit else len(records)
    name = f"{manifest.dataset} {manifest.source_version} {manifest.split}"
    if options.ground_truth == "dense":
        require_dense_depth(records, "eval.ground_truth = 'dense'")
        name += ", DENSE ground truth"
    remaining, _, hidden = split_cameras(records.cameras, options.drop_cameras)
    if hidden:
        name += f", WITHOUT {', '.join(records.cameras[i] for i in hidden)}"
    standard = (manifest.min_depth, manifest.max_depth)
    if not np.allclose(standard, (options.min_depth, options.max_depth)):
        name += f", NOT the dataset's range ({standard[0]:g}-{standard[1]:g} m)"
    complete = manifest.complete_split and count == len(records) and set(manifest.cameras) == set(remaining)
    if not complete:
        return f"{name}, subset, n = {count}", count
    official = OFFICIAL_COUNTS.get((manifest.dataset, manifest.split))
    if official is not None and count != official:
        raise DataError(
            f"{records.folders[0]}: the manifest says that {manifest.dataset} {manifest.split} is complete, but it"
            f" holds {count} samples and the official split has {official}; convert this split again"
        )
    return f"{name}, complete split, n = {count}", count


def split_cameras(cameras: Sequence[str], dropped: Sequence[str]) -> tuple[list[str], list[int], list[int]]:
    """(names that stay, their indices, indices of the `dropped` ones), each in the order of `cameras`.

    Raises:
      ConfigError: an unknown name (the nearest is suggested), or none is left.
    """
    for name in dropped:
        if name not in cameras:
            near = nearest(name, cameras, cutoff=0.0)
            raise ConfigError(
                f"eval.drop_cameras: no camera {name!r}; did you mean {near!r}? there are {', '.join(cameras)}"
            )
    kept = [i for i, name in enumerate(cameras) if name not in dropped]
    if not kept:
        raise ConfigError(f"eval.drop_cameras drops every camera; leave at least one of {', '.join(cameras)}")
    return [cameras[i] for i in kept], kept, [i for i in range(len(cameras)) if i not in kept]


def hide_cameras(batch: dict[str, Any], hidden: Sequence[int]) -> None:
    """Makes cameras of a NumPy batch absent, in place: black, `view_mask` False, no labels; calibration stays."""
    for name in ("images", "depth", "ego_mask", "view_mask"):
        batch[name][:, list(hidden)] = 0


def flip_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The mirrored rigs of a batch: pixels, labels, masks and calibration; cameras keep their index."""
    width = batch["images"].shape[3]
    exact = {"dense_depth": batch["dense_depth"][..., ::-1]} if "dense_depth" in batch else {}
    return {
        **batch,
        **exact,
        "images": batch["images"][:, :, :, ::-1],
        "depth": batch["depth"][..., ::-1],
        "ego_mask": batch["ego_mask"][..., ::-1],
        "intrinsics": geometry.flip_intrinsics(batch["intrinsics"], width),
        "cam_to_ego": geometry.flip_cam_to_ego(batch["cam_to_ego"]),
        "ego_to_global": geometry.flip_ego_to_global(batch["ego_to_global"]),
    }


def dense_maps(sample: RigSample, size: tuple[int, int]) -> np.ndarray | None:
    """Dense depth [N, H, W] float32 metres of a sample at `size`, nearest pixels, 0 = none; None if it has none."""
    if not any(sample.dense_depth):
        return None
    cameras = zip(sample.dense_depth, sample.image_size, sample.camera_names, strict=True)
    return np.stack(
        [dense.resized(d, (int(s[0]), int(s[1])), size, f"sample {sample.sample_id!r}, {c}") for d, s, c in cameras]
    )


def label_maps(batch: dict[str, Any], samples: Sequence[RigSample], truth: TruthKind) -> np.ndarray:
    """Labels [B, N, H, W] float32 metres at network resolution, 0 = none: nearest points, or dense depth.

    Dense depth is left out where the car's own body is, and in rows beyond the samples.
    """
    if truth == "lidar":
        return batch["depth"]
    labels = np.zeros_like(batch["depth"])
    for row, sample in enumerate(samples):
        exact = dense_maps(sample, labels.shape[2:])
        if exact is not None:
            labels[row] = np.where(batch["ego_mask"][row], exact, 0)
    return labels

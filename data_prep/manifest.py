"""The manifest, the statistics in it, and the metadata that lets TensorFlow Datasets open a records folder."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.plan import BuildOptions, SamplePlan, Source
from fsmde_jax.data import dense, tfrecord
from fsmde_jax.data.schema import FEATURES, FORMAT_VERSION, MANIFEST_NAME, TFDS_NAME, Manifest, RigSample

DEPTH_EDGES = (0, 1, 2, 5, 10, 20, 40, 80, 120, 160, 200)  # metres; the last bin is open
_TFDS_VERSION = "1.0.0"


def identity(source: Source, options: BuildOptions, sweeps: int) -> str:
    """sha256 over dataset, flags and sample ids: what is known before any sample is described."""
    content = {
        "format_version": FORMAT_VERSION,
        "dataset": source.dataset,
        "version": source.version,
        "split": source.split,
        "cameras": source.cameras,
        "depth_range": [source.min_depth, source.max_depth],
        "sweeps": sweeps,
        "options": source.options,
        "dense_depth": source.dense_depth,
        "build": dataclasses.asdict(options),
        "sample_ids": source.sample_ids,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plans_digest(plans: Iterable[SamplePlan | tuple[str, str]]) -> str:
    """sha256 over the descriptions of some samples: calibration, poses, times, and names and sizes of their files.

    Folders do not count, so a dataset may move. Of a sample that could not be described, its id counts.
    """
    total = hashlib.sha256()
    for plan in plans:
        if not isinstance(plan, SamplePlan):
            total.update(json.dumps(["not described", plan[0]]).encode())
            continue
        facts: list[Any] = [plan.sample_id, plan.scene, int(plan.timestamp_us)]
        matrices = []
        for camera in plan.cameras:
            size = [int(n) for n in camera.native_size]
            files = [_file(path) for path in (camera.image, camera.mask, camera.dense)]
            facts.append([camera.name, size, int(camera.timestamp_us), *files])
            matrices += [camera.intrinsics, camera.cam_to_ego, camera.ego_to_global]
        for sweep in (plan.sweep, *plan.extra_sweeps):
            facts.append([_file(sweep.path), sweep.bin_columns, sweep.drop_near])
            matrices.append(sweep.sensor_to_global)
        facts.append([np.shape(m) for m in matrices])
        total.update(json.dumps(facts).encode() + b"".join(np.asarray(m, "<f8").tobytes() for m in matrices))
    return total.hexdigest()


def _file(path: str | None) -> list[Any] | None:
    """[name, bytes]; None bytes where there is no such file."""
    if path is None:
        return None
    try:
        return [os.path.basename(path), os.stat(path).st_size]
    except OSError:
        return [os.path.basename(path), None]


def fingerprint(identity: str, digests: Iterable[str]) -> str:
    """The manifest's fingerprint: `identity` and the `plans_digest` of every shard, in order."""
    return hashlib.sha256("\n".join([identity, *digests]).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- statistics: whole numbers per shard, summed, so that they do not depend on the order of work --------------------


def new_statistics(cameras: list[str]) -> dict[str, Any]:
    """Statistics of no sample."""
    return {
        "cameras": {
            c: {
                "points": 0,
                "fewest_points": None,
                "most_points": None,
                "samples_without_points": 0,
                "extra_points": 0,
                "pixels": 0,
                "dense_pixels": 0,
            }
            for c in cameras
        },
        "depth_edges": list(DEPTH_EDGES),
        "depth_counts": [0] * len(DEPTH_EDGES),
        "image_bytes": 0,
        "focal": None,  # smallest and largest fx / width
    }


def add_sample(statistics: dict[str, Any], sample: RigSample) -> None:
    """Counts one sample in."""
    edges = np.array([*DEPTH_EDGES, np.inf])
    for i, (name, points, extra) in enumerate(
        zip(sample.camera_names, sample.points, sample.extra_points, strict=True)
    ):
        one = statistics["cameras"][name]
        size = int(sample.image_size[i, 0]), int(sample.image_size[i, 1])
        one["pixels"] += size[0] * size[1]
        if sample.dense_depth[i]:
            units = dense.decode_units(sample.dense_depth[i], size, f"sample {sample.sample_id!r}, camera {name}")
            one["dense_pixels"] += int(np.count_nonzero(units))
        one["points"] += len(points)
        one["fewest_points"] = _extreme(min, one["fewest_points"], len(points))
        one["most_points"] = _extreme(max, one["most_points"], len(points))
        one["samples_without_points"] += int(len(points) == 0)
        one["extra_points"] += len(extra)
        counts = np.histogram(points[:, 2], edges)[0]
        statistics["depth_counts"] = [a + int(b) for a, b in zip(statistics["depth_counts"], counts, strict=True)]
    statistics["image_bytes"] += sum(len(data) for data in sample.images)
    focal = sample.intrinsics[:, 0, 0].astype(np.float64) / sample.image_size[:, 1]
    statistics["focal"] = _focal(statistics["focal"], [round(float(focal.min()), 6), round(float(focal.max()), 6)])


def merge_statistics(parts: list[dict[str, Any]], cameras: list[str]) -> dict[str, Any]:
    """Sum of the statistics of all shards."""
    total = new_statistics(cameras)
    for part in parts:
        for name, one in part["cameras"].items():
            into = total["cameras"][name]
            for key in ("points", "samples_without_points", "extra_points", "pixels", "dense_pixels"):
                into[key] += one[key]
            into["fewest_points"] = _extreme(min, into["fewest_points"], one["fewest_points"])
            into["most_points"] = _extreme(max, into["most_points"], one["most_points"])
        total["depth_counts"] = [a + b for a, b in zip(total["depth_counts"], part["depth_counts"], strict=True)]
        total["image_bytes"] += part["image_bytes"]
        total["focal"] = _focal(total["focal"], part["focal"])
    return total


def _extreme(choose: Any, a: int | None, b: int | None) -> int | None:
    values = [x for x in (a, b) if x is not None]
    return choose(values) if values else None


def _focal(a: list[float] | None, b: list[float] | None) -> list[float] | None:
    if a is None or b is None:
        return a or b
    return [min(a[0], b[0]), max(a[1], b[1])]


# --- the folder's metadata --------------------------------------------------------------------------------------------


def kind(manifest: Manifest) -> str:
    """How much of its split a folder holds, in words."""
    if manifest.complete_split:
        return "the complete official split"
    if manifest.options.get("whole_drive") and not manifest.skipped:
        return "all samples of this drive"
    return "a subset"


def write_metadata(folder: Path, manifest: Manifest) -> None:
    """Writes the TFDS metadata, then `manifest.json`, which makes the folder whole."""
    tfrecord.write_atomically(folder / "features.json", _json(_tfds_features()))
    tfrecord.write_atomically(folder / "dataset_info.json", _json(_tfds_info(manifest)))
    tfrecord.write_atomically(folder / MANIFEST_NAME, _json(dataclasses.asdict(manifest)))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _tfds_features() -> dict[str, Any]:
    """`features.json`: every entry as a plain tensor; lists over cameras and points have an open first dimension."""
    tensor = "tensorflow_datasets.core.features.tensor_feature.Tensor"
    features = {}
    for name, feature in FEATURES.items():
        dimensions = ["-1" if isinstance(s, str) else str(s) for s in feature.shape]
        kind = "string" if feature.kind == "bytes" else feature.kind
        shape = {"dimensions": dimensions} if dimensions else {}
        features[name] = {
            "pythonClassName": tensor,
            "tensor": {"dtype": kind, "encoding": "none", "shape": shape},
            "description": feature.doc,
        }
    return {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def _tfds_info(manifest: Manifest) -> dict[str, Any]:
    """`dataset_info.json` with the shard lengths that `tfds.builder_from_directory` needs."""
    return {
        "name": TFDS_NAME,
        "version": _TFDS_VERSION,
        "fileFormat": "tfrecord",
        "description": f"Rig samples of {manifest.dataset} {manifest.source_version} {manifest.split} (manifest.json).",
        "moduleName": "data_prep.record_writer",
        "splits": [
            {
                "name": manifest.split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(s["num_bytes"] for s in manifest.shards)),
                "shardLengths": [str(s["num_records"]) for s in manifest.shards],
            }
        ],
    }

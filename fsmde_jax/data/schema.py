"""The record format: one tf.Example per rig sample. The contract between `data_prep` (writer) and `data` (reader).

docs/data_format.md describes it for people; `FEATURES` is what it is generated from and checked against.
Encoding and decoding need neither TensorFlow nor JAX.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from fsmde_jax import geometry
from fsmde_jax.errors import DataError

FORMAT_VERSION = 2  # 2: `dense_depth`
TFDS_NAME = "fsmde_rig"  # shards are fsmde_rig-<split>.tfrecord-00000-of-00004, as TFDS names them


@dataclasses.dataclass(frozen=True)
class Feature:
    """One entry of a record. `shape` uses N = cameras, P = points of all cameras together; [] = scalar."""

    kind: Literal["bytes", "int64", "float32"]
    shape: tuple[str | int, ...]
    doc: str


FEATURES: dict[str, Feature] = {
    "sample_id": Feature("bytes", (), "Unique token of the rig sample within its dataset (UTF-8)."),
    "scene": Feature("bytes", (), "Name of the drive that the sample belongs to (UTF-8)."),
    "timestamp_us": Feature("int64", (), "Time of the LiDAR sweep, microseconds."),
    "camera_names": Feature("bytes", ("N",), "Camera names, ring order (anticlockwise from the most forward one)."),
    "images": Feature("bytes", ("N",), "Encoded images, JPEG or PNG, RGB."),
    "image_size": Feature("int64", ("N", 2), "Height and width of the encoded images, pixels."),
    "native_size": Feature("int64", ("N", 2), "Height and width of the recorded images before any resize, pixels."),
    "intrinsics": Feature(
        "float32", ("N", 3, 3),
        "Pinhole matrices in pixels at `image_size`; pixel centres at integers.",
    ),
    "cam_to_ego": Feature(
        "float32", ("N", 4, 4),
        "Camera to ego frame; camera x right, y down, z forward; ego x forward, y left, z up; metres.",
    ),
    "ego_to_global": Feature(
        "float32", ("N", 4, 4),
        "Ego pose at each camera's own time, in a frame moved by `global_origin`; metres.",
    ),
    "global_origin": Feature(
        "int64", (3,),
        "Whole metres to add to `ego_to_global` translations (keeps float32 exact to < 1e-6 m).",
    ),
    "camera_timestamps_us": Feature("int64", ("N",), "Exposure time of each camera, microseconds."),
    "points_uvz": Feature(
        "float32", ("P", 3),
        "LiDAR points of the sample's own sweep: u, v (sub-pixel, at `native_size`) and z-depth in metres; "
        "cameras one after another, in the sweep's order.",
    ),
    "points_per_camera": Feature("int64", ("N",), "How many rows of `points_uvz` belong to each camera."),
    "extra_points_uvz": Feature(
        "float32", ("P", 3),
        "Points of neighbouring sweeps (`--sweeps`), for training labels only; empty by default.",
    ),
    "extra_points_per_camera": Feature("int64", ("N",), "How many rows of `extra_points_uvz` belong to each camera."),
    "ego_masks": Feature(
        "bytes", ("N",),
        "1-bit PNG at `native_size`: 255 = visible, 0 = the car's own body; empty = all visible.",
    ),
    "dense_depth": Feature(
        "bytes", ("N",),
        "16-bit PNG at `image_size`: z-depth of every pixel centre in metres times 256, 0 = none; empty = unknown.",
    ),
}  # fmt: skip


@dataclasses.dataclass
class RigSample:
    """One decoded record: N cameras at (nearly) the same moment. Arrays are as in `FEATURES`."""

    sample_id: str
    scene: str
    timestamp_us: int
    camera_names: list[str]
    images: list[bytes]
    image_size: np.ndarray  # [N, 2] int64 (height, width)
    native_size: np.ndarray  # [N, 2] int64
    intrinsics: np.ndarray  # [N, 3, 3] float32
    cam_to_ego: np.ndarray  # [N, 4, 4] float32
    ego_to_global: np.ndarray  # [N, 4, 4] float32
    global_origin: np.ndarray  # [3] int64
    camera_timestamps_us: np.ndarray  # [N] int64
    points: list[np.ndarray]  # N x [P_i, 3] float32
    extra_points: list[np.ndarray]  # N x [P_i, 3] float32
    ego_masks: list[bytes]
    dense_depth: list[bytes]

    @property
    def num_cameras(self) -> int:
        return len(self.camera_names)

    @property
    def native_intrinsics(self) -> np.ndarray:
        """Intrinsics [N, 3, 3] float64 at `native_size`, the resolution of the points' u, v."""
        scale = self.native_size.astype(np.float64) / self.image_size.astype(np.float64)
        return geometry.resize_intrinsics(self.intrinsics.astype(np.float64), scale[:, 0], scale[:, 1])

    def validate(self, where: str = "record") -> None:
        """Checks what encoding cannot: shapes, finite numbers, rigid transforms, points inside their image.

        Raises:
          DataError: naming `where`, the sample and the first entry that is wrong.
        """
        n = self.num_cameras
        at = f"{where}, sample {self.sample_id!r}"
        if n == 0:
            raise DataError(f"{at}: a rig needs at least one camera")
        if len(set(self.camera_names)) != n:
            raise DataError(f"{at}: camera names repeat: {self.camera_names}")
        expected: dict[str, tuple[int, ...]] = {
            "image_size": (n, 2), "native_size": (n, 2), "intrinsics": (n, 3, 3), "cam_to_ego": (n, 4, 4),
            "ego_to_global": (n, 4, 4), "global_origin": (3,), "camera_timestamps_us": (n,),
        }  # fmt: skip
        for name, shape in expected.items():
            if np.shape(getattr(self, name)) != shape:
                raise DataError(f"{at}: {name} has shape {np.shape(getattr(self, name))}, expected {shape}")
        for name in ("images", "points", "extra_points", "ego_masks", "dense_depth"):
            if len(getattr(self, name)) != n:
                raise DataError(f"{at}: {name} has {len(getattr(self, name))} entries, expected one per camera ({n})")
        if np.any(self.image_size < 1) or np.any(self.native_size < 1):
            raise DataError(f"{at}: image_size and native_size must be positive")
        for i, camera in enumerate(self.camera_names):
            here = f"{at}, camera {camera}"
            geometry.check_intrinsics(self.intrinsics[i], f"{here}, intrinsics")
            geometry.check_rigid(self.cam_to_ego[i], f"{here}, cam_to_ego")
            geometry.check_rigid(self.ego_to_global[i], f"{here}, ego_to_global")
            height, width = self.native_size[i]
            for name, points in (("points", self.points[i]), ("extra_points", self.extra_points[i])):
                if points.ndim != 2 or points.shape[1] != 3 or not np.all(np.isfinite(points)):
                    raise DataError(f"{here}: {name} must be finite [P, 3] (u, v, z), got shape {points.shape}")
                u, v, z = points.T
                inside = (u > -0.51) & (u < width) & (v > -0.51) & (v < height) & (z > 0)
                if not np.all(inside):
                    raise DataError(
                        f"{here}: {int((~inside).sum())} {name} lie outside the {height}x{width} image or behind it"
                    )


def _bytes_feature(values: Sequence[bytes]) -> tf_feature_pb2.Feature:
    return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=values))


def _int_feature(values: Any) -> tf_feature_pb2.Feature:
    return tf_feature_pb2.Feature(
        int64_list=tf_feature_pb2.Int64List(value=np.asarray(values, np.int64).ravel().tolist())
    )


def _float_feature(values: np.ndarray) -> tf_feature_pb2.Feature:
    flat = np.ascontiguousarray(values, "<f4").ravel()
    message = tf_feature_pb2.FloatList()
    if flat.size:  # one packed field, written as a block: thousands of points as Python floats are slow
        message.ParseFromString(_packed_header(flat.nbytes) + flat.tobytes())
    return tf_feature_pb2.Feature(float_list=message)


def _packed_header(length: int) -> bytes:
    """Protobuf tag of field 1 with wire type 2 (packed), and the length as a varint."""
    out = bytearray(b"\x0a")
    while length >= 0x80:
        out.append((length & 0x7F) | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out)


def _floats(message: tf_feature_pb2.FloatList) -> np.ndarray:
    """Values of a FloatList, as a block (`_float_feature` says why)."""
    blob = message.SerializeToString()
    if not blob:
        return np.zeros((0,), np.float32)
    start = 1
    while blob[start] & 0x80:
        start += 1
    return np.frombuffer(blob, "<f4", offset=start + 1).astype(np.float32)


def encode(sample: RigSample) -> bytes:
    """Serialises a validated sample; the same sample gives the same bytes (`DataError` if it is not valid)."""
    sample.validate("encode")
    stacked = {
        "points_uvz": np.concatenate([np.zeros((0, 3), np.float32), *sample.points]),
        "extra_points_uvz": np.concatenate([np.zeros((0, 3), np.float32), *sample.extra_points]),
    }
    features = {
        "sample_id": _bytes_feature([sample.sample_id.encode()]),
        "scene": _bytes_feature([sample.scene.encode()]),
        "timestamp_us": _int_feature([sample.timestamp_us]),
        "camera_names": _bytes_feature([name.encode() for name in sample.camera_names]),
        "images": _bytes_feature(sample.images),
        "image_size": _int_feature(sample.image_size),
        "native_size": _int_feature(sample.native_size),
        "intrinsics": _float_feature(sample.intrinsics),
        "cam_to_ego": _float_feature(sample.cam_to_ego),
        "ego_to_global": _float_feature(sample.ego_to_global),
        "global_origin": _int_feature(sample.global_origin),
        "camera_timestamps_us": _int_feature(sample.camera_timestamps_us),
        "points_uvz": _float_feature(stacked["points_uvz"]),
        "points_per_camera": _int_feature([len(p) for p in sample.points]),
        "extra_points_uvz": _float_feature(stacked["extra_points_uvz"]),
        "extra_points_per_camera": _int_feature([len(p) for p in sample.extra_points]),
        "ego_masks": _bytes_feature(sample.ego_masks),
        "dense_depth": _bytes_feature(sample.dense_depth),
    }
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def decode(data: bytes, where: str = "record") -> RigSample:
    """Parses one record (see `FEATURES`); images stay encoded.

    Args:
      data: the serialised tf.Example.
      where: named in errors, e.g. "train.tfrecord-00000-of-00004, record 3".

    Raises:
      DataError: not a tf.Example, an entry is missing, or an entry has the wrong length.
    """
    example = tf_example_pb2.Example()
    try:
        example.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError is not exported under one name
        raise DataError(f"{where}: not a tf.Example ({error}); convert the dataset again with data_prep") from error
    found = example.features.feature
    missing = sorted(set(FEATURES) - set(found))
    if missing:
        raise DataError(
            f"{where}: entries {missing} are missing; convert the dataset again with this version's data_prep"
        )
    n = len(found["camera_names"].bytes_list.value)

    def array(name: str) -> np.ndarray:
        feature = FEATURES[name]
        entry = found[name]
        floats = feature.kind == "float32"
        values = _floats(entry.float_list) if floats else np.array(entry.int64_list.value, np.int64)
        shape = tuple(n if s == "N" else -1 if s == "P" else int(s) for s in feature.shape)
        try:
            return values.reshape(shape)
        except ValueError as error:
            raise DataError(
                f"{where}: {name} has {values.size} numbers, expected shape {feature.shape} with N = {n}"
            ) from error

    def blobs(name: str) -> list[bytes]:
        return list(found[name].bytes_list.value)

    def per_camera(name: str) -> list[np.ndarray]:
        points, counts = array(f"{name}_uvz"), array(f"{name}_per_camera")
        if counts.min(initial=0) < 0 or counts.sum() != len(points):
            raise DataError(f"{where}: {name}_per_camera sums to {counts.sum()}, but there are {len(points)} points")
        return np.split(points, np.cumsum(counts)[:-1])

    return RigSample(
        sample_id=found["sample_id"].bytes_list.value[0].decode(),
        scene=found["scene"].bytes_list.value[0].decode(),
        timestamp_us=int(array("timestamp_us")),
        camera_names=[name.decode() for name in blobs("camera_names")],
        images=blobs("images"),
        image_size=array("image_size"),
        native_size=array("native_size"),
        intrinsics=array("intrinsics"),
        cam_to_ego=array("cam_to_ego"),
        ego_to_global=array("ego_to_global"),
        global_origin=array("global_origin"),
        camera_timestamps_us=array("camera_timestamps_us"),
        points=per_camera("points"),
        extra_points=per_camera("extra_points"),
        ego_masks=blobs("ego_masks"),
        dense_depth=blobs("dense_depth"),
    )


MANIFEST_NAME = "manifest.json"


@dataclasses.dataclass
class Manifest:
    """`manifest.json` of a records folder: what it holds and where it comes from. One folder = one split.

    The folder is whole exactly when this file exists: it is written last, by rename.
    """

    format_version: int
    dataset: str  # "nuscenes" | "ddad" | "folder" | ...: chooses point rule and defaults, never code paths in models
    source_version: str  # e.g. "v1.0-mini"
    split: str
    complete_split: bool  # every sample of the official split is here (no --limit, nothing skipped)
    num_samples: int
    shards: list[dict[str, Any]]  # {"name", "num_records", "num_bytes", "sha256"}
    cameras: list[str]  # ring order
    point_rule: Literal["round", "truncate"]  # how u, v become a pixel at native size
    sweeps: int  # neighbouring sweeps accumulated for training labels; 0 = only the sample's own sweep
    image_size: list[int] | None  # [height, width] of the stored images; None = native
    dense_depth: bool  # every camera has dense depth
    min_depth: float  # evaluation range of the dataset, metres
    max_depth: float
    focal_by_width: list[
        float
    ]  # smallest and largest fx over all cameras, in native pixels / native width (a fraction)
    scenes: list[str]
    options: dict[str, Any]  # the other flags that shape the records
    skipped: list[dict[str, str]]  # {"sample_id", "reason"} of --on_error skip
    statistics: dict[str, Any]  # points per camera, cameras without points, ...
    fingerprint: str  # sha256 over sources' identity and options; part of every run's identity

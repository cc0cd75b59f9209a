"""A teacher's maps on disk, one entry per record: the format of a cache folder, its writer's parts and its reader.

A cache lies beside the records, never in them: `python -m fsmde_jax.teacher_cache` makes it. An entry holds, per
camera, relative inverse depth at the student's head resolution as uint16 between the view's own smallest and largest
value, and optionally pooled tokens as float16. `teacher_cache.json`, written last, says what was run on what.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from fsmde_jax.data.records import Records
from fsmde_jax.data.tfrecord import TFRecordReader
from fsmde_jax.errors import ConfigError, DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "teacher_cache.json"
ADVICE = "make the cache again: python -m fsmde_jax.teacher_cache"
_STEPS = 65535  # of uint16


@dataclasses.dataclass
class CacheManifest:
    """`teacher_cache.json`: the folder is whole exactly when this file exists."""

    format_version: int
    sha256: str  # of the teacher's weights
    teacher: dict[str, Any]  # variant, version, max_depth, source, dtype
    teacher_size: list[int]  # [height, width] of the teacher's input
    records_fingerprint: str
    num_records: int
    cameras: list[str]  # in array order
    image_size: list[int]  # [height, width] of the student's images
    head_size: list[int]  # [height, width] of the maps
    tokens: list[int] | None  # [gh, gw, C]; None = none were kept
    shards: list[dict[str, Any]]  # {"name", "num_records", "num_bytes"}


def load_manifest(path: Path) -> CacheManifest:
    """Reads a manifest file.

    Raises:
      DataError: it is absent, damaged or of another format version.
    """
    if not path.is_file():
        raise DataError(
            f"{path.parent}: has no {path.name}, so it is no finished teacher cache; run the same command again"
            " (python -m fsmde_jax.teacher_cache), it goes on where it stopped"
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError(f"expected a JSON object, got {type(entries).__name__}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); delete the folder and {ADVICE}") from error
    if entries.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: a cache of format version {entries.get('format_version')}, but this program reads version"
            f" {FORMAT_VERSION}; delete the folder and {ADVICE}"
        )
    names = {field.name for field in dataclasses.fields(CacheManifest)}
    if names != set(entries):
        differing = sorted(names ^ set(entries))
        raise DataError(f"{path}: entries {differing} are missing or unknown; delete the folder and {ADVICE}")
    manifest = CacheManifest(**entries)

    def sizes(value: Any, length: int) -> bool:
        return isinstance(value, list) and len(value) == length and all(isinstance(v, int) and v > 0 for v in value)

    good = {
        "image_size": sizes(manifest.image_size, 2), "head_size": sizes(manifest.head_size, 2),
        "teacher_size": sizes(manifest.teacher_size, 2), "tokens": manifest.tokens is None or sizes(manifest.tokens, 3),
        "num_records": sizes([manifest.num_records], 1), "teacher": isinstance(manifest.teacher, dict),
        "cameras": isinstance(manifest.cameras, list) and len(manifest.cameras) > 0,
        "shards": isinstance(manifest.shards, list)
        and all(isinstance(s, dict) and {"name", "num_records", "num_bytes"} <= set(s) for s in manifest.shards),
    }  # fmt: skip
    for name, is_good in good.items():
        if not is_good:
            raise DataError(
                f"{path}: {name} cannot be {str(getattr(manifest, name))[:80]}; delete the folder and {ADVICE}"
            )
    return manifest


def encode_rig(sample_id: str, rel_inv_depth: np.ndarray, tokens: np.ndarray | None) -> bytes:
    """One entry as a tf.Example.

    Args:
      sample_id: of the record.
      rel_inv_depth: [N, h, w] float, finite.
      tokens: [N, gh, gw, C], or None.

    Raises:
      DataError: a value is not finite, or a token does not fit float16.
    """
    r = np.asarray(rel_inv_depth, np.float32)
    if not np.isfinite(r).all():
        raise DataError(f"sample {sample_id!r}: the teacher's relative inverse depth is not finite")
    low, high = r.min((1, 2)), r.max((1, 2))
    spread = (high - low).astype(np.float64)
    steps = np.where(spread > 0, _STEPS / np.where(spread > 0, spread, 1.0), 0.0)[:, None, None]
    levels = np.rint((r.astype(np.float64) - low[:, None, None]) * steps).astype("<u2")
    content = {
        "sample_id": [sample_id.encode()],
        "rel_inv_depth": [plane.tobytes() for plane in levels],
        "range": [np.stack([low, high], -1).astype("<f4").tobytes()],
    }
    if tokens is not None:
        with np.errstate(over="ignore"):
            half = np.asarray(tokens).astype("<f2")
        if not np.isfinite(half).all():
            raise DataError(f"sample {sample_id!r}: a token of the teacher is not finite or does not fit float16")
        content["tokens"] = [grid.tobytes() for grid in half]
    feature = {
        name: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=values))
        for name, values in content.items()
    }
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature)).SerializeToString(
        deterministic=True
    )


def decode_rig(data: bytes, manifest: CacheManifest, where: str) -> tuple[str, np.ndarray, np.ndarray | None]:
    """(sample_id, relative inverse depth [N, h, w] float32, tokens [N, gh, gw, C] float16 or None) of one entry.

    Raises:
      DataError: naming `where`: not an entry, or not of the manifest's sizes.
    """
    example = tf_example_pb2.Example()
    count, (h, w) = len(manifest.cameras), manifest.head_size
    try:
        example.ParseFromString(data)
        found = {name: list(entry.bytes_list.value) for name, entry in example.features.feature.items()}
        levels = np.frombuffer(b"".join(found["rel_inv_depth"]), "<u2").reshape(count, h, w)
        low, high = np.frombuffer(found["range"][0], "<f4").reshape(count, 2).astype(np.float64).T
        tokens = None
        if manifest.tokens:
            tokens = np.frombuffer(b"".join(found["tokens"]), "<f2").reshape(count, *manifest.tokens)
        sample_id = found["sample_id"][0].decode()
    except Exception as error:  # protobuf's DecodeError is not exported under one name
        raise DataError(
            f"{where}: not an entry of {count} cameras with maps of {h}x{w} ({error}); delete the folder and {ADVICE}"
        ) from error
    step = ((high - low) / _STEPS).astype(np.float32)[:, None, None]
    return sample_id, levels * step + low.astype(np.float32)[:, None, None], tokens


class TeacherCache:
    """A checked cache of some records. Safe to share between threads.

    Attributes:
      folder: where it lies.
      manifest: what it holds.
      tokens: whether tokens are read.
    """

    def __init__(self, folder: Path, manifest: CacheManifest, cameras: Sequence[str], tokens: bool):
        self.folder, self.manifest, self.tokens = folder, manifest, tokens
        unknown = [name for name in cameras if name not in manifest.cameras]
        if unknown:
            raise ConfigError(f"{folder}: the teacher cache has no camera {unknown[0]!r}, only {manifest.cameras}")
        self._rows = [manifest.cameras.index(name) for name in cameras]
        paths = [folder / shard["name"] for shard in manifest.shards]
        for path, shard in zip(paths, manifest.shards, strict=True):
            size = path.stat().st_size if path.is_file() else None
            if size != shard["num_bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DataError(
                    f"{path}: {found}, but {MANIFEST_NAME} says {shard['num_bytes']} bytes: copy it again, or delete"
                    f" the folder and {ADVICE}"
                )
        self._reader = TFRecordReader(paths)
        if len(self._reader) != manifest.num_records:
            raise DataError(
                f"{folder}: holds {len(self._reader)} entries, but {MANIFEST_NAME} says {manifest.num_records}; delete"
                f" the folder and {ADVICE}"
            )

    def check(self, records: Records, image_size: Sequence[int], scale: Sequence[float] = (1.0, 1.0)) -> None:
        """Checks that a stream can be joined with this cache.

        Args:
          records: what the stream reads.
          image_size: (height, width) of the student's images.
          scale: `augment.scale`.

        Raises:
          DataError: the cache is of other records.
          ConfigError: it was made for another image size, or its tokens do not allow the augmentation.
        """
        _check_fits(self.folder, self.manifest, records, image_size)
        if self.tokens and tuple(scale) != (1.0, 1.0):
            raise ConfigError(
                f"augment.scale = {tuple(scale)}: cached teacher tokens allow no crop or rescale; set augment.scale to"
                " (1.0, 1.0), or run the teacher in the step"
            )

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        """Arrays of a batch for `transforms.load_rig`, not initialised."""
        lead = (batch, len(self._rows))
        arrays = {"teacher_rel_inv_depth": np.empty((*lead, *self.manifest.head_size), np.float32)}
        if self.tokens:
            assert self.manifest.tokens is not None
            arrays["teacher_tokens"] = np.empty((*lead, *self.manifest.tokens), np.float16)
        return arrays

    def maps(self, index: int, sample_id: str) -> dict[str, np.ndarray]:
        """`teacher_rel_inv_depth` [N, h, w] float32 and, if asked for, `teacher_tokens` of record `index`.

        Raises:
          DataError: the entry is damaged, or belongs to another sample than `sample_id`.
        """
        where = self._reader.where(index)
        try:
            data = self._reader[index]
        except DataError as error:
            raise DataError(f"{error} (a teacher cache: delete the folder and {ADVICE})") from error
        found, r, tokens = decode_rig(data, self.manifest, where)
        if found != sample_id:
            raise DataError(
                f"{where}: the teacher cache holds sample {found!r} here, but the records have {sample_id!r}; delete"
                f" the folder and {ADVICE}"
            )
        result = {"teacher_rel_inv_depth": r[self._rows]}
        if self.tokens:
            assert tokens is not None
            result["teacher_tokens"] = tokens[self._rows]
        return result

    def close(self) -> None:
        """Closes the files; they are opened again when needed."""
        self._reader.close()


def _check_fits(folder: Path, manifest: CacheManifest, records: Records, image_size: Sequence[int]) -> None:
    if manifest.records_fingerprint != records.fingerprint or manifest.num_records != len(records):
        raise DataError(
            f"{folder}: the teacher cache is of {manifest.num_records} records with fingerprint"
            f" {manifest.records_fingerprint[:16]}, but {', '.join(map(str, records.folders))} holds {len(records)}"
            f" with {records.fingerprint[:16]}; {ADVICE}"
        )
    if tuple(manifest.image_size) != tuple(image_size):
        made, asked = ("x".join(map(str, size)) for size in (manifest.image_size, image_size))
        raise ConfigError(
            f"{folder}: the teacher cache was made for images of {made}, but data.image_size is {asked}; change the key"
            " or make another cache"
        )


def open_cache(
    folder: str | Path,
    records: Records,
    *,
    image_size: Sequence[int],
    sha256: str | None = None,
    teacher_size: Sequence[int] | None = None,
    tokens: bool = False,
) -> TeacherCache:
    """Opens a cache for some records.

    Args:
      folder: what `python -m fsmde_jax.teacher_cache --out` wrote.
      records: the records that it must be of; its cameras are taken in their order.
      image_size: (height, width) of the student's images.
      sha256: hash of the teacher that is expected (`teacher.weight_hash`); None = any.
      teacher_size: (height, width) of the teacher's input that is expected; None = any.
      tokens: read tokens, too.

    Raises:
      DataError: the folder is missing, unfinished or damaged, or of other records.
      ConfigError: made by another teacher, at another size, for other cameras, or without the tokens asked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such teacher cache; make it: python -m fsmde_jax.teacher_cache --help")
    manifest = load_manifest(folder / MANIFEST_NAME)
    _check_fits(folder, manifest, records, image_size)
    if sha256 is not None and manifest.sha256 != sha256:
        raise ConfigError(
            f"{folder}: the teacher cache was made with weights {manifest.sha256[:16]}, but teacher.weights are"
            f" {sha256[:16]} (SHA-256); use those weights or make another cache"
        )
    if teacher_size is not None and tuple(manifest.teacher_size) != tuple(teacher_size):
        made, asked = ("x".join(map(str, size)) for size in (manifest.teacher_size, teacher_size))
        raise ConfigError(
            f"{folder}: the teacher cache was made with the teacher at {made}, but teacher.longer_side asks for"
            f" {asked}; change the key or make another cache"
        )
    if tokens and manifest.tokens is None:
        raise ConfigError(
            f"{folder}: the teacher cache holds no tokens, but a loss asks for them; make it again with --tokens"
        )
    return TeacherCache(folder, manifest, records.cameras, tokens)

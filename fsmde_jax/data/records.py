"""A folder of records: the manifest that says what is in it, and random access to its rig samples.

`open_records("records/nuscenes_train")` checks the folder against its manifest and returns a `Records`; indexing it
gives a `schema.RigSample` with the images still encoded. Several folders, comma-separated, are read one after another
as one set.
"""

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fsmde_jax.data import schema
from fsmde_jax.data.tfrecord import TFRecordReader
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.names import nearest


def load_manifest(folder: str | Path, prepare: str = "") -> schema.Manifest:
    """Reads and checks `manifest.json` of one records folder.

    Args:
      folder: the records folder.
      prepare: the command that makes it, added to the messages about a missing folder.

    Raises:
      DataError: no such folder, conversion not finished, not a manifest, or made by another format version.
    """
    folder = Path(folder)
    make = f"make it with\n  {prepare}" if prepare else "make it with data_prep (python -m data_prep.nuscenes --help)"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such records folder; {make}")
    path = folder / schema.MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            f"{folder}: has no {schema.MANIFEST_NAME}, so its conversion did not finish (or this is not a records"
            " folder); run the same data_prep command again, it goes on where it stopped"
            + (f":\n  {prepare}" if prepare else "")
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); convert this split again") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(entries).__name__}; convert this split again")
    version = entries.get("format_version")
    if version != schema.FORMAT_VERSION:
        raise DataError(
            f"{path}: records of format version {version}, but this program reads version {schema.FORMAT_VERSION};"
            " convert the dataset again with this version's data_prep"
        )
    names = {field.name for field in dataclasses.fields(schema.Manifest)}
    missing = sorted(names - set(entries))
    if missing:
        raise DataError(f"{path}: entries {missing} are missing; convert this split again")
    manifest = schema.Manifest(**{name: entries[name] for name in names})
    for name, good in _types(manifest).items():
        if not good:
            shown = repr(getattr(manifest, name))[:80]
            raise DataError(f"{path}: damaged manifest: {name} cannot be {shown}; convert this split again")
    return manifest


def _types(m: schema.Manifest) -> dict[str, bool]:
    """Whether each entry of a manifest is of the right type: {name: is right}."""

    def all_are(values: Any, kind: Callable[[Any], bool], length: int | None = None) -> bool:
        return isinstance(values, list) and all(map(kind, values)) and length in (None, len(values))

    def text(value: Any) -> bool:
        return isinstance(value, str)

    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)

    def shard(value: Any) -> bool:
        kinds = {"name": text, "num_records": count, "num_bytes": count, "sha256": text}
        return isinstance(value, dict) and all(name in value and kind(value[name]) for name, kind in kinds.items())

    def skipped(value: Any) -> bool:
        return isinstance(value, dict) and text(value.get("sample_id")) and text(value.get("reason"))

    return {
        **{name: text(getattr(m, name)) for name in ("dataset", "source_version", "split", "fingerprint")},
        **{name: count(getattr(m, name)) for name in ("num_samples", "sweeps")},
        **{name: number(getattr(m, name)) for name in ("min_depth", "max_depth")},
        **{name: isinstance(getattr(m, name), dict) for name in ("options", "statistics")},
        **{name: all_are(getattr(m, name), text) for name in ("cameras", "scenes")},
        **{name: isinstance(getattr(m, name), bool) for name in ("complete_split", "dense_depth")},
        "shards": all_are(m.shards, shard),
        "point_rule": m.point_rule in ("round", "truncate"),
        "image_size": m.image_size is None or all_are(m.image_size, count, 2),
        "focal_by_width": all_are(m.focal_by_width, number, 2),
        "skipped": all_are(m.skipped, skipped),
    }


def shared_scenes(a: "Records", b: "Records") -> list[str]:
    """Names of the scenes that two sets of records have in common, sorted; scenes of different datasets never match."""
    pairs = [(first, second) for first in a.manifests for second in b.manifests if first.dataset == second.dataset]
    return sorted({scene for first, second in pairs for scene in set(first.scenes) & set(second.scenes)})


def require_dense_depth(records: "Records", asked: str) -> None:
    """Raises `ConfigError` unless every folder holds dense depth; `asked` says which key wants it."""
    lacking = [str(folder) for folder, m in zip(records.folders, records.manifests, strict=True) if not m.dense_depth]
    if lacking:
        raise ConfigError(
            f"{asked} needs dense depth, but there is none in {', '.join(lacking)}: use records of a dataset that has"
            " it (python -m data_prep.world renders one), converted with --dense_depth auto, or change the key"
        )


def _open_shards(folder: Path, manifest: schema.Manifest) -> TFRecordReader:
    """The reader over a folder's shards, after checking them against the manifest."""
    paths = []
    for shard in manifest.shards:
        path = folder / shard["name"]
        if not path.is_file():
            raise DataError(f"{path}: missing, but {schema.MANIFEST_NAME} lists it; copy it or convert the split again")
        size = path.stat().st_size
        if size != shard["num_bytes"]:
            raise DataError(
                f"{path}: has {size} bytes, but {schema.MANIFEST_NAME} says {shard['num_bytes']}; it was cut short or"
                " replaced: copy it again or convert this split again"
            )
        paths.append(path)
    reader = TFRecordReader(paths)
    if len(reader) != manifest.num_samples:
        raise DataError(
            f"{folder}: holds {len(reader)} records, but {schema.MANIFEST_NAME} says {manifest.num_samples};"
            " convert this split again"
        )
    if len(reader) == 0:
        raise DataError(
            f"{folder}: holds no samples; check --split, --limit and the list `skipped` in {schema.MANIFEST_NAME}"
        )
    return reader


class Records:
    """Random access to the rig samples of one or several records folders. Safe to share between threads.

    Attributes:
      folders: the folders, in the order read.
      manifests: one `schema.Manifest` per folder.
      cameras: names of the cameras of every sample, in array order.
    """

    def __init__(self, folders: Sequence[Path], manifests: Sequence[schema.Manifest], cameras: Sequence[str] = ()):
        self.folders = list(folders)
        self.manifests = list(manifests)
        self.cameras = _choose_cameras(self.folders, self.manifests, tuple(cameras))
        self._readers = [_open_shards(f, m) for f, m in zip(self.folders, self.manifests, strict=True)]
        self._starts = np.cumsum([0, *(len(r) for r in self._readers)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        folder = bisect.bisect_right(self._starts, index) - 1
        return folder, index - self._starts[folder]

    def where(self, index: int) -> str:
        """File and record number of sample `index`, for messages."""
        folder, local = self._locate(int(index))
        return self._readers[folder].where(local)

    def __getitem__(self, index: int) -> schema.RigSample:
        """Sample `index` with the chosen cameras in the chosen order; a camera that it lacks has empty image bytes.

        Raises:
          DataError: the record is damaged or not of this format, or has none of the cameras; names file and record.
        """
        folder, local = self._locate(int(index))
        reader = self._readers[folder]
        sample = schema.decode(reader[local], reader.where(local))
        return select_cameras(sample, self.cameras, reader.where(local))

    def __iter__(self) -> Iterator[schema.RigSample]:
        return (self[i] for i in range(len(self)))

    def manifest_of(self, index: int) -> schema.Manifest:
        """Manifest of the folder that sample `index` comes from (its point rule, its depth range)."""
        return self.manifests[self._locate(int(index))[0]]

    @property
    def manifest(self) -> schema.Manifest:
        """The manifest; of several folders: the first one's with samples, shards, scenes and ranges put together."""
        first, several = self.manifests[0], self.manifests
        if len(several) == 1:
            return first
        focal = [f for m in several for f in m.focal_by_width]
        return dataclasses.replace(
            first,
            dataset="+".join(dict.fromkeys(m.dataset for m in several)),
            split="+".join(m.split for m in several),
            complete_split=False,
            num_samples=len(self),
            shards=[s for m in several for s in m.shards],
            cameras=list(self.cameras),
            dense_depth=all(m.dense_depth for m in several),
            min_depth=min(m.min_depth for m in several),
            max_depth=max(m.max_depth for m in several),
            focal_by_width=[min(focal), max(focal)] if focal else [],
            scenes=[s for m in several for s in m.scenes],
            skipped=[s for m in several for s in m.skipped],
            fingerprint=self.fingerprint,
        )

    @property
    def fingerprint(self) -> str:
        """Identity of the data: the manifest's; of several folders: a hash over theirs, in order."""
        prints = [m.fingerprint for m in self.manifests]
        return prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()

    def close(self) -> None:
        """Closes the record files; they are opened again when needed."""
        for reader in self._readers:
            reader.close()


def _choose_cameras(
    folders: Sequence[Path], manifests: Sequence[schema.Manifest], cameras: tuple[str, ...]
) -> list[str]:
    """The cameras of every sample, in array order (`ConfigError`: unknown, repeated, or folders that differ)."""
    known = list(dict.fromkeys(name for m in manifests for name in m.cameras))
    if not cameras:
        for folder, manifest in zip(folders, manifests, strict=True):
            if manifest.cameras != manifests[0].cameras:
                raise ConfigError(
                    f"{folder}: its cameras {manifest.cameras} differ from {manifests[0].cameras} in {folders[0]};"
                    " name the cameras to use, in order, in data.cameras"
                )
        return known
    for name in cameras:
        if name not in known:
            near = nearest(name, known, cutoff=0.0)
            hint = f"did you mean {near!r}? " if near else ""
            where = ", ".join(map(str, folders))
            raise ConfigError(f"data.cameras: no camera {name!r} in {where}; {hint}there are {known}")
    if len(set(cameras)) != len(cameras):
        raise ConfigError(f"data.cameras: a camera is named twice in {list(cameras)}")
    return list(cameras)


def select_cameras(sample: schema.RigSample, cameras: Sequence[str], where: str = "record") -> schema.RigSample:
    """The sample with exactly `cameras`, in that order.

    A camera that the sample lacks keeps its place: empty image bytes, no points, and a harmless calibration (60 degree
    pinhole, identity extrinsics), so that nothing divides by zero; `transforms.load_rig` sets its `view_mask` False.

    Raises:
      DataError: the sample has none of the cameras.
    """
    if list(sample.camera_names) == list(cameras):
        return sample
    position = {name: i for i, name in enumerate(sample.camera_names)}
    rows = [position.get(name, -1) for name in cameras]
    absent = np.array([row < 0 for row in rows])
    if absent.all():
        raise DataError(f"{where}: has none of the cameras {list(cameras)}, only {sample.camera_names}")
    fallback = next(row for row in rows if row >= 0)
    take = [row if row >= 0 else fallback for row in rows]
    none = np.zeros((0, 3), np.float32)

    def pick(values: Sequence[Any], empty: Any) -> list[Any]:
        return [values[row] if row >= 0 else empty for row in rows]

    result = dataclasses.replace(
        sample,
        camera_names=list(cameras),
        images=pick(sample.images, b""),
        image_size=sample.image_size[take],
        native_size=sample.native_size[take],
        intrinsics=sample.intrinsics[take],
        cam_to_ego=sample.cam_to_ego[take],
        ego_to_global=sample.ego_to_global[take],
        camera_timestamps_us=sample.camera_timestamps_us[take],
        points=pick(sample.points, none),
        extra_points=pick(sample.extra_points, none),
        ego_masks=pick(sample.ego_masks, b""),
        dense_depth=pick(sample.dense_depth, b""),
    )
    for i in np.flatnonzero(absent):
        height, width = result.image_size[i]
        focal = 0.5 * width / np.tan(np.pi / 6)
        result.intrinsics[i] = [[focal, 0, width / 2 - 0.5], [0, focal, height / 2 - 0.5], [0, 0, 1]]
        result.cam_to_ego[i] = np.eye(4)
    return result


def open_records(
    folders: str | Path | Sequence[str | Path], cameras: Sequence[str] = (), *, prepare: str = ""
) -> Records:
    """Opens one or several records folders (a comma-separated string or a sequence).

    Args:
      folders: "records/a" or "records/a,records/b" or a sequence of paths.
      cameras: names of the cameras to use, in array order; empty = all of the records, in ring order.
      prepare: the data_prep command that makes the records; part of the message when they are missing.

    Raises:
      DataError: a folder or shard is missing, unfinished, cut short or of another format version.
      ConfigError: no folder given, an unknown camera (the nearest name is suggested), or folders of different rigs.
    """
    if isinstance(folders, Path):
        folders = [folders]
    elif isinstance(folders, str):
        folders = folders.split(",")
    paths = [Path(str(folder).strip()) for folder in folders if str(folder).strip()]
    if not paths:
        make = f"; make one with\n  {prepare}" if prepare else ""
        raise ConfigError(f"no records folder given (data.train_records or data.eval_records is empty){make}")
    return Records(paths, [load_manifest(path, prepare) for path in paths], cameras)

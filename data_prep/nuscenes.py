"""nuScenes to records: `python -m data_prep.nuscenes --dataroot D --version v1.0-mini --split mini_train --out R`.

Tables and splits come from the official nuscenes-devkit. Annotation tables are not loaded: depth needs none of them,
and they are about half of the devkit's memory (docs/data_format.md has figures).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import cli, dense, leakage, rendered
from data_prep.plan import CameraFrame, SamplePlan, Source, Sweep, ring_of, suggest
from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError, DataError, exit_with_message

VERSIONS = ("v1.0-mini", "v1.0-trainval", "v1.0-test")
OFFICIAL_SAMPLES = {"train": 28130, "val": 6019, "mini_train": 323, "mini_val": 81}
LIDAR = "LIDAR_TOP"
MIN_DEPTH, MAX_DEPTH = 0.1, 80.0
_UNUSED_TABLES = ("category", "attribute", "visibility", "instance", "sample_annotation")
_FIELDS = {  # of the tables that depth needs: checked for every row at loading
    "sample": {"token", "timestamp", "prev", "next", "scene_token"},
    "sample_data": {
        "token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "timestamp", "is_key_frame", "height",
        "width", "filename", "prev", "next",
    },
    "ego_pose": {"token", "rotation", "translation"},
    "calibrated_sensor": {"token", "sensor_token", "rotation", "translation", "camera_intrinsic"},
    "sensor": {"token", "channel", "modality"},
    "scene": {"token", "name", "first_sample_token"},
}  # fmt: skip
_BROKEN = (KeyError, TypeError, ValueError, IndexError, AttributeError)  # what damaged tables lead to
_NEAR = 1.0  # metres: the devkit's own limit for dropping the car itself from neighbouring sweeps


def load_devkit() -> tuple[Any, Any]:
    """(NuScenes class, create_splits_scenes); imported here because the devkit is not a plain dependency.

    Raises:
      ConfigError: it is not installed; says how to install it.
    """
    try:
        from nuscenes.nuscenes import NuScenes
        from nuscenes.utils.splits import create_splits_scenes
    except ImportError as error:
        raise ConfigError(
            f"the official nuscenes-devkit cannot be imported ({error}); install it with\n"
            "  pip install --no-deps -r requirements-devkit.txt\n"
            "(--no-deps because it asks for numpy<2, which it does not need)"
        ) from error
    return NuScenes, create_splits_scenes


def load_tables(dataroot: str | Path, version: str) -> Any:
    """The devkit's `NuScenes` object with the tables that depth needs.

    Raises:
      DataError: the version or a table is missing or broken; names the file.
    """
    base, _ = load_devkit()
    if version not in VERSIONS:
        raise ConfigError(f"--version={version}: unknown{suggest(version, VERSIONS)}")
    root = Path(dataroot) / version
    if not root.is_dir():
        expected = f"--dataroot must hold {version}/ (tables), samples/ and, for --sweeps, sweeps/"
        raise DataError(f"{root}: no such folder; {rendered.advice(root.parent) or expected}")

    class Tables(base):  # type: ignore[misc, valid-type]
        def __load_table__(self, table_name: str) -> Any:
            if table_name in _UNUSED_TABLES:
                return []
            path = root / f"{table_name}.json"
            try:
                table = json.loads(path.read_bytes())
            except OSError as error:
                raise DataError(
                    f"{path}: missing table ({error.strerror}); unpack the {version} metadata archive again"
                ) from error
            except ValueError as error:
                raise DataError(
                    f"{path}: broken table ({error}); unpack the {version} metadata archive again"
                ) from error
            if not isinstance(table, list):
                raise DataError(f"{path}: broken table (not a list); unpack the {version} metadata archive again")
            needed = _FIELDS.get(table_name, {"token"})
            for number, row in enumerate(table):
                if not isinstance(row, dict) or not needed <= row.keys():
                    lacks = f"lacks {sorted(needed - row.keys())}" if isinstance(row, dict) else "is no object"
                    raise DataError(
                        f"{path}: broken table (entry {number} {lacks}); unpack the {version} metadata archive again"
                    )
            return table

    try:
        return Tables(version=version, dataroot=str(dataroot), verbose=False)
    except _BROKEN as error:
        raise DataError(
            f"{root}: the tables do not fit together ({_reason(error)}); unpack the {version} metadata archive again"
        ) from error
    except AssertionError as error:  # the devkit insists on the map pictures of map.json
        raise DataError(
            f"{dataroot}: {error}; unpack the {version} metadata archive again (it holds maps/, too)"
        ) from error


def open_split(
    dataroot: str | Path,
    version: str,
    split: str,
    *,
    cameras: list[str] | None = None,
    sweeps: int = 0,
    dense_depth: str = "auto",
    tables: Any = None,
) -> Source:
    """The split as far as the tables hold it (a part of the official scenes or samples is fine, and recorded).

    Args:
      dataroot: nuScenes folder; one that the world rendered becomes the dataset "world" (`data_prep.rendered`).
      version: tables to read, e.g. "v1.0-mini".
      split: official split.
      cameras: channels to take; None = all.
      sweeps: neighbouring sweeps per sample.
      dense_depth: "auto" takes `dense_depth/` where the dataroot has that folder, "off" does not.
      tables: what `load_tables` gave for the same dataroot and version, to share it between splits; None = load it.

    Raises:
      ConfigError, DataError: unknown version, split or camera; broken or missing tables; no scene of the split is here.
    """
    _, create_splits_scenes = load_devkit()
    official = create_splits_scenes()
    if split not in official:
        raise ConfigError(f"--split={split}: unknown{suggest(split, official)}")
    leakage.check_lists({s: official[s] for s in ("train", "val", "test")}, "nuscenes-devkit's split lists")
    tables = load_tables(dataroot, version) if tables is None else tables
    by_name = {str(scene["name"]): scene for scene in tables.scene}
    scenes = [by_name[name] for name in official[split] if name in by_name]
    if not scenes:
        raise DataError(
            f"{dataroot}: {version} holds no scene of split {split!r}; it holds {', '.join(sorted(by_name)[:5])}, ..."
        )
    try:
        tokens = [token for scene in scenes for token in _sample_tokens(tables, scene)]
        seeds = rendered.nuscenes_seeds(tables)
        complete = len(scenes) == len(official[split]) and len(tokens) == OFFICIAL_SAMPLES.get(split, -1)
        scene_of = {scene["token"]: scene["name"] for scene in scenes}
        if seeds is not None:
            scene_of = {token: rendered.scene_name(name, seeds[name]) for token, name in scene_of.items()}
        ring = ring_of(_camera_poses(tables, tokens[0]), cameras, f"{dataroot} {version}")
        sample_scenes = [scene_of[tables.get("sample", token)["scene_token"]] for token in tokens]
    except _BROKEN as error:
        raise DataError(
            f"{dataroot}: the {version} tables do not fit together ({_reason(error)}); unpack the metadata again"
        ) from error

    has_dense = dense_depth == "auto" and (Path(dataroot) / dense.FOLDER).is_dir()

    def describe(index: int) -> SamplePlan:
        token = tokens[index]
        try:
            return _describe(tables, token, scene_of, ring, sweeps, has_dense)
        except _BROKEN as error:
            raise DataError(
                f"sample {token!r}: its {version} tables are broken ({_reason(error)}); unpack the metadata again"
            ) from error

    return Source(
        dataset="nuscenes" if seeds is None else rendered.DATASET,
        version=version
        if seeds is None
        else rendered.version_of(f"nuScenes {version}", [seeds[str(scene["name"])] for scene in scenes]),
        split=split,
        sample_ids=tokens,
        sample_scenes=sample_scenes,
        cameras=ring,
        point_rule="round",
        min_depth=MIN_DEPTH,
        max_depth=MAX_DEPTH,
        complete=complete and seeds is None,
        options={},
        describe=describe,
        dense_depth=has_dense,
    )


def _reason(error: Exception) -> str:
    return f"no entry {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"


def _sample_tokens(tables: Any, scene: dict) -> list[str]:
    tokens: dict[str, None] = {}
    token = scene["first_sample_token"]
    while token:
        if token in tokens:
            raise DataError(
                f"{tables.table_root}/sample.json: the samples of {scene['name']} form a circle (`next` of"
                f" {list(tokens)[-1]!r} leads back to {token!r}); unpack the metadata again"
            )
        tokens[token] = None
        token = tables.get("sample", token)["next"]
    return list(tokens)


def _camera_poses(tables: Any, token: str) -> dict[str, np.ndarray]:
    """{camera channel: cam_to_ego} of one sample."""
    data = tables.get("sample", token)["data"]
    channels = [c for c in data if tables.get("sample_data", data[c])["sensor_modality"] == "camera"]
    return {c: _sensor_to_ego(tables, tables.get("sample_data", data[c])) for c in channels}


def _pose(tables: Any, table: str, token: str) -> np.ndarray:
    row = tables.get(table, token)
    try:
        return geometry.pose_matrix(row["rotation"], row["translation"])
    except DataError as error:
        raise DataError(
            f"{tables.table_root}/{table}.json, entry {token!r}: {error}; unpack the metadata again"
        ) from error


def _sensor_to_ego(tables: Any, record: dict) -> np.ndarray:
    return _pose(tables, "calibrated_sensor", record["calibrated_sensor_token"])


def _ego_to_global(tables: Any, record: dict) -> np.ndarray:
    return _pose(tables, "ego_pose", record["ego_pose_token"])


def _native_size(tables: Any, record: dict) -> tuple[int, int]:
    size = (record["height"], record["width"])
    if not all(isinstance(n, int) and n > 0 for n in size):
        raise DataError(
            f"{tables.table_root}/sample_data.json, entry {record['token']!r}: height and width are {size};"
            " unpack the metadata again"
        )
    return size


def _intrinsics(tables: Any, calibration: dict) -> np.ndarray:
    where = f"{tables.table_root}/calibrated_sensor.json, entry {calibration['token']!r}"
    try:
        matrix = np.array(calibration["camera_intrinsic"], np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: camera_intrinsic is no 3x3 matrix ({error}); unpack the metadata again") from error
    geometry.check_intrinsics(matrix, where)
    return matrix


def _sweep(tables: Any, record: dict, *, drop_near: float = 0.0) -> Sweep:
    path = str(Path(tables.dataroot) / record["filename"])
    return Sweep(path, _ego_to_global(tables, record) @ _sensor_to_ego(tables, record), drop_near=drop_near)


def neighbours(tables: Any, record: dict, count: int) -> list[dict]:
    """The `count` nearest sweeps of a LiDAR record, before and after it in turn; fewer at the ends of a scene."""
    found: list[dict] = []
    ends = {"prev": record, "next": record}
    while len(found) < count and any(end[side] for side, end in ends.items()):
        for side in ("prev", "next"):
            if ends[side][side] and len(found) < count:
                ends[side] = tables.get("sample_data", ends[side][side])
                if ends[side]["token"] in (record["token"], *(r["token"] for r in found)):
                    raise DataError(
                        f"{tables.table_root}/sample_data.json: the sweeps around {record['token']!r} form a circle;"
                        " unpack the metadata again"
                    )
                found.append(ends[side])
    return found


def _describe(
    tables: Any, token: str, scene_of: dict[str, str], ring: list[str], sweeps: int, has_dense: bool
) -> SamplePlan:
    sample = tables.get("sample", token)
    missing = [c for c in (*ring, LIDAR) if c not in sample["data"]]
    if missing:
        raise DataError(f"sample {token!r}: no keyframe of {', '.join(missing)} in sample_data.json")
    lidar = tables.get("sample_data", sample["data"][LIDAR])
    frames = []
    for name in ring:
        record = tables.get("sample_data", sample["data"][name])
        calibration = tables.get("calibrated_sensor", record["calibrated_sensor_token"])
        frames.append(
            CameraFrame(
                name=name,
                image=str(Path(tables.dataroot) / record["filename"]),
                native_size=_native_size(tables, record),
                intrinsics=_intrinsics(tables, calibration),
                cam_to_ego=_sensor_to_ego(tables, record),
                ego_to_global=_ego_to_global(tables, record),
                timestamp_us=int(record["timestamp"]),
                dense=dense.path_of(tables.dataroot, name, record["filename"]) if has_dense else None,
            )
        )
    extra = tuple(_sweep(tables, r, drop_near=_NEAR) for r in neighbours(tables, lidar, sweeps))
    scene = scene_of[sample["scene_token"]]
    return SamplePlan(token, scene, int(lidar["timestamp"]), tuple(frames), _sweep(tables, lidar), extra)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.nuscenes",
        description="Converts a nuScenes split to rig records (docs/data_format.md).",
    )
    parser.add_argument(
        "--dataroot", required=True, metavar="D", help="nuScenes folder with samples/ and the version's tables"
    )
    parser.add_argument("--version", default="v1.0-mini", help=f"{', '.join(VERSIONS)} (default v1.0-mini)")
    parser.add_argument(
        "--split", default="mini_train", help="mini_train, mini_val, train, val, test (default mini_train)"
    )
    dense.add_flag(parser)
    cli.add_common_flags(parser, image_size="352x640")
    args = parser.parse_args(argv)
    with exit_with_message():
        cli.check_flags(args)
        opener = cli.opener(
            "data_prep.nuscenes:open_split", args.dataroot, args.version, args.split, cameras=args.cameras,
            sweeps=args.sweeps, dense_depth=args.dense_depth,
        )  # fmt: skip
        cli.run(args, opener)


if __name__ == "__main__":
    main()

"""Any calibrated rig to records: `python -m data_prep.folder --rig rig.yaml --images D --lidar D --out R`.

docs/custom_data.md describes the files with a complete example.
"""

import argparse
import csv
import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np

from data_prep import cli, pointfiles
from data_prep.plan import CameraFrame, SamplePlan, Source, Sweep, ring_of
from data_prep.poses import Poses, read_poses
from data_prep.rig_yaml import TIME_UNITS, Rig, RigCamera, read_rig
from fsmde_jax.errors import ConfigError, DataError, exit_with_message

NEEDS_TIMES = "`match: nearest` needs times; name the files by timestamp or add timestamps.csv"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class Recording:
    """Files of one sensor in time order."""

    paths: list[Path]
    times_us: np.ndarray | None  # [F] int64; None where neither names nor a table give times

    @functools.cached_property
    def by_stem(self) -> dict[str, int]:
        """Index of each file by its name without suffix."""
        return {p.stem: i for i, p in enumerate(self.paths)}


def list_recording(folder: Path, suffixes: tuple[str, ...], unit: str) -> Recording:
    """Files of a folder with their times: from `timestamps.csv` (file,timestamp), or from names that are numbers.

    Raises:
      ConfigError: no such folder. DataError: no file in it, or the table is wrong.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected files {', '.join(suffixes)} in it")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
    if not paths:
        raise DataError(f"{folder}: no file with one of {', '.join(suffixes)}")
    stems: dict[str, str] = {}
    for path in paths:
        if (other := stems.setdefault(path.stem, path.name)) != path.name:
            raise DataError(f"{folder}: {other} and {path.name} have the same name; keep one of them")
    table = folder / "timestamps.csv"
    if table.is_file():
        try:
            times = {
                row["file"]: _microseconds(row["timestamp"], unit)
                for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines())
            }
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{table}: expected a header `file,timestamp` and a number per file (problem: {error})"
            ) from error
        if missing := [p.name for p in paths if p.name not in times]:
            raise DataError(f"{table}: no row for {missing[0]} ({len(missing)} files without one)")
        found = [times[p.name] for p in paths]
    elif all(p.stem.isdigit() for p in paths):
        found = [_microseconds(p.stem, unit) for p in paths]
    else:
        return Recording(paths, None)
    order = np.argsort(found, kind="stable")
    return Recording([paths[i] for i in order], np.array(found, np.int64)[order])


def _microseconds(text: str, unit: str) -> int:
    if text.isdigit():  # exact for 19-digit nanoseconds
        return int(text) // 1000 if unit == "ns" else int(text) * int(TIME_UNITS[unit])
    return round(float(text) * TIME_UNITS[unit])


def match_images(rig: Rig, camera: str, images: Recording, sweep: Path, time_us: int | None) -> int:
    """Index of the image that belongs to a sweep: the same file name without suffix, or the nearest time.

    Raises:
      DataError: there is none, or the nearest is further away than tolerance_ms.
    """
    if rig.match == "name":
        if sweep.stem in images.by_stem:
            return images.by_stem[sweep.stem]
        raise DataError(
            f"{sweep}: no image {sweep.stem}.* of camera {camera} in {images.paths[0].parent} (match: name)"
        )
    if images.times_us is None or time_us is None:
        folder = sweep.parent if time_us is None else images.paths[0].parent
        raise DataError(f"{folder}: {NEEDS_TIMES}")
    index = int(np.abs(images.times_us - time_us).argmin())
    distance = abs(int(images.times_us[index]) - time_us) / 1000
    if distance > rig.tolerance_ms:
        raise DataError(
            f"{sweep}: the nearest image of camera {camera} is {distance:.1f} ms away, tolerance_ms is"
            f" {rig.tolerance_ms:g}"
        )
    return index


def open_folder(
    rig_path: str | Path,
    images: str | Path,
    lidar: str | Path,
    *,
    poses: str | Path | None = None,
    split: str = "train",
    scene: str | None = None,
    cameras: list[str] | None = None,
    sweeps: int = 0,
    dense_depth: str | Path | None = None,
) -> Source:
    """One drive of a user's rig: a sample per LiDAR file.

    Args:
      rig_path: calibration, docs/custom_data.md.
      images: folder with one folder of images per camera.
      lidar: folder of point clouds.
      poses: table of ego poses; None = the rig stands still.
      split: name of the split.
      scene: name of the drive; None = the folder that holds the LiDAR folder.
      cameras: names to take; None = all.
      sweeps: neighbouring sweeps per sample.
      dense_depth: folder with one folder per camera of 16-bit PNG named as the images; None = there is none.

    Raises:
      ConfigError, DataError: see `read_rig`, `list_recording`, `match_images`, `Poses`.
    """
    rig = read_rig(rig_path)
    ring = ring_of({n: c.cam_to_ego for n, c in rig.cameras.items()}, cameras, str(rig_path))
    table = read_poses(poses) if poses else None
    clouds = list_recording(Path(lidar), pointfiles.SUFFIXES, rig.time_unit)
    pictures = {n: list_recording(Path(images) / rig.cameras[n].folder, _IMAGE_SUFFIXES, rig.time_unit) for n in ring}
    if table and clouds.times_us is None:
        raise DataError(f"{lidar}: poses need times; name the files by timestamp or add timestamps.csv")
    if sweeps and table is None:
        raise ConfigError("--sweeps needs --poses: neighbouring sweeps are moved by the ego poses")
    if dense_depth and not Path(dense_depth).is_dir():
        raise ConfigError(
            f"--dense_depth={dense_depth}: no such folder; expected <camera folder>/<image name>.png in it"
        )
    drive = scene or Path(lidar).absolute().parent.name

    def frame(n: str, sweep: Path, time_us: int | None) -> CameraFrame:
        index = match_images(rig, n, pictures[n], sweep, time_us)
        return _frame(n, rig.cameras[n], pictures[n], index, table, dense_depth)

    def describe(index: int) -> SamplePlan:
        own = _sweep(rig, clouds, index, table)
        time_us = int(clouds.times_us[index]) if clouds.times_us is not None else None
        frames = tuple(frame(n, clouds.paths[index], time_us) for n in ring)
        around = [
            k
            for step in range(1, len(clouds.paths))
            for k in (index - step, index + step)
            if 0 <= k < len(clouds.paths)
        ]
        extra = tuple(_sweep(rig, clouds, k, table) for k in around[:sweeps])
        return SamplePlan(f"{drive}/{clouds.paths[index].stem}", drive, time_us or 0, frames, own, extra)

    return Source(
        dataset="folder",
        version=rig.name,
        split=split,
        sample_ids=[f"{drive}/{p.stem}" for p in clouds.paths],
        sample_scenes=[drive] * len(clouds.paths),
        cameras=ring,
        point_rule=rig.point_rule,  # type: ignore[arg-type]
        min_depth=rig.min_depth,
        max_depth=rig.max_depth,
        complete=False,  # reserved for official splits
        options={"whole_drive": True, "rig": _digest(rig_path, poses, [c.mask for c in rig.cameras.values()])},
        describe=describe,
        dense_depth=dense_depth is not None,
    )


def _sweep(rig: Rig, clouds: Recording, index: int, table: Poses | None) -> Sweep:
    ego = table.at("lidar", int(clouds.times_us[index])) if table and clouds.times_us is not None else np.eye(4)
    return Sweep(str(clouds.paths[index]), ego @ rig.sensor_to_ego, rig.bin_columns)


def _frame(
    name: str, camera: RigCamera, images: Recording, index: int, table: Poses | None, dense_depth: str | Path | None
) -> CameraFrame:
    time_us = int(images.times_us[index]) if images.times_us is not None else 0
    if table and images.times_us is None:
        raise DataError(
            f"{images.paths[0].parent}: poses need times; name the files by timestamp or add timestamps.csv"
        )
    return CameraFrame(
        name=name,
        image=str(images.paths[index]),
        native_size=camera.native_size,
        intrinsics=camera.intrinsics,
        cam_to_ego=camera.cam_to_ego,
        ego_to_global=table.at(name, time_us) if table else np.eye(4),
        timestamp_us=time_us,
        mask=camera.mask,
        dense=str(Path(dense_depth) / camera.folder / f"{images.paths[index].stem}.png") if dense_depth else None,
    )


def _digest(rig_path: str | Path, poses: str | Path | None, masks: list[str | None]) -> str:
    """sha256 of the calibration, poses and masks: a corrected calibration is another conversion."""
    total = hashlib.sha256()
    for path in (rig_path, poses, *masks):
        try:
            total.update(Path(path).read_bytes() if path else b"-")
        except OSError as error:
            raise DataError(f"{path}: cannot read ({error.strerror})") from error
    return total.hexdigest()


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.folder",
        description="Converts images and point clouds of any calibrated rig (docs/custom_data.md).",
    )
    parser.add_argument("--rig", required=True, metavar="rig.yaml", help="calibration of cameras and LiDAR")
    parser.add_argument("--images", required=True, metavar="D", help="folder with one folder of images per camera")
    parser.add_argument("--lidar", required=True, metavar="D", help="folder of point clouds: .bin .npy .npz .ply .pcd")
    parser.add_argument("--poses", metavar="FILE", help="ego poses, .csv or .json; without them the rig stands still")
    parser.add_argument(
        "--dense_depth", metavar="D", help="folder with dense depth as 16-bit PNG, value = metres * 256"
    )
    parser.add_argument("--split", default="train", help="name of this split, e.g. train or val (default train)")
    parser.add_argument("--scene", help="name of this drive (default: the folder that holds the LiDAR folder)")
    cli.add_common_flags(parser, image_size="native")
    args = parser.parse_args(argv)
    with exit_with_message():
        cli.check_flags(args)
        opener = cli.opener(
            "data_prep.folder:open_folder", args.rig, args.images, args.lidar, poses=args.poses, split=args.split,
            scene=args.scene, cameras=args.cameras, sweeps=args.sweeps, dense_depth=args.dense_depth,
        )  # fmt: skip
        cli.run(args, opener)


if __name__ == "__main__":
    main()

"""DDAD (or other DGP data) to records: `python -m data_prep.ddad --json ddad.json --split val --out R --masks DIR`."""

import argparse
import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

from data_prep import cli, dense, dgp, leakage, rendered
from data_prep.plan import CameraFrame, SamplePlan, Source, Sweep, ring_of, suggest
from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError, DataError, exit_with_message

OFFICIAL = {"train": (150, 12650), "val": (50, 3950)}  # scenes, samples of DDAD
LIDAR = "LIDAR"
MIN_DEPTH, MAX_DEPTH = 0.1, 200.0


class _PlainPickle(pickle.Unpickler):
    """Reads pickles of plain numbers, texts, lists and dicts; anything that would run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


class MaskSets:
    """Self-occlusion masks `DIR/<set>/<CAMERA>_mask.png` (255 = visible) and which set each scene uses.

    The table is `DIR/scene_to_set.json` ({"000150": 0, ...}) or VFDepth's `DIR/mask_idx_dict.pkl`; without one,
    `one_set` for all scenes, or the only set folder there is.
    """

    def __init__(self, folder: str | Path, one_set: str | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(f"--masks={folder}: no such folder; expected {folder}/<set>/CAMERA_01_mask.png ...")
        self.sets = sorted(p.name for p in self.folder.iterdir() if p.is_dir())
        self.table = self._read_table() if one_set is None else {}
        self.default = one_set
        if one_set is not None and one_set not in self.sets:
            raise ConfigError(f"--mask_set={one_set}: no such set in {folder}{suggest(one_set, self.sets)}")
        if one_set is None and not self.table:
            if len(self.sets) != 1:
                raise ConfigError(
                    f"--masks={folder}: holds the sets {self.sets} but no table of which scene uses which;"
                    " add scene_to_set.json"
                    ' ({"000150": 0, ...}) or name one set for all scenes with --mask_set'
                )
            self.default = self.sets[0]

    def _read_table(self) -> dict[str, str]:
        for name in ("scene_to_set.json", "mask_idx_dict.pkl"):
            path = self.folder / name
            if not path.is_file():
                continue
            try:
                data = path.read_bytes()
                table = json.loads(data) if path.suffix == ".json" else _PlainPickle(io.BytesIO(data)).load()
                return {_scene_key(scene): str(chosen) for scene, chosen in table.items()}
            except Exception as error:  # damaged pickles raise anything
                raise DataError(
                    f"{path}: cannot read this table ({error}); expected a dict of plain scene name -> set number."
                    f' Write {self.folder}/scene_to_set.json instead, e.g. {{"000150": 0, ...}}'
                ) from error
        return {}

    def path(self, scene: str, camera: str) -> str:
        """Mask file of a camera; `DataError` where the table or the file is missing."""
        chosen = self.default if self.default is not None else self.table.get(_scene_key(scene))
        if chosen is None:
            raise DataError(f"{self.folder}: the table has no entry for scene {scene}; add it, or use --mask_set")
        path = self.folder / chosen / f"{camera}_mask.png"
        if not path.is_file():
            raise DataError(
                f"{path}: missing mask of scene {scene}, camera {camera};"
                " a camera without own body needs an all-white mask"
            )
        return str(path)

    def digest(self) -> str:
        """sha256 over all masks and the table, so that other masks are another conversion."""
        total = hashlib.sha256(json.dumps([self.table, self.default], sort_keys=True).encode())
        for path in sorted(self.folder.glob("*/*_mask.png")):
            total.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
        return total.hexdigest()


def _scene_key(scene: Any) -> str:
    """Scene names are numbers with leading zeros in DDAD; tables may hold 150, "150" or "000150"."""
    return str(int(scene)) if str(scene).isdigit() else str(scene)


def open_split(
    dataset_json: str | Path, split: str, *, cameras: list[str] | None = None, sweeps: int = 0,
    masks: MaskSets | None = None, dense_depth: str = "auto",
) -> Source:  # fmt: skip
    """A split of a DGP dataset.

    Args:
      dataset_json: the dataset's index; one that the world rendered becomes the dataset "world" (`data_prep.rendered`).
      split: e.g. "val".
      cameras: names to take; None = all.
      sweeps: neighbouring sweeps per sample.
      masks: self-occlusion masks; None = none.
      dense_depth: "auto" takes `<scene>/dense_depth/` where a scene of the split has that folder, "off" does not.

    Raises:
      ConfigError, DataError: unknown split or camera, broken or missing json, a scene in two splits.
    """
    files = dgp.scene_files(dataset_json)
    if split not in files:
        raise ConfigError(f"--split={split}: unknown{suggest(split, files)}")
    by_split = {name: [p.parent.name for p in paths] for name, paths in files.items() if name != "train_overfit"}
    leakage.check_lists(by_split, str(dataset_json))
    if not files[split]:
        filled = [name for name, paths in files.items() if paths]
        raise DataError(f"{dataset_json}: split {split!r} lists no scene; filled splits: {', '.join(filled) or 'none'}")
    version, seed = _version(dataset_json)
    names = {
        path: path.parent.name if seed is None else rendered.scene_name(path.parent.name, seed) for path in files[split]
    }
    has_dense = dense_depth == "auto" and any((path.parent / dense.FOLDER).is_dir() for path in files[split])
    where: list[tuple[Path, int]] = []
    ids: list[str] = []
    for path in files[split]:  # once here for the ids, once more when its samples are described
        scene = dgp.read_scene(path)
        where += [(path, i) for i in range(len(scene))]
        ids += [_sample_id(names[path], i, sample) for i, sample in enumerate(scene)]
    complete = OFFICIAL.get(split) == (len(files[split]), len(where))
    if not where:
        raise DataError(f"{dataset_json}: the scenes of split {split!r} hold no sample")
    first = dgp.read_scene(where[0][0])[0]
    calibration = dgp.read_calibration(first.calibration)
    images = [name for name, datum in first.datums.items() if datum.kind == "image"]
    if unknown := [name for name in images if name not in calibration]:
        raise DataError(f"{first.calibration}: no calibration of {', '.join(unknown)}; unpack this file again")
    ring = ring_of({name: calibration[name].sensor_to_ego for name in images}, cameras, f"{where[0][0]}")

    def describe(index: int) -> SamplePlan:
        path, number = where[index]
        return _describe(ids[index], names[path], path, number, ring, sweeps, masks, has_dense)

    return Source(
        dataset="ddad" if seed is None else rendered.DATASET,
        version=version,
        split=split,
        sample_ids=ids,
        sample_scenes=[names[path] for path, _ in where],
        cameras=ring,
        point_rule="truncate",
        min_depth=MIN_DEPTH,
        max_depth=MAX_DEPTH,
        complete=complete and seed is None,
        options={"masks": masks.digest() if masks else None},
        describe=describe,
        dense_depth=has_dense,
    )


def _version(dataset_json: str | Path) -> tuple[str, str | None]:
    """What the manifest says of the version, and the seed of a rendered dataset."""
    metadata = dgp.read_json(Path(dataset_json)).get("metadata", {})
    seed = rendered.dgp_seed(metadata)
    if seed is not None:
        return rendered.version_of("DGP", [seed]), seed
    return f"{metadata.get('name', 'DDAD')} {metadata.get('version', '')}".strip(), None


def _sample_id(scene: str, index: int, sample: dgp.Sample) -> str:
    """`<scene>/<number in the scene>/<stem of the LiDAR file>`."""
    lidar = sample.datums.get(LIDAR)
    return f"{scene}/{index:04d}/{lidar.path.stem if lidar else 'no-lidar'}"


def _nearest(index: int, count: int, total: int) -> list[int]:
    """The `count` nearest neighbours of `index`, before and after it in turn."""
    order = [k for step in range(1, total) for k in (index - step, index + step) if 0 <= k < total]
    return order[:count]


def _describe(
    sample_id: str, name: str, path: Path, index: int, ring: list[str], sweeps: int, masks: MaskSets | None,
    has_dense: bool,
) -> SamplePlan:  # fmt: skip
    scene = dgp.read_scene(path)
    sample = scene[index]
    missing = [n for n in (*ring, LIDAR) if n not in sample.datums]
    if missing:
        raise DataError(f"{path}: sample {index} has no datum of {', '.join(missing)}")
    calibration = dgp.read_calibration(sample.calibration)
    frames = []
    for camera in ring:
        if camera not in calibration:
            raise DataError(f"{sample.calibration}: no calibration of {camera}")
        datum, known = sample.datums[camera], calibration[camera]
        geometry.check_rigid(known.sensor_to_ego, f"{sample.calibration}, camera {camera}, extrinsics")
        frames.append(
            CameraFrame(
                name=camera,
                image=str(datum.path),
                native_size=datum.native_size,
                intrinsics=known.intrinsics,
                cam_to_ego=known.sensor_to_ego,
                # the pose is the camera's; so LiDAR -> camera goes through the poses, and the extrinsic cancels out
                ego_to_global=datum.sensor_to_global @ geometry.invert_rigid(known.sensor_to_ego),
                timestamp_us=datum.timestamp_us,
                mask=masks.path(path.parent.name, camera) if masks else None,
                dense=dense.path_of(path.parent, camera, datum.path) if has_dense else None,
            )
        )
    own = sample.datums[LIDAR]
    around = [scene[k].datums[LIDAR] for k in _nearest(index, sweeps, len(scene)) if LIDAR in scene[k].datums]
    sweeps_around = tuple(Sweep(str(d.path), d.sensor_to_global) for d in around)
    return SamplePlan(
        sample_id,
        name,
        own.timestamp_us,
        tuple(frames),
        Sweep(str(own.path), own.sensor_to_global),
        sweeps_around,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.ddad", description="Converts a DDAD split to rig records (docs/data_format.md)."
    )
    parser.add_argument("--json", required=True, metavar="ddad.json", help="the dataset's index; scenes lie beside it")
    parser.add_argument("--split", default="val", help="train or val (default val)")
    parser.add_argument(
        "--masks", metavar="DIR", help="self-occlusion masks DIR/<set>/CAMERA_XX_mask.png with scene_to_set.json"
    )
    parser.add_argument("--mask_set", metavar="SET", help="use this set for all scenes instead of the table")
    dense.add_flag(parser)
    cli.add_common_flags(parser, image_size="384x640")
    args = parser.parse_args(argv)
    with exit_with_message():
        cli.check_flags(args)
        if args.mask_set is not None and not args.masks:
            raise ConfigError("--mask_set needs --masks DIR")
        masks = MaskSets(args.masks, args.mask_set) if args.masks else None
        if masks is None:
            print("note: without --masks, LiDAR points on the car's own body become wrong labels (docs/data_format.md)")
        opener = cli.opener(
            "data_prep.ddad:open_split", args.json, args.split, cameras=args.cameras, sweeps=args.sweeps, masks=masks,
            dense_depth=args.dense_depth,
        )  # fmt: skip
        cli.run(args, opener)


if __name__ == "__main__":
    main()

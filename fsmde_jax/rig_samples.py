"""Frames of a rig from records, or straight from nuScenes and DDAD as they were downloaded."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_prep import ddad, dgp, nuscenes, plan
from fsmde_jax import geometry
from fsmde_jax.data import transforms
from fsmde_jax.data.records import Records
from fsmde_jax.data.schema import RigSample
from fsmde_jax.errors import ConfigError, DataError

NUSCENES_SPLITS = {
    "v1.0-mini": ("mini_train", "mini_val"), "v1.0-trainval": ("train", "val"), "v1.0-test": ("test",),
}  # fmt: skip


@dataclasses.dataclass
class RigFrame:
    """One moment of a rig: cameras fire at their own times, within a tenth of a second or so.

    Its reference is the ego frame at the first camera's time. `cam_to_reference` leads there, `lidar` lies in it.
    """

    name: str
    cameras: list[str]  # ring order
    images: list[np.ndarray]  # N x [H, W, 3] uint8 RGB
    intrinsics: np.ndarray  # [N, 3, 3] pixels at the images' sizes
    cam_to_ego: np.ndarray  # [N, 4, 4]
    visible: list[np.ndarray] | None = None  # N x [H, W] bool, False = the car's own body
    lidar: np.ndarray | None = None  # measured points [P, 3] metres in the reference
    labels: list[np.ndarray] | None = None  # N x [P_i, 3]: u, v at the images' sizes, metres
    ego_to_global: np.ndarray | None = None  # [N, 4, 4], each at its camera's time, where the car's way is known
    time_us: int | None = None
    scene: str = ""  # name of the drive

    @property
    def cam_to_reference(self) -> np.ndarray:
        """[N, 4, 4]: each camera, at its own time, to the ego frame at the first camera's time.

        What stands still lies in one place then, whichever camera saw it. `cam_to_ego` where no poses are known.
        """
        if self.ego_to_global is None:
            return self.cam_to_ego
        return geometry.invert_rigid(self.ego_to_global[0]) @ self.ego_to_global @ self.cam_to_ego


@dataclasses.dataclass
class Source:
    """A sequence of frames that are read one at a time.

    `count` is how many there are; of videos only what their headers say, 0 = they do not say.
    """

    count: int
    frames: Callable[[], Iterator[RigFrame]]
    what: str


def of_sample(sample: RigSample, where: str) -> RigFrame | None:
    """The cameras of a sample that have a picture; None (with a note) where none has one."""
    present = [i for i in range(sample.num_cameras) if sample.images[i]]
    if not present:
        print(f"note: {where}, sample {sample.sample_id}: no camera has a picture; left out")
        return None
    images, visible, points = [], [], []
    for i in present:
        size = (int(sample.image_size[i, 0]), int(sample.image_size[i, 1]))
        images.append(transforms.decode_image(sample.images[i], size, f"{where}, {sample.camera_names[i]}"))
        native = (int(sample.native_size[i, 0]), int(sample.native_size[i, 1]))
        mask = sample.ego_masks[i]
        shown = transforms.decode_ego_mask(mask, native, size) == 255 if mask else np.ones(size, bool)
        visible.append(shown)
        uvz = sample.points[i].astype(np.float64)
        scale = np.array([size[1] / native[1], size[0] / native[0]])
        points.append(np.concatenate([(uvz[:, :2] + 0.5) * scale - 0.5, uvz[:, 2:]], 1))
    ego_to_global = sample.ego_to_global[present].astype(np.float64)
    ego_to_global[:, :3, 3] += sample.global_origin
    frame = RigFrame(
        sample.sample_id, [sample.camera_names[i] for i in present], images,
        sample.intrinsics[present].astype(np.float64), sample.cam_to_ego[present].astype(np.float64), visible,
        labels=points, ego_to_global=ego_to_global, time_us=sample.timestamp_us or None, scene=sample.scene,
    )  # fmt: skip
    frame.lidar = _measured(sample, present, frame.cam_to_reference)
    return frame


def _measured(sample: RigSample, present: list[int], cam_to_reference: np.ndarray) -> np.ndarray:
    """LiDAR points [P, 3] of a record's cameras `present`, in the frame that `cam_to_reference` [N, 4, 4] leads to."""
    native = sample.native_intrinsics
    found = [np.zeros((0, 3))]
    for i, pose in zip(present, cam_to_reference, strict=True):
        uvz = sample.points[i].astype(np.float64)
        found.append(geometry.transform_points(pose, geometry.unproject(native[i], uvz[:, :2], uvz[:, 2])))
    return np.concatenate(found)


def of_records(records: Records, sample: str = "") -> Source:
    """All records, or the one called `sample`.

    Raises:
      DataError: there is none of that name.
    """
    found: tuple[int, RigSample] | None = None
    if sample:  # names are in the records alone: one after the other, and no further than to the one that is wanted
        found = next(((i, r) for i, r in enumerate(records) if r.sample_id == sample), None)
        if found is None:
            raise DataError(f"{records.folders[0]}: none of the {len(records)} records is called {sample}")
    count = 1 if found else len(records)

    def frames() -> Iterator[RigFrame]:
        for index, record in [found] if found else enumerate(records):
            if (frame := of_sample(record, records.where(index))) is not None:
                yield frame

    return Source(count, frames, f"{count} records")


def is_dgp(place: Path) -> bool:
    """Whether `place` is a file that may be the index of DDAD (or other DGP data)."""
    return place.is_file() and place.suffix == ".json"


def dataset_at(place: Path, masks: ddad.MaskSets | None = None) -> Callable[[], list[plan.Source]] | None:
    """What opens the splits of the nuScenes folder (with one version of its tables), version folder or DGP index (with
    the self-occlusion `masks`) at `place`; None = there is none of these.

    Raises:
      ConfigError: a nuScenes folder with several versions.
    """
    if is_dgp(place):
        filled = [split for split, scenes in dgp.scene_files(place).items() if scenes]
        return lambda: [ddad.open_split(place, split, masks=masks) for split in filled]
    if not place.is_dir():
        return None
    versions = [name for name in NUSCENES_SPLITS if (place / name / "sample.json").is_file()]
    root, name = place, versions[0] if versions else ""
    if len(versions) > 1:
        raise ConfigError(f"{place}: holds {' and '.join(versions)}; name one of them, e.g. {place / versions[0]}")
    if place.name in NUSCENES_SPLITS and (place / "sample.json").is_file():
        root, name = place.parent, place.name
    return (lambda: _nuscenes(root, name)) if name else None


def _nuscenes(root: Path, version: str) -> list[plan.Source]:
    """The splits that have scenes here."""
    tables = nuscenes.load_tables(root, version)  # once for all splits: several GB of the full dataset
    found, error = [], None
    for split in NUSCENES_SPLITS[version]:
        try:
            found.append(nuscenes.open_split(root, version, split, tables=tables))
        except DataError as problem:
            if "holds no scene of split" not in str(problem):
                raise
            error = problem
    if not found and error is not None:
        raise error
    return found


def of_dataset(place: Path, splits: list[plan.Source], sample: str = "") -> Source:
    """All samples of the dataset at `place` as they were recorded, or the one called `sample` (nuScenes: its token).

    Raises:
      DataError: there is none of that name.
    """
    chosen = [(split, i) for split in splits for i, name in enumerate(split.sample_ids) if sample in ("", name)]
    if not chosen:
        total = sum(len(split.sample_ids) for split in splits)
        raise DataError(f"{place}: none of the {total} samples is called {sample}, e.g. {splits[0].sample_ids[0]} is")

    def frames() -> Iterator[RigFrame]:
        for split, index in chosen:
            options = plan.BuildOptions(image_size=None, point_rule=split.point_rule)
            built = plan.build_sample(split.describe(index), options)
            if (frame := of_sample(built, f"{split.dataset} {split.split}")) is not None:
                yield frame

    return Source(len(chosen), frames, f"{len(chosen)} samples of {splits[0].version}")

"""What prediction reads: samples of a records folder, or images or videos of a rig described by a rig file."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from data_prep.folder import list_recording
from data_prep.rig_yaml import Rig, read_rig
from fsmde_jax import geometry
from fsmde_jax.data import transforms
from fsmde_jax.data.records import Records, open_records
from fsmde_jax.data.schema import RigSample
from fsmde_jax.errors import ConfigError, DataError

IMAGES = (".jpg", ".jpeg", ".png")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


@dataclasses.dataclass
class RigFrame:
    """One moment of a rig. `lidar` are measured points [P, 3] metres in the ego frame, where there are any."""

    name: str
    cameras: list[str]  # ring order
    images: list[np.ndarray]  # N x [H, W, 3] uint8 RGB
    intrinsics: np.ndarray  # [N, 3, 3] pixels at the images' sizes
    cam_to_ego: np.ndarray  # [N, 4, 4]
    visible: list[np.ndarray] | None = None  # N x [H, W] bool, False = the car's own body
    lidar: np.ndarray | None = None
    labels: list[np.ndarray] | None = None  # N x [P_i, 3]: u, v at the images' sizes, metres
    ego_to_global: np.ndarray | None = None  # [4, 4] of the first camera's time, where the car's way is known
    time_us: int | None = None
    scene: str = ""  # name of the drive


@dataclasses.dataclass
class Source:
    """A sequence of frames that are read one at a time."""

    count: int
    frames: Callable[[], Iterator[RigFrame]]
    what: str


def open_source(place: Path, rig: str = "") -> Source:
    """What lies at `place`.

    Args:
      place: a records folder (with manifest.json); or, with `rig`, a folder with a folder of images or a video file for
        each camera.
      rig: a rig file (docs/custom_data.md); its LiDAR is not needed.

    Raises:
      ConfigError, DataError: nothing that can be read; says what was expected.
    """
    if not place.is_dir():
        raise DataError(f"--input {place}: no such folder")
    if (place / "manifest.json").is_file():
        if rig:
            raise ConfigError(f"--rig {rig}: {place} is a records folder, which has its own calibration; leave it out")
        records = open_records(place)
        return Source(len(records), lambda: _of_records(records), f"{len(records)} records")
    if not rig:
        raise ConfigError(
            f"--input {place}: no records folder (no manifest.json), so name the rig's calibration with --rig rig.yaml"
            " (docs/custom_data.md). nuScenes and DDAD become records first: python -m data_prep.nuscenes --limit 10"
        )
    known = read_rig(rig)
    names = [
        list(known.cameras)[i] for i in geometry.ring_order(np.stack([c.cam_to_ego for c in known.cameras.values()]))
    ]
    videos = {name: file for name in names if (file := _video(place, name)) is not None}
    if videos:
        if missing := [name for name in names if name not in videos]:
            raise DataError(f"{place}: no video {missing[0]}{{{','.join(VIDEOS)}}} for camera {missing[0]} of {rig}")
        return _of_videos(known, names, videos, rig)
    return _of_images(known, names, place, rig)


def _of_records(records: Records) -> Iterator[RigFrame]:
    for index in range(len(records)):
        sample, where = records[index], records.where(index)
        present = [i for i in range(sample.num_cameras) if sample.images[i]]
        if not present:
            print(f"note: {where}, sample {sample.sample_id}: no camera has a picture; left out")
            continue
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
        yield RigFrame(
            sample.sample_id, [sample.camera_names[i] for i in present], images,
            sample.intrinsics[present].astype(np.float64), sample.cam_to_ego[present].astype(np.float64), visible,
            _measured(sample, present), points, _pose(sample, present[0]),
            sample.timestamp_us or None, sample.scene,
        )  # fmt: skip


def _pose(sample: RigSample, camera: int) -> np.ndarray:
    pose = sample.ego_to_global[camera].astype(np.float64)
    pose[:3, 3] += sample.global_origin
    return pose


def _measured(sample: RigSample, present: list[int]) -> np.ndarray:
    """LiDAR points [P, 3] of a record in the ego frame (of each camera's own time)."""
    native = sample.native_intrinsics
    found = [np.zeros((0, 3))]
    for i in present:
        uvz = sample.points[i].astype(np.float64)
        own = geometry.unproject(native[i], uvz[:, :2], uvz[:, 2])
        found.append(geometry.transform_points(sample.cam_to_ego[i].astype(np.float64), own))
    return np.concatenate(found)


def _calibration(rig: Rig, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.stack([rig.cameras[name].intrinsics for name in names]),
        np.stack([rig.cameras[name].cam_to_ego for name in names]),
    )


def _checked(image: np.ndarray | None, rig: Rig, camera: str, where: str) -> np.ndarray:
    """[H, W, 3] RGB of a BGR image that has the size of the rig file."""
    if image is None:
        raise DataError(f"{where}: not an image that can be read; delete or replace it")
    wanted = tuple(rig.cameras[camera].native_size)
    if image.shape[:2] != wanted:
        raise DataError(
            f"{where}: {image.shape[0]}x{image.shape[1]} pixels, but the rig file says {wanted[0]}x{wanted[1]} for"
            f" camera {camera}; its intrinsics would be wrong. Change image_size and intrinsics together"
        )
    return np.ascontiguousarray(image[..., ::-1])


def _masks(rig: Rig, names: list[str], place: Path) -> list[np.ndarray] | None:
    """The rig file's ego-body masks, paths relative to it; None where no camera has one."""
    found, any_mask = [], False
    for name in names:
        camera = rig.cameras[name]
        visible = np.ones(tuple(camera.native_size), bool)
        if camera.mask:
            any_mask = True
            mask = cv2.imdecode(np.fromfile(place / camera.mask, np.uint8), cv2.IMREAD_GRAYSCALE)
            if mask is None or mask.shape != visible.shape:
                raise DataError(
                    f"{place / camera.mask}: expected a mask of {visible.shape[0]}x{visible.shape[1]} pixels"
                )
            visible = mask == 255
        found.append(visible)
    return found if any_mask else None


def _of_images(rig: Rig, names: list[str], place: Path, rig_file: str) -> Source:
    recordings = {name: list_recording(place / rig.cameras[name].folder, IMAGES, rig.time_unit) for name in names}
    first = recordings[names[0]]
    visible = _masks(rig, names, Path(rig_file).parent)

    def of_camera(name: str, index: int) -> Path:
        other, path = recordings[name], first.paths[index]
        if rig.match == "name" or first.times_us is None or other.times_us is None:
            if path.stem not in other.by_stem:
                raise DataError(f"{path}: no image {path.stem}.* of camera {name} in {other.paths[0].parent}")
            return other.paths[other.by_stem[path.stem]]
        nearest = int(np.abs(other.times_us - first.times_us[index]).argmin())
        distance = abs(int(other.times_us[nearest]) - int(first.times_us[index])) / 1000
        if distance > rig.tolerance_ms:
            raise DataError(
                f"{path}: the nearest image of camera {name} is {distance:.1f} ms away, tolerance_ms is"
                f" {rig.tolerance_ms:g}"
            )
        return other.paths[nearest]

    def frames() -> Iterator[RigFrame]:
        for index, path in enumerate(first.paths):
            images = []
            for name in names:
                file = of_camera(name, index)
                content = np.fromfile(file, np.uint8)
                image = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
                images.append(_checked(image, rig, name, str(file)))
            time = None if first.times_us is None else int(first.times_us[index])
            yield RigFrame(path.stem, list(names), images, *_calibration(rig, names), visible, time_us=time)

    return Source(len(first.paths), frames, f"{len(first.paths)} images of each of {len(names)} cameras")


def _video(place: Path, camera: str) -> Path | None:
    found = [file for suffix in VIDEOS if (file := place / f"{camera}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{place}: {found[0].name} and {found[1].name} are both of camera {camera}; keep one of them")
    return found[0] if found else None


def _of_videos(rig: Rig, names: list[str], files: dict[str, Path], rig_file: str) -> Source:
    visible = _masks(rig, names, Path(rig_file).parent)
    counts = {}
    for name, file in files.items():
        capture = cv2.VideoCapture(str(file))
        counts[name] = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if counts[name] < 1:
            raise DataError(f"{file}: not a video that can be read")
    count = min(counts.values())
    if max(counts.values()) != count:
        shortest = min(counts, key=lambda name: counts[name])
        print(f"note: the videos differ in length; frames beyond the {count} of {shortest} are left out")

    def frames() -> Iterator[RigFrame]:
        captures = {name: cv2.VideoCapture(str(file)) for name, file in files.items()}
        try:
            for index in range(count):
                images = []
                for name in names:
                    done, image = captures[name].read()
                    images.append(_checked(image if done else None, rig, name, f"{files[name]}, frame {index}"))
                yield RigFrame(f"{index:06d}", list(names), images, *_calibration(rig, names), visible)
        finally:
            for capture in captures.values():
                capture.release()

    return Source(count, frames, f"videos of {len(names)} cameras, {count} frames")

"""What prediction reads: records, nuScenes, DDAD, or images or videos of a rig that a rig file describes."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data_prep.folder import list_recording
from data_prep.rig_yaml import Rig, read_rig
from fsmde_jax import geometry
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.rig_samples import RigFrame, Source, dataset_at, of_dataset, of_records

IMAGES = (".jpg", ".jpeg", ".png")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


def open_source(place: Path, rig: str = "", sample: str = "") -> Source:
    """What lies at `place`.

    Args:
      place: a records folder (with manifest.json); a nuScenes dataroot or its v1.0-... folder; DDAD's index, ddad.json;
        or, with `rig`, a folder with a folder of images or a video file for each camera.
      rig: a rig file (docs/custom_data.md); its LiDAR is not needed.
      sample: name of the one sample of records, nuScenes (its token) or DDAD that is wanted; "" = all.

    Raises:
      ConfigError, DataError: nothing that can be read; says what was expected.
    """
    if not place.exists():
        raise DataError(f"--input {place}: no such folder")
    dataset = None if rig else dataset_at(place)
    if dataset is not None:
        return of_dataset(dataset(), sample)
    if not place.is_dir():
        raise DataError(f"--input {place}: a file; expected a folder, or DDAD's index (.json)")
    if (place / "manifest.json").is_file():
        if rig:
            raise ConfigError(f"--rig {rig}: {place} is a records folder, which has its own calibration; leave it out")
        return of_records(open_records(place), sample)
    if sample:
        raise ConfigError(f"--sample {sample}: of records, nuScenes and DDAD only; --limit takes the first frames")
    if not rig:
        raise ConfigError(
            f"--input {place}: no records folder (no manifest.json) and no nuScenes (no v1.0-...), so name the rig's"
            " calibration with --rig rig.yaml (docs/custom_data.md). Of DDAD name the index: .../ddad.json"
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
    claims = {}  # of the headers: a cut file has fewer frames, and some containers do not say (0 or below)
    for name, file in files.items():
        capture = cv2.VideoCapture(str(file))
        claims[name] = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        readable = capture.read()[0]
        capture.release()
        if not readable:
            raise DataError(f"{file}: not a video that can be read; delete or replace it")
    count = min((claim for claim in claims.values() if claim > 0), default=0)

    def frames() -> Iterator[RigFrame]:
        captures = {name: cv2.VideoCapture(str(file)) for name, file in files.items()}
        try:
            for index in itertools.count():
                read = {name: captures[name].read() for name in names}
                if ended := [name for name in names if not read[name][0]]:
                    if len(ended) < len(names) or index < count:
                        first = ended[0]
                        said = f", though its header says {claims[first]}" if claims[first] > index else ""
                        tqdm.write(f"note: {files[first]}: no frame {index}{said}; prediction ends there")
                    return
                images = [_checked(read[name][1], rig, name, f"{files[name]}, frame {index}") for name in names]
                yield RigFrame(f"{index:06d}", list(names), images, *_calibration(rig, names), visible)
        finally:
            for capture in captures.values():
                capture.release()

    said = f"{count} frames by their headers" if count else "of unknown length"
    return Source(count, frames, f"videos of {len(names)} cameras, {said}")

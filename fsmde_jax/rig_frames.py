"""What prediction reads: records, nuScenes, DDAD, or images or videos of a rig that a rig file describes."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data_prep.ddad import MaskSets
from data_prep.folder import NEEDS_TIMES, Recording, list_recording, match_images
from data_prep.images import decode_image, read_bytes, read_mask
from data_prep.rig_yaml import Rig, read_rig
from fsmde_jax import geometry
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.rig_samples import RigFrame, Source, dataset_at, is_dgp, of_dataset, of_records

IMAGES = (".jpg", ".jpeg", ".png")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
_SAME_RATE = 5e-4  # relative: 29.97 and 30000/1001 frames a second are one rate, 29.97 and 30 are two


def open_source(place: Path, rig: str = "", sample: str = "", masks: str = "", mask_set: str | None = None) -> Source:
    """What lies at `place`.

    Args:
      place: a records folder (with manifest.json); a nuScenes dataroot or its v1.0-... folder; DDAD's index, ddad.json;
        or, with `rig`, a folder with a folder of images or a video file for each camera.
      rig: a rig file (docs/custom_data.md); its LiDAR is not needed.
      sample: name of the one sample of records, nuScenes (its token) or DDAD that is wanted; "" = all.
      masks: folder of DDAD's self-occlusion masks (`data_prep.ddad.MaskSets`); "" = none.
      mask_set: the one set of them for all scenes; None = as their table says.

    Raises:
      ConfigError, DataError: nothing that can be read; says what was expected.
    """
    if not place.exists():
        raise DataError(f"{place}: no such folder")
    if mask_set is not None and not masks:
        raise ConfigError(f"{place}: mask set {mask_set} needs the folder of the masks (predict: --masks DIR)")
    if masks and (rig or not is_dgp(place)):
        raise ConfigError(
            f"{place}: masks ({masks}) are of DDAD's index (ddad.json) only; records have theirs in them, a rig file"
            " names its own"
        )
    dataset = None if rig else dataset_at(place, MaskSets(masks, mask_set) if masks else None)
    if dataset is not None:
        source = of_dataset(place, dataset(), sample)
        if is_dgp(place) and not masks:
            said = "without masks (predict: --masks DIR) clouds show the car's own body, too (docs/data_format.md)"
            print(f"note: {place}: {said}")
        return source
    if not place.is_dir():
        raise DataError(f"{place}: a file; expected a folder, or DDAD's index (.json)")
    if (place / "manifest.json").is_file():
        if rig:
            raise ConfigError(f"{place}: a records folder, which has its own calibration; leave out the rig file {rig}")
        return of_records(open_records(place), sample)
    if sample:
        raise ConfigError(
            f"{place}: no sample {sample} here: only those of records, nuScenes and DDAD have names (predict: --limit"
            " takes the first frames)"
        )
    if not rig:
        raise ConfigError(
            f"{place}: no records folder (no manifest.json) and no nuScenes (no v1.0-...); of images or videos name"
            " the rig file, too (docs/custom_data.md; predict: --rig rig.yaml), of DDAD the index: .../ddad.json"
        )
    known = read_rig(rig)
    names = [
        list(known.cameras)[i] for i in geometry.ring_order(np.stack([c.cam_to_ego for c in known.cameras.values()]))
    ]
    videos = {name: file for name in names if (file := _video(place, name)) is not None}
    if videos:
        if missing := [name for name in names if name not in videos]:
            raise DataError(f"{place}: no video {missing[0]}{{{','.join(VIDEOS)}}} for camera {missing[0]} of {rig}")
        return _of_videos(known, names, videos)
    return _of_images(known, names, place, rig)


def _calibration(rig: Rig, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.stack([rig.cameras[name].intrinsics for name in names]),
        np.stack([rig.cameras[name].cam_to_ego for name in names]),
    )


def _checked(image: np.ndarray, rig: Rig, camera: str, where: str) -> np.ndarray:
    """The image [H, W, 3], if it has the size of the rig file (`DataError`)."""
    wanted = tuple(rig.cameras[camera].native_size)
    if image.shape[:2] != wanted:
        raise DataError(
            f"{where}: {image.shape[0]}x{image.shape[1]} pixels, but the rig file says {wanted[0]}x{wanted[1]} for"
            f" camera {camera}; its intrinsics would be wrong. Change image_size and intrinsics together"
        )
    return image


def _masks(rig: Rig, names: list[str]) -> list[np.ndarray] | None:
    """The rig file's ego-body masks as the converter reads them; None where no camera has one."""
    cameras = [rig.cameras[name] for name in names]
    if not any(c.mask for c in cameras):
        return None
    return [read_mask(c.mask, c.native_size) == 255 if c.mask else np.ones(c.native_size, bool) for c in cameras]


def _complete(rig: Rig, recordings: dict[str, Recording], place: Path, rig_file: str) -> list[list[Path]]:
    """Files of the frames that every camera has, by name or by the first camera's times; a note says what is left out.

    Raises:
      DataError: there is no such frame, or `match: nearest` lacks times.
    """
    of_first = next(iter(recordings.values()))
    frames: list[list[Path]] = []
    if rig.match == "name":
        stems = list(dict.fromkeys(stem for recording in recordings.values() for stem in recording.by_stem))
        lacking = {stem: [n for n, other in recordings.items() if stem not in other.by_stem] for stem in stems}
        frames = [[r.paths[r.by_stem[s]] for r in recordings.values()] for s in of_first.by_stem if not lacking[s]]
        left_out = [f"{s}.* (no image of camera {lacking[s][0]})" for s in sorted(stems) if lacking[s]]
        advice = f"; where the cameras' names are their own times, say `match: nearest` in {rig_file}"
    else:
        for recording in recordings.values():
            if recording.times_us is None:
                raise DataError(f"{recording.paths[0].parent}: {NEEDS_TIMES}")
        left_out, advice = [], f"; raise tolerance_ms in {rig_file} if the rig may be so far out of step"
        for path, time in zip(of_first.paths, np.asarray(of_first.times_us).tolist(), strict=True):
            try:
                frames.append([r.paths[match_images(rig, n, r, path, time)] for n, r in recordings.items()])
            except DataError as error:
                left_out.append(str(error))
    total = len(frames) + len(left_out)
    if not frames:
        raise DataError(f"{place}: of {total} frames not one has an image of every camera, e.g. {left_out[0]}{advice}")
    if left_out:
        print(f"note: {place}: {len(left_out)} of {total} frames lack a camera and are left out, first {left_out[0]}")
    return frames


def _of_images(rig: Rig, names: list[str], place: Path, rig_file: str) -> Source:
    recordings = {name: list_recording(place / rig.cameras[name].folder, IMAGES, rig.time_unit) for name in names}
    visible = _masks(rig, names)
    files = _complete(rig, recordings, place, rig_file)
    first = recordings[names[0]]

    def frames() -> Iterator[RigFrame]:
        for row in files:
            images = [
                _checked(decode_image(read_bytes(file, "image"), str(file), "delete or replace it"), rig, n, str(file))
                for n, file in zip(names, row, strict=True)
            ]
            time = None if first.times_us is None else int(first.times_us[first.by_stem[row[0].stem]])
            yield RigFrame(row[0].stem, list(names), images, *_calibration(rig, names), visible, time_us=time)

    return Source(len(files), frames, f"{len(files)} images of each of {len(names)} cameras")


def _video(place: Path, camera: str) -> Path | None:
    found = [file for suffix in VIDEOS if (file := place / f"{camera}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{place}: {found[0].name} and {found[1].name} are both of camera {camera}; keep one of them")
    return found[0] if found else None


def _check_rates(rates: dict[Path, float]) -> None:
    """Frames are paired by their numbers: `DataError` where two videos have different rates (frames a second)."""
    said = {file: rate for file, rate in rates.items() if np.isfinite(rate) and rate > 0}
    if not said:
        return
    slow, fast = min(said, key=lambda file: said[file]), max(said, key=lambda file: said[file])
    if said[fast] > said[slow] * (1 + _SAME_RATE):
        raise DataError(
            f"{slow} has {said[slow]:g} frames a second, but {fast} has {said[fast]:g}: frame n of every video has to"
            " be of one moment; bring them to one rate and start (docs/custom_data.md)"
        )


def _of_videos(rig: Rig, names: list[str], files: dict[str, Path]) -> Source:
    visible = _masks(rig, names)
    claims = {}  # of the headers: a cut file has fewer frames, and some containers do not say (0 or below)
    rates = {}
    for name, file in files.items():
        capture = cv2.VideoCapture(str(file))
        claims[name] = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        rates[file] = float(capture.get(cv2.CAP_PROP_FPS))
        readable = capture.read()[0]
        capture.release()
        if not readable:
            raise DataError(f"{file}: not a video that can be read; delete or replace it")
    _check_rates(rates)
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
                images = [
                    np.ascontiguousarray(_checked(read[name][1], rig, name, f"{files[name]}, frame {index}")[..., ::-1])
                    for name in names
                ]
                yield RigFrame(f"{index:06d}", list(names), images, *_calibration(rig, names), visible)
        finally:
            for capture in captures.values():
                capture.release()

    said = f"{count} frames by their headers" if count else "of unknown length"
    return Source(count, frames, f"videos of {len(names)} cameras, {said}")

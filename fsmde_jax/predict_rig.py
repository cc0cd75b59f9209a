"""Depth of whole rigs by a trained student, written as files that other tools read."""

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from fsmde_jax import geometry
from fsmde_jax.data import dense, transforms
from fsmde_jax.depth_model import DepthModel, Prediction
from fsmde_jax.errors import DataError
from fsmde_jax.rig_frames import RigFrame, Source
from fsmde_jax.viz.birdseye import birdseye
from fsmde_jax.viz.panorama import panorama
from fsmde_jax.viz.pointcloud import Cloud, fuse, surest, write_ply
from fsmde_jax.viz.rerun_recording import RerunRecording

KINDS = ("png", "npz", "panorama", "birdseye", "ply")


def predict_source(
    model: DepthModel, source: Source, out: Path, *, kinds: Sequence[str] = KINDS, keep: float = 0.6,
    max_range: float = 60.0, limit: int = 0, rerun: Path | None = None,
) -> int:  # fmt: skip
    """Predicts every frame of `source` and writes the files of `kinds` below `out`; one frame is in memory at a time.

    Files of a frame called F: `F/<camera>_depth.png`, 16 bit, metres * 256 as KITTI's, 0 = none (also beyond 255.99 m,
    which 16 bits do not hold); `F/rig.npz` with depth and confidence [N, H, W] float32 of the cameras (or one array per
    camera, where they differ in size), names, intrinsics and poses; `F/panorama.png`, its colours over the depths of
    the student's training; `F/birdseye.png`; `F/cloud.ply`, in the ego frame.

    A focal length that the student does not know is warned of once, in whatever frame it comes.

    Args:
      keep: share of the pixels, the surest ones, that clouds show.
      max_range: of clouds, metres of z-depth.
      limit: the first so many frames; 0 = all.
      rerun: .rrd file of all frames for the Rerun viewer; it is there when the last frame is done, what there is of it
        before as .partial.rrd where an error or Ctrl-C came between.

    Returns:
      How many frames there were.

    Raises:
      DataError: a frame cannot be read, or a file not be written. ConfigError: as `RerunRecording`.
    """
    expected = min((n for n in (limit, source.count) if n), default=None)  # for the bar: videos may end before it
    warned: set[str] = set()
    recording: RerunRecording | None = None
    done = 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=expected, desc="predicting (the first one compiles)", unit="rig", disable=None)
        )
        for number, frame in enumerate(itertools.islice(source.frames(), limit or None)):
            widths = [image.shape[1] for image in frame.images]
            for warning in model.out_of_range(frame.intrinsics, widths, frame.cameras):
                if warning not in warned:
                    tqdm.write(f"warning: {warning}")
                warned.add(warning)
            if number == 0 and rerun is not None:
                recording = stack.enter_context(RerunRecording(rerun, max_range=max_range))
            found = model(frame.images, frame.intrinsics, frame.cam_to_ego)
            cloud = None
            if recording is not None or {"ply", "birdseye"} & set(kinds):
                cloud = fuse_frame(frame, found, keep=keep, max_range=max_range)
            folder = out / re.sub(r"[^\w.-]", "_", frame.name)
            try:
                if kinds:
                    folder.mkdir(parents=True, exist_ok=True)
                depth_range = (model.model.min_depth, model.model.max_depth)
                write_frame(frame, found, cloud, folder, kinds, depth_range)
            except OSError as error:
                raise DataError(
                    f"{folder}: cannot write ({error.strerror}); free space or choose another --out"
                ) from error
            if recording is not None and cloud is not None:
                recording.log(
                    number, frame.cameras, frame.images, list(found.depth), frame.intrinsics, frame.cam_to_ego, cloud,
                    lidar=frame.lidar, ego_to_global=frame.ego_to_global, time_us=frame.time_us,
                    scene=frame.scene,
                )  # fmt: skip
            done += 1
            bar.update()
    return done


def fuse_frame(frame: RigFrame, found: Prediction, *, keep: float, max_range: float) -> Cloud:
    """The cloud of one frame: the `keep` surest pixels within `max_range` metres."""
    confidence = list(found.confidence)
    return fuse(
        frame.images, list(found.depth), confidence, frame.intrinsics, frame.cam_to_ego, visible=frame.visible,
        min_confidence=surest(confidence, keep), max_range=max_range,
    )  # fmt: skip


def write_frame(
    frame: RigFrame, found: Prediction, cloud: Cloud | None, folder: Path, kinds: Sequence[str],
    depth_range: tuple[float, float],
) -> None:  # fmt: skip
    """Writes the files of one frame into `folder`, each by rename; "ply" and "birdseye" need its cloud.

    `depth_range`, metres, is the panorama's scale of colours.
    """
    depth, confidence = list(found.depth), list(found.confidence)
    if "png" in kinds:
        for name, each in zip(frame.cameras, depth, strict=True):
            content = dense.encode(each)
            _write(folder / f"{name}_depth.png", functools.partial(Path.write_bytes, data=content))
    if "npz" in kinds:
        arrays = {
            "cameras": np.array(frame.cameras), "intrinsics": frame.intrinsics, "cam_to_ego": frame.cam_to_ego,
        }  # fmt: skip
        if isinstance(found.depth, np.ndarray):
            arrays |= {"depth": found.depth, "confidence": found.confidence}
        else:
            for name, d, c in zip(frame.cameras, depth, confidence, strict=True):
                arrays |= {f"depth_{name}": d, f"confidence_{name}": c}
        _write(folder / "rig.npz", functools.partial(_save, arrays))
    if "panorama" in kinds:
        _write(folder / "panorama.png", functools.partial(_encode, _panorama(frame, depth, depth_range)[..., ::-1]))
    if cloud is not None and "ply" in kinds:
        write_ply(folder / "cloud.ply", cloud)
    if cloud is not None and "birdseye" in kinds:
        picture = birdseye(cloud, frame.lidar, title=frame.name)
        _write(folder / "birdseye.png", functools.partial(_encode, picture[..., ::-1]))


def _panorama(frame: RigFrame, depth: list[np.ndarray], depth_range: tuple[float, float]) -> np.ndarray:
    """Images and depth of all cameras at one size, and LiDAR and its error where there is some."""
    height, width = min((image.shape[:2] for image in frame.images), key=lambda size: size[1])
    size, count = (width, height), len(frame.images)
    images = np.stack([cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in frame.images])
    predicted = np.stack([cv2.resize(each, size, interpolation=cv2.INTER_LINEAR) for each in depth])
    known = None
    if frame.labels is not None and any(len(points) for points in frame.labels):
        known = np.zeros((count, height, width), np.float32)
        scale = np.array([[width / image.shape[1], height / image.shape[0]] for image in frame.images])
        points = [each.astype(np.float32) for each in frame.labels]
        transforms.rasterize(points, scale, 0.5 * scale - 0.5, known)
    yaw = np.asarray(geometry.optical_yaw(frame.cam_to_ego))
    low, high = depth_range
    return panorama(images, predicted, known, frame.cameras, yaw, min_depth=low, max_depth=high, title=frame.name)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes by rename, so that a killed run leaves no half a file."""
    temporary = path.with_name(f".{path.name}")
    write(temporary)
    temporary.replace(path)


def _encode(image: np.ndarray, path: Path) -> None:
    done, content = cv2.imencode(".png", image)
    assert done
    path.write_bytes(content.tobytes())


def _save(arrays: dict[str, np.ndarray], path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

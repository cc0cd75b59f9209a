"""Depth of whole rigs by a trained student, written as files that other tools read."""

import contextlib
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from fsmde_jax import disk, geometry
from fsmde_jax.data import dense, transforms
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.depth_model import DepthModel, Prediction
from fsmde_jax.errors import DataError
from fsmde_jax.rig_frames import RigFrame, Source
from fsmde_jax.viz.birdseye import birdseye
from fsmde_jax.viz.colour import colour_depth, encode_png
from fsmde_jax.viz.panorama import colour_scale, panorama
from fsmde_jax.viz.pointcloud import KEEP, MAX_RANGE, Cloud, fuse, surest, write_ply
from fsmde_jax.viz.rerun_recording import RerunRecording

KINDS = ("png", "color", "npz", "panorama", "birdseye", "ply")


def predict_source(
    model: DepthModel, source: Source, out: Path, *, kinds: Sequence[str] = KINDS, keep: float = KEEP,
    max_range: float = MAX_RANGE, stride: int = 1, limit: int = 0, rerun: Path | None = None,
) -> int:  # fmt: skip
    """Predicts every frame of `source` and writes the files of `kinds` below `out`; one frame is in memory at a time.

    Files of a frame called F: `F/<camera>_depth.png`, 16 bit, metres * 256 as KITTI's, 0 = none (also beyond 255.99 m,
    which 16 bits do not hold); `F/<camera>_depth_color.png`, red = near; `F/rig.npz` with depth and confidence
    [N, H, W] float32 of the cameras (or one array per camera, where they differ in size), names, intrinsics and poses;
    `F/panorama.png`; `F/birdseye.png`; `F/cloud.ply`. All colours are over the depths of the student's training.

    Cloud, bird's-eye view with its LiDAR, and recording lie in the ego frame at the first camera's time: where the data
    says how the car moved, what stands still is in one place for cameras of other times (`RigFrame.cam_to_reference`).

    A focal length that the student does not know is warned of once, in whatever frame it comes. After the first frame
    one line says how much disk all of them will take.

    Args:
      keep: share of the pixels, the surest ones, that clouds show.
      max_range: of clouds, metres of z-depth.
      stride: clouds take every so many-th row and column.
      limit: the first so many frames; 0 = all.
      rerun: .rrd file of all frames for the Rerun viewer; it is there when the last frame is done, what there is of it
        before as .partial.rrd where an error or Ctrl-C came between.

    Returns:
      How many frames there were.

    Raises:
      DataError: a frame cannot be read, a file not be written, or all frames would not fit on the disk.
      ConfigError: as `RerunRecording`.
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
                cloud = fuse_frame(frame, found, keep=keep, max_range=max_range, stride=stride)
            folder = out / re.sub(r"[^\w.-]", "_", frame.name)
            written = {}
            try:
                if kinds:
                    folder.mkdir(parents=True, exist_ok=True)
                    depth_range = (model.model.min_depth, model.model.max_depth)
                    written[out] = write_frame(frame, found, cloud, folder, kinds, depth_range)
            except OSError as error:
                raise DataError(
                    f"{folder}: cannot write ({error.strerror}); free space or choose another --out"
                ) from error
            if recording is not None and cloud is not None:
                pose = None if frame.ego_to_global is None else frame.ego_to_global[0]
                recording.log(
                    number, frame.cameras, frame.images, list(found.depth), frame.intrinsics, frame.cam_to_reference,
                    cloud, lidar=frame.lidar, ego_to_global=pose, time_us=frame.time_us, scene=frame.scene,
                )  # fmt: skip
            if number == 0 and rerun is not None:  # under a temporary name so far
                parts = [file for file in rerun.parent.iterdir() if file.name.startswith(f".{rerun.stem}.")]
                written[rerun] = sum(file.stat().st_size for file in parts)
            if number == 0 and written and expected != 1:
                tqdm.write(disk.estimate(written, expected, replaced=[out] if kinds else []))
            done += 1
            bar.update()
    return done


def fuse_frame(
    frame: RigFrame, found: Prediction, *, keep: float = KEEP, max_range: float = MAX_RANGE, stride: int = 1
) -> Cloud:
    """The cloud of one frame, in its reference: the `keep` surest of its visible pixels, within `max_range` metres."""
    confidence = list(found.confidence)
    return fuse(
        frame.images, list(found.depth), confidence, frame.intrinsics, frame.cam_to_reference, visible=frame.visible,
        min_confidence=surest(confidence, keep, frame.visible), max_range=max_range, stride=stride,
    )  # fmt: skip


def write_frame(
    frame: RigFrame, found: Prediction, cloud: Cloud | None, folder: Path, kinds: Sequence[str],
    depth_range: tuple[float, float],
) -> int:  # fmt: skip
    """Writes the files of one frame into `folder`, each by rename; "ply" and "birdseye" need its cloud.

    `depth_range`, metres, is the scale of colours.

    Returns:
      How many bytes they have.
    """
    depth, confidence = list(found.depth), list(found.confidence)
    files: list[Path] = []

    def write(name: str, content: bytes) -> None:
        files.append(folder / name)
        write_atomically(files[-1], content)

    for name, each in zip(frame.cameras, depth, strict=True):
        if "png" in kinds:
            write(f"{name}_depth.png", dense.encode(each))
        if "color" in kinds:
            write(f"{name}_depth_color.png", encode_png(colour_depth(each, *colour_scale(*depth_range))))
    if "npz" in kinds:
        arrays = {
            "cameras": np.array(frame.cameras), "intrinsics": frame.intrinsics, "cam_to_ego": frame.cam_to_ego,
        }  # fmt: skip
        if frame.ego_to_global is not None:
            arrays["ego_to_global"] = frame.ego_to_global
        if isinstance(found.depth, np.ndarray):
            arrays |= {"depth": found.depth, "confidence": found.confidence}
        else:
            for name, d, c in zip(frame.cameras, depth, confidence, strict=True):
                arrays |= {f"depth_{name}": d, f"confidence_{name}": c}
        write("rig.npz", _npz(arrays))
    if "panorama" in kinds:
        write("panorama.png", encode_png(_panorama(frame, depth, depth_range)))
    if cloud is not None and "ply" in kinds:
        files.append(folder / "cloud.ply")
        write_ply(files[-1], cloud)
    if cloud is not None and "birdseye" in kinds:
        write("birdseye.png", encode_png(birdseye(cloud, frame.lidar, title=frame.name)))
    return sum(file.stat().st_size for file in files)


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


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    return content.getvalue()

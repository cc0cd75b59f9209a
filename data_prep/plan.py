"""What a dataset converter hands over: plain descriptions of samples (paths, calibration, poses), and how one is built.

Descriptions are small and picklable, so worker processes never need the dataset's own tables.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable

import numpy as np

from data_prep import dense, images, lidar_depth, pointfiles
from fsmde_jax import geometry
from fsmde_jax.data.schema import RigSample
from fsmde_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class CameraFrame:
    """One image with its calibration. Matrices are float64; metres and native pixels."""

    name: str
    image: str
    native_size: tuple[int, int]  # (height, width)
    intrinsics: np.ndarray  # [3, 3]
    cam_to_ego: np.ndarray  # [4, 4]
    ego_to_global: np.ndarray  # [4, 4] at the camera's own time
    timestamp_us: int
    mask: str | None = None  # file of the ego-body mask
    dense: str | None = None  # file of the dense depth


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One LiDAR file and where its sensor was."""

    path: str
    sensor_to_global: np.ndarray  # [4, 4]
    bin_columns: int = 5
    drop_near: float = (
        0.0  # metres: points with |x| and |y| below it are dropped (the car itself, in neighbouring sweeps)
    )


@dataclasses.dataclass(frozen=True)
class SamplePlan:
    """One record to be: cameras in ring order, its own sweep, and neighbouring sweeps for training labels."""

    sample_id: str
    scene: str
    timestamp_us: int
    cameras: tuple[CameraFrame, ...]
    sweep: Sweep
    extra_sweeps: tuple[Sweep, ...] = ()


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Choices that shape every record."""

    image_size: tuple[int, int] | None = None  # (height, width); None = native
    jpeg_quality: int = 95
    point_rule: lidar_depth.PointRule = "round"


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a dataset. `describe(i)` resolves sample i; it is called in the parent process only."""

    dataset: str
    version: str
    split: str
    sample_ids: list[str]
    sample_scenes: list[str]  # one per sample
    cameras: list[str]  # ring order
    point_rule: lidar_depth.PointRule
    min_depth: float
    max_depth: float
    complete: bool  # the official split is wholly here
    options: dict  # dataset-specific flags that shape the records
    describe: Callable[[int], SamplePlan]
    dense_depth: bool = False  # every camera comes with dense depth

    @property
    def scenes(self) -> list[str]:
        """Scenes with at least one sample, in order."""
        return list(dict.fromkeys(self.sample_scenes))


def take(source: Source, chosen: slice) -> Source:
    """The samples `chosen` of a source, e.g. `slice(0, 10)` or `slice(0, None, 2)`; a part is never complete.

    Raises:
      ConfigError: nothing is left.
    """
    total = len(source.sample_ids)
    indices = range(total)[chosen]
    if total and not indices:
        raise ConfigError(f"--samples / --limit leave none of the {total} samples of split {source.split!r}")
    part = len(indices) < total
    return dataclasses.replace(
        source,
        sample_ids=source.sample_ids[chosen],
        sample_scenes=source.sample_scenes[chosen],
        complete=source.complete and not part,
        options=source.options | ({"whole_drive": False} if "whole_drive" in source.options and part else {}),
        describe=lambda i: source.describe(indices[i]),
    )


def build_sample(plan: SamplePlan, options: BuildOptions) -> RigSample:
    """Reads, projects and encodes one rig sample.

    Raises:
      DataError: naming the file or the calibration that is wrong.
    """
    for camera in plan.cameras:
        where = f"sample {plan.sample_id!r}, camera {camera.name}"
        geometry.check_intrinsics(camera.intrinsics, f"{where}, intrinsics")
        geometry.check_rigid(camera.cam_to_ego, f"{where}, extrinsics (cam_to_ego)")
        geometry.check_rigid(camera.ego_to_global, f"{where}, ego pose (ego_to_global)")
    sweeps = []
    for sweep in (plan.sweep, *plan.extra_sweeps):
        geometry.check_rigid(sweep.sensor_to_global, f"sample {plan.sample_id!r}, LiDAR pose of {sweep.path}")
        cloud = pointfiles.read_points(sweep.path, sweep.bin_columns)
        if sweep.drop_near:
            cloud = cloud[np.any(np.abs(cloud[:, :2]) >= sweep.drop_near, axis=1)]
        sweeps.append((cloud, sweep.sensor_to_global))
    encoded, sizes, points, extra = [], [], [], []
    for camera in plan.cameras:
        data, size = images.prepare_image(camera.image, camera.native_size, options.image_size, options.jpeg_quality)
        encoded.append(data)
        sizes.append(size)
        seen = [
            lidar_depth.project_sweep(
                cloud,
                lidar_depth.lidar_to_camera(sensor_to_global, camera.ego_to_global, camera.cam_to_ego),
                camera.intrinsics, camera.native_size, options.point_rule,
            )
            for cloud, sensor_to_global in sweeps
        ]  # fmt: skip
        points.append(seen[0])
        extra.append(np.concatenate([np.zeros((0, 3), np.float32), *seen[1:]]))
    image_size = np.array(sizes, np.int64)
    native_size = np.array([c.native_size for c in plan.cameras], np.int64)
    scale = image_size / native_size
    intrinsics = geometry.resize_intrinsics(np.stack([c.intrinsics for c in plan.cameras]), scale[:, 0], scale[:, 1])
    ego_to_global = np.stack([c.ego_to_global for c in plan.cameras])
    origin = np.round(ego_to_global[0, :3, 3])
    ego_to_global[:, :3, 3] -= origin  # before float32: a city is kilometres wide
    return RigSample(
        sample_id=plan.sample_id,
        scene=plan.scene,
        timestamp_us=plan.timestamp_us,
        camera_names=[c.name for c in plan.cameras],
        images=encoded,
        image_size=image_size,
        native_size=native_size,
        intrinsics=intrinsics.astype(np.float32),
        cam_to_ego=np.stack([c.cam_to_ego for c in plan.cameras]).astype(np.float32),
        ego_to_global=ego_to_global.astype(np.float32),
        global_origin=origin.astype(np.int64),
        camera_timestamps_us=np.array([c.timestamp_us for c in plan.cameras], np.int64),
        points=points,
        extra_points=extra,
        ego_masks=[images.prepare_mask(c.mask, c.native_size) if c.mask else b"" for c in plan.cameras],
        dense_depth=[
            dense.prepare(c.dense, c.native_size, size) if c.dense else b""
            for c, size in zip(plan.cameras, sizes, strict=True)
        ],
    )


def ring_of(cameras: dict[str, np.ndarray], chosen: list[str] | None, where: str) -> list[str]:
    """Names in ring order of the chosen cameras (all where None), from {name: cam_to_ego [4, 4]}.

    Raises:
      DataError: a name is unknown (the nearest one is suggested), or an extrinsic is not rigid.
    """
    for name in chosen or ():
        if name not in cameras:
            raise DataError(f"{where}: unknown camera {name!r}{suggest(name, cameras)}")
    names = list(dict.fromkeys(chosen)) if chosen else sorted(cameras)
    if not names:
        raise DataError(f"{where}: no camera found")
    for name in names:
        geometry.check_rigid(cameras[name], f"{where}, camera {name}, extrinsics")
    return [names[i] for i in geometry.ring_order(np.stack([cameras[n] for n in names]))]


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'? Known: ...` for error messages."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, 1, 0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} Known: {', '.join(known)}"

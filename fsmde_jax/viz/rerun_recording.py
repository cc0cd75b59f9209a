"""Predictions over time as a recording of the Rerun viewer (rerun.io): cameras, images, depth, cloud and LiDAR in 3-D.

Needs rerun-sdk: pip install -e ".[rerun]"; then `rerun out.rrd` shows it.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np

from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.viz.pointcloud import Cloud

UNITS = 256.0  # of a 16-bit depth image in one metre, as in the PNG files of prediction
_JPEG_QUALITY = 85
_EGO = "world/ego"


class RerunRecording:
    """Writes an .rrd file frame by frame; used in a `with` statement, at whose end the file gets its name.

    Entities: `world/ego` (where its pose is known, it moves), below it one pinhole per camera with `image` and `depth`,
    the fused `cloud` and `lidar`. Timelines: `frame`, and `time` where it is known.
    """

    def __init__(self, path: str | Path, cameras: Sequence[str], *, max_range: float = 60.0) -> None:
        """Opens `path`'s temporary file.

        Args:
          path: new or old .rrd file.
          cameras: names, in the order in which they are shown.
          max_range: metres, of the depth images' colours.

        Raises:
          ConfigError: the name, or rerun-sdk is not installed. DataError: the file cannot be written.
        """
        self._path = checked_path(path)
        import rerun
        import rerun.blueprint as blueprint

        self._rerun, self._max_range = rerun, max_range
        self._temporary = self._path.with_name(f".{self._path.name}")
        self._origin: np.ndarray | None = None
        self._start: int | None = None
        self._stream = rerun.RecordingStream("fsmde_jax")
        rerun.set_log_time_enabled(False, recording=self._stream)  # when it was written is of no interest
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.touch()  # so that the reason why it cannot be written is the system's
            self._stream.save(str(self._temporary), default_blueprint=_layout(blueprint, cameras))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self._path}: cannot write ({error}); choose another place") from error
        self._stream.log("world", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.disconnect()  # writes what is left and closes the file
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)

    def log(
        self, number: int, cameras: Sequence[str], images: Sequence[np.ndarray], depth: Sequence[np.ndarray],
        intrinsics: np.ndarray, cam_to_ego: np.ndarray, cloud: Cloud, *, lidar: np.ndarray | None = None,
        ego_to_global: np.ndarray | None = None, time_us: int | None = None,
    ) -> None:  # fmt: skip
        """Adds one frame.

        Args:
          number: its place in the sequence.
          cameras: N names.
          images: N x [H, W, 3] uint8 RGB; depth: N x [H, W] metres, 0 = none.
          intrinsics: [N, 3, 3] pixels at the images' sizes; cam_to_ego: [N, 4, 4].
          cloud: in the ego frame.
          lidar: [P, 3] metres in the ego frame.
          ego_to_global: [4, 4] metres, in any fixed frame whose z points up.
          time_us: microseconds; shown since the first frame.
        """
        rerun, stream = self._rerun, self._stream
        stream.set_time("frame", sequence=number)
        if time_us is not None:
            # Since the first frame: DDAD's clock stands in the year 2464.
            self._start = time_us if self._start is None else self._start
            stream.set_time("time", duration=(time_us - self._start) / 1e6)
        if ego_to_global is not None:
            pose = np.asarray(ego_to_global, np.float64)
            self._origin = pose[:3, 3] if self._origin is None else self._origin  # float32 inside of the viewer
            stream.log(_EGO, rerun.Transform3D(translation=pose[:3, 3] - self._origin, mat3x3=pose[:3, :3]))
        for i, name in enumerate(cameras):
            height, width = images[i].shape[:2]
            place = f"{_EGO}/{name}"
            stream.log(
                place,
                rerun.Transform3D(translation=cam_to_ego[i, :3, 3], mat3x3=cam_to_ego[i, :3, :3]),
                rerun.Pinhole(
                    image_from_camera=intrinsics[i], resolution=[width, height], image_plane_distance=2.0,
                    camera_xyz=rerun.ViewCoordinates.RDF,
                ),
            )  # fmt: skip
            picture = _encoded(".jpg", images[i][..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            stream.log(f"{place}/image", rerun.EncodedImage(contents=picture, media_type="image/jpeg"))
            stored = np.clip(np.rint(depth[i] * UNITS), 0, 2**16 - 1).astype(np.uint16)
            stream.log(
                f"{place}/depth",
                rerun.EncodedDepthImage(
                    _encoded(".png", stored), media_type="image/png", meter=UNITS, colormap="turbo",
                    depth_range=[0, self._max_range * UNITS],
                ),
            )  # fmt: skip
        dot = rerun.Radius.ui_points(1.5)
        stream.log(f"{_EGO}/cloud", rerun.Points3D(cloud.points, colors=cloud.colours, radii=dot))
        if lidar is not None:
            stream.log(f"{_EGO}/lidar", rerun.Points3D(lidar, colors=[255, 255, 255], radii=dot))


def checked_path(path: str | Path) -> Path:
    """The path, if a recording can be made there.

    Raises:
      ConfigError: the name does not end in .rrd, or rerun-sdk is not installed.
    """
    path = Path(path)
    if path.suffix != ".rrd" or path.is_dir():
        raise ConfigError(f"--rerun {path}: expected the name of a file that ends in .rrd")
    if importlib.util.find_spec("rerun") is None:
        raise ConfigError('not installed: rerun-sdk; pip install "rerun-sdk>=0.41"')
    return path


def _encoded(kind: str, image: np.ndarray, options: Sequence[int] = ()) -> bytes:
    done, content = cv2.imencode(kind, image, options)
    assert done
    return content.tobytes()


def _layout(blueprint: Any, cameras: Sequence[str]) -> Any:
    """The cloud in 3-D on the left; each camera's image under its depth on the right."""
    # The depth images would be a second, unfused cloud.
    space = blueprint.Spatial3DView(
        origin="world",
        contents=["$origin/**", *(f"- /{_EGO}/{name}/depth" for name in cameras)],
        name="fused",
        background=[24, 24, 24],
    )
    views = [
        blueprint.Spatial2DView(origin=f"/{_EGO}/{name}", contents=[f"$origin/{kind}"], name=f"{name} {kind}")
        for name in cameras
        for kind in ("image", "depth")
    ]
    return blueprint.Blueprint(
        blueprint.Horizontal(space, blueprint.Grid(*views, grid_columns=2), column_shares=[3, 2]), collapse_panels=True
    )

"""Predictions over time as a recording of the Rerun viewer (rerun.io): cameras, images, depth, cloud and LiDAR in 3-D.

Needs rerun-sdk: pip install -e ".[rerun]"; then `rerun out.rrd` shows it.
"""

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np

from fsmde_jax.data import dense
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.viz.pointcloud import Cloud

MAX_POINTS = 100_000  # of a frame's cloud: a frame of six 352x640 views is about 3 MB then
_JPEG_QUALITY = 85
_EGO = "world/ego"
_SPARE = 200_000_000  # bytes that have to be free before a frame is written
_PATIENCE = 60.0  # seconds for one frame to be written
_BETWEEN = 1_000_000  # microseconds between two drives, on the timeline


class RerunRecording:
    """Writes an .rrd file frame by frame; used in a `with` statement, at whose end the file gets its name.

    Where the statement is left by an error or Ctrl-C, the frames so far are kept as `<name>.partial.rrd`.

    Entities: `world/ego` (where its pose is known, it moves), below it `cameras/<name>`, a pinhole with `image` and
    `depth`, the fused `cloud` (at most `MAX_POINTS`, evenly thinned) and `lidar`. Timelines: `frame`, and `time` in
    seconds where it is known, drives one after the other.
    """

    def __init__(self, path: str | Path, *, max_range: float = 60.0) -> None:
        """Opens a temporary file beside `path`.

        Args:
          path: new or old .rrd file.
          max_range: metres, of the depth images' colours.

        Raises:
          ConfigError: the name, or rerun-sdk is not installed. DataError: the file cannot be written.
        """
        self._path = checked_path(path)
        import rerun

        self._rerun, self._max_range, self._frames, self._broken = rerun, max_range, 0, False
        self._temporary = self._path.with_name(f".{self._path.stem}.{os.getpid()}.rrd")
        self._cameras: list[str] = []  # all that there have been
        self._scene = ""
        self._origin: np.ndarray | None = None
        self._start: int | None = None  # microseconds at which this drive's time is 0
        self._last = -_BETWEEN  # microseconds of the timeline
        self._stream = rerun.RecordingStream("fsmde_jax")
        rerun.set_log_time_enabled(False, recording=self._stream)  # when it was written is of no interest
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.touch()  # so that the reason why it cannot be written is the system's
            self._stream.save(str(self._temporary))
        except (OSError, RuntimeError) as error:
            self._temporary.unlink(missing_ok=True)
            raise DataError(f"{self._path}: cannot write ({error}); choose another place") from error
        self._stream.log("world", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._broken:  # its thread is gone: closing would wait for it
            self._rerun.unregister_shutdown()
            self._temporary.unlink(missing_ok=True)
            return
        self._stream.disconnect()  # closes the file; every frame has been waited for
        if kind is None:
            self._temporary.replace(self._path)
        elif self._frames:
            part = self._path.with_suffix(".partial.rrd")
            self._temporary.replace(part)
            print(f"note: {part} holds the first {self._frames} frames", file=sys.stderr)
        else:
            self._temporary.unlink(missing_ok=True)

    def _check_space(self) -> None:
        """Before a frame is written: when a disk is full Rerun logs it, goes on, and may wait for ever at the end."""
        if shutil.disk_usage(self._path.parent).free < _SPARE:
            raise DataError(
                f"{self._path}: less than {_SPARE // 1_000_000} MB are free there; free space or choose another place"
            )

    def _flush(self) -> None:
        """Waits until all is in the file."""
        try:
            self._stream.flush(timeout_sec=_PATIENCE)
        except (RuntimeError, OSError) as error:
            self._broken = True
            raise DataError(
                f"{self._path}: cannot write (Rerun says: {error}; more above); free space or choose another place"
            ) from error

    def _place_in_time(self, number: int, scene: str, time_us: int | None) -> None:
        """Sets the timelines; a new scene starts a drive of its own, in space and in time."""
        if scene != self._scene or self._frames == 0:
            self._scene, self._origin, self._start = scene, None, None
        self._stream.set_time("frame", sequence=number)
        if time_us is None:
            self._stream.disable_timeline("time")
            return
        if self._start is None:  # not the clock's own: DDAD's stands in the year 2464
            self._start = time_us - (self._last + _BETWEEN)
        self._last = time_us - self._start
        self._stream.set_time("time", duration=self._last / 1e6)

    def log(
        self, number: int, cameras: Sequence[str], images: Sequence[np.ndarray], depth: Sequence[np.ndarray],
        intrinsics: np.ndarray, cam_to_ego: np.ndarray, cloud: Cloud, *, lidar: np.ndarray | None = None,
        ego_to_global: np.ndarray | None = None, time_us: int | None = None, scene: str = "",
    ) -> None:  # fmt: skip
        """Adds one frame.

        Args:
          number: its place in the sequence.
          cameras: N names; of those that were there before, the others' pictures are taken away.
          images: N x [H, W, 3] uint8 RGB; depth: N x [H, W] metres, 0 = none, which is
            also what it shows beyond `dense.MAX_DEPTH`, as the PNG files do.
          intrinsics: [N, 3, 3] pixels at the images' sizes; cam_to_ego: [N, 4, 4].
          cloud: in the ego frame.
          lidar: [P, 3] metres in the ego frame.
          ego_to_global: [4, 4] metres, in any fixed frame whose z points up.
          time_us: microseconds; scene: name of the drive.

        Raises:
          DataError: the file cannot be written.
        """
        rerun, stream = self._rerun, self._stream
        self._check_space()
        self._place_in_time(number, scene, time_us)
        if new := [name for name in cameras if name not in self._cameras]:
            self._cameras += new
            stream.send_blueprint(_layout(rerun, self._cameras))
        stream.log("scene", rerun.TextDocument(scene))
        pose = np.eye(4) if ego_to_global is None else np.asarray(ego_to_global, np.float64)
        self._origin = pose[:3, 3] if self._origin is None else self._origin  # float32 inside of the viewer
        stream.log(_EGO, rerun.Transform3D(translation=pose[:3, 3] - self._origin, mat3x3=pose[:3, :3]))
        for name in self._cameras:
            if name not in cameras:
                stream.log(_camera(rerun, name), rerun.Clear(recursive=True))
        for i, name in enumerate(cameras):
            height, width = images[i].shape[:2]
            place = _camera(rerun, name)
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
            stream.log(
                f"{place}/depth",
                rerun.EncodedDepthImage(
                    dense.encode(depth[i]), media_type="image/png", meter=dense.UNITS_PER_METRE, colormap="turbo",
                    depth_range=[0, self._max_range * dense.UNITS_PER_METRE],
                ),
            )  # fmt: skip
        dot, step = rerun.Radius.ui_points(1.5), max(1, math.ceil(len(cloud.points) / MAX_POINTS))
        shown = rerun.Points3D(cloud.points[::step], colors=cloud.colours[::step], radii=dot)
        stream.log(f"{_EGO}/cloud", shown)
        points = np.zeros((0, 3), np.float32) if lidar is None else lidar
        stream.log(f"{_EGO}/lidar", rerun.Points3D(points, colors=[255, 255, 255], radii=dot))
        self._flush()
        self._frames += 1


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


def _camera(rerun: Any, name: str) -> str:
    """Entity of a camera, whatever characters its name has."""
    return f"{_EGO}/cameras/{rerun.escape_entity_path_part(name)}"


def _layout(rerun: Any, cameras: Sequence[str]) -> Any:
    """The cloud in 3-D on the left; each camera's image beside its depth on the right."""
    import rerun.blueprint as blueprint

    places = [_camera(rerun, name) for name in cameras]
    # The depth images would be a second, unfused cloud.
    hidden = [f"- /{place}/depth" for place in places]
    space = blueprint.Spatial3DView(
        origin="world", contents=["$origin/**", *hidden], name="fused", background=[24, 24, 24]
    )
    views = [
        blueprint.Spatial2DView(origin=f"/{place}", contents=[f"$origin/{kind}"], name=f"{name} {kind}")
        for name, place in zip(cameras, places, strict=True)
        for kind in ("image", "depth")
    ]
    return blueprint.Blueprint(
        blueprint.Horizontal(space, blueprint.Grid(*views, grid_columns=2), column_shares=[3, 2]),
        blueprint.TimePanel(timeline="frame"),
        collapse_panels=True,
    )

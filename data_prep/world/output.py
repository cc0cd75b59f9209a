"""What the writers of both formats share: jobs, rows of finished scenes, and files."""

import abc
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from data_prep.dense import FOLDER as DENSE_FOLDER
from data_prep.images import encode_jpeg
from data_prep.world.drive import Drive, Picture
from data_prep.world.rigs import Rig
from fsmde_jax.data import dense

SEMANTIC_FOLDER = "semantic"
_FIRST_US = 1_600_000_000_000_000  # September 2020
SCENE_US = 1_000_000_000  # scenes are this far apart in time, so that no two files get one name


@dataclasses.dataclass(frozen=True)
class Look:
    """Choices that shape every file of a dataset; one dataset has one."""

    rig: str  # name or path, as given
    rig_digest: str  # sha256 of the rig file's bytes
    scale: float | None
    size: tuple[int, int] | None
    seed: int
    frames: int  # keyframes per scene
    samples: int
    semantics: bool
    jpeg_quality: int
    sweeps_between: int
    vary_rig: bool = False  # whether every scene has a calibration of its own


@dataclasses.dataclass(frozen=True)
class Job:
    """One scene to render."""

    look: Look
    out: Path
    split: str  # "train" or "val"
    index: int  # of the scene in its split
    name: str

    @property
    def start_us(self) -> int:
        """Time of the first keyframe, microseconds since 1970; every scene of a seed has its own."""
        number = self.index * 2 + (self.split == "val")
        return _FIRST_US + number * SCENE_US

    @property
    def description(self) -> str:
        """Says everywhere that nothing here was recorded."""
        return f"rendered world, seed {self.look.seed}, {self.split} scene {self.index}"


def token(*parts: Any) -> str:
    """32 hexadecimal digits that depend on `parts` only."""
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


def quaternion(pose: np.ndarray) -> list[float]:
    """(w, x, y, z) of a transform [4, 4], w >= 0."""
    x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat(canonical=True).tolist()
    return [w, x, y, z]


def write(path: Path, data: bytes) -> None:
    """A file, with its folder. No temporary name: scenes without their final row file are rendered again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


class SceneWriter(abc.ABC):
    """Writes one scene's files and collects what its dataset's tables say about it."""

    def __init__(self, job: Job, rig: Rig):
        self.job, self.rig = job, rig
        self.files: dict[str, int] = {}  # what was written: path below the dataroot, bytes

    def write(self, path: Path, data: bytes) -> None:
        """A file of the scene."""
        write(path, data)
        self.files[path.relative_to(self.job.out).as_posix()] = len(data)

    def write_picture(self, picture: Picture, image: Path, beside: Path, camera: str) -> None:
        """JPEG at `image`, dense depth and (if asked for) classes in folders of `beside`, all with the image's stem."""
        self.write(image, encode_jpeg(picture.rgb, self.job.look.jpeg_quality))
        self.write(beside / DENSE_FOLDER / camera / f"{image.stem}.png", dense.encode(picture.depth))
        if self.job.look.semantics:
            done, data = cv2.imencode(".png", picture.semantic)
            if not done:
                raise RuntimeError("OpenCV could not encode a PNG")
            self.write(beside / SEMANTIC_FOLDER / camera / f"{image.stem}.png", data.tobytes())

    @abc.abstractmethod
    def keyframe(self, drive: Drive, number: int) -> None:
        """Renders and writes keyframe `number`."""

    @abc.abstractmethod
    def finish(self) -> Any:
        """The scene's rows (plain json), after its last keyframe."""

"""A trained student as a function: images, intrinsics and poses of one rig in, metric depth and its confidence out.

    import fsmde_jax

    model = fsmde_jax.load_model("lite0")                    # in this package; or a run's folder, or its file
    found = model(images, intrinsics, cam_to_ego)            # any number of cameras
    found.depth, found.confidence                            # [N, H, W] metres, [N, H, W] in 0 ... 1

`images` are uint8 RGB at any size, `intrinsics` pixels at that size. They are resized to the size that the student was
trained at, and depth comes back at theirs. Intrinsics set the metric scale: twice the focal length is twice the depth.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from fsmde_jax import compatible, confidence, geometry, interpolate
from fsmde_jax.data import transforms
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.models import depth_bins
from fsmde_jax.models.registry import build_student
from fsmde_jax.models.student import STRIDE
from fsmde_jax.state import make_predict
from fsmde_jax.students import read_student

Array = Any  # NumPy or jax.Array


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Depth of one rig, at the size of its images.

    Attributes:
      depth: [N, H, W] float32 metres (z-depth), or a list of [H_i, W_i] where the images differ in size.
      confidence: likewise, float32 in [0, 1]: the probability, by the student's own bins, that the true depth is within
        a factor of 1.25 of `depth` (what a1 measures). How well it knows is measured by `eval.confidence`.
    """

    depth: Any
    confidence: Any


def load_model(where: str | Path, *, image_size: tuple[int, int] | None = None, dtype: str = "float32") -> "DepthModel":
    """A trained student, ready to predict.

    Args:
      where: "lite0" (ships with the package), the folder of a run, or a .safetensors file of fsmde_jax.convert.
      image_size: height and width inside the network, multiples of 32; None = what it was trained at.
      dtype: compute dtype, float32 | bfloat16.

    Raises:
      DataError, TrainingError: nothing is there, or it is damaged. ConfigError: it is no student, or the size is wrong.
    """
    tree, meta, said = read_student(str(where))
    config = meta["identity"]["config"]
    if config.get("task", "student") != "student":
        raise ConfigError(f"{where}: trains a teacher; expected a student")
    size = image_size or tuple(config["data"]["image_size"])
    if len(size) != 2 or min(size) < STRIDE or any(side % STRIDE for side in size):
        raise ConfigError(f"image_size = {tuple(size)}: height and width must be positive multiples of {STRIDE}")
    model = build_student(**{**compatible.model_of(config), "dtype": dtype})
    return DepthModel(model, tree, (int(size[0]), int(size[1])), meta, said)


class DepthModel:
    """A student with its parameters. `meta` says how it was trained, `said` where it is from, in words."""

    def __init__(self, model: Any, tree: Mapping[str, Any], size: tuple[int, int], meta: dict[str, Any], said: str):
        self.model, self.image_size, self.meta, self.said = model, size, meta, said
        self._params, self._stats = jax.device_put((tree["params"], tree["batch_stats"]))
        self._run = make_predict(model, read)

    def __call__(
        self, images: Array | Sequence[Array], intrinsics: Array, cam_to_ego: Array | None = None
    ) -> Prediction:
        """Predicts the depth of one rig.

        Args:
          images: [N, H, W, 3] uint8 RGB, or a list of N images [H_i, W_i, 3].
          intrinsics: [N, 3, 3] pixels at those sizes; pixel centres at integers.
          cam_to_ego: [N, 4, 4] metres, camera x right, y down, z forward; only needed by students that mix views
            (`model.cross_view_blocks`).

        Raises:
          DataError: shapes or types are not as said, or a calibration cannot be used: intrinsics that are not finite or
            without positive focal lengths, a pose that is no rigid transform; names the image.
        """
        batch: dict[str, Any] = self.batch(images, intrinsics, cam_to_ego)
        found = jax.device_get(self._run(self._params, self._stats, batch))
        sizes = [image.shape[:2] for image in images]
        depth, sure = (
            [_resized(m, s) for m, s in zip(found[k][0], sizes, strict=True)] for k in ("depth", "confidence")
        )
        if len(set(sizes)) == 1:
            return Prediction(np.stack(depth), np.stack(sure))
        return Prediction(depth, sure)

    def batch(
        self, images: Array | Sequence[Array], intrinsics: Array, cam_to_ego: Array | None = None
    ) -> dict[str, np.ndarray]:
        """What the network takes [1, N, ...]: images and intrinsics at `image_size` (arguments, errors: as a call)."""
        intrinsics = np.asarray(intrinsics, np.float64)
        count = len(images)
        if count == 0 or intrinsics.shape != (count, 3, 3):
            raise DataError(f"expected intrinsics [N, 3, 3] for N = {count} images, got {intrinsics.shape}")
        if cam_to_ego is None:
            if self.model.cross_view_blocks:
                raise DataError("this student mixes the views of a rig: give cam_to_ego [N, 4, 4], too")
            cam_to_ego = np.tile(np.eye(4), (count, 1, 1))
        poses = np.asarray(cam_to_ego, np.float64)
        if poses.shape != (count, 4, 4):
            raise DataError(f"expected cam_to_ego [N, 4, 4] for N = {count} images, got {poses.shape}")
        pictures = np.empty((1, count, *self.image_size, 3), np.uint8)
        scaled = np.empty((1, count, 3, 3), np.float32)
        for i, image in enumerate(images):
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise DataError(f"image {i}: expected [H, W, 3] uint8 RGB, got {image.dtype} {image.shape}")
            geometry.check_intrinsics(intrinsics[i], f"image {i}, intrinsics")
            geometry.check_rigid(poses[i], f"image {i}, cam_to_ego")
            height, width = image.shape[:2]
            transforms.resize_box(image, (0, 0, height, width), pictures[0, i])
            y, x = self.image_size[0] / height, self.image_size[1] / width
            scaled[0, i] = geometry.resize_intrinsics(intrinsics[i], np.float64(y), np.float64(x))
        return {
            "images": pictures, "intrinsics": scaled, "cam_to_ego": poses[None].astype(np.float32),
            "view_mask": np.ones((1, count), bool),
        }  # fmt: skip

    def out_of_range(self, intrinsics: Array, widths: Sequence[int], names: Sequence[str]) -> list[str]:
        """A warning for each camera whose focal length is outside of what the student was trained for."""
        m = self.model
        scale = np.array([self.image_size[1] / width for width in widths])
        own = np.asarray(intrinsics, np.float64) * scale[:, None, None]
        return depth_bins.check_focals(
            own, self.image_size[1], names, min_depth=m.min_depth, max_depth=m.max_depth,
            focal_canonical=m.focal_canonical, focal_range=m.focal_range,
        )  # fmt: skip


def read(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Of a student's outputs: `depth` metres and `confidence` (`Prediction`), [B, N, H, W] float32 each."""
    probabilities = jax.nn.softmax(outputs["bin_logits"].astype(jnp.float32), -1)
    depth = outputs["pred_depth"]
    height, width = outputs["bin_logits"].shape[2:4]
    coarse = interpolate.resize(depth[..., None], height, width, "bilinear")[..., 0]
    sure = confidence.within(coarse, probabilities, outputs["bin_centers"].astype(jnp.float32))
    sure = interpolate.resize(sure[..., None], depth.shape[2], depth.shape[3], "bilinear")[..., 0]
    return {"depth": depth, "confidence": sure}


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape == tuple(size):
        return np.asarray(image, np.float32)
    return cv2.resize(np.asarray(image, np.float32), (size[1], size[0]), interpolation=cv2.INTER_LINEAR)

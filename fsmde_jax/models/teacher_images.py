"""Images as Depth Anything wants them: sizes that are multiples of 14, resized and normalised.

`prepare_image` is for picture files and follows the reference. `resize_for_teacher` is for the training step, where
the student's normalised images are at hand.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np

from fsmde_jax import interpolate
from fsmde_jax.errors import ConfigError
from fsmde_jax.models.student import IMAGE_MEAN, IMAGE_STD

Array = Any  # jax.Array

PATCH = 14  # pixels: side of DINOv2's patches
LONGER_SIDE = 630  # pixels of the longer side of rig images, where nothing else is said: 350x630 for cameras of 16:9
REFERENCE_SIZE = 518  # pixels: shorter side that the published weights were trained at


def reference_size(image_size: Sequence[int], size: int = REFERENCE_SIZE, patch: int = PATCH) -> tuple[int, int]:
    """(height, width) that the reference resizes an image of `image_size` (H, W) to.

    The shorter side becomes `size`, aspect kept; then each side the nearest multiple of `patch` (a tie goes to the
    even one), but none smaller than `size`.

    Source: `Resize(keep_aspect_ratio=True, ensure_multiple_of=14, resize_method="lower_bound")` of the official Depth
    Anything V2. The processor in transformers takes the side that changes LESS instead of the shorter one, so it
    differs for images with a side below `size` (400x600 becomes 350x518 there and 518x784 here).

    Raises:
      ConfigError: `size` is below `patch`.
      ValueError: a side of the image is not positive.
    """
    if size < patch:
        raise ConfigError(f"teacher image size {size}: expected at least {patch} pixels")
    height, width = _sides(image_size)
    scale = max(size / height, size / width)
    sides = []
    for side in (height, width):
        patches = round(scale * side / patch)
        if patches * patch < size:
            patches = -(-size // patch)
        sides.append(patches * patch)
    return sides[0], sides[1]


def _sides(image_size: Sequence[int]) -> tuple[int, int]:
    height, width = (int(side) for side in image_size)
    if height < 1 or width < 1:
        raise ValueError(f"image sizes must be positive, got {height}x{width}")
    return height, width


def prepare_image(image: np.ndarray, size: int = REFERENCE_SIZE, patch: int = PATCH) -> np.ndarray:
    """A picture as the network's input: resized by `reference_size` and normalised.

    As the official code: to [0, 1], OpenCV's bicubic (a = -.75, no antialias, overshoot kept), ImageNet's mean and
    standard deviation. The processor in transformers resizes uint8 with Pillow's bicubic (a = -.5, antialias), which
    is softer where a picture shrinks. Mean difference of the normalised values: none but rounding (1e-6) where nothing
    is resized, .002-.004 on smooth pictures (at most .02, one grey level), .02-.04 on photographs that shrink to .43.

    Args:
      image: [H, W, 3] uint8 RGB.
      size: pixels of the shorter side.
      patch: sides become multiples of it.

    Returns:
      [h, w, 3] float32, h and w multiples of `patch`.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"prepare_image: expected [H, W, 3] uint8, got {image.shape} {image.dtype}")
    height, width = reference_size(image.shape[:2], size, patch)
    unit = image.astype(np.float32) / np.float32(255)
    resized = np.asarray(cv2.resize(unit, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)
    return (resized - np.asarray(IMAGE_MEAN, np.float32)) / np.asarray(IMAGE_STD, np.float32)


def teacher_size(image_size: Sequence[int], longer: int, patch: int = PATCH) -> tuple[int, int]:
    """(height, width), multiples of `patch`: the longer side nearest to `longer`, the other to the aspect ratio.

    Args:
      image_size: (H, W) of the student's images in pixels.
      longer: wanted pixels of the longer side, e.g. 630: 900x1600 becomes 350x630.

    Raises:
      ConfigError: `longer` is below `patch`.
    """
    if longer < patch:
        raise ConfigError(f"teacher image size {longer}: expected at least {patch} pixels on the longer side")
    height, width = _sides(image_size)
    most = max(1, round(longer / patch)) * patch
    least = max(1, round(most * min(height, width) / max(height, width) / patch)) * patch
    return (least, most) if height <= width else (most, least)


def resize_for_teacher(images: Array, height: int, width: int, patch: int = PATCH) -> Array:
    """The student's images at the teacher's input size, inside jit.

    Bicubic per axis as in `prepare_image`; area weights where an axis shrinks to half or less, since bicubic would skip
    pixels there.

    Args:
      images: [B, N, H, W, 3] normalised (`models.student.normalise_images`), any float dtype.
      height: of the result, a multiple of `patch`; width: likewise.

    Returns:
      [B, N, height, width, 3] in the dtype of `images`; interpolated in float32.

    Raises:
      ConfigError: a size is not a positive multiple of `patch`.
    """
    for side in (height, width):
        if side < patch or side % patch:
            raise ConfigError(
                f"teacher image size {height}x{width}: height and width must be positive multiples of {patch}"
            )
    if images.ndim != 5 or images.shape[-1] != 3:
        raise ValueError(f"resize_for_teacher: expected [B, N, H, W, 3], got {images.shape}")
    x = images.astype(jnp.float32)
    x = interpolate.resize_taps(x, height, x.shape[-2], _method(x.shape[-3], height))
    return interpolate.resize_taps(x, height, width, _method(x.shape[-2], width)).astype(images.dtype)


def _method(old: int, new: int) -> interpolate.Method:
    return "area" if 2 * new <= old else "bicubic"

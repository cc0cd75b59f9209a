"""Augmentation of a rig: what may change (`AugmentOptions`), the random choices (`draw`), mirroring and colour jitter.

Zoom and crop are part of the resize in `transforms.load_rig`, which applies a `Draw` as a whole.
"""

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np

from fsmde_jax import geometry
from fsmde_jax.errors import ConfigError

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


@dataclasses.dataclass(frozen=True)
class AugmentOptions:
    """What training may change; the fields are the keys of `config.augment` (see configs/base.py).

    Raises:
      ConfigError: a value is out of its range.
    """

    flip: float = 0.5
    scale: tuple[float, float] = (1.0, 1.15)
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05
    jitter_probability: float = 0.5
    jitter_per_camera: bool = False
    camera_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter_probability", "camera_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} = {getattr(self, name)}: a probability must lie in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"augment.{name} = {getattr(self, name)}: a half-width must lie in [0, 1)")
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"augment.hue = {self.hue}: a fraction of the colour circle must lie in [0, 0.5]")
        low, high = self.scale
        if not 1 <= low <= high:
            raise ConfigError(f"augment.scale = {tuple(self.scale)}: expected 1 <= low <= high (1 = the whole image)")


NO_AUGMENT = AugmentOptions(flip=0.0, scale=(1.0, 1.0), jitter_probability=0.0)


@dataclasses.dataclass(frozen=True)
class Draw:
    """The random choices for one rig.

    `colour`: one (brightness, contrast, saturation, hue) row, or one per camera. `dropped`: cameras to take away, in
    this order, while another one is left (`cameras_left`).
    """

    flip: bool = False
    scale: float = 1.0
    offset: tuple[float, float] = (0.0, 0.0)  # of the crop, as fractions of the free play in y and x
    colour: np.ndarray | None = None  # [1 or N, 4]; factors around 1 and a fraction of the colour circle
    dropped: tuple[int, ...] = ()  # indices


def draw(options: AugmentOptions, num_cameras: int, rng: np.random.Generator) -> Draw:
    """Draws the choices for one rig; the same amount of randomness whatever the options."""
    u = rng.random(5)
    v = rng.uniform(-1.0, 1.0, (num_cameras, 4))
    w = rng.random(num_cameras)  # last: what was drawn before this option existed stays as it was
    if not options.jitter_per_camera:
        v = v[:1]
    half = np.array([options.brightness, options.contrast, options.saturation, options.hue])
    colour = v * half + np.array([1.0, 1.0, 1.0, 0.0])
    low, high = options.scale
    return Draw(
        flip=bool(u[0] < options.flip),
        scale=float(low + (high - low) * u[1]),
        offset=(float(u[2]), float(u[3])),
        colour=colour if u[4] < options.jitter_probability and half.any() else None,
        dropped=tuple(int(i) for i in np.argsort(w, kind="stable") if w[i] < options.camera_dropout),
    )


def cameras_left(present: np.ndarray, dropped: Sequence[int]) -> np.ndarray:
    """[N] bool: `present` [N] without the cameras `dropped`, taken away in that order while another one is left."""
    left = present.copy()
    for i in dropped:
        if left[i] and left.sum() > 1:
            left[i] = False
    return left


def flip_rig(arrays: dict[str, np.ndarray]) -> None:
    """Mirrors a rig in place: pixels, labels, masks, intrinsics, extrinsics and ego poses; the index order stays.

    What camera i sees after it is what the camera on the other side would see (`flipped_names`). Twice is the identity.

    Args:
      arrays: `images` [N, H, W, 3] uint8, `depth`, `ego_mask` and (where there) `dense_depth` [N, H, W],
        `intrinsics`, `cam_to_ego` and `ego_to_global`; where there, `teacher_rel_inv_depth` [N, h, w] and
        `teacher_tokens` [N, gh, gw, C], whose grid columns are mirrored.
    """
    width = arrays["images"].shape[2]
    for name in ("images", "depth", "ego_mask", "dense_depth", "teacher_rel_inv_depth"):
        for plane in arrays.get(name, ()):
            view = plane.view(np.uint8) if plane.dtype == np.bool_ else plane
            cv2.flip(view, 1, dst=view)
    if "teacher_tokens" in arrays:
        arrays["teacher_tokens"][:] = arrays["teacher_tokens"][:, :, ::-1].copy()
    arrays["intrinsics"][:] = geometry.flip_intrinsics(arrays["intrinsics"].astype(np.float64), width)
    arrays["cam_to_ego"][:] = geometry.flip_cam_to_ego(arrays["cam_to_ego"])
    arrays["ego_to_global"][:] = geometry.flip_ego_to_global(arrays["ego_to_global"])


def flipped_names(names: Sequence[str], cam_to_ego: np.ndarray) -> list[str]:
    """Names of a mirrored rig, by its left/right table: CAM_FRONT_LEFT's arrays now are those of a CAM_FRONT_RIGHT."""
    return [names[i] for i in geometry.mirror_permutation(cam_to_ego)]


def colour_matrix(colour: np.ndarray, mean_luma: float) -> np.ndarray:
    """One affine map [3, 4] float32 of RGB in 0..255 for the whole jitter, applied without intermediate clipping.

    `colour` [4] = (b, c, s, hue). In this order: x b; then c x + (1 - c) b mean_luma; then s x + (1 - s) luma(x); then
    a rotation by 2 pi hue of the chroma plane of YIQ (NTSC), which keeps the luma.
    """
    brightness, contrast, saturation, hue = (float(value) for value in colour)
    grey = np.ones((3, 1)) @ LUMA[None]
    angle = 2 * math.pi * hue
    turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    linear = np.linalg.solve(_RGB_TO_YIQ, turn @ _RGB_TO_YIQ) @ (saturation * np.eye(3) + (1 - saturation) * grey)
    offset = linear @ np.full(3, (1 - contrast) * brightness * mean_luma)
    return np.concatenate([linear * (contrast * brightness), offset[:, None]], 1).astype(np.float32)


def jitter(images: np.ndarray, colour: np.ndarray, view_mask: np.ndarray | None = None) -> None:
    """Colour jitter of a rig's images [N, H, W, 3] uint8 in place; `colour` [1 or N, 4] as in `Draw`.

    The mean grey that contrast turns around is the rig's for a shared jitter, the camera's otherwise. Cameras with
    `view_mask` [N] False stay as they are.
    """
    views = range(len(images)) if view_mask is None else np.flatnonzero(view_mask)
    luma = {i: float(LUMA @ cv2.mean(images[i])[:3]) for i in views}
    if len(colour) == 1:
        shared = colour_matrix(colour[0], sum(luma.values()) / max(len(luma), 1))
        matrices = dict.fromkeys(luma, shared)
    else:
        matrices = {i: colour_matrix(colour[i], mean) for i, mean in luma.items()}
    for i, matrix in matrices.items():
        cv2.transform(images[i], matrix, dst=images[i])

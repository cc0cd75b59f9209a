"""A bin head on a frozen teacher's features: teacher distributions that are learned from the labels.

Trained beside the student with the supervised loss on its own depth; its logits are what the student learns from.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fsmde_jax import interpolate
from fsmde_jax.expectation import expected_depth
from fsmde_jax.models import depth_bins

Array = Any  # jax.Array

TEACHER_BINS_SCOPE = "teacher_bins"  # name of its entry in the parameters; training only
_PYRAMID = (8, 4, 2, 1)  # how much coarser than the head the levels of `attractor` bins are


def _resize(x: Array, size: tuple[int, int]) -> Array:
    """[..., h, w, C] to `size`; per axis area weights when it shrinks, bilinear otherwise."""
    x = interpolate.resize_taps(x, size[0], x.shape[-2], "area" if size[0] < x.shape[-3] else "bilinear")
    return interpolate.resize_taps(x, size[0], size[1], "area" if size[1] < x.shape[-2] else "bilinear")


class TeacherBins(nn.Module):
    """The student's bin head with parameters of its own, on a teacher's DPT features.

    The features are resized to head resolution and normalised over channels (LayerNorm with its own scale and bias, as
    a frozen network's features have a scale of their own). Float32 throughout.

    Attributes:
      bins, probabilities, expectation, num_bins, min_depth, max_depth, focal_canonical, focal_range: as
        `models.student.Student`.
    """

    bins: str = "log"
    probabilities: str = "softmax"
    expectation: str = "log"
    num_bins: int = 64
    min_depth: float = 0.1
    max_depth: float = 80.0
    focal_canonical: float = 500.0
    focal_range: tuple[float, float] = (300.0, 600.0)

    @nn.compact
    def __call__(
        self, features: Array, intrinsics: Array, *, image_size: tuple[int, int], head_size: tuple[int, int]
    ) -> dict[str, Array]:
        """Predicts depth from a teacher's features.

        Args:
          features: `TeacherMaps.features` [B, N, hf, wf, F], any float dtype; no gradient goes into them.
          intrinsics: [B, N, 3, 3] pixels at `image_size`, the student's.
          image_size: (H, W) of the student's images.
          head_size: (h, w) of the student's bin logits.

        Returns:
          What `losses.total.supervised_loss` takes, and the teacher's logits: `pred_depth` [B, N, H, W] metres;
          `bin_logits` [B, N, h, w, K]; `bin_centers` [B, N, 1, 1, K], or [B, N, h, w, K] for `attractor`, metres,
          nearest first; `view_bin_centers` [B, N, K] metres. All float32.
        """
        b, n = features.shape[:2]
        if intrinsics.shape != (b, n, 3, 3):
            raise ValueError(f"intrinsics have shape {intrinsics.shape}, expected {(b, n, 3, 3)}")
        x = _resize(jax.lax.stop_gradient(features).astype(jnp.float32), head_size)
        x = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="norm")(x)
        levels = []
        if self.bins == "attractor":
            levels = [_resize(x, (-(-head_size[0] // k), -(-head_size[1] // k))) for k in _PYRAMID]
        depth_range = depth_bins.canonical_range(self.min_depth, self.max_depth, self.focal_canonical, self.focal_range)
        head = depth_bins.DepthBins(self.bins, self.probabilities, self.num_bins, depth_range, name="depth_bins")
        ratio = depth_bins.focal_ratio(intrinsics.astype(jnp.float32), image_size[1], self.focal_canonical)
        out = head(x, jnp.mean(x, (2, 3)), ratio, levels)
        depth = expected_depth(jax.nn.softmax(out["bin_logits"], -1), out["bin_centers"], self.expectation)
        return {**out, "pred_depth": depth_bins.resize_depth(depth, *image_size)}

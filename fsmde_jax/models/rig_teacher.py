"""Depth Anything as a network of the training job: the views of a rig in, their relative inverse depth out."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fsmde_jax import interpolate
from fsmde_jax.models.depth_anything import DepthAnything, Variant
from fsmde_jax.models.teacher_images import resize_for_teacher, teacher_size

Dtype = Any
Array = Any


class RigTeacher(nn.Module):
    """A relative Depth Anything model with the student's call; its parameters are those of `DepthAnything` itself.

    Attributes:
      variant: a name of `depth_anything.VARIANTS`, or sizes.
      longer_side: pixels of the longer side of its input (`teacher_images.teacher_size`).
      dtype: compute dtype.
      remat: compute blocks again for the gradient; saves memory on accelerators.
    """

    variant: str | Variant = "tiny"
    longer_side: int = 168
    dtype: Dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        self.network = DepthAnything(self.variant, dtype=self.dtype, remat=self.remat)
        nn.share_scope(self, self.network)

    def __call__(
        self,
        images: Array,
        intrinsics: Array,
        cam_to_ego: Array | None = None,
        *,
        train: bool,
        view_mask: Array | None = None,
    ) -> dict[str, Any]:
        """Predicts; calibration, `train` and `view_mask` change nothing, every view stands for itself.

        Args:
          images: [B, N, H, W, 3] float, normalised (`student.normalise_images`), any size.

        Returns:
          `rel_inv_depth` [B, N, H, W] float32 >= 0, larger = nearer.
        """
        b, n, h, w, _ = images.shape
        resized = resize_for_teacher(images, *teacher_size((h, w), self.longer_side))
        r = self.network(resized.reshape(b * n, *resized.shape[2:]))["rel_inv_depth"][..., None]
        r = interpolate.resize_taps(interpolate.resize_taps(r, h, r.shape[-2], "bilinear"), h, w, "bilinear")
        return {"rel_inv_depth": r[..., 0].reshape(b, n, h, w)}

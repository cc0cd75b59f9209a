"""A trained student in a teacher's place: large to small, or much data to little, with the same distillation."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsmde_jax.models.depth_bins import FOCAL_WIDTH
from fsmde_jax.models.student import STRIDE, Student

Array = Any  # jax.Array


class Widths(NamedTuple):
    """Channels of what a student's tokens and features are taken from."""

    embed_dim: int
    fusion: int


@dataclasses.dataclass(frozen=True)
class StudentTeacher:
    """What the distillation calls of `DepthAnything`, answered by a `Student`.

    It sees single images, without calibration, and says inverse depth up to a scale: metric scale is not taught. All
    four taps are the decoder's features at stride 8.

    Attributes:
      student: the network; without cross-view mixing, which single images have nothing for.
      in_turn: one image after the other, as in `DepthAnything`.
    """

    student: Student
    in_turn: bool = False
    patch: int = STRIDE  # sides of its input are multiples of this

    @property
    def sizes(self) -> Widths:
        channels = self.student.decoder_channels
        return Widths(channels[2], channels[2])

    def apply(self, variables: Mapping[str, Any], images: Array) -> dict[str, Any]:
        """Predicts.

        Args:
          variables: {"params": {"params", "batch_stats"} of the student}.
          images: [M, H, W, 3] float, normalised; H and W multiples of 32.

        Returns:
          `rel_inv_depth` [M, H, W] float32 > 0, larger = nearer; `taps`: four times [M, H / 8, W / 8, C]; `features`:
          the same map.
        """
        own = variables["params"]
        width = images.shape[2]
        # Any focal length serves: it scales depth, and relative depth has no scale.
        focal = self.student.focal_canonical * width / FOCAL_WIDTH
        intrinsics = jnp.eye(3, dtype=jnp.float32).at[0, 0].set(focal).at[1, 1].set(focal)

        def predict(batch: Array) -> tuple[Array, Array]:
            views = len(batch)
            outputs: Any = self.student.apply(
                own, batch[:, None], jnp.broadcast_to(intrinsics, (views, 1, 3, 3)), train=False
            )
            return 1.0 / outputs["pred_depth"][:, 0], outputs["features"][:, 0]

        if self.in_turn and len(images) > 1:
            inverse, features = jax.tree.map(
                lambda leaf: leaf[:, 0], jax.lax.map(lambda image: predict(image[None]), images)
            )
        else:
            inverse, features = predict(images)
        return {"rel_inv_depth": inverse, "taps": (features,) * 4, "features": features}

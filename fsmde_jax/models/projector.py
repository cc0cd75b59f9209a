"""The 1x1 projector of feature distillation: student channels to teacher channels, during training only."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = Any  # jax.Array

PROJECTOR_SCOPE = "projector"  # name of its entry in the parameters; training only


class Projector(nn.Module):
    """A 1x1 convolution with bias, float32: the regressor of FitNets (Romero et al., ICLR 2015).

    A module of its own, beside the student and not inside it: it is trained with the student, and the student's
    parameters, checkpointed or exported, never hold it. It commutes with resizing, whose weights sum to 1, so features
    may be pooled first where the teacher's grid is the coarser one.

    Attributes:
      channels: of the teacher's features.
    """

    channels: int

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Student features [B, N, h, w, C], any float dtype -> [B, N, h, w, channels] float32."""
        return nn.Dense(self.channels, precision=jax.lax.Precision.HIGHEST, name="conv")(features.astype(jnp.float32))

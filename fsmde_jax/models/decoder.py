"""A light U-Net decoder: from five encoder taps to features at strides 2 ... 32.

Normalisation is BatchNorm: at inference it is one scale and one shift per channel, which folds into the convolution
before it on export (`batch_norm`), while GroupNorm would have to compute statistics of every picture at run time.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fsmde_jax.models.batch_norm import BatchNorm
from fsmde_jax.models.convolution import convolve

Dtype = Any
Array = Any

EPSILON = 1e-5  # of BatchNorm
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


def upsample2(x: Array) -> Array:
    """Nearest-neighbour doubling of [M, h, w, C]: a copy, no arithmetic; the 3x3 convolution after it smooths."""
    m, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (m, h, 2, w, 2, c))
    return x.reshape(m, 2 * h, 2 * w, c)


class ConvNorm(nn.Module):
    """Convolution and BatchNorm, then ReLU unless `relu` is False; keeps the size."""

    features: int
    kernel: int
    relu: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        x = nn.Conv(
            self.features, (self.kernel, self.kernel), padding=self.kernel // 2, use_bias=False, dtype=self.dtype,
            kernel_init=_KERNEL_INIT, conv_general_dilated=convolve, name="conv",
        )(x)  # fmt: skip
        x = BatchNorm(use_running_average=not train, momentum=0.9, epsilon=EPSILON, dtype=self.dtype, name="norm")(
            x, mask=mask
        )
        return nn.relu(x) if self.relu else x


class Decoder(nn.Module):
    """Coarse to fine: project, double, add the projected tap, one 3x3 convolution per level.

    The 1x1 projection comes before the doubling (it is linear, so the result is the same at a quarter of the cost).

    Attributes:
      channels: of the levels at strides 2, 4, 8, 16, 32.
      dtype: compute dtype; parameters stay float32.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, taps: tuple[Array, ...], *, train: bool, mask: Array | None = None) -> tuple[Array, ...]:
        """Decodes.

        Args:
          taps: five features [M, H / s, W / s, *], s = 2, 4, 8, 16, 32.
          train: normalise by the batch and update the running statistics.
          mask: [M, 1, 1, 1] bool, False = leave this image out of the batch statistics.

        Returns:
          Five features [M, H / s, W / s, channels], s = 2, 4, 8, 16, 32.
        """
        if len(taps) != len(self.channels):
            raise ValueError(f"the decoder has {len(self.channels)} levels, but got {len(taps)} taps")
        levels: list[Array] = []
        for i in reversed(range(len(taps))):
            features = self.channels[i]
            x = ConvNorm(features, 1, relu=False, dtype=self.dtype, name=f"lateral_{i}")(
                taps[i], train=train, mask=mask
            )
            if levels:
                x = x + upsample2(
                    nn.Conv(features, (1, 1), use_bias=False, dtype=self.dtype, name=f"up_{i}")(levels[-1])
                )
            x = ConvNorm(features, 3, dtype=self.dtype, name=f"fuse_{i}")(nn.relu(x), train=train, mask=mask)
            levels.append(x)
        return tuple(reversed(levels))

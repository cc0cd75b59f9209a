"""Dense prediction head of Depth Anything (after DPT: Ranftl et al., ICCV 2021).

Sub-modules are called as in the official state dict (`scratch/refinenet1/resConfUnit1/conv1`). All upsampling is
bilinear with aligned corners.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fsmde_jax import interpolate
from fsmde_jax.models.convolution import convolve

Dtype = Any
Array = Any

HEAD_WIDTH = 32  # channels before the last layer, in every variant


def _conv(features: int, kernel: int, dtype: Dtype, name: str, *, stride: int = 1, bias: bool = True) -> nn.Conv:
    # 'SAME' would pad a stride-2 3x3 convolution by (0, 1); torch pads by (1, 1).
    return nn.Conv(
        features, (kernel, kernel), strides=(stride, stride), padding=kernel // 2, use_bias=bias, dtype=dtype,
        conv_general_dilated=convolve, name=name,
    )  # fmt: skip


def _upsample(x: Array, height: int, width: int) -> Array:
    return interpolate.resize_taps(x, height, width, "bilinear_align_corners")


class Spread(nn.Module):
    """Transposed convolution with equal kernel and stride: every pixel becomes a patch of `factor` x `factor` pixels.

    Patches do not overlap, so it is one matrix product. The kernel is (rows, columns, out, in), as that of
    `nn.ConvTranspose(transpose_kernel=True)`.
    """

    features: int
    factor: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        m, h, w, channels = x.shape
        f = self.factor
        init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        kernel = self.param("kernel", init, (f, f, self.features, channels))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        matrix = kernel.astype(self.dtype).transpose(3, 0, 1, 2).reshape(channels, f * f * self.features)
        y = (x @ matrix).reshape(m, h, w, f, f, self.features).swapaxes(2, 3)
        return y.reshape(m, h * f, w * f, self.features) + bias.astype(self.dtype)


class ResidualConvUnit(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, and the input added; [M, h, w, features] -> same."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = _conv(self.features, 3, self.dtype, "conv1")(nn.relu(x))
        return x + _conv(self.features, 3, self.dtype, "conv2")(nn.relu(y))


class FusionBlock(nn.Module):
    """Adds a level to what comes from below, refines, and enlarges to `size` = (height, width).

    The official order is to enlarge, then to project. Here the 1x1 projection comes first, at a quarter of the cost:
    both are linear and interpolation weights sum to 1, so the numbers are the same.
    """

    features: int
    size: tuple[int, int]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, level: Array | None = None) -> Array:
        if level is not None:
            x = x + ResidualConvUnit(self.features, self.dtype, name="resConfUnit1")(level)
        x = ResidualConvUnit(self.features, self.dtype, name="resConfUnit2")(x)
        return _upsample(_conv(self.features, 1, self.dtype, "out_conv")(x), *self.size)


class LastLayer(nn.Module):
    """1x1 convolution to one channel in float32; [M, H, W, C] -> [M, H, W]. A sum fuses with what comes before it."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (1, 1, x.shape[-1], 1))
        bias = self.param("bias", nn.initializers.zeros, (1,))
        return (x.astype(jnp.float32) * kernel[0, 0, :, 0]).sum(-1) + bias


class Scratch(nn.Module):
    """Fusion of the four levels, coarse to fine, and the output convolutions.

    Attributes:
      features: width of the fusion.
      patch: pixels that one token stands for.
      dtype: compute dtype; the last layer is float32.
      remat: compute the inside of the fusion blocks again for the gradient.
    """

    features: int
    patch: int
    dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, levels: tuple[Array, ...]) -> tuple[Array, Array]:
        """Returns the finest features [M, 8h, 8w, features] and the output [M, 14h, 14w] float32, not yet activated."""
        levels = tuple(
            _conv(self.features, 3, self.dtype, f"layer{i + 1}_rn", bias=False)(level) for i, level in enumerate(levels)
        )
        h, w = levels[2].shape[1:3]
        sizes = [(8 * h, 8 * w), *(level.shape[1:3] for level in levels[:3])]
        block = nn.remat(FusionBlock) if self.remat else FusionBlock
        x = block(self.features, sizes[3], self.dtype, name="refinenet4")(levels[3])
        for i in (2, 1, 0):
            x = block(self.features, sizes[i], self.dtype, name=f"refinenet{i + 1}")(x, levels[i])
        y = _conv(self.features // 2, 3, self.dtype, "output_conv1")(x)
        y = _upsample(y, self.patch * h, self.patch * w)
        y = nn.relu(_conv(HEAD_WIDTH, 3, self.dtype, "output_conv2_0")(y))
        return x, LastLayer(name="output_conv2_2")(y)


class DPTHead(nn.Module):
    """Token maps to a picture.

    Attributes:
      widths: channels of the four levels, finest first.
      features: width of the fusion.
      patch: pixels that one token stands for.
      dtype: compute dtype; the last layer is float32.
      remat: compute the inside of the fusion blocks again for the gradient.
    """

    widths: tuple[int, ...] = (48, 96, 192, 384)
    features: int = 64
    patch: int = 14
    dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, taps: tuple[Array, ...]) -> tuple[Array, Array]:
        """Runs the head.

        Args:
          taps: four token maps [M, h, w, C].

        Returns:
          Features [M, 8h, 8w, features] before the output convolutions, and the output [M, 14h, 14w] float32 without
          its final activation.
        """
        if len(taps) != 4 or len(self.widths) != 4:
            raise ValueError(f"expected four taps and four widths, got {len(taps)} and {len(self.widths)}")
        maps = [
            _conv(width, 1, self.dtype, f"projects_{i}")(tap)
            for i, (tap, width) in enumerate(zip(taps, self.widths, strict=True))
        ]
        levels = (
            Spread(self.widths[0], 4, self.dtype, name="resize_layers_0")(maps[0]),
            Spread(self.widths[1], 2, self.dtype, name="resize_layers_1")(maps[1]),
            maps[2],
            _conv(self.widths[3], 3, self.dtype, "resize_layers_3", stride=2)(maps[3]),
        )
        return Scratch(self.features, self.patch, self.dtype, self.remat, name="scratch")(levels)

"""ResNet encoders (He et al., CVPR 2016; the stride sits in the 3x3 convolution, as in torchvision).

Sub-modules are called as in torchvision's state dict (`layer1_0/downsample_0` = `layer1.0.downsample.0`), so that
loading pretrained weights is a walk over the parameter paths (`fsmde_jax.weights`).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fsmde_jax.models.batch_norm import BatchNorm
from fsmde_jax.models.convolution import convolve, max_pool

Dtype = Any
Array = Any

# Depths of the four stages, and whether the blocks are bottlenecks.
VARIANTS: dict[str, tuple[tuple[int, ...], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}

EPSILON = 1e-5  # of BatchNorm
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # torchvision's kaiming_normal_, fan_out


def _conv(features: int, kernel: int, stride: int, dtype: Dtype, name: str) -> nn.Conv:
    # 'SAME' would pad a stride-2 3x3 convolution by (0, 1); torch pads by (1, 1).
    return nn.Conv(
        features, (kernel, kernel), strides=(stride, stride), padding=kernel // 2, use_bias=False, dtype=dtype,
        kernel_init=_KERNEL_INIT, conv_general_dilated=convolve, name=name,
    )  # fmt: skip


def _norm(train: bool, dtype: Dtype, name: str) -> BatchNorm:
    # torch momentum 0.1 is 0.9 here. The running variance is the biased one (torch stores n / (n - 1) of it).
    return BatchNorm(use_running_average=not train, momentum=0.9, epsilon=EPSILON, dtype=dtype, name=name)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; [M, h, w, c] -> [M, h / stride, w / stride, features]."""

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        y = _conv(self.features, 3, self.stride, self.dtype, "conv1")(x)
        y = nn.relu(_norm(train, self.dtype, "bn1")(y, mask=mask))
        y = _conv(self.features, 3, 1, self.dtype, "conv2")(y)
        y = _norm(train, self.dtype, "bn2")(y, mask=mask)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.stride, self.dtype, "downsample_0")(x)
            x = _norm(train, self.dtype, "downsample_1")(x, mask=mask)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions and a shortcut; the inner width is features / 4."""

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        inner = self.features // 4
        y = _conv(inner, 1, 1, self.dtype, "conv1")(x)
        y = nn.relu(_norm(train, self.dtype, "bn1")(y, mask=mask))
        y = _conv(inner, 3, self.stride, self.dtype, "conv2")(y)
        y = nn.relu(_norm(train, self.dtype, "bn2")(y, mask=mask))
        y = _conv(self.features, 1, 1, self.dtype, "conv3")(y)
        y = _norm(train, self.dtype, "bn3")(y, mask=mask)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.stride, self.dtype, "downsample_0")(x)
            x = _norm(train, self.dtype, "downsample_1")(x, mask=mask)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet without its classifier.

    Attributes:
      depths: blocks of each stage.
      bottleneck: bottleneck blocks (ResNet-50) instead of basic ones.
      widths: inner channels of each stage; bottleneck stages put out four times as many.
      stem_width: channels of the first convolution.
      dtype: compute dtype; parameters stay float32.
    """

    depths: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_width: int = 64
    dtype: Dtype = jnp.float32

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the taps at strides 2, 4, 8, 16, 32."""
        return (self.stem_width, *(width * (4 if self.bottleneck else 1) for width in self.widths))

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> tuple[Array, ...]:
        """Runs the encoder.

        Args:
          x: [M, H, W, 3] normalised images.
          train: normalise by the batch and update the running statistics.
          mask: [M, 1, 1, 1] bool, False = leave this image out of the batch statistics.

        Returns:
          Features [M, H / s, W / s, C] at strides s = 2, 4, 8, 16, 32; the first is before max pooling.
        """
        x = _conv(self.stem_width, 7, 2, self.dtype, "conv1")(x.astype(self.dtype))
        x = nn.relu(_norm(train, self.dtype, "bn1")(x, mask=mask))
        taps = [x]
        x = max_pool(x)
        block = Bottleneck if self.bottleneck else BasicBlock
        for stage, (depth, features) in enumerate(zip(self.depths, self.channels[1:], strict=True)):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                x = block(features, stride, self.dtype, name=f"layer{stage + 1}_{i}")(x, train=train, mask=mask)
            taps.append(x)
        return tuple(taps)


def resnet(variant: str, dtype: Dtype = jnp.float32, name: str | None = None) -> ResNet:
    """The encoder called `variant`, one of `VARIANTS`."""
    depths, bottleneck = VARIANTS[variant]
    return ResNet(depths=depths, bottleneck=bottleneck, dtype=dtype, name=name)

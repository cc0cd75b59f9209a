"""EfficientNet-Lite0/1/2 encoders (the EfficientNet family without squeeze-and-excitation, with ReLU6).

TF-style: 'SAME' padding and BatchNorm epsilon 1e-3. Sub-modules are called as in the PyTorch port
`efficientnet-lite-pytorch`, less the leading underscores (`blocks_1/expand_conv` = `_blocks.1._expand_conv`).
Stochastic depth, which the ImageNet training used, is left out.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fsmde_jax.models.batch_norm import BatchNorm
from fsmde_jax.models.convolution import convolve

Dtype = Any
Array = Any
Depthwise = Literal["auto", "shift", "conv"]

VARIANTS: dict[str, tuple[float, float]] = {  # width and depth factors
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
# repeats, kernel, stride, expansion, output channels of Lite0's seven stages
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
TAP_STAGES = (0, 1, 2, 4, 6)  # the last stage at strides 2, 4, 8, 16, 32
_STEM, _HEAD = 32, 1280  # not scaled in the Lite family

EPSILON = 1e-3  # of BatchNorm
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One inverted-residual block."""

    kernel: int
    stride: int
    expansion: int
    features: int


def _round_filters(filters: int, factor: float) -> int:
    """Scaled channels, rounded to a multiple of 8 but by no more than 10 % downwards (the TensorFlow rule)."""
    scaled = filters * factor
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def stage_specs(variant: str) -> list[list[BlockSpec]]:
    """Blocks of the seven stages; the first and the last stage keep their depth."""
    width, depth = VARIANTS[variant]
    stages = []
    for i, (repeats, kernel, stride, expansion, features) in enumerate(_STAGES):
        if 0 < i < len(_STAGES) - 1:
            repeats = math.ceil(depth * repeats)
        out = _round_filters(features, width)
        stages.append([BlockSpec(kernel, stride if r == 0 else 1, expansion, out) for r in range(repeats)])
    return stages


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TF's 'SAME' padding of one axis: (before, after)."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_shift(x: Array, kernel: Array, stride: int) -> Array:
    """Depthwise convolution with 'SAME' padding as a sum of k * k shifted products.

    XLA on CPU runs a grouped convolution with one channel per group 10 to 23 times slower than this.

    Args:
      x: [M, h, w, C]; kernel: [k, k, 1, C].
    """
    m, h, w, c = x.shape
    k = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), same_padding(h, k, stride), same_padding(w, k, stride), (0, 0)))
    out_h, out_w = math.ceil(h / stride), math.ceil(w / stride)
    total = jnp.zeros((), x.dtype)
    for i in range(k):
        for j in range(k):
            end = (m, i + (out_h - 1) * stride + 1, j + (out_w - 1) * stride + 1, c)
            total = total + jax.lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1)) * kernel[i, j, 0]
    return total


def _depthwise_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_shift(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """Gradients for x, as shifted products again, and for the kernel, in a loop over the rows of the output.

    Differentiated automatically, each of the k * k entries of the kernel gets a reduction of its own, into which XLA
    fuses (that is, repeats) whatever x and the gradient are computed from. A loop reads both as they are. It adds
    products place by place and sums up at its end: sums inside of the loop XLA gives to a library whose calls cost
    more than the sums do (docs/scaling.md), and images on other devices would have to be summed up for every row.
    """
    x, kernel = saved
    (m, h, w, c), k, (out_h, out_w) = x.shape, kernel.shape[0], gradient.shape[1:3]
    before, after = zip(same_padding(h, k, stride), same_padding(w, k, stride), strict=True)
    edges = [
        (k - 1 - b, n + b - ((out - 1) * stride + 1), stride - 1)
        for n, out, b in zip((h, w), (out_h, out_w), before, strict=True)
    ]
    spread = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    for_x = jnp.zeros((), x.dtype)
    for i in range(k):
        for j in range(k):
            part = jax.lax.slice(spread, (0, i, j, 0), (m, i + h, j + w, c))
            for_x = for_x + part * kernel[k - 1 - i, k - 1 - j, 0]

    padded = jnp.pad(x, ((0, 0), *zip(before, after, strict=True), (0, 0)))

    def add_row(totals: list[Array], row: Array) -> tuple[list[Array], None]:
        rows = jax.lax.dynamic_slice(padded, (0, row * stride, 0, 0), (m, k, padded.shape[2], c))
        of_row = jax.lax.dynamic_slice(gradient, (0, row, 0, 0), (m, 1, out_w, c))
        products = [rows[:, :, j : j + (out_w - 1) * stride + 1 : stride] * of_row for j in range(k)]
        return [total + product.astype(jnp.float32) for total, product in zip(totals, products, strict=True)], None

    nothing = [jnp.zeros((m, k, out_w, c), jnp.float32)] * k
    totals, _ = jax.lax.scan(add_row, nothing, jnp.arange(out_h))
    for_kernel = jnp.stack([total.sum((0, 2)) for total in totals], 1)
    return for_x.astype(x.dtype), for_kernel[:, :, None].astype(kernel.dtype)


depthwise_shift.defvjp(_depthwise_forward, _depthwise_backward)


def depthwise_grouped(x: Array, kernel: Array, stride: int) -> Array:
    """`depthwise_shift` as XLA's grouped convolution."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_by_platform(x: Array, kernel: Array, stride: int) -> Array:
    """`depthwise_shift` where the program is compiled for a CPU, `depthwise_grouped` for anything else."""
    return jax.lax.platform_dependent(
        x, kernel, cpu=lambda x, k: depthwise_shift(x, k, stride), default=partial(depthwise_grouped, stride=stride)
    )


def _by_platform_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_by_platform(x, kernel, stride), (x, kernel)


def _by_platform_backward(stride: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    def grouped(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return jax.vjp(partial(depthwise_grouped, stride=stride), x, kernel)[1](gradient)

    def shift(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return _depthwise_backward(stride, (x, kernel), gradient)

    return jax.lax.platform_dependent(*saved, gradient, cpu=shift, default=grouped)


depthwise_by_platform.defvjp(_by_platform_forward, _by_platform_backward)


class DepthwiseConv(nn.Module):
    """k x k convolution of every channel by itself; `kernel` [k, k, 1, C] whatever the way of computing it."""

    kernel_size: int
    stride: int
    method: Depthwise = "auto"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, k = x.shape[-1], self.kernel_size
        kernel = self.param("kernel", nn.initializers.variance_scaling(2.0, "fan_in", "normal"), (k, k, 1, c))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        forms: dict[str, Any] = {"auto": depthwise_by_platform, "shift": depthwise_shift, "conv": depthwise_grouped}
        return forms[self.method](x, kernel, self.stride)


def _conv(features: int, kernel: int, stride: int, dtype: Dtype, name: str) -> nn.Conv:
    return nn.Conv(
        features, (kernel, kernel), strides=(stride, stride), padding="SAME", use_bias=False, dtype=dtype,
        kernel_init=_KERNEL_INIT, conv_general_dilated=convolve, name=name,
    )  # fmt: skip


def _norm(train: bool, dtype: Dtype, name: str) -> BatchNorm:
    # 0.9 rather than the 0.99 of the ImageNet training: depth training is far shorter.
    return BatchNorm(use_running_average=not train, momentum=0.9, epsilon=EPSILON, dtype=dtype, name=name)


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise, project (1x1, linear); with a shortcut where the shape stays."""

    spec: BlockSpec
    depthwise: Depthwise = "auto"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        spec, y = self.spec, x
        if spec.expansion != 1:
            y = _conv(x.shape[-1] * spec.expansion, 1, 1, self.dtype, "expand_conv")(y)
            y = nn.relu6(_norm(train, self.dtype, "bn0")(y, mask=mask))
        y = DepthwiseConv(spec.kernel, spec.stride, self.depthwise, self.dtype, name="depthwise_conv")(y)
        y = nn.relu6(_norm(train, self.dtype, "bn1")(y, mask=mask))
        y = _conv(spec.features, 1, 1, self.dtype, "project_conv")(y)
        y = _norm(train, self.dtype, "bn2")(y, mask=mask)
        return x + y if spec.stride == 1 and x.shape[-1] == spec.features else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite.

    Attributes:
      variant: one of `VARIANTS`.
      num_classes: 0 = encoder only; otherwise the ImageNet classifier is added and logits are returned too.
      depthwise: how depthwise convolutions are computed: `shift` | `conv`, `auto` = shift in a program for a CPU, conv
        in one for anything else.
      dtype: compute dtype; parameters stay float32.
    """

    variant: str = "efficientnet_lite0"
    num_classes: int = 0
    depthwise: Depthwise = "auto"
    dtype: Dtype = jnp.float32

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the taps at strides 2, 4, 8, 16, 32."""
        stages = stage_specs(self.variant)
        return tuple(stages[i][-1].features for i in TAP_STAGES)

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Any:
        """Runs the encoder.

        Args:
          x: [M, H, W, 3] normalised images.
          train: normalise by the batch and update the running statistics.
          mask: [M, 1, 1, 1] bool, False = leave this image out of the batch statistics.

        Returns:
          Features [M, H / s, W / s, C] at strides s = 2, 4, 8, 16, 32; with a classifier, a pair of these and the
          class logits [M, num_classes].
        """
        x = _conv(_STEM, 3, 2, self.dtype, "conv_stem")(x.astype(self.dtype))
        x = nn.relu6(_norm(train, self.dtype, "bn0")(x, mask=mask))
        taps, index = [], 0
        for i, stage in enumerate(stage_specs(self.variant)):
            for spec in stage:
                x = InvertedResidual(spec, self.depthwise, self.dtype, name=f"blocks_{index}")(
                    x, train=train, mask=mask
                )
                index += 1
            if i in TAP_STAGES:
                taps.append(x)
        if not self.num_classes:
            return tuple(taps)
        x = _conv(_HEAD, 1, 1, self.dtype, "conv_head")(x)
        x = nn.relu6(_norm(train, self.dtype, "bn1")(x, mask=mask))
        return tuple(taps), nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(jnp.mean(x, (1, 2)))

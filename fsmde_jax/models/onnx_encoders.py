"""Encoders and decoder of a student as nodes of an ONNX graph: every BatchNorm folded into the convolution before."""

import math
from collections.abc import Sequence

from fsmde_jax.models import efficientnet_lite, resnet
from fsmde_jax.models.onnx_nodes import Graph, Params, Part, Size


def encoder(g: Graph, x: str, name: str, params: Params, stats: Params, size: Size) -> list[str]:
    """Taps at strides 2, 4, 8, 16, 32 of normalised images [M, 3, H, W]; `name` is a key of `registry.ENCODERS`."""
    if name in resnet.VARIANTS:
        return _resnet(g, x, name, Part(params, stats, resnet.EPSILON))
    return _efficientnet(g, x, name, Part(params, stats, efficientnet_lite.EPSILON), size)


def _efficientnet(g: Graph, x: str, variant: str, part: Part, size: Size) -> list[str]:
    """Taps at strides 2, 4, 8, 16, 32."""

    def spatial(x: str, here: Size, of: Part, name: str, norm: str, stride: int, depthwise: bool) -> tuple[str, Size]:
        kernel, bias = of.folded(name, norm)
        edges = [efficientnet_lite.same_padding(length, kernel.shape[0], stride) for length in here]
        padding = [before for before, _ in edges] + [after for _, after in edges]
        x = g.relu6(g.convolution(x, kernel, bias, stride, padding, depthwise=depthwise))
        return x, (math.ceil(here[0] / stride), math.ceil(here[1] / stride))

    x, here = spatial(x, size, part, "conv_stem", "bn0", 2, False)
    taps, index, channels = [], 0, 0
    for i, stage in enumerate(efficientnet_lite.stage_specs(variant)):
        for spec in stage:
            block, y = part[f"blocks_{index}"], x
            if spec.expansion != 1:
                y = g.relu6(g.convolution(y, *block.folded("expand_conv", "bn0")))
            y, here = spatial(y, here, block, "depthwise_conv", "bn1", spec.stride, True)
            y = g.convolution(y, *block.folded("project_conv", "bn2"))
            x = g.node("Add", x, y) if spec.stride == 1 and channels == spec.features else y
            index, channels = index + 1, spec.features
        if i in efficientnet_lite.TAP_STAGES:
            taps.append(x)
    return taps


def _resnet(g: Graph, x: str, variant: str, part: Part) -> list[str]:
    """Taps at strides 2, 4, 8, 16, 32."""

    def conv(x: str, of: Part, name: str, norm: str, stride: int = 1) -> str:
        kernel, bias = of.folded(name, norm)
        return g.convolution(x, kernel, bias, stride, [kernel.shape[0] // 2] * 4)

    x = g.node("Relu", conv(x, part, "conv1", "bn1", 2))
    taps = [x]
    x = g.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    depths, bottleneck = resnet.VARIANTS[variant]
    for stage, depth in enumerate(depths):
        for i in range(depth):
            block, stride, y = part[f"layer{stage + 1}_{i}"], 2 if stage > 0 and i == 0 else 1, x
            last = 3 if bottleneck else 2
            for k in range(1, last + 1):
                strided = k == (2 if bottleneck else 1)
                y = conv(y, block, f"conv{k}", f"bn{k}", stride if strided else 1)
                y = g.node("Relu", y) if k < last else y
            if "downsample_0" in block.params:
                x = conv(x, block, "downsample_0", "downsample_1", stride)
            x = g.node("Relu", g.node("Add", x, y))
        taps.append(x)
    return taps


def decoder(g: Graph, taps: Sequence[str], part: Part) -> list[str]:
    """Features at strides 2, 4, 8, 16, 32."""
    levels: list[str] = []
    for i in reversed(range(len(taps))):
        x = g.convolution(taps[i], *part[f"lateral_{i}"].folded("conv", "norm"))
        if levels:
            coarse = g.convolution(levels[-1], part.params[f"up_{i}"]["kernel"])
            x = g.node("Add", x, g.scaled(coarse, 2, "nearest"))
        kernel, bias = part[f"fuse_{i}"].folded("conv", "norm")
        levels.append(g.node("Relu", g.convolution(g.node("Relu", x), kernel, bias, 1, (1, 1, 1, 1))))
    return levels[::-1]

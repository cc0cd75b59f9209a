"""Encoders and decoder of a student as nodes of an ONNX graph; parameters are those of `batch_norm.fold`."""

import math
from collections.abc import Sequence

import numpy as np

from fsmde_jax.models import efficientnet_lite, resnet
from fsmde_jax.models.onnx_nodes import Graph, Params, Size


def encoder(g: Graph, x: str, name: str, params: Params, size: Size) -> list[str]:
    """Taps at strides 2, 4, 8, 16, 32 of normalised images [M, 3, H, W]; `name` is a key of `registry.ENCODERS`."""
    return _resnet(g, x, name, params) if name in resnet.VARIANTS else _efficientnet(g, x, name, params, size)


def _efficientnet(g: Graph, x: str, variant: str, params: Params, size: Size) -> list[str]:
    """Taps at strides 2, 4, 8, 16, 32."""

    def spatial(x: str, here: Size, of: Params, conv: str, norm: str, stride: int) -> tuple[str, Size]:
        kernel = np.shape(of[conv]["kernel"])[0]
        edges = [efficientnet_lite.same_padding(length, kernel, stride) for length in here]
        padding = [before for before, _ in edges] + [after for _, after in edges]
        x = g.relu6(g.folded(x, of, conv, norm, stride, padding))
        return x, (math.ceil(here[0] / stride), math.ceil(here[1] / stride))

    x, here = spatial(x, size, params, "conv_stem", "bn0", 2)
    taps, index, channels = [], 0, 0
    for i, stage in enumerate(efficientnet_lite.stage_specs(variant)):
        for spec in stage:
            block, y = params[f"blocks_{index}"], x
            if spec.expansion != 1:
                y = g.relu6(g.folded(y, block, "expand_conv", "bn0"))
            y, here = spatial(y, here, block, "depthwise_conv", "bn1", spec.stride)
            y = g.folded(y, block, "project_conv", "bn2")
            x = g.node("Add", x, y) if spec.stride == 1 and channels == spec.features else y
            index, channels = index + 1, spec.features
        if i in efficientnet_lite.TAP_STAGES:
            taps.append(x)
    return taps


def _resnet(g: Graph, x: str, variant: str, params: Params) -> list[str]:
    """Taps at strides 2, 4, 8, 16, 32."""

    def conv(x: str, of: Params, name: str, norm: str, stride: int = 1) -> str:
        return g.folded(x, of, name, norm, stride, [np.shape(of[name]["kernel"])[0] // 2] * 4)

    x = g.node("Relu", conv(x, params, "conv1", "bn1", 2))
    taps = [x]
    x = g.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    depths, bottleneck = resnet.VARIANTS[variant]
    for stage, depth in enumerate(depths):
        for i in range(depth):
            block, stride, y = params[f"layer{stage + 1}_{i}"], 2 if stage > 0 and i == 0 else 1, x
            last = 3 if bottleneck else 2
            for k in range(1, last + 1):
                strided = k == (2 if bottleneck else 1)
                y = conv(y, block, f"conv{k}", f"bn{k}", stride if strided else 1)
                y = g.node("Relu", y) if k < last else y
            if "downsample_0" in block:
                x = conv(x, block, "downsample_0", "downsample_1", stride)
            x = g.node("Relu", g.node("Add", x, y))
        taps.append(x)
    return taps


def decoder(g: Graph, taps: Sequence[str], params: Params) -> list[str]:
    """Features at strides 2, 4, 8, 16, 32."""
    levels: list[str] = []
    for i in reversed(range(len(taps))):
        x = g.folded(taps[i], params[f"lateral_{i}"], "conv", "norm")
        if levels:
            coarse = g.convolution(levels[-1], params[f"up_{i}"]["kernel"])
            x = g.node("Add", x, g.scaled(coarse, 2, "nearest"))
        x = g.folded(g.node("Relu", x), params[f"fuse_{i}"], "conv", "norm", padding=(1, 1, 1, 1))
        levels.append(g.node("Relu", x))
    return levels[::-1]

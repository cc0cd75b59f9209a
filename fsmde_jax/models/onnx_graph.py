"""The student as an ONNX graph: images and intrinsics in, metric depth out.

Written node by node, not traced: channels first, every BatchNorm folded into the convolution before it, and activations
as single nodes, which onnxruntime fuses. A graph traced from JAX is channels last and full of transposes. Checked on
processors; on a GPU onnxruntime may round the head's products to TF32 unless told not to (its option `use_tf32=0`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fsmde_jax.errors import ConfigError
from fsmde_jax.models import decoder, efficientnet_lite, resnet
from fsmde_jax.models.depth_bins import FOCAL_WIDTH, canonical_range
from fsmde_jax.models.student import ENCODER_SCOPE, IMAGE_MEAN, IMAGE_STD, STRIDE, Student

OPSET = 17
IR_VERSION = 8  # of the file: what onnxruntime 1.13 and later read

Params = Mapping[str, Any]
Size = tuple[int, int]  # height, width in pixels


class Graph:
    """Nodes and constants in order; a value is the name of what a node puts out. Maps are [M, C, h, w]."""

    def __init__(self) -> None:
        import onnx

        self._onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any) -> str:
        """A constant; floats become float32."""
        array = np.asarray(value)
        array = np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else array.dtype)
        name = f"constant_{len(self.constants)}"
        self.constants.append(self._onnx.numpy_helper.from_array(array.reshape(np.shape(value)), name))
        return name

    def node(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node with one output, called `name`, or after its kind."""
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(self._onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def convolution(
        self,
        x: str,
        kernel: Any,
        bias: Any = None,
        stride: int = 1,
        padding: Sequence[int] = (0, 0, 0, 0),
        *,
        depthwise: bool = False,
    ) -> str:
        """Convolves with a kernel [k, k, in, out], [k, k, 1, out] if depthwise; padding top, left, bottom, right."""
        kernel = np.asarray(kernel, np.float64)
        groups = kernel.shape[3] if depthwise else 1
        weights = [kernel.transpose(3, 2, 0, 1)] + ([] if bias is None else [np.asarray(bias, np.float64)])
        inputs = (x, *(self.constant(weight) for weight in weights))
        return self.node("Conv", *inputs, strides=[stride, stride], pads=list(padding), group=groups)

    def relu6(self, x: str) -> str:
        """min(max(x, 0), 6)."""
        return self.node("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def scaled(self, x: str, factor: int, mode: str) -> str:
        """Height and width times `factor`: `nearest` copies, `linear` interpolates at half-pixel centres."""
        place = {"nearest": "asymmetric", "linear": "half_pixel"}[mode]
        attributes = {"nearest_mode": "floor"} if mode == "nearest" else {}
        scales = self.constant(np.array([1, 1, factor, factor], np.float32))
        return self.node("Resize", x, "", scales, mode=mode, coordinate_transformation_mode=place, **attributes)

    def dense(self, x: str, params: Params) -> str:
        """x [M, in] times a kernel [in, out], plus the bias."""
        return self.node("Gemm", x, *(self.constant(np.asarray(params[name])) for name in ("kernel", "bias")))


@dataclasses.dataclass(frozen=True)
class _Part:
    """Parameters and batch statistics of one module, and its epsilon."""

    params: Params
    stats: Params
    epsilon: float

    def __getitem__(self, name: str) -> "_Part":
        return _Part(self.params[name], self.stats.get(name, {}), self.epsilon)

    def folded(self, conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        """Kernel [..., out] and bias [out] of a convolution and the BatchNorm after it, float64."""
        scale = np.asarray(self.params[norm]["scale"], np.float64)
        scale = scale / np.sqrt(np.asarray(self.stats[norm]["var"], np.float64) + self.epsilon)
        bias = np.asarray(self.params[norm]["bias"], np.float64) - np.asarray(self.stats[norm]["mean"]) * scale
        return np.asarray(self.params[conv]["kernel"], np.float64) * scale, bias


def _efficientnet(g: Graph, x: str, variant: str, part: _Part, size: Size) -> list[str]:
    """Taps at strides 2, 4, 8, 16, 32."""

    def spatial(x: str, here: Size, of: _Part, name: str, norm: str, stride: int, depthwise: bool) -> tuple[str, Size]:
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


def _resnet(g: Graph, x: str, variant: str, part: _Part) -> list[str]:
    """Taps at strides 2, 4, 8, 16, 32."""

    def conv(x: str, of: _Part, name: str, norm: str, stride: int = 1) -> str:
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


def _decoder(g: Graph, taps: Sequence[str], part: _Part) -> list[str]:
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


def _centers(g: Graph, deepest: str, intrinsics: str, model: Student, params: Params, width: int) -> str:
    """Metric bin centers [M, K], nearest first, from features `deepest` [M, C, h, w] and `intrinsics` [M, 3, 3]."""
    k = model.num_bins
    lo, hi = canonical_range(model.min_depth, model.max_depth, model.focal_canonical, model.focal_range)
    linear = model.bins in ("linear", "uniform")
    if not linear:
        lo, hi = math.log(lo), math.log(hi)
    if model.bins in ("uniform", "sid"):
        place = g.constant((np.arange(k)[None] + 0.5) / k)
    else:
        x = g.node("Relu", g.dense(g.node("ReduceMean", deepest, axes=[2, 3], keepdims=0), params["widths_hidden"]))
        x = g.node("Softplus", g.dense(x, params["widths_out"]))
        x = g.node("Add", x, g.constant(np.float32(1e-3)))
        x = g.node("Div", x, g.node("ReduceSum", x, g.constant(np.array([1])), keepdims=1))
        ends = g.node("CumSum", x, g.constant(np.int64(1)))
        place = g.node("Sub", ends, g.node("Mul", x, g.constant(np.float32(0.5))))
    depth = g.node("Add", g.node("Mul", place, g.constant(np.float32(hi - lo))), g.constant(np.float32(lo)))
    depth = depth if linear else g.node("Exp", depth)
    focal = g.node("Slice", intrinsics, *(g.constant(np.array(v)) for v in ([0, 0], [1, 1], [1, 2])))  # fx [M, 1, 1]
    focal = g.node("Squeeze", focal, g.constant(np.array([2])))
    ratio = g.node("Mul", focal, g.constant(np.float32(FOCAL_WIDTH / (model.focal_canonical * width))))
    return g.node("Mul", depth, ratio)


def student_graph(model: Student, params: Params, batch_stats: Params, size: Size) -> Any:
    """An `onnx.ModelProto` of the student at one image size and any number of views.

    Inputs: `images` uint8 [views, H, W, 3], RGB; `intrinsics` float32 [views, 3, 3], pixels at H x W. Output: `depth`
    float32 [views, H, W], metres, never clipped.

    Args:
      model: without attention between views; its dtype is not looked at, the graph is float32.
      params, batch_stats: of the student; what else a training needs is not looked at.
      size: H and W, multiples of 32.

    Raises:
      ConfigError: the size, or a part of the model that has no graph here.
    """
    import onnx

    height, width = size
    if height % STRIDE or width % STRIDE:
        raise ConfigError(f"data.image_size: height and width must be multiples of {STRIDE}, got {height}x{width}")
    for key, bad in (
        ("cross_view_blocks", model.cross_view_blocks > 0),
        ("bins", model.bins == "attractor"),
        ("probabilities", model.probabilities != "softmax"),
    ):
        if bad:
            raise ConfigError(f"model.{key} = {getattr(model, key)!r}: has no ONNX graph; train without it")
    g = Graph()
    scale, shift = 1 / (255 * np.array(IMAGE_STD)), -np.array(IMAGE_MEAN) / np.array(IMAGE_STD)
    x = g.node("Cast", g.node("Transpose", "images", perm=[0, 3, 1, 2]), to=onnx.TensorProto.FLOAT)
    x = g.node("Mul", x, g.constant(scale[:, None, None]))
    x = g.node("Add", x, g.constant(shift[:, None, None]))
    residual = model.encoder in resnet.VARIANTS
    epsilon = resnet.EPSILON if residual else efficientnet_lite.EPSILON
    encoder = _Part(params[ENCODER_SCOPE], batch_stats[ENCODER_SCOPE], epsilon)
    taps = _resnet(g, x, model.encoder, encoder) if residual else _efficientnet(g, x, model.encoder, encoder, size)
    levels = _decoder(g, taps, _Part(params["decoder"], batch_stats["decoder"], decoder.EPSILON))
    centers = _centers(g, levels[-1], "intrinsics", model, params["depth_bins"], width)
    kernel = params["depth_bins"]["logits"]["kernel"]
    features = g.node("Transpose", levels[0], perm=[0, 2, 3, 1])
    features = g.node("Reshape", features, g.constant(np.array([-1, np.shape(kernel)[0]])))
    p = g.node("Softmax", g.dense(features, params["depth_bins"]["logits"]), axis=-1)
    p = g.node("Reshape", p, g.constant(np.array([-1, height // 2 * (width // 2), model.num_bins])))
    values = g.node("Log", centers) if model.expectation == "log" else centers
    values = g.node("Unsqueeze", values, g.constant(np.array([2])))  # [M, K, 1]
    depth = g.node("MatMul", p, values)
    depth = g.node("Exp", depth) if model.expectation == "log" else depth
    depth = g.node("Reshape", depth, g.constant(np.array([-1, 1, height // 2, width // 2])))
    g.node("Squeeze", g.scaled(depth, 2, "linear"), g.constant(np.array([1])), name="depth")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        g.nodes,
        "student",
        [
            value("images", onnx.TensorProto.UINT8, ["views", height, width, 3]),
            value("intrinsics", onnx.TensorProto.FLOAT, ["views", 3, 3]),
        ],
        [value("depth", onnx.TensorProto.FLOAT, ["views", height, width])],
        g.constants,
    )
    found = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="fsmde-jax"
    )
    onnx.checker.check_model(found, full_check=True)
    return found

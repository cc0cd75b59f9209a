"""The pieces that a student's ONNX graph is written with: nodes and constants in order."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fsmde_jax.errors import DataError

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
        self._place = ""
        self._dtype: Any = np.float32

    @contextlib.contextmanager
    def part(self, name: str, dtype: Any = np.float32) -> Iterator[None]:
        """While it is open, nodes are called `<name>/...` and floating-point constants are of `dtype`."""
        before = self._place, self._dtype
        self._place, self._dtype = f"{name}/", dtype
        yield
        self._place, self._dtype = before

    def constant(self, value: Any, dtype: Any = None) -> str:
        """A constant; floats become `dtype`, that of the part unless given.

        Raises:
          DataError: a number is not finite, or does not fit float16.
        """
        array = np.asarray(value)
        if array.dtype.kind == "f":
            dtype = dtype or self._dtype
            if not np.isfinite(array).all():
                raise DataError(f"a parameter of {self._place or 'the head'} is not finite; export another checkpoint")
            if np.abs(array).max(initial=0) > np.finfo(dtype).max:
                raise DataError(f"a parameter of {self._place} does not fit {np.dtype(dtype)}; export float32")
            array = array.astype(dtype)
        name = f"{self._place}constant_{len(self.constants)}"
        array = np.ascontiguousarray(array).reshape(np.shape(value))
        self.constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node with one output, called `name`, or after its part and kind."""
        name = name or f"{self._place}{kind}_{len(self.nodes)}"
        self.nodes.append(self._onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def cast(self, x: str, dtype: Any) -> str:
        """x as `dtype`."""
        return self.node("Cast", x, to=self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

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

    def folded(self, x: str, params: Params, conv: str, norm: str, stride: int = 1, padding: Any = (0, 0, 0, 0)) -> str:
        """Convolves with parameters of `batch_norm.fold`: a kernel, and the shift that is left of BatchNorm."""
        depthwise = conv == "depthwise_conv"
        return self.convolution(x, params[conv]["kernel"], params[norm]["bias"], stride, padding, depthwise=depthwise)

    def relu6(self, x: str) -> str:
        """min(max(x, 0), 6)."""
        return self.node("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def scaled(self, x: str, factor: int, mode: str) -> str:
        """Height and width times `factor`: `nearest` copies, `linear` interpolates at half-pixel centres."""
        place = {"nearest": "asymmetric", "linear": "half_pixel"}[mode]
        attributes = {"nearest_mode": "floor"} if mode == "nearest" else {}
        scales = self.constant(np.array([1, 1, factor, factor], np.float32), np.float32)
        return self.node("Resize", x, "", scales, mode=mode, coordinate_transformation_mode=place, **attributes)

    def dense(self, x: str, params: Params) -> str:
        """x [M, in] times a kernel [in, out], plus the bias."""
        return self.node("Gemm", x, *(self.constant(np.asarray(params[name])) for name in ("kernel", "bias")))

    def plus(self, x: str, value: Any) -> str:
        """x plus a constant that broadcasts against it."""
        return self.node("Add", x, self.constant(np.asarray(value, np.float64)))

    def times(self, x: str, value: Any) -> str:
        """x times a constant that broadcasts against it."""
        return self.node("Mul", x, self.constant(np.asarray(value, np.float64)))

    def slice(self, x: str, axis: int, start: int, stop: int) -> str:
        """x[start:stop] along an axis."""
        return self.node("Slice", x, *(self.constant(np.array([value])) for value in (start, stop, axis)))

    def reshape(self, x: str, *shape: int) -> str:
        """x in another shape; -1 = what is left, 0 = as it is."""
        return self.node("Reshape", x, self.constant(np.array(shape)))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """x with new axes of length 1."""
        return self.node("Unsqueeze", x, self.constant(np.array(axes)))

    def squeeze(self, x: str, axis: int, name: str = "") -> str:
        """x without an axis of length 1."""
        return self.node("Squeeze", x, self.constant(np.array([axis])), name=name)

    def sum(self, x: str, axis: int) -> str:
        """The sum along an axis, which is kept."""
        return self.node("ReduceSum", x, self.constant(np.array([axis])), keepdims=1)

    def pixels(self, x: str) -> str:
        """[M, C, h, w] -> [M h w, C]; h and w need not be known."""
        return self.node("Flatten", self.node("Transpose", x, perm=[0, 2, 3, 1]), axis=3)

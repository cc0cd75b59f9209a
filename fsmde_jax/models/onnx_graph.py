"""The student as an ONNX graph: images and intrinsics in, metric depth out.

Written node by node, not traced: channels first, every BatchNorm folded into the convolution before it, and activations
as single nodes, which onnxruntime fuses. A graph traced from JAX is channels last and full of transposes. Nodes are
called after their part: encoder/, cross_view/, decoder/, head/. Checked on processors; on a GPU onnxruntime may round
the head's products to TF32 unless told not to (its option `use_tf32=0`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fsmde_jax.errors import ConfigError
from fsmde_jax.models.onnx_cross_view import mix
from fsmde_jax.models.onnx_encoders import decoder, encoder
from fsmde_jax.models.onnx_head import head
from fsmde_jax.models.onnx_nodes import IR_VERSION, OPSET, Graph, Size
from fsmde_jax.models.student import (
    DECODER_SCOPE,
    ENCODER_SCOPE,
    IMAGE_MEAN,
    IMAGE_STD,
    STRIDE,
    Student,
    fold_batch_norm,
)


def student_graph(
    model: Student, variables: Mapping[str, Any], size: Size, *, half: bool = False, confidence: bool = False
) -> Any:
    """An `onnx.ModelProto` of the student at one image size and any number of views.

    Inputs: `images` uint8 [views, H, W, 3], RGB; `intrinsics` float32 [views, 3, 3], pixels at H x W; of a student
    with attention between views also `cam_to_ego` float32 [views, 4, 4], and then all views are one rig. Outputs:
    `depth` float32 [views, H, W], metres, never clipped; with `confidence` a second one, `confidence` float32
    [views, H, W] in [0, 1].

    Args:
      model: its dtype is not looked at.
      variables: "params" and "batch_stats" of the student; what else a training needs is not looked at.
      size: H and W, multiples of 32.
      half: encoder and decoder in float16; normalisation, attention between views and head stay float32.
      confidence: what `depth_model.Prediction` says.

    Raises:
      ConfigError: the size is no multiple of 32. DataError: a parameter does not fit float16.
    """
    import onnx

    height, width = size
    if height % STRIDE or width % STRIDE:
        raise ConfigError(f"data.image_size: height and width must be multiples of {STRIDE}, got {height}x{width}")
    g, params = Graph(), fold_batch_norm(model.encoder, variables)["params"]
    dtype = np.float16 if half else np.float32

    def cast(x: str, to: Any) -> str:
        return g.cast(x, to) if half else x

    with g.part("images"):
        scale, shift = 1 / (255 * np.array(IMAGE_STD)), -np.array(IMAGE_MEAN) / np.array(IMAGE_STD)
        x = g.cast("images", np.float32)  # first: TensorRT takes uint8 into nothing but a cast
        x = g.node("Transpose", x, perm=[0, 3, 1, 2])
        x = cast(g.plus(g.times(x, scale[:, None, None]), shift[:, None, None]), dtype)
    with g.part("encoder", dtype):
        taps = encoder(g, x, model.encoder, params[ENCODER_SCOPE], size)
    if model.cross_view_blocks:
        with g.part("cross_view"):
            deepest = mix(
                g, cast(taps[-1], np.float32), ("intrinsics", "cam_to_ego"), params["cross_view"], size, STRIDE
            )
            taps[-1] = cast(deepest, dtype)
    with g.part("decoder", dtype):
        levels = decoder(g, taps, params[DECODER_SCOPE])
    with g.part("head"):
        levels = [cast(level, np.float32) for level in levels]
        head(g, levels, "intrinsics", model, params["depth_bins"], size, confidence=confidence)
    value, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    inputs = [
        value("images", kinds.UINT8, ["views", height, width, 3]),
        value("intrinsics", kinds.FLOAT, ["views", 3, 3]),
    ]
    if model.cross_view_blocks:
        inputs.append(value("cam_to_ego", kinds.FLOAT, ["views", 4, 4]))
    names = ["depth", "confidence"] if confidence else ["depth"]
    outputs = [value(name, kinds.FLOAT, ["views", height, width]) for name in names]
    found = onnx.helper.make_model(
        onnx.helper.make_graph(g.nodes, "student", inputs, outputs, g.constants),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="fsmde-jax",
    )  # fmt: skip
    onnx.checker.check_model(found, full_check=True)
    return found

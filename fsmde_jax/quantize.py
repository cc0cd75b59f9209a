"""Static quantisation of a student's ONNX graph to int8, calibrated on records; by onnxruntime.

Encoder and decoder compute in int8; normalisation, attention between views and the metric head stay float32. Weights
have a scale per output channel and 7 bits: with 8, processors without VNNI (x86 before 2019 to 2022) let sums of two
products saturate, without a word. Activations have 8 bits and a scale per tensor, from the smallest and the largest
value that was seen.
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fsmde_jax.data import transforms
from fsmde_jax.data.records import Records, open_records
from fsmde_jax.errors import ConfigError, DataError

PARTS = ("encoder/", "decoder/")  # what the nodes that become int8 are called
KINDS = ["Conv", "Clip", "Relu", "Add", "MaxPool", "Resize"]
SEED = 0  # of which records are taken
MAKE = """python -m data_prep.world --rig nuscenes --scenes 40 --frames 1 --image_size 96x160 --out data/calibration
  python -m data_prep.nuscenes --dataroot data/calibration --version v1.0-trainval --split train --image_size native \
--out records/calibration"""


def open_calibration(folder: str, samples: int) -> Records:
    """The records to calibrate on, after checks that need no work.

    Args:
      folder: a records folder, of pictures like those that the student will see.
      samples: how many rigs will be taken, at least 1.

    Raises:
      ConfigError: no folder or no number; onnxruntime is not installed. DataError: no records folder.
    """
    if not folder:
        raise ConfigError(
            "--precision int8 needs --calibration DIR, a records folder of pictures like those that the student will"
            f" see; rendered ones:\n  {MAKE}"
        )
    if samples < 1:
        raise ConfigError(f"--calibration_samples {samples}: expected at least 1")
    if importlib.util.find_spec("onnxruntime") is None:
        raise ConfigError("not installed: onnxruntime, which --precision int8 needs; pip install onnxruntime")
    return open_records(folder, prepare=MAKE)


def _samples(records: Records, count: int, size: tuple[int, int], names: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Arguments of the graph: `count` records (or all there are), the same ones every time; cameras that lack left out.

    Args:
      size: height and width; names: of the graph's inputs.
    """
    chosen = np.random.default_rng(SEED).permutation(len(records))[:count]
    for index in np.sort(chosen):
        sample = records[int(index)]
        batch = transforms.empty_batch(1, sample.num_cameras, size)
        rows = {name: array[0] for name, array in batch.items() if name != "record_index"}
        transforms.load_rig(sample, rows, where=records.where(int(index)))
        if rows["view_mask"].any():
            yield {name: rows[name][rows["view_mask"]] for name in names}


def quantized(graph: Any, records: Records, samples: int) -> Any:
    """The `onnx.ModelProto` of `models.onnx_graph.student_graph` (float32) in int8, as Q/DQ pairs.

    Args:
      graph: is not changed; records, samples: see `open_calibration`.

    Raises:
      DataError: a record is damaged, or none has a picture.
    """
    import onnx
    from onnxruntime import quantization

    _, height, width, _ = (side.dim_value for side in graph.graph.input[0].type.tensor_type.shape.dim)
    names = [given.name for given in graph.graph.input]
    seen = _samples(records, samples, (height, width), names)
    first = next(seen, None)
    if first is None:
        raise DataError(f"{records.folders[0]}: no camera of the records taken has a picture; calibrate on others")

    class Reader(quantization.CalibrationDataReader):
        """One sample at a time."""

        def __init__(self) -> None:
            self.left = [first]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else next(seen, None)

    try:
        with tempfile.TemporaryDirectory(prefix="fsmde_onnx_") as folder:
            given, made = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
            prepared = onnx.ModelProto.FromString(graph.SerializeToString())
            # There is nothing to fold or to fuse beforehand; without this note it would be advised.
            prepared.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
            given.write_bytes(prepared.SerializeToString())
            quantization.quantize_static(
                given, made, Reader(), quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=KINDS,
                nodes_to_quantize=[node.name for node in graph.graph.node if node.name.startswith(PARTS)],
                per_channel=True, reduce_range=True, activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
            found = onnx.ModelProto.FromString(made.read_bytes())
    except OSError as error:
        raise DataError(
            f"{tempfile.gettempdir()}: cannot write ({error.strerror}); free space, or name another place by TMPDIR"
        ) from error
    del found.metadata_props[:]
    found.producer_name = graph.producer_name
    return found


def check_half(graph: Any, where: str) -> None:
    """Whether float16 holds what encoder and decoder compute of a black, a white and a noisy picture.

    onnxruntime on a processor keeps float32 between nodes that it converts, so the half graph would not tell.

    Args:
      graph: of the student in float32; where: its name, for messages.

    Raises:
      DataError: a value is larger than half of what float16 holds. Without onnxruntime a note says that it was not
        tried.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        print("note: whether float16 overflows was not tried, since onnxruntime is not installed")
        return
    import onnx
    import onnxruntime

    seen = onnx.ModelProto.FromString(graph.SerializeToString())
    names = [name for node in seen.graph.node if node.name.startswith(PARTS) for name in node.output]
    seen.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(seen.SerializeToString(), providers=["CPUExecutionProvider"])
    height, width = session.get_inputs()[0].shape[1:3]
    noise = np.random.default_rng(SEED).integers(0, 256, (height, width, 3), np.uint8)
    given = {
        "intrinsics": np.array([[[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]]], np.float32),
        "cam_to_ego": np.eye(4, dtype=np.float32)[None],
    }
    for image in (np.zeros_like(noise), np.full_like(noise, 255), noise):
        given["images"] = image[None]
        found = session.run(names, {each.name: given[each.name] for each in session.get_inputs()})
        for name, values in zip(names, found, strict=True):
            if not np.abs(values).max() < np.finfo(np.float16).max / 2:
                raise DataError(
                    f"{where}: values up to {np.abs(values).max():.3g} ({name}) do not fit float16; export float32"
                )

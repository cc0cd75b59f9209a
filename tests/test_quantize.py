"""float16 and int8 files of a student, in onnxruntime, beside its float32 file."""

import dataclasses
import json
import tempfile

import jax
import numpy as np
import onnx
import pytest

from fsmde_jax import export, quantize
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.models.onnx_graph import student_graph
from fsmde_jax.models.registry import build_student
from tests import rooms
from tests.exported import SIZE, SMALL, perturbed, rig, session
from tests.sample_factory import write_folder

SMALL_SIZE = (32, 64)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Four rigs of three cameras; the second lacks one."""
    samples = [rooms.make(seed, cameras=3, native_size=(48, 96)) for seed in range(4)]
    samples[1] = dataclasses.replace(samples[1], images=[b"", *samples[1].images[1:]])
    return write_folder(tmp_path_factory.mktemp("records") / "rooms", samples)


@pytest.fixture(scope="module")
def files(tmp_path_factory, records):
    """Precision -> lite0's file at 32x64, by the command line."""
    folder = tmp_path_factory.mktemp("files")
    found = {name: folder / f"{name}.onnx" for name in export.PRECISIONS}
    for name, out in found.items():
        flags = ["--checkpoint", "lite0", "--out", str(out), "--image_size", "32x64", "--precision", name]
        export.main([*flags, *(["--calibration", str(records)] if name == "int8" else [])])
    names = [f"{name}.{suffix}" for name in ("float16", "float32", "int8") for suffix in ("json", "onnx")]
    assert sorted(path.name for path in folder.iterdir()) == names
    return found


def samples_of(records, count):
    return list(quantize._samples(open_records(records), count, SMALL_SIZE, ["images", "intrinsics"]))


def depth_of(file, given):
    return session(str(file)).run(None, given)[0]


def bytes_of_weights(file):
    return sum(len(each.raw_data) for each in onnx.load(file).graph.initializer)


def said(file):
    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


def test_cards_say_precision_and_calibration(files):
    for name, file in files.items():
        card = json.loads(file.with_suffix(".json").read_text())
        assert card["precision"] == name and card.get("calibrated_on") == said(file).get("calibrated_on")
        assert ("calibrated_on" in card) == (name == "int8")


def test_all_precisions_take_and_give_the_same(files):
    described = []
    for name, file in files.items():
        graph = onnx.load(file).graph
        values = [(v.name, v.type.tensor_type.elem_type) for v in (*graph.input, *graph.output)]
        assert [each.dim_param for each in graph.input[0].type.tensor_type.shape.dim][:1] == ["views"]
        described.append(values)
        assert said(file)["precision"] == name and json.loads(said(file)["image_size"]) == [32, 64]
    assert described[0] == described[1] == described[2]


def test_float16_is_half_the_file_and_close(files, records):
    assert bytes_of_weights(files["float16"]) < 0.51 * bytes_of_weights(files["float32"])
    for given in samples_of(records, 4):
        error = np.abs(depth_of(files["float16"], given) / depth_of(files["float32"], given) - 1)
        assert 0 < np.median(error) < 2e-3 and error.max() < 0.1


def test_int8_is_a_quarter_of_the_weights_and_close(files, records):
    """One view, the two of the rig that lacks one, three: never far from float32 in the median."""
    assert bytes_of_weights(files["float32"]) > 3 * bytes_of_weights(files["int8"])
    assert "4 of 4 records with fingerprint" in said(files["int8"])["calibrated_on"]
    given = samples_of(records, 4)
    assert [len(each["images"]) for each in given] == [3, 2, 3, 3]
    alone = {name: value[:1] for name, value in given[0].items()}
    for each in (*given, alone):
        depth, wanted = (depth_of(files[name], each) for name in ("int8", "float32"))
        assert depth.shape == wanted.shape == (len(each["images"]), *SMALL_SIZE)
        assert 0 < np.median(np.abs(depth / wanted - 1)) < 0.1
    np.testing.assert_allclose(depth[0], depth_of(files["int8"], given[0])[0], rtol=1e-4)  # of the view by itself


def test_int8_is_of_encoder_and_decoder_only(files):
    graph = onnx.load(files["int8"]).graph
    by_name = {name: node for node in graph.node for name in node.output}
    weights = {each.name: each for each in graph.initializer}
    for node in graph.node:
        sources = [by_name[name] for name in node.input if name in by_name]
        quantised = [source.op_type == "DequantizeLinear" for source in sources]
        if node.op_type == "Conv":
            assert all(quantised) and len(sources) >= 2
            (kernel,) = [weights[name] for name in sources[1].input[:1]]
            assert kernel.data_type == onnx.TensorProto.INT8
            values = onnx.numpy_helper.to_array(kernel)
            assert np.abs(values).max() <= 64  # 7 bits
            assert len(onnx.numpy_helper.to_array(weights[sources[1].input[1]])) == len(values)  # per output channel
        if node.op_type in ("Gemm", "MatMul", "Softmax"):
            assert not any(quantised)


def test_the_same_records_are_taken_every_time(records):
    first, again = (samples_of(records, 2) for _ in range(2))
    assert len(first) == 2
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])


def test_attention_between_views_stays_float32(records):
    model = build_student(encoder="resnet18", cross_view_blocks=1, **SMALL)
    jax.config.update("jax_disable_most_optimizations", True)
    variables = perturbed(model)
    jax.config.update("jax_disable_most_optimizations", False)
    graph = student_graph(model, variables, SIZE)
    before = graph.SerializeToString()
    made = quantize.quantized(graph, open_records(records), 4)
    assert graph.SerializeToString() == before
    # Networks of random numbers on pictures that the ranges were not measured on: far off, but the same picture.
    for chosen in ((0,), range(6)):
        given = rig(chosen, 60)
        depth, wanted = (session(each.SerializeToString()).run(None, given)[0] for each in (made, graph))
        assert depth.shape == wanted.shape and np.median(np.abs(depth / wanted - 1)) < 0.3


def test_errors_say_what_to_do_and_leave_nothing_behind(tmp_path, records, monkeypatch, capsys):
    out = tmp_path / "out" / "a.onnx"
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "empty"))
    int8 = {"precision": "int8", "calibration": str(records)}
    for options, error, message in (
        ({"precision": "int8"}, ConfigError, r"--precision int8 needs --calibration DIR(.|\n)*data_prep.world"),
        ({**int8, "calibration": str(tmp_path / "none")}, DataError, r"none: no such records(.|\n)*data_prep.world"),
        ({**int8, "calibration": str(tmp_path / "empty")}, DataError, r"empty: has no manifest.json"),
        ({**int8, "calibration_samples": 0}, ConfigError, "--calibration_samples 0: expected at least 1"),
        ({"calibration": str(records)}, ConfigError, "--calibration .*: of --precision int8 only"),
        ({"precision": "int4"}, ConfigError, "--precision"),
    ):
        with pytest.raises(error, match=message):
            export.export_onnx("lite0", out, "32x64", **options)
    find = quantize.importlib.util.find_spec
    monkeypatch.setattr(
        quantize.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(ConfigError, match="not installed: onnxruntime"):
        export.export_onnx("lite0", out, "32x64", **int8)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", find)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.export_onnx("lite0", out, "32x64", **int8)
    for flags in (["--precision", "float16"], ["--confidence"], ["--calibration", str(records)]):
        with pytest.raises(SystemExit):
            export.main(["--checkpoint", "lite0", "--format", "orbax", "--out", str(out.with_suffix("")), *flags])
        assert f"{flags[0]}: of --format onnx only, not orbax" in capsys.readouterr().err
    assert not out.parent.exists() and not list((tmp_path / "empty").iterdir())


def test_records_without_a_picture_are_refused(tmp_path):
    sample = rooms.make(0, cameras=3, native_size=(48, 96))
    folder = write_folder(tmp_path / "black", [dataclasses.replace(sample, images=[b""] * 3)], shards=1)
    model = build_student(encoder="resnet18", **SMALL)
    jax.config.update("jax_disable_most_optimizations", True)
    variables = perturbed(model)
    jax.config.update("jax_disable_most_optimizations", False)
    graph = student_graph(model, variables, SIZE)
    with pytest.raises(DataError, match="no camera of the records taken has a picture"):
        quantize.quantized(graph, open_records(folder), 1)

"""benchmarks.latency: what it writes, XLA's count of operations against one by hand, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import latency, student, teacher
from fsmde_jax.errors import ConfigError
from fsmde_jax.models.depth_anything import VARIANTS
from fsmde_jax.models.registry import ENCODERS

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--students", "resnet18", "--teachers", "tiny", "--size", "64x96", "--repeats", "2", "--no-torch"]


def start(way, options, folder):
    script = ["-m", "benchmarks.latency"] if way == "module" else [str(ROOT / "benchmarks/latency.py")]
    command = [sys.executable, *script, *options]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=400)


def checked(*options):
    args = latency.parse(options)
    latency.check(args)
    return args


@pytest.fixture(scope="module")
def tiny_student():
    return student.student("resnet18", "float32", (64, 96))


@pytest.mark.slow
def test_rows_and_speedups(tmp_path):
    out = tmp_path / "result.json"
    done = start("module", [*TINY, "--onnx", "--out", str(out)], ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    of_student, exported, of_teacher = result["rows"]
    assert (of_student["side"], of_teacher["side"]) == ("resnet18, float32", "tiny, float32")
    assert exported["side"] == "resnet18, float32, onnxruntime" and exported["relative_error"] < 1e-4  # the same depth
    assert "xla_temporary_mb" not in exported and result["versions"]["onnxruntime"]
    assert (of_student["input"], of_teacher["input"]) == ("6x64x96", "6x56x84")
    assert of_teacher["parameters"] == VARIANTS["tiny"].parameters
    assert of_student["parameters"] > ENCODERS["resnet18"].parameters
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and row["median"] == pytest.approx(np.median(row["seconds"]))
        assert (row["min"], row["max"]) == (min(row["seconds"]), max(row["seconds"]))
        assert row["rigs_per_s"] * row["median"] == pytest.approx(1)
        assert row["peak_memory_mb"] > 0 and row.get("xla_temporary_mb", 1) > 0 and row["gflops"] > 0
    ratio, ratio_exported = (of_teacher["median"] / row["median"] for row in (of_student, exported))
    ratios = {"resnet18, float32": ratio, "resnet18, float32, onnxruntime": ratio_exported}
    expected = {"fastest": "tiny, float32", "times_faster": pytest.approx(ratios)}
    assert expected.items() <= result["speedups"]["tiny"].items()
    assert f"resnet18, float32 is {ratio:.2f} times as fast" in done.stdout
    assert done.stdout.count("\n| ") == 3 and done.stdout.startswith("| side |")
    assert result["command"].startswith("python -m benchmarks.latency --students resnet18") and result["date"]
    assert result["hardware"]["threads"] == 2 and result["versions"]["jax"] == jax.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_profile_runs_as_a_file(tmp_path):
    done = start("file", ["--profile", "resnet18", "--size", "64x96", "--repeats", "1", "--out", "p.json"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads((tmp_path / "p.json").read_text())["profiles"]
    *cuts, whole = found["pieces"]
    assert [row["piece"] for row in cuts] == ["encoder", "decoder", "head: logits, expectation", "resize"]
    assert whole["piece"] == "whole" and sum(row["share"] for row in cuts) == pytest.approx(1)
    assert found["relative_error"] < 1e-5  # the pieces together are the student
    assert sum(row["gflops"] for row in cuts) == pytest.approx(whole["gflops"], rel=0.02)


def test_operations_of_a_convolution():
    """Two for each product that is not with padding: 3x3 at h x w has (3h - 2)(3w - 2) places inside the picture."""
    m, h, w, c, features = 2, 10, 14, 8, 12

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    counted = student.gflops(jax.jit(convolution), jnp.ones((m, h, w, c)), jnp.ones((3, 3, c, features)))
    by_hand = 2 * m * (3 * h - 2) * (3 * w - 2) * c * features
    assert counted == pytest.approx(by_hand / 1e9)


def test_operations_of_a_resnet18(tiny_student):
    """The products of its convolutions by hand; normalisation and activations add little."""
    model, _, arguments = tiny_student
    counted = student.pieces(model, (64, 96), arguments)[0]["encoder"][2]

    def inside(size, kernel, stride):  # products of one axis that are not with padding
        places = stride * np.arange(size // stride)[:, None] + np.arange(kernel) - kernel // 2
        return int(((places >= 0) & (places < size)).sum())

    def products(stride_before, kernel, stride, c, features):
        h, w = 64 // stride_before, 96 // stride_before
        if min(h, w) // stride < kernel:  # one product over gathered pixels (`models.convolution`), padding included
            return (h // stride) * (w // stride) * kernel**2 * c * features
        return inside(h, kernel, stride) * inside(w, kernel, stride) * c * features

    total = products(1, 7, 2, 3, 64) + 4 * products(4, 3, 1, 64, 64)
    for stride, c in ((4, 64), (8, 128), (16, 256)):
        total += products(stride, 3, 2, c, 2 * c) + products(stride, 1, 2, c, 2 * c)
        total += 3 * products(2 * stride, 3, 1, 2 * c, 2 * c)
    assert counted == pytest.approx(6 * 2 * total / 1e9, rel=0.03)


def test_a_teacher_counts_all_its_views(monkeypatch):
    """On a CPU its views run in a loop, whose body XLA counts once: one view is what is counted, then multiplied."""
    one, loop = (
        student.gflops(run, *arguments)
        for run, arguments in (latency.program(latency.Side("teacher", "tiny", "float32"), (64, 96), n) for n in (1, 2))
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # where all views run together
    together = teacher.port("tiny", "float32", teacher.COUNTED)
    monkeypatch.undo()
    images = jnp.zeros((6, 56, 84, 3))
    assert student.gflops(together, teacher.random_parameters("tiny"), images) == pytest.approx(6 * one, rel=0.05)
    by_hand = 12 * (2 * 25 * 12 * 192**2 + 4 * 25 * 25 * 192)  # blocks of 24 tokens and the class token
    assert by_hand < 1e9 * one < 3 * by_hand  # the rest: the head
    assert loop == pytest.approx(one, rel=0.05)


def test_teachers_take_the_same_resolution():
    assert latency.teacher_shape((352, 640)) == "6x350x630"
    assert latency.teacher_shape((64, 96), views=1) == "1x56x84"


def test_several_rigs_in_a_call():
    for kind, name, leading in (("student", "resnet18", (2, 6)), ("teacher", "tiny", (12,))):
        run, arguments = latency.program(latency.Side(kind, name, "float32"), (64, 96), 12)
        images = arguments[-1]["images"] if kind == "student" else arguments[-1]
        assert images.shape[: len(leading)] == leading
        assert jax.eval_shape(run, *arguments).shape[: len(leading)] == leading


def test_the_fastest_side_counts():
    sides = [("student", "a", 1.0), ("teacher", "small", 6.0), ("teacher", "small", 5.0), ("teacher", "base", 20.0)]
    rows = [{"kind": kind, "name": name, "median": t, "side": f"{name} {t}"} for kind, name, t in sides]
    found = latency.speedups(rows)
    assert list(found) == ["base", "small"]
    assert found["small"] == {"fastest": "small 5.0", "median": 5.0, "times_faster": {"a 1.0": 5.0}}


def test_all_encoders_are_default():
    assert checked("--no-torch").students == list(ENCODERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--students", "resnet19"], "--students: unknown name 'resnet19'; did you mean 'resnet18'"),
        (["--profile", "lite0"], "--profile: unknown name 'lite0'"),
        (["--teachers", "smal"], "--teachers: unknown name 'smal'; did you mean 'small'"),
        (["--dtype", "float16"], "--dtype: unknown name 'float16'"),
        (["--size", "350x640"], "--size 350x640: expected HEIGHTxWIDTH, multiples of 32"),
        (["--size", "big"], "--size big: expected"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
        (["--compile", "--no-torch"], "--compile: of teacher small"),
        (["--rigs", "0"], "--rigs 0: expected at least 1"),
        (["--onnx", "--rigs", "2"], "--onnx: .* one rig"),
        (["--profile", "resnet18", "--rigs", "2"], "--profile: of one rig"),
        (["--onnx", "--dtype", "bfloat16"], "--onnx: .* float32"),
    ],
)
def test_flags_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        checked(*options)


def test_packages_that_are_not_there(monkeypatch):
    there = {"torch", "transformers"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)
    checked("--compile")
    with pytest.raises(ConfigError, match=r"not installed: onnx, onnxruntime, onnxscript; .* leave out --onnx"):
        checked("--onnx")
    there |= {"onnx", "onnxruntime"}
    checked("--onnx", "--no-torch")
    with pytest.raises(ConfigError, match=r"not installed: onnxscript; .* leave out --onnx"):
        checked("--onnx")
    there.clear()
    checked("--no-torch")
    with pytest.raises(ConfigError, match=r"not installed: torch, transformers; .* pass --no-torch"):
        checked()


def test_no_processor_beside_an_accelerator(monkeypatch):
    importlib.import_module("torch")  # it looks for packages of its own, which are not all there
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for options, message in (
        (["--onnx", "--no-torch"], "onnxruntime would run on the"),
        ([], "PyTorch would run on the"),
    ):
        with pytest.raises(ConfigError, match=message):
            latency.run(checked(*options))


def test_an_error_is_one_line():
    done = start("module", ["--students", "resnet19", "--no-torch"], ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: --students: unknown name")

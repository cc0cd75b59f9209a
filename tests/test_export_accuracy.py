"""`benchmarks.export_accuracy`: what it refuses, and a small run of it."""

import json

import pytest

from benchmarks import export_accuracy
from fsmde_jax.errors import ConfigError
from tests import rooms
from tests.sample_factory import write_folder


def folders(tmp_path, seeds=((0, 3), (1, 4))):
    made = []
    for name, each in zip(("train", "val"), seeds, strict=True):
        samples = [rooms.make(seed, cameras=3, native_size=(48, 96)) for seed in each]
        scenes = sorted({sample.scene for sample in samples})
        made.append(str(write_folder(tmp_path / name, samples, dense_depth=True, scenes=scenes)))
    return made


def test_it_refuses_scenes_that_it_was_calibrated_on_and_bad_flags(tmp_path):
    train, val = folders(tmp_path, seeds=((0, 1), (3,)))  # scene-0 in both
    flags = ["--calibration", train, "--eval_records", val]
    for more, message in (
        ([], "share 1 scenes, e.g. 'scene-0'"),
        (["--size", "60x96"], "--size 60x96: expected HEIGHTxWIDTH"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_accuracy.run(export_accuracy.parse([*flags, *more]))


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    train, val = folders(tmp_path)
    out = tmp_path / "found.json"
    flags = ["--calibration", train, "--eval_records", val, "--size", "32x64", "--repeats", "1", "--out", str(out)]
    export_accuracy.run(export_accuracy.parse(flags))
    found = json.loads(out.read_text())
    here, *exported = found["rows"]
    assert [row["side"] for row in found["rows"]] == [
        "JAX, float32",
        *(f"ONNX, {p}" for p in ("float32", "float16", "int8")),
    ]
    assert (
        found["samples"] == 2 and "--size 32x64" in found["command"] and found["identity"]["hardware"]["threads"] == 2
    )
    for row in exported:
        assert row["median_seconds"].keys() == {"96x160", "32x64"} and row["megabytes"] > 1
        for truth in ("lidar", "dense"):
            assert row[truth]["abs_rel"] == pytest.approx(here[truth]["abs_rel"], rel=0.1)
    medians = [row["difference"]["median_of_rigs"] for row in exported]
    assert medians[0] < 1e-5 < medians[1] < medians[2] < 0.1 and exported[0]["difference"]["largest"] < 1e-3
    assert capsys.readouterr().out.count("\n|") == 5

"""The evaluation job: counts, titles, options, files, and the golden values of real frames."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from fsmde_jax import evaluate, geometry, protocols, trivial
from fsmde_jax.data import pipeline, transforms
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, DataError, TrainingError
from fsmde_jax.evaluate import EvalOptions
from tests import eval_rigs

SIZE = (24, 40)


@pytest.fixture(scope="module")
def samples():
    return [eval_rigs.rig(seed)[0] for seed in range(5)]


@pytest.fixture
def records(tmp_path, samples):
    return open_records(eval_rigs.write_folder(tmp_path / "records", samples))


def _from_images(batch):
    """Depth from the picture, so that every sample, camera and pixel gets another one."""
    return 2.0 + np.asarray(batch["images"], np.float32)[..., 0] / 5


@pytest.mark.parametrize(("protocol", "batch_size"), [("surround", 1), ("surround", 2), ("vfdepth", 3)])
def test_every_sample_once_and_in_order_whatever_the_batch(records, samples, protocol, batch_size):
    result = evaluate.evaluate(_from_images, records, EvalOptions(SIZE, protocol=protocol, batch_size=batch_size))
    direct = (
        protocols.SurroundProtocol(min_depth=0.1, max_depth=80.0, point_rule="round")
        if protocol == "surround"
        else protocols.VfdepthProtocol(max_depth=80.0, point_rule="round")
    )
    for index, sample in enumerate(samples):
        batch = next(b for b, _, i in pipeline.eval_batches(records, SIZE, 1) if i == [index])
        arguments = (batch["ego_mask"][0],) if protocol == "vfdepth" else ()
        direct.add(_from_images(batch)[0], sample, *arguments)
    assert result.table == direct.table()
    assert result.samples == 5
    assert result.title == "folder 1 val, subset, n = 5"
    assert set(result.flat()) >= {"metric/abs_rel", "median/a1"}
    assert (
        ("shared_median/rmse" in result.flat()) == (protocol == "surround") == ("consistency/overall" in result.flat())
    )


def test_limit_is_spread_evenly_and_printed(records):
    seen = []

    def predict(batch):
        seen.append(float(np.asarray(batch["images"], np.float64).sum()))
        return np.full(batch["images"].shape[:4], 10.0)

    result = evaluate.evaluate(predict, records, EvalOptions(SIZE, limit=2))
    expected = [
        b["images"].astype(np.float64).sum() for b, _, i in pipeline.eval_batches(records, SIZE, 1) if i[0] in (0, 2)
    ]
    assert seen == expected
    assert result.samples == 2 and result.title.endswith("subset, n = 2")


def test_accumulated_training_labels_are_never_ground_truth(tmp_path, samples):
    plain = evaluate.evaluate(trivial.constant_predictor(10.0), _open(tmp_path / "a", samples), EvalOptions(SIZE))
    more = [
        eval_rigs.dataclasses.replace(s, extra_points=[p[::2] * np.float32([1, 1, 0.5]) for p in s.points])
        for s in samples
    ]
    extra = evaluate.evaluate(
        trivial.constant_predictor(10.0), _open(tmp_path / "b", more, sweeps=5), EvalOptions(SIZE)
    )
    assert plain.table == extra.table


def _open(folder, samples, **changes):
    return open_records(eval_rigs.write_folder(folder, samples, **changes))


def test_flip_tta_averages_with_the_mirrored_rig(records):
    def slanted(batch):
        ramp = np.linspace(-4.0, 4.0, SIZE[1], dtype=np.float32)
        return np.broadcast_to(10.0 + ramp, batch["images"].shape[:4])

    options = EvalOptions(SIZE, flip_tta=True)
    flipped = evaluate.evaluate(slanted, records, options)
    constant = evaluate.evaluate(trivial.constant_predictor(10.0), records, EvalOptions(SIZE))
    plain = evaluate.evaluate(slanted, records, EvalOptions(SIZE))
    for name, value in constant.flat().items():
        np.testing.assert_allclose(flipped.flat()[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert abs(plain.flat()["metric/abs_rel"] - constant.flat()["metric/abs_rel"]) > 1e-3
    assert "flip test-time augmentation ON" in flipped.to_markdown()
    assert "no test-time augmentation" in plain.to_markdown()


def test_flipped_batch_is_the_mirrored_rig(records):
    batch, _, _ = next(iter(pipeline.eval_batches(records, SIZE, 1)))
    flipped = evaluate.flip_batch(batch)
    expected = {name: value[0].copy() for name, value in batch.items() if name != "record_index"}
    transforms.flip_rig(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(flipped[name][0], value, rtol=1e-6, atol=1e-6, err_msg=name)
    rotation = np.asarray(flipped["cam_to_ego"])[0, :, :3, :3].astype(np.float64)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, atol=1e-6)
    np.testing.assert_allclose(
        geometry.optical_yaw(flipped["cam_to_ego"][0])[1], -geometry.optical_yaw(batch["cam_to_ego"][0])[1], atol=1e-6
    )


def test_titles_follow_the_manifest(tmp_path, samples):
    predict = trivial.constant_predictor(10.0)
    whole = _open(tmp_path / "whole", samples[:2], complete_split=True)
    assert evaluate.evaluate(predict, whole, EvalOptions(SIZE)).title == "folder 1 val, complete split, n = 2"
    assert "subset, n = 1" in evaluate.evaluate(predict, whole, EvalOptions(SIZE, limit=1)).title
    fewer = open_records(tmp_path / "whole", ["FRONT", "BACK"])
    assert "subset" in evaluate.evaluate(predict, fewer, EvalOptions(SIZE)).title
    wrong = _open(tmp_path / "wrong", samples[:2], complete_split=True, dataset="nuscenes")
    with pytest.raises(DataError, match="official split has 6019"):
        evaluate.evaluate(predict, wrong, EvalOptions(SIZE))
    other = eval_rigs.write_folder(tmp_path / "other", samples[:1], dataset="ddad", point_rule="truncate")
    with pytest.raises(ConfigError, match="one dataset at a time"):
        evaluate.evaluate(predict, open_records([tmp_path / "whole", other]), EvalOptions(SIZE))


def test_unusable_options_and_predictions_are_refused(records):
    with pytest.raises(ConfigError, match="surround, vfdepth"):
        EvalOptions(SIZE, protocol="p1")
    with pytest.raises(ConfigError, match="0 < min < max"):
        EvalOptions(SIZE, min_depth=5.0, max_depth=1.0)
    with pytest.raises(TrainingError, match=r"record 0, sample 'sample0'.*not finite"):
        evaluate.evaluate(trivial.constant_predictor(np.nan), records, EvalOptions(SIZE))
    with pytest.raises(DataError, match="no ground truth between"):
        evaluate.evaluate(trivial.constant_predictor(1.0), records, EvalOptions(SIZE, min_depth=1e-3, max_depth=2e-3))


def test_files_say_the_same_as_the_object(records, tmp_path):
    identity = {"commit": "0123abc", "versions": {"jax": "x"}, "step": 7}
    result = evaluate.evaluate(_from_images, records, EvalOptions(SIZE, num_pictures=2), run_identity=identity)
    files = result.write(tmp_path / "out")
    assert [f.name for f in files] == [
        "surround.md",
        "surround.json",
        "surround.csv",
        "surround_00.png",
        "surround_01.png",
    ]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
        f.name for f in files
    )  # no temporary file is left
    saved = json.loads(files[1].read_text())
    assert saved["table"] == result.table and saved["consistency"] == result.consistency
    assert saved["identity"] == identity | {"eval_data": "print of records"}
    assert saved["options"]["image_size"] == list(SIZE) and saved["options"]["flip_tta"] is False
    with open(files[2], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["protocol"] for row in rows} == {"surround"}
    for row in rows:
        expected = result.consistency if row["part"] == "consistency" else result.table[row["part"]][row["camera"]]
        value = expected[row["camera"]] if row["part"] == "consistency" else expected["abs_rel"]
        np.testing.assert_allclose(float(row["abs_rel"]), value, rtol=1e-6)
    text = files[0].read_text()
    assert result.title in text and "P1 `surround`" in text and "commit 0123abc" in text
    assert f"| metric | {result.flat()['metric/abs_rel']:.4f} |" in text
    assert [sample for sample, _ in result.pictures] == ["sample0", "sample4"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="cannot write the evaluation"):
        result.write(blocked)


def test_picture_of_one_record(records):
    picture = evaluate.picture_of(_from_images, records, 1, EvalOptions(SIZE))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.std() > 10


def test_row_medians(tmp_path):
    sample, _ = eval_rigs.rig(0, cameras=1, native=(8, 4), stored=(4, 2))
    u = [0, 1, 2, 3, 0, 1, 2]
    v = [0.0, 1.4, 0.5, 5.0, 6.0, 7.0, 7.4]  # rows of a 4-row network: 0 0 0 2 3 3 3
    z = [4.0, 8.0, 90.0, 5.0, 3.0, 1.0, 2.0]
    sample.points = [np.stack([u, v, z], 1).astype(np.float32)]
    records = _open(tmp_path / "one", [sample])
    found = trivial.row_medians(records, (4, 2), min_depth=0.1, max_depth=80.0)
    np.testing.assert_allclose(found, [[6.0, 5.5, 5.0, 2.0]])  # row 1 is interpolated, 90 m is out of range
    predicted = trivial.row_median_predictor(records, (4, 2), min_depth=0.1, max_depth=80.0)(
        {"images": np.zeros((2, 1, 4, 2, 3))}
    )
    np.testing.assert_allclose(predicted, np.broadcast_to(found[:, :, None], (2, 1, 4, 2)))
    with pytest.raises(DataError, match="camera FRONT"):
        trivial.row_medians(records, (4, 2), min_depth=100.0, max_depth=200.0)


# --- real frames -----------------------------------------------------------------------------------------------

GOLDEN = {
    "CAM_FRONT": (0.46339, 3052), "CAM_FRONT_LEFT": (0.44446, 3699), "CAM_BACK_LEFT": (0.50759, 4096),
    "CAM_BACK": (0.62455, 4786), "CAM_BACK_RIGHT": (0.56444, 3332), "CAM_FRONT_RIGHT": (0.55617, 3075),
}  # fmt: skip


def _convert(*arguments):
    subprocess.run([sys.executable, "-m", *arguments], check=True, capture_output=True, timeout=300)


@pytest.mark.real_data
def test_golden_values_of_the_nuscenes_keyframe(real_data, tmp_path):
    _convert(
        "data_prep.nuscenes", "--dataroot", str(real_data / "nuscenes_keyframe"), "--version", "v1.0-mini",
        "--split", "mini_train", "--out", str(tmp_path / "records"), "--workers", "1",
    )  # fmt: skip
    records = open_records(tmp_path / "records")
    result = evaluate.evaluate(trivial.constant_predictor(10.0), records, EvalOptions((352, 640)))
    assert result.title == "nuscenes v1.0-mini mini_train, subset, n = 1"
    for camera, (abs_rel, valid) in GOLDEN.items():
        assert round(result.table["metric"][camera]["abs_rel"], 5) == abs_rel
        assert result.pixels[camera] == valid
    expected = {"abs_rel": 0.52677, "sq_rel": 6.33264, "rmse": 13.72955, "rmse_log": 0.73051, "a1": 0.20346}
    assert {name: round(result.flat()[f"metric/{name}"], 5) for name in expected} == expected


@pytest.mark.real_data
def test_golden_values_of_the_ddad_clip(real_data, tmp_path):
    _convert(
        "data_prep.ddad", "--json", str(real_data / "ddad_val_clip/ddad.json"), "--split", "val",
        "--out", str(tmp_path / "records"), "--workers", "1",
    )  # fmt: skip
    records = open_records(tmp_path / "records")
    found = []
    for index in range(3):
        protocol = protocols.SurroundProtocol(min_depth=0.1, max_depth=200.0, point_rule=records.manifest.point_rule)
        protocol.add(np.full((6, 384, 640), 10.0), records[index])
        found.append(protocol.table()["metric"]["all"])
    assert [round(row["abs_rel"], 5) for row in found] == [0.55093, 0.55391, 0.55454]
    assert [round(row["rmse"], 5) for row in found] == [25.45036, 25.47330, 25.44309]
    result = evaluate.evaluate(
        trivial.constant_predictor(10.0), records, EvalOptions((384, 640), max_depth=200.0, batch_size=2)
    )
    np.testing.assert_allclose(result.flat()["metric/abs_rel"], np.mean([0.55093, 0.55391, 0.55454]), atol=1e-5)

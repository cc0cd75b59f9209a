"""The student that ships with the package: it opens by name, says what it is, and beats trivial predictors."""

import json
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from benchmarks import teacher_accuracy
from configs import student_world
from data_prep import nuscenes
from data_prep.world import __main__ as world
from fsmde_jax import predict
from fsmde_jax.evaluate import evaluate_run
from fsmde_jax.students import SHIPPED, read_student
from fsmde_jax.teacher import open_teacher
from tests import rooms
from tests.sample_factory import write_folder

ROOT = Path(__file__).resolve().parents[1]


def test_it_ships_small_with_a_card_and_the_readme_says_what_the_card_says():
    path = SHIPPED["lite0"]
    assert path.stat().st_size <= 10e6 and path.parent == ROOT / "fsmde_jax/students"
    card = json.loads(path.with_suffix(".json").read_text())
    identity, wanted = card["identity"], student_world.get_config().to_dict()
    for key in ("commit", "data", "date", "hardware", "versions"):
        assert identity[key], key
    for section in ("data", "augment", "model", "loss", "optim"):  # the recipe in configs/ is what it was made by
        later = {"average_decay": 0.0} if section == "optim" else {}  # a key that was not there yet
        assert {**later, **identity["config"][section]} == json.loads(json.dumps(wanted[section])), section
    assert "/" not in identity["config"]["train"]["encoder_weights"].replace("weights/", "", 1)
    (measured,) = [entry for entry in card["evaluations"] if entry["ground_truth"] == "lidar"]
    assert measured["metric"]["abs_rel"] < 0.6 * measured["best_trivial"]["abs_rel"]
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert f"{measured['metric']['abs_rel']:.4f}" in text


def test_it_opens_by_name_as_student_and_as_teacher():
    tree, meta, said = read_student("lite0")
    assert "lite0 (step" in said and meta["identity"]["config"]["model"]["encoder"] == "efficientnet_lite0"
    assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in jax.tree.leaves(tree))
    teacher = open_teacher("lite0")
    assert teacher.card.longer_side == 160 and teacher.card.max_depth is None
    # A road below a sky: the ground gets nearer towards the lower edge.
    image = np.full((1, 96, 160, 3), 0.5, np.float32)
    image[:, 48:] = -1.0
    r = np.asarray(jax.jit(teacher.module().apply)({"params": teacher.params}, image)["rel_inv_depth"])[0]
    assert r.min() > 0 and r[-8:].mean() > r[56:64].mean()


def test_pictures_of_an_image_folder_and_figures_as_a_relative_teacher(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(images / "a.png"), np.random.default_rng(0).integers(0, 255, (72, 120, 3), np.uint8))
    predict.main(["--teacher", "lite0", "--images", str(images), "--out", str(tmp_path / "out"), "--npy"])
    assert np.load(tmp_path / "out/a_depth.npy").shape == (72, 120)
    with pytest.raises(SystemExit):
        predict.main(["--teacher", "lite0", "--images", str(images), "--out", str(tmp_path / "x"), "--size", "20"])
    samples = [rooms.make(seed, cameras=3, native_size=(48, 96)) for seed in range(2)]
    records = write_folder(tmp_path / "records", samples)
    results = teacher_accuracy.measure(
        open_teacher("lite0"), str(records), truth="lidar", fit="", longer_side=96, max_depth=None, limit=1,
        num_pictures=0,
    )  # fmt: skip
    assert 0 < results.flat()["affine/abs_rel"] < 10


@pytest.mark.slow
def test_it_beats_predictors_without_a_network_on_streets_it_has_not_seen(tmp_path):
    flags = ["--rig", "nuscenes", "--scenes", "4", "--val_scenes", "4", "--frames", "1", "--image_size", "96x160"]
    world.main([*flags, "--seed", "77", "--workers", "1", "--out", str(tmp_path / "world")])
    for split in ("train", "val"):
        nuscenes.main([
            "--dataroot", str(tmp_path / "world"), "--version", "v1.0-trainval", "--split", split,
            "--image_size", "native", "--out", str(tmp_path / split), "--workers", "1",
        ])  # fmt: skip
    config = student_world.get_config()
    config.data.train_records, config.data.eval_records = str(tmp_path / "train"), str(tmp_path / "val")
    config.eval.num_pictures = 0
    results = evaluate_run(config, tmp_path / "run", "lite0")
    best = min(rows["all"]["abs_rel"] for rows in results.trivial.values())
    assert results.flat()["metric/abs_rel"] < 0.75 * best

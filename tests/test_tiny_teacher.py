"""The teacher that ships with the package: it opens by name, says what it is, and beats trivial predictors."""

import json
import re
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import teacher_accuracy
from data_prep import nuscenes
from data_prep.world import __main__ as world
from fsmde_jax.predict_images import predictor
from fsmde_jax.teacher import SHIPPED, open_teacher

ROOT = Path(__file__).resolve().parents[1]


def test_it_ships_small_with_a_card():
    path = SHIPPED["tiny"]
    assert path.stat().st_size <= 13e6
    card = json.loads(path.with_suffix(".json").read_text())
    for key in ("commit", "data", "date", "hardware", "step", "steps", "evaluations"):
        assert card["training"][key], key
    for measured in card["training"]["evaluations"]:
        assert {"abs_rel", "a1"} <= set(measured["affine"]) and measured["best_trivial"]["abs_rel"] > 0
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["tool"]["setuptools"]["package-data"]["fsmde_jax"] == ["teachers/*", "students/*"]
    assert path.parent == ROOT / "fsmde_jax/teachers"
    text = (ROOT / "docs/teacher.md").read_text(encoding="utf-8")
    for measured in card["training"]["evaluations"]:  # the documentation's figures are the card's
        shown = f"{measured['affine']['abs_rel']:.4f} / {measured['affine']['a1']:.4f}"
        assert re.search(re.escape(shown), text), shown


def test_it_opens_by_name_and_predicts_at_the_size_it_was_trained_at():
    teacher = open_teacher("tiny")
    assert teacher.card.variant == "tiny" and teacher.card.longer_side == 252 and teacher.card.max_depth is None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(teacher.params))
    # A road below a sky: the ground gets nearer towards the lower edge.
    image = np.full((196, 336, 3), (150, 180, 220), np.uint8)
    image[98:] = 90
    r = predictor(teacher)(image)
    assert r.shape == (196, 336) and r.min() >= 0
    assert r[-20:].mean() > r[110:130].mean() > r[:60].mean()


@pytest.mark.slow
def test_it_beats_predictors_without_a_network_on_streets_it_has_not_seen(tmp_path):
    flags = ["--rig", "nuscenes", "--scenes", "0", "--val_scenes", "3", "--frames", "1", "--image_size", "98x168"]
    world.main([*flags, "--seed", "77", "--workers", "1", "--out", str(tmp_path / "world")])
    nuscenes.main([
        "--dataroot", str(tmp_path / "world"), "--version", "v1.0-trainval", "--split", "val", "--image_size", "native",
        "--out", str(tmp_path / "records"), "--workers", "1",
    ])  # fmt: skip
    results = teacher_accuracy.measure(
        open_teacher("tiny"), str(tmp_path / "records"), truth="dense", fit="", longer_side=252, max_depth=None,
        limit=0, num_pictures=0,
    )  # fmt: skip
    found = {name: rows["all"]["abs_rel"] for name, rows in results.trivial.items()}
    # Rows of three scenes fit those scenes too well to be compared with; the ground plane and constants do not.
    assert results.flat()["affine/abs_rel"] < 0.9 * min(found["ground plane, capped"], found["constant, median"])

"""Cameras that are missing: dropped from training samples, and hidden from the network in an evaluation."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import missing_cameras
from configs import base
from fsmde_jax import build, evaluate, trivial
from fsmde_jax.data import augment, pipeline, transforms
from fsmde_jax.data.augment import AugmentOptions, Draw, cameras_left, draw
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError
from fsmde_jax.eval_data import split_cameras
from fsmde_jax.evaluate import EvalOptions
from fsmde_jax.state import make_predict
from tests import eval_rigs, rooms, sample_factory
from tests.random_network import random_variables
from tests.toy_encoder import toy_encoder

SIZE = (32, 64)
NAMES = sample_factory.RING_NAMES[6]


# --- training -------------------------------------------------------------------------------------------------------


def test_each_camera_goes_with_the_probability_and_the_first_to_go_is_any():
    draws = [draw(AugmentOptions(camera_dropout=0.3), 6, np.random.default_rng([1, i])) for i in range(3000)]
    gone = np.array([[i in d.dropped for i in range(6)] for d in draws])
    assert np.all(np.abs(gone.mean(0) - 0.3) < 0.03)
    pairs = np.cov(gone.T.astype(float)) - np.diag(gone.var(0))
    assert np.abs(pairs[~np.eye(6, dtype=bool)]).max() < 0.02  # one by one
    first = np.bincount([d.dropped[0] for d in draws if d.dropped], minlength=6)
    assert first.min() > 0.8 * first.mean()
    assert not any(draw(AugmentOptions(), 6, np.random.default_rng(i)).dropped for i in range(50))
    assert all(sorted(draw(AugmentOptions(camera_dropout=1.0), 4, np.random.default_rng(i)).dropped) == [0, 1, 2, 3]
               for i in range(5))  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_was_drawn_before_there_was_dropout_stays(dropout):
    for seed in range(20):
        rng = np.random.default_rng([7, seed])
        u, v = rng.random(5), rng.uniform(-1.0, 1.0, (6, 4))
        options = AugmentOptions(jitter_probability=1.0, camera_dropout=dropout)
        found = draw(options, 6, np.random.default_rng([7, seed]))
        assert found.flip == (u[0] < 0.5) and found.scale == 1.0 + (1.15 - 1.0) * u[1]
        assert found.offset == (u[2], u[3])
        np.testing.assert_array_equal(found.colour, v[:1] * [0.2, 0.2, 0.2, 0.05] + [1, 1, 1, 0])


def test_a_present_camera_always_stays():
    for present in itertools.product([False, True], repeat=3):
        for order in itertools.permutations(range(3)):
            for count in range(4):
                left = cameras_left(np.array(present), order[:count])
                assert not (left & ~np.array(present)).any() and left.any() == any(present)
                gone = [i for i in order[:count] if present[i]]
                lost = gone[: sum(present) - 1]
                assert left.tolist() == [p and i not in lost for i, p in enumerate(present)]


def test_a_probability_out_of_range_names_its_key():
    for wrong in (-0.1, 1.5):
        with pytest.raises(ConfigError, match=r"augment\.camera_dropout"):
            AugmentOptions(camera_dropout=wrong)


def load(sample, choice, **extras):
    batch = transforms.empty_batch(1, sample.num_cameras, SIZE, **extras)
    arrays = {name: array[0] for name, array in batch.items() if name != "record_index"}
    transforms.load_rig(sample, arrays, choice=choice)
    return arrays


@pytest.mark.parametrize("image_format", [".png", ".jpg"])
def test_a_dropped_camera_is_as_one_that_the_record_lacks(image_format):
    sample = rooms.make(3, native_size=(96, 192), masks=True, image_format=image_format)
    extras = {"dense_depth": True, "clean_images": True}
    choice = Draw(flip=True, scale=1.1, offset=(0.3, 0.4), colour=np.array([[1.1, 0.8, 1.2, 0.03]]), dropped=(4, 1))
    found, whole = load(sample, choice, **extras), load(sample, dataclasses.replace(choice, dropped=()), **extras)
    absent = {name: list(getattr(sample, name)) for name in ("images", "points", "dense_depth", "ego_masks")}
    for i in (1, 4):
        absent["images"][i] = absent["dense_depth"][i] = absent["ego_masks"][i] = b""
        absent["points"][i] = np.zeros((0, 3), np.float32)
    lacking = load(dataclasses.replace(sample, **absent), choice, **extras)
    assert found["view_mask"].tolist() == [True, False, True, True, False, True]
    for name in ("images", "clean_images", "depth", "dense_depth", "ego_mask", "view_mask"):
        np.testing.assert_array_equal(found[name], lacking[name], err_msg=name)
        assert not found[name][[1, 4]].any() and found[name][0].any()
    for name in ("intrinsics", "cam_to_ego", "ego_to_global"):
        np.testing.assert_array_equal(found[name], whole[name], err_msg=name)
    rest = [0, 2, 3, 5]
    for name in ("clean_images", "depth", "dense_depth", "ego_mask"):
        np.testing.assert_array_equal(found[name][rest], whole[name][rest], err_msg=name)


def test_the_last_present_camera_of_a_record_stays():
    sample = rooms.make(1, cameras=3, native_size=(48, 80))
    sample.images[0], sample.points[0] = b"", sample.points[0][:0]
    assert load(sample, Draw(dropped=(2, 1, 0)))["view_mask"].tolist() == [False, True, False]


def test_the_stream_loses_cameras_and_nothing_else_changes(tmp_path):
    records = open_records(sample_factory.make_folder(tmp_path / "train", 5, native_size=(24, 48)))

    def batches(dropout):
        options = AugmentOptions(jitter_probability=1.0, jitter_per_camera=True, camera_dropout=dropout)
        iterator = iter(pipeline.train_dataset(records, image_size=SIZE, batch_size=2, seed=3, augment=options))
        found = [next(iterator) for _ in range(20)]
        iterator.close()
        return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}

    plain, found = batches(0.0), batches(0.4)
    left = found["view_mask"]
    assert plain["view_mask"].all() and left.any(1).all() and abs(left.mean() - 0.6) < 0.1
    for name in ("record_index", "intrinsics", "cam_to_ego", "ego_to_global"):
        np.testing.assert_array_equal(found[name], plain[name], err_msg=name)
    for name in ("images", "depth", "ego_mask"):
        np.testing.assert_array_equal(found[name][left], plain[name][left], err_msg=name)
        assert not found[name][~left].any()


def make_config(**changes):
    c = base.get_config()
    c.data.image_size = SIZE
    c.model.decoder_channels = (4, 4, 8, 8, 8)
    c.model.num_bins = 8
    c.model.focal_range = (100.0, 900.0)
    c.update_from_flattened_dict(changes)
    return c


def test_config_reaches_the_augmentation():
    assert build.augment_options(make_config(**{"augment.camera_dropout": 0.25})).camera_dropout == 0.25
    assert build.augment_options(make_config()).camera_dropout == augment.NO_AUGMENT.camera_dropout == 0


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples():
    return [eval_rigs.rig(seed)[0] for seed in range(2)]


@pytest.fixture(scope="module")
def records(samples, tmp_path_factory):
    return open_records(eval_rigs.write_folder(tmp_path_factory.mktemp("records") / "rigs", samples))


@pytest.fixture(scope="module", params=[0, 1])
def student(request):
    """(cross_view_blocks, predictor): a random student whose blocks, where it has some, are not the identity."""
    model = build.build_model(make_config(**{"model.cross_view_blocks": request.param}))
    arguments = (jnp.zeros((1, 6, *SIZE, 3)), jnp.tile(jnp.eye(3), (1, 6, 1, 1)), jnp.tile(jnp.eye(4), (1, 6, 1, 1)))
    predict = make_predict(model, lambda outputs: outputs["pred_depth"])
    with toy_encoder():
        variables = random_variables(model, *arguments)
        yield request.param, lambda batch: predict(variables["params"], variables["batch_stats"], batch)


def differing(samples, camera, folder):
    """Records whose images of one camera are others."""
    others = [eval_rigs.rig(seed + 50)[0] for seed in range(len(samples))]
    changed = []
    for sample, other in zip(samples, others, strict=True):
        images = [other.images[i] if i == camera else image for i, image in enumerate(sample.images)]
        changed.append(dataclasses.replace(sample, images=images))
    return open_records(eval_rigs.write_folder(folder, changed))


def test_remaining_cameras_keep_their_metrics_and_see_nothing_of_the_dropped_one(student, records, samples, tmp_path):
    blocks, predict = student
    whole = evaluate.evaluate(predict, records, EvalOptions(SIZE))
    options = EvalOptions(SIZE, drop_cameras=("BACK_LEFT",))
    found = evaluate.evaluate(predict, records, options)
    rest = [name for name in NAMES if name != "BACK_LEFT"]
    for part in ("metric", "median"):
        assert list(found.table[part]) == [*rest, "all"]
        for camera in rest:
            same = found.table[part][camera] == pytest.approx(whole.table[part][camera], rel=1e-5)
            assert same or (blocks and camera in ("FRONT_LEFT", "BACK")), camera
        if blocks:  # neighbours did look at it
            for camera in ("FRONT_LEFT", "BACK"):
                change = found.table[part][camera]["abs_rel"] / whole.table[part][camera]["abs_rel"] - 1
                assert abs(change) > 1e-4
    assert found.table["metric"]["all"]["rmse"] == pytest.approx(
        np.mean([found.table["metric"][camera]["rmse"] for camera in rest])
    )
    assert {name: whole.pixels[name] for name in rest} == found.pixels
    assert not any("BACK_LEFT" in pair for pair in found.consistency) and "FRONT>FRONT_LEFT" in found.consistency
    other = differing(samples, 2, tmp_path / "other")
    assert evaluate.evaluate(predict, other, options).table == found.table
    changed = evaluate.evaluate(predict, other, EvalOptions(SIZE)).table["metric"]
    assert changed["BACK_LEFT"] != whole.table["metric"]["BACK_LEFT"]
    if not blocks:  # as if the rig had never had it, shared medians and overlaps included
        fewer = evaluate.evaluate(predict, open_records(records.folders[0], rest), EvalOptions(SIZE))
        for name, value in fewer.flat().items():
            assert found.flat()[name] == pytest.approx(value, rel=1e-5), name


def test_what_the_network_sees(records):
    seen = []

    def predict(batch):
        seen.append({name: np.array(value) for name, value in batch.items()})
        return np.full(batch["images"].shape[:4], 5.0)

    options = EvalOptions(SIZE, drop_cameras=("BACK", "FRONT"), batch_size=2)
    evaluate.evaluate(predict, records, options)
    evaluate.evaluate(predict, records, EvalOptions(SIZE, batch_size=2))
    hidden, whole = seen
    for name in ("images", "depth", "ego_mask", "view_mask"):
        assert not hidden[name][:, [0, 3]].any() and whole[name][:, [0, 3]].any()
        np.testing.assert_array_equal(hidden[name][:, [1, 2, 4, 5]], whole[name][:, [1, 2, 4, 5]])
    for name in ("intrinsics", "cam_to_ego", "ego_to_global"):
        np.testing.assert_array_equal(hidden[name], whole[name])


@pytest.mark.parametrize("protocol", ["surround", "vfdepth", "affine"])
def test_every_protocol_names_and_leaves_out_what_is_missing(records, protocol):
    options = EvalOptions(SIZE, protocol=protocol, drop_cameras=("FRONT", "BACK"), num_pictures=1)
    rng = np.random.default_rng(1)
    fixed = rng.uniform(2, 20, (1, 6, *SIZE)).astype(np.float32)
    baselines = {"five": trivial.constant_predictor(5.0)}
    result = evaluate.evaluate(lambda batch: fixed, records, options, baselines=baselines)
    rest = [name for name in NAMES if name not in ("FRONT", "BACK")]
    assert ", WITHOUT FRONT, BACK, subset, n = 2" in result.title and result.title in result.to_markdown()
    assert result.options["drop_cameras"] == ("FRONT", "BACK")
    assert list(result.pixels) == list(result.skipped) == rest
    whole = evaluate.evaluate(lambda batch: fixed, records, dataclasses.replace(options, drop_cameras=()))
    part = next(iter(result.table))
    assert {name: result.table[part][name] for name in rest} == {name: whole.table[part][name] for name in rest}
    assert set(result.trivial["five"]) == {*rest, "all"}
    assert "WITHOUT" not in whole.title
    picture = evaluate.picture_of(lambda batch: fixed, records, 0, options)
    assert picture.shape == result.pictures[0][1].shape != whole.pictures[0][1].shape


def test_unknown_names_and_dropping_all_are_refused(records):
    with pytest.raises(
        ConfigError, match=r"eval\.drop_cameras: no camera 'BACKLEFT'; .* 'BACK_LEFT'\? there are FRONT,"
    ):
        evaluate.check_records(records, EvalOptions(SIZE, drop_cameras=("BACKLEFT",)))
    with pytest.raises(ConfigError, match=r"drops every camera; leave at least one of FRONT, FRONT_LEFT"):
        evaluate.evaluate(trivial.constant_predictor(5.0), records, EvalOptions(SIZE, drop_cameras=tuple(NAMES)))
    assert split_cameras(["A", "B", "C"], ["C", "A", "C"]) == (["B"], [1], [0, 2])


# --- what they cost -------------------------------------------------------------------------------------------------


def test_gaps_and_their_costs_by_hand():
    gaps = missing_cameras.hidden_sets(NAMES)
    assert [len(sets) for sets in gaps.values()] == [6, 2, 6]
    assert gaps["every second"] == [tuple(NAMES[0::2]), tuple(NAMES[1::2])] and all(
        len(s) == 5 for s in gaps["all but one"]
    )
    found = missing_cameras.costs({"a": 1.0, "b": 2.0, "c": 4.0}, [{"a": 1.5, "b": 2.5}, {"c": 5.0}])
    assert found == {"with the gap": 3.5, "complete": 2.75, "change_percent": pytest.approx(100 * (3.5 / 2.75 - 1))}


@pytest.fixture
def toys():
    with toy_encoder():
        yield


@pytest.mark.slow
def test_the_benchmark_runs(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(missing_cameras, "STUDENTS", {"cross-view": (1, 0.3)})
    samples = [rooms.make(seed, cameras=3, native_size=(48, 96)) for seed in range(1)]
    records = str(sample_factory.write_folder(tmp_path / "rooms", samples))
    out = tmp_path / "out"
    flags = ["--train_records", records, "--eval_records", records, "--steps", "2", "--image_size", "32", "64"]
    missing_cameras.main([*flags, "--out", str(out)])
    content = json.loads((out / "results.json").read_text())
    model = content["identity"]["config"]["model"]
    assert model["cross_view_blocks"] == 1 and content["identity"]["config"]["augment"]["camera_dropout"] == 0.3
    row = content["students"]["cross-view"]
    cameras = open_records(records).cameras
    assert list(row["complete"]) == list(cameras) and set(row["gaps"]) == {"one of them", "every second", "all but one"}
    assert all(gap["change_percent"] != 0 for gap in row["gaps"].values())  # the others see that one is missing
    text = (out / "results.md").read_text()
    assert text.count("\n|") == 2 and text.strip() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        missing_cameras.main([*flags, "--out", str(out)])
    assert "exists; delete it" in capsys.readouterr().err
